"""What a replay is asked for: workload, machine and limits, checked before anything slow begins."""

from __future__ import annotations

import contextlib
import json
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from kvtier.config import ConfigError, Settings
from kvtier.config_sources import EXTRA_PREFIX
from kvtier.replay.workload import Limits

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from kvtier.replay.machine import Machine
    from kvtier.replay.workload import Program

OWN_POLICY: Final = "kvtier"
"""What settings are for."""
_GIVEN_BY_REPLAY: Final = ("chunk_tokens", "dram_gb", "lmcache_url", "tier")
ARRIVALS: Final = ("poisson", "recorded", "fixed")


class OptionError(ValueError):
    """An option has a value that makes no sense; the message names the value and what is accepted.

    Attributes:
        option: As on the command line.
    """

    def __init__(self, option: str, message: str) -> None:
        # Both are arguments, so that it can come from another process.
        super().__init__(option, message)
        self.option = option

    def __str__(self) -> str:
        return str(self.args[1])


@dataclass(frozen=True, slots=True)
class _Number:
    """What a numeric option accepts."""

    whole: bool = False
    least: float = 0.0
    above: bool = False

    @property
    def accepted(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        return f"{kind} {'above' if self.above else 'from'} {self.least:g}"

    def holds(self, value: float) -> bool:
        right = self.least < value if self.above else self.least <= value
        return right and value < math.inf and (not self.whole or value == int(value))


_COUNT = _Number(whole=True, least=1)
_POSITIVE = _Number(above=True)
NUMBERS: Final[Mapping[str, _Number]] = {
    "rate": _POSITIVE,
    "concurrency": _COUNT,
    "programs": _COUNT,
    "dram_gb": _Number(),
    "link_gbps": _POSITIVE,
    "gpu_kv_gb": _POSITIVE,
    "gpus": _COUNT,
    "time_scale": _POSITIVE,
    "max_turns": _COUNT,
    "max_input_tokens": _COUNT,
    "max_gap_s": _Number(),
    "seed": _Number(whole=True),
}
"""Numeric options: all can be swept."""


@dataclass(frozen=True, slots=True)
class Options:
    """A replay's options, by the names of the command line.

    Raises:
        OptionError: A number is out of its range, or options contradict each other.
    """

    workload: str
    model: str = "llama-3.1-8b"
    hardware: str = "h100"
    gpus: int = 1
    gpu_kv_gb: float | None = None
    link_gbps: float | None = None
    dram_gb: float = 200.0
    programs: int = 60
    arrivals: str = "poisson"
    rate: float = 0.2
    concurrency: int | None = None
    max_turns: int = 16
    max_input_tokens: int = 120_000
    max_gap_s: float = 120.0
    time_scale: float = 1.0
    seed: int = 0
    tokenizer: str | None = None
    skip_bad_records: bool = False

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        for name, number in NUMBERS.items():
            value = getattr(self, name)
            if value is not None and not number.holds(value):
                raise OptionError(flag(name), f"{value:g}: accepted is {number.accepted}")
        if self.arrivals not in ARRIVALS:
            accepted = ", ".join(ARRIVALS)
            raise OptionError("--arrivals", f"{self.arrivals!r}: accepted are {accepted}")
        if self.arrivals == "fixed" and self.concurrency is None:
            text = "fixed keeps a fixed number of programs running: say how many with --concurrency"
            raise OptionError("--arrivals", text)
        if self.arrivals != "fixed" and self.concurrency is not None:
            text = f"{self.concurrency}: accepted with --arrivals fixed only"
            raise OptionError("--concurrency", text)

    def machine(self) -> Machine:
        """The machine.

        Raises:
            OptionError: There is none like this.
        """
        from kvtier.replay.machines import presets  # noqa: PLC0415

        for option, find, name in (
            ("--model", presets.model, self.model),
            ("--hardware", presets.gpu, self.hardware),
        ):
            with _blame(option):
                find(name)
        with _blame("--gpu-kv-gb"):
            return presets.machine(
                model=self.model,
                gpu=self.hardware,
                n_gpus=self.gpus,
                gpu_kv_gb=self.gpu_kv_gb,
                link_gbps=self.link_gbps,
                dram_gb=self.dram_gb,
            )

    def load(self, skipped: list[str]) -> tuple[Program, ...]:
        """The workload, with its arrivals.

        Args:
            skipped: Gets why records were left out.

        Raises:
            OptionError: There is no such workload, a record is bad, or nothing is left within the limits.
        """
        from kvtier.replay.workloads import arrivals, source  # noqa: PLC0415

        limits = Limits(
            max_turns=self.max_turns,
            max_input_tokens=self.max_input_tokens,
            max_gap_s=self.max_gap_s,
            time_scale=self.time_scale,
        )
        with _blame("WORKLOAD"):
            found = source.load(
                self.workload,
                seed=self.seed,
                limits=limits,
                programs=self.programs,
                tokenizer=self.tokenizer,
                skipped=skipped if self.skip_bad_records else None,
            )
        if not found:
            text = f"{self.workload}: holds no program within --max-turns and --max-input-tokens"
            raise OptionError("WORKLOAD", text)
        if self.arrivals == "poisson":
            return tuple(arrivals.poisson(found, self.rate, self.seed))
        return tuple(arrivals.recorded(found) if self.arrivals == "recorded" else found)


def check_fits(machine: Machine, programs: Sequence[Program]) -> None:
    """Refuse a workload with a request that GPU memory cannot hold.

    Raises:
        OptionError: There is one.
    """
    longest = max(
        turn.prompt_tokens + turn.output_tokens for p in programs for turn in p.all_turns()
    )
    tokens = machine.gpu_blocks * machine.block_tokens
    if longest > tokens:
        text = (
            f"holds {tokens:,} tokens, but a request has {longest:,}: accepted is more memory, "
            "or less with --max-input-tokens"
        )
        raise OptionError("--gpu-kv-gb", text)


def read_settings(text: str, policies: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is given for kvtier; and all of its settings that are not the default, from wherever.

    Args:
        text: JSON, as vLLM's `kv_connector_extra_config`.
        policies: Those that are replayed.

    Raises:
        OptionError: It is no such object, or kvtier does not accept a setting.
    """
    try:
        extra = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OptionError("--settings", f"{text!r}: no JSON: {error}") from None
    accepted = 'accepted is an object such as {"kvtier.max_ttl_s": 60}'
    if not isinstance(extra, dict):
        raise OptionError("--settings", f"{text!r}: {accepted}")
    if extra and OWN_POLICY not in policies:
        text = f"{text}: accepted with kvtier among the policies, not with {', '.join(policies)}"
        raise OptionError("--settings", text)
    for key in extra:
        if key != "kvtier" and not key.startswith(EXTRA_PREFIX):
            raise OptionError("--settings", f"{key!r}: {accepted}")
    try:
        loaded, sources = Settings.load_with_sources(extra)
    except ConfigError as error:
        raise OptionError("--settings", str(error)) from None
    for name in _GIVEN_BY_REPLAY:
        if sources[name] == "connector extra config":
            text = f"kvtier.{name}: replay sets it; accepted is --dram-gb for the CPU tier's size"
            raise OptionError("--settings", text)
    values = loaded.model_dump(mode="json")
    return extra, {name: values[name] for name in values if sources[name] != "default"}


def check_writable(option: str, path: Path | None) -> None:
    """Say before the run, not after it, that a result cannot be written.

    Raises:
        OptionError: It cannot.
    """
    if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
        text = f"{path}: accepted is a file in a directory that exists and can be written"
        raise OptionError(option, text)


def flag(name: str) -> str:
    """An option as on the command line."""
    return "--" + name.replace("_", "-")


@contextlib.contextmanager
def _blame(option: str) -> Iterator[None]:
    """Name the option whose value something does not accept."""
    try:
        yield
    except ValueError as error:
        raise OptionError(option, str(error)) from error
