"""The pipelines: every experiment of `vlm_latency.experiments`, the phases, ``all``, the analyses."""

from __future__ import annotations

import warnings
from importlib import import_module

from kedro.pipeline import Pipeline

from vlm_latency.experiments import ALL, ANALYSES, EXPERIMENTS, Experiment
from vlm_latency.pipelines import (
    calibration,
    data_sampling,
    flops_estimation,
    measurement,
    options,
    reporting,
)


def register_pipelines() -> dict[str, Pipeline]:
    """Give every pipeline by its name; a phase's experiments take turns on the device."""
    with warnings.catch_warnings():
        # An experiment that reads another's result reads across namespaces, and means to.
        warnings.filterwarnings("ignore", message="One or more dataset names contain '.'")
        return _pipelines()


def _pipelines() -> dict[str, Pipeline]:
    rows = EXPERIMENTS.values()
    found = {row.name: _study(row) for row in rows}
    for phase in dict.fromkeys(row.phase for row in rows):
        found[phase] = _study(*(row for row in rows if row.phase == phase))
    found["all"] = found["__default__"] = _study(*(row for row in rows if row.phase in ALL))
    for name in ANALYSES:
        own: Pipeline = import_module(f"vlm_latency.pipelines.{name}").create_pipeline()
        found[name] = own + reporting.create_page([f"{name}.result"])
    return found


def _study(*rows: Experiment) -> Pipeline:
    """Chain experiments: each is measured when the results of the one before are on disk."""
    names = [row.name for row in rows]
    before = dict(zip(names[1:], names, strict=False))
    parts = [_experiment(row, before.get(row.name), names) for row in rows]
    page = reporting.create_page([f"{name}.result" for name in names])
    start = calibration.ceilings() if any(row.measures for row in rows) else Pipeline([])
    return sum(parts, start) + page


def _experiment(row: Experiment, before: str | None, together: list[str]) -> Pipeline:
    """Compose one experiment of the four modular pipelines, under its namespace.

    Parameters
    ----------
    before
        The experiment whose results must be on disk before this one measures.
    together
        The experiments of the same command: an earlier result that one of them makes is taken from
        it, rather than from a file.
    """
    stages = {"options": options.create_pipeline(row.name)}
    if row.measures:
        stages |= {
            "data_sampling": data_sampling.create_pipeline(),
            "measurement": measurement.create_pipeline(takes_turns=before is not None),
            "flops_estimation": flops_estimation.create_pipeline(),
        }
    stages["reporting"] = reporting.create_pipeline(row.name)
    boxes = [
        Pipeline(stage, namespace=box, prefix_datasets_with_namespace=False)
        for box, stage in stages.items()
    ]
    parts = sum(boxes, Pipeline([]))
    outer = {name: name for name in ("settings", "model", "questions", "ceilings")}
    outer |= {"after": f"{before}.result"}
    outer |= {
        dataset: f"{maker}.result" for dataset, maker in row.earlier.items() if maker in together
    }
    inputs = {inner: dataset for inner, dataset in outer.items() if inner in parts.inputs()}
    return Pipeline(parts, namespace=row.name, inputs=inputs, tags=row.name)
