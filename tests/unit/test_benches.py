"""The benches take from kvtier, from each other and from the tests what is there.

They take minutes and are run by hand, so that nothing else would notice.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from bench.control_verdict import beyond

ROOT = Path(__file__).parents[2]
BENCHES = sorted((ROOT / "bench").glob("*.py"))


def file_of(module: str) -> Path | None:
    """A module's file in this repository."""
    path = ROOT.joinpath(*module.split("."))
    found = path.with_suffix(".py")
    if found.is_file():
        return found
    return path / "__init__.py" if path.is_dir() else None


@cache
def names_in(file: Path) -> frozenset[str]:
    """What a module has at its top, and in its conditions there."""
    if not file.is_file():
        return frozenset()
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                names.update(alias.asname or alias.name for alias in aliases)
            case ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
    return frozenset(names)


@pytest.mark.parametrize("bench", BENCHES, ids=lambda path: path.stem)
def test_what_a_bench_imports_is_there(bench: Path) -> None:
    for node in ast.walk(ast.parse(bench.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        if node.module.split(".")[0] not in {"bench", "kvtier", "tests"}:
            continue
        file = file_of(node.module)
        assert file is not None, node.module
        if file.parent.name == "v1":
            continue  # the protos' stubs make their names as they are loaded
        for alias in node.names:
            known = alias.name in names_in(file) or file_of(f"{node.module}.{alias.name}")
            assert known, f"{node.module} has no {alias.name}"


ALONE = {
    "instructions_per_token": 1000.0,
    "step_p99_instructions": 400.0,
    "cpu_us_per_token": 100.0,
    "step_cpu_p99_us": 50.0,
}
CALLED = ALONE | {"calls_per_s": 950.0}


def test_the_control_apis_limits_are_on_the_engines_own_instructions() -> None:
    slower = CALLED | {"cpu_us_per_token": 130.0, "step_cpu_p99_us": 80.0}
    at_most = {"instructions_per_token": 1020.0, "step_p99_instructions": 420.0}
    assert not beyond(slower | at_most, ALONE, 1000.0)
    found = beyond(slower | {"instructions_per_token": 1021.0}, ALONE, 1000.0)
    assert found == ["instructions_per_token has risen by 2.10% over `alone`; at most 2%"]
    found = beyond(slower | {"step_p99_instructions": 421.0}, ALONE, 1000.0)
    assert found == ["step_p99_instructions has risen by 5.25% over `alone`; at most 5%"]


def test_processor_time_stands_in_for_instructions_that_are_not_counted() -> None:
    none = {"instructions_per_token": 0.0, "step_p99_instructions": 0.0}
    assert not beyond(CALLED | none, ALONE | none, 1000.0)
    dearer = CALLED | none | {"cpu_us_per_token": 103.0, "step_cpu_p99_us": 53.0}
    assert [text.split()[0] for text in beyond(dearer, ALONE | none, 1000.0)] == [
        "cpu_us_per_token",
        "step_cpu_p99_us",
    ]


def test_too_few_calls_show_nothing_of_those_that_were_wanted() -> None:
    found = beyond(CALLED | {"calls_per_s": 154.0}, ALONE, 1000.0)
    assert found == ["154 calls a second were made; wanted are 1000"]
