"""The protos: their style, what clients rely on, and the stubs that are made of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
OBSERVABILITY: Final = Path("proto/kvtier/v1/observability.proto")


def check(tree: Path) -> subprocess.CompletedProcess[str]:
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [tree / "scripts/protos.sh", "--check"],
        env={**os.environ, "PATH": tools},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of all that has to do with the protos."""
    for name in ("proto", "kvtier/v1"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "scripts").mkdir()
    for name in ("buf.yaml", "scripts/protos.sh"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def test_protos_are_in_style_keep_what_clients_rely_on_and_make_these_stubs() -> None:
    done = check(ROOT)
    assert done.returncode == 0, done.stdout


BREAKING: Final = {
    "another number": ("int32 watchers = 4;", "int32 watchers = 5;", 'field "4"'),
    "another type": ("int32 watchers = 4;", "string watchers = 4;", 'Field "4"'),
    "a method less": (
        "  rpc Calibrate(CalibrateRequest) returns (CalibrateResponse);\n",
        "",
        "RPC",
    ),
}


@pytest.mark.parametrize(("old", "new", "told"), BREAKING.values(), ids=BREAKING)
def test_a_change_that_breaks_clients_is_refused(tree: Path, old: str, new: str, told: str) -> None:
    change(tree / OBSERVABILITY, old, new)
    done = check(tree)
    assert done.returncode != 0
    assert told in done.stdout


def test_a_new_field_breaks_nobody_but_its_stubs_must_be_made(tree: Path) -> None:
    change(tree / OBSERVABILITY, "int32 watchers = 4;", "int32 watchers = 4;\n  int32 more = 5;")
    done = check(tree)
    assert done.returncode != 0
    assert "observability_pb2" in done.stdout
    assert "Field" not in done.stdout.partition("---")[0]


def test_a_name_out_of_style_is_refused(tree: Path) -> None:
    change(tree / OBSERVABILITY, "int32 watchers = 4;", "int32 watchers = 4;\n  int32 More = 5;")
    assert "lower_snake_case" in check(tree).stdout
