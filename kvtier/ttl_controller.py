"""What pins' lifetimes depend on, learned as programs pause and return.

The time a pin lasts is the one of largest expected gain (:func:`kvtier.ttl.holding.optimal_ttl`), and
under pressure the pin of smallest expected regret ends first. Both ask this module how long programs
stay away, how often a pin is broken before they return, and whether outputs are ever hit. Baselines
(the Continuum paper's rule, a constant TTL) are not here.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from kvtier.costs.estimators import ShareEstimator
from kvtier.costs.pinned_turn import PinnedTurn
from kvtier.ttl.announcements import Announcements
from kvtier.ttl.gaps import GapBook, SurvivalCurve
from kvtier.ttl.overrides import OverrideTable, joined
from kvtier.ttl.return_chance import ReturnChance
from kvtier.ttl.tenant_budgets import TenantBudgets

if TYPE_CHECKING:
    from kvtier.gpu_pin import Pin
    from kvtier.ttl.holding import TtlBound

_MODEL = ""
"""One engine serves one model; adapters share its template."""

MIN_LEASE_S = 5.0
LEASE_QUANTILE = 0.9
MEAN_GAP_LIMIT_S = 600.0
"""Longer pauses count as this long in a mean, which a few of them would else decide."""
PRIOR_BREAK_PROBABILITY = 0.1
"""Share of pins that pressure ends before the return, until it was counted."""


class TtlController:
    """Gaps, broken pins and the reuse of outputs of one engine; what clients and operators say besides."""

    def __init__(self, *, fixed_ttl_s: float | None = None) -> None:
        """Know nothing yet; ``fixed_ttl_s`` is the operator's TTL for every pause."""
        self.overrides = OverrideTable()
        self.announcements = Announcements()
        self.budgets = TenantBudgets()
        self.returning = ReturnChance()
        self._fixed_ttl_s = fixed_ttl_s
        self._gaps = GapBook()
        self._reuse = OutputReuse()
        self._broken = ShareEstimator(PRIOR_BREAK_PROBABILITY)

    # -- observations ------------------------------------------------------------------------------

    def observe_gap(self, tool: str | None, gap_s: float) -> None:
        """A program returned after ``gap_s``."""
        self._gaps.record(tool, gap_s)

    def observe_censored(self, tool: str | None, waited_s: float) -> None:
        """A program had not returned after ``waited_s``, and is no longer watched."""
        self._gaps.record_censored(tool, waited_s)

    def observe_output_reuse(self, hit_tokens: int, output_tokens: int) -> None:
        """The next prompt hit this much of a pinned turn's output part."""
        self._reuse.observe(_MODEL, hit_tokens, output_tokens)

    def observe_pin_end(self, *, broken: bool) -> None:
        """A pin ended: under pressure, or with the program's return or its TTL."""
        self._broken.observe(happened=broken)

    # -- answers -----------------------------------------------------------------------------------

    def away(self, tool: str | None) -> SurvivalCurve:
        """Chance that a program is still away some time after such a turn."""
        return self._gaps.curve(tool)

    def learnt(self, tool: str | None) -> SurvivalCurve:
        """The same by what was seen alone, whatever is predicted of one pause.

        For what is compared between programs: a single wrong prediction must not cost another one its KV.
        """
        return self._gaps.curve(tool)

    def observe_pause(self, program: str, request_id: str, turns: int, now_s: float) -> None:
        """A program's turn has called a tool, and nobody has said when it comes back; see `ReturnChance`."""
        self.returning.paused(program, request_id, turns, now_s, self._gaps.pooled())

    def return_share(self, turns: int, now_s: float) -> float:
        """The chance of a return after so many turns over that of programs in general, at most 1."""
        return self.returning.share(turns, now_s, self._gaps.pooled())

    def lease_s(self, tool: str | None, limit_s: float) -> float:
        """For how long the tier is to value KV staged after such a turn, seconds.

        Twice the time in which nine of ten programs return. Whoever stays away for longer has ended in
        most cases, without a word, and must not keep others' KV out of the tier.
        """
        return min(limit_s, max(MIN_LEASE_S, 2.0 * self.learnt(tool).quantile(LEASE_QUANTILE)))

    def mean_gap_s(self, tool: str | None) -> float:
        """How long programs stay away after such a turn in the mean."""
        return self.learnt(tool).mean_restricted(MEAN_GAP_LIMIT_S)

    @property
    def output_reuse(self) -> float:
        """Chance that a kept output token is hit."""
        return self._reuse.probability(_MODEL)

    @property
    def pin_break_probability(self) -> float:
        """Share of pins that pressure ends before the program returns."""
        return self._broken.share

    def bound(self, hint_ttl_s: float | None, override: TtlBound | None = None) -> TtlBound | None:
        """What the operator's override, and the settings or else the client, say about a pause's TTL."""
        asked_s = hint_ttl_s if self._fixed_ttl_s is None else self._fixed_ttl_s
        return joined(override, asked_s)

    def regret_s_per_block(self, pin: Pin, now_s: float, *, staged: bool) -> float:
        """Expected loss of ending a pin now, seconds a block: what a miss costs times its chance.

        The chance is that of a return within the time the pin would still last, given how long the
        program is away already: ``1 - S(waited + left) / S(waited)``.

        Args:
            pin: Its ``data`` is a `PinnedTurn`.
            now_s: Monotonic time.
            staged: Whether the CPU tier has confirmed the pin's staged prefix.
        """
        data = pin.data
        if not isinstance(data, PinnedTurn):
            return 0.0
        curve, since_s, share = self.away(data.tool), pin.pinned_s, data.return_share
        if data.announced is not None:
            curve, since_s, share = data.announced, data.announced_s, 1.0
        waited_s = max(0.0, now_s - since_s)
        away = 1.0 - share * (1.0 - curve.survival(waited_s))
        if away <= 0.0:
            return 0.0
        until_s = max(waited_s, pin.deadline_s - since_s)
        still_away = 1.0 - share * (1.0 - curve.survival(until_s))
        miss_s = data.miss_staged_s if staged else data.miss_unstaged_s
        return (1.0 - still_away / away) * miss_s / max(1, len(pin.block_ids))


