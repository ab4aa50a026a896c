"""From requests to runs: what is still missing is measured, nothing that was measured is lost."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pandas as pd

from vlm_latency.errors import MeasurementError
from vlm_latency.experiments import BASELINE
from vlm_latency.journal import BEGAN, RUN
from vlm_latency.options import ExperimentOptions
from vlm_latency.records import MEASURED_COLUMNS, Row, ok_rows, typed
from vlm_latency.shards import deal, difference, gather, journals_of_shards, rare
from vlm_latency.workers.asked import describe, needs_workers, settled

if TYPE_CHECKING:
    from vlm_latency.datasets.record_log import Chunk
    from vlm_latency.journal import Journal
    from vlm_latency.models import ModelHandle
    from vlm_latency.option_types import Shard
    from vlm_latency.vqa import QuestionSource
    from vlm_latency.workers.worker import Work

log = logging.getLogger("vlm_latency")

Made = tuple[list[Row], dict[str, Any] | None]  # runs, and what there is to say at an end


def describe_environment(
    options: ExperimentOptions, model: ModelHandle, questions: QuestionSource
) -> dict[str, Any]:
    """Record on what, and under which conditions, the experiment is measured.

    Returns
    -------
    dict
        The environment; ``conditions`` in it is what could change a number, and ``fingerprint``
        its hash.
    """
    from vlm_latency.instrument.environment import environment, fingerprint

    spread = needs_workers(options.measurement, options.ray)
    found = environment(
        settled(model, options.measurement, options.ray) if spread else options.model,
        options.measurement,
        architecture=model.architecture,
        dataset=questions.describe(),
        template=options.prompt.template,
    )
    if spread:
        found["conditions"]["workers"] = describe(model, options.measurement, options.ray)
    return {**found, "fingerprint": fingerprint(found["conditions"])}


def plan_runs(options: ExperimentOptions, requests: pd.DataFrame) -> pd.DataFrame:
    """List the runs of an experiment in the order in which they are made, once for all.

    Returns
    -------
    DataFrame
        As `instrument.plan.plan`, with what the journal knows a request by.
    """
    from vlm_latency.instrument.plan import plan

    runs = plan(requests, options.measurement).merge(
        requests[["request_id", "request_sha256"]], on="request_id"
    )
    return typed(runs, {name: MEASURED_COLUMNS[name] for name in RUN})


def measure(
    options: ExperimentOptions,
    requests: pd.DataFrame,
    plan: pd.DataFrame,
    model: ModelHandle,
    questions: QuestionSource,
    environment: dict[str, Any],
    journal: Journal,
) -> Iterator[Chunk]:
    """Measure the planned runs that the journal does not hold yet.

    Yields
    ------
    Chunk
        Runs as they finish; each chunk is on the disk before the next run starts.
    """
    name, part = options.experiment, options.measurement.shard
    mark = environment["fingerprint"]
    head = {"fingerprint": mark, "conditions": environment["conditions"]}
    if not part and (shards := journals_of_shards(journal.folder)):
        hands = deal(plan, _shapes(requests, model), next(iter(shards)).total)
        partial = options.measurement.allow_partial
        for gathered, sessions in gather(
            journal, shards, plan, hands, environment, allow_partial=partial
        ):
            yield {**head, "rows": gathered}  # type: ignore[typeddict-item]
            for told in sessions:
                yield {**head, "rows": [], "session": told}  # type: ignore[typeddict-item]
        log.info("%s: gathered from %d shards, nothing was measured", name, len(shards))
        return
    if part:
        plan = _part_of(plan, part, _shapes(requests, model), name)
    say_what_lies_there(options, environment, journal)
    finished = journal.read(mark)
    held = plan[RUN].merge(ok_rows(finished[[*RUN, "status"]]), on=RUN)[RUN]
    if not worth_measuring(options, len(held), len(plan)):
        return
    yield {**head, "rows": [], "session": {BEGAN: begun(environment)}}  # type: ignore[typeddict-item]
    done = set(zip(held["request_id"], held["run_index"].astype(int), strict=True))
    first = 0 if finished.empty else int(finished["order_index"].max()) + 1
    from vlm_latency.workers.worker import Work

    work = Work(
        requests,
        options.measurement,
        questions.root,
        options.prompt.template,
        mark,
        tuple(name for name in requests["method"].dropna().unique() if name != BASELINE),
    )
    spread = needs_workers(options.measurement, options.ray)
    runs = _measure_on_workers if spread else _measure_here
    for rows, session in runs(options, work, _Left(plan, done, first), model):
        said = {"session": session} if session else {}
        yield {**head, "rows": rows, **said}  # type: ignore[typeddict-item]


@dataclass(frozen=True)
class _Left:
    """What a plan leaves to measure: the plan, the runs done, the next ``order_index``."""

    plan: pd.DataFrame
    done: set[tuple[str, int]]
    first: int


def _measure_here(
    options: ExperimentOptions, work: Work, left: _Left, model: ModelHandle
) -> Iterator[Made]:
    """Make the runs that are not done in this process."""
    from vlm_latency.instrument.protocol import measure
    from vlm_latency.instrument.session import SessionLog

    session, part = SessionLog(), options.measurement.shard
    for rows in measure(
        work.on(model.vlm),
        work.requests,
        work.measurement,
        planned=left.plan,
        done=left.done,
        fetch=work.fetch(),
        template=work.template,
        fingerprint=work.fingerprint,
        start_index=left.first,
        worker_index=part.number if part else 1,
        log=session,
    ):
        yield rows, None
    yield [], session.to_dict()


def _measure_on_workers(
    options: ExperimentOptions, work: Work, left: _Left, model: ModelHandle
) -> Iterator[Made]:
    """Make the runs that are not done on other devices, or in other processes."""
    from vlm_latency.workers.pool import pool_of
    from vlm_latency.workers.run import measure

    pool, part = pool_of(model, options.measurement, options.ray), options.measurement.shard
    log.info("%s: %s", options.experiment, pool.line())
    keys = zip(left.plan["request_id"], left.plan["run_index"].astype(int), strict=True)
    shapes = _shapes(work.requests, model)
    yield from measure(
        pool,
        work,
        left.plan[[key not in left.done for key in keys]].reset_index(drop=True),
        lambda runs, hands: deal(runs, shapes, hands),
        planned=len(left.plan),
        first_order=left.first,
        first_worker=1 + (part.number - 1) * pool.count if part else 1,
    )


def say_what_lies_there(
    options: ExperimentOptions, environment: dict[str, Any], journal: Journal
) -> None:
    """Name the journals of other conditions; set this one aside where it shall not be continued."""
    name, mark = options.experiment, environment["fingerprint"]
    if not options.measurement.resume and (kept := journal.set_aside(mark)):
        log.info("%s: measured afresh; what was there is kept as %s", name, kept.name)
    for other in journal.others(mark):
        log.info(
            "%s: %s was measured under other conditions (%s); it is kept and not mixed in",
            name,
            other.name,
            difference(journal.conditions(other), environment["conditions"]),
        )


def worth_measuring(options: ExperimentOptions, held: int, planned: int) -> bool:
    """Say what is done already, and whether more is wanted."""
    name = options.experiment
    if held == planned:
        log.info(
            "%s: all %d runs were measured before; reporting again without measuring "
            "(measurement.resume=false measures afresh)",
            name,
            planned,
        )
        return False
    if held and options.measurement.allow_partial:
        log.info(
            "%s: reporting on %d of %d runs, nothing more is measured (measurement.allow_partial)",
            name,
            held,
            planned,
        )
        return False
    if held:
        log.info("%s: continuing, %d of %d runs are done", name, held, planned)
    return True


def _shapes(requests: pd.DataFrame, model: ModelHandle) -> dict[str, tuple[Any, ...]]:
    """Tell which requests do the same work, before any of them is prepared."""
    from vlm_latency.instrument.warmup import shape_of

    columns = ["request_id", "image_width", "image_height", "output_length", "method", "keep"]
    found = {}
    for name, width, height, *asked in requests[columns].itertuples(index=False, name=None):
        size = None
        if pd.notna(width) and pd.notna(height):
            with contextlib.suppress(Exception):  # its own run will say what is wrong with it
                size = shape_of(model.architecture.image_tokens(int(width), int(height)))
        found[name] = (size, *(None if pd.isna(value) else value for value in asked))
    return found


def _part_of(
    plan: pd.DataFrame, part: Shard, shapes: dict[str, tuple[Any, ...]], name: str
) -> pd.DataFrame:
    """Give the runs of a shard, in the plan's order."""
    own = plan[deal(plan, shapes, part.total) == part.number - 1].reset_index(drop=True)
    log.info("%s: shard %s, %d of %d runs", name, part, len(own), len(plan))
    if few := rare(plan, shapes, part.total):
        log.warning(
            "%s: %d shapes have fewer runs than there are shards: not every shard sees them",
            name,
            few,
        )
    return own


