"""Defects planted in kvtier, to see that the checker finds them: each breaks what an invariant says."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final
from unittest import mock

from kvtier.admission import AdmissionController
from kvtier.backend import TierState
from kvtier.control.link import EngineLink
from kvtier.gpu_pin import PinTable
from kvtier.scheduler_half import SchedulerHalf
from kvtier.server.residency import ResidencyTable
from kvtier.ttl.tenant_budgets import TenantBudgets
from kvtier.turns import answers, arrivals
from kvtier.turns.block_pool import VllmBlockPool
from kvtier.turns.prefetch import Prefetcher
from kvtier.turns.reading import TierReader
from kvtier.turns.returns import Returns
from kvtier.turns.staged_copies import StagedCopies
from kvtier.turns.staging import Stager
from tests.model.run import live

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kvtier.orders import OrderResult

SEED: Final = 77
MOST_LIVES: Final = 150
"""In which a defect must show."""

Plant = contextlib.AbstractContextManager[Any]


def lost_unpin() -> Plant:
    """The end of a pin by its TTL keeps the references."""
    unpin = PinTable.unpin

    def keeps(self: PinTable, key: str, cause: str) -> Any:
        if cause != "ttl":
            return unpin(self, key, cause)  # type: ignore[arg-type]
        with mock.patch.object(VllmBlockPool, "release"):
            return unpin(self, key, cause)  # type: ignore[arg-type]

    return mock.patch.object(PinTable, "unpin", keeps)


def double_free() -> Plant:
    """The end of a copy drops references that it has shared with a pin, and that the pin drops too."""
    unhold = PinTable.unhold

    def drops(self: PinTable, key: str) -> None:
        shared = key in self._shares.values()
        ids = self._holds.get(key)
        unhold(self, key)
        if shared and ids is not None:
            self.pool.release(ids)

    return mock.patch.object(PinTable, "unhold", drops)


def store_believed_too_early() -> Plant:
    """What was copied counts as staged before the tier has said that it holds it."""
    copied = Stager._copied

    def believes(self: Stager, split: Any, *, ok: bool) -> None:
        if ok and not split.job.void:
            self.copies.confirm(split.job.strand, split.job.chain, split.end)
        copied(self, split, ok=ok)

    return mock.patch.object(Stager, "_copied", believes)


def ended_before_commit() -> Plant:
    """A turn is given up as staged while the tier has yet to say so."""

    def ends(self: Stager, job: Any) -> None:
        done = job.next_chunk >= job.end_chunk and not job.open
        if done and self._jobs.get(job.key) is job:
            self._end(job)

    return mock.patch.object(Stager, "_end_if_done", ends)


def failed_store_committed() -> Plant:
    """A store that has failed is committed as if it had not."""
    return _swallows_errors(Stager)


def cancelled_store_committed() -> Plant:
    """A store goes on to be believed though its blocks were given to others while it read them."""

    def copied(self: Stager, split: Any, *, ok: bool) -> None:
        split.copied = ok
        self._commit_in_order(split.job)

    return mock.patch.object(Stager, "_copied", copied)


def budget_off_by_one() -> Plant:
    """Pins may keep one block more than the budget."""
    pin = PinTable.pin

    def one_more(self: PinTable, *args: Any, **kwargs: Any) -> bool:
        self.budget_blocks += 1
        try:
            return pin(self, *args, **kwargs)
        finally:
            self.budget_blocks -= 1

    return mock.patch.object(PinTable, "pin", one_more)


def tenant_not_charged() -> Plant:
    """A tenant's pins cost it nothing."""
    charge = TenantBudgets.charge

    def nothing(
        self: TenantBudgets, tenant: str | None, pin: str, _byte_seconds: float, now_s: float
    ) -> None:
        charge(self, tenant, pin, 0.0, now_s)

    return mock.patch.object(TenantBudgets, "charge", nothing)


def stale_program_table() -> Plant:
    """The link's picture keeps programs that have gone."""
    return mock.patch.object(EngineLink, "program_gone")


def forgotten_chains() -> Plant:
    """The chunk keys of programs that have gone are kept."""
    return mock.patch.object(Returns, "forget")


def evicted_chunks_remembered() -> Plant:
    """The server remembers the size of each chunk that it has ever held."""
    forget = ResidencyTable._forget

    def keeps(self: ResidencyTable, chunk: tuple[str, bytes]) -> int:
        size = self._sizes[chunk]
        n_bytes = forget(self, chunk)
        self._sizes[chunk] = size
        return n_bytes

    return mock.patch.object(ResidencyTable, "_forget", keeps)


def swallowed_worker_error() -> Plant:
    """What workers report as failed counts as done, whoever had ordered it."""
    note = answers.Answers.note

    def swallows(self: answers.Answers, results: Iterable[OrderResult]) -> None:
        note(self, [replace(result, ok=True) for result in results])

    return mock.patch.object(answers.Answers, "note", swallows)


def swallowed_prefetch_error() -> Plant:
    """A prefetch takes in pieces whose copy has failed."""
    return _swallows_errors(Prefetcher)


def _swallows_errors(kind: type[Stager | Prefetcher]) -> Plant:
    on_result = kind.on_result

    def swallows(self: Any, result: OrderResult) -> bool:
        return on_result(self, replace(result, ok=True))

    return mock.patch.object(kind, "on_result", swallows)


def wrong_tenant_key() -> Plant:
    """Keys of the CPU tier are the same for all tenants."""
    seed = arrivals.chain_seed
    return mock.patch.object(
        arrivals, "chain_seed", lambda *, adapter, tenant: seed(adapter=adapter, tenant=None)
    )


