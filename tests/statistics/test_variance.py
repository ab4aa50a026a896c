import itertools

import numpy as np
import pandas as pd
import pytest

from vlm_latency.errors import UserError
from vlm_latency.statistics import variance_budget

# Every combination once, so the factors are orthogonal and their variances add up.
GRID = pd.DataFrame(
    list(itertools.product([1, 5, 9, 13], [1, 2, 3, 4, 5, 6], [20, 30, 40, 50])),
    columns=["num_crops", "num_output_tokens", "num_language_tokens"],
)


def runs(repeats: int, noise: float, seed: int = 0, **slopes: float) -> pd.DataFrame:
    df = GRID.assign(request_id=range(len(GRID)), image_id=range(len(GRID)))
    df = df.loc[df.index.repeat(repeats)].reset_index(drop=True)
    content = sum(df[name] * slope for name, slope in slopes.items())
    return df.assign(T_total=200 + content + np.random.default_rng(seed).normal(0, noise, len(df)))


def test_orthogonal_factors_by_hand() -> None:
    # var of crops·3 is 9·20 = 180, of tokens·2 is 4·35/12, of text·0.5 is 125/4
    parts = np.array([180, 35 / 3, 31.25, 16.0])
    budget = variance_budget(
        runs(2, 4.0, num_crops=3, num_output_tokens=2, num_language_tokens=0.5)
    )
    shares = [budget.shares[k] for k in ("tiling", "output length", "text length", "noise")]
    np.testing.assert_allclose([e.value for e in shares], parts / parts.sum(), atol=0.025)
    assert all(e.low < e.value < e.high for e in shares)
    assert sum(e.value for e in budget.shares.values()) == pytest.approx(1)
    assert budget.noise_std == pytest.approx(4, rel=0.15)
    assert budget.std == pytest.approx(np.sqrt(parts.sum()), rel=0.05)
    assert budget.verdict == "content"
    assert budget.sentence.startswith("The tail is in the content: the factors predict 9")
    assert budget.n_repeated == 96


def test_a_noisy_machine_is_told_from_content() -> None:
    budget = variance_budget(runs(3, 20.0, num_crops=0.5))
    assert budget.verdict == "machine"
    assert budget.shares["noise"].low > 0.8
    assert abs(budget.shares["unexplained"].value) < 0.1
    # What is idle scatters about zero.
    assert abs(budget.shares["text length"].value) < 0.03


def test_content_that_no_factor_names_is_neither() -> None:
    df = runs(2, 0.5)
    df["T_total"] += np.random.default_rng(5).exponential(30, 96)[df["request_id"]]
    budget = variance_budget(df)
    assert budget.verdict == "neither"
    assert budget.shares["unexplained"].low > 0.5


def test_without_repeats_noise_is_unknown() -> None:
    budget = variance_budget(runs(1, 20.0, num_crops=0.5))
    assert budget.shares["noise"].value is None
    assert budget.noise_std is None
    assert budget.verdict == "undecided"
    assert "repeat some requests" in budget.sentence
    known = [e.value for e in budget.shares.values() if e.value is not None]
    assert sum(known) == pytest.approx(1)


def test_factors_that_are_copies_share_what_they_explain() -> None:
    df = runs(2, 0.1, num_output_tokens=3)
    df["num_language_tokens"] = df["num_output_tokens"]
    shares = variance_budget(df).shares
    assert shares["output length"].value == pytest.approx(shares["text length"].value, abs=1e-6)


def test_steps_of_the_tile_grid_need_no_line() -> None:
    df = runs(1, 0.01)
    df["T_total"] += df["num_crops"].map({1: 5, 5: 50, 9: 2, 13: 9})
    assert variance_budget(df).shares["tiling"].value == pytest.approx(1, abs=1e-3)
    assert variance_budget(df, categorical=()).shares["tiling"].value < 0.2


def test_a_constant_factor_explains_nothing() -> None:
    shares = variance_budget(runs(2, 1.0, num_crops=3).assign(num_output_tokens=1)).shares
    assert (shares["output length"].value, shares["output length"].high) == (0, 0)


