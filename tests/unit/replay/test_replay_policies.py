"""Policies by name, before and after vLLM is there to look them up."""

from __future__ import annotations

import ast
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvtier.replay import command, sweep
from kvtier.replay.machines import presets
from kvtier.replay.options import OptionError
from kvtier.replay.sweep import Cell, run_cells
from kvtier.replay.workload import Program, Run, Turn


def test_the_command_knows_every_policy() -> None:
    # Read, not imported, for that would bring vLLM.
    tree = ast.parse(Path(command.__file__).with_name("policies.py").read_text())
    names = [
        ast.literal_eval(call.args[0])
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
        if call.func.id == "PolicySpec"
    ]
    assert {"vllm-lru", "kvtier", "ideal"} <= set(names) <= set(command.POLICY_NAMES)


def test_an_option_error_survives_its_way_from_another_process() -> None:
    error = pickle.loads(pickle.dumps(OptionError("--rate", "too fast")))
    assert (error.option, str(error)) == ("--rate", "too fast")


def test_a_policy_that_is_not_registered_is_told_before_any_is_replayed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def policy(name: str) -> str:
        if name == "oracle":
            raise ValueError("unknown policy 'oracle'; accepted: ideal")
        return name

    def run(*_: Any) -> None:
        raise AssertionError("a replay begins")

    module = "kvtier.replay.policies"
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(policy=policy))  # type: ignore[arg-type]
    monkeypatch.setattr(sweep, "_run", run)
    programs = (Program("p", 0.0, (Turn((Run(0, 9),), 1, 0.0),)),)
    machine = presets.machine(model="llama-3.1-8b", gpu="h100")
    cells = [Cell(name, machine, programs) for name in ("ideal", "oracle")]
    with pytest.raises(OptionError, match="accepted: ideal") as caught:
        run_cells(cells, 1, lambda *_: None)
    assert caught.value.option == "--policy"
