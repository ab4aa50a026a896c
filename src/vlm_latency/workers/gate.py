"""Check that a run takes as long in a worker as it does without one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vlm_latency.errors import MeasurementError
from vlm_latency.records import Row
from vlm_latency.statistics import Comparison, compare_paired

MARGIN = 0.01
Run = Callable[[Row], Row]


def gate(
    here: Run,
    there: Run,
    rows: Sequence[Row],
    *,
    pairs: int,
    seconds: float,
    half_width: float,
    seed: int = 0,
) -> Comparison:
    """Run the same requests in this process and in a worker, in turn, in a random order.

    Parameters
    ----------
    here, there
        Make one run and give its row.
    rows
        The requests, one pair after the other.
    pairs
        At least so many; more until the interval's half-width is `half_width`, or `seconds` passed.

    Returns
    -------
    Comparison
        ``T_total`` in the worker over that in this process; SAME is within ± 1 %.

    Raises
    ------
    MeasurementError
        When a run failed.
    """
    generator = np.random.default_rng(seed)
    times: tuple[list[float], list[float]] = ([], [])
    start = time.perf_counter()
    while True:
        row = rows[len(times[0]) % len(rows)]
        for which in generator.permutation(2):
            run = (here, there)[which](row)
            if run["status"] != "ok":
                raise MeasurementError(f"a run failed beside a worker: {run['error']}")
            times[which].append(float(run["T_total"]))
        late = time.perf_counter() - start > seconds
        if len(times[0]) < (2 if late else pairs):
            continue
        found = compare_paired(*times, margin=MARGIN)
        low, high = found.ratio.low, found.ratio.high
        if late or (low is not None and high is not None and high - low <= 2 * half_width):
            return found


def sentence(found: Comparison, same_device: bool) -> str:
    """Say whether workers may stand for a measurement without them."""
    ratio = f"{found.ratio:.4f}"
    where = "" if same_device else ", on another device of the kind,"
    said = f"a run in a worker{where} takes {ratio} times as long as one without ({found.n_pairs} pairs)"
    if found.verdict == "SAME":
        return f"{said}: within 1 %"
    if found.verdict == "UNDECIDED":
        return f"{said}: whether that is within 1 % cannot be said with so many pairs"
    return f"{said}: workers change what is measured here, compare runs of workers with each other only"


def comparison(
    pool: Any, inline: Any, work: Any, rows: Sequence[Row], **how: Any
) -> tuple[Comparison, bool]:
    """Compare a worker of a pool with a `Worker` that lives in this process.

    Returns
    -------
    comparison, same device
        The worker on the same device is taken, where there is one.
    """
    own = inline.describe()["device_name"]
    alike = [one["index"] for one in pool.workers if one["device_name"] == own]
    index = alike[0] if alike else pool.workers[0]["index"]
    inline.open(work)
    try:
        pool.call(index, "open", work)
        found = gate(inline.run, lambda row: pool.call(index, "run", row), rows, **how)
        pool.call(index, "close")
    finally:
        inline.close()
    return found, bool(alike)
