"""The ASGI middleware: what it fills in, and that everything else passes as it came."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from kvtier import middleware as front
from kvtier.frontend.clients import Repeats, bounded
from kvtier.identity.request_params import MAX_TEXT_BYTES, parse_transfer_params
from kvtier.middleware import NAMED, ROUTES, KVTierMiddleware

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from starlette.requests import Request

CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"
JSON = (b"content-type", b"application/json")
CHANGED = {"session_id", "kv_transfer_params"}
SESSION = "0f8fad5b-d9cb-469f-a165-70867728950e"


class Inner:
    """An application that reads its whole body, and remembers what it saw."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.scope: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scope = scope
        while True:
            message = await receive()
            self.messages.append(message)
            if message["type"] != "http.request" or not message.get("more_body", False):
                return

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)

    def header(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.scope["headers"] if key == name]


def chunks(*parts: bytes) -> list[dict[str, Any]]:
    return [
        {"type": "http.request", "body": part, "more_body": number < len(parts) - 1}
        for number, part in enumerate(parts)
    ]


def send_to(
    app: Any,
    body: bytes | list[dict[str, Any]],
    headers: Iterable[tuple[bytes, bytes]] = (),
    *,
    path: str = CHAT,
    content_type: bytes | None = b"application/json",
    **scope: Any,
) -> None:
    messages = iter(chunks(body) if isinstance(body, bytes) else body)
    found: dict[str, Any] = {"type": "http", "method": "POST", "path": path, "root_path": ""}
    found["headers"] = [] if content_type is None else [(b"content-type", content_type)]
    found["headers"] += headers
    if isinstance(body, bytes):
        found["headers"].append((b"content-length", b"%d" % len(body)))

    async def receive() -> Any:
        return next(messages)

    async def send(message: Any) -> None:
        raise AssertionError(message)

    asyncio.run(app(found | scope, receive, send))


def passed(
    body: bytes | list[dict[str, Any]], headers: Iterable[tuple[bytes, bytes]] = (), **options: Any
) -> Inner:
    inner = Inner()
    send_to(KVTierMiddleware(inner), body, headers, **options)
    return inner


def filled(fields: dict[str, Any], *headers: tuple[str, str], path: str = CHAT) -> dict[str, Any]:
    """What the middleware may change, as it is afterwards; all else must be as it was."""
    raw = [(name.lower().encode(), value.encode()) for name, value in headers]
    after = json.loads(passed(json.dumps(fields).encode(), raw, path=path).body)
    assert all(after[key] == value for key, value in fields.items() if key not in CHANGED)
    assert after.keys() - fields.keys() <= CHANGED
    return {key: value for key, value in after.items() if key in CHANGED}


# -- who names the program -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "name"),
    [
        ([("X-Dynamo-Session-ID", "d")], "d"),
        ([("X-Claude-Code-Session-Id", SESSION)], SESSION),
        (
            [("X-Claude-Code-Session-Id", SESSION), ("X-Claude-Code-Agent-Id", "a1")],
            f"{SESSION}/a1",
        ),
        ([("thread-id", "t"), ("session-id", "s")], "t"),
        ([("session-id", "s")], "s"),
        ([("session_id", "s")], "s"),
        ([("x-session-affinity", "o")], "o"),
        # An agent id without its session says nothing.
        ([("X-Claude-Code-Agent-Id", "a1")], None),
        ([("X-Dynamo-Session-ID", "  d ")], "d"),
        ([("X-Dynamo-Session-ID", " ")], None),
        ([("X-Request-ID", "r"), ("x-llm-d-inference-fairness-id", "tenant")], None),
    ],
)
def test_agents_headers_name_the_program(headers: list[tuple[str, str]], name: str | None) -> None:
    assert filled({"model": "m"}, *headers) == ({} if name is None else {"session_id": name})


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"nvext": {"session_control": {"session_id": "n", "action": "bind"}}}, "n"),
        ({"nvext": {"agent_hints": {"prefix_id": "p", "osl": 5}}}, "p"),
        ({"metadata": {"user_id": f"user_ab_account_cd_session_{SESSION}"}}, SESSION),
        ({"metadata": {"user_id": json.dumps({"session_id": SESSION})}}, SESSION),
        ({"metadata": {"user_id": "user_ab"}}, None),
        ({"metadata": {"user_id": '{"session_id": 5}'}}, None),
        ({"metadata": {"user_id": '{"device_id": "x"}'}}, None),
        ({"metadata": "user"}, None),
        ({"prompt_cache_key": "k"}, "k"),
        ({"prompt_cache_key": 5}, None),
        ({"prompt_cache_key": ""}, None),
        ({"nvext": 5, "prompt_cache_key": "k"}, "k"),
        ({"nvext": {"session_control": [], "agent_hints": {"prefix_id": "p"}}}, "p"),
        ({"user": "u"}, None),
    ],
)
def test_fields_of_the_body_name_the_program(fields: dict[str, Any], name: str | None) -> None:
    assert filled(fields) == ({} if name is None else {"session_id": name})


