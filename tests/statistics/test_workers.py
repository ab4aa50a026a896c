"""A worker that is slower than the others is found and named; equal ones are not."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from vlm_latency.statistics.variance import variance_budget
from vlm_latency.statistics.workers import between_workers


def runs(seed: int, slower: float = 1.0, *, sweep: bool = False) -> pd.DataFrame:
    """240 runs on four workers, the third of which takes `slower` times as long."""
    generator = np.random.default_rng(seed)
    count = 240
    request = np.arange(count) % (12 if sweep else count)
    crops = 1 + request % 6
    text = np.full(count, 9) if sweep else generator.integers(5, 40, count)
    table = pd.DataFrame(
        {
            "request_id": request.astype(str),
            "num_crops": crops,
            "num_vision_tokens": 144 * crops,
            "num_language_tokens": text,
            "num_total_tokens": 144 * crops + text,
            "num_output_tokens": 4,
            "worker_index": 1 + generator.permutation(count) % 4,
            "worker_device": "card",
        }
    )
    ideal = 20 + 5 * crops + 0.1 * text
    table["T_total"] = ideal * np.exp(generator.normal(0, 0.02, count))
    table.loc[table["worker_index"] == 3, "T_total"] *= slower
    return table


@pytest.mark.parametrize("sweep", [False, True])
def test_a_slower_worker_is_named_with_its_interval(sweep: bool) -> None:
    found = between_workers(runs(1, 1.05, sweep=sweep))
    assert found is not None
    third = found.workers[2]
    assert 3 in found.differing
    assert third.ratio.within(1.03, 1.07)
    assert third.ratio.above(1.0)
    assert found.sentence.startswith("worker ")
    assert "worker 3 (card) takes 1.0" in found.sentence


@pytest.mark.parametrize("sweep", [False, True])
def test_equal_workers_are_rarely_called_different(sweep: bool) -> None:
    found = [between_workers(runs(seed, sweep=sweep)) for seed in range(100)]
    alarms = sum(bool(one and one.differing) for one in found)
    assert alarms <= 11  # 5 % of 100, and three standard deviations
    quiet = next(one for one in found if one and not one.differing)
    assert quiet.sentence.startswith("no worker of 4 differs: the largest ratio is that of worker")


def test_one_worker_and_runs_without_time_have_no_spread() -> None:
    table = runs(1)
    assert between_workers(table.assign(worker_index=1)) is None
    assert between_workers(table.assign(T_total=0.0)) is None


def test_workers_without_a_common_shape_are_not_judged() -> None:
    table = runs(1)
    apart = table.assign(num_crops=table["worker_index"], num_language_tokens=9)
    apart["num_total_tokens"] = apart["num_vision_tokens"] = 144 * apart["num_crops"]
    found = between_workers(apart)
    assert found is not None
    assert found.differing == ()
    assert "cannot be said" in found.sentence


def test_a_slower_worker_has_its_share_of_the_variance() -> None:
    factors = {"tiling": "num_crops", "worker": "worker_index"}
    shares = [
        variance_budget(
            runs(2, slower),
            factors=factors,
            categorical=("num_crops", "worker_index"),
            clusters="request_id",
        ).shares["worker"]
        for slower in (1.0, 1.5)
    ]
    assert not shares[0].above(0.01)
    assert shares[1].above(0.2)
