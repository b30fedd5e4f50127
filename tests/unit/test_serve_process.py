"""`kvtier serve` as a process: exit codes, signals, and nothing left behind."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import psutil
import pytest

from kvtier.config import Settings
from kvtier.serving.plan import ServePlan
from kvtier.serving.process import read_chat_template, run_serve

if TYPE_CHECKING:
    from pathlib import Path

PIN_ONLY = Settings.load({"kvtier.tier": "off"}, {})
# Stands for vLLM: says when it runs, and which signal ended it.
ENGINE = """
import signal, sys
def end(number, frame):
    print("got", signal.Signals(number).name, flush=True)
    sys.exit(11)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, end)
print("running", flush=True)
signal.pause()
"""
SERVE = """
import sys
from kvtier.config import Settings
from kvtier.serving.plan import ServePlan
from kvtier.serving.process import run_serve
settings = Settings.load({"kvtier.tier": "off"}, {})
sys.exit(run_serve(ServePlan(tuple(sys.argv[1:]), {}), "m", settings, cpu=True))
"""


def run(*argv: str) -> int:
    return run_serve(ServePlan(argv, {}), "m", PIN_ONLY, cpu=True)


def start_serve(serve: str = SERVE, engine: str = ENGINE) -> subprocess.Popen[str]:
    """Start a parent with the stand-in engine and wait until that runs."""
    command = [sys.executable, "-c", serve, sys.executable, "-c", engine]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert read_line(process) == "running\n"
    return process


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], 60)
    assert ready, "no output in 60 s"
    return process.stdout.readline()


def test_exit_code_is_passed_on() -> None:
    assert run(sys.executable, "-c", "raise SystemExit(9)") == 9


def test_death_by_signal_is_reported_as_a_shell_does() -> None:
    assert run(sys.executable, "-c", "import os; os.kill(os.getpid(), 9)") == 128 + 9


def test_engine_gets_its_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    out = tmp_path / "env.json"
    code = "import json, os, sys; json.dump(dict(os.environ), open(sys.argv[1], 'w'))"
    assert run(sys.executable, "-c", code, str(out)) == 0
    assert json.loads(out.read_text())["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_reaches_the_engine_and_its_exit_code_returns(number: signal.Signals) -> None:
    process = start_serve()
    process.send_signal(number)
    assert read_line(process) == f"got {number.name}\n"
    assert process.wait(60) == 11


def test_a_signal_that_the_engine_loses_is_repeated() -> None:
    """As vLLM does while it starts."""
    deaf_once = (
        ENGINE.replace("def end(number, frame):", "lost = []\ndef end(number, frame):")
        .replace(
            '    print("got"',
            '    if not lost: lost.append(1); print("lost", flush=True); return\n    print("got"',
        )
        .replace("signal.pause()", "while True: signal.pause()")
    )
    impatient = SERVE.replace(
        "settings =", "import kvtier.serving.process as p; p.REPEAT_SIGNAL_S = 0.1\nsettings ="
    )
    process = start_serve(impatient, deaf_once)
    process.send_signal(signal.SIGTERM)
    assert read_line(process) == "lost\n"
    assert read_line(process) == "got SIGTERM\n"
    assert process.wait(60) == 11


def test_a_tier_that_cannot_start_is_told_and_the_exit_code_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("KVTIER_RUN_DIR", str(tmp_path / "run"))
    too_large = Settings.load({"kvtier.dram_gb": 10**6}, {})
    waits = "import time; time.sleep(3); raise SystemExit(4)"
    plan = ServePlan((sys.executable, "-c", waits), {})
    with caplog.at_level("INFO"):
        assert run_serve(plan, "m", too_large, cpu=True) == 4
    assert "no CPU tier, pins alone" in caplog.text
    assert "choose a smaller size" in caplog.text


def test_engine_ends_when_serve_is_killed() -> None:
    process = start_serve()
    engines = psutil.Process(process.pid).children()
    assert len(engines) == 1
    process.kill()
    process.wait(60)
    assert read_line(process) == "got SIGTERM\n"
    _, alive = psutil.wait_procs(engines, timeout=60)
    assert alive == []


def test_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    run(sys.executable, "-c", "")
    assert signal.getsignal(signal.SIGTERM) is before


def test_child_does_not_start_for_a_parent_that_is_gone() -> None:
    command = [sys.executable, "-m", "kvtier.serving.child_process", str(os.getpid() + 1), "true"]
    assert subprocess.run(command, check=False).returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"chat_template.jinja": "A", "tokenizer_config.json": '{"chat_template": "B"}'}, "A"),
        ({"tokenizer_config.json": '{"chat_template": "B"}'}, "B"),
        (
            {
                "tokenizer_config.json": '{"chat_template": [{"name": "default", "template": "C"},'
                ' {"name": "tool_use", "template": "D"}]}'
            },
            "D",
        ),
        ({"tokenizer_config.json": "{}"}, None),
        ({}, None),
    ],
)
def test_chat_template_of_a_local_model(
    tmp_path: Path, files: dict[str, str], expected: str | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_chat_template(str(tmp_path)) == expected


def test_users_chat_template_wins(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("own", encoding="utf-8")
    assert read_chat_template("m", str(tmp_path / "own.jinja")) == "own"
    assert read_chat_template("m", "{{ inline }}") == "{{ inline }}"
