"""The control API from outside, on `kvtier serve`: real vLLM, LMCache and control server."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from kvtier.client import KVTierClient, NotFound, TtlScope
from kvtier.demo.servers import ServerGroup, free_ports
from kvtier.serving.engine_env import engine_env
from tests.engine.engine_harness import tokens

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvtier.client import Program

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

N_BLOCKS = 100
SETTINGS = {
    "kvtier.chunk_tokens": 64,
    "kvtier.dram_gb": 0.25,
    "kvtier.server_grace_s": 3.0,
    "kvtier.control_listen": "none",
    # Two seconds saved that nobody would notice; the model has no profile.
    "kvtier.calibrate": "off",
    # On a tiny model computing anew beats loading: what is under test is the load.
    "kvtier.reload": "always",
}


@dataclass
class Served:
    """A server and its clients. `turn` runs a program's next turn."""

    url: str
    socket: str
    client: KVTierClient
    http: httpx.Client
    model: str
    contexts: dict[str, list[int]] = field(default_factory=dict)
    turns: Counter[str] = field(default_factory=Counter)

    def turn(self, program: str, n_new: int = 640, **hints: Any) -> dict[str, Any]:
        """Send the program's context and some new tokens; returns what kvtier says to it."""
        self.turns[program] += 1
        context = self.contexts.setdefault(program, [])
        context += tokens(f"{program}-{len(context)}", n_new)
        answer = self.http.post(
            f"{self.url}/v1/completions",
            headers={"X-Session-ID": program},
            json={
                "model": self.model,
                "prompt": context,
                "max_tokens": 8,
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
                "kv_transfer_params": {"kvtier": {"tool": "bash", **hints}},
            },
        ).raise_for_status()
        body = answer.json()
        context += body["choices"][0]["token_ids"]
        told: dict[str, Any] = body["kv_transfer_params"]["kvtier"]
        return told

    def program(self, name: str) -> Program:
        """The program when the server has heard of its last turn: reports come a moment later."""
        wanted = self.turns[name]
        while True:
            with contextlib.suppress(NotFound):
                (program,) = self.client.get_program(name)
                if program.turns == wanted and program.state == "paused":
                    return program

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        text = self.http.get(f"{self.url}/metrics").text
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in text.splitlines()
            if line.startswith(f"vllm:kvtier_{name}{{") and all(w in line for w in wanted)
        )


