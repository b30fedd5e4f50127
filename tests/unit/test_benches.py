"""The benches take from kvtier, from each other and from the tests what is there.

They take minutes and are run by hand, so that nothing else would notice.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

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
