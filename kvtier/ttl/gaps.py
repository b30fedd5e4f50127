"""How long programs stay away: survival curves of the gaps between a program's turns.

A gap is the time from the end of a turn to the arrival of the program's next one, as the server
sees it: tool, client, network and human approval. Programs that have not come back yet are
right-censored observations, so the curves are Kaplan-Meier estimates (Kaplan and Meier, JASA 53,
1958); leaving them out would make every tool look faster than it is. A few pseudo-observations from
a more general curve are blended in: a tool's curve borrows from all tools, and all tools borrow
from a log-normal prior. Beyond the last event a curve falls like a Pareto tail.

Time is a parameter everywhere; nothing here reads a clock.
"""

import math
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

MIN_GAP_S = 1e-3
"""Gaps are recorded as at least this long: a millisecond is below what a server can tell apart."""
TAIL_ALPHA = 1.0
"""Pareto exponent after the last event. Recorded Claude Code sessions have p90 = 68 s and
p99 = 610 s after a tool call, which is ln(10) / ln(610 / 68) = 1.05."""
TOOL_PRIOR_MEDIAN_S = 2.0
TOOL_PRIOR_P90_S = 30.0
"""Cold-start gap after a tool call: log-normal with this median and 90 % quantile. It lies between
short SWE-style shell tools (median 2.5 s, p90 10.5 s) and Claude Code (9 s and 68 s)."""
TURN_PRIOR_MEDIAN_S = 210.0
TURN_PRIOR_P90_S = 3600.0
"""Cold-start gap after a turn that called no tool: a human answers. The median is Claude Code's."""
PRIOR_SAMPLES = 16
"""Pseudo-observations (quantiles) that represent a prior curve; they share its weight."""
# Survivals are products of fractions: differences below this are rounding.
_ROUNDING = 1e-12
# Beyond, exp is no number any more.
_MOST_EXPONENT = 700.0
# Survival levels at which a long curve keeps a step.
_LEVELS = np.concatenate([np.linspace(1.0, 0.1, 48), np.geomspace(0.08, 1e-4, 20)])


