"""Commands of operators and clients, applied between steps. Each has one answer, and none can fail the engine.

A command is about the present pause: of a program whose turn is under way there is nothing to pin, stage or
give up. What was done is told with figures, for people; outcome and reason are for programs.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple

from kvtier import link_messages as messages
from kvtier.backend import TierBackend, TierState
from kvtier.costs.pinned_turn import PinnedTurn
from kvtier.gpu_pin import ReleaseCause
from kvtier.programs import ProgramId, bounded_name
from kvtier.tools.names import tool_label
from kvtier.ttl.announcements import Announcement, announced_curve
from kvtier.ttl.overrides import TtlOverride
from kvtier.turns.prefetch_plan import Wish

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvtier.gpu_pin import Pin, PinTable
    from kvtier.policy import Policy
    from kvtier.programs import ProgramTable, ProgramView
    from kvtier.stats import Stats
    from kvtier.turns.endings import Endings
    from kvtier.turns.engine_facts import EngineFacts
    from kvtier.turns.happenings import Happenings
    from kvtier.turns.live_mode import LiveMode
    from kvtier.turns.live_policy import LivePolicy
    from kvtier.turns.pauses import Load, Pauses
    from kvtier.turns.pin_charges import PinCharges
    from kvtier.turns.pin_terms import Granted, PinTerms
    from kvtier.turns.prefetch_plan import Answer
    from kvtier.turns.staging import Stager

logger = logging.getLogger(__name__)

RETURN_GRACE_S: Final = 60.0
"""A program whose tool has returned is waited for at least so long."""


class Result(NamedTuple):
    """What became of a command."""

    outcome: messages.Outcome
    reason: str
    detail: str = ""


UNKNOWN: Final = Result("missing", "unknown_program", "this engine does not know the program")
NO_KV: Final = Result("missing", "no_kv", "no KV of the program is known in GPU memory or CPU tier")
RUNNING: Final = Result("rejected", "running", "a turn of the program is under way")


class Commands:
    """See the module's docstring. Used from connector hooks only."""

    def __init__(
        self,
        facts: EngineFacts,
        tier: TierBackend,
        programs: ProgramTable,
        pins: PinTable,
        stager: Stager,
        policy: Policy,
        stats: Stats,
        endings: Endings,
        pauses: Pauses,
        live_policy: LivePolicy,
        happenings: Happenings,
        mode: LiveMode,
        charges: PinCharges,
        terms: PinTerms,
        *,
        prefetch: Callable[[str, float, Wish], Answer],
        calibrate: Callable[[], None],
        read_load: Callable[[], Load],
    ) -> None:
        self._facts = facts
        self._tier = tier
        self._programs = programs
        self._pins = pins
        self._stager = stager
        self._policy = policy
        self._stats = stats
        self._endings = endings
        self._pauses = pauses
        self._live_policy = live_policy
        self._happenings = happenings
        self._mode = mode
        self._charges = charges
        self._terms = terms
        self._prefetch_program = prefetch
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
        match command:
            case messages.ToolCallCommand():
                return self._tool_call(command, view, program, now_s)
            case messages.EndCommand():
                return self._end(view, program, now_s)
        if view.active_requests:
            return RUNNING
        match command:
            case messages.PinCommand(ttl_s=ttl_s):
                return self._pin(program, ttl_s, now_s)
            case messages.ReleaseCommand():
                return self._release(program)
            case messages.StageCommand():
                return self._stage(program, view.last_tool)
            case messages.PrefetchCommand():
                return self._prefetch(program, now_s, Wish())
            case messages.ToolReturnCommand():
                return self._tool_returned(program, now_s)

    # -- pauses ------------------------------------------------------------------------------------

    def _pin(self, program: str, ttl_s: float, now_s: float) -> Result:
        pins = self._pins.of_program(program)
        if not pins:
            return self._prefetch(program, now_s, Wish(ttl_s, is_explicit=True))
        given = [granted for pin in pins if (granted := self._repin(pin, ttl_s, now_s)).ttl_s > 0]
        if not given:
            return Result("rejected", "ttl", "an override, a setting or a budget forbids it")
        least = min(given)
        tokens = sum(len(pin.block_ids) for pin in pins) * self._facts.block_tokens
        told = f"{tokens} tokens for {least.ttl_s:.4g} s from now"
        if least.limit:
            return Result("clipped", least.limit, told)
        return Result("accepted", "pinned", told)

    def _repin(self, pin: Pin, ttl_s: float, now_s: float) -> Granted:
        """Let a pin last for so long from now on, as far as that is granted."""
        granted = self._granted(pin, ttl_s, now_s)
        if granted.ttl_s > 0:
            self._set_deadline(pin, now_s + granted.ttl_s)
        return granted

    def _release(self, program: str) -> Result:
        pins = self._pins.of_program(program)
        if not pins:
            return Result("missing", "no_pin", "no KV of the program is pinned")
        blocks = sum(len(pin.block_ids) for pin in pins)
        copied = any(self._pins.is_all_held(pin) for pin in pins)
        self._endings.note(*self._pins.unpin_program(program, ReleaseCause.COMMAND))
        if copied:
            return Result(
                "clipped", "staging", f"{blocks} blocks are free when their copy has ended"
            )
        return Result("accepted", "released", f"{blocks} blocks")

    def _stage(self, program: str, tool: str | None) -> Result:
        if self._tier.state is not TierState.READY:
            return Result("rejected", "no_tier", f"the CPU tier is {self._tier.state}")
        staged = self._staged_tokens(program)
        known = Result("accepted", "staged", f"{staged} tokens are in the CPU tier already")
        pins = self._pins.of_program(program)
        if not pins:
            return known if staged else NO_KV
        begun = 0
        for pin in pins:
            begun += self._stage_pin(pin, tool)
        return Result("accepted", "staging", f"{begun} tokens") if begun else known

    def _stage_pin(self, pin: Pin, tool: str | None) -> int:
        """Begin to copy what a pin keeps; returns how many tokens, 0 where the tier has them all."""
        data = pin.data
        if not isinstance(data, PinnedTurn) or data.chain is None:
            return 0
        chain = data.chain.head(
            min(len(pin.block_ids) // self._facts.chunk_blocks, len(data.chain))
        )
        tokens = len(chain) * self._facts.chunk_tokens
        staged = self._stager.copies.chunks_of(pin.program, chain) * self._facts.chunk_tokens
        value_s = self._policy.staged_value_s(tool, tokens)
        lease_s = self._policy.lease_s(tool)
        if self._stager.is_staging(pin.key) or not self._stager.start(
            pin.key, pin.program, chain, pin.block_ids, value_s, lease_s
        ):
            return 0
        pin.data = replace(
            data, strand=self._stager.copies.strands.find(pin.program, chain), staged_tokens=tokens
        )
        return tokens - staged

    def _prefetch(self, program: str, now_s: float, wish: Wish) -> Result:
        outcome, reason, detail = self._prefetch_program(program, now_s, wish)
        return Result(_checked(outcome), reason, detail)

    def _tool_returned(self, program: str, now_s: float) -> Result:
        for pin in self._pins.of_program(program):
            # It must not end in the last moment.
            until_s = now_s + self._granted(pin, RETURN_GRACE_S, now_s).ttl_s
            if until_s > pin.deadline_s:
                self._set_deadline(pin, until_s)
        return self._prefetch(program, now_s, Wish(RETURN_GRACE_S))

    def _granted(self, pin: Pin, asked_s: float, now_s: float) -> Granted:
        """For how long a pin may last from now on."""
        data = pin.data
        tool, tenant = (data.tool, data.tenant) if isinstance(data, PinnedTurn) else (None, None)
        return self._terms.granted(
            pin.program, tool, tenant, asked_s, len(pin.block_ids), now_s, pin
        )

    def _tool_call(
        self,
        command: messages.ToolCallCommand,
        view: ProgramView,
        program: str,
        now_s: float,
    ) -> Result:
        curve = announced_curve(command.p50_s, command.p90_s)
        # As the tools of outputs are called, or it would be another one.
        tool = tool_label(command.tool)
        announcement = Announcement(tool, now_s, curve)
        self._policy.ttl.announcements.announce(program, announcement)
        if view.active_requests:
            return Result("accepted", "at_turn_end", "counts when the program's turn has ended")
        self._programs.name_tool(view.program, tool)
        median_s = curve.quantile(0.5) if curve is not None else None
        self._happenings.tool_announced(program, tool, median_s, now_s)
        pins = self._pins.of_program(program)
        if not pins:
            return Result("accepted", "noted", "nothing of the program is pinned")
        told = "; ".join([self._reconsider(pin, announcement) for pin in pins])
        return Result("accepted", "decided_anew", told)

    def _reconsider(self, pin: Pin, announcement: Announcement) -> str:
        decision = self._pauses.reconsider(pin, announcement, self._read_load())
        if decision is None:
            return "kept"
        if decision.stage:
            # Before the pin ends: the copy takes over its references.
            self._stage_pin(pin, announcement.tool)
        if decision.action != "pin":
            self._endings.unpin(pin.key, ReleaseCause.COMMAND)
            return f"{decision.action} ({decision.reason})"
        if isinstance(pin.data, PinnedTurn):
            pin.data = replace(
                pin.data,
                tool=announcement.tool,
                announced=announcement.curve,
                announced_s=announcement.at_s,
            )
        self._set_deadline(pin, announcement.at_s + decision.ttl_s)
        return f"pinned for {decision.ttl_s:.3g} s ({decision.reason})"

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

    # -- internals ---------------------------------------------------------------------------------

    def _set_deadline(self, pin: Pin, deadline_s: float) -> None:
        self._charges.moves(pin, deadline_s)
        self._pins.set_deadline(pin.key, deadline_s)
        self._happenings.pinned(pin)

    def _staged_tokens(self, program: str) -> int:
        copies = self._stager.copies
        chunks = max(map(copies.confirmed_chunks, copies.strands.names(program)), default=0)
        return chunks * self._facts.chunk_tokens


def _program_id(key: messages.ProgramKey) -> ProgramId:
    tenant = bounded_name(key.tenant) if key.tenant else None
    return ProgramId(tenant, "named" if key.named else "anonymous", bounded_name(key.name))


def _checked(outcome: str) -> messages.Outcome:
    known: dict[str, messages.Outcome] = {
        "accepted": "accepted",
        "clipped": "clipped",
        "deferred": "deferred",
        "rejected": "rejected",
        "missing": "missing",
    }
    return known[outcome]
