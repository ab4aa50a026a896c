"""Nodes of predict: latency of a workload, its composition, and what pruning could save at best."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from vlm_latency.errors import DataError, blaming
from vlm_latency.options import Options
from vlm_latency.pipelines.reporting.results import marks
from vlm_latency.records import COMPONENTS, SCHEMA_VERSION
from vlm_latency.results import entry_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vlm_latency.costs.prediction import Predictor
    from vlm_latency.models import ModelHandle


@blaming("the result of exp3 or exp4", "as 'kedro run' writes it")
def predict(
    settings: Options,
    model: ModelHandle,
    vision: dict[str, Any],
    language: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, pd.DataFrame], Figure]:
    """Predict the latency of a workload without running the model.

    Parameters
    ----------
    model
        Any of the zoo; only its architecture is read.
    vision, language
        Results of exp3 and exp4, on which the predictor is calibrated; they say what the machine
        that measured them can do at most.

    Returns
    -------
    result, tables, figure
        Latency with its interval and composition, latency over vision × output tokens, and what
        dropping vision tokens could win.
    """
    from vlm_latency.costs import CostModel
    from vlm_latency.costs.workload import latency_grid, predict_workload, pruning_table
    from vlm_latency.plots.notation import interval
    from vlm_latency.plots.prediction import predicted_latency
    from vlm_latency.plots.style import FigureContext, Style

    asked = settings.predict
    predictor, measured = _calibrated(settings, vision, language)
    costs = CostModel(model.architecture)
    workload = (asked.image, asked.prompt_tokens)
    found = predict_workload(
        costs, predictor, *asked.image, asked.prompt_tokens, asked.output_tokens
    )
    grid = latency_grid(
        costs, predictor, *workload, asked.vision_token_grid, asked.output_token_grid
    )
    pruning = pruning_table(
        costs, predictor, *workload, asked.output_tokens, asked.keep, asked.drop_layer
    )
    unit = predictor.interval
    assert unit is not None
    notes = [f"no interval: {unit.note}"] if unit.note else []
    notes += _extrapolations(predictor, found["extrapolated"], grid)
    notes += _elsewhere(predictor, model.options.name, measured)
    latency = replace(
        unit, value=found["T_total"], low=found["T_total_low"], high=found["T_total_high"]
    )
    statistics = {
        "latency": latency,
        "composition": {name: found[name] for name in COMPONENTS},
        "workload": (
            "{}x{} image, ".format(*asked.image)
            + f"{asked.prompt_tokens} prompt tokens, {asked.output_tokens} output tokens"
        ),
        "hardware": predictor.hardware.name,
        "dtype": predictor.dtype,
        "held_out_median_error": predictor.median_error,
        "held_out_mape": predictor.mape,
        "num_shapes": predictor.num_shapes,
        "notes": notes,
    }
    context = FigureContext(
        environment_line=(vision.get("environment") or {}).get("line", "environment not recorded"),
        marks=tuple(dict.fromkeys((*marks(vision), *marks(language), *notes))),
        model=str(model.options.name),
    )
    ends = {"T_total": "latency_ms", "T_total_low": "low_ms", "T_total_high": "high_ms"}
    figure = predicted_latency(
        grid.rename(columns={"T_total": "latency_ms"}),
        pruning.rename(columns={"place": "where", **ends}),
        statistics,
        context,
        Style.of(settings.experiment("predict").figures),
    )
    result = {
        "schema_version": SCHEMA_VERSION,
        "experiment": "predict",
        "model": model.options.name,
        "workload": {**asked.model_dump(mode="json"), "counts": found},
        "statistics": statistics,
        "finding": (
            f"{statistics['workload']}: {interval(latency, 'ms')} predicted without "
            "running it" + (", an extrapolation" if found["extrapolated"] else "")
        ),
        "grid": grid.to_dict("records"),
        "pruning": pruning.to_dict("records"),
        "environment": vision.get("environment"),
        "options": settings.model_dump(mode="json", include={"output_dir", "model", "predict"}),
    }
    return result, {"grid": grid, "pruning": pruning}, figure


def _calibrated(
    settings: Options, vision: dict[str, Any], language: dict[str, Any]
) -> tuple[Predictor, dict[str, Any]]:
    """Calibrate on both sweeps, for the dtype and device asked for; and tell what was measured."""
    from vlm_latency.costs import Hardware, hardware
    from vlm_latency.costs.prediction import calibrate_predictor

    ceilings = vision.get("ceilings")
    if not ceilings:
        raise DataError(
            "the result of exp3 does not say what its machine can do at most; predict needs the "
            "results of exp3 and exp4 that 'kedro run --pipeline phase2' writes"
        )
    entries = pd.concat(
        [entry_table(vision, "exp3"), entry_table(language, "exp4")], ignore_index=True
    )
    model = (vision.get("environment") or {}).get("model", {})
    dtype = model.get("dtype") or ceilings["dtype"]
    predictor = calibrate_predictor(entries, Hardware.from_ceilings(ceilings), dtype)
    if settings.model.dtype != "auto":
        predictor = replace(predictor, dtype=settings.model.dtype)
    if settings.predict.hardware:
        predictor = predictor.on(hardware(settings.predict.hardware))
    return predictor, {"name": model.get("name"), "dtype": dtype}


def _extrapolations(predictor: Predictor, asked: bool, grid: pd.DataFrame) -> list[str]:
    """Say what lies outside of the token counts that were measured."""
    ranges = ", ".join(
        f"{low:,.0f} … {high:,.0f} {name.removeprefix('num_').replace('_', ' ')}"
        for name, (low, high) in predictor.measured.items()
    )
    if asked:
        return [
            f"an extrapolation: measured were {ranges}; the interval knows nothing of what is "
            "outside. exp3 (exp3.sampling.max_grid_size) and exp4 "
            "(exp4.sampling.max_new_tokens_list) can measure more"
        ]
    if grid["extrapolated"].any():
        return [f"× in the map: outside of what was measured ({ranges})"]
    return []


def _elsewhere(predictor: Predictor, name: str | None, measured: dict[str, Any]) -> list[str]:
    """Say where another model, dtype or device was measured than the one asked for."""
    notes = []
    if measured["name"] not in (None, name):
        notes.append(
            f"calibrated on {measured['name']}, asked for {name}: an extrapolation, whose interval "
            "is only that of the calibrated model"
        )
    if predictor.dtype != measured["dtype"]:
        notes.append(
            f"calibrated in {measured['dtype']}, asked for {predictor.dtype}: the interval is no "
            "guarantee there"
        )
    if predictor.calibrated_on:
        notes.append(
            f"calibrated on {predictor.calibrated_on}, scaled to the published peaks of "
            f"{predictor.hardware.name}: the interval is no guarantee there"
        )
    return notes
