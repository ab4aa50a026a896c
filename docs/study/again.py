"""What the project's code says today of the published runs: exp1 to exp5, from the table alone."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from gather import slim, write

from vlm_latency.experiments import EXPERIMENTS, studies
from vlm_latency.options import ExperimentOptions
from vlm_latency.pipelines.reporting import exp1, exp2, exp3, exp4, exp5
from vlm_latency.results import read_json, read_run, result_path
from vlm_latency.statistics.results import plain

OF_RUNS = {"exp1": exp1, "exp2": exp2, "exp3": exp3, "exp4": exp4}
OF_MEASURING = ("environment", "options", "coverage", "model", "parameters", "ceilings")
NOT_PUBLISHED = ("question", "answers", "generated_text")  # of the requests


def reported(result: dict[str, Any], name: str, rows: pd.DataFrame) -> dict[str, Any]:
    """Report anew on the published runs of one experiment, as its result is published.

    Counts of parameters, ceilings and what the measuring commands said of themselves are those of
    the result: they are no statistics of the runs.
    """
    requests = rows.drop_duplicates("request_id")
    requests = requests.assign(synthetic=True, **dict.fromkeys(NOT_PUBLISHED))
    counts = SimpleNamespace(to_dict=lambda: result["parameters"])
    known = {
        "options": _options(result, name),
        "records": rows.assign(generated_text=None),
        "requests": requests,
        "given_requests": requests,
        "coverage": result["coverage"],
        "environment": result["environment"],
        "ceilings": result.get("ceilings") or {},
        "model": SimpleNamespace(architecture=SimpleNamespace(parameters=counts)),
    }
    report = OF_RUNS[name].report
    found = report(**{key: known[key] for key in inspect.signature(report).parameters})
    return _published(found, name)


def related(result: dict[str, Any], vision: dict[str, Any], language: dict[str, Any]) -> Any:
    """Report anew on FLOPs and latency, from what is published of exp3 and exp4."""
    return _published(exp5.report(_options(result, "exp5"), vision, language), "exp5")


def refresh(study: Path) -> None:
    """Write the published results again."""
    for folder in sorted({path.parents[1] for path in study.glob("*/exp*/*.json")}):
        tables = read_run(folder).tables
        paths = {name: path for name in studies() if (path := result_path(folder, name)).is_file()}
        for name in OF_RUNS.keys() & paths.keys():
            old = read_json(paths[name])
            write(paths[name], {**old, **reported(old, name, tables[name])})
        if {"exp3", "exp4", "exp5"} <= paths.keys():
            old, vision, language = (read_json(paths[name]) for name in ("exp5", "exp3", "exp4"))
            write(paths["exp5"], {**old, **related(old, vision, language)})


def _options(result: dict[str, Any], name: str) -> ExperimentOptions[Any]:
    row = EXPERIMENTS[name]
    settled = ExperimentOptions[row.sampling] if row.sampling else ExperimentOptions
    options = dict(result["options"])
    own = row.own.model_validate(options.pop("own", {}))
    return settled.model_validate(options).model_copy(update={"own": own})


def _published(found: tuple[Any, ...], name: str) -> dict[str, Any]:
    plt.close("all")
    data: dict[str, Any] = slim(json.loads(json.dumps(plain(found[0]))), name)
    return {key: value for key, value in data.items() if key not in OF_MEASURING}