def collect(
    options: ExperimentOptions,
    plan: pd.DataFrame,
    environment: dict[str, Any],
    journal: Journal,
) -> tuple[pd.DataFrame, dict[str, Any], dict[str, Any]]:
    """Gather the planned runs, and refuse to go on with a part of them.

    Parameters
    ----------
    environment
        Of this command, which may have measured nothing.

    Returns
    -------
    measurements : DataFrame
        Columns ``records.MEASURED_COLUMNS`` and ``outlier``, ``outlier_cause``; one row per run, in
        the order of measuring.
    coverage : dict
        How many runs were planned, measured and failed, what the commands said at their end,
        what new lengths cost (`instrument.lengths.summary`), and of several workers how far they
        lie apart (`statistics.workers.between_workers`).
    environment : dict
        Of the command that measured (`measured_in`).

    Raises
    ------
    MeasurementError
        When runs are missing and ``measurement.allow_partial`` is not set.
    """
    from vlm_latency.instrument.lengths import summary
    from vlm_latency.statistics import mark_outliers
    from vlm_latency.statistics.workers import between_workers

    runs = in_order(journal.read(environment["fingerprint"]), plan)
    name = options.experiment
    coverage = covered(options, len(plan), runs)
    sessions = journal.sessions(environment["fingerprint"])
    lengths = summary(runs, sessions)
    coverage |= {"sessions": sessions, "lengths": lengths}
    if spread := between_workers(ok_rows(runs)):
        notes = [note for session in sessions for note in session.get("notes") or ()]
        coverage["workers"] = {**spread.to_dict(), "notes": list(dict.fromkeys(notes))}
        log.info("%s: %s", name, spread.sentence)
    marked = mark_outliers(runs, lengths_cost=lengths["costs"] is not False)
    began = journal.began(environment["fingerprint"])
    return runs.assign(**marked), coverage, measured_in(environment, began, runs)


