"""An engine in a process of its own, told what to do: requests and answers are JSON lines.

vLLM cannot be built twice in a process, and takes seconds to start, so tests share engines and call
scenarios in them: functions of the `scenarios_*` modules that take the engine and keyword arguments.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import IO, Any

import psutil

ROOT = Path(__file__).resolve().parents[2]


class EngineChild:
    """The test's end. Starts at once; the first call waits for the engine.

    Args:
        modules: Names of the scenario modules, joined by commas; one without a dot is of this folder.
        config: Arguments of `engine_harness.Engine`; with `replicas`, of `replicas.Replicas`.
        run_dir: kvtier's run directory: whose LMCache server is used.
        log: File for the process's output.
    """

    def __init__(self, modules: str, config: dict[str, Any], run_dir: Path, log: Path) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("KVTIER_")}
        environment.update(KVTIER_RUN_DIR=str(run_dir), KVTIER_CACHE_DIR=str(run_dir / "cache"))
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.engine.engine_child", modules, json.dumps(config)],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
            )

    def call(self, name: str, /, *, settle: bool = True, **arguments: Any) -> dict[str, Any]:
        """Run a scenario; returns its `value` and its `records`. Fails with what failed there."""
        self.send(name, settle=settle, **arguments)
        return self.receive()

    def send(self, name: str, /, *, settle: bool = True, **arguments: Any) -> None:
        """Start a call."""
        assert self.process.stdin is not None
        request = {"name": name, "settle": settle, "arguments": arguments}
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise AssertionError(f"the engine process is gone:\n{self.tail()}") from None

    def receive(self) -> dict[str, Any]:
        """Wait for a call's answer."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the engine process ended:\n{self.tail()}"
        answer: dict[str, Any] = json.loads(line)
        assert not answer["error"], f"{answer['error']}\n{self.tail()}"
        return answer

    def tail(self) -> str:
        """End of the process's log."""
        return self.log.read_text(errors="replace")[-2000:]

    def kill(self) -> None:
        """SIGKILL, and nothing is told to anybody."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """End it in good order; kill it if that takes long."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.kill()


def processes_with(text: str) -> list[psutil.Process]:
    """Processes whose command line or environment names `text`."""
    found = []
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        with contextlib.suppress(psutil.Error):
            if text in " ".join(process.cmdline()) or text in process.environ().values():
                found.append(process)
    return found


def _serve(modules: str, config: dict[str, Any], requests: IO[str], answers: IO[str]) -> None:
    from tests.engine import engine_harness  # noqa: PLC0415

    engine_harness.prepare_process()
    scenarios: dict[str, Any] = {}
    for module in modules.split(","):
        name = module if "." in module else f"tests.engine.{module}"
        scenarios.update(vars(importlib.import_module(name)))
    engine = _engine(config)
    for line in requests:
        request = json.loads(line)
        engine.records = []
        value, error = None, ""
        try:
            value = scenarios[request["name"]](engine, **request["arguments"])
            if request["settle"]:
                engine.settle()
        except BaseException:  # noqa: BLE001 - the test reports it
            error = traceback.format_exc()
        answer = {"value": value, "records": engine.records, "error": error}
        print(json.dumps(answer), file=answers, flush=True)
    engine.close()


def _engine(config: dict[str, Any]) -> Any:
    from tests.engine.engine_harness import Engine  # noqa: PLC0415

    model, extra = Path(config["model"]), config.get("extra")
    if config.get("replicas"):
        from tests.engine.replicas import Replicas  # noqa: PLC0415

        return Replicas(model, extra, config["replicas"])
    return Engine(
        model,
        extra,
        n_blocks=config.get("n_blocks", 140),
        dtype=config.get("dtype", "float32"),
        options=config.get("options"),
    )


def main() -> None:
    """Serve until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print goes to the log
    _serve(sys.argv[1], json.loads(sys.argv[2]), sys.stdin, answers)
    answers.flush()
    # Interpreter shutdown of the engine's native threads is not under test.
    os._exit(0)


if __name__ == "__main__":
    main()
