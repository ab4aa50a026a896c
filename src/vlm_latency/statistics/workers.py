"""Do several devices that measured one plan agree?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from vlm_latency.errors import DataError
from vlm_latency.records import SHAPE
from vlm_latency.statistics.fits import multi_linear_fit
from vlm_latency.statistics.results import Estimate, Result

if TYPE_CHECKING:
    import pandas as pd

# Where texts make nearly every request a shape of its own, their length is a slope.
COARSE = ("num_crops", "num_output_tokens")
RUNS_PER_SHAPE = 4


@dataclass(frozen=True)
class OneWorker(Result):
    """A worker beside the others: `ratio` is its latency over theirs, for the same work."""

    worker_index: int
    device: str
    n: int
    ratio: Estimate
    differs: bool


@dataclass(frozen=True)
class WorkerSpread(Result):
    """How far workers lie apart; see `between_workers`."""

    response: str
    workers: tuple[OneWorker, ...]
    differing: tuple[int, ...]
    sentence: str


def between_workers(
    runs: pd.DataFrame, response: str = "T_total", *, level: float = 0.95
) -> WorkerSpread | None:
    """Compare each worker with all others on the same work.

    Parameters
    ----------
    runs : DataFrame
        One row per run that succeeded.
    response : str
        A time that every run has.
    level : float
        Of all ratios together (Bonferroni).

    Returns
    -------
    WorkerSpread or None
        A ratio is exp of the coefficient of belonging to the worker, in a fit of the logarithm with
        a mean per shape, and clusters by request. A worker differs when the interval of its ratio
        does not hold 1. None with one worker, or where no time was taken.
    """
    known = runs[runs["worker_index"].notna() & (runs[response] > 0)]
    indexes = sorted(int(index) for index in known["worker_index"].unique())
    if len(indexes) < 2:
        return None
    key = list(SHAPE)
    if known.groupby(key, dropna=False).ngroups > len(known) / RUNS_PER_SHAPE:
        key = list(COARSE)
    found = []
    for index in indexes:
        own = known[known["worker_index"] == index]
        ratio = _ratio(known, own.index, response, key, 1 - (1 - level) / len(indexes))
        differs = ratio.above(1.0) or ratio.below(1.0)
        device = str(own["worker_device"].iloc[0])
        found.append(OneWorker(index, device, len(own), ratio, differs))
    differing = tuple(one.worker_index for one in found if one.differs)
    return WorkerSpread(response, tuple(found), differing, _sentence(found, response))


def _ratio(
    known: pd.DataFrame, own: pd.Index, response: str, key: list[str], level: float
) -> Estimate:
    columns = known[key].assign(
        y=np.log(known[response].astype(float)),
        own=known.index.isin(own).astype(float),
        text=known["num_language_tokens"].astype(float),
    )
    names = ["y", "own", "text"]
    columns[names] -= columns.groupby(key, dropna=False)[names].transform("mean")
    used = ["own"] + (["text"] if columns["text"].abs().max() > 1e-9 else [])
    method = "log ratio, a mean per shape, clusters by request"
    try:
        fit = multi_linear_fit(
            columns[used].to_numpy(),
            columns["y"].to_numpy(),
            used,
            known["request_id"].to_numpy(),
            intercept=False,
            level=level,
        )
    except DataError as error:
        note = f"no shape was measured by it and by others: {error}"
        return Estimate(None, None, None, level, len(known), "none", note)
    log = fit.coefficients["own"]
    freedom = len(known) - columns.groupby(key, dropna=False).ngroups
    if log.value is None or log.low is None or log.high is None or freedom < 1:
        return Estimate(None, None, None, level, len(known), "none", log.note or "too few runs")
    half = (log.high - log.low) / 2 * np.sqrt(len(known) / freedom)  # the shapes' means were fitted
    value, low, high = (float(np.exp(log.value + side * half)) for side in (0, -1, 1))
    return Estimate(value, low, high, level, len(known), method, log.note)


def _sentence(found: list[OneWorker], response: str) -> str:
    told = [
        f"worker {one.worker_index} ({one.device}) takes {one.ratio:.3f} times the {response} of the "
        "others"
        for one in found
        if one.differs
    ]
    if told:
        return f"{'; '.join(told)} for the same work"
    shown = [one for one in found if one.ratio.value is not None]
    if not shown:
        return f"whether the {len(found)} workers agree cannot be said: they share no shape"
    largest = max(shown, key=lambda one: abs(cast(float, one.ratio.value) - 1))
    return (
        f"no worker of {len(found)} differs: the largest ratio is that of worker "
        f"{largest.worker_index}, {largest.ratio:.3f}"
    )
