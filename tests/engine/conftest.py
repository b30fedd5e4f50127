"""Engines of this test session: their model, run directories, and the plain vLLM they are held to."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from tests.engine.engine_child import EngineChild, processes_with
from tests.engine.scenario_runner import Runners, scenario_asks
from tests.engine.vllm_versions import SUPPORTED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.engine.scenario_runner import Ask, Runner

SHM = Path("/dev/shm")
END_TIMEOUT_S = 60.0
GRACE_S = 3.0
"""How long servers of these tests outlive their last engine."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the tests marked `long` out of the usual run."""
    if os.environ.get("TEST_LONG"):
        return
    left_out = [item for item in items if item.get_closest_marker("long")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with the tiny model."""
    from tests.engine.tiny_model import write_model  # noqa: PLC0415

    path = tmp_path_factory.mktemp("model")
    write_model(path)
    return path


@pytest.fixture(scope="session")
def runners() -> Iterator[Runners]:
    """Return the processes with vLLM's schedulers, which all test modules share."""
    made = Runners()
    yield made
    made.close()


@pytest.fixture(scope="module", params=SUPPORTED)
def runner(runners: Runners, request: pytest.FixtureRequest) -> Runner:
    """Return the process with one vLLM release."""
    return runners.of(request.param)


@pytest.fixture(params=["sync", "async"])
def ask(runner: Runner, request: pytest.FixtureRequest) -> Ask:
    """Return what runs a scenario in one release and mode."""
    return scenario_asks(runner, request.param)


LOGPROB_TOLERANCE = 1e-3
"""Float32 sums in another order differ by less than a tenth of this; KV of other tokens by more."""


class PlainVllm:
    """vLLM without a connector and without prefix caching, started when first asked."""

    def __init__(self, model_dir: Path, work_dir: Path) -> None:
        self._child = EngineChild(
            "scenarios_plain", {"model": str(model_dir)}, work_dir, work_dir / "plain.log"
        )
        self._known: dict[tuple[int, ...], dict[str, Any]] = {}

    def check(self, records: list[dict[str, Any]]) -> None:
        """Every recorded request has the tokens that plain vLLM generates for its prompt.

        Their log-probabilities are compared too: a model may choose the same tokens in spite of some
        wrong KV.
        """
        assert records
        new = [record for record in records if self._lacks(record)]
        # Of those with the same prompt, the longest is known in the end.
        new.sort(key=lambda record: len(record["tokens"]))
        if new:
            answer = self._child.call(
                "replay",
                settle=False,
                prompts=[record["prompt"] for record in new],
                lengths=[len(record["tokens"]) for record in new],
            )
            self._known.update((tuple(r["prompt"]), r) for r in answer["records"])
        for record in records:
            expected = self._known[tuple(record["prompt"])]
            n_tokens = len(record["tokens"])
            same = record["tokens"] == expected["tokens"][:n_tokens] and record[
                "logprobs"
            ] == pytest.approx(expected["logprobs"][:n_tokens], abs=LOGPROB_TOLERANCE)
            if record.get("differs"):
                assert not same
            else:
                assert record["tokens"] == expected["tokens"][:n_tokens]
                assert same

    def _lacks(self, record: dict[str, Any]) -> bool:
        known = self._known.get(tuple(record["prompt"]))
        return known is None or len(known["tokens"]) < len(record["tokens"])

    def close(self) -> None:
        """End the process."""
        self._child.close()


@pytest.fixture(scope="session")
def plain(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PlainVllm]:
    """Return plain vLLM."""
    engine = PlainVllm(model_dir, tmp_path_factory.mktemp("plain"))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a run directory of this module. Nothing may be left of it in the end."""
    path = tmp_path_factory.mktemp("run")
    path.chmod(0o700)
    yield path
    try:
        await_nothing_left(path)
    finally:
        for process in processes_with(str(path)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(path, ignore_errors=True)


def await_nothing_left(run_dir: Path) -> None:
    """Wait until no process and no shared memory of this run directory is left; fail if some stays."""
    from kvtier.server.files import ServerFiles  # noqa: PLC0415
    from kvtier.server.guardian import _shm_prefix  # noqa: PLC0415

    prefix = _shm_prefix(ServerFiles(run_dir, "kvtier"))
    deadline_s = time.monotonic() + END_TIMEOUT_S
    while True:
        processes = processes_with(str(run_dir))
        segments = list(SHM.glob(f"{prefix}*"))
        if not processes and not segments:
            return
        assert time.monotonic() < deadline_s, f"left over: {processes} {segments}"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def start_engine(
    model_dir: Path, run_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., EngineChild]]:
    """Return a function that starts an engine process on this module's run directory."""
    logs = tmp_path_factory.mktemp("logs")
    children: list[EngineChild] = []

    def start(modules: str, settings: dict[str, Any], **config: Any) -> EngineChild:
        # Nobody commands these engines; tests of the control server have it on.
        extra = {"server_grace_s": GRACE_S, "control": "off", **settings}
        child = EngineChild(
            modules,
            {"model": str(model_dir), "extra": extra, **config},
            run_dir,
            logs / f"{len(children)}.log",
        )
        children.append(child)
        return child

    yield start
    for child in children:
        child.close()
