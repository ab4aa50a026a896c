"""Costs as columns of the record: every run with its FLOPs, bytes, roofline and utilisation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from vlm_latency.costs.hardware import Hardware, as_hardware
from vlm_latency.costs.model import CostModel, differences
from vlm_latency.costs.roofline import roofline_ms, utilisation
from vlm_latency.costs.shapes import PARTS, TIMES, RequestShape
from vlm_latency.errors import UserError

logger = logging.getLogger(__name__)

ESTIMATORS = {"analytic": "analytic", "counted": "counted", "parameter_rule": "rule"}
NEEDED = ("num_total_tokens", "num_vision_tokens", "num_crops", "num_vision_patches")


def add_costs(
    records: pd.DataFrame,
    architecture: Any,
    *,
    estimator: str = "analytic",
    counted: bool = True,
    hardware: Hardware | Mapping[str, Any] | str | None = None,
    dtype: str,
) -> pd.DataFrame:
    """Give every run its costs; what a shape costs is computed once.

    Parameters
    ----------
    records : DataFrame
        Measured runs (see `vlm_latency.records`). Rows without token counts (failed runs) get none.
    architecture : Architecture
    estimator : str
        "analytic", "counted" or "parameter_rule": which one fills ``flops_*``.
    counted : bool
        Count on the meta device too, and warn of every part where it differs from `analytic`.
    hardware : Hardware, name of a row of the table, measured ceilings, or None
        None leaves the roofline out.
    dtype : str
        The model's.

    Returns
    -------
    DataFrame
        The same rows with, for each part (``vision``, ``projector``, ``llm_prefill``,
        ``llm_decode``, ``total``): ``flops_*`` (FLOP), also with the suffixes ``_rule``,
        ``_analytic``, ``_analytic_causal`` and ``_counted``; ``bytes_*``; ``launches_*``;
        ``arithmetic_intensity_*`` (FLOP per byte); ``roofline_ms_*``; ``roofline_bound_*``
        ("compute", "memory" or "launch"; not of the total); ``mfu_*`` and ``mbu_*`` (shares of
        the peak, from the measured times); and ``predicted_kv_cache_bytes``,
        ``predicted_peak_memory_bytes``.

    Raises
    ------
    UserError
        For an unknown estimator, dtype or device.
    """
    if estimator not in ESTIMATORS:
        raise UserError(f"found flops.estimator {estimator!r}; expected {', '.join(ESTIMATORS)}")
    machine = as_hardware(hardware)
    costs = CostModel(architecture)
    known = records[[*NEEDED, "num_output_tokens"]].notna().all(axis=1).to_numpy()
    columns = cost_columns(
        costs,
        RequestShape.of_table(records.loc[known]),
        estimator=estimator,
        counted=counted or estimator == "counted",
        hardware=machine,
        dtype=dtype,
    )
    added = pd.DataFrame(columns, index=records.index[known]).reindex(records.index)
    for name in added:
        if str(name).startswith(("flops_", "bytes_", "launches_", "predicted_")):
            added[name] = added[name].astype("Int64")
    if machine is not None:
        for part, column in TIMES.items():
            if column in records:
                time = records[column].to_numpy(dtype=float)
                flops = added[f"flops_{part}_analytic"].to_numpy(dtype=float, na_value=np.nan)
                moved = added[f"bytes_{part}"].to_numpy(dtype=float, na_value=np.nan)
                added[f"mfu_{part}"] = utilisation(flops, time, machine.peak(dtype))
                added[f"mbu_{part}"] = utilisation(moved, time, machine.bytes_per_s)
    kept = records.drop(columns=[name for name in added if name in records])
    return pd.concat([kept, added], axis=1)


def cost_columns(
    costs: CostModel,
    shape: RequestShape,
    *,
    estimator: str,
    counted: bool,
    hardware: Hardware | None,
    dtype: str,
) -> dict[str, Any]:
    """Everything that follows from shapes alone, by column name; arrays as long as `shape`'s."""
    flops = {name: costs.flops(shape, name) for name in ("rule", "analytic", "analytic_causal")}
    if counted:
        flops["counted"] = _where_it_runs("FLOPs", lambda: costs.flops(shape, "counted"))
        for part, gap in differences(flops["analytic"], flops["counted"]).items():
            logger.warning("%s: counted FLOPs differ from analytic ones by up to %d", part, gap)
    launches = _where_it_runs("launches", lambda: costs.launches(shape))
    chosen = flops[ESTIMATORS[estimator]]
    moved = costs.bytes_moved(shape, dtype)
    columns: dict[str, Any] = {}
    for part in (*PARTS, "total"):
        columns[f"flops_{part}"] = chosen[part]
    for name, values in flops.items():
        for part in (*PARTS, "total"):
            columns[f"flops_{part}_{name}"] = values[part]
    for part in (*PARTS, "total"):
        columns[f"bytes_{part}"] = moved[part]
        columns[f"launches_{part}"] = launches[part]
        with np.errstate(invalid="ignore", divide="ignore"):
            columns[f"arithmetic_intensity_{part}"] = np.divide(chosen[part], moved[part])
    if hardware is not None:
        bounds = []
        for part in PARTS:
            # The executed work bounds the time, whichever estimator fills flops_*.
            work = flops["analytic"][part]
            started = np.nan_to_num(launches[part])
            bound, side = roofline_ms(work, moved[part], started, hardware, dtype)
            columns[f"roofline_ms_{part}"], columns[f"roofline_bound_{part}"] = bound, side
            bounds.append(bound)
        columns["roofline_ms_total"] = sum(bounds)
    columns["predicted_kv_cache_bytes"] = costs.kv_cache_bytes(shape, dtype)
    columns["predicted_peak_memory_bytes"] = costs.peak_memory_bytes(shape, dtype)
    return columns


def _where_it_runs(what: str, count: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is counted by running on shapes; NaN, and a warning, for a model that does not run so."""
    try:
        return count()
    except Exception as error:  # whatever an unknown model's code raises on the meta device
        logger.warning("%s cannot be counted on the meta device: %s", what, error)
        return dict.fromkeys((*PARTS, "total"), np.nan)
