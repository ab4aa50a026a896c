"""Every public interval on every kind of data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from itertools import count

import numpy as np
import pandas as pd
import scipy
from defaults import defaults
from further import further
from simulated import (
    CROPS,
    DATA,
    HARD,
    TOKENS,
    Floats,
    Generator,
    clustered,
    crops,
    lognormal_of,
    requests_of_exp1,
    shapes_with_costs,
    steps,
    sweep,
)
from table import SEED, Cell

from vlm_latency import statistics as st
from vlm_latency.statistics import Estimate


def cells() -> Iterator[Cell]:
    """Give every cell of the table."""
    yield from _of_means()
    yield from _of_percentiles()
    yield from _of_fits()
    yield from _of_orders()
    yield from _of_comparisons()
    yield from _of_shares()
    yield from _of_predictions()
    yield from further()
    yield from defaults()


def _of_means() -> Iterator[Cell]:
    for name, (draw, truth) in DATA.items():
        for n in (8, 20, 80, 1000):
            small = name == "lognormal 0.5" and n < 20
            yield Cell(
                "mean", name, str(n), truth,
                lambda rng, draw=draw, n=n: st.mean_estimate(draw(rng, n)),
                2_000, goal=name not in HARD and not small, exact=not name.startswith("ties"),
            )  # fmt: skip
    for images in (8, 20, 80):
        yield Cell(
            "mean, over images", "clustered", f"{images} × 5", math.exp(3 + 0.3**2 / 2),
            lambda rng, images=images: st.mean_estimate(*clustered(rng, images, 5)), 2_000,
        )  # fmt: skip
    for n in (8, 20, 40, 80):
        yield Cell(
            "ratio of means", "lognormal 0.3", str(n), 0.3 * math.exp(0.02),
            lambda rng, n=n: _ratio(rng, n), 2_000,
        )  # fmt: skip
        yield Cell(
            "ratio of means", "mixture of token counts", str(n), 0.3,
            lambda rng, n=n: _share(rng, n), 2_000, goal=False,
        )  # fmt: skip
        yield Cell(
            "ratio of means, over images", "clustered", f"{n} × 5", 0.3 * math.exp(0.02),
            lambda rng, n=n: _ratio(rng, n, 5), 2_000,
        )  # fmt: skip


def _ratio(rng: Generator, n: int, per_image: int = 1) -> Estimate:
    whole, image = clustered(rng, n, per_image)
    part = 0.3 * whole * np.exp(rng.normal(0, 0.2, n)[image])
    return st.ratio_estimate(part, whole, image if per_image > 1 else None)


def _share(rng: Generator, n: int) -> Estimate:
    vision = crops(rng, n)
    rest = (7 / 3) * (20 + 30 * 3.95) * np.exp(rng.normal(-0.02, 0.2, n))
    return st.ratio_estimate(vision, vision + rest)


def _of_percentiles() -> Iterator[Cell]:
    for q in (50, 95, 99):
        laws = {
            "normal": 100 + 5 * scipy.stats.norm.ppf(q / 100),
            "lognormal 0.5": lognormal_of(0.5)[1](q / 100),
            "heavy tail (Pareto 2.5)": 50 * (1 + 0.2 * ((1 - q / 100) ** (-1 / 2.5) - 1)),
            "ties (a clock of 2 ms)": 2 * np.round((100 + 5 * scipy.stats.norm.ppf(q / 100)) / 2),
        }
        for name, truth in laws.items():
            for n in (8, 80, 1000):
                draw = DATA[name][0]
                yield Cell(
                    f"P{q}", name, str(n), float(truth),
                    lambda rng, q=q, n=n, draw=draw: st.percentile(draw(rng, n), q),
                    1_000, exact=False,
                )  # fmt: skip
        for images, each in ((4, 5), (20, 10), (10, 100), (80, 5)):
            yield Cell(
                f"P{q}, over images", "clustered", f"{images} × {each}",
                lognormal_of(0.3)[1](q / 100),
                lambda rng, q=q, size=(images, each): _clustered_percentile(rng, q, *size),
                1_000, exact=False,
            )  # fmt: skip
    for n in (80, 500):
        yield Cell(
            "P99 / P50", "lognormal 0.3", str(n), math.exp(0.3 * scipy.stats.norm.ppf(0.99)),
            lambda rng, n=n: st.tail_ratio(np.exp(rng.normal(3, 0.3, n))), 1_000, exact=False,
        )  # fmt: skip


def _clustered_percentile(rng: Generator, q: float, images: int, each: int) -> Estimate:
    values, image = clustered(rng, images, each)
    return st.percentile(values, q, clusters=image)


def _of_fits() -> Iterator[Cell]:
    line = 10 + 0.14 * TOKENS
    fits: dict[str, Callable[..., st.LinearFit]] = {
        "slope, least squares": st.linear_fit,
        "slope, robust": st.robust_line,
        "slope, headline of the two": lambda *data: st.headline_line(*data).headline,
    }
    for name, fit in fits.items():
        runs = 1_000 if fit is st.linear_fit else 400
        for n in (8, 20, 80):
            yield Cell(
                name, "noise of 5 % of y", str(n), 0.14,
                lambda rng, n=n, fit=fit: fit(*_scattered(rng, n)).slope, runs,
            )  # fmt: skip
        for effect in (0.01, 0.03):
            yield Cell(
                name, f"clustered, requests differ by {effect:.0%}", "15 × 5", 0.14,
                lambda rng, effect=effect, fit=fit: fit(*sweep(rng, line, effect=effect)).slope,
                runs,
            )  # fmt: skip
        if fit is not st.linear_fit:
            yield Cell(
                name, "clustered, 5 % of runs far too slow", "15 × 5", 0.14,
                lambda rng, fit=fit: fit(*sweep(rng, line, spikes=0.05)).slope, runs, exact=False,
            )  # fmt: skip
    yield Cell(
        "line, end / start", "clustered", "15 × 5", (10 + 0.14 * 1344) / (10 + 0.14 * 288),
        lambda rng: st.linear_fit(*sweep(rng, line)).growth(288, 1344),
    )  # fmt: skip
    yield Cell(
        "ms per crop beside ms per token", "clustered", "15 × 5", 4.0,
        lambda rng: _two_slopes(rng).coefficients["crops"],
    )  # fmt: skip
    yield Cell(
        "exponent of a power law", "clustered", "15 × 5", 0.9,
        lambda rng: st.power_law_fit(*sweep(rng, 0.2 * TOKENS**0.9)).exponent,
    )  # fmt: skip
    bent = 50 + 0.1 * TOKENS + 2e-5 * TOKENS**2
    change = 2 * 2e-5 * (1344 - 288) / (0.1 + 2e-5 * (1344 + 288))
    yield Cell(
        "change of the cost per token", "clustered", "15 × 5", change,
        lambda rng: st.marginal_change(*sweep(rng, bent)),
    )  # fmt: skip
    floor = np.maximum(18, 18 + 0.02 * (TOKENS - 650))
    for part, truth in (("floor", 18.0), ("slope", 0.02), ("free", 650.0)):
        yield Cell(
            f"floor and line: {part}", "clustered", "15 × 5", truth,
            lambda rng, part=part: getattr(
                st.floor_and_line(*sweep(rng, floor), resamples=99), part
            ),
            400,
        )  # fmt: skip
    for effect in (0.0, 0.01, 0.02):
        yield Cell(
            "a line is not called bent", f"clustered, requests differ by {effect:.0%}", "15 × 5",
            math.nan, lambda rng, effect=effect: float(
                st.linearity_test(*sweep(rng, line, effect=effect), permutations=199).verdict
                != "not a line"
            ),
            400, exact=False,
        )  # fmt: skip
    yield Cell(
        "a line is given no floor", "clustered", "15 × 5", math.nan,
        lambda rng: float(
            st.floor_and_line(*sweep(rng, line), resamples=99).holds != "floor and line"
        ),
        400, exact=False,
    )  # fmt: skip
    for images in (5, 10):
        for growth in (1.0, 1.2):
            yield Cell(
                "last decode step / first", f"clustered, true {growth:g}", f"{images} images",
                growth, lambda rng, images=images, growth=growth: step_growth(rng, images, growth), 300,
            )  # fmt: skip
    yield Cell(
        "jump of a staircase", "normal", "2 × 8", 40.0,
        lambda rng: st.staircase(
            np.arange(16.0), np.repeat([10.0, 50.0], 8) + rng.normal(0, 3, 16), np.repeat([1, 2], 8)
        ).break_points[0].jump,
    )  # fmt: skip


def _scattered(rng: Generator, n: int) -> tuple[Floats, Floats]:
    x = rng.uniform(100, 1400, n)
    return x, (10 + 0.14 * x) * (1 + rng.normal(0, 0.05, n))


def _two_slopes(rng: Generator) -> st.MultiLinearFit:
    x, y, request = sweep(rng, 10 + 4 * CROPS + 0.05 * TOKENS)
    return st.multi_linear_fit(
        np.column_stack([CROPS[request], x]), y, ["crops", "tokens"], request
    )


def step_growth(rng: Generator, images: int, growth: float) -> Estimate:
    position, ms, image = steps(rng, images, growth)
    return st.linear_fit(position, ms, image).growth(1, position.max())


def _of_orders() -> Iterator[Cell]:
    # P(two points are ordered otherwise) for log x ~ U(0, 2), log y = log x + N(0, 0.4)
    u = np.linspace(0, 2, 4_001)
    inversions = float(
        np.average(scipy.stats.norm.cdf(-u / (0.4 * math.sqrt(2))), weights=np.maximum(2 - u, 0))
    )
    median = math.exp(0.4 * math.sqrt(2) * scipy.stats.norm.ppf(0.75))
    for n in (27, 60):
        yield Cell(
            "share of rank inversions", "lognormal 0.4", str(n), inversions,
            lambda rng, n=n: st.rank_inversions(*_ordered(rng, n)), 300,
        )  # fmt: skip
        yield Cell(
            "median ratio of iso-FLOP pairs", "lognormal 0.4", str(n), median,
            lambda rng, n=n: st.iso_pairs(*_ordered(rng, n), 0.05).median_ratio, 1_000, exact=False,
        )  # fmt: skip
    for name in ("Pearson's r", "Spearman's rho"):
        yield Cell(
            name, "lognormal 0.4", "27", 0.0,
            lambda rng, name=name: getattr(
                st.correlations(*_ordered(rng, 27)), name.split("'")[0].lower()
            ),
            20,
        )  # fmt: skip


def _ordered(rng: Generator, n: int) -> tuple[Floats, Floats]:
    x = np.exp(rng.uniform(0, 2, n))
    return x, x * np.exp(rng.normal(0, 0.4, n))


def _of_comparisons() -> Iterator[Cell]:
    for n in (8, 20, 80):
        yield Cell(
            "ratio of interleaved pairs", "lognormal 0.3", str(n), 1.05,
            lambda rng, n=n: st.compare_paired(
                np.exp(rng.normal(3, 0.3, n)), 1.05 * np.exp(rng.normal(3, 0.3, n))
            ).ratio,
        )  # fmt: skip
        yield Cell(
            "ratio of pairs with zeros (clamped)", "normal", str(n), 1.0,
            lambda rng, n=n: st.compare_paired(*_clamped(rng, n)).ratio,
        )  # fmt: skip
    yield Cell(
        "ratio of interleaved pairs, over images", "clustered", "20 × 5", 1.05,
        lambda rng: _clustered_pairs(rng, 20),
    )  # fmt: skip
    yield Cell(
        "share of false alarms", "normal", "200 comparisons", 0.05,
        lambda rng: st.a_a_false_alarms(np.exp(rng.normal(3, 0.1, (200, 2, 20)))).share,
        200, exact=False,
    )  # fmt: skip
    for drift in (0.9, 0.99):
        yield Cell(
            "two sessions: no verdict but SAME or UNDECIDED", f"drift of 3 %, AR(1) {drift:g}",
            "2 × 80", math.nan, lambda rng, drift=drift: _sessions(rng, drift), 300, exact=False,
        )  # fmt: skip


def _clamped(rng: Generator, n: int) -> Floats:
    """Pairs of a component that subtraction leaves below zero now and then, clamped."""
    pairs: Floats = np.maximum(0, rng.normal(5, 3, (2, n)))
    pairs[:, 0] = 0  # at least one, so that the path is always the one for zeros
    return pairs


def _clustered_pairs(rng: Generator, images: int) -> Estimate:
    baseline, image = clustered(rng, images, 5)
    effect = rng.normal(math.log(1.05), 0.05, images)[image]
    candidate = baseline * np.exp(effect + rng.normal(0, 0.05, image.size))
    return st.compare_paired(baseline, candidate, clusters=image).ratio


def _sessions(rng: Generator, phi: float) -> float:
    shocks = rng.normal(0, 0.03 * math.sqrt(1 - phi**2), 160)
    shocks[0] = rng.normal(0, 0.03)
    drift = scipy.signal.lfilter([1], [1, -phi], shocks)
    times = np.exp(3 + drift + rng.normal(0, 0.02, 160))
    tables = [
        pd.DataFrame({"request_id": np.arange(80), "T_total": own}) for own in np.split(times, 2)
    ]
    found = st.between_sessions(st.compare_tables(*tables), 0.1)
    return float(found.verdict in {"SAME", "UNDECIDED"})


def _of_shares() -> Iterator[Cell]:
    noise = 60.0
    parts = {
        "tiling": 900 * float(np.var([2, 5, 7, 13])),
        "output length": 900 * float(np.var(np.arange(1, 9))),
        "text length": 0.0,
        "noise": noise**2,
        "unexplained": 0.0,
    }
    for n, repeats in ((80, 16), (300, 60)):
        for name, variance in parts.items():
            draws = count()
            yield Cell(
                f"share of variance: {name}", "requests with noise", f"{n} + {repeats}",
                variance / sum(parts.values()),
                lambda _, name=name, n=n, repeats=repeats, draw=draws: _budget(
                    n, repeats, noise, next(draw)
                ).shares[name],
                200, exact=variance > 0,
            )  # fmt: skip

    for n, repeats in ((80, 16), (300, 60)):
        draws = count()
        yield Cell(
            "share of the tail in the content", "requests with noise", f"{n} + {repeats}",
            lambda: _tail_content(noise),
            lambda _, n=n, repeats=repeats, draw=draws: _budget(
                n, repeats, noise, next(draw)
            ).tail_content,
            200,
        )  # fmt: skip


@cache
def _tail_content(noise: float) -> float:
    """Return the share of the tail of very many requests."""
    many = requests_of_exp1(np.random.default_rng(SEED), 100_000, 10_000, noise)
    found = st.variance_budget(many).tail_content.value
    assert found is not None
    return found


@cache
def _budget(n: int, repeats: int, noise: float, draw: int) -> st.VarianceBudget:
    """One draw serves every share."""
    return st.variance_budget(
        requests_of_exp1(np.random.default_rng([SEED, n, draw]), n, repeats, noise)
    )


def _of_predictions() -> Iterator[Cell]:
    for shapes in (15, 20, 27, 60):
        for of_runs in (True, False):
            what = "one request" if of_runs else "the mean of repeated requests"
            yield Cell(
                f"predicted latency of {what}", "lognormal 0.03", f"{shapes} shapes", math.nan,
                lambda rng, shapes=shapes, of_runs=of_runs: _predicted(rng, shapes, of_runs),
                300, exact=False,
            )  # fmt: skip
    for shapes in (8, 20, 27, 60):
        for name in ("flops", "costs"):
            draws = count()
            yield Cell(
                f"held-out error of {name}", "lognormal 0.03", f"{shapes} shapes",
                lambda shapes=shapes, name=name: _true_errors(shapes)[name],
                lambda _, shapes=shapes, name=name, draw=draws: validated(
                    shapes, next(draw)
                ).mape[name],
                300, exact=shapes > 8,
            )  # fmt: skip
        draws = count()
        yield Cell(
            "median held-out error", "lognormal 0.03", f"{shapes} shapes", math.nan,
            lambda _, shapes=shapes, draw=draws: validated(shapes, next(draw)).median_error["costs"],
            20,
        )  # fmt: skip
        draws = count()
        yield Cell(
            "ratio of two held-out errors", "lognormal 0.03", f"{shapes} shapes",
            lambda shapes=shapes: _true_ratio(shapes),
            lambda _, shapes=shapes, draw=draws: validated(shapes, next(draw)).error_ratio(
                "flops", "costs"
            ),
            300, exact=shapes > 8,
        )  # fmt: skip


@cache
def validated(shapes: int, draw: int) -> st.CrossValidation:
    """One draw serves every error."""
    flops, costs, y, _ = shapes_with_costs(np.random.default_rng([SEED, shapes, draw]), shapes)
    looked_at = {"flops": (flops, st.nnls_relative_fit), "costs": (costs, st.nnls_relative_fit)}
    return st.cross_validate(np.arange(shapes), looked_at, y)


@cache
def _true_errors(shapes: int) -> dict[str, float]:
    """Mean error on new shapes of predictors fitted on as many shapes as are left, over 300 fits."""
    rng = np.random.default_rng([SEED, shapes])
    errors: dict[str, list[float]] = {"flops": [], "costs": []}
    for _ in range(300):
        flops, costs, y, _ = shapes_with_costs(rng, shapes - 1)
        new_flops, new_costs, new_y, _ = shapes_with_costs(rng, 60)
        for name, X, new in (("flops", flops, new_flops), ("costs", costs, new_costs)):
            guess = st.nnls_relative_fit(X, y).predict(new)
            errors[name].append(float(np.abs(guess / new_y - 1).mean()))
    return {name: float(np.mean(own)) for name, own in errors.items()}


def _true_ratio(shapes: int) -> float:
    errors = _true_errors(shapes)
    return errors["flops"] / errors["costs"]


def _predicted(rng: Generator, shapes: int, of_runs: bool) -> Estimate | float:
    _, X, y, runs = shapes_with_costs(rng, shapes + 1)
    fit = st.nnls_relative_fit
    found = st.cross_validate(np.arange(shapes), {"costs": (X[:-1], fit)}, y[:-1])
    guess = float(fit(X[:-1], y[:-1]).predict(X[-1:])[0])
    interval = found.interval("costs", guess, runs=runs[:-1] if of_runs else None)
    if interval.low is None or interval.high is None:
        return interval
    return float(interval.low <= (runs[-1][0] if of_runs else y[-1]) <= interval.high)
