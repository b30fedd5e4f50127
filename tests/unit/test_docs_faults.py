"""The table of faults names tests that exist, and all of those that are there for it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from kvtier.operator.chaos_faults import FAULTS

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs" / "faults.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"`((?:engine|faults)/test_\w+\.py)::(test_\w+)(?:\[(\w+)\])?`", PAGE)


def functions(file: Path) -> list[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize(("file", "test", "case"), SHOWN)
def test_every_row_names_a_test(file: str, test: str, case: str) -> None:
    path = TESTS / file
    assert test in functions(path)
    assert not case or f'"{case}"' in path.read_text(encoding="utf-8")


def test_every_row_has_a_test() -> None:
    rows = [
        line for line in PAGE.splitlines() if line.startswith("| ") and "full speed" not in line
    ]
    assert len(rows) > 30
    assert [row for row in rows if not re.search(r"`\w+/test_\w+\.py::test_\w+", row)] == []


def test_every_test_of_faults_is_a_row() -> None:
    shown = {(file, test) for file, test, _ in SHOWN}
    for file in sorted((TESTS / "faults").glob("test_*.py")):
        tests = [name for name in functions(file) if name.startswith("test_")]
        assert tests
        assert {(f"faults/{file.name}", name) for name in tests} <= shown


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("engine/test_tier_faults.py", "SCENARIOS"),
        ("faults/test_engine.py", "LIES"),
        ("faults/test_lmcache_server.py", "DISKS"),
    ],
)
def test_every_case_of_them_is_a_row(file: str, name: str) -> None:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    (cases,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name
    )
    names = cases.keys if isinstance(cases, ast.Dict) else cases.elts  # type: ignore[attr-defined]
    found = {ast.literal_eval(node) for node in names}
    assert found == {case for shown, _, case in SHOWN if shown == file and case}


def test_the_faults_of_the_command_are_in_its_reference() -> None:
    reference = (TESTS.parent / "docs" / "command-line.md").read_text(encoding="utf-8")
    assert [name for name in FAULTS if name not in reference] == []
