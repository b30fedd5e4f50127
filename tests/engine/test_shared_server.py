"""Several engines on one server: they start together, die, come back, and never mix their KV."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvtier.supervisor import status
from tests.engine.conftest import await_nothing_left
from tests.engine.engine_child import processes_with
from tests.engine.engine_harness import CHUNK_TOKENS, readable, tokens
from tests.engine.tier_probe import await_clean

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.engine.conftest import PlainVllm
    from tests.engine.engine_child import EngineChild

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]

SETTINGS = {"dram_gb": 0.25}
READABLE = readable(711)


def check_owner_only(run_dir: Path, segment: Path) -> None:
    """KV is the owner's alone, and sockets, locks and logs are by their directory."""
    assert stat.S_IMODE(segment.stat().st_mode) == 0o600
    assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700
    assert any(path.is_socket() for path in run_dir.iterdir())
    assert {path.stat().st_uid for path in (segment, run_dir)} == {os.geteuid()}


def go_on(
    engine: EngineChild, plain: PlainVllm, prompt: list[int], *, settle: bool = False
) -> tuple[int, list[int]]:
    """The conversation's next turn, right and staged: how many tokens were loaded, and its own."""
    answer = engine.call("go_on", name="one", prompt=prompt, settle=settle)
    plain.check(answer["records"])
    return answer["value"], answer["records"][-1]["tokens"]


def test_engines_share_a_server_and_nothing_else(
    start_engine: Callable[..., EngineChild], run_dir: Path, plain: PlainVllm
) -> None:
    # Two engines of one model and different dtypes, started at the same moment.
    first = start_engine("scenarios_shared", SETTINGS)
    other = start_engine("scenarios_shared", SETTINGS, dtype="bfloat16")
    for engine in (first, other):
        engine.send("ready", settle=False)
    generations = [engine.receive()["value"] for engine in (first, other)]
    assert generations[0] == generations[1]
    (summary,) = status(run_dir)
    assert len(summary.lease_pids) == 2
    server_pid = summary.server_pid
    check_owner_only(run_dir, Path("/dev/shm") / summary.state.shm_name)
    endpoint = f"ipc://{run_dir}/kvtier.kvtier.sock"

    answer = first.call("stage", name="one", settle=False)
    plain.check(answer["records"])
    one = answer["value"]
    assert one["chunks"] == READABLE // CHUNK_TOKENS
    prompt = [*one["prompt"], *one["tokens"], *tokens("one2", 50)]
    # Another dtype has other keys: 0 hits for the same prompt and program.
    assert other.call("come_back", name="one", prompt=prompt, settle=False)["value"] == 0
    two = other.call("stage", name="two", settle=False)["value"]
    two_prompt = [*two["prompt"], *two["tokens"], *tokens("two2", 50)]
    assert first.call("come_back", name="two", prompt=two_prompt, settle=False)["value"] == 0

    # A conversation moves to another engine of its model, and back: loaded, not computed anew.
    again = start_engine("scenarios_shared", SETTINGS)
    assert again.call("ready", settle=False)["value"] == generations[0]
    loaded, produced = go_on(again, plain, prompt)
    assert loaded == READABLE
    moved = [*prompt, *produced, *tokens("one3", 50)]
    loaded, produced = go_on(first, plain, moved)
    assert loaded == readable(len(prompt) + 11)

    # The first engine dies in the middle of a load; the other ones are not disturbed, nor the server.
    last = [*moved, *produced, *tokens("one4", 50)]
    assert first.call("lock_and_hang", name="one", prompt=last, settle=False)["value"] > 0
    first.kill()
    successor = start_engine("scenarios_shared", SETTINGS)
    answer = other.call("come_back", name="two", prompt=two_prompt, settle=False)
    assert answer["value"] == READABLE
    # What the dead engine had locked is free again after the grace for its workers.
    await_clean(endpoint)

    # The engine that was started in its place finds what the dead one had staged, and adds to it.
    assert successor.call("ready", settle=False)["value"] == generations[0]
    loaded, produced = go_on(successor, plain, last)
    assert loaded == readable(len(moved) + 11)
    prompt = [*last, *produced, *tokens("one5", 50)]
    loaded, _ = go_on(successor, plain, prompt, settle=True)
    assert loaded == readable(len(last) + 11)

    # The one that was idle meanwhile works too.
    answer = again.call("stage", name="three")
    plain.check(answer["records"])
    assert answer["value"]["chunks"] == READABLE // CHUNK_TOKENS

    # Two end in good order, one is killed; the server follows after its grace.
    (summary,) = status(run_dir)
    assert summary.server_pid == server_pid
    again.close()
    successor.close()
    assert other.call("come_back", name="two", prompt=two_prompt)["value"] > 0
    other.kill()
    await_nothing_left(run_dir)
    assert processes_with(str(run_dir)) == []
