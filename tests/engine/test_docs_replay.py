"""Each `kvtier replay` of the documentation, on little work."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib import util
from typing import TYPE_CHECKING

import pytest

from tests.unit.docs_commands import commands
from tests.unit.mini_engine import MiniEngine
from tests.unit.program_cases import follow_up, prompt, turn

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(600),
    pytest.mark.skipif(util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
REPLAYS = list(
    dict.fromkeys(c.line for c in commands() if c.program == "kvtier" and c.words[1] == "replay")
)
SMALL = ["--programs", "2", "--max-turns", "2", "--max-input-tokens", "4000", "--jobs", "1"]
# One process for all: bringing vLLM takes most of the time.
SCRIPT = """
import json, shlex, sys
from typer.testing import CliRunner
from kvtier.cli import app
found = {}
for line in json.load(sys.stdin):
    words = shlex.split(line, comments=True)[1:] + json.loads(sys.argv[1])
    result = CliRunner().invoke(app, words)
    found[line] = [result.exit_code, result.output]
print(json.dumps(found))
"""


def record(file: Path) -> None:
    """Two agents' turns, as `kvtier record` writes them."""
    engine = MiniEngine(n_blocks=200, record_file=file)
    for name in ("one", "two"):
        first = turn(f"{name}-1", prompt(150), session=name)
        engine.run(first)
        engine.now_s += 7.0
        engine.run(follow_up(first, f"{name}-2", session=name))
        engine.now_s += 3.0
    engine.half.shutdown()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    folder = tmp_path_factory.mktemp("replays")
    record(folder / "turns.jsonl")
    (folder / "sessions").mkdir()
    shutil.copy(folder / "turns.jsonl", folder / "sessions")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(SMALL)],
        input=json.dumps(REPLAYS),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, tuple[int, str]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("line", REPLAYS)
def test_each_replay_of_the_documentation_works(
    line: str, results: dict[str, tuple[int, str]]
) -> None:
    code, output = results[line]
    assert code == 0, output
    assert "job completion" in output