def wrong_adapter_key() -> Plant:
    """Keys of the CPU tier are the same for all adapters."""
    seed = arrivals.chain_seed
    return mock.patch.object(
        arrivals, "chain_seed", lambda *, adapter, tenant: seed(adapter=None, tenant=tenant)
    )


def missed_reset() -> Plant:
    """New weights do not change under which names the tier is asked."""
    return mock.patch.object(SchedulerHalf, "reset_tier")


def written_blocks_given_away() -> Plant:
    """A reset frees the blocks that a prefetch still writes to."""
    return mock.patch.object(Prefetcher, "after_reset")


def lost_unlock() -> Plant:
    """Chunks that were locked for a load stay locked when it has ended."""
    on_result = TierReader.on_result

    def keeps(self: TierReader, result: OrderResult) -> Any:
        with mock.patch.object(self._tier, "trim"):
            return on_result(self, result)

    return mock.patch.object(TierReader, "on_result", keeps)


def evicted_while_read() -> Plant:
    """The server forgets a lookup's locks."""
    return mock.patch.object(ResidencyTable, "_count_lock")


def lost_wakeup() -> Plant:
    """An idle engine does not go on stepping while KV is staged."""
    return mock.patch.object(Stager, "busy", return_value=False)


def older_waits_for_ever() -> Plant:
    """A request that has left goes on holding others back."""
    leave = AdmissionController._leave

    def stays(self: AdmissionController[str], entry: Any) -> None:
        leave(self, entry)
        entry.gone = False
        entry.asked_scan = 1 << 60

    return mock.patch.object(AdmissionController, "_leave", stays)


def found_missing_unnoticed() -> Plant:
    """What a lookup has not found still counts as staged."""
    return mock.patch.object(StagedCopies, "correct")


def eviction_unnoticed() -> Plant:
    """What had to make room still counts as staged, until a lookup or a commit sees less."""
    return mock.patch.object(StagedCopies, "evicted")


def confirmed_for_ever() -> Plant:
    """A commit that finds less than one before does not make what counts as staged less."""
    confirm = StagedCopies.confirm

    def keeps(self: StagedCopies, strand: str, chain: Any, n_chunks: int) -> int:
        known = self._staged.get(strand)
        same = known is not None and known.chain.common_chunks(chain) >= known.n_chunks
        return confirm(self, strand, chain, max(n_chunks, known.n_chunks if same else 0))

    return mock.patch.object(StagedCopies, "confirm", keeps)


def waits_for_lost_tier() -> Plant:
    """A request that returns waits until the tier is there again."""
    match = SchedulerHalf.match

    def waits(self: SchedulerHalf, request: Any, local_tokens: int) -> int | None:
        if request.request_id in self._turns and self.tier.state is TierState.AWAY:
            return None
        return match(self, request, local_tokens)

    return mock.patch.object(SchedulerHalf, "match", waits)


def tenant_charged_too_little() -> Plant:
    """A tenant's pins cost it a tenth less than they use."""
    charge = TenantBudgets.charge

    def less(
        self: TenantBudgets, tenant: str | None, pin: str, byte_seconds: float, now_s: float
    ) -> None:
        charge(self, tenant, pin, byte_seconds * 0.9 if byte_seconds > 0 else byte_seconds, now_s)

    return mock.patch.object(TenantBudgets, "charge", less)


def tier_lost_unnoticed() -> Plant:
    """When the tier comes or goes, what was staged and locked still counts."""
    return mock.patch.object(answers.Answers, "_tier_changed")


ALL: Final[dict[str, Callable[[], Plant]]] = {
    plant.__name__: plant
    for plant in (
        lost_unpin,
        double_free,
        store_believed_too_early,
        ended_before_commit,
        failed_store_committed,
        cancelled_store_committed,
        budget_off_by_one,
        tenant_not_charged,
        tenant_charged_too_little,
        stale_program_table,
        forgotten_chains,
        evicted_chunks_remembered,
        swallowed_worker_error,
        swallowed_prefetch_error,
        wrong_tenant_key,
        wrong_adapter_key,
        missed_reset,
        written_blocks_given_away,
        lost_unlock,
        evicted_while_read,
        lost_wakeup,
        older_waits_for_ever,
        tier_lost_unnoticed,
        found_missing_unnoticed,
        confirmed_for_ever,
        eviction_unnoticed,
        waits_for_lost_tier,
    )
}


def catch_all(names: list[str]) -> dict[str, dict[str, Any]]:
    """Plant defects, one after the other, and live until each shows.

    Args:
        names: Of defects, `name` or `name:life`, where it shows; or `all`.
    """
    wanted = list(ALL) if names == ["all"] else names
    found = {}
    for name in wanted:
        defect, _, life = name.partition(":")
        found[defect] = _catch(defect, int(life or 0))
        sys.stderr.write(f"{defect}: {found[defect]}\n")
    return found


def _catch(name: str, first: int) -> dict[str, Any]:
    since_s, transitions = time.monotonic(), 0
    for number in range(first, first + MOST_LIVES):
        with ALL[name]():
            outcome = live(SEED, number)
        transitions += outcome.transitions
        if outcome.broken:
            return {
                "caught": True,
                "by": outcome.broken[number].partition("\n")[0],
                "life": number,
                "transitions": transitions,
                "seconds": round(time.monotonic() - since_s, 2),
            }
    return {"caught": False, "transitions": transitions}
