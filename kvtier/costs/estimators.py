"""Online models of the speeds a decision depends on: prefill, queue and generation (`link_model` has the link).

Every model is a small frozen dataclass (safe to put into a state and to keep for an
explanation); every estimator owns a model, corrects it from measurements and hands out a new one.
The initial model comes from calibration, or from a formula before the first calibration.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from kvtier.costs.fitting import DECAY, DecayedFit, check_seconds


@dataclass(frozen=True, slots=True)
class PrefillModel:
    """Prefill time as a quadratic in cached and new tokens, the engine otherwise idle.

    ``seconds = base_s + per_token_s * new + per_pair_s * new * (cached + new / 2)``: the token-wise layers are
    linear in the new tokens, and causal attention has each new token look at all before it. So a prefill in steps takes
    what it takes at once, but for ``base_s``: no more could be told from steps, which are measured, about a prompt that
    takes many of them.

    Raises:
        ValueError: a coefficient is negative or not finite.
    """

    base_s: float
    per_token_s: float
    per_pair_s: float

    def __post_init__(self) -> None:
        """Check the coefficients."""
        for value in self.coefficients:
            if not (math.isfinite(value) and value >= 0):
                msg = f"prefill coefficients must be finite and >= 0: {self.coefficients}"
                raise ValueError(msg)

    @property
    def coefficients(self) -> tuple[float, float, float]:
        """The coefficients of (1, new, new * (cached + new / 2))."""
        return (self.base_s, self.per_token_s, self.per_pair_s)

    @classmethod
    def from_flops(
        cls, n_parameters: float, n_layers: int, attention_width: int, flops_per_s: float
    ) -> "PrefillModel":
        """Build the model from operation counts, for use before the first measurement.

        ``2 * parameters * new`` for the matrix products plus
        ``4 * layers * width * new * (cached + new / 2)`` for causal attention (QK^T and AV, two
        operations per multiply-add), over ``flops_per_s`` achieved.

        Args:
            n_parameters: parameters used per token (active ones of a mixture of experts).
            n_layers: attention layers.
            attention_width: query heads times head dimension.
            flops_per_s: achieved, not peak, operations per second.

        Raises:
            ValueError: ``flops_per_s`` is not positive.
        """
        if flops_per_s <= 0:
            msg = f"flops_per_s must be > 0, not {flops_per_s}"
            raise ValueError(msg)
        per_pair_s = 4.0 * n_layers * attention_width / flops_per_s
        return cls(0.0, 2.0 * n_parameters / flops_per_s, per_pair_s)

    def seconds(self, cached_tokens: int, new_tokens: int) -> float:
        """Return the seconds to prefill ``new_tokens`` after ``cached_tokens``; 0 for no token."""
        if new_tokens <= 0:
            return 0.0
        per_token_s = self.per_token_s + self.per_pair_s * (cached_tokens + new_tokens / 2)
        return self.base_s + per_token_s * new_tokens


class PrefillEstimator:
    """Corrects the prefill model from steps whose time was mostly one request's prefill."""

    def __init__(self, initial: PrefillModel) -> None:
        """Start from ``initial`` (a calibration profile or :meth:`PrefillModel.from_flops`).

        Raises:
            ValueError: all coefficients of ``initial`` are zero.
        """
        if not any(initial.coefficients):
            msg = "the initial prefill model must not be all zero"
            raise ValueError(msg)
        self._fit = DecayedFit(initial.coefficients)
        self._model = initial

    @classmethod
    def from_samples(
        cls, shape: PrefillModel, samples: Sequence[tuple[int, int, float]]
    ) -> "PrefillEstimator":
        """Start from measured prefills, ``(cached_tokens, new_tokens, seconds)``, at least one.

        ``shape`` tells what they do not: it is brought to their speed by the median first. Else measurements
        that a guess is far from would pass for outliers, as those of a model on a CPU for a GPU's guess.

        Raises:
            ValueError: as :meth:`observe`.
        """
        ratios = (s / max(shape.seconds(cached, new), 1e-9) for cached, new, s in samples)
        scale = max(statistics.median(ratios), 1e-9)
        estimator = cls(PrefillModel(*(scale * value for value in shape.coefficients)))
        for cached_tokens, new_tokens, seconds in samples:
            estimator.observe(cached_tokens, new_tokens, seconds)
        return estimator

    def observe(self, cached_tokens: int, new_tokens: int, seconds: float) -> None:
        """Add one measured prefill of ``new_tokens`` after ``cached_tokens``.

        Raises:
            ValueError: ``new_tokens`` <= 0, ``cached_tokens`` < 0, ``seconds`` negative or not
                finite.
        """
        if new_tokens <= 0 or cached_tokens < 0:
            msg = f"new_tokens must be > 0 and cached_tokens >= 0: {new_tokens}, {cached_tokens}"
            raise ValueError(msg)
        new, cached = float(new_tokens), float(cached_tokens)
        before = self._fit.coefficients
        self._fit.observe((1.0, new, new * (cached + new / 2)), seconds)
        if self._fit.coefficients is not before:
            self._model = PrefillModel(*self._fit.coefficients)

    def model(self) -> PrefillModel:
        """Return the current model."""
        return self._model


