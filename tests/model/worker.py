"""Workers whose copies end late, in any order, twice, or badly, and leave torn KV behind when they do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.engine.copy_worker import CopyWorker

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from vllm.v1.outputs import KVConnectorOutput

    from tests.engine.copy_worker import Fate
    from tests.engine.symbolic_kv import Content, SymbolicKV


class UnreliableWorker(CopyWorker):
    """See the module's docstring.

    What a copy writes to holds nobody's KV from its beginning on, and for good if it fails. A store reads its
    blocks when it begins or when it ends. An order is refused after its deadline, as the worker half does.

    Args:
        kv: What is copied.
        chance: Decides what goes wrong.
        clock: The scheduler half's.

    Attributes:
        is_calm: Nothing goes wrong, and copies end in their own step.
        max_delay: Most steps that a copy takes.
        fail_share: Of copies.
        repeat_share: Of results that are reported twice.
    """

    def __init__(self, kv: SymbolicKV, chance: random.Random, clock: Callable[[], float]) -> None:
        super().__init__(kv, self._fate_of)
        self.is_calm = True
        self.max_delay = 0
        self.fail_share = self.repeat_share = 0.0
        self._symbolic = kv
        self._chance = chance
        self._clock = clock
        self._read: dict[int, list[Content]] = {}

    def collect(self) -> KVConnectorOutput:
        output = super().collect()
        results = output.kv_connector_worker_meta.results
        for result in results:
            # One that has failed was never copied.
            self._read.pop(result.order_id, None)
        if self.repeat_share and not self.is_calm:
            results += [r for r in results if self._chance.random() < self.repeat_share]
        return output

    def _fate_of(self, order: Any) -> Fate:
        if self.is_calm:
            return 0, True
        delay = self._chance.randrange(self.max_delay + 1)
        return delay, self._chance.random() >= self.fail_share

    def _begin(self, order: Any) -> None:
        if order.direction == "store" and self._chance.random() < 0.5:
            self._read[order.order_id] = self._symbolic.read_blocks(order)
        self._symbolic.spoil(order)

    def _copy(self, order: Any) -> bool:
        early = self._read.get(order.order_id)
        if self._clock() >= order.deadline_s:
            return False
        if early is not None:
            self._symbolic.write_slots(order, early)
            return True
        return super()._copy(order)
