"""The seven invariants of `docs/invariants.md`, checked on a `Life`."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

from vllm.v1.core.kv_cache_utils import get_block_hash

from kvtier.turns.arrivals import MAX_COMPLAINTS
from kvtier.wire import split_keys
from tests.engine.engine_spec import BLOCK_TOKENS
from tests.model.beliefs import Beliefs
from tests.model.census import census
from tests.model.commands import TENANTS
from tests.model.meter import Meter

if TYPE_CHECKING:
    from collections import Counter

    from kvtier.chunk_keys import ChunkChain
    from kvtier.turns.stage_jobs import StageJob
    from tests.model.life import Life

MAX_IDLE_STEPS: Final = 120
"""In a calm: longest run of steps that compute nothing although requests wait and no copy runs."""

MAX_CALM_STEPS: Final = 3000
ORDER_SLACK: Final = 64
PARTS: Final = 4
"""Of an entry of the server's bookkeeping, at most."""


class Broken(AssertionError):  # noqa: N818 - an invariant
    """An invariant does not hold."""


class Failures(logging.Handler):
    """What kvtier logs with an exception: it has caught a defect of its own."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.records.append(record)


def left_over(life: Life) -> dict[str, int]:
    """What a calm should have ended and has not: copies and who waits for them, holds, locks."""
    half = life.half
    left = {
        "loads": half.reader.n_loads,
        "staging jobs": half.stager.n_jobs,
        "prefetches": half.prefetcher.n_going + half.prefetcher.n_in_flight,
        "holds": half.pins.held_blocks,
    } | (life.tier.leaks() if life.tier is not None else {})
    return {name: n for name, n in left.items() if n}


def server_remembers(life: Life) -> dict[str, int]:
    """Containers of the server's bookkeeping that hold more than its slots explain, and how much they hold.

    The scheduler half leads to it only through the tests' tier, which the census does not follow.
    """
    if life.tier is None:
        return {}
    n_slots = life.plan.n_slots
    # Programs may share chunks. Their order keeps twice as many entries as there are things, and some besides.
    loose = 2 * n_slots + ORDER_SLACK
    return {
        path: n
        for path, n in census(life.tier.table).items()
        if n > PARTS * (loose if path.startswith(("._programs", "._order")) else n_slots)
    }


class Invariants:
    """See the module's docstring.

    Args:
        life: Whose engine is looked at; from now on.
    """

    def __init__(self, life: Life) -> None:
        self._life = life
        self._half = life.half
        self._kv = life.drive.kv
        # What a block hash stands for: the content of the block's last token.
        self._truth: dict[bytes, int] = {}
        # What was seen where an exception would be kvtier's to catch.
        self._seen = ""
        self._meter = Meter(life)
        self._beliefs = Beliefs(life, life.tier) if life.tier is not None else None
        self._failures = Failures()
        logging.getLogger("kvtier").addHandler(self._failures)
        life.watch = self.after_transition
        life.over = self._learn  # type: ignore[method-assign]
        self._follow_staging()
        self._before = census(self._half)

    def close(self) -> None:
        """Look no more."""
        logging.getLogger("kvtier").removeHandler(self._failures)

    # -- after each transition ---------------------------------------------------------------------

    def after_transition(self) -> None:
        """1, 3 and 5; 2 and 6 are checked wherever KV is read, 3 wherever copies end, too."""
        life = self._life
        if self._seen:
            raise Broken(self._seen)
        if life.engine.connector.scheduler_half is None or self._failures.records:
            raise Broken(f"kvtier has failed: {self._failure()}")
        try:
            life.engine.check()
        except AssertionError as error:
            raise Broken(f"1 or 5: {error}") from error
        overuse = self._meter.overuse()
        if overuse:
            raise Broken(overuse)
        unfounded = self._beliefs.unfounded() if self._beliefs is not None else ""
        if unfounded:
            raise Broken(unfounded)

    def _failure(self) -> str:
        records = self._failures.records
        if not records:
            return "it is off"
        return logging.Formatter().format(records[0])

    # -- after each calm ---------------------------------------------------------------------------

    def calm(self) -> None:
        """4: all requests end; nothing of the tier stays locked; every block that can be hit is right."""
        life = self._life
        idle_before = life.drive.worst_idle_run
        life.drive.worst_idle_run = 0
        life.calm(MAX_CALM_STEPS)
        if life.drive.worst_idle_run > MAX_IDLE_STEPS:
            raise Broken(f"4: {life.drive.worst_idle_run} steps computed nothing")
        life.drive.worst_idle_run = max(idle_before, life.drive.worst_idle_run)
        if life.engine.scheduler.requests or life.open:
            raise Broken(f"4: unfinished: {list(life.engine.scheduler.requests)}")
        self._check_cached_blocks()
        left = left_over(life)
        if left:
            raise Broken(f"1: left over in a calm: {left}")
        remembered = server_remembers(life)
        if remembered:
            raise Broken(f"7: the server remembers more than its slots: {remembered}")
        self._check_picture()

    def _check_cached_blocks(self) -> None:
        for block in self._life.engine.pool.blocks:
            if block.is_null or block.block_hash is None:
                continue
            wanted = self._truth.get(bytes(get_block_hash(block.block_hash)))
            if wanted is not None and self._kv.last_of_block(block.block_id) != wanted:
                raise Broken(f"2: block {block.block_id} can be hit, and holds other KV")

    def _check_picture(self) -> None:
        """The link's picture of programs and pins is the engine's."""
        half, picture = self._half, self._life.link._programs
        known = {half.facts.program_handle(program) for program in half.programs._programs}
        if set(picture) - known:
            raise Broken(f"7: the picture has programs that have gone: {set(picture) - known}")
        if known - set(picture):
            raise Broken(f"the picture lacks programs: {known - set(picture)}")
        pins = {pin.key for pin in half.pins.pins()}
        told = {key for program in picture.values() for key in program.pins}
        if pins != told:
            raise Broken(f"the picture's pins are {told}, the engine's {pins}")

    # -- at the end --------------------------------------------------------------------------------

    def over(self) -> None:
        """1 and 7: when all programs have been forgotten, every count is what it was at the start."""
        life = self._life
        for _ in range(2):
            life.engine.clock.now_s += self._half.programs.limits.forget_after_s + 3700.0
            # The last program of all lets go of what is cleaned up behind programs.
            life._add("", [1, 2, 3], None, None, {"end": True})
            self.calm()
        if len(self._half.programs):
            raise Broken(f"7: programs are left: {life.programs()}")
        if life.engine.references():
            raise Broken(f"1: references are left: {life.engine.references()}")
        grown = more_than_windows(self._before, census(self._half))
        if grown:
            raise Broken(f"7: kvtier remembers more than at the start: {grown}")
        life.engine.connector.shutdown()
        life.engine.check()
        if life.engine.free_blocks != life.engine.spec.blocks:
            raise Broken("1: blocks are lost")

    # -- 3: what is believed of the tier -----------------------------------------------------------

    def _follow_staging(self) -> None:
        copies, stager = self._half.stager.copies, self._half.stager
        confirm, start, end_if_done = copies.confirm, stager.start, stager._end_if_done

        def checked_confirm(strand: str, chain: ChunkChain, n_chunks: int) -> int:
            self._check_stored(chain, n_chunks)
            return confirm(strand, chain, n_chunks)

        def noted_start(key: str, *args: Any, **kwargs: Any) -> bool:
            begun = start(key, *args, **kwargs)
            if begun:
                assert self._beliefs is not None
                self._beliefs.began(stager._jobs[key])
            return begun

        def checked_end(job: StageJob) -> None:
            was = stager.is_staging(job.key)
            end_if_done(job)
            if was and not stager.is_staging(job.key) and not job.cancelled:
                self._check_given_up(job)

        copies.confirm = checked_confirm  # type: ignore[method-assign]
        stager.start = noted_start  # type: ignore[method-assign]
        stager._end_if_done = checked_end  # type: ignore[method-assign]

    def _check_stored(self, chain: ChunkChain, n_chunks: int) -> None:
        """What the tier holds of these chunks is what they are named for."""
        tier = self._life.tier
        assert tier is not None
        self._learn_open()
        namespace = self._half.stager.copies.namespace
        for i, key in enumerate(split_keys(bytes(chain.keys))[:n_chunks]):
            slot = tier.holds(namespace, key)
            if slot is None:
                continue
            wanted = self._truth.get(chain.marks[i])
            held = self._kv.last_of_slot(tier.region.generation, slot)
            if wanted is not None and held != wanted:
                self._seen = self._seen or f"3: the slot of chunk {i} holds other KV"

    def _check_given_up(self, job: StageJob) -> None:
        assert self._beliefs is not None
        self._seen = self._seen or self._beliefs.given_up(job)

    # -- what is true ------------------------------------------------------------------------------

    def _learn_open(self) -> None:
        for _, request in self._life.open.values():
            self._learn(request)

    def _learn(self, request: Any) -> None:
        """Note what the hashes of a request's blocks stand for."""
        hashes = request.block_hashes
        chain = self._kv.chain(request, len(hashes) * BLOCK_TOKENS)
        for i, block_hash in enumerate(hashes):
            self._truth[bytes(block_hash)] = chain[(i + 1) * BLOCK_TOKENS - 1]


