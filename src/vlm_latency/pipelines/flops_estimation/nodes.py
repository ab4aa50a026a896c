"""What the runs should have cost: FLOPs by every estimator, bytes moved, the roofline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from vlm_latency.options import ExperimentOptions

if TYPE_CHECKING:
    from vlm_latency.models import ModelHandle


def estimate(
    options: ExperimentOptions,
    measurements: pd.DataFrame,
    model: ModelHandle,
    ceilings: dict[str, Any],
) -> pd.DataFrame:
    """Add the cost columns to the runs.

    Parameters
    ----------
    measurements
        One row per run, columns ``records.MEASURED_COLUMNS``.
    model
        Only its architecture is read: no weights.
    ceilings
        What this machine can do (``instrument.calibration.ceilings``).

    Returns
    -------
    DataFrame
        The same rows with ``flops_*``, ``bytes_*`` and ``roofline_ms_*`` columns.
    """
    from vlm_latency.costs import add_costs

    return add_costs(
        measurements,
        model.architecture,
        estimator=options.flops.estimator,
        counted=options.flops.counted,
        hardware=ceilings or None,
        dtype=model.dtype,
    )
