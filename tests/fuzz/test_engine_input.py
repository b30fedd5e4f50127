"""What reaches an engine from outside: parameters of requests, and messages of whoever has the link's socket.

Whatever they say, requests are served with the right KV, and a sensible command that follows is answered.
"""

from __future__ import annotations

from typing import Any, get_args

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from kvtier import link_messages as messages
from kvtier.programs import ProgramId
from tests.fuzz.hostile import NUMBERS, TEXTS, VALUES, damaged_bytes, fuzz
from tests.model.wire import scripted_link
from tests.unit.fake_vllm import FakeRequest
from tests.unit.mini_engine import MiniEngine

FIELDS = ("program", "tool", "ttl_s", "end", "pin", "stage", "wake", "more")
UNIX_S = 1_700_000_000.0
KINDS = {kind.__name__: kind for kind in get_args(messages.Command)}
KEYS = st.one_of(
    st.sampled_from(
        [[None, "agent"], [None, "agent", True], ["acme", "agent"], [None, "r0#1", False]]
    ),
    VALUES,
)


def check_serving(engine: MiniEngine) -> None:
    """It serves, and everything it has taken can be given back."""
    engine.run(FakeRequest("last", list(range(30)), session_id="agent"))
    assert "internal" not in str(engine.stats.totals.keys())
    engine.half.before_reset()
    assert engine.half.pins.pinned_blocks == engine.half.pins.held_blocks == 0


@fuzz(60)
@given(
    st.lists(
        st.one_of(
            VALUES,
            st.builds(lambda hints: {"kvtier": hints}, VALUES),
            st.builds(
                lambda hints: {"kvtier": hints},
                st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4),
            ),
        ),
        min_size=1,
        max_size=3,
    ),
    TEXTS,
    # vLLM takes an empty salt for none.
    st.none() | TEXTS.filter(bool),
)
def test_parameters_of_requests(params: list[Any], session: str, salt: str | None) -> None:
    engine = MiniEngine()
    for i, one in enumerate(params):
        is_wake = (
            isinstance(one, dict)
            and isinstance(one.get("kvtier"), dict)
            and "wake" in one["kvtier"]
        )
        if is_wake:
            # vLLM's front end takes it from nobody but the waker.
            continue
        request = FakeRequest(
            f"r{i}",
            list(range(10 + i)),
            session_id=session,
            cache_salt=salt,
            kv_transfer_params=one,
        )
        engine.run(request)
    check_serving(engine)


def plausible(kind: type[msgspec.Struct]) -> st.SearchStrategy[dict[str, Any]]:
    """A message of this kind whose fields may be anything."""
    fields = {field.name: VALUES | NUMBERS | TEXTS for field in msgspec.structs.fields(kind)}
    fields |= {"id": st.integers(1, 2**62) | VALUES, "type": st.just(kind.__name__)}
    if "program" in fields:
        fields["program"] = KEYS
    required = {"id": fields.pop("id"), "type": fields.pop("type")}
    required |= {name: fields.pop(name) for name in ("program",) if name in fields}
    return st.fixed_dictionaries(required, optional=fields)


COMMANDS = st.sampled_from(sorted(KINDS)).flatmap(lambda name: plausible(KINDS[name]))


def encoded(value: Any) -> bytes:
    try:
        return msgspec.msgpack.encode(value)
    except (OverflowError, UnicodeEncodeError):
        # No frame can say this.
        return b"\xc1"


@fuzz(60)
@given(
    st.lists(
        st.one_of(
            COMMANDS.map(encoded),
            COMMANDS.map(encoded).flatmap(damaged_bytes),
            st.binary(max_size=100),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_messages_to_engines(frames: list[bytes]) -> None:
    made: list[MiniEngine] = []
    link, wire = scripted_link(
        lambda: made[0].half, lambda: made[0].now_s, lambda: UNIX_S + made[0].now_s
    )
    engine = MiniEngine(link=link)
    made.append(engine)
    wire.command(messages.Resync())
    engine.run(FakeRequest("r0", list(range(20)), session_id="agent"))
    for frame in frames:
        wire.inbox.append(frame)
        engine.now_s += 1.0
        engine.wake()
    wire.due.clear()
    key = messages.ProgramKey(None, "agent")
    wire.command(messages.PolicyCommand(id=7, mode="on", pin_budget_fraction=1.0, max_ttl_s=60.0))
    wire.command(messages.EndCommand(id=8, program=key))
    engine.now_s += 1.0
    engine.wake()
    assert wire.due[7] == wire.due[8] == 0, "each command is answered once"
    assert ProgramId(None, "named", "agent") not in engine.half.programs._programs
    check_serving(engine)
