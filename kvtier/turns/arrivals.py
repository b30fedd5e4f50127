"""A request arrives: what the client asks for, and whose turn it is (a request's life, step 1)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from kvtier.chunk_keys import chain_seed
from kvtier.costs.pinned_turn import PinnedTurn
from kvtier.identity.request_params import parse_transfer_params
from kvtier.programs import ObservedGap, TurnRequest
from kvtier.turns.adapters import Adapters
from kvtier.turns.turn import Turn

if TYPE_CHECKING:
    from kvtier.gpu_pin import PinTable
    from kvtier.identity.request_params import RequestHints
    from kvtier.policy import Policy
    from kvtier.programs import ProgramTable, TurnStart
    from kvtier.stats import Stats
    from kvtier.turns.engine_facts import EngineFacts

logger = logging.getLogger(__name__)

MAX_COMPLAINTS = 64
"""Different malformed hints that are logged; all are counted."""


class Arrivals:
    """Finds each new request's program and records the gap since its last turn."""

    def __init__(
        self,
        facts: EngineFacts,
        programs: ProgramTable,
        pins: PinTable,
        policy: Policy,
        stats: Stats,
    ) -> None:
        self._facts = facts
        self._programs = programs
        self._pins = pins
        self._policy = policy
        self._stats = stats
        self._complaints: set[tuple[str, str]] = set()
        self._adapters = Adapters()

    def take(self, request: Any, now_s: float, waiting_tokens: int) -> tuple[Turn, TurnStart]:
        """The request's turn, and what the program table says to it.

        Args:
            request: vLLM's request.
            now_s: Monotonic time.
            waiting_tokens: Of the requests that wait already.
        """
        hints = self._hints(request)
        start = self._programs.turn_started(_turn_request(request, hints), now_s)
        program = self._facts.program_handle(start.program)
        if start.gap is not None:
            self._observe_gap(start.gap, program)
        adapter, is_known = self._adapters.name_of(request)
        turn = Turn(
            request=request,
            program=program,
            hints=hints,
            seed=chain_seed(adapter=adapter, tenant=request.cache_salt),
            known_adapter=is_known,
            arrived_s=now_s,
            predicted_wait_s=self._policy.queue_delay_s(waiting_tokens),
            index=start.turn_index,
        )
        return turn, start

    def program_age_s(self, request: Any, now_s: float) -> float | None:
        """How long ago the program came that such a request would join; None for a new one."""
        hints, _ = parse_transfer_params(request.kv_transfer_params)
        program = self._programs.find(_turn_request(request, hints))
        known = self._programs.view(program) if program is not None else None
        return None if known is None else now_s - known.arrival_s

    def _hints(self, request: Any) -> RequestHints:
        hints, errors = parse_transfer_params(request.kv_transfer_params)
        for error in errors:
            self._stats.count("failures", 1, f"hint_{error.reason}")
            # Logged once each; a client that invents fields fills neither the log nor the memory.
            complaint = (error.field, error.reason)
            if complaint not in self._complaints and len(self._complaints) < MAX_COMPLAINTS:
                self._complaints.add(complaint)
                logger.warning("kv_transfer_params.kvtier.%s ignored: %s", *complaint)
        return hints

    def _observe_gap(self, gap: ObservedGap, program: str) -> None:
        self._stats.sample("gap_seconds", gap.gap_s)
        self._policy.ttl.observe_gap(gap.tool, gap.gap_s)
        self._policy.ttl.returning.returned(program, gap.ended_request_id)
        for pin in self._pins.of_program(program):
            data = pin.data
            if pin.key != gap.ended_request_id or not isinstance(data, PinnedTurn):
                continue
            if data.predicted_gap_s > 0:
                self._stats.sample("gap_prediction_ratio", gap.gap_s / data.predicted_gap_s)


def _turn_request(request: Any, hints: RequestHints) -> TurnRequest:
    return TurnRequest(
        request_id=request.request_id,
        session_id=getattr(request, "session_id", None),
        program_hint=hints.program,
        tenant=request.cache_salt,
        block_hashes=request.block_hashes,
        ends_program=hints.end,
    )
