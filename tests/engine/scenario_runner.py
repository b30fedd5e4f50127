"""Scenarios on the real schedulers of all supported vLLM releases: a child process for each.

A child answers scenario after scenario, as importing vLLM costs seconds. Test modules have them from the
fixtures `runner` and `ask`.
"""

from __future__ import annotations

import json
import selectors
import subprocess
import sys
import tempfile
from typing import IO, Any, Protocol

import pytest

from tests.engine.vllm_versions import REPO, SourcesMissingError, environment

Facts = dict[str, Any]

ANSWER_TIMEOUT_S = 240.0


class Ask(Protocol):
    """Runs a scenario under the release and mode of a test; its facts."""

    def __call__(self, scenario: str) -> Facts: ...


class Runner:
    """A child process with one vLLM release."""

    def __init__(self, version: str) -> None:
        self.version = version
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as self
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.engine.pressure_scenarios", "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=REPO,
            env=environment(version),
            text=True,
        )

    @property
    def has_died(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    def ask(self, scenario: str, mode: str) -> Facts:
        """The scenario's facts; fails the test with what the process said if it does not answer."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        if self.has_died:
            pytest.fail(f"vLLM {self.version}: the runner has died:\n{self._error_text()}")
        process.stdin.write(f"{scenario} {mode}\n")
        process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(ANSWER_TIMEOUT_S):
                process.kill()
                pytest.fail(f"vLLM {self.version}: no answer:\n{self._error_text()}")
        line = process.stdout.readline()
        if not line:
            process.wait()
            pytest.fail(f"vLLM {self.version}: the runner has died:\n{self._error_text()}")
        facts: Facts = json.loads(line)
        if "error" in facts:
            pytest.fail(f"vLLM {self.version}:\n{facts['error']}\n{self._error_text()}")
        return facts

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def _error_text(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")[-3000:]


class Runners:
    """The children of a test session, one a release, each started when first asked for."""

    def __init__(self) -> None:
        self._made: dict[str, Runner] = {}

    def of(self, version: str) -> Runner:
        """The child of a release; skips the test where its sources cannot be had."""
        made = self._made.get(version)
        if made is None or made.has_died:
            try:
                made = self._made[version] = Runner(version)
            except SourcesMissingError as reason:
                pytest.skip(str(reason))
        return made

    def close(self) -> None:
        """End them all."""
        for runner in self._made.values():
            runner.close()


def scenario_asks(runner: Runner, mode: str) -> Ask:
    """For a fixture: what runs a scenario under a release and a mode."""

    def call(scenario: str) -> Facts:
        return runner.ask(scenario, mode)

    return call
