"""A plan on all workers: their rows in one order, their failures counted together."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pandas as pd

from vlm_latency.errors import MeasurementError
from vlm_latency.instrument.protocol import Progress
from vlm_latency.workers.pool import Chunk, Deal, Pool, unlike
from vlm_latency.workers.worker import Work


def measure(
    pool: Pool,
    work: Work,
    left: pd.DataFrame,
    deal: Deal,
    *,
    planned: int,
    first_order: int = 0,
    first_worker: int = 1,
    progress: bool = True,
) -> Iterator[Chunk]:
    """Make the runs that are left of a plan on all workers.

    Parameters
    ----------
    deal
        Assigns each run to one of a number of workers (`shards.deal`).
    first_order, first_worker
        Where ``order_index`` and ``worker_index`` begin.

    Yields
    ------
    rows, session
        Rows as they come, ``order_index`` is the order of coming; what each worker, and at last
        all of them together, have to say.

    Raises
    ------
    MeasurementError
        As `instrument.protocol.measure`, for all workers together, and as `Pool.measure`.
    """
    share = work.measurement.max_failures
    allowed = math.ceil(share * planned)
    alone = work.measurement.model_copy(update={"max_failures": 1.0})
    work = Work(**{**vars(work), "measurement": alone})
    order, runs, failures, error = first_order, 0, 0, ""
    with Progress(
        total=planned, initial=planned - len(left), unit="run", disable=not progress
    ) as bar:
        for rows, session in pool.measure(work, left, deal, bar.set_description_str):
            bar.set_description_str(f"{pool.count} workers", refresh=False)
            for row in rows:
                row["order_index"] = order
                row["worker_index"] += first_worker - 1
                order += 1
                if row["status"] == "failed":
                    failures, error = failures + 1, row["error"]
            runs += len(rows)
            bar.update(len(rows))
            yield rows, session
            if failures > allowed:
                raise MeasurementError(
                    f"{failures} of {runs} runs failed, more than measurement.max_failures={share:g} "
                    f"of {planned} allows; the last error: {error}"
                )
    yield [], {"workers": pool.workers, "notes": unlike(pool.workers)}
