"""From requests to runs: what is still missing is measured, nothing that was measured is lost."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pandas as pd

from vlm_latency.errors import MeasurementError
from vlm_latency.journal import RUN
from vlm_latency.options import ExperimentOptions
from vlm_latency.records import MEASURED_COLUMNS, typed

if TYPE_CHECKING:
    from vlm_latency.datasets.record_log import Chunk
    from vlm_latency.journal import Journal
    from vlm_latency.models import ModelHandle
    from vlm_latency.vqa import QuestionSource

log = logging.getLogger("vlm_latency")


def describe_environment(
    options: ExperimentOptions, model: ModelHandle, questions: QuestionSource, after: Any = None
) -> dict[str, Any]:
    """Record on what, and under which conditions, the experiment is measured.

    Parameters
    ----------
    after
        The result of the experiment before; that it is there is all that matters.

    Returns
    -------
    dict
        The environment; ``conditions`` in it is what could change a number, and ``fingerprint``
        its hash.
    """
    from vlm_latency.instrument.environment import environment, fingerprint

    found = environment(
        options.model,
        options.measurement,
        architecture=model.architecture,
        dataset=questions.describe(),
        template=options.prompt.template,
    )
    return {**found, "fingerprint": fingerprint(found["conditions"])}


def measure(
    options: ExperimentOptions,
    requests: pd.DataFrame,
    model: ModelHandle,
    questions: QuestionSource,
    environment: dict[str, Any],
    journal: Journal,
) -> Iterator[Chunk]:
    """Measure the runs that the journal does not hold yet.

    Yields
    ------
    Chunk
        Runs as they finish; each chunk is on the disk before the next run starts.
    """
    from vlm_latency.instrument.protocol import SessionLog, measure, plan
    from vlm_latency.vqa import image_bytes

    mark = environment["fingerprint"]
    head = {"fingerprint": mark, "conditions": environment["conditions"]}
    name = options.experiment
    if not options.measurement.resume and (kept := journal.set_aside(mark)):
        log.info("%s: measured afresh; what was there is kept as %s", name, kept.name)
    for other in journal.others(mark):
        log.info(
            "%s: %s was measured under other conditions (%s); it is kept and not mixed in",
            name,
            other.name,
            _difference(journal.conditions(other), environment["conditions"]),
        )
    finished = journal.read(mark)
    planned = _planned(requests, plan(requests, options.measurement))
    held = planned.merge(finished[finished["status"] == "ok"], on=RUN)[RUN]
    done = set(zip(held["request_id"], held["run_index"].astype(int), strict=True))
    if len(held) == len(planned):
        log.info(
            "%s: all %d runs were measured before; reporting again without measuring "
            "(measurement.resume=false measures afresh)",
            name,
            len(planned),
        )
        return
    if len(held) and options.measurement.allow_partial:
        log.info(
            "%s: reporting on %d of %d runs, nothing more is measured (measurement.allow_partial)",
            name,
            len(held),
            len(planned),
        )
        return
    if len(held):
        log.info("%s: continuing, %d of %d runs are done", name, len(held), len(planned))
    session = SessionLog()
    for rows in measure(
        model.vlm,
        requests,
        options.measurement,
        done=done,
        fetch=lambda row: image_bytes(row, questions.root),
        template=options.prompt.template,
        fingerprint=mark,
        start_index=0 if finished.empty else int(finished["order_index"].max()) + 1,
        log=session,
    ):
        yield {**head, "rows": rows}  # type: ignore[typeddict-item]
    yield {**head, "rows": [], "session": session.to_dict()}  # type: ignore[typeddict-item]


def collect(
    options: ExperimentOptions,
    requests: pd.DataFrame,
    environment: dict[str, Any],
    journal: Journal,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Gather the runs of these requests, and refuse to go on with a part of them.

    Returns
    -------
    measurements : DataFrame
        Columns ``records.MEASURED_COLUMNS`` and ``outlier``, ``outlier_cause``; one row per run, in
        the order of measuring.
    coverage : dict
        How many runs were planned, measured and failed, and what the commands said at their end.

    Raises
    ------
    MeasurementError
        When runs are missing and ``measurement.allow_partial`` is not set.
    """
    from vlm_latency.instrument.protocol import plan

    planned = _planned(requests, plan(requests, options.measurement))
    runs = journal.read(environment["fingerprint"]).merge(planned, on=RUN)
    runs = runs.sort_values("order_index", kind="stable", ignore_index=True)
    missing = len(planned) - len(runs)
    name = options.experiment
    if missing and not options.measurement.allow_partial:
        raise MeasurementError(
            f"{len(runs)} of {len(planned)} runs of {name} are measured; run 'kedro run --pipeline "
            f"{name}' again with the same parameters to measure the other {missing}, or report on "
            "the part with measurement.allow_partial=true"
        )
    if runs.empty or not (runs["status"] == "ok").any():
        raise MeasurementError(f"{name}: no run succeeded; nothing to report")
    failed = runs[runs["status"] == "failed"]
    reasons = failed["error"].value_counts().head(5)
    coverage = {
        "planned": len(planned),
        "measured": len(runs) - len(failed),
        "failed": len(failed),
        "missing": missing,
        "partial": bool(missing),
        "failures": {str(reason): int(count) for reason, count in reasons.items()},
        "sessions": journal.sessions(environment["fingerprint"]),
    }
    from vlm_latency.statistics import mark_outliers

    return runs.join(mark_outliers(runs)), coverage


def _planned(requests: pd.DataFrame, order: pd.DataFrame) -> pd.DataFrame:
    """Name the planned runs as the journal does."""
    runs = order[["request_id", "run_index"]].merge(
        requests[["request_id", "request_sha256"]], on="request_id"
    )
    return typed(runs[RUN], {name: MEASURED_COLUMNS[name] for name in RUN})


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Name what differs between two sets of conditions, such as ``model.seed``."""
    before, after = _flat(old), _flat(new)
    names = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    told = [f"{key}: {before.get(key)} → {after.get(key)}" for key in names[:4]]
    return ", ".join(told) or "none named"


def _flat(conditions: dict[str, Any], path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in conditions.items():
        found |= _flat(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
    return found
