"""An engine in an unreliable world: its clock, its CPU tier and its workers."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final

from kvtier.backend import NoTier, TierState
from kvtier.turns.adapters import Adapters
from tests.engine.scheduler_harness import Drive, Engine
from tests.engine.tier_scenarios import Walk
from tests.model.plan import Plan, draw
from tests.model.tier import UnreliableTier
from tests.model.wire import scripted_link
from tests.model.worker import UnreliableWorker

if TYPE_CHECKING:
    from kvtier.backend import TierBackend

WALL_S: Final = 1.8e9


class World(Walk):
    """See the module's docstring.

    Args:
        seed: Of all chance.
        plan: Drawn where it is not given.

    Attributes:
        plan: What it was drawn with.
        tier: None where there is none.
        wire: The control server.
    """

    def __init__(self, seed: int, plan: Plan | None = None) -> None:
        chance = self.make_chance(seed)
        self.plan: Plan = plan or draw(chance)
        self.tier = UnreliableTier(self.plan.n_slots, chance) if self.plan.n_slots else None
        tier: TierBackend = self.tier if self.tier is not None else NoTier()
        self.wall_offset_s = WALL_S
        link, self.wire = scripted_link(lambda: self.engine.half, self._now, self.wall_clock)
        self.link = link
        engine = Engine(self.plan.spec, tier, link)
        super().__init__(engine, Drive(engine, late=self.plan.late), chance)
        self.half = engine.half
        # The adapters of these worlds have no files, by which real ones are known.
        self.half.arrivals._adapters = Adapters(weights=lambda path: path)
        control = self.half.housekeeping._control
        assert control is not None
        control._wall_clock = self.wall_clock
        if self.tier is not None:
            self.tier.use_slots_of(self.half.facts.slot_bytes)
        self.worker = UnreliableWorker(self.drive.kv, chance, engine.clock)
        self.drive.worker = self.worker
        self.half.prefetcher._piece_chunks = chance.choice((1, 2, 100))
        self.half.prefetcher._window_bytes = chance.choice((1, 1 << 30))

    def make_chance(self, seed: int) -> random.Random:
        """All chance of this life."""
        return random.Random(seed)

    def _now(self) -> float:
        return self.engine.clock()

    def wall_clock(self) -> float:
        """Unix time."""
        return self.engine.clock() + self.wall_offset_s

    # -- time --------------------------------------------------------------------------------------

    def _time_passes(self) -> None:
        self.engine.clock.now_s += self.random.choice((0.1, 0.6, 2.0, 7.0, 30.0, 100.0))

    def _time_jumps(self) -> None:
        """The machine slept, say. A monotonic clock never goes back."""
        self.engine.clock.now_s += self.random.choice((15.0, 700.0, 3000.0))

    def _wall_jumps(self) -> None:
        self.wall_offset_s += self.random.choice((-1e6, -100.0, -1.0, 1.0, 100.0, 1e6))

    # -- tier and workers --------------------------------------------------------------------------

    def _lose_tier(self) -> None:
        if self.tier is not None:
            self.tier.lose_at(self.engine.clock())

    def _tier_returns(self) -> None:
        """With all that it held, once the server has given up the engine; or a new one, at once."""
        tier = self.tier
        if tier is None or tier.state is not TierState.AWAY:
            return
        restarted = self.random.random() < 0.5
        if not restarted:
            clock = self.engine.clock
            clock.now_s = max(clock.now_s, tier.may_return_at())
        tier.come_back(restarted=restarted)

    def _weather(self) -> None:
        """How late and how badly things go from now on."""
        choice = self.random.choice
        self.worker.max_delay = choice((0, 2, 6, 30))
        self.worker.fail_share = choice((0.0, 0.0, 0.1, 0.5))
        self.worker.repeat_share = choice((0.0, 0.2))
        if self.tier is not None:
            self.tier.max_delay = choice((0, 1, 5, 40))
            self.tier.fail_share = choice((0.0, 0.0, 0.05, 0.5))
            self.tier.repeat_share = choice((0.0, 0.2))