def in_order(runs: pd.DataFrame, plan: pd.DataFrame) -> pd.DataFrame:
    """Give the planned runs in the order in which they were measured, in one copy."""
    found = runs[[*RUN, "order_index"]].reset_index().merge(plan[RUN], on=RUN)
    places = found.sort_values("order_index", kind="stable")["index"].to_numpy()
    return runs.take(places).reset_index(drop=True)


def covered(options: ExperimentOptions, planned: int, runs: pd.DataFrame) -> dict[str, Any]:
    """Count the runs that were planned, measured and failed, and say why they did.

    Raises
    ------
    MeasurementError
        When runs are missing and ``measurement.allow_partial`` is not set, or none succeeded.
    """
    missing, name = planned - len(runs), options.experiment
    if missing and not options.measurement.allow_partial:
        raise MeasurementError(
            f"{len(runs)} of {planned} runs of {name} are measured; run 'kedro run --pipeline "
            f"{name}' again with the same parameters to measure the other {missing}, or report on "
            "the part with measurement.allow_partial=true"
        )
    if ok_rows(runs).empty:
        raise MeasurementError(f"{name}: no run succeeded; nothing to report")
    failed = runs[runs["status"] == "failed"]
    reasons = failed["error"].value_counts().head(5)
    return {
        "planned": planned,
        "measured": len(runs) - len(failed),
        "failed": len(failed),
        "missing": missing,
        "partial": bool(missing),
        "failures": {str(reason): int(count) for reason, count in reasons.items()},
    }


def begun(environment: dict[str, Any]) -> dict[str, Any]:
    """Give what a command that measures says at its start; the conditions stand in the header."""
    return {key: value for key, value in environment.items() if key != "conditions"}


def measured_in(
    environment: dict[str, Any], began: list[dict[str, Any]], runs: pd.DataFrame
) -> dict[str, Any]:
    """Give the environment of the last command that measured, and beside it the reporting one's.

    Commit, load and versions belong to the runs; a report that is made again has its own.

    Parameters
    ----------
    began
        What each command that measured these runs said at its start (`Journal.began`).

    Returns
    -------
    dict
        With ``measured``: when, by how many commands and which commits; and ``reported``.
    """
    commits = dict.fromkeys(str((said.get("code") or {}).get("git_commit")) for said in began)
    return {
        **environment,
        **(began[-1] if began else {}),
        "measured": {
            "first": runs["started_at"].min(),
            "last": runs["started_at"].max(),
            "commands": len(began) or None,  # journals of earlier versions do not say
            "git_commits": list(commits),
        },
        "reported": {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            **{name: environment.get(name) for name in ("code", "process")},
        },
    }