def test_the_first_sign_in_the_documented_order_counts() -> None:
    headers = [
        ("X-Dynamo-Session-ID", "dynamo"),
        ("X-Claude-Code-Session-Id", "claude"),
        ("thread-id", "thread"),
        ("session-id", "session"),
        ("session_id", "old"),
        ("x-session-affinity", "opencode"),
    ]
    fields: dict[str, Any] = {
        "nvext": {"session_control": {"session_id": "control"}, "agent_hints": {"prefix_id": "pf"}},
        "metadata": {"user_id": "x_session_user"},
        "prompt_cache_key": "key",
    }
    seen = []
    while headers:
        seen.append(filled(fields, *headers)["session_id"])
        headers.pop(0)
    seen.append(filled(fields)["session_id"])
    del fields["nvext"]["session_control"]
    seen.append(filled(fields)["session_id"])
    del fields["nvext"]
    seen.append(filled(fields)["session_id"])
    del fields["metadata"]
    seen.append(filled(fields)["session_id"])
    assert seen == [
        *("dynamo", "claude", "thread", "session", "old", "opencode"),
        *("control", "pf", "user", "key"),
    ]


@pytest.mark.parametrize(
    ("fields", "headers"),
    [
        ({"session_id": "mine"}, []),
        ({}, [("X-Session-ID", "mine")]),
        ({"vllm_xargs": {"session_id": "mine"}}, []),
        ({"kv_transfer_params": {"kvtier": {"program": "mine"}}}, []),
        # Wrong, and vLLM or kvtier will say so; not for the middleware to mend.
        ({"session_id": 5}, []),
        ({"kv_transfer_params": {"kvtier": {"program": 5}}}, []),
    ],
)
def test_what_a_client_says_itself_wins(
    fields: dict[str, Any], headers: list[tuple[str, str]]
) -> None:
    body = json.dumps({**fields, "prompt_cache_key": "k"}).encode()
    raw = [(name.lower().encode(), value.encode()) for name, value in headers]
    inner = passed(body, [*raw, (b"x-dynamo-session-id", b"d")])
    assert inner.body == body


@pytest.mark.parametrize("nothing", [None, ""])
def test_an_empty_session_id_is_none(nothing: str | None) -> None:
    assert filled({"session_id": nothing, "prompt_cache_key": "k"}) == {"session_id": "k"}


def test_a_side_request_of_claude_code_is_no_turn_of_its_session() -> None:
    session = ("X-Claude-Code-Session-Id", SESSION)
    assert filled({}, session, ("X-Claude-Code-Request-Class", "auxiliary")) == {}
    assert filled({}, session, ("X-Claude-Code-Request-Class", "main")) == {"session_id": SESSION}


