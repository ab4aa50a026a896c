"""Which runs are made, in which order, and how many tokens each of them writes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from vlm_latency.errors import DataError
from vlm_latency.options import MeasurementOptions
from vlm_latency.records import Row


def plan(requests: pd.DataFrame, measurement: MeasurementOptions) -> pd.DataFrame:
    """List the runs in the order in which they are made.

    ``order=blocks``: every block holds every request once, in a random order of its own, so that
    drift hits all shapes alike. ``order=ascending``: the requests as they come, all runs of one
    after the other. ``noise_repeats`` requests, drawn at random, are run once more, anywhere in
    the last block.

    Parameters
    ----------
    requests
        A table with unique ``request_id``.

    Returns
    -------
    DataFrame
        ``request_id, run_index, block_index, order_index``.

    Raises
    ------
    DataError
        When two requests share their id.

    Examples
    --------
    >>> requests = pd.DataFrame({"request_id": ["a", "b"]})
    >>> plan(requests, MeasurementOptions(num_runs=2, order="ascending")).run_index.tolist()
    [0, 1, 0, 1]
    """
    ids = requests["request_id"].to_numpy(dtype=object)
    if len(set(ids)) != len(ids):
        twice = requests["request_id"][requests["request_id"].duplicated()].iloc[0]
        raise DataError(f"request_id {twice!r} stands for two requests; expected unique ids")
    generator = np.random.default_rng(measurement.seed)
    count, runs = len(ids), measurement.num_runs
    repeated = generator.permutation(count)[: measurement.noise_repeats or 0]
    if measurement.order == "ascending":
        which = np.concatenate([np.repeat(np.arange(count), runs), repeated])
        run = np.concatenate([np.tile(np.arange(runs), count), np.full(len(repeated), runs)])
        block = np.zeros(len(which), int)
    else:
        parts = []
        for index in range(runs):
            own = np.stack([np.arange(count), np.full(count, index), np.full(count, index)])
            if index == runs - 1:
                extra = [repeated, np.full(len(repeated), runs), np.full(len(repeated), index)]
                own = np.concatenate([own, np.stack(extra)], axis=1)
            parts.append(own[:, generator.permutation(own.shape[1])])
        which, run, block = np.concatenate(parts, axis=1)
    return pd.DataFrame(
        {
            "request_id": ids[which],
            "run_index": run,
            "block_index": block,
            "order_index": np.arange(len(which)),
        }
    )


def output_rule(
    request: Row,
    options: MeasurementOptions,
    count_tokens: Callable[[str], int],
) -> tuple[int, bool]:
    """Turn a request's ``output_length`` into a number of tokens.

    Returns
    -------
    tuple
        How many tokens, and whether the end-of-sequence token may stop earlier: ``none`` is one
        token (prefill only), ``answer`` the length of the ground-truth answer, ``natural`` up to
        ``measurement.max_new_tokens``, a number exactly that, ``≤`` and a number at most that.

    Raises
    ------
    DataError
        For ``answer`` where the request has none.
    """
    rule = str(request["output_length"])
    if rule == "none":
        return 1, False
    if rule == "natural":
        return options.max_new_tokens, True
    if rule.startswith("≤"):
        return int(rule[1:]), True
    if rule != "answer":
        return int(rule), False
    answer = request.get("answer")
    if answer is None:
        raise DataError(
            "output_length=answer needs the ground-truth answer, which this request has not; use "
            "a number or natural"
        )
    return max(1, count_tokens(answer)), False
