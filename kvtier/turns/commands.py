"""Commands of operators and clients, applied between steps. Each has one answer, and none can fail the engine.

Those about a program's KV are in `pause_commands`, as they are about the present pause: of a program whose turn
is under way there is nothing to pin, stage or give up. What was done is told with figures, for people; outcome and reason are for programs.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from kvtier import link_messages as messages
from kvtier.costs.pinned_turn import PinnedTurn
from kvtier.gpu_pin import ReleaseCause
from kvtier.programs import ProgramId, bounded_name
from kvtier.tools.names import tool_label
from kvtier.ttl.announcements import Announcement, announced_curve
from kvtier.ttl.overrides import TtlOverride
from kvtier.turns.pause_commands import Result

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvtier.gpu_pin import Pin, PinTable
    from kvtier.policy import Policy
    from kvtier.programs import ProgramTable, ProgramView
    from kvtier.stats import Stats
    from kvtier.turns.endings import Endings
    from kvtier.turns.engine_facts import EngineFacts
    from kvtier.turns.happenings import Happenings
    from kvtier.turns.live_policy import LivePolicy
    from kvtier.turns.pause_commands import PauseCommands
    from kvtier.turns.pauses import Load, Pauses

logger = logging.getLogger(__name__)

UNKNOWN: Final = Result("missing", "unknown_program", "this engine does not know the program")
RUNNING: Final = Result("rejected", "running", "a turn of the program is under way")
TOO_LATE: Final = Result(
    "rejected", "too_late", "the time asked for was over before the engine ran a step"
)


class Commands:
    """See the module's docstring. Used from connector hooks only."""

    def __init__(
        self,
        facts: EngineFacts,
        programs: ProgramTable,
        pins: PinTable,
        policy: Policy,
        stats: Stats,
        endings: Endings,
        pauses: Pauses,
        live_policy: LivePolicy,
        happenings: Happenings,
        paused: PauseCommands,
        *,
        calibrate: Callable[[], None],
        read_load: Callable[[], Load],
    ) -> None:
        self._facts = facts
        self._programs = programs
        self._pins = pins
        self._policy = policy
        self._stats = stats
        self._endings = endings
        self._pauses = pauses
        self._live_policy = live_policy
        self._happenings = happenings
        self._paused = paused
        self._calibrate = calibrate
        self._read_load = read_load

    def apply(self, command: messages.Command, now_s: float, offset_s: float) -> Result:
        """Do what the command asks for.

        Args:
            command: The command.
            now_s: Monotonic time.
            offset_s: Unix time less monotonic time.
        """
        name = type(command).__name__.removesuffix("Command").lower()
        try:
            result = self._apply(command, now_s, offset_s)
        except Exception:
            logger.exception("the command %s failed", name)
            result = Result("rejected", "internal", "kvtier's log says more")
        self._stats.count("commands", 1, name, result.outcome)
        return result

    def _apply(self, command: messages.Command, now_s: float, offset_s: float) -> Result:  # noqa: C901 - a line a command
        match command:
            case messages.OverridesCommand(overrides=overrides):
                return self._override(overrides, offset_s)
            case messages.PolicyCommand():
                return Result(*self._live_policy.change(command))
            case messages.CalibrateCommand():
                self._calibrate()
                return Result("accepted", "measuring", "the link is measured with the next step")
        program_id = _program_id(command.program)
        view = self._programs.view(program_id)
        if view is None:
            return UNKNOWN
        program = self._facts.program_handle(program_id)
        waited_s = _waited_s(command, now_s + offset_s)
        match command:
            case messages.ToolCallCommand():
                return self._tool_call(command, view, program, now_s, waited_s)
            case messages.EndCommand():
                return self._end(view, program, now_s)
        if view.active_requests:
            return RUNNING
        match command:
            case messages.PinCommand(ttl_s=ttl_s):
                left_s = ttl_s - waited_s
                return self._paused.pin(program, left_s, now_s) if left_s > 0 else TOO_LATE
            case messages.ReleaseCommand():
                return self._paused.release(program)
            case messages.StageCommand():
                return self._paused.stage(program, view.last_tool)
            case messages.PrefetchCommand():
                return self._paused.prefetch(program, now_s)
            case messages.ToolReturnCommand():
                return self._paused.tool_returned(program, now_s)

    # -- tools -------------------------------------------------------------------------------------

    def _tool_call(
        self,
        command: messages.ToolCallCommand,
        view: ProgramView,
        program: str,
        now_s: float,
        waited_s: float,
    ) -> Result:
        curve = announced_curve(command.p50_s, command.p90_s)
        # As the tools of outputs are called, or it would be another one.
        tool = tool_label(command.tool)
        announcement = Announcement(tool, now_s - waited_s, curve)
        turns = view.active_requests or view.finished_requests
        self._policy.ttl.announcements.announce(program, turns, announcement)
        if curve is not None:
            # Who says how long it stays away tells nothing of those who do not.
            self._policy.ttl.returning.forget(program, turns)
        if view.active_requests:
            return Result("accepted", "at_turn_end", "counts when the program's turn has ended")
        self._programs.name_tool(view.program, tool)
        median_s = curve.quantile(0.5) if curve is not None else None
        self._happenings.tool_announced(program, tool, median_s, announcement.at_s)
        pins = self._pins.of_program(program)
        if not pins:
            return Result("accepted", "noted", "nothing of the program is pinned")
        told = "; ".join([self._reconsider(pin, announcement, now_s) for pin in pins])
        return Result("accepted", "decided_anew", told)

    def _reconsider(self, pin: Pin, announcement: Announcement, now_s: float) -> str:
        decision = self._pauses.reconsider(pin, announcement, self._read_load(), now_s)
        if decision is None:
            return "kept"
        if decision.stage:
            # Before the pin ends: the copy takes over its references.
            self._paused.stage_pin(pin, announcement.tool)
        if isinstance(pin.data, PinnedTurn):
            pin.data = replace(
                pin.data,
                tool=announcement.tool,
                announced=announcement.curve,
                announced_s=announcement.at_s,
            )
        if decision.action != "pin":
            self._endings.unpin(pin.key, ReleaseCause.COMMAND)
            return f"{decision.action} ({decision.reason})"
        # Where that is past, the pin ends with the next step.
        deadline_s = announcement.at_s + decision.ttl_s
        self._paused.set_deadline(pin, deadline_s)
        return f"pinned for {max(0.0, deadline_s - now_s):.3g} s ({decision.reason})"

    def _end(self, view: ProgramView, program: str, now_s: float) -> Result:
        self._programs.end_program(view.program, now_s)
        if view.active_requests:
            return Result("accepted", "at_turn_end", "the program ends with its turn")
        self._endings.program_ended(program)
        return Result("accepted", "ended")

    # -- all programs ------------------------------------------------------------------------------

    def _override(self, overrides: list[messages.TtlOverride], offset_s: float) -> Result:
        self._policy.ttl.overrides.replace(
            self._override_of(override, offset_s) for override in overrides
        )
        return Result("accepted", "set", f"{len(overrides)} overrides")

    def _override_of(self, override: messages.TtlOverride, offset_s: float) -> TtlOverride:
        expires_s = float("inf") if override.expires_s is None else override.expires_s - offset_s
        mode, ttl_s = override.mode, override.ttl_s
        if override.program is not None:
            key = self._facts.program_handle(_program_id(override.program))
            return TtlOverride("program", key, mode, ttl_s, expires_s)
        if override.tool is not None:
            return TtlOverride("tool", tool_label(override.tool), mode, ttl_s, expires_s)
        if override.tenant is not None:
            return TtlOverride("tenant", bounded_name(override.tenant), mode, ttl_s, expires_s)
        return TtlOverride("all", "", mode, ttl_s, expires_s)


def _waited_s(command: messages.Command, unix_s: float) -> float:
    """For how long a command was on its way: an idle engine takes it in when it next runs a step."""
    return 0.0 if command.asked_s is None else max(0.0, unix_s - command.asked_s)


def _program_id(key: messages.ProgramKey) -> ProgramId:
    tenant = bounded_name(key.tenant) if key.tenant else None
    return ProgramId(tenant, "named" if key.named else "anonymous", bounded_name(key.name))
