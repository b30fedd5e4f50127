"""`kvtier serve` on the tiny model, and clients of it: for tests and benchmarks of the control plane."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx

from kvtier.client import KVTierClient, NotFound, Unavailable
from kvtier.demo.servers import ServerGroup, free_ports
from kvtier.serving.engine_env import engine_env
from tests.engine.engine_harness import tokens

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from kvtier.client import Program

N_BLOCKS = 100
POLL_S = 0.02
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

    def turn(
        self,
        program: str,
        n_new: int = 640,
        *,
        max_tokens: int = 8,
        headers: Mapping[str, str] | None = None,
        **hints: Any,
    ) -> dict[str, Any]:
        """Send the program's context and some new tokens; returns what kvtier says to it."""
        self.turns[program] += 1
        context = self.contexts.setdefault(program, [])
        context += tokens(f"{program}-{len(context)}", n_new)
        answer = self.http.post(
            f"{self.url}/v1/completions",
            headers={"X-Session-ID": program, **(headers or {})},
            json={
                "model": self.model,
                "prompt": context,
                "max_tokens": max_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
                "kv_transfer_params": {"kvtier": {"tool": "bash", **hints}},
            },
        ).raise_for_status()
        body = answer.json()
        context += body["choices"][0]["token_ids"]
        # Nothing is said of a program that has ended.
        told: dict[str, Any] = (body["kv_transfer_params"] or {}).get("kvtier", {})
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


@contextlib.contextmanager
def serving(
    model_dir: Path,
    run_dir: Path,
    work_dir: Path,
    *,
    flags: tuple[str, ...] = (),
    settings: Mapping[str, object] | None = None,
    env: Mapping[str, str] | None = None,
    n_blocks: int = N_BLOCKS,
) -> Iterator[Served]:
    """Serve the model while the context lasts.

    Args:
        model_dir: The model.
        run_dir: Of the LMCache server and the control server.
        work_dir: For logs and the state file.
        flags: More flags of vLLM.
        settings: More settings of kvtier.
        env: More environment variables.
        n_blocks: GPU blocks.
    """
    (port,) = free_ports(1)
    full_env = engine_env(os.environ, cpu=True, offline=True)
    full_env |= {"KVTIER_RUN_DIR": str(run_dir), "VLLM_CPU_KVCACHE_SPACE": "1", **(env or {})}
    state_file = {"kvtier.control_state_file": str(work_dir / "overrides.json")}
    transfer = {
        "kv_connector": "KVTierConnector",
        "kv_connector_module_path": "kvtier.connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": SETTINGS | state_file | dict(settings or {}),
    }
    command = [
        *(sys.executable, "-m", "kvtier.cli", "serve", str(model_dir)),
        *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny"),
        *("--skip-tokenizer-init", "--max-model-len", "3000", "--enforce-eager"),
        *("--num-gpu-blocks-override", str(n_blocks), "--kv-transfer-config", json.dumps(transfer)),
        *flags,
    ]
    with ServerGroup(work_dir) as servers:
        servers.start("kvtier serve", command, full_env).wait_healthy(
            f"http://127.0.0.1:{port}/health", lambda _: None
        )
        socket = f"unix:{run_dir}/kvtier.control.sock"
        with KVTierClient(socket) as client, httpx.Client(timeout=60, trust_env=False) as http:
            _await_engine(client)
            yield Served(f"http://127.0.0.1:{port}", socket, client, http, "tiny")


def _await_engine(client: KVTierClient) -> None:
    """Return when the control server knows the engine and can wake it."""
    while True:
        with contextlib.suppress(Unavailable):
            engines = client.get_status().engines
            if engines and all(engine.wakeable for engine in engines):
                return
        time.sleep(POLL_S)
