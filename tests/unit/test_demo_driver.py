"""The demo's client: what it sends, measures and refuses."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import httpx
import pytest

from kvtier.demo.driver import ArmRun, Driver, TurnRecord, WorkError
from kvtier.demo.workload import Program, RecordedTurn, Workload, WorkloadConfig

WORKLOAD = Workload(
    WorkloadConfig(programs=2, turns=2),
    (
        Program(
            "ada",
            0.0,
            (RecordedTurn((1, 2, 3, 4), (5, 6), "grep", 0.01), RecordedTurn((7,), (8, 9), None, 0)),
        ),
        Program("bob", 0.01, (RecordedTurn((1, 2), (3,), None, 0.0),)),
    ),
)


class Server:
    """Answers as vLLM does: generates what is forced, and counts.

    Every prompt's first two tokens are GPU hits; half of what else was seen comes from outside.
    """

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []
        self.counts: Counter[str] = Counter()
        self.ready_after = 0
        self.change_output = False
        self.status = 200
        self.active = 0

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/metrics":
            return httpx.Response(200, text=self.metrics())
        body = json.loads(request.content)
        self.requests.append(request)
        if not body.get("stream"):
            self.count(len(body["prompt"]), 0, 0)
            return httpx.Response(200, json={})
        if self.status != httpx.codes.OK:
            return httpx.Response(self.status, text="out of order")
        return httpx.Response(200, content=self.stream(body))

    def count(self, prompt: int, gpu: int, external: int) -> None:
        self.counts["prompt"] += prompt
        self.counts["gpu"] += gpu
        self.counts["external"] += external

    def stream(self, body: dict[str, Any]) -> bytes:
        prompt, forced = body["prompt"], list(body["vllm_xargs"]["forced_token_ids"])
        assert body["max_tokens"] == len(forced)
        if self.change_output:
            forced[-1] += 1
        external = (len(prompt) - 2) // 2
        self.count(len(prompt), 2, external)
        self.counts["preemptions"] += 1
        usage = {"prompt_tokens_details": {"cached_tokens": 2 + external}}
        number = len(self.requests)
        events: list[dict[str, Any]] = [
            {"choices": [{"prompt_token_ids": prompt, "token_ids": forced[:1]}]},
            *({"choices": [{"token_ids": [token]}]} for token in forced[1:]),
            {"choices": [], "usage": usage, "metrics": {"queue_time_ms": 250.0}},
        ]
        lines = [f"data: {json.dumps({'id': f'cmpl-{number}'} | event)}\n\n" for event in events]
        return "".join([*lines, "data: [DONE]\n\n"]).encode()

    def metrics(self) -> str:
        c = self.counts
        self.ready_after -= 1
        computed = c["prompt"] - c["gpu"] - c["external"]
        return (
            f"vllm:prompt_tokens_total {c['prompt']}\n"
            f'vllm:prompt_tokens_by_source_total{{source="local_cache_hit"}} {c["gpu"]}\n'
            f'vllm:prompt_tokens_by_source_total{{source="external_kv_transfer"}} {c["external"]}\n'
            f'vllm:prompt_tokens_by_source_total{{source="local_compute"}} {computed}\n'
            "vllm:generation_tokens_total 0\n"
            f"vllm:num_preemptions_total {c['preemptions']}\n"
            "vllm:iteration_tokens_total_count 5\n"
            f"ready {int(self.ready_after < 0)}\n"
        )


def drive(server: Server, **options: Any) -> tuple[ArmRun, list[tuple[TurnRecord, bool]]]:
    seen: list[tuple[TurnRecord, bool]] = []
    driver = Driver(
        "http://engine",
        WORKLOAD,
        lambda record, last: seen.append((record, last)),
        transport=httpx.MockTransport(server),
        **options,
    )
    return asyncio.run(driver.run()), seen


async def answer_once(
    server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Answer a connection's first request, and hang up at its second one, as at the end of keep-alive."""
    head = await reader.readuntil(b"\r\n\r\n")
    line, *fields = head.decode().split("\r\n")
    method, path, _ = line.split(" ")
    headers = dict(field.lower().split(": ", 1) for field in fields if field)
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    response = await server(httpx.Request(method, f"http://engine{path}", content=body))
    status = (
        f"HTTP/1.1 {response.status_code} OK\r\ncontent-length: {len(response.content)}\r\n\r\n"
    )
    writer.write(status.encode() + response.content)
    await writer.drain()
    await reader.read(1)
    writer.close()