def test_constant_latency_has_no_spread_to_explain() -> None:
    budget = variance_budget(runs(2, 0.0))
    assert budget.sentence == "There is no spread to explain: all 96 requests took 200 ms."
    assert (budget.std, budget.verdict) == (0, "undecided")
    assert budget.shares["tiling"].value is None


def test_a_handful_of_requests_is_too_few() -> None:
    budget = variance_budget(runs(1, 1.0).head(3))
    assert budget.verdict == "undecided"
    assert "3 requests are too few" in budget.sentence


def test_one_image_has_no_interval() -> None:
    share = variance_budget(runs(2, 1.0, num_crops=3).assign(image_id=7)).shares["tiling"]
    assert share.value > 0.9
    assert share.low is None


def test_requests_without_image_are_drawn_one_by_one() -> None:
    df = runs(2, 4.0, num_crops=3)
    nullable = df.assign(image_id=None).astype({"num_crops": "Int64", "image_id": "Int64"})
    assert variance_budget(nullable) == variance_budget(df)


def test_columns_must_be_there_and_measured() -> None:
    with pytest.raises(UserError, match="no column num_crops"):
        variance_budget(runs(1, 1.0).drop(columns="num_crops"))
    with pytest.raises(UserError, match="T_total holds 1 NaN"):
        df = runs(1, 1.0)
        df.loc[3, "T_total"] = np.nan
        variance_budget(df)


def test_shares_are_covered_for_strong_and_for_idle_factors() -> None:
    hits = np.zeros(2)
    for seed in range(60):
        rng = np.random.default_rng(seed)
        image = np.repeat(np.arange(60), 3)
        df = pd.DataFrame(
            {
                "image_id": image,
                "num_crops": rng.choice([1, 5, 9, 13], 60)[image],
                "text": rng.integers(10, 60, 180),
            }
        )
        df["T_total"] = 100 + df["num_crops"] + rng.normal(0, np.sqrt(20), 180)
        shares = variance_budget(df, factors={"tiling": "num_crops", "text": "text"}).shares
        hits += [
            shares["tiling"].low <= 0.5 <= shares["tiling"].high,
            shares["text"].low <= 0 <= shares["text"].high,
        ]
    assert (hits / 60 >= 0.88).all()


def test_ties_at_the_top_leave_no_tail() -> None:
    df = runs(1, 0.0).assign(T_total=lambda d: 100.0 + (d["num_crops"] > 1))
    budget = variance_budget(df)
    assert budget.tail_content.note == "nothing lies above P95"
    assert budget.verdict == "undecided"


def test_a_share_that_is_no_share_is_an_estimate_that_failed() -> None:
    rng = np.random.default_rng(0)
    n = 40
    df = pd.DataFrame({"request_id": [*range(n), 0, 1], "num_crops": 1})
    df["T_total"] = 100 + rng.normal(0, 1, n)[df["request_id"]]
    df.loc[[0, 1, n, n + 1], "T_total"] += [20, -20, -20, 20]  # two repeats that differ wildly
    budget = variance_budget(df, factors={"tiling": "num_crops"})
    assert budget.shares["unexplained"].value is None
    assert "the estimate failed: -" in budget.shares["unexplained"].note
    assert "unexplained unknown" in budget.sentence


def test_a_tail_of_which_little_is_known_is_given_no_share() -> None:
    """Four runs lie above P95: an interval from 1 % to 600 % is no sentence."""
    rng = np.random.default_rng(0)
    sentences = []
    for _ in range(40):
        runs = pd.DataFrame({"request_id": np.arange(80), "num_crops": rng.choice([2, 7], 80)})
        runs["T_total"] = 100 + runs["num_crops"] + rng.exponential(40, 80)
        found = variance_budget(runs, factors={"tiling": "num_crops"})
        known = found.tail_content.within(-0.05, 1.05)
        sentences.append(found.sentence)
        assert ("cannot be said: too few" in found.sentence) == (not known)
    assert any("cannot be said" in said for said in sentences)
