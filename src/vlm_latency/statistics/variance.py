"""Variance budget: is the tail in the content of the requests or in the machine?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from vlm_latency.errors import DataError
from vlm_latency.statistics.means import carried, ratio_estimate
from vlm_latency.statistics.results import (
    ROUNDING,
    Estimate,
    Floats,
    Result,
    as_codes,
    as_values,
    student,
)

if TYPE_CHECKING:
    import pandas as pd

FACTORS = {
    "tiling": "num_crops",
    "output length": "num_output_tokens",
    "text length": "num_language_tokens",
}
# The tail is what lies above this percentile.
TAIL = 95
# Further outside of 0 to 1 a share is no scatter about its ends.
FAILED = 0.05
# More groups make the jackknife no better, only slower.
MOST_GROUPS = 100
# Requests beyond the number of parameters, without which the unexplained part is a guess.
SPARE_REQUESTS = 10


@dataclass(frozen=True)
class VarianceBudget(Result):
    """Shares of the spread of a latency; see `variance_budget`.

    `shares` holds one estimate per factor, then "noise" and "unexplained"; they add up to 1.
    `tail_content` is the share of the tail's excess over the mean that the factors predict.
    """

    response: str
    std: float
    noise_std: float | None
    shares: dict[str, Estimate]
    tail_content: Estimate
    verdict: Literal["content", "machine", "neither", "undecided"]
    sentence: str
    n_requests: int
    n_repeated: int
    method: str


def variance_budget(
    df: pd.DataFrame,
    response: str = "T_total",
    factors: Mapping[str, str] = FACTORS,
    *,
    categorical: Sequence[str] = ("num_crops",),
    request: str = "request_id",
    clusters: str = "image_id",
    level: float = 0.95,
) -> VarianceBudget:
    """Split the variance of `response` between factors of the content, noise and the rest.

    Parameters
    ----------
    df : DataFrame
        One row per run. The noise is estimated from requests that were run more than once.
    response : str
        Column to explain, in milliseconds.
    factors : mapping of name to column
        What may explain it.
    categorical : sequence of columns
        Factors that get a mean per level (the steps of the tile grid) rather than a slope.
    request, clusters : str
        Columns that say which runs are one request, and which requests share an image; where a
        column is absent (or empty) every row, or request, is its own.
    level : float
        Of the intervals: Student's t on the jackknife over images, on the logarithm of a share
        that is small and surely above zero. For noise and "unexplained" the repeated requests
        are the degrees of freedom.

    Returns
    -------
    VarianceBudget
        The spread is that of a single run. A factor's share is its Shapley value of R² (the
        average gain over all orders of entering: Lindeman, Merenda and Gold 1980), so no order
        favours one, less what its columns would gain by chance (as omega squared does). Noise is
        the pooled variance within requests; None without repeats, and then it is part of
        "unexplained". Shares are signed: that of an idle factor scatters about 0. One outside
        of 0 to 100 % by more than 5 points is an estimate that failed: it has no value, and its
        note says why. `note` warns where one image makes most of a share's variance.

        The verdict looks at the tail, the runs above P95: "content" when the factors predict
        more than half of its excess (whole interval), "machine" when less than half and noise
        is the larger part of what they leave, "neither" when less than half and it is not, else
        "undecided".

    Raises
    ------
    DataError
        When a column is absent or holds NaN.

    Examples
    --------
    >>> import pandas as pd
    >>> crops = np.tile([2, 5, 9, 13], 30)
    >>> noise = np.random.default_rng(0).normal(0, 2, 240)
    >>> runs = pd.DataFrame({"request_id": np.repeat(np.arange(120), 2),
    ...                      "num_crops": np.repeat(crops, 2)})
    >>> runs["T_total"] = 100 + 10 * runs["num_crops"] + noise
    >>> budget = variance_budget(runs, factors={"tiling": "num_crops"})
    >>> budget.verdict, {name: round(e.value, 3) for name, e in budget.shares.items()}
    ('content', {'tiling': 0.998, 'noise': 0.002, 'unexplained': 0.0})
    """
    columns = [response, *factors.values()]
    if absent := [name for name in columns if name not in df]:
        raise DataError(
            f"no column {', '.join(absent)} in the table; expected {', '.join(columns)}"
        )
    runs = np.column_stack([as_values(name, df[name].astype(float)) for name in columns])
    own = as_codes(df.get(request), len(df))
    known = clusters in df and df[clusters].notna().any()
    image = as_codes(df[clusters], len(df)) if known else own
    counts = np.bincount(own)
    means = np.column_stack([np.bincount(own, weights=column) / counts for column in runs.T])
    deviation = np.bincount(own, weights=(runs[:, 0] - means[own, 0]) ** 2)
    first = np.unique(own, return_index=True)[1]
    y, n, repeated = means[:, 0], counts.size, int((counts > 1).sum())

    blocks = {
        name: _columns(means[:, i], column in categorical)
        for i, (name, column) in enumerate(factors.items(), start=1)
    }
    names = list(factors)
    scale = max(float(np.abs(y - y.mean()).max()), float(np.sqrt(deviation.max())))
    method = "Shapley values of R², adjusted; jackknife over images"
    parameters = 1 + sum(block.shape[1] for block in blocks.values())
    flat = scale <= ROUNDING * float(np.abs(y).max())
    if flat or n < parameters + SPARE_REQUESTS:
        sentence = (
            f"There is no spread to explain: all {n} requests took {y[0]:.4g} ms."
            if flat
            else f"{n} requests are too few for {parameters} parameters: measure at least "
            f"{parameters + SPARE_REQUESTS}."
        )
        none = Estimate(None, None, None, level, n, "none", sentence)
        shares = dict.fromkeys([*names, "noise", "unexplained"], none)
        std = 0.0 if flat else float(y.std(ddof=1)) if n > 1 else math.nan
        return VarianceBudget(
            response, std, None, shares, none, "undecided", sentence, n, repeated, method
        )

    design = np.column_stack([np.ones(n), *blocks.values(), (y - y.mean()) / scale])
    within = np.column_stack([deviation / scale**2, counts - 1, 1 / counts, np.ones(n)])
    sums = _sums_per_cluster(design, within, image[first])
    widths = {name: block.shape[1] for name, block in blocks.items()}
    shares = _jackknifed(sums, widths, counts, level, method)
    fitted = design[:, :-1] @ np.linalg.lstsq(design[:, :-1], y, rcond=None)[0]
    tail = runs[:, 0] > np.percentile(runs[:, 0], TAIL)
    if tail.any():
        tail_content = ratio_estimate(
            fitted[own][tail] - y.mean(), runs[tail, 0] - y.mean(), image[tail], level=level
        )
    else:
        tail_content = Estimate(None, None, None, level, 0, "none", f"nothing lies above P{TAIL}")
    freedom = int((counts - 1).sum())
    noise = math.sqrt(deviation.sum() / freedom) if freedom else None
    verdict = _verdict(tail_content, shares)
    between = y.var(ddof=1) + (noise or 0.0) ** 2 * (1 - (1 / counts).mean())
    return VarianceBudget(
        response,
        float(np.sqrt(between)),
        noise,
        shares,
        tail_content,
        verdict,
        _sentence(verdict, response, shares, names, tail_content),
        n,
        repeated,
        method,
    )


def _jackknifed(
    sums: Floats, widths: Mapping[str, int], counts: np.ndarray, level: float, method: str
) -> dict[str, Estimate]:
    """Give every share its interval, from the shares without one group of images each."""
    names, repeated = list(widths), int((counts > 1).sum())
    total = sums.sum(axis=0)
    value = np.array(_shares(total, list(widths.values())))
    groups = np.arange(len(sums)) % MOST_GROUPS
    parts = [sums[groups == group].sum(axis=0) for group in range(int(groups.max()) + 1)]
    moved = np.empty((0, value.size))
    if len(parts) > 1:
        moved = np.array([_shares(total - part, list(widths.values())) for part in parts]) - value
    # A few repeats may agree by chance: noise is known no better than normal noise would be.
    ours, more = float(value[-2]), int((counts - 1).sum())
    least = 0.0 if math.isnan(ours) else ours * (1 - ours) * math.sqrt(2 / more)
    freedoms = [(name, len(parts) - 1, 0.0) for name in names]
    freedoms += [(name, min(repeated, len(parts)) - 1, least) for name in ("noise", "unexplained")]
    return {
        name: _estimate(float(value[i]), moved[:, i], freedom, level, counts.size, method, floor)
        for i, (name, freedom, floor) in enumerate(freedoms)
    }


def _columns(values: Floats, categorical: bool) -> Floats:
    levels = np.unique(values)
    if levels.size == 1:
        return np.empty((values.size, 0))
    if categorical:
        return (values[:, None] == levels[1:]).astype(float)
    return ((values - values.mean()) / values.std())[:, None]


def _sums_per_cluster(design: Floats, within: Floats, image: np.ndarray) -> Floats:
    """Sum products of all pairs of columns, and `within`, per image: resampling is then cheap."""
    codes = np.unique(image, return_inverse=True)[1]
    products = [
        np.bincount(codes, weights=design[:, i] * design[:, j])
        for i in range(design.shape[1])
        for j in range(design.shape[1])
    ]
    return np.column_stack([*products, *(np.bincount(codes, weights=w) for w in within.T)])


def _shares(sums: Floats, widths: list[int]) -> list[float]:
    """Return the share of each factor, of noise (NaN without repeats), and the unexplained one."""
    deviation, freedom, inverse_runs, n = sums[-4:]
    size = 2 + sum(widths)
    gram = sums[:-4].reshape(size, size)
    centred = gram[1:, 1:] - np.outer(gram[0, 1:], gram[0, 1:]) / n
    total = centred[-1, -1]
    ends = np.cumsum([0, *widths])

    def explained(factors: tuple[int, ...]) -> float:
        used = [k for f in factors for k in range(ends[f], ends[f + 1])]
        if not used or total <= 0:
            return 0.0
        cross = centred[used, -1]
        r2 = (
            cross @ np.linalg.pinv(centred[np.ix_(used, used)], rcond=1e-10, hermitian=True) @ cross
        )
        return float(r2 / total)

    every = range(len(widths))
    gains = [0.0 for _ in every]
    worth = {
        chosen: explained(chosen)
        for size in range(len(widths) + 1)
        for chosen in itertools.combinations(every, size)
    }
    for chosen, base in worth.items():
        for f in set(every) - set(chosen):
            orders = len(widths) * math.comb(len(widths) - 1, len(chosen))
            gains[f] += (worth[tuple(sorted((*chosen, f)))] - base) / orders
    # Even an idle column gains the residual variance once: take it back (omega squared).
    chance = (1 - worth[tuple(every)]) / (n - 1 - sum(widths))
    gains = [gain - width * chance for gain, width in zip(gains, widths, strict=True)]
    between = total / (n - 1)
    noise = deviation / freedom if freedom else math.nan
    spread = between + (noise * (1 - inverse_runs / n) if freedom else 0.0)
    if spread <= 0:
        return [math.nan] * (len(widths) + 2)
    shares = [gain * between / spread for gain in gains]
    known = noise / spread if freedom else 0.0
    return [*shares, noise / spread, 1 - sum(shares) - known]


def _estimate(
    value: float, moved: Floats, freedom: int, level: float, n: int, method: str, least: float = 0.0
) -> Estimate:
    if math.isnan(value):
        note = "no request was repeated: noise is part of what is unexplained"
        return Estimate(None, None, None, level, n, "none", note)
    if not -FAILED <= value <= 1 + FAILED:
        note = (
            f"the estimate failed: {value:.0%} is no share (too few repeats, or too few requests)"
        )
        return Estimate(None, None, None, level, n, "none", note)
    if moved.size < 2 or freedom < 1 or not np.isfinite(moved).all():
        note = "an interval needs at least 2 images, and 2 repeated requests for what is noise"
        return Estimate(value, None, None, level, n, "none", note)
    squares = moved**2
    error = max(least, math.sqrt((moved.size - 1) / moved.size * squares.sum()))
    half = student(level, freedom) * error
    note = ""
    if carried(squares):
        note = "one image makes most of this share's variance: the interval may be too narrow"
    low, high = value - half, value + half
    if low > 0 and value < 0.5:
        low, high = value * math.exp(-half / value), value * math.exp(half / value)
        method += ", logarithm"
    return Estimate(value, low, high, level, n, method, note)


def _verdict(
    tail: Estimate, shares: Mapping[str, Estimate]
) -> Literal["content", "machine", "neither", "undecided"]:
    if tail.above(0.5):
        return "content"
    noise, rest = shares["noise"].value, shares["unexplained"].value
    if not tail.below(0.5) or noise is None or rest is None:
        return "undecided"
    return "machine" if noise > rest else "neither"


def _sentence(
    verdict: str,
    response: str,
    shares: Mapping[str, Estimate],
    names: Sequence[str],
    tail: Estimate,
) -> str:
    def said(name: str) -> str:
        share = shares[name]
        return f"{name} {share:.0%}" if share.value is not None else f"{name} unknown"

    parts = ", ".join(map(said, names))
    machine = said("noise")
    if shares["noise"].note.startswith("no request was repeated"):
        machine += " (repeat some requests)"
    opening = {
        "content": "The tail is in the content",
        "machine": "The tail is in the machine",
        "neither": "The tail is in neither the factors nor the noise",
        "undecided": "It is undecided whether the tail is in the content or in the machine",
    }[verdict]
    predicted = f"the factors predict {tail:.0%} of what lies above P{TAIL} of {response}"
    if tail.low is not None and not tail.within(-FAILED, 1 + FAILED):
        predicted = (
            f"what the factors predict of the {tail.n} runs above P{TAIL} of {response} cannot be "
            "said: too few, or too unlike"
        )
    return f"{opening}: {predicted}; of the whole spread {parts}, {machine}, {said('unexplained')}."
