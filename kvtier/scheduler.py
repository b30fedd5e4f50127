"""vLLM schedulers that order waiting requests by program.

Use with ``--scheduler-cls kvtier.scheduler.ProgramScheduler --scheduling-policy priority``, as
``kvtier serve`` does; with async scheduling it makes an ``AsyncProgramScheduler``. Under the priority policy vLLM orders by
(priority, arrival time) and preempts the last in that order, so giving a request the arrival time
of its program is enough: returning turns of older programs go first, and the youngest program is
preempted. Under the FCFS policy vLLM ignores arrival times and these classes change nothing.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final, Self, cast

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from kvtier.admission_facts import AdmissionConfig
from kvtier.identity.program_arrivals import ProgramArrivals, rank_s
from kvtier.identity.program_records import bounded_name
from kvtier.identity.request_params import parse_transfer_params
from kvtier.turns.live_mode import Mode

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

AGING_OPTION: Final = "kvtier_aging_s"


class ProgramOrderMixin:
    """Sets a new request's arrival time to its program's, aged; the rest is vLLM's scheduler.

    The program is the request's session id, else its ``kv_transfer_params["kvtier"]["program"]``,
    per tenant. For others the connector is asked, if it has ``program_age_s(request) -> float |
    None``: how long ago, in seconds, the first turn of the request's program arrived.

    ``--additional-config '{"kvtier_aging_s": 120}'`` sets the aging time in seconds; else it is that
    of kvtier's connector.
    """

    # Of the scheduler that this is mixed into.
    vllm_config: Any
    connector: Any
    requests: dict[str, Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._aging_s = self._chosen_aging_s()
        self._arrivals = ProgramArrivals()
        if self.vllm_config.scheduler_config.policy != "priority":
            logger.warning("kvtier: order by program needs --scheduling-policy priority")

    def add_request(self, request: Request) -> None:
        """Queue a request under its program's arrival time."""
        session = self.requests.get(request.request_id)
        if session is not None:
            # The next piece of a streaming input: it keeps its place, which vLLM would take from the piece.
            request.arrival_time = session.arrival_time
        elif self._orders_requests():
            request.arrival_time = rank_s(
                self._program_arrival_s(request), request.arrival_time, self._aging_s
            )
        super().add_request(request)  # type: ignore[misc]

    def _orders_requests(self) -> bool:
        """Not while kvtier's connector is off or only watches."""
        half = getattr(self.connector, "scheduler_half", None)
        return half is None or half.live_mode.mode is Mode.ON

    def _chosen_aging_s(self) -> float:
        options = self.vllm_config.additional_config
        chosen = options.get(AGING_OPTION) if isinstance(options, dict) else None
        if chosen is not None:
            return AdmissionConfig(aging_s=float(chosen)).aging_s
        half = getattr(self.connector, "scheduler_half", None)
        return float(AdmissionConfig().aging_s if half is None else half.admission.config.aging_s)

    def _program_arrival_s(self, request: Request) -> float:
        arrival_s = float(request.arrival_time)
        session_id = getattr(request, "session_id", None)
        hints, _ = parse_transfer_params(request.kv_transfer_params)
        name = session_id or hints.program
        if name:
            tenant = bounded_name(request.cache_salt) if request.cache_salt else None
            return self._arrivals.first_arrival_s((tenant, bounded_name(name)), arrival_s)
        program_age_s = getattr(self.connector, "program_age_s", None)
        age_s = program_age_s(request) if program_age_s is not None else None
        return arrival_s if age_s is None else arrival_s - age_s


class ProgramScheduler(ProgramOrderMixin, Scheduler):
    """vLLM's scheduler, ordered by program; an `AsyncProgramScheduler` with async scheduling.

    Which of the two an engine needs is known only when vLLM has settled its configuration.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Make the kind that the configuration asks for."""
        vllm_config = kwargs.get("vllm_config", args[0] if args else None)
        scheduler_config = getattr(vllm_config, "scheduler_config", None)
        if cls is ProgramScheduler and getattr(scheduler_config, "async_scheduling", False):
            cls = cast("type[Self]", AsyncProgramScheduler)  # noqa: PLW0642 - what __new__ is for
        return cast("Self", super().__new__(cls))


class AsyncProgramScheduler(ProgramScheduler, AsyncScheduler):
    """vLLM's scheduler for async scheduling, ordered by program."""