class QueueEstimator:
    """Queue delay by Little's law: token backlog over measured throughput, times a correction.

    The throughput is the decayed least-squares slope through the origin of tokens over step time,
    ``sum(n * n) / sum(n * t)``: it weights a step by its tokens, because the steps that work off a
    backlog are full prefill steps, not decode steps of a few tokens.
    """

    def __init__(self, initial_tokens_per_s: float = 2000.0, window_s: float = 30.0) -> None:
        """Start from a guessed throughput, forgotten over ``window_s`` of busy time.

        Raises:
            ValueError: an argument is not positive.
        """
        if initial_tokens_per_s <= 0 or window_s <= 0:
            msg = "initial_tokens_per_s and window_s must be > 0"
            raise ValueError(msg)
        self._window_s = window_s
        # The guess weighs as much as one step of one token: any real step outweighs it.
        self._token_squares = 1.0
        self._token_seconds = 1.0 / initial_tokens_per_s
        self._log_correction = 0.0

    @property
    def throughput_tokens_per_s(self) -> float:
        """Tokens per second that full steps achieve."""
        return self._token_squares / self._token_seconds

    @property
    def correction(self) -> float:
        """Running ratio of actual to predicted waits, within 1/8 ... 8."""
        return math.exp(self._log_correction)

    def observe_step(self, scheduled_tokens: int, seconds: float) -> None:
        """Add one engine step; steps without tokens say nothing about throughput and are skipped.

        Raises:
            ValueError: ``seconds`` negative or not finite.
        """
        check_seconds(seconds)
        if scheduled_tokens <= 0 or seconds == 0.0:
            return
        # A stalled step (paged out, stopped in a debugger) may not erase the whole history.
        seconds = min(seconds, 0.2 * self._window_s)
        keep = math.exp(-seconds / self._window_s)
        self._token_squares = keep * self._token_squares + scheduled_tokens**2
        self._token_seconds = keep * self._token_seconds + scheduled_tokens * seconds

    def observe_wait(self, predicted_s: float, actual_s: float) -> None:
        """Compare a wait with what :meth:`delay_s` had predicted for it.

        Args:
            predicted_s: the value :meth:`delay_s` returned when the request arrived.
            actual_s: seconds from its arrival until it was first scheduled.

        Raises:
            ValueError: an argument negative or not finite.
        """
        check_seconds(predicted_s)
        check_seconds(actual_s)
        # 10 ms on both sides: waits of a step or less are noise. A tenth of the log ratio, and at
        # most a factor of 4 a sample, so that one odd wait moves the correction by 15 % at most.
        log_ratio = math.log((actual_s + 0.01) / (predicted_s + 0.01))
        step = 0.1 * min(max(log_ratio, -math.log(4.0)), math.log(4.0))
        bound = math.log(8.0)
        self._log_correction = min(max(self._log_correction + step, -bound), bound)

    def delay_s(self, backlog_tokens: int) -> float:
        """Return the seconds until a backlog of ``backlog_tokens`` is worked off."""
        return max(backlog_tokens, 0) / self.throughput_tokens_per_s * self.correction


class GenerationEstimator:
    """What one turn's output costs the engine: its tokens times their share of a decode step."""

    def __init__(self) -> None:
        """Nothing is known; :meth:`turn_s` is 0 until a step and a turn were seen."""
        self._token_s = _DecayedMean()
        self._output_tokens = _DecayedMean()

    def observe_step(self, tokens: int, seconds: float) -> None:
        """Add one step that only decoded.

        Raises:
            ValueError: ``tokens`` <= 0, or ``seconds`` negative or not finite.
        """
        check_seconds(seconds)
        if tokens <= 0:
            msg = f"tokens must be > 0, not {tokens}"
            raise ValueError(msg)
        self._token_s.add(seconds / tokens)

    def observe_turn(self, output_tokens: int) -> None:
        """Add one finished turn."""
        self._output_tokens.add(float(output_tokens))

    def turn_s(self) -> float:
        """Return the seconds of the engine's time for a turn's output."""
        return self._token_s.value * self._output_tokens.value


class Thinning:
    """Takes the first samples, and then every so-manieth: a model that is good needs fewer."""

    def __init__(self, every: int, first: int = 64) -> None:
        """Take ``first`` samples, then one in ``every``."""
        self._every = every
        self._left = first
        self._skipped = 0

    def takes(self) -> bool:
        """Whether to take the next sample."""
        if self._left:
            self._left -= 1
            return True
        self._skipped += 1
        if self._skipped < self._every:
            return False
        self._skipped = 0
        return True


class ShareEstimator:
    """How often something happens: a decayed share that starts at a guess."""

    def __init__(self, guess: float, guess_weight: float = 10.0) -> None:
        """``guess`` counts like ``guess_weight`` samples, and fades as they do."""
        self._happened = guess * guess_weight
        self._weight = guess_weight

    @property
    def share(self) -> float:
        """The share, 0 to 1."""
        return self._happened / self._weight

    def observe(self, *, happened: bool) -> None:
        """Add one sample."""
        self._happened = DECAY * self._happened + happened
        self._weight = DECAY * self._weight + 1.0


class _DecayedMean:
    """A mean in which each sample weighs DECAY of the one after it."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._weight = 0.0

    @property
    def value(self) -> float:
        return self._sum / self._weight if self._weight else 0.0

    def add(self, sample: float) -> None:
        self._sum = DECAY * self._sum + sample
        self._weight = DECAY * self._weight + 1.0