@pytest.mark.parametrize("path", [path for path, route in ROUTES.items() if not route.session_id])
def test_where_vllm_reads_no_session_id_kvtier_gets_the_name(path: str) -> None:
    after = filled({}, ("X-Claude-Code-Session-Id", SESSION), path=path)
    assert after == {"kv_transfer_params": {"kvtier": {"program": SESSION}}}


@pytest.mark.parametrize("path", [path for path, route in ROUTES.items() if route.session_id])
def test_elsewhere_vllm_gets_it(path: str) -> None:
    assert filled({}, ("session-id", "s"), path=path) == {"session_id": "s"}


def test_a_correlation_id_counts_from_its_second_request_on() -> None:
    inner = Inner()
    app = KVTierMiddleware(inner)
    for number in range(3):
        inner.messages.clear()
        send_to(app, b"{}", [(b"x-correlation-id", b"c")])
        assert json.loads(inner.body) == ({"session_id": "c"} if number else {})
        # A gateway's own, new for every request.
        inner.messages.clear()
        send_to(app, b"{}", [(b"x-correlation-id", b"r%d" % number)])
        assert inner.body == b"{}"


def test_a_correlation_id_comes_last() -> None:
    inner = Inner()
    app = KVTierMiddleware(inner)
    for _ in range(2):
        inner.messages.clear()
        send_to(app, b'{"prompt_cache_key": "k"}', [(b"x-correlation-id", b"c")])
    assert json.loads(inner.body)["session_id"] == "k"


def test_names_that_come_least_are_forgotten() -> None:
    repeats = Repeats(limit=2)
    assert [repeats.again(name) for name in "abab"] == [False, False, True, True]
    assert repeats.again("a")
    assert not repeats.again("c")
    assert repeats.again("a")
    assert not repeats.again("b")


# -- hints -----------------------------------------------------------------------------------------


def marked(ttl: str | None) -> dict[str, Any]:
    mark = {"type": "ephemeral"} | ({} if ttl is None else {"ttl": ttl})
    return {"type": "text", "text": "x", "cache_control": mark}


@pytest.mark.parametrize(
    ("fields", "ttl_s"),
    [
        ({"messages": [{"role": "user", "content": [marked("5m")]}]}, 300.0),
        ({"system": [marked("1h")], "messages": [{"role": "user", "content": "x"}]}, 3600.0),
        ({"tools": [{"name": "t", "cache_control": {"ttl": "1h"}}]}, 3600.0),
        # The last mark covers the most.
        (
            {"system": [marked("1h")], "messages": [{"role": "user", "content": [marked("5m")]}]},
            300.0,
        ),
        ({"tools": [{"cache_control": {"ttl": "5m"}}], "system": [marked("1h")]}, 3600.0),
        ({"messages": [{"content": [marked("5m")]}, {"content": [marked("1h")]}]}, 3600.0),
        ({"messages": [{"content": [marked("5m"), marked("1h")]}, {"content": "x"}]}, 3600.0),
        # Its default is not asked for.
        ({"system": [marked("1h")], "messages": [{"role": "u", "content": [marked(None)]}]}, None),
        ({"nvext": {"cache_control": {"type": "ephemeral", "ttl": "30s"}}}, 30.0),
        ({"nvext": {"cache_control": {"ttl": "2m"}}, "system": [marked("1h")]}, 120.0),
        ({"nvext": {"cache_control": {"ttl": "169h"}}}, None),
        ({"nvext": {"cache_control": {"ttl": "forever"}}}, None),
        ({"nvext": {"cache_control": {"ttl": 5}}}, None),
        ({"messages": [5, {"role": "user", "content": [marked("5m")]}, 5]}, 300.0),
        ({"messages": [{"role": "user", "content": ["x", marked("5m")]}]}, None),
        ({"messages": [{"role": "user", "content": None}]}, None),
        ({"messages": [{"role": "user", "content": 'no "cache_control": {"ttl": "5m"}'}]}, None),
    ],
)
def test_a_cache_mark_that_names_its_ttl_becomes_a_hint(
    fields: dict[str, Any], ttl_s: float | None
) -> None:
    expected = {} if ttl_s is None else {"kv_transfer_params": {"kvtier": {"ttl_s": ttl_s}}}
    assert filled(fields, path=MESSAGES) == expected