@dataclass(frozen=True, slots=True)
class SurvivalCurve:
    """Probability that a program is still away after t seconds.

    A right-continuous step function: 1 before ``times[0]``, ``survivals[i]`` from ``times[i]`` on.
    From the last event (or from 0 without events) on, the tail
    ``S_last * ((t_last + age_s) / (t + age_s)) ** tail_alpha``.

    Attributes:
        times: ascending event times in seconds, > 0.
        survivals: non-increasing values in [0, 1], one per time.
        tail_alpha: exponent of the tail; 0 means that those who are left never return.
        age_s: time already waited when the curve is a residual one, else 0.
    """

    times: tuple[float, ...]
    survivals: tuple[float, ...]
    tail_alpha: float = TAIL_ALPHA
    age_s: float = 0.0

    def __post_init__(self) -> None:
        """Check the shape only: curves are built on the decision path."""
        if len(self.times) != len(self.survivals):
            msg = f"{len(self.times)} times for {len(self.survivals)} survival values"
            raise ValueError(msg)

    @property
    def last_s(self) -> float:
        """Time of the last event in seconds; 0 without events."""
        return self.times[-1] if self.times else 0.0

    @property
    def last_survival(self) -> float:
        """Survival right after the last event; 1 without events."""
        return self.survivals[-1] if self.survivals else 1.0

    def survival(self, t_s: float) -> float:
        """Return P(gap > t_s)."""
        if t_s >= self.last_s:
            return self.last_survival * self._tail_factor(t_s)
        i = bisect_right(self.times, t_s)
        return self.survivals[i - 1] if i else 1.0

    def at(self, times_s: Floats) -> Floats:
        """Return P(gap > t_s) for each of these times."""
        steps = np.array([1.0, *self.survivals])
        survivals: Floats = steps[np.searchsorted(np.array(self.times), times_s, side="right")]
        start_s = self.last_s + self.age_s
        beyond = times_s > self.last_s
        if start_s > 0.0 and beyond.any():
            survivals[beyond] *= (start_s / (times_s[beyond] + self.age_s)) ** self.tail_alpha
        return survivals

    def hazard(self, t_s: float) -> float:
        """Return the rate of return at ``t_s`` given no return before, in 1/s.

        Smoothed: events within a factor of 1.5 around ``t_s`` over the time at risk there (the
        integral of the survival by Simpson's rule). 0 where the curve has reached 0.
        """
        center_s = max(t_s, MIN_GAP_S)
        low_s, high_s = center_s / 1.5, center_s * 1.5
        low, high = self.survival(low_s), self.survival(high_s)
        if low <= 0.0:
            return 0.0
        at_risk = (low + 4.0 * self.survival(center_s) + high) / 6.0
        return (low - high) / ((high_s - low_s) * at_risk)

    def residual(self, waited_s: float) -> "SurvivalCurve":
        """Return the curve of the time still to wait, given ``waited_s`` without a return.

        Where the curve is 0 already (every observed gap was shorter) only the tail is left.
        """
        if waited_s <= 0.0 or self.last_s + self.age_s <= 0.0:
            return self
        at_risk = self.survival(waited_s)
        first = bisect_right(self.times, waited_s)
        if at_risk <= 0.0 or first == len(self.times):
            return SurvivalCurve((), (), self.tail_alpha, self.age_s + waited_s)
        return SurvivalCurve(
            tuple(time - waited_s for time in self.times[first:]),
            tuple(value / at_risk for value in self.survivals[first:]),
            self.tail_alpha,
            self.age_s + waited_s,
        )

    def thinned(self, chance: float) -> "SurvivalCurve":
        """Return the curve where only this share of those who would return does; 1 changes nothing.

        The hazard right after the last event is that of the mixture; further on the tail falls too fast where many are left.
        """
        if chance >= 1.0:
            return self
        last = 1.0 - chance * (1.0 - self.last_survival)
        return SurvivalCurve(
            self.times,
            tuple(1.0 - chance * (1.0 - value) for value in self.survivals),
            self.tail_alpha * chance * self.last_survival / last,
            self.age_s,
        )

    def quantile(self, q: float) -> float:
        """Return the shortest time by which a share ``q`` has returned; inf if that never happens.

        Raises:
            ValueError: ``q`` is not within [0, 1].
        """
        if not 0.0 <= q <= 1.0:
            msg = f"q must be within [0, 1], not {q}"
            raise ValueError(msg)
        left = 1.0 - q
        if left >= 1.0:
            return 0.0
        for time, value in zip(self.times, self.survivals, strict=True):
            if value <= left + _ROUNDING:
                return time
        start_s = self.last_s + self.age_s
        if left <= 0.0 or self.tail_alpha <= 0.0 or start_s <= 0.0:
            return math.inf
        exponent = math.log(self.last_survival / left) / self.tail_alpha
        return start_s * math.exp(exponent) - self.age_s if exponent < _MOST_EXPONENT else math.inf

    def mean_restricted(self, horizon_s: float) -> float:
        """Return the mean of min(gap, horizon_s), seconds: the integral of S up to the horizon."""
        total, value, since_s = 0.0, 1.0, 0.0
        for time, next_value in zip(self.times, self.survivals, strict=True):
            if time >= horizon_s:
                return total + value * max(horizon_s - since_s, 0.0)
            total += value * (time - since_s)
            value, since_s = next_value, time
        return total + self.tail_integral(horizon_s)

    def tail_integral(self, t_s: float) -> float:
        """Return the integral of S from the last event to ``t_s``, seconds (0 if it is before)."""
        width_s = t_s - self.last_s
        start_s = self.last_s + self.age_s
        if width_s <= 0.0 or self.last_survival <= 0.0:
            return 0.0
        if start_s <= 0.0 or self.tail_alpha <= 0.0:
            return self.last_survival * width_s
        if self.tail_alpha == 1.0:
            return self.last_survival * start_s * math.log1p(width_s / start_s)
        power = 1.0 - self.tail_alpha
        growth = math.expm1(power * math.log1p(width_s / start_s))
        return self.last_survival * start_s * growth / power

    def _tail_factor(self, t_s: float) -> float:
        start_s = self.last_s + self.age_s
        if start_s <= 0.0 or t_s <= self.last_s:
            return 1.0
        return float((start_s / (t_s + self.age_s)) ** self.tail_alpha)


