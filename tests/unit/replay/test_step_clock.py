"""Step times by measurement: the fit, and profiles of `kvtier calibrate` in a GPU's place."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import pytest

from kvtier.replay.machine import Scheduled, step_s
from kvtier.replay.machines import presets
from kvtier.replay.step_clock import StepClock, fit

if TYPE_CHECKING:
    from pathlib import Path

TRUE = StepClock(0.02, 4e-4, 1e-7, 3e-3)


def steps(rnd: random.Random, n: int, noise: float = 0.0) -> list[tuple[list[Scheduled], float]]:
    """Mixed steps: decodes, and now and then a prefill beside them."""
    made = []
    for _ in range(n):
        parts = [Scheduled(rnd.randint(10, 4000), 1) for _ in range(rnd.randint(0, 6))]
        if not parts or rnd.random() < 0.3:
            parts.append(Scheduled(rnd.randint(0, 3000), rnd.randint(30, 2000)))
        made.append((parts, TRUE.step_s(parts) * rnd.uniform(1 - noise, 1 + noise)))
    return made


def test_the_fit_finds_the_clock_that_made_the_steps() -> None:
    found = fit(steps(random.Random(1), 300))
    for name in TRUE.__slots__:
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=1e-6)


def test_noise_does_not_change_the_sum() -> None:
    seen, others = steps(random.Random(2), 500, noise=0.3), steps(random.Random(3), 500)
    found = fit(seen)
    total_s = sum(taken for _, taken in others)
    assert sum(found.step_s(parts) for parts, _ in others) == pytest.approx(total_s, rel=0.03)


def test_no_term_is_negative() -> None:
    # Longer contexts that take less time: the terms of attention stay out.
    samples = [([Scheduled(cached, 10)], 1.0 - cached / 1e4) for cached in range(0, 5000, 500)]
    found = fit(samples)
    assert min(found.base_s, found.per_token_s, found.per_pair_s, found.per_request_s) >= 0
    with pytest.raises(ValueError, match="at least one measured step"):
        fit([])


def profile(path: Path, **changes: Any) -> Path:
    prefill = [
        {"cached_tokens": c, "new_tokens": n, "seconds": 0.05 + 1e-3 * n + 1e-7 * n * (c + n / 2)}
        for c in (0, 512, 2048)
        for n in (64, 128, 512, 1024)
    ]
    values = {
        "cpu": "some cores",
        "gpu": "",
        "measured_at": "2026-01-01T00:00:00+00:00",
        "load": {"latency_s": 1e-4, "points": [[4096, 1e9], [65536, 2e9]]},
        "prefill": prefill,
    }
    path.write_text(json.dumps(values | changes))
    return path


def test_a_profile_is_a_gpu(tmp_path: Path) -> None:
    path = profile(tmp_path / "profile.json")
    made = presets.machine(model="smollm2-135m", gpu=str(path), gpu_kv_gb=1.0)
    assert made.link_bytes_per_s == 2e9
    assert made.gpu.name == presets.gpu(str(path)).name == "some cores"
    assert step_s(made, [Scheduled(100, 200)]) == pytest.approx(0.25 + 1e-7 * 200 * 200, rel=1e-4)
    with pytest.raises(ValueError, match="gpu_kv_gb"):
        presets.machine(model="smollm2-135m", gpu=str(path))


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"prefill": []}, "no prefill times"), ({"load": None}, "accepted is a profile")],
)
def test_what_is_no_profile_is_told(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    path = profile(tmp_path / "profile.json", **changes)
    with pytest.raises(ValueError, match=told):
        presets.gpu(str(path))