@pytest.mark.parametrize("value", ["true", "1", "True"])
def test_the_last_request_of_a_session_ends_its_program(value: str) -> None:
    after = filled({}, ("X-Dynamo-Session-ID", "d"), ("X-Dynamo-Session-Final", value))
    assert after == {"session_id": "d", "kv_transfer_params": {"kvtier": {"end": True}}}
    assert filled({}, ("X-Dynamo-Session-Final", "false")) == {}


def test_a_closed_session_ends_its_program() -> None:
    control = {"session_control": {"session_id": "n", "action": "close"}}
    after = filled({"nvext": control})
    assert after == {"session_id": "n", "kv_transfer_params": {"kvtier": {"end": True}}}


def test_hints_of_the_client_stay_next_to_what_is_added() -> None:
    params = {"do_remote_decode": False, "kvtier": {"ttl_s": 5, "end": None, "stage": False}}
    fields = {"kv_transfer_params": params, "system": [marked("1h")]}
    after = filled(fields, ("X-Dynamo-Session-Final", "1"), ("session-id", "s"), path=MESSAGES)
    kvtier = {"ttl_s": 5, "end": True, "stage": False, "program": "s"}
    assert after == {"kv_transfer_params": {"do_remote_decode": False, "kvtier": kvtier}}


def test_a_client_that_says_it_goes_on_goes_on() -> None:
    params = {"kvtier": {"end": False}}
    after = filled({"kv_transfer_params": params}, ("X-Dynamo-Session-Final", "1"))
    assert after == {"kv_transfer_params": params}


@pytest.mark.parametrize("params", [5, [], "x", {"kvtier": 5}, {"kvtier": []}])
def test_params_of_another_type_are_left_to_vllm(params: Any) -> None:
    body = json.dumps({"kv_transfer_params": params}).encode()
    assert passed(body, [(b"session-id", b"s")]).body == body


def test_null_params_are_filled_in() -> None:
    for params in (None, {"kvtier": None}, {}):
        after = filled({"kv_transfer_params": params}, ("session-id", "s"), path=MESSAGES)
        assert after == {"kv_transfer_params": {"kvtier": {"program": "s"}}}


@given(st.binary(max_size=2000))
def test_whatever_a_header_says_the_name_is_one_that_kvtier_accepts(value: bytes) -> None:
    body = passed(b"{}", [(b"x-dynamo-session-id", value)], path=MESSAGES).body
    hints, errors = parse_transfer_params(json.loads(body).get("kv_transfer_params"))
    assert errors == ()
    assert (hints.program is None) == (not value.decode(errors="surrogateescape").strip())


@given(st.text(max_size=600), st.text(max_size=600))
def test_bounding_a_name_keeps_names_apart(one: str, other: str) -> None:
    assert len(bounded(one).encode()) <= MAX_TEXT_BYTES
    assert bounded(one).isprintable()
    assert (bounded(one) == bounded(other)) == (one == other)


@pytest.mark.parametrize("name", ["é" * 200, "x" * 257, "a\nb", "a\0"])
def test_a_name_that_kvtier_would_refuse_becomes_a_digest(name: str) -> None:
    assert bounded(name).startswith("blake2b:")


# -- bytes -----------------------------------------------------------------------------------------

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
SIGNS = (
    (b"x-dynamo-session-id", b"d"),
    (b"x-dynamo-session-final", b"1"),
    (b"x-correlation-id", b"c"),
)