def lognormal_curve(median_s: float, p90_s: float, n_steps: int = 64) -> SurvivalCurve:
    """Return a log-normal gap distribution as a curve of equal steps at the midpoints.

    The last of the ``n_steps`` shares of probability is left to the tail.

    Raises:
        ValueError: not ``0 < median_s < p90_s``.
    """
    if not 0.0 < median_s < p90_s:
        msg = f"0 < median_s < p90_s needed, not {median_s} and {p90_s}"
        raise ValueError(msg)
    normal = NormalDist()
    sigma = math.log(p90_s / median_s) / normal.inv_cdf(0.9)
    steps = range(n_steps - 1)
    times = tuple(median_s * math.exp(sigma * normal.inv_cdf((i + 0.5) / n_steps)) for i in steps)
    return SurvivalCurve(times, tuple(1.0 - (i + 1) / n_steps for i in steps))


TOOL_PRIOR = lognormal_curve(TOOL_PRIOR_MEDIAN_S, TOOL_PRIOR_P90_S)
"""Gaps after a tool call before any was seen."""
TURN_PRIOR = lognormal_curve(TURN_PRIOR_MEDIAN_S, TURN_PRIOR_P90_S)
"""Gaps after a turn without a tool call before any was seen."""


def kaplan_meier(
    durations: Sequence[float],
    observed: Sequence[bool],
    *,
    prior: SurvivalCurve | None = None,
    prior_weight: float = 4.0,
) -> SurvivalCurve:
    """Estimate a survival curve from right-censored gaps.

    ``S(t) = prod over event times t_i <= t of (1 - d_i / n_i)`` with d_i events at t_i and n_i
    observations (returned later or censored) still at risk. An observation censored at an event's
    time counts as at risk there. The curve is thinned to at most 68 steps by leaving out small
    ones, which can only overestimate the survival, by less than 0.02.

    Args:
        durations: seconds, one per gap; shorter than :data:`MIN_GAP_S` counts as that long.
        observed: True if the program returned, False if it was still away after that time.
        prior: curve blended in as :data:`PRIOR_SAMPLES` pseudo-observations at its quantiles; the
            last one never returns, so that the estimate cannot reach 0.
        prior_weight: observations that the prior is worth altogether.

    Raises:
        ValueError: lengths differ, or a duration is negative or NaN.
    """
    if len(durations) != len(observed):
        msg = f"{len(durations)} durations for {len(observed)} flags"
        raise ValueError(msg)
    times = np.asarray(durations, dtype=np.float64)
    events = np.asarray(observed, dtype=np.bool_)
    if times.size and not bool(np.all(times >= 0.0)):
        msg = "durations must be >= 0"
        raise ValueError(msg)
    times = np.maximum(times, MIN_GAP_S)
    # A gap of infinity is a program that never came back: censored, at risk everywhere.
    events &= np.isfinite(times)
    weights = np.ones_like(times)
    if prior is not None and prior_weight > 0.0:
        pseudo = [prior.quantile((i + 0.5) / PRIOR_SAMPLES) for i in range(PRIOR_SAMPLES - 1)]
        times = np.concatenate([times, pseudo, [math.inf]])
        events = np.concatenate([events, np.isfinite(pseudo), [False]])
        extra = np.full(PRIOR_SAMPLES, prior_weight / PRIOR_SAMPLES)
        weights = np.concatenate([weights, extra])
    order = np.argsort(times, kind="stable")
    times, events, weights = times[order], events[order], weights[order]
    at_risk_from = np.cumsum(weights[::-1])[::-1]
    event_times, first = np.unique(times[events], return_index=True)
    if not event_times.size:
        return SurvivalCurve((), ())
    deaths = np.add.reduceat(weights[events], first)
    at_risk = at_risk_from[np.searchsorted(times, event_times)]
    survivals = np.cumprod(np.maximum(1.0 - deaths / at_risk, 0.0))
    survivals[survivals < _ROUNDING] = 0.0
    if event_times.size > _LEVELS.size:
        reached = np.searchsorted(-survivals, -_LEVELS)
        kept = np.unique(np.append(reached[reached < survivals.size], survivals.size - 1))
        event_times, survivals = event_times[kept], survivals[kept]
    return SurvivalCurve(tuple(event_times.tolist()), tuple(survivals.tolist()))


