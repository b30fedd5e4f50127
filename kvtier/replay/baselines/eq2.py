"""The quantities of Continuum's utility model (arXiv 2511.02230, sections 4.1 and 4.2).

Equation 2 chooses the time to live ``tau`` of a finished turn's KV, all in seconds::

    tau* = argmax_tau  P(tau, f) * B - tau        B = T * eta + PrefillReload(r)

``P(tau, f)`` is the share of recorded gaps of tool ``f`` that are no longer than ``tau``, ``T`` the mean queueing
delay of returning requests whose KV had been evicted, and ``eta = -Corr(k, N - k)`` over turns served and turns
left: 1 where programs are equally long, 0 where the past tells nothing. What a context weighs cancels.

The paper leaves open, and here is: ``T`` is a mean of the last 100 samples, one each from arrival until blocks are
given; ``eta`` counts each k = 1..N of a program that has ended; of equal values the smallest ``tau`` is taken.
"""

from __future__ import annotations

import math
from array import array
from bisect import insort
from collections import deque
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

QUEUEING_WINDOW: Final = 100
ENOUGH_GAPS: Final = 100
"""The paper's K: with no more gaps than this a distribution is not used."""


def best_ttl_s(gaps_s: Sequence[float], benefit_s: float) -> float:
    """Equation 2 over an empirical distribution.

    Args:
        gaps_s: Recorded gaps, sorted, at least one.
        benefit_s: B.

    Returns:
        One of the gaps, or 0. Nothing in between can be better: P rises at the gaps only.
    """
    gaps = np.asarray(gaps_s, dtype=np.float64)
    ranks = np.arange(1, len(gaps) + 1)
    values = ranks / len(gaps) * benefit_s - gaps
    best = int(np.argmax(values))
    at_once = float(np.searchsorted(gaps, 0.0, side="right")) / len(gaps) * benefit_s
    return float(gaps[best]) if values[best] > at_once else 0.0


def cold_ttl_s(benefit_s: float) -> float:
    """Equation 2 for gaps that are exponential with mean 1 s: the paper's choice until there are records.

    ``d/dtau (1 - e^-tau) B - tau = 0`` gives ``tau = ln B``.
    """
    return math.log(benefit_s) if benefit_s > 1 else 0.0


class Queueing:
    """T: the mean of the last samples; 0 without."""

    def __init__(self) -> None:
        self._delays_s: deque[float] = deque(maxlen=QUEUEING_WINDOW)

    def add(self, delay_s: float) -> None:
        """A request whose KV had been evicted waited so long."""
        self._delays_s.append(delay_s)

    @property
    def mean_s(self) -> float:
        """The mean."""
        return sum(self._delays_s) / len(self._delays_s) if self._delays_s else 0.0


class Memoryfulness:
    """eta: how well the turns that a program has had tell those to come."""

    def __init__(self) -> None:
        self._n = self._sum_k = self._sum_left = 0
        self._sum_kk = self._sum_left2 = self._sum_k_left = 0

    def add(self, n_turns: int) -> None:
        """A program has ended after so many turns."""
        for k in range(1, n_turns + 1):
            left = n_turns - k
            self._n += 1
            self._sum_k += k
            self._sum_left += left
            self._sum_kk += k * k
            self._sum_left2 += left * left
            self._sum_k_left += k * left

    @property
    def eta(self) -> float:
        """The negative correlation; 1, as for programs of one length, while it is not defined."""
        covariance = self._n * self._sum_k_left - self._sum_k * self._sum_left
        variances = (self._n * self._sum_kk - self._sum_k**2) * (
            self._n * self._sum_left2 - self._sum_left**2
        )
        return -covariance / math.sqrt(variances) if variances > 0 else 1.0


class Gaps:
    """S and S[f]: recorded gaps, of all tools and of each."""

    def __init__(self) -> None:
        self._all = array("d")
        self._by_tool: dict[str | None, array[float]] = {}

    def add(self, tool: str | None, gap_s: float) -> None:
        """A tool has taken so long, until the next request was there."""
        insort(self._all, gap_s)
        insort(self._by_tool.setdefault(tool, array("d")), gap_s)

    def known(self, tool: str | None) -> Sequence[float] | None:
        """The tool's gaps, sorted; those of all tools where it has too few, None where these are too few."""
        if len(self._all) <= ENOUGH_GAPS:
            return None
        own = self._by_tool.get(tool)
        return own if own is not None and len(own) > ENOUGH_GAPS else self._all