@pytest.fixture(scope="module")
def served(
    model_dir: Path, run_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    (port,) = free_ports(1)
    work_dir = tmp_path_factory.mktemp("control")
    env = engine_env(os.environ, cpu=True, offline=True)
    env |= {"KVTIER_RUN_DIR": str(run_dir), "VLLM_CPU_KVCACHE_SPACE": "1"}
    settings = SETTINGS | {"kvtier.control_state_file": str(work_dir / "overrides.json")}
    transfer = {
        "kv_connector": "KVTierConnector",
        "kv_connector_module_path": "kvtier.connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": settings,
    }
    command = [
        *(sys.executable, "-m", "kvtier.cli", "serve", str(model_dir)),
        *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny"),
        *("--skip-tokenizer-init", "--max-model-len", "3000", "--enforce-eager"),
        *("--num-gpu-blocks-override", str(N_BLOCKS), "--kv-transfer-config", json.dumps(transfer)),
    ]
    with ServerGroup(work_dir) as servers:
        servers.start("kvtier serve", command, env).wait_healthy(
            f"http://127.0.0.1:{port}/health", lambda _: None
        )
        socket = f"unix:{run_dir}/kvtier.control.sock"
        with KVTierClient(socket) as client, httpx.Client(timeout=60, trust_env=False) as http:
            yield Served(f"http://127.0.0.1:{port}", socket, client, http, "tiny")


def test_a_human_sees_the_engine(served: Served) -> None:
    served.turn("seen")
    (engine,) = served.client.get_status().engines
    while not engine.wakeable:  # the API process says hello every few seconds
        (engine,) = served.client.get_status().engines
    assert engine.cpu.state == "ready"
    assert engine.gpu.total_bytes > 0
    assert {"vllm", "kvtier", "lmcache", "torch", "python"} <= set(engine.versions)
    program = served.program("seen")
    assert (program.state, program.turns, program.context_tokens) == ("paused", 1, 648)
    assert program.tool == "bash"

    env = {**os.environ, "KVTIER_CONTROL_TARGET": served.socket}
    shown = subprocess.run(
        [sys.executable, "-m", "kvtier.cli", "programs", "get", "seen", "--json"],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "seen" in shown.stdout


def test_overrides_decide_about_the_next_pause(served: Served) -> None:
    scope = TtlScope.of_tool("bash")
    applied = served.client.set_ttl_override(scope, 0.0)
    assert applied.engines == 1
    told = served.turn("bound")
    assert (told["pinned_blocks"], told["reason"]) == (0, "override_fixed")
    served.program("bound")
    assert served.client.explain_decision("bound")[0].reason == "override_fixed"

    served.client.set_ttl_override(scope, 60.0)
    told = served.turn("bound")
    assert told["pinned_blocks"] > 0
    assert told["ttl_s"] == 60.0
    program = served.program("bound")
    (decision, *_) = [d for d in served.client.explain_decision("bound") if d.event == "pause"]
    assert (decision.action, decision.ttl_s) == ("pin", pytest.approx(60.0))
    assert {cost.option for cost in decision.costs} >= {"drop", "pin"}
    assert program.ttl_left_s is not None
    assert 0 < program.ttl_left_s <= 60.0
    assert [o.scope for o in served.client.iter_ttl_overrides()] == [scope]
    served.client.delete_ttl_override(scope)
    assert not list(served.client.iter_ttl_overrides())


def test_release_frees_the_blocks_of_an_idle_engine(served: Served) -> None:
    served.turn("released", ttl_s=300.0)
    assert served.program("released").gpu_pinned_tokens > 0
    (result,) = served.client.release_program("released")
    assert result.outcome in {"accepted", "clipped"}, result
    assert served.program("released").gpu_pinned_tokens == 0
    assert served.metric("pin_releases_total", cause="command") >= 1
    (again,) = served.client.release_program("released")
    assert (again.outcome, again.reason) == ("missing", "no_pin")


def test_a_returned_tool_brings_the_kv_back_before_the_turn(served: Served) -> None:
    served.turn("back")
    while served.program("back").cpu_tokens < 640:
        pass
    served.client.release_program("back")
    # Others take its place in GPU memory.
    for i in range(4):
        served.turn(f"other-{i}", 1000, ttl_s=0.0)
    before = served.metric("prompt_tokens_total", source="gpu_pin")
    while served.program("back").gpu_pinned_tokens < 640:
        # Again: on a busy machine a lookup may be given up, and nothing else is to be waited for.
        (result,) = served.client.announce_tool_return("back")
        assert result.outcome == "accepted" or result.reason == "busy", result
    served.turn("back", 64)
    # Found in GPU memory, by a pin that the announcement began: nothing to wait for.
    assert served.metric("prompt_tokens_total", source="gpu_pin") - before >= 640


def test_the_end_of_a_program_is_the_end_of_its_kv(served: Served) -> None:
    served.turn("ended")
    served.program("ended")
    (result,) = served.client.end_program("ended")
    assert result.outcome == "accepted"
    with pytest.raises(NotFound):
        served.client.get_program("ended")


def test_strangers_tools_work(served: Served) -> None:
    """Reflection and health, with clients that know nothing of kvtier."""
    with grpc.insecure_channel(served.socket) as channel:
        names = set(ProtoReflectionDescriptorDatabase(channel).get_services())
        services = {f"kvtier.v1.{n}Service" for n in ("Program", "Ttl", "Policy", "Observability")}
        assert services | {"grpc.health.v1.Health"} <= names
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", *services):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
