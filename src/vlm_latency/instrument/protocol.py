"""The loop: every planned run on one model, or on several in turn, one row for each."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import platform
import sys
import time
from collections.abc import Collection, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from vlm_latency.errors import MeasurementError
from vlm_latency.instrument.environment import device_name
from vlm_latency.instrument.plan import plan
from vlm_latency.instrument.session import Fetch, Session, SessionLog, now, undisturbed
from vlm_latency.options import MeasurementOptions
from vlm_latency.records import plain_rows

if TYPE_CHECKING:
    from vlm_latency.models.interface import LoadedModel
    from vlm_latency.records import Row

SECONDS_PER_CHUNK = 0.5  # what a crash may lose, besides chunk_size runs


def measure(
    vlm: LoadedModel,
    requests: pd.DataFrame,
    options: MeasurementOptions,
    *,
    planned: pd.DataFrame | None = None,
    done: Collection[tuple[str, int]] = (),
    fetch: Fetch,
    template: str = "{question}",
    fingerprint: str = "",
    model_name: str | None = None,
    start_index: int | None = None,
    worker_index: int = 1,
    log: SessionLog | None = None,
    progress: bool = True,
    announce: bool = False,
) -> Iterator[list[Row]]:
    """Measure the planned runs that are not done yet.

    Parameters
    ----------
    vlm
        A `vlm_latency.models.interface.LoadedModel`.
    requests
        Columns of ``records.REQUEST_COLUMNS``.
    planned
        The runs in their order (`plan.plan`); by default planned here.
    done
        ``(request_id, run_index)`` of runs that need not be made again.
    fetch
        Gives the encoded image of a request; its time counts as nothing.
    template
        What the question is written into, at ``{question}``.
    start_index
        The first ``order_index``; by default the number of runs that are done.
    worker_index
        Which of several that measure the same plan this one is.
    log
        Filled in on the way, complete at the end.
    progress
        Whether to show runs done, rate and time left on stderr.
    announce
        Whether to yield an empty list when all is warm; the time until more is asked for counts as
        warming up.

    Yields
    ------
    list of dict
        Rows of ``records.MEASURED_COLUMNS``, at most ``options.chunk_size`` of them and whatever
        half a second brought. A run that fails is a row with ``status=failed`` and its error.

    Raises
    ------
    MeasurementError
        When more runs failed than ``max_failures × planned runs``, rounded up. The rows measured
        until then come first, as they do when the user interrupts.
    """
    log = log if log is not None else SessionLog()
    planned = plan(requests, options) if planned is None else planned
    done = set(done)
    left = [run for run in plain_rows(planned) if (run["request_id"], run["run_index"]) not in done]
    if not left:
        return
    session = Session(vlm, options, fetch, template, log)
    name = str(model_name or vlm.options.name)
    taking = _Turn(session, _identity(vlm, name, fingerprint, worker_index))
    first = len(done) if start_index is None else start_index
    runs = _runs([taking], requests, len(planned), left, options, first, progress, announce)
    with contextlib.closing(runs):
        try:
            if announce:
                next(runs)
                paused = time.perf_counter()
                yield []
                log.warmup_s += time.perf_counter() - paused
            yield from _chunks(runs, options.chunk_size)
        except KeyboardInterrupt:
            log.interrupted = True
            raise


def interleave(
    vlms: Mapping[str, LoadedModel],
    requests: pd.DataFrame,
    options: MeasurementOptions,
    *,
    left: pd.DataFrame | None = None,
    start_index: int = 0,
    fetch: Fetch,
    template: str = "{question}",
    fingerprint: str | None = None,
    progress: bool = True,
) -> Iterator[list[Row]]:
    """Make every planned run with all of several models, one right after the other.

    Which one comes first is drawn for each run, from ``options.seed``. A meter is on its model
    only while that is measured: models may share modules, or be one and the same.

    Parameters
    ----------
    vlms
        Models by the name that their rows get, all with the same number of CPU threads.
    left
        The runs of the plan that are to be made; by default all.
    requests, options, start_index, fetch, template, fingerprint, progress
        As in `measure`.

    Yields
    ------
    list of dict
        Rows as those of `measure`, those of one run by all models always together; ``order_index``
        counts over all models.

    Raises
    ------
    MeasurementError
        As `measure`, for each model.
    """
    taking = [
        _Turn(
            Session(vlm, options, fetch, template, SessionLog()), _identity(vlm, name, fingerprint)
        )
        for name, vlm in vlms.items()
    ]
    planned = plan(requests, options)
    asked = plain_rows(planned if left is None else left)
    runs = _runs(taking, requests, len(planned), asked, options, start_index, progress)
    with contextlib.closing(runs):
        yield from _chunks(runs, options.chunk_size, len(vlms))


def _chunks(runs: Iterator[Row], size: int, together: int = 1) -> Iterator[list[Row]]:
    """Give so many rows at once and whatever half a second brought, and at an end what is there.

    Rows that belong together, so many, are never parted: a pair is made of neighbours in time.
    """
    chunk: list[Row] = []
    flushed = time.perf_counter()
    try:
        for row in runs:
            chunk.append(row)
            late = time.perf_counter() - flushed >= SECONDS_PER_CHUNK
            if len(chunk) % together == 0 and (late or len(chunk) >= size):
                ready, chunk, flushed = chunk, [], time.perf_counter()
                yield ready
    except (KeyboardInterrupt, MeasurementError):
        if whole := chunk[: len(chunk) // together * together]:
            yield whole
        raise
    if chunk:
        yield chunk


@dataclass(frozen=True)
class _Turn:
    """A model that takes its turn, and what all of its rows say."""

    session: Session
    identity: Row


def _runs(
    taking: list[_Turn],
    requests: pd.DataFrame,
    planned: int,
    left: list[Row],
    options: MeasurementOptions,
    first_index: int,
    progress: bool,
    announce: bool = False,
) -> Generator[Row]:
    """Make the runs that are left of a plan, with each model in turn.

    With `announce` an empty row says that all is warm.
    """
    rows = {row["request_id"]: row for row in plain_rows(requests)}
    asked = list({run["request_id"]: rows[run["request_id"]] for run in left}.values())
    allowed = math.ceil(options.max_failures * planned)
    generator = np.random.default_rng(options.seed)
    start = time.perf_counter()
    names = requests["experiment"].dropna() if "experiment" in requests else ()
    what = f"{next(iter(names))}: " if len(names) else ""
    with contextlib.ExitStack() as stack:
        for turn in taking:
            log = turn.session.log
            log.started_at = now()
            stack.callback(_note_wall_time, log, start)
            stack.enter_context(undisturbed(turn.session.vlm))
            stack.enter_context(contextlib.closing(turn.session))
        for turn in taking:
            with _WarmingUp(what, disable=not progress) as shown:
                turn.session.open(asked, list(rows.values()), shown.say)
        if announce:
            yield {}
        done = planned - len(left)
        count = len(taking)
        bar = stack.enter_context(
            Progress(
                desc=what.removesuffix(": ") or None,
                total=planned * count,
                initial=done * count,
                unit="run",
                disable=not progress,
            )
        )
        for position, run in enumerate(left):
            for place, which in enumerate(generator.permutation(count)):
                session = taking[which].session
                row = session.run(rows[run["request_id"]])
                order = {"order_index": first_index + position * count + place}
                bar.update()
                gc.collect(1)
                yield {**row, **taking[which].identity, **run, **order}
                if session.log.failures > allowed:
                    raise MeasurementError(
                        f"{session.log.failures} of {session.log.runs} runs failed, more than "
                        f"measurement.max_failures={options.max_failures:g} of {planned} allows; "
                        f"the last error: {row['error']}"
                    )


def _note_wall_time(log: SessionLog, start: float) -> None:
    log.wall_s = time.perf_counter() - start


def _identity(vlm: LoadedModel, name: str, fingerprint: str | None, index: int = 1) -> Row:
    return {
        "fingerprint": fingerprint,
        "model": name,
        "device": str(vlm.device),
        "worker": f"{platform.node()}:{os.getpid()}",
        "worker_index": index,
        "worker_device": device_name(str(vlm.device)),
    }


class Progress(tqdm):  # type: ignore[type-arg]
    """Runs done, rate and time left; without tqdm's watching thread."""

    monitor_interval = 0

    def __init__(self, **options: Any) -> None:
        seconds = 0.5 if sys.stderr.isatty() else 15.0  # a log file needs fewer lines
        super().__init__(mininterval=seconds, dynamic_ncols=True, **options)


class _WarmingUp(Progress):
    """What happens before the first run, and for how long already; measured runs only have a rate."""

    def __init__(self, what: str, disable: bool) -> None:
        super().__init__(
            bar_format=what + "{desc} [{elapsed}]",
            desc="warming up",
            leave=False,
            miniters=1,
            disable=disable,
        )

    def say(self, text: str) -> None:
        """Show what is being done."""
        if self.disable:
            return
        other = text.partition(":")[0] != str(self.desc).partition(":")[0]
        self.set_description_str(text, refresh=other)
        self.update()
