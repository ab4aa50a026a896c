"""Costs as columns of the record: every run with its FLOPs, bytes, roofline and utilisation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from vlm_latency.costs.bytes_moved import element_bytes
from vlm_latency.costs.hardware import Hardware, as_hardware
from vlm_latency.costs.model import CostModel, differences, without
from vlm_latency.costs.roofline import roofline_ms, utilisation
from vlm_latency.costs.shapes import PARTS, RequestShape
from vlm_latency.errors import UserError
from vlm_latency.records import COST_PARTS, COST_TIMES, ESTIMATORS

logger = logging.getLogger(__name__)

# A share of the peak that no measurement error explains: ceilings are measured to some per cent.
BEYOND = 1.25
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
        ``predicted_peak_memory_bytes``. What is not known of a model is null, and ``costs_note``
        says why; null there where all is known and, with `counted`, confirmed.

    Raises
    ------
    UserError
        For an unknown estimator, dtype or device.
    """
    if estimator not in ESTIMATORS:
        raise UserError(f"found flops.estimator {estimator!r}; expected {', '.join(ESTIMATORS)}")
    machine = as_hardware(hardware)
    element_bytes(dtype)
    costs = CostModel(architecture)
    known = records[[*NEEDED, "num_output_tokens"]].notna().all(axis=1).to_numpy()
    shape = RequestShape.of_table(records.loc[known])
    counted = counted or estimator == "counted"
    try:
        columns = cost_columns(
            costs, shape, estimator=estimator, counted=counted, hardware=machine, dtype=dtype
        )
    except UserError as error:
        logger.warning("%s", error)
        columns = _no_columns(str(error), counted, machine)
    added = pd.DataFrame(columns, index=records.index[known]).reindex(records.index)
    for name in added:
        if str(name).startswith(("flops_", "bytes_", "launches_", "predicted_")):
            added[name] = added[name].astype("Int64")
    if machine is not None:
        for part, column in COST_TIMES.items():
            if column in records:
                time = records[column].to_numpy(dtype=float)
                flops = added[f"flops_{part}_analytic"].to_numpy(dtype=float, na_value=np.nan)
                moved = added[f"bytes_{part}"].to_numpy(dtype=float, na_value=np.nan)
                added[f"mfu_{part}"] = utilisation(flops, time, machine.peak(dtype))
                added[f"mbu_{part}"] = utilisation(moved, time, machine.bytes_per_s)
        added["costs_note"] = _impossible(added)
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
    """Compute all that follows from shapes alone, by column name; arrays as long as `shape`'s."""
    flops, unknown, notes = _all_flops(costs, shape, counted)
    launches = _where_it_runs("launches", lambda: costs.launches(shape), notes)
    chosen = flops[ESTIMATORS[estimator].removeprefix("_")]
    if estimator == "analytic" and counted and unknown:
        chosen = {part: flops["counted" if part in unknown else "analytic"][part] for part in PARTS}
        chosen["total"] = sum(chosen.values())
        for part in unknown:
            if np.isfinite(np.asarray(chosen[part], dtype=float)).all():
                unknown[part] += f" (flops_{part} is the counted number)"
    moved = without(costs.bytes_moved(shape, dtype), unknown)
    columns: dict[str, Any] = {}
    for part in COST_PARTS:
        columns[f"flops_{part}"] = chosen[part]
    for name, values in flops.items():
        for part in COST_PARTS:
            columns[f"flops_{part}_{name}"] = values[part]
    for part in COST_PARTS:
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
    notes += [f"{part}: {reason}" for part, reason in unknown.items()]
    columns["costs_note"] = "; ".join(dict.fromkeys(notes)) or None
    return columns


def _all_flops(
    costs: CostModel, shape: RequestShape, counted: bool
) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """FLOPs by estimator; by part, why its analytic ones are not known; what is not verified."""
    flops = {name: costs.flops(shape, name) for name in ("rule", "analytic", "analytic_causal")}
    unknown, notes = dict(costs.unknown), list[str]()
    if counted:
        flops["counted"] = _where_it_runs("FLOPs", lambda: costs.flops(shape, "counted"), notes)
        for part, gap in differences(flops["analytic"], flops["counted"]).items():
            logger.warning("%s: counted FLOPs differ from analytic ones by up to %d", part, gap)
            unknown[part] = f"counted FLOPs differ from analytic ones by up to {gap:,}"
        if not notes and (gap_of_whole := costs.does_not_add_up(shape)):
            logger.warning("%s", gap_of_whole)
            unknown |= dict.fromkeys(PARTS, gap_of_whole)
            flops["counted"] = without(flops["counted"], PARTS)
    for name in ("analytic", "analytic_causal"):
        flops[name] = without(flops[name], unknown)
    return flops, unknown, notes


def _no_columns(reason: str, counted: bool, hardware: Hardware | None) -> dict[str, Any]:
    """The same columns, empty, of a model whose costs are not known at all."""
    names = ["predicted_kv_cache_bytes", "predicted_peak_memory_bytes"]
    kinds = ["", "_rule", "_analytic", "_analytic_causal", *(["_counted"] if counted else [])]
    for part in COST_PARTS:
        names += [f"flops_{part}{kind}" for kind in kinds]
        names += [f"{what}_{part}" for what in ("bytes", "launches", "arithmetic_intensity")]
        if hardware is not None:
            names.append(f"roofline_ms_{part}")
    columns: dict[str, Any] = dict.fromkeys(names, np.nan)
    if hardware is not None:
        columns |= {f"roofline_bound_{part}": None for part in PARTS}
    return {**columns, "costs_note": reason}


def _impossible(added: pd.DataFrame) -> pd.Series:
    """Note on each run the parts that were quicker than their work can be done."""
    notes = added["costs_note"].astype("string")
    for part in PARTS:
        share = added.get(f"mfu_{part}")
        if share is not None and (beyond := (share > BEYOND).to_numpy()).any():
            said = (
                f"{part}: above {BEYOND:.0%} of what the machine can do; part of the work was not "
                "done (cached image features?), or the machine's limit is set too low"
            )
            notes[beyond] = (notes[beyond] + "; ").fillna("") + said
    return notes


def _where_it_runs(
    what: str, count: Callable[[], dict[str, Any]], notes: list[str]
) -> dict[str, Any]:
    """What is counted by running on shapes; NaN, and a note, for a model that does not run so."""
    try:
        return count()
    except Exception as error:  # whatever an unknown model's code raises on the meta device
        logger.warning("%s cannot be counted on the meta device: %s", what, error)
        reason = " ".join(str(error).split()) or type(error).__name__
        notes.append(f"not verified: {what} cannot be counted on the meta device: {reason}")
        return dict.fromkeys(COST_PARTS, np.nan)