_WINDOWS: Final[dict[str, int]] = {
    ".admission._forecast._ended_turns": 256,
    # Requests that have gone are taken out when there are many.
    ".admission._lines._heaps": 4 * 64 * 3,
    # A place in the queue: three numbers.
    ".admission._front": 3,
    # The last program's own pause.
    ".admission._working_set._pauses": 2,
    # One for each adapter of these worlds.
    ".arrivals._adapters": 8,
    ".arrivals._complaints": 2 * MAX_COMPLAINTS,
    # A fit, and a window of transfers for each class of sizes.
    ".policy.load_link": 64 + 8 * 64,
    ".policy.prefill": 4,
    ".policy.prefill_samples": 3 * 256,
    ".policy.store_link": 64 + 8 * 64,
    ".policy.ttl._gaps": 4096,
    ".policy.ttl._reuse": 64,
    # Two counts for each number of turns; the pauses themselves are in `_turns` too.
    ".policy.ttl.returning._seen": 64,
    # What the operator has set.
    "._charges._budgets": len(TENANTS),
    ".policy.ttl.overrides": 4,
    # Names and labels, not programs.
    ".stats._gauges": 32,
    ".stats.totals": 256,
}
"""Containers that may hold more than at the start, and how much more: measurements, counters, settings."""


def more_than_windows(before: Counter[str], now: Counter[str]) -> dict[str, int]:
    """What is remembered besides what was at the start, and fixed windows: containers, and entries more."""
    return {path: n for path, n in (now - before).items() if not _is_window(path, n)}


def _is_window(path: str, n_entries: int) -> bool:
    return any(
        n_entries <= most and (path == name or path[len(name) : len(name) + 1] in ("[", "."))
        for name, most in _WINDOWS.items()
        if path.startswith(name)
    )
