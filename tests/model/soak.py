"""A life as long as one likes, of an engine that has more to do than it can, in periods that are all alike."""

from __future__ import annotations

import gc
import itertools
import logging
import random
import sys
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any, Final

import psutil

from kvtier.link_messages import PolicyCommand
from tests.engine.engine_spec import EngineSpec
from tests.model.census import census
from tests.model.invariants import Broken, Failures, left_over, more_than_windows, server_remembers
from tests.model.life import Life
from tests.model.plan import Plan

PERIOD_S: Final = 180.0
STEP_S: Final = 0.1
CHECK_S: Final = 10.0
ADMISSION: Final = "working_set"
AWAY_S: Final = 10.0
OPEN: Final = 12
PACK: Final = 4
MOST_CALM_STEPS: Final = 5000
STEPS_IN_FLIGHT: Final = 4
# Copies and answers take so many steps and polls at most, and so many fail.
WEATHERS: Final = tuple(itertools.product((0, 2, 5, 12), (0.0, 0.05, 0.3)))
EVENTS: Final = {
    "abort": 40,
    "twin": 20,
    "flood": 10,
    "command": 60,
    "wake": 10,
    "link": 4,
    "reset": 4,
    "reset_all": 2,
    "wall_jumps": 1,
    "lose_tier": 1,
}
"""What happens in a period besides, and how often."""


