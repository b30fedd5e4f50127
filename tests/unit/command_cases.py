"""A small engine with a control link that tests write the commands of."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Any

from kvtier import link_messages as messages
from kvtier.link_messages import ProgramKey
from kvtier.turns.happenings import Happenings
from tests.unit.mini_engine import MiniEngine
from tests.unit.program_cases import prompt, turn

if TYPE_CHECKING:
    from kvtier.gpu_pin import Pin
    from tests.unit.fake_vllm import FakeRequest

AGENT = ProgramKey(None, "agent")


class ScriptedLink(Happenings):
    """Commands are given by the test; answers and the order of what was told are kept.

    `messages` counts how many answers came at a time.
    """

    engine_id = "engine"

    def __init__(self) -> None:
        self.queue: list[messages.Command] = []
        self.answers: list[messages.Answer] = []
        self.messages: list[int] = []
        self.told: list[tuple[str, str]] = []

    def commands(self, now_s: float, *, urgent: bool = False) -> list[messages.Command]:
        taken, self.queue = self.queue, []
        return taken

    def answer(self, answers: list[messages.Answer]) -> None:
        self.answers.extend(answers)
        self.messages.append(len(answers))

    def report(self, now_s: float, *, idle: bool, settled: bool = True) -> None:
        pass

    def busy(self) -> bool:
        return False

    def close(self) -> None:
        self.told.append(("close", ""))

    def decided(self, event: str, program: str, request_id: str, entry: dict[str, Any]) -> None:
        self.told.append((event, str(entry.get("cause", entry.get("action")))))

    def pinned(self, pin: Pin) -> None:
        self.told.append(("pinned", pin.key))

    def program_gone(self, program: str) -> None:
        self.told.append(("gone", ""))


class Rig:
    """An engine with a link. `do` sends a command to the idle engine and wakes it."""

    def __init__(self, **engine: Any) -> None:
        self.link = ScriptedLink()
        self.engine = MiniEngine(link=self.link, **engine)
        self._ids = count(1)

    def do(self, kind: type[messages.Command], **fields: Any) -> messages.Answer:
        self.send(kind, **fields)
        self.engine.wake()
        return self.link.answers[-1]

    def send(self, kind: type[messages.Command], **fields: Any) -> None:
        if kind not in (
            messages.OverridesCommand,
            messages.PolicyCommand,
            messages.CalibrateCommand,
        ):
            fields.setdefault("program", AGENT)
        self.link.queue.append(kind(id=next(self._ids), **fields))

    @property
    def pins(self) -> list[Pin]:
        return list(self.engine.half.pins.pins())

    def left_s(self) -> float:
        return self.pins[0].deadline_s - self.engine.now_s


def agent_turn(rig: Rig, request_id: str = "r1", n_tokens: int = 30, **fields: Any) -> FakeRequest:
    request = turn(request_id, prompt(n_tokens), session="agent", **fields)
    rig.engine.run(request)
    return request


def override(mode: str, ttl_s: float, **scope: Any) -> messages.TtlOverride:
    return messages.TtlOverride(mode=mode, ttl_s=ttl_s, **scope)  # type: ignore[arg-type]
