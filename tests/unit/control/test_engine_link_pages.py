"""A server that follows an engine anew is told all its programs, a page a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvtier import link_messages as messages
from kvtier.control.registry import Registry
from kvtier.programs import ProgramId
from tests.unit.control.link_rig import Rig, Server, follow_in_pages, names
from tests.unit.program_cases import prompt, turn

if TYPE_CHECKING:
    import pytest


def test_many_programs_come_in_pages_one_a_step(
    rig: Rig, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [follow_in_pages(rig, 10, 4, monkeypatch)]
    assert rig.engine.half.has_work(), "an idle engine must step until all is told"
    while rig.engine.half.has_work():
        rig.engine.step()
        found += [m for m in server.all() if isinstance(m, messages.Programs)]
        rig.engine.now_s += 0.1
    assert [len(page.programs) for page in found] == [4, 4, 2]
    assert [(page.first, page.last) for page in found] == [
        (True, False),
        (False, False),
        (False, True),
    ]
    assert sorted(names(found)) == sorted(f"agent-{i}" for i in range(10))


def test_many_hooks_of_one_step_tell_one_page(
    rig: Rig, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow_in_pages(rig, 10, 4, monkeypatch)
    for i in range(5):
        rig.engine.half.on_new_request(turn(f"q{i}", prompt(8), session="q"))
    assert len([m for m in server.all() if isinstance(m, messages.Programs)]) <= 1


def test_what_happens_between_pages_is_told_in_order(
    rig: Rig, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's picture is the engine's, whenever programs come, go on and end."""
    messages_in_order: list[Any] = [follow_in_pages(rig, 8, 3, monkeypatch)]
    half = rig.engine.half
    for i in (7, 0, 5):
        rig.engine.run(turn(f"again-{i}", prompt(12, i), session=f"agent-{i}"))
        rig.engine.run(turn(f"new-{i}", prompt(12, i), session=f"new-{i}"))
        half.endings.program_ended(
            rig.engine.facts.program_handle(ProgramId(None, "named", f"agent-{i + 1}"))
        )
        rig.engine.step()
        messages_in_order += server.all()
    while half.has_work():
        rig.engine.now_s += 0.1
        rig.engine.step()
    half.report(rig.engine.now_s + 9.0)
    messages_in_order += server.all()
    registry = Registry()
    registry.hello(rig.hello(), 0.0)
    for message in messages_in_order:
        if isinstance(message, messages.Programs):
            registry.programs_page(message, 0.0)
        elif isinstance(message, messages.Report):
            registry.report(message, 0.0)
    told = {program.key.name: program for _, program in registry.programs()}
    known = {known.key.name: known for known in rig.link._programs.values()}
    assert set(told) == set(known)
    for name, program in told.items():
        state = known[name].state(rig.link._offset_s)
        assert (program.turns, program.context_tokens) == (state.turns, state.context_tokens), name
        assert program.pins.keys() == {pin.request_id for pin in state.pins}, name
        assert program.activity == "paused"


def test_a_server_that_reads_slowly_gets_its_pages_later(
    rig: Rig, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [follow_in_pages(rig, 20, 1, monkeypatch)]
    monkeypatch.setattr(rig.link, "_can_send", lambda: False)
    for _ in range(5):
        rig.engine.now_s += 0.1
        rig.engine.step()
    assert rig.link.is_followed
    assert not [m for m in server.all() if isinstance(m, messages.Programs)]
    monkeypatch.undo()
    while rig.engine.half.has_work():
        rig.engine.now_s += 0.1
        rig.engine.step()
        found += [m for m in server.all() if isinstance(m, messages.Programs)]
    assert len(set(names(found))) == 20