class Dealt(random.Random):
    """Chance that deals what it chooses from shuffled packs of cards: each period has nearly the same work to offer."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._packs: dict[tuple[Any, ...], list[Any]] = {}

    def choice(self, seq: Any) -> Any:
        """As `random.Random`; of a tuple each one comes as often as any other."""
        if not isinstance(seq, tuple):
            return super().choice(seq)
        # 1 and 1.0 are equal, and not the same card.
        pack = self._packs.setdefault((*map(type, seq), *seq), [])
        if not pack:
            pack.extend(seq * PACK)
            self.shuffle(pack)
        return pack.pop()


@dataclass(frozen=True)
class Period:
    """What a period has shown.

    Attributes:
        turns: Requests that have ended.
        prompts: Tokens of their prompts.
        asked: Output tokens that they might have had.
        tokens: Sampled by all requests.
        preemptions: Of running requests.
        rss_bytes: Memory of the process at its end.
        objects: Of Python's, that its collector follows.
        allocated: Blocks that Python's allocator has given out: memory in use, however fragmented the rest is.
        programs: That kvtier knows.
        remembered: Entries of all containers that kvtier's scheduler half leads to, hashes of blocks not counted.
    """

    turns: int
    prompts: int
    asked: int
    tokens: int
    preemptions: int
    rss_bytes: int
    objects: int
    allocated: int
    programs: int
    remembered: int


class Soak(Life):
    """See the module's docstring.

    Args:
        seed: Of all chance.

    Attributes:
        census: What kvtier remembers since the last period's end, by where.
    """

    def __init__(self, seed: int) -> None:
        settings: dict[str, Any] = {"kvtier.chunk_tokens": 32, "kvtier.forget_after_s": 1200.0}
        settings |= {"kvtier.max_ttl_s": 600.0, "kvtier.pin_budget_fraction": 0.5}
        settings |= {"kvtier.mode": "on", "kvtier.lookup_wait_s": 0.0}
        settings["kvtier.admission"] = ADMISSION
        spec = EngineSpec(
            is_async=True, blocks=240, settings=settings, max_batch=8, max_context=4096
        )
        plan = Plan(
            spec,
            400,
            late=True,
            step_share=1.0,
            actions={"arrive": 1.0},
            sessions=24,
            max_tokens=960,
        )
        super().__init__(seed, plan=plan)
        self.drive.step_s = STEP_S
        # Neither is a list of all that ever was.
        assert self.tier is not None
        self.tier.remembers = False
        self._turns = self._prompts = self._asked = self._tokens = 0
        self._n_away = 0
        self.census: Counter[str] = Counter()
        self._at_start = census(self.half)
        self._failures = Failures()
        logging.getLogger("kvtier").addHandler(self._failures)
        self._ended: deque[tuple[int, str]] = deque()

    def make_chance(self, seed: int) -> random.Random:
        """See `Life`."""
        return Dealt(seed)

    # -- periods -----------------------------------------------------------------------------------

    def period(self) -> Period:
        """Three minutes."""
        assert self.tier is not None
        before = self._work()
        began_s = next_check_s = self.engine.clock()
        events = self._events(began_s)
        self._set_calm(calm=False)
        while self.engine.clock() < began_s + PERIOD_S:
            while events and events[-1][0] <= self.engine.clock():
                _, name, what = events.pop()
                self._befalls(name, what)
            for _ in range(OPEN - len(self.open)):
                self._arrive()
            self._run_step()
            self._forget_ended()
            if self.engine.clock() >= next_check_s:
                next_check_s += CHECK_S
                self._check()
        self.drive.kv.forget_slots(self.tier.region.generation)
        work = (now - then for now, then in zip(self._work(), before, strict=True))
        return Period(*work, *self._memory())

    def _events(self, began_s: float) -> list[tuple[float, str, Any]]:
        """What happens when in a period, the last first: the same in each, at other times."""
        whole = PERIOD_S - AWAY_S - 1.0
        found: list[tuple[float, str, Any]] = [
            (began_s + self.random.random() * whole, name, None)
            for name, times in EVENTS.items()
            for _ in range(times)
        ]
        lost_s = next(at_s for at_s, name, _ in found if name == "lose_tier")
        found.append((lost_s + AWAY_S, "tier_returns", None))
        weathers = self.random.sample(WEATHERS, len(WEATHERS))
        each_s = PERIOD_S / len(weathers)
        found += [(began_s + i * each_s, "weather", one) for i, one in enumerate(weathers)]
        return sorted(found, key=lambda event: event[0], reverse=True)

    def _befalls(self, name: str, what: Any) -> None:
        assert self.tier is not None
        if name == "weather":
            # What an operator has tried is switched off soon.
            self._settings_return()
            self.worker.max_delay, self.worker.fail_share = what
            self.tier.max_delay, self.tier.fail_share = what
            self.worker.repeat_share = self.tier.repeat_share = 0.1
        elif name == "tier_returns":
            self._n_away += 1
            self.tier.come_back(restarted=self._n_away % 2 == 0)
        else:
            self._happens(name)

    def _settings_return(self) -> None:
        """Order and budgets, too: a period with another admission is not like the others."""
        super()._settings_return()
        self._n_commands += 1
        self.wire.command(
            PolicyCommand(id=self._n_commands, admission=ADMISSION, tenant_budgets=[])
        )

    def _name_of(self, session: str) -> str:
        """A session that begins anew is another program: programs that live for hours fill windows for hours."""
        return f"{session}.{self._conversations[session]}" if session else ""

    def over(self, request: Any) -> None:
        """See `Life`."""
        self._turns += 1
        self._prompts += request.num_prompt_tokens
        self._asked += request.max_tokens
        self._tokens += request.num_output_tokens
        self._ended.append((self.drive.steps + STEPS_IN_FLIGHT, request.request_id))

    def _forget_ended(self) -> None:
        """Requests no step of which is under way, and whose name nobody bears again."""
        while self._ended and self._ended[0][0] < self.drive.steps:
            _, request_id = self._ended.popleft()
            if request_id not in self.open:
                self.drive.forget(request_id)

    def _check(self) -> None:
        if self._failures.records:
            raise Broken(logging.Formatter().format(self._failures.records[0]))
        assert self.engine.connector.scheduler_half is not None, "kvtier has given up"
        self.engine.check()

    def _work(self) -> tuple[int, int, int, int, int]:
        """What has been done so far."""
        under_way = sum(request.num_output_tokens for _, request in self.open.values())
        tokens = self._tokens + under_way
        return self._turns, self._prompts, self._asked, tokens, self.drive.preemptions

    def _memory(self) -> tuple[int, int, int, int, int]:
        gc.collect()
        allocated, objects = sys.getallocatedblocks(), len(gc.get_objects())
        self.census = census(self.half, counts_bytes=False)
        rss_bytes = psutil.Process().memory_info().rss
        remembered = sum(self.census.values())
        return rss_bytes, objects, allocated, len(self.half.programs), remembered

    # -- the end -----------------------------------------------------------------------------------

    def end(self) -> dict[str, int]:
        """Nothing new comes; what is left when all programs are forgotten. Empty when nothing is."""
        self.calm(MOST_CALM_STEPS)
        left = left_over(self)
        for _ in range(2):
            self.engine.clock.now_s += self.half.programs.limits.forget_after_s + 3700.0
            self._add("", [1, 2, 3], None, None, {"end": True})
            self.calm(MOST_CALM_STEPS)
        left["programs"] = len(self.half.programs)
        left["references"] = len(self.engine.references())
        # Each command that was read has one answer, and no more.
        left["answers"] = self.wire.due.total()
        left |= more_than_windows(self._at_start, census(self.half)) | server_remembers(self)
        self.engine.connector.shutdown()
        left["blocks"] = self.engine.spec.blocks - self.engine.free_blocks
        return {name: n for name, n in left.items() if n}