class GapBook:
    """Observed gaps per tool and over all tools, and the survival curves learnt from them.

    ``None`` as a tool stands for turns that ended without a tool call. Those gaps are a human's and
    stay out of the pool of all tools. A curve is

    * a tool's own one, with the pool's as a prior worth 4 observations, once the tool has
      ``min_tool_events`` returns;
    * else the pool's, with :data:`TOOL_PRIOR` as a prior worth 8 observations;
    * for ``None`` that of such turns, with :data:`TURN_PRIOR` as a prior worth 8.

    Curves are rebuilt on demand, at the earliest after an eighth more records than the last time
    (at most 32), so the mean cost of a record stays bounded. Windows forget the oldest gaps and the
    least recently recorded tool makes room, so names made up by clients cannot grow the memory.
    """

    def __init__(
        self,
        *,
        tool_window: int = 256,
        pool_window: int = 1024,
        max_tools: int = 256,
        min_tool_events: int = 16,
    ) -> None:
        """Set the bounds: gaps kept per tool and over all, tools kept, returns a tool needs."""
        self._tool_window = tool_window
        self._max_tools = max_tools
        self._min_tool_events = min_tool_events
        self._tools: OrderedDict[str, _Window] = OrderedDict()
        self._pool = _Window(deque(maxlen=pool_window))
        self._turns = _Window(deque(maxlen=pool_window))

    def record(self, tool: str | None, gap_s: float) -> None:
        """Add a finished gap of ``gap_s`` seconds.

        Raises:
            ValueError: ``gap_s`` is negative or NaN.
        """
        self._add(tool, gap_s, returned=True)

    def record_censored(self, tool: str | None, waited_s: float) -> None:
        """Add a program that was given up after ``waited_s`` seconds without a return.

        Raises:
            ValueError: ``waited_s`` is negative or NaN.
        """
        self._add(tool, waited_s, returned=False)

    def curve(self, tool: str | None) -> SurvivalCurve:
        """Return the best known curve for a tool; never raises, whatever the name."""
        if tool is None:
            return self._turns.curve(TURN_PRIOR, 8.0)
        window = self._tools.get(_key(tool))
        if window is None or window.n_events < self._min_tool_events:
            return self.pooled()
        return window.curve(self.pooled(), 4.0)

    def pooled(self) -> SurvivalCurve:
        """Return the curve of gaps after all tools together."""
        return self._pool.curve(TOOL_PRIOR, 8.0)

    @property
    def n_tools(self) -> int:
        """Number of tools that have a window."""
        return len(self._tools)

    def _add(self, tool: str | None, seconds: float, *, returned: bool) -> None:
        if not seconds >= 0.0:
            msg = f"a gap must be >= 0 s, not {seconds}"
            raise ValueError(msg)
        if tool is None:
            self._turns.add(seconds, returned=returned)
            return
        self._pool.add(seconds, returned=returned)
        key = _key(tool)
        window = self._tools.get(key)
        if window is None:
            if len(self._tools) >= self._max_tools:
                self._tools.popitem(last=False)
            window = self._tools[key] = _Window(deque(maxlen=self._tool_window))
        self._tools.move_to_end(key)
        window.add(seconds, returned=returned)


def _key(tool: str) -> str:
    """Bound the length of a name that a client made up."""
    return tool[:128]


@dataclass(slots=True)
class _Window:
    """The last gaps of one kind and the curve built from them."""

    gaps: deque[tuple[float, bool]]
    n_events: int = 0
    _new: int = 0
    _curve: SurvivalCurve | None = field(default=None)

    def add(self, seconds: float, *, returned: bool) -> None:
        if len(self.gaps) == self.gaps.maxlen:
            self.n_events -= self.gaps[0][1]
        self.gaps.append((seconds, returned))
        self.n_events += returned
        self._new += 1

    def curve(self, prior: SurvivalCurve, prior_weight: float) -> SurvivalCurve:
        stale = self._new >= max(1, min(32, len(self.gaps) // 8))
        if self._curve is None or stale:
            self._new = 0
            self._curve = kaplan_meier(
                [seconds for seconds, _ in self.gaps],
                [returned for _, returned in self.gaps],
                prior=prior,
                prior_weight=prior_weight,
            )
        return self._curve
