"""The gate between a worker and this process judges by an interval, and says what it leaves open."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vlm_latency.errors import MeasurementError
from vlm_latency.workers.gate import gate, sentence

ROWS = [{"request_id": str(n)} for n in range(3)]
HOW: dict[str, Any] = {"pairs": 40, "seconds": 60.0, "half_width": 0.01}


class Machine:
    """Takes 20 ms, or a factor more, and some noise."""

    def __init__(self, factor: float, noise: float, seed: int) -> None:
        self.factor, self.noise = factor, noise
        self.generator = np.random.default_rng(seed)
        self.asked: list[str] = []

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(row["request_id"])
        drawn = float(np.exp(self.generator.normal(0, self.noise)))
        return {"status": "ok", "error": None, "T_total": 20 * self.factor * drawn}


def test_equal_ones_are_within_one_percent_on_the_same_requests() -> None:
    here, there = Machine(1, 0.01, 1), Machine(1, 0.01, 2)
    found = gate(here, there, ROWS, **HOW)
    assert found.verdict == "SAME"
    assert here.asked == there.asked
    assert len(here.asked) == found.n_pairs >= 40
    assert sentence(found, True).endswith(": within 1 %")
    assert "on another device" in sentence(found, False)


def test_a_worker_that_is_slower_is_said_to_change_what_is_measured() -> None:
    found = gate(Machine(1, 0.01, 1), Machine(1.03, 0.01, 2), ROWS, **HOW)
    assert found.verdict == "SLOWER"
    assert "workers change what is measured here" in sentence(found, True)


def test_time_that_is_up_leaves_it_open() -> None:
    found = gate(Machine(1, 0.2, 1), Machine(1, 0.2, 2), ROWS, **{**HOW, "seconds": 0.0})
    assert found.verdict == "UNDECIDED"
    assert "cannot be said with so many pairs" in sentence(found, True)


def test_noise_asks_for_more_pairs_than_the_least() -> None:
    found = gate(Machine(1, 0.05, 1), Machine(1, 0.05, 2), ROWS, **HOW)
    assert found.n_pairs > 40
    assert found.ratio.low is not None
    assert found.ratio.high is not None
    assert found.ratio.high - found.ratio.low <= 0.02


def test_a_run_that_fails_is_no_pair() -> None:
    def broken(row: dict[str, Any]) -> dict[str, Any]:
        return {"status": "failed", "error": "OutOfMemoryError", "T_total": None}

    with pytest.raises(MeasurementError, match="beside a worker: OutOfMemoryError"):
        gate(Machine(1, 0.1, 1), broken, ROWS, **HOW)
