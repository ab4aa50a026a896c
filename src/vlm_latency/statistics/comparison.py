"""Compare two runs: ratio of latencies, its interval, and the smallest difference to be seen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import scipy
from numpy.typing import ArrayLike

from vlm_latency.errors import DataError, UserError
from vlm_latency.records import PATCHES_PER_CROP
from vlm_latency.statistics.means import linearised, ratio_estimate
from vlm_latency.statistics.results import Estimate, Floats, Result, as_codes, as_pairs, student

if TYPE_CHECKING:
    import pandas as pd

Verdict = Literal["FASTER", "SLOWER", "SAME", "UNDECIDED"]

# Intervals of fewer pairs raise more false alarms than they promise.
ENOUGH_PAIRS = 20
COMPARED = (
    "T_total",
    "T_vision_encoder",
    "T_projector",
    "T_vision_total",
    "T_LLM_prefill",
    "T_LLM_decode",
    "T_other",
    "T_first_token",
    "T_per_output_token",
    "T_preprocess",
)
# A request is the same work when its id and its content (a hash) are the same.
REQUEST = ("request_id", "request_sha256")
MATCHED_BY = ("num_crops", "num_vision_tokens", "num_output_tokens")


@dataclass(frozen=True)
class Comparison(Result):
    """Candidate against baseline; see `compare_paired` for the meaning of the verdict.

    `smallest_visible` is the half-width of the interval as a share of the ratio: differences
    below it could not have been told from none. `different` says that the interval excludes 1.
    """

    ratio: Estimate
    verdict: Verdict
    different: bool
    smallest_visible: float | None
    margin: float
    baseline_mean: float
    candidate_mean: float
    n_pairs: int
    note: str = ""

    def __str__(self) -> str:
        seen = self.smallest_visible
        limit = "" if seen is None else f", differences under {seen:.1%} cannot be seen"
        return f"{self.verdict}: ratio {self.ratio:.3f}, {self.n_pairs} pairs{limit}"


def compare_paired(
    baseline: ArrayLike,
    candidate: ArrayLike,
    level: float = 0.95,
    margin: float = 0.02,
    clusters: ArrayLike | None = None,
) -> Comparison:
    """Compare interleaved pairs of latencies by Student's t on the logarithm of their ratios.

    Parameters
    ----------
    baseline, candidate : array_like, shape (n,)
        One pair per position, in the same unit. Where a value is not above zero (a clamped
        component) the ratio of the means (`ratio_estimate`) stands in, and `ratio.method`
        says so.
    level : float
        Confidence level.
    margin : float
        Differences up to this share do not matter.
    clusters : array_like, shape (n,), optional
        The image of each pair.

    Returns
    -------
    Comparison
        With [low, high] the interval of the ratio candidate / baseline (a geometric mean):

        * SAME: 1 − margin ≤ low and high ≤ 1 + margin;
        * FASTER: high < 1, and not SAME;
        * SLOWER: low > 1, and not SAME;
        * UNDECIDED: otherwise, or without an interval (one pair).

        So a difference that is certain and within the margin is SAME. Pairs of one constant
        ratio have an interval of width zero.

    Raises
    ------
    DataError
        For NaN or infinity, no pairs, or unequal lengths.

    Examples
    --------
    >>> baseline = np.tile([100.0, 101.0, 99.0, 100.5, 99.5], 4)
    >>> print(compare_paired(baseline, 1.1 * baseline[::-1]))
    SLOWER: ratio 1.100 [1.098, 1.102], 20 pairs, differences under 0.2% cannot be seen
    >>> compare_paired(baseline, baseline).verdict
    'SAME'
    """
    baseline, candidate = as_pairs(("baseline", "candidate"), baseline, candidate)
    if not 0 <= margin < 1:
        raise UserError(f"margin {margin:g} found; expected a share such as 0.02 for 2 %")
    if min(baseline.min(), candidate.min()) > 0:
        ratio = _log_ratio(baseline, candidate, level, clusters)
    else:
        ratio = ratio_estimate(candidate, baseline, clusters, level=level)
    n = baseline.size
    note = f"{n} pairs; intervals hold from {ENOUGH_PAIRS}: repeat more" if n < ENOUGH_PAIRS else ""
    return Comparison(
        ratio,
        *_judged(ratio, margin),
        margin,
        float(baseline.mean()),
        float(candidate.mean()),
        n,
        note,
    )


def paired_difference(baseline: ArrayLike, candidate: ArrayLike, level: float = 0.95) -> Estimate:
    """Give candidate − baseline in their unit, always on the side of 1 where their ratio is.

    Parameters
    ----------
    baseline, candidate : array_like, shape (n,)
        As of `compare_paired`, whose ratio is one of geometric means: so is this difference, with
        Student's t on what each pair adds to it (delta method). Where a value is not above zero,
        both are of arithmetic means.

    Examples
    --------
    >>> print(paired_difference([10.0, 12.0, 11.0], [30.0, 32.1, 31.2]))
    20.12 [19.9, 20.34]
    """
    before, after = as_pairs(("baseline", "candidate"), baseline, candidate)
    if min(before.min(), after.min()) > 0:
        logs = np.log(before), np.log(after)
        middles = [float(np.exp(each.mean())) for each in logs]
        adds = middles[1] * logs[1] - middles[0] * logs[0]
        value, method = middles[1] - middles[0], "t on geometric means"
    else:
        adds = after - before
        value, method = float(adds.mean()), "t on means"
    n = before.size
    if n < 2:
        note = f"an interval needs at least 2 pairs, found {n}"
        return Estimate(value, None, None, level, n, "none", note)
    error = float(adds.std(ddof=1)) / math.sqrt(n)
    half = student(level, n - 1) * error
    return Estimate(value, value - half, value + half, level, n, method)


@dataclass(frozen=True)
class TableComparison(Result):
    """Two tables of runs against each other, per component; see `compare_tables`."""

    verdict: Verdict | None
    components: dict[str, Comparison]
    not_measured: tuple[str, ...]
    matched_by: tuple[str, ...]
    n_matched: int
    unmatched_baseline: tuple[str, ...]
    unmatched_candidate: tuple[str, ...]
    notes: tuple[str, ...]


def compare_tables(
    baseline: pd.DataFrame,
    candidate: pd.DataFrame,
    columns: Sequence[str] = COMPARED,
    *,
    margin: float = 0.02,
    level: float = 0.95,
    match_by: Sequence[str] | None = None,
) -> TableComparison:
    """Compare two tables of runs component by component, over the requests they share.

    Parameters
    ----------
    baseline, candidate : DataFrame
        One row per run, or per request. Runs of one request are averaged first.
    columns : sequence of str
        Components to compare, in milliseconds. Missing values count as not measured.
    margin, level : float
        As in `compare_paired`.
    match_by : sequence of str, optional
        Columns that say what is the same work. By default `request_id` and `request_sha256`, as
        far as both tables have them, where they share any request; else the shape: `num_crops`, `num_vision_tokens`, `num_output_tokens`, as far as both
        tables have them. Patches (crops × 576) that stand in one table in place of vision tokens
        are never matched with tokens.

    Returns
    -------
    TableComparison
        `verdict` is that of T_total, or of the first column where that was not measured.
        Requests are clustered by the baseline's `image_id` where it has one. `notes` name what a
        reader has to know, such as matched requests whose shapes differ.

    Raises
    ------
    DataError
        When nothing matches.

    Examples
    --------
    >>> import pandas as pd
    >>> before = pd.DataFrame({"request_id": list("aabbc"), "T_total": [10.0, 12.0, 20.0, 22.0, 9]})
    >>> after = pd.DataFrame({"request_id": list("abd"), "T_total": [5.5, 10.5, 7.0]})
    >>> found = compare_tables(before, after)
    >>> print(found.components["T_total"])
    FASTER: ratio 0.500 [0.500, 0.500], 2 pairs, differences under 0.0% cannot be seen
    >>> found.unmatched_baseline, found.unmatched_candidate
    (('c',), ('d',))
    """
    notes: list[str] = []
    keys = list(match_by) if match_by else _keys(baseline, candidate, notes)
    if absent := [key for key in keys if key not in baseline or key not in candidate]:
        raise DataError(f"cannot match by {', '.join(absent)}: not a column of both tables")
    before, after = _per_key(baseline, keys), _per_key(candidate, keys)
    shared = before.index.intersection(after.index)
    if not len(shared):
        raise DataError(
            f"none of {len(before)} and {len(after)} requests match by {', '.join(keys)}; "
            "compare runs of the same requests or shapes"
        )
    lost = [tuple(map(_label, own.index[~own.index.isin(shared)])) for own in (before, after)]
    before, after = before.loc[shared], after.loc[shared]
    for name in MATCHED_BY:
        if name in before and name in after and name not in keys:
            differing = int((before[name] != after[name]).sum())
            if differing:
                notes.append(f"{differing} of {len(shared)} matched requests differ in {name}")
    images = before.get("image_id") if "request_id" in keys else None
    if images is not None and images.isna().all():
        images = None
    components = {}
    for name in columns:
        if name not in before or name not in after:
            continue
        pair = np.column_stack([before[name].astype(float), after[name].astype(float)])
        measured = np.isfinite(pair).all(axis=1)
        if measured.any():
            components[name] = compare_paired(
                pair[measured, 0],
                pair[measured, 1],
                level=level,
                margin=margin,
                clusters=None if images is None else images[measured],
            )
            if not measured.all():
                notes.append(f"{name}: {int((~measured).sum())} matched requests not measured")
    first = components.get("T_total") or next(iter(components.values()), None)
    return TableComparison(
        first.verdict if first else None,
        components,
        tuple(name for name in columns if name not in components),
        tuple(keys),
        len(shared),
        lost[0],
        lost[1],
        tuple(notes),
    )


def between_sessions(
    found: TableComparison,
    drift: float,
    *,
    same: bool = False,
    repeated: Sequence[TableComparison] = (),
) -> TableComparison:
    """Widen a comparison of runs made one after the other by how far the machine drifts.

    Pairs of two sessions are not interleaved: a machine that got slower in between shifts all of
    them, and their interval, which knows only their scatter, calls that SLOWER in 62 to 76 % of
    simulated sessions (a drift of 3 %).

    Parameters
    ----------
    found : TableComparison
        Of two sessions (`compare_tables`).
    drift : float
        The largest drift between two sessions that is thought possible, 0.1 for 10 %.
    same : bool
        Whether both sessions were measured under the same conditions: then what differs is
        drift, and no verdict calls it FASTER or SLOWER.
    repeated : sequence of TableComparison
        Further sessions of the baseline's configuration against the baseline. From two on, three
        sessions in all, their spread replaces `drift`, component by component: Student's t times
        the standard deviation of log means between sessions, times √2.

    Returns
    -------
    TableComparison
        With every interval widened by the drift on both sides, and judged anew.

    Examples
    --------
    >>> import pandas as pd
    >>> before = pd.DataFrame({"request_id": list("abcdef"), "T_total": [10.0, 12, 20, 22, 9, 15]})
    >>> after = before.assign(T_total=1.08 * before["T_total"])
    >>> found = compare_tables(before, after)
    >>> found.verdict, between_sessions(found, 0.1).verdict, between_sessions(found, 0.05).verdict
    ('SLOWER', 'UNDECIDED', 'SLOWER')
    """
    components = {}
    for name, own in found.components.items():
        others = [
            math.log(other.components[name].ratio.value or math.nan)
            for other in repeated
            if name in other.components and (other.components[name].ratio.value or 0) > 0
        ]
        bound, source = drift, f"a drift of up to {drift:.0%} between sessions"
        if len(others) > 1:
            t = student(own.ratio.level, len(others))
            spread = float(np.std([0.0, *others], ddof=1))
            bound = math.expm1(t * spread * math.sqrt(2))
            source = f"the spread of {len(others) + 1} sessions of the baseline (± {bound:.1%})"
        components[name] = _widened(own, bound, source, same)
    first = components.get("T_total") or next(iter(components.values()), None)
    notes = list(found.notes)
    if same and first is not None and first.verdict != "SAME":
        notes.append(
            f"the same configuration: what differs is drift, × {first.ratio.value or math.nan:.2f}"
        )
    return replace(
        found, verdict=first.verdict if first else None, components=components, notes=tuple(notes)
    )


def _widened(own: Comparison, bound: float, source: str, same: bool) -> Comparison:
    ratio = own.ratio
    wide = replace(
        ratio,
        low=None if ratio.low is None else ratio.low / (1 + bound),
        high=None if ratio.high is None else ratio.high * (1 + bound),
        method=f"{ratio.method}, widened by {source}",
    )
    verdict, different, visible = _judged(wide, own.margin)
    note = f"not interleaved: the interval holds {source}"
    if same:
        verdict = "SAME" if own.verdict == "SAME" else "UNDECIDED"
        note = "the same configuration: what differs is drift"
    return replace(
        own,
        ratio=wide,
        verdict=verdict,
        different=different and not same,
        smallest_visible=visible,
        note="; ".join(filter(None, (own.note, note))),
    )


def _judged(ratio: Estimate, margin: float) -> tuple[Verdict, bool, float | None]:
    """Return the verdict, whether the interval excludes 1, and the smallest visible difference."""
    verdict: Verdict = "UNDECIDED"
    if ratio.within(1 - margin, 1 + margin):
        verdict = "SAME"
    elif ratio.below(1):
        verdict = "FASTER"
    elif ratio.above(1):
        verdict = "SLOWER"
    visible = None
    if ratio.low is not None and ratio.high is not None and ratio.low > 0:
        visible = math.sqrt(ratio.high / ratio.low) - 1
    return verdict, ratio.below(1) or ratio.above(1), visible


@dataclass(frozen=True)
class FalseAlarms(Result):
    """Share of A/A comparisons that saw a difference; see `a_a_false_alarms`."""

    share: Estimate
    alarms: int
    n_comparisons: int
    nominal: float


def a_a_false_alarms(
    comparisons: Iterable[tuple[ArrayLike, ArrayLike]], level: float = 0.95
) -> FalseAlarms:
    """Compare a configuration with itself many times and count the differences seen.

    Parameters
    ----------
    comparisons : iterable of (baseline, candidate)
        Paired latencies, both of the same configuration; 200 sets of at least 20 pairs tell 2 %
        from 5 % from 9 %.
    level : float
        Of the comparisons, and of the interval of the share (Clopper and Pearson 1934).

    Returns
    -------
    FalseAlarms
        `nominal` is 1 − level, which an honest comparison meets.

    Raises
    ------
    UserError
        When there are no comparisons.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> found = a_a_false_alarms(rng.lognormal(3, 0.1, (200, 2, 20)))
    >>> found.alarms, f"{found.share:.3f}"
    (9, '0.045 [0.021, 0.084]')
    """
    seen = [compare_paired(a, b, level).different for a, b in comparisons]
    if not seen:
        raise UserError("no comparisons found; expected at least one pair of lists")
    exact = scipy.stats.binomtest(sum(seen), len(seen))
    low, high = exact.proportion_ci(level, method="exact")
    share = Estimate(
        sum(seen) / len(seen), float(low), float(high), level, len(seen), "Clopper-Pearson"
    )
    return FalseAlarms(share, sum(seen), len(seen), round(1 - level, 12))


def _log_ratio(
    baseline: Floats, candidate: Floats, level: float, clusters: ArrayLike | None
) -> Estimate:
    logs = np.log(candidate) - np.log(baseline)
    codes = as_codes(clusters, logs.size)
    # The offset keeps "nothing varies" meaningful for ratios near 1, whose logarithm is near 0.
    shifted, error, groups = linearised(logs + 1, np.ones_like(logs), codes)
    mean = shifted - 1
    value = math.exp(mean)
    method = "t on log ratios" + ("" if clusters is None else f" over {groups} clusters")
    if groups < 2:
        note = f"an interval needs at least 2 pairs, found {groups}"
        return Estimate(value, None, None, level, logs.size, "none", note)
    half = student(level, groups - 1) * error
    note = "" if error else "every pair has the same ratio"
    return Estimate(
        value, math.exp(mean - half), math.exp(mean + half), level, logs.size, method, note
    )


def _keys(baseline: pd.DataFrame, candidate: pd.DataFrame, notes: list[str]) -> list[str]:
    keys = [name for name in REQUEST if name in baseline and name in candidate]
    if "request_id" in keys:
        if len(baseline[keys].merge(candidate[keys], on=keys)):
            return keys
        notes.append("no request in common: matched by shape")
    keys = [name for name in MATCHED_BY if name in baseline and name in candidate]
    if "num_vision_tokens" in keys and _holds_patches(baseline) != _holds_patches(candidate):
        keys.remove("num_vision_tokens")
        notes.append("num_vision_tokens of one table counts patches (crops × 576): not matched")
    if not keys:
        raise DataError(
            f"neither request_id nor a column of {', '.join(MATCHED_BY)} in both tables; give match_by"
        )
    return keys


def _holds_patches(df: pd.DataFrame) -> bool:
    if "num_crops" not in df:
        return False
    return bool((df["num_vision_tokens"] == df["num_crops"] * PATCHES_PER_CROP).all())


def _per_key(df: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Average the runs of each request; columns that are not numbers keep their first value."""
    grouped = df.groupby(keys[0] if len(keys) == 1 else keys, dropna=False)
    average = grouped.mean(numeric_only=True)
    if "image_id" in df and "image_id" not in keys:
        average["image_id"] = grouped["image_id"].first()
    return average


def _label(key: object) -> str:
    """Name a request by its id, a shape by all its numbers."""
    if not isinstance(key, tuple):
        return str(key)
    return key[0] if isinstance(key[0], str) else ", ".join(map(str, key))
