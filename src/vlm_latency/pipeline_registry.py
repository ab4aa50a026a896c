"""The pipelines: every experiment of `vlm_latency.experiments`, the phases, ``all``, the analyses.

Several names with commas between them are one pipeline, in which an experiment that reads another's
result reads the one of the same command: ``exp1,exp3``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
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


def register_pipelines() -> Mapping[str, Pipeline]:
    """Give every pipeline by its name; in one command they run in turn (`hooks`)."""
    phases = dict.fromkeys(row.phase for row in EXPERIMENTS.values())
    return _Pipelines((*EXPERIMENTS, *phases, "all", "__default__", *ANALYSES))


class _Pipelines(Mapping[str, Pipeline]):
    """Pipelines by name, or by several names with commas between; composed when asked for."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(dict.fromkeys(names))
        self._composed: dict[str, Pipeline] = {}

    def __getitem__(self, names: str) -> Pipeline:
        parts = names.split(",")
        if not set(parts) <= set(self._names):
            raise KeyError(names)
        if names not in self._composed:
            self._composed[names] = _compose(*parts)
        return self._composed[names]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _compose(*names: str) -> Pipeline:
    """Chain what is named: experiments in the order of their table, then the analyses."""
    rows = [row for row in EXPERIMENTS.values() if any(_names(name, row) for name in names)]
    with warnings.catch_warnings():
        # An experiment that reads another's result reads across namespaces, and means to.
        warnings.filterwarnings("ignore", message="One or more dataset names contain '.'")
        return _study(rows, [name for name in ANALYSES if name in names])


def _names(name: str, row: Experiment) -> bool:
    return name in (row.name, row.phase) or (name in ("all", "__default__") and row.phase in ALL)


def _study(rows: Sequence[Experiment], analyses: Sequence[str]) -> Pipeline:
    """Put experiments and analyses together, with a page over what they make."""
    names = [row.name for row in rows]
    parts = [_experiment(row, names) for row in rows]
    parts += [_analysis(name, names) for name in analyses]
    page = reporting.create_page([f"{name}.result" for name in (*names, *analyses)])
    start = calibration.ceilings() if any(row.measures for row in rows) else Pipeline([])
    return sum(parts, start) + page


def _analysis(name: str, together: Sequence[str]) -> Pipeline:
    """Give an analysis; an earlier result that the same command makes is taken from it."""
    own: Pipeline = import_module(f"vlm_latency.pipelines.{name}").create_pipeline()
    made = {
        f"{row.name}.{dataset}": f"{maker}.result"
        for row in EXPERIMENTS.values()
        for dataset, maker in row.earlier.items()
        if maker in together and f"{row.name}.{dataset}" in own.inputs()
    }
    return Pipeline(own, inputs=made)


def _experiment(row: Experiment, together: Sequence[str]) -> Pipeline:
    """Compose one experiment of the four modular pipelines, under its namespace.

    Parameters
    ----------
    together
        The experiments of the same command: an earlier result that one of them makes is taken from
        it, rather than from a file.
    """
    stages = {"options": options.create_pipeline(row.name)}
    if row.measures:
        stages |= {
            "data_sampling": data_sampling.create_pipeline(),
            "measurement": measurement.create_pipeline(),
            "flops_estimation": flops_estimation.create_pipeline(),
        }
    stages["reporting"] = reporting.create_pipeline(row.name)
    boxes = [
        Pipeline(stage, namespace=box, prefix_datasets_with_namespace=False)
        for box, stage in stages.items()
    ]
    parts = sum(boxes, Pipeline([]))
    outer = {name: name for name in ("settings", "model", "questions", "ceilings")}
    outer |= {
        dataset: f"{maker}.result" for dataset, maker in row.earlier.items() if maker in together
    }
    inputs = {inner: dataset for inner, dataset in outer.items() if inner in parts.inputs()}
    return Pipeline(parts, namespace=row.name, inputs=inputs, tags=row.name)
