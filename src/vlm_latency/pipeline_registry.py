"""The table of experiments.

======== ======================================================================
exp1     latency distribution over VQA v2 questions
exp2     time and parameters of each component
exp3     vision tokens against latency
exp4     language tokens against latency
exp5     FLOPs against latency, from the results of exp3 and exp4
phase1   exp1, exp2
phase2   exp3, exp4, exp5
all      everything (the default)
======== ======================================================================

Beside them: ``calibration`` proves the instrument, ``predict`` asks the calibrated cost model,
``compare`` sets runs side by side.
"""

from __future__ import annotations

import warnings

from kedro.pipeline import Pipeline

from vlm_latency.pipelines import (
    calibration,
    compare,
    data_sampling,
    flops_estimation,
    measurement,
    options,
    predict,
    reporting,
)


def register_pipelines() -> dict[str, Pipeline]:
    """Give every pipeline by its name; a phase's experiments take turns on the device."""
    with warnings.catch_warnings():
        # An experiment that reads another's result reads across namespaces, and means to.
        warnings.filterwarnings("ignore", message="One or more dataset names contain '.'")
        return _pipelines()


def _pipelines() -> dict[str, Pipeline]:
    return {
        "exp1": _study("exp1"),
        "exp2": _study("exp2"),
        "exp3": _study("exp3"),
        "exp4": _study("exp4"),
        "exp5": _study("exp5"),
        "phase1": _study("exp1", "exp2"),
        "phase2": _study("exp3", "exp4", "exp5"),
        "all": _study("exp1", "exp2", "exp3", "exp4", "exp5"),
        "calibration": calibration.create_pipeline()
        + reporting.create_page(["calibration.result"]),
        "predict": predict.create_pipeline() + reporting.create_page(["predict.result"]),
        "compare": compare.create_pipeline() + reporting.create_page(["compare.result"]),
        "__default__": _study("exp1", "exp2", "exp3", "exp4", "exp5"),
    }


def _study(*experiments: str) -> Pipeline:
    """Chain experiments: each is measured when the results of the one before are on disk."""
    before = dict(zip(experiments[1:], experiments, strict=False))
    parts = [
        _experiment(name, before.get(name), chained="exp3" in experiments) for name in experiments
    ]
    page = reporting.create_page([f"{name}.result" for name in experiments])
    start = Pipeline([]) if experiments == ("exp5",) else calibration.ceilings()
    return sum(parts, start) + page


def _experiment(name: str, before: str | None, chained: bool) -> Pipeline:
    """Compose one experiment of the four modular pipelines, under its namespace.

    Parameters
    ----------
    before
        The experiment whose results must be on disk before this one measures.
    chained
        Whether exp5 reads what exp3 and exp4 of the same command made, rather than files.
    """
    stages = {"options": options.create_pipeline(name)}
    if name != "exp5":
        stages |= {
            "data_sampling": data_sampling.create_pipeline(),
            "measurement": measurement.create_pipeline(takes_turns=before is not None),
            "flops_estimation": flops_estimation.create_pipeline(),
        }
    stages["reporting"] = reporting.create_pipeline(name)
    boxes = [
        Pipeline(stage, namespace=box, prefix_datasets_with_namespace=False)
        for box, stage in stages.items()
    ]
    parts = sum(boxes, Pipeline([]))
    outer = {"model": "model", "questions": "questions", "ceilings": "ceilings"}
    outer |= {"after": f"{before}.result"}
    outer |= {"vision": "exp3.result", "language": "exp4.result"} if chained else {}
    inputs = {inner: dataset for inner, dataset in outer.items() if inner in parts.inputs()}
    return Pipeline(parts, namespace=name, inputs=inputs, tags=name)