@given(st.binary() | JSON_VALUES.map(lambda value: json.dumps(value).encode()))
def test_bytes_that_are_no_json_object_pass_unchanged(body: bytes) -> None:
    try:
        is_object = isinstance(json.loads(body), dict)
    except (ValueError, RecursionError):
        is_object = False
    after = passed(body, SIGNS).body
    if not is_object:
        assert after == body


@given(st.dictionaries(st.text(), JSON_VALUES), st.sampled_from(sorted(ROUTES)))
def test_every_other_field_means_the_same_afterwards(fields: dict[str, Any], path: str) -> None:
    fields = {key: value for key, value in fields.items() if key not in CHANGED}
    body = json.dumps(fields).encode()
    after = json.loads(passed(body, SIGNS, path=path).body)
    kept = {key: value for key, value in after.items() if key not in CHANGED}
    # As text: NaN is not equal to itself.
    assert json.dumps(kept) == json.dumps(fields)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"a": 1} x',
        b'{"a": "\xff"}',
        b'{"a": NaN}',
        b'\xef\xbb\xbf{"a": 1}',
        '{"a": 1}'.encode("utf-16"),
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
    ids=lambda body: repr(body[:12]),
)
def test_a_malformed_body_passes_byte_for_byte(body: bytes) -> None:
    assert passed(body, SIGNS).body == body


def test_numbers_and_escapes_keep_their_bytes() -> None:
    body = rb'{"a": [1.50, 1e3, 123456789012345678901234567890], "b": "\u00e9\/", "c": {"d" : 1 } }'
    after = passed(body, SIGNS).body
    for piece in (rb"[1.50, 1e3, 123456789012345678901234567890]", rb'"\u00e9\/"', rb'{"d" : 1 }'):
        assert piece in after


def test_the_length_is_corrected() -> None:
    inner = passed(b'{"model": "m"}', SIGNS)
    assert inner.header(b"content-length") == [b"%d" % len(inner.body)]


def test_a_body_in_pieces_is_filled_in() -> None:
    inner = passed(chunks(b'{"mod', b"", b'el": "m"', b"}"), SIGNS)
    assert json.loads(inner.body)["session_id"] == "d"
    assert inner.header(b"content-length") == []


def test_a_body_over_the_limit_passes_in_its_pieces() -> None:
    inner = Inner()
    pieces = chunks(b'{"a": "', b"x" * 90, b"x" * 20, b'"}')
    send_to(KVTierMiddleware(inner, max_body_bytes=100), pieces, SIGNS)
    assert inner.messages == pieces


def test_a_length_over_the_limit_is_not_buffered_at_all() -> None:
    inner = Inner()
    body = b'{"a": "' + b"x" * 100 + b'"}'
    send_to(KVTierMiddleware(inner, max_body_bytes=100), body, SIGNS)
    assert inner.messages == chunks(body)


@pytest.mark.parametrize("length", [b"", b"-1", b"x", b"9" * 5000])
def test_a_length_that_is_no_number_is_vllms_affair(length: bytes) -> None:
    inner = Inner()
    send_to(KVTierMiddleware(inner), chunks(b"{}"), [*SIGNS, (b"content-length", length)])
    assert inner.body == b"{}"


@pytest.mark.parametrize(
    "scope",
    [
        {"path": "/v1/embeddings"},
        {"path": "/v1/chat/completions/"},
        {"path": "/tokenize"},
        {"method": "GET"},
        {"content_type": b"text/plain"},
        {"content_type": None},
    ],
)
def test_other_requests_pass_without_buffering(scope: dict[str, Any]) -> None:
    pieces = chunks(b'{"a"', b": 1}")
    assert passed(pieces, SIGNS, **scope).messages == pieces


def test_the_root_path_of_a_proxy_is_left_out() -> None:
    inner = passed(b"{}", SIGNS, path="/llm/v1/chat/completions", root_path="/llm")
    assert json.loads(inner.body)["session_id"] == "d"