def test_no_request_is_lost_with_a_connection_that_the_server_gives_up() -> None:
    server = Server()

    async def run() -> ArmRun:
        listener = await asyncio.start_server(
            lambda reader, writer: answer_once(server, reader, writer), "127.0.0.1", 0
        )
        async with listener:
            port = listener.sockets[0].getsockname()[1]
            return await Driver(f"http://127.0.0.1:{port}", WORKLOAD, lambda *_: None).run()

    assert len(asyncio.run(run()).turns) == 3


def test_a_run_does_the_recorded_work_and_says_so() -> None:
    server = Server()
    run, seen = drive(server)
    assert run.work_digest == WORKLOAD.digest()
    assert [(turn.program, turn.turn) for turn in run.turns] == [("ada", 0), ("ada", 1), ("bob", 0)]
    assert sorted((record.program, last) for record, last in seen) == [
        ("ada", False),
        ("ada", True),
        ("bob", True),
    ]
    bodies = {
        (request.headers["X-Session-ID"], len(body["prompt"])): body
        for request in server.requests
        if (body := json.loads(request.content)).get("stream")
    }
    assert bodies["ada", 7]["prompt"] == [1, 2, 3, 4, 5, 6, 7]
    assert bodies.keys() == {("ada", 4), ("ada", 7), ("bob", 2)}


def test_turns_carry_times_and_token_sources() -> None:
    run, _ = drive(Server())
    first, second, bob = run.turns
    assert first.arrival_s <= first.first_token_s <= first.end_s < second.arrival_s
    assert second.arrival_s - first.end_s >= first.gap_s
    assert first.queue_s == 0.25
    assert (second.prompt_tokens, second.known_tokens, second.output_tokens) == (7, 6, 2)
    assert [turn.cached_tokens for turn in run.turns] == [3, 4, 2]
    assert all(turn.gpu_tokens + turn.cpu_tokens == turn.cached_tokens for turn in run.turns)
    # Which turn has which share depends on who shares a reading; the sum does not.
    assert sum(turn.cpu_tokens for turn in run.turns) == 3
    assert (second.computed_tokens, second.recomputed_tokens) == (3, 2)
    assert bob.recomputed_tokens == 0
    assert len({turn.request_id for turn in run.turns}) == 3


def test_counters_leave_the_warm_up_out() -> None:
    run, _ = drive(Server())
    assert run.counters.prompt_tokens == 4 + 7 + 2
    assert run.counters.external_hit_tokens == 1 + 2
    assert run.counters.preemptions == 3


def test_programs_wait_for_the_gauge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtier.demo.driver._READY_POLL_S", 0.0)
    server = Server()
    server.ready_after = 3
    drive(server, ready_gauge="ready")
    kinds = [bool(json.loads(request.content).get("stream")) for request in server.requests]
    assert kinds == [False] * 4 + [True] * 3


def test_a_gauge_that_stays_down_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtier.demo.driver._READY_TIMEOUT_S", -1.0)
    server = Server()
    server.ready_after = 10
    with pytest.raises(WorkError, match="ready was not 1"):
        drive(server, ready_gauge="ready")


def test_other_output_than_recorded_is_refused() -> None:
    server = Server()
    server.change_output = True
    with pytest.raises(WorkError, match="other work than recorded"):
        drive(server)


def test_a_refused_request_is_told() -> None:
    server = Server()
    server.status = 503
    with pytest.raises(WorkError, match="HTTP 503: out of order"):
        drive(server)
