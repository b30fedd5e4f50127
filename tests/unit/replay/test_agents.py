"""Which request comes when: gaps, sub-agents, and so many programs at a time."""

from __future__ import annotations

from kvtier.replay.agents import Agents
from kvtier.replay.workload import Child, Program, Run, Turn

PROMPT = (Run(1, 8),)


def turn(gap_s: float = 0.0, *children: Child) -> Turn:
    return Turn(PROMPT, 1, gap_s, children=children)


def serve(agents: Agents, turn_s: float = 1.0) -> list[tuple[float, str]]:
    """Serve every request at once, each for `turn_s`; returns when which came."""
    came: list[tuple[float, str]] = []
    running: list[tuple[float, object]] = []
    while not agents.done:
        now_s = min(agents.next_s, min((end for end, _ in running), default=float("inf")))
        for at_s, chain in agents.due(now_s):
            came.append((at_s, chain.request_id))
            running.append((at_s + turn_s, chain))
        for item in [item for item in running if item[0] <= now_s]:
            running.remove(item)
            agents.turn_ended(item[1], item[0])  # type: ignore[arg-type]
    return came


def test_a_gap_begins_with_the_end_of_its_turn() -> None:
    agents = Agents([Program("p", 5.0, (turn(2.0), turn(3.0), turn()))], 4)
    assert serve(agents) == [(5.0, "p.0"), (8.0, "p.1"), (12.0, "p.2")]
    assert (agents.arrived_s, agents.ended_s) == ({"p": 5.0}, {"p": 13.0})


def test_the_next_turn_waits_for_all_sub_agents() -> None:
    quick = Child(0.5, (turn(),))
    slow = Child(1.0, (turn(4.0), turn()))
    agents = Agents([Program("p", 0.0, (turn(2.0, quick, slow), turn()))], 4)
    assert serve(agents) == [
        (0.0, "p.0"),
        (1.5, "p.0/0.0"),
        (2.0, "p.0/1.0"),
        (7.0, "p.0/1.1"),
        (10.0, "p.1"),
    ]


def test_a_program_ends_with_its_last_sub_agent() -> None:
    agents = Agents([Program("p", 0.0, (turn(0.0, Child(3.0, (turn(),))),))], 4)
    serve(agents)
    assert agents.ended_s == {"p": 5.0}


def test_with_a_concurrency_the_next_program_begins_when_one_ends() -> None:
    programs = [Program(name, float(i), (turn(),)) for i, name in enumerate("abc")]
    agents = Agents(programs, 4, concurrency=2)
    assert serve(agents) == [(0.0, "a.0"), (0.0, "b.0"), (1.0, "c.0")]
    assert agents.arrived_s["c"] == 1.0