def test_a_content_type_with_a_charset_is_json() -> None:
    inner = passed(b"{}", SIGNS, content_type=b"Application/JSON; charset=utf-8")
    assert json.loads(inner.body)["session_id"] == "d"


def test_a_client_that_leaves_is_seen_as_it_leaves() -> None:
    messages = [*chunks(b'{"a": ', b"")[:1], {"type": "http.disconnect"}]
    assert passed(messages, SIGNS).messages[-1] == {"type": "http.disconnect"}
    inner = Inner()

    async def twice(scope: Any, receive: Any, send: Any) -> None:
        await inner(scope, receive, send)
        inner.messages.append(await receive())

    send_to(KVTierMiddleware(twice), [*chunks(b"{}"), {"type": "http.disconnect"}], SIGNS)
    assert [message["type"] for message in inner.messages] == ["http.request", "http.disconnect"]


def test_a_receive_that_is_cancelled_loses_nothing() -> None:
    async def scenario() -> bytes:
        queue: asyncio.Queue[Any] = asyncio.Queue()
        taken = asyncio.Event()
        got = b""

        async def get() -> Any:
            if queue.empty():
                taken.set()
            return await queue.get()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            nonlocal got
            first = asyncio.ensure_future(receive())
            await taken.wait()
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            queue.put_nowait(rest)
            got = (await receive())["body"]

        begin, rest = chunks(b'{"model"', b': "m"}')
        queue.put_nowait(begin)
        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [JSON, *SIGNS]}
        await KVTierMiddleware(app)(scope, get, None)
        return got

    assert json.loads(asyncio.run(scenario()))["model"] == "m"


def test_a_request_that_is_refused_unread_is_not_read() -> None:
    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        return

    # A body that is asked for would raise StopIteration.
    send_to(KVTierMiddleware(refuse), [], SIGNS)


def test_a_fault_of_kvtier_itself_is_logged_once_and_the_request_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(front, "fill_in", broken)
    inner = Inner()
    app = KVTierMiddleware(inner)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            send_to(app, b"{}", SIGNS)
    assert inner.body == b"{}" * 3
    assert len(caplog.records) == 1


# -- in a real application -------------------------------------------------------------------------


async def echo(request: Request) -> JSONResponse:
    return JSONResponse({"body": await request.json(), "length": request.headers["content-length"]})


async def stream(request: Request) -> StreamingResponse:
    name = (await request.json())["session_id"]

    async def parts() -> AsyncIterator[str]:
        for number in range(3):
            yield f"data: {name} {number}\n\n"

    return StreamingResponse(parts(), media_type="text/event-stream")


def ask(path: str, **options: Any) -> httpx.Response:
    routes = [
        Route(CHAT, echo, methods=["POST"]),
        Route("/v1/completions", stream, methods=["POST"]),
    ]
    app = Starlette(routes=routes, middleware=[Middleware(KVTierMiddleware)])

    async def request() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, **options)

    return asyncio.run(request())


def test_an_application_reads_the_filled_in_body() -> None:
    answer = ask(CHAT, json={"model": "m"}, headers={"session-id": "s"}).json()
    assert answer["body"] == {"model": "m", "session_id": "s"}
    assert int(answer["length"]) == len(b'{"model":"m","session_id":"s"}')


def test_responses_stream_through() -> None:
    answer = ask("/v1/completions", json={}, headers={"X-Claude-Code-Session-Id": "s"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text == "data: s 0\n\ndata: s 1\n\ndata: s 2\n\n"


def test_requests_are_counted_by_who_named_them() -> None:
    def count(source: str) -> float:
        return NAMED.labels(source)._value.get()

    before = {source: count(source) for source in ("client", "codex", "none")}
    ask(CHAT, json={"session_id": "mine"})
    ask(CHAT, json={}, headers={"thread-id": "t"})
    ask(CHAT, json={})
    assert {source: count(source) - n for source, n in before.items()} == dict.fromkeys(before, 1.0)