class OutputReuse:
    """How often the output part of a kept turn is really hit, per model.

    The next prompt contains the output as rendered by the client's template; a stripped thought or
    another JSON spacing changes the tokens and loses all of it. The estimate is the mean of a Beta
    posterior whose evidence decays, so that it follows a changed client; it starts at 0.75 from a
    Beta(1.5, 0.5) prior that does not decay: one hit or miss never settles it.
    """

    def __init__(self, *, decay: float = 0.98, max_models: int = 64) -> None:
        """Remember ``max_models`` models with an effective window of 1 / (1 - decay) turns.

        Raises:
            ValueError: ``decay`` is not within (0, 1).
        """
        if not 0.0 < decay < 1.0:
            msg = f"decay must be within (0, 1), not {decay}"
            raise ValueError(msg)
        self._decay = decay
        self._max_models = max_models
        self._evidence: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def observe(self, model: str, hit_tokens: int, output_tokens: int) -> None:
        """Add a return: ``hit_tokens`` of the ``output_tokens`` reusable output tokens were hit.

        Only returns whose GPU or tier copy still existed tell anything; leave out the others.
        Turns without a reusable output token are ignored.
        """
        if output_tokens <= 0:
            return
        share = min(max(hit_tokens / output_tokens, 0.0), 1.0)
        hits, misses = self._evidence.get(model, (0.0, 0.0))
        self._evidence[model] = (
            self._decay * hits + share,
            self._decay * misses + 1.0 - share,
        )
        self._evidence.move_to_end(model)
        if len(self._evidence) > self._max_models:
            self._evidence.popitem(last=False)

    def probability(self, model: str) -> float:
        """Return the probability that a kept output token is hit, for a model never seen 0.75."""
        hits, misses = self._evidence.get(model, (0.0, 0.0))
        return (hits + 1.5) / (hits + misses + 2.0)
