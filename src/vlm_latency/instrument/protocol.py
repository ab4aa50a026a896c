"""The order of runs, the warm-up before them, and one record row for each of them.

A run is: fetch the image's bytes (untimed) → decode, tile, normalise, tokenise and copy to the
device (``T_preprocess``) → measure → write the row. One after the other, in this thread: nothing
overlaps what is being timed.
"""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from math import ceil, log2
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from vlm_latency.errors import DataError, MeasurementError
from vlm_latency.instrument.noise import GpuProbe, NoiseProbe
from vlm_latency.options import MeasurementOptions

PLATEAU_GAIN = 0.05  # a run that is 5 % faster than all before it says: not warm yet
WARMUP_TOKENS = 3  # outputs are short while warming: a prefill and two decode steps
SECONDS_PER_CHUNK = 0.5  # what a crash may lose, besides chunk_size runs
IMAGE_CACHE_BYTES = 128 * 2**20
CACHE_LENGTH_STEP = 64  # static caches are a multiple of this, plus this for chat templates
ERROR_LENGTH = 500

Fetch = Callable[[Mapping[str, Any]], bytes]


@dataclass
class SessionLog:
    """What one call of ``measure`` did besides its rows; complete once ``measure`` has ended.

    Attributes
    ----------
    wall_s
        From the first request to the last row, warm-up and the writing of rows included.
    warmup_s, measured_s, preprocess_s, fetch_s
        Parts of it: warming up; what the method timed; preprocessing; getting the image bytes.
    warmup
        One entry per shape: what it is, how many runs it took, whether the plateau was reached
        within ``measurement.warmup_max_runs``, the first and the last run in milliseconds.
    """

    started_at: str = ""
    runs: int = 0
    failures: int = 0
    interrupted: bool = False
    wall_s: float = 0.0
    warmup_s: float = 0.0
    measured_s: float = 0.0
    preprocess_s: float = 0.0
    fetch_s: float = 0.0
    warmup: list[dict[str, Any]] = field(default_factory=list)

    @property
    def harness_ratio(self) -> float | None:
        """Wall time without warm-up over what was measured and preprocessed; 1 wastes nothing."""
        useful = self.measured_s + self.preprocess_s
        return (self.wall_s - self.warmup_s) / useful if useful else None

    @property
    def warmup_share(self) -> float | None:
        """Share of the wall time that was spent warming up."""
        return self.warmup_s / self.wall_s if self.wall_s else None

    def to_dict(self) -> dict[str, Any]:
        """Give everything as JSON-able data, both ratios included."""
        return {
            **vars(self),
            "harness_ratio": self.harness_ratio,
            "warmup_share": self.warmup_share,
        }


def plan(requests: pd.DataFrame, measurement: MeasurementOptions) -> pd.DataFrame:
    """List the runs in the order in which they are made.

    ``order=blocks``: every block holds every request once, in a random order of its own, so that
    drift hits all shapes alike. ``order=ascending``: the requests as they come, all runs of one
    after the other. ``noise_repeats`` requests, drawn at random, are run once more, anywhere in
    the last block.

    Parameters
    ----------
    requests
        A table with unique ``request_id``.

    Returns
    -------
    DataFrame
        ``request_id, run_index, block_index, order_index``.

    Raises
    ------
    DataError
        When two requests share their id.

    Examples
    --------
    >>> requests = pd.DataFrame({"request_id": ["a", "b"]})
    >>> plan(requests, MeasurementOptions(num_runs=2, order="ascending")).run_index.tolist()
    [0, 1, 0, 1]
    """
    ids = requests["request_id"].to_numpy(dtype=object)
    if len(set(ids)) != len(ids):
        twice = requests["request_id"][requests["request_id"].duplicated()].iloc[0]
        raise DataError(f"request_id {twice!r} stands for two requests; expected unique ids")
    generator = np.random.default_rng(measurement.seed)
    count, runs = len(ids), measurement.num_runs
    repeated = generator.permutation(count)[: measurement.noise_repeats]
    if measurement.order == "ascending":
        which = np.concatenate([np.repeat(np.arange(count), runs), repeated])
        run = np.concatenate([np.tile(np.arange(runs), count), np.full(len(repeated), runs)])
        block = np.zeros(len(which), int)
    else:
        parts = []
        for index in range(runs):
            own = np.stack([np.arange(count), np.full(count, index), np.full(count, index)])
            if index == runs - 1:
                extra = [repeated, np.full(len(repeated), runs), np.full(len(repeated), index)]
                own = np.concatenate([own, np.stack(extra)], axis=1)
            parts.append(own[:, generator.permutation(own.shape[1])])
        which, run, block = np.concatenate(parts, axis=1)
    return pd.DataFrame(
        {
            "request_id": ids[which],
            "run_index": run,
            "block_index": block,
            "order_index": np.arange(len(which)),
        }
    )


def measure(
    vlm: Any,
    requests: pd.DataFrame,
    options: MeasurementOptions,
    *,
    done: Collection[tuple[str, int]] = (),
    fetch: Fetch,
    template: str = "{question}",
    fingerprint: str = "",
    model_name: str | None = None,
    start_index: int | None = None,
    log: SessionLog | None = None,
    progress: bool = True,
) -> Iterator[list[dict[str, Any]]]:
    """Measure the planned runs that are not done yet.

    Parameters
    ----------
    vlm
        A `vlm_latency.models.interface.LoadedModel`.
    requests
        Columns of ``records.REQUEST_COLUMNS``.
    done
        ``(request_id, run_index)`` of runs that need not be made again.
    fetch
        Gives the encoded image of a request; its time counts as nothing.
    template
        What the question is written into, at ``{question}``.
    start_index
        The first ``order_index``; by default the number of runs that are done.
    log
        Filled in on the way, complete at the end.
    progress
        Whether to show runs done, rate and time left on stderr.

    Yields
    ------
    list of dict
        Rows of ``records.MEASURED_COLUMNS``, at most ``options.chunk_size`` of them and whatever
        half a second brought. A run that fails is a row with ``status=failed`` and its error.

    Raises
    ------
    MeasurementError
        When more runs failed than ``max(1, max_failures × planned runs)``. The rows measured
        until then come first, as they do when the user interrupts.
    """
    log = log if log is not None else SessionLog()
    planned = plan(requests, options)
    done = set(done)
    left = [run for run in _records(planned) if _key(run) not in done]
    if not left:
        return
    rows = {row["request_id"]: row for row in _records(requests)}
    allowed = max(1.0, options.max_failures * len(planned))
    session = Session(vlm, options, fetch, template, log)
    identity = _identity(vlm, model_name or vlm.options.name, fingerprint)
    first_index = len(done) if start_index is None else start_index
    log.started_at = _now()
    start = time.perf_counter()
    bar = _Progress(total=len(planned), initial=len(planned) - len(left), disable=not progress)
    with undisturbed(vlm), contextlib.closing(session), bar:
        chunk: list[dict[str, Any]] = []
        try:
            session.open([rows[run["request_id"]] for run in left], list(rows.values()))
            flushed = time.perf_counter()
            for position, run in enumerate(left):
                row = session.run(rows[run["request_id"]])
                chunk.append({**row, **identity, **run, "order_index": first_index + position})
                bar.update()
                gc.collect(1)
                stop = log.failures > allowed
                now = time.perf_counter()
                if stop or len(chunk) >= options.chunk_size or now - flushed >= SECONDS_PER_CHUNK:
                    ready, chunk, flushed = chunk, [], now
                    yield ready
                if stop:
                    raise _too_many(log, options, len(planned), row["error"])
        except KeyboardInterrupt:
            log.interrupted = True
            if chunk:
                yield chunk
            raise
        else:
            if chunk:
                yield chunk
        finally:
            log.wall_s = time.perf_counter() - start


def interleave(
    vlms: Mapping[str, Any],
    requests: pd.DataFrame,
    options: MeasurementOptions,
    *,
    fetch: Fetch,
    template: str = "{question}",
    progress: bool = True,
) -> Iterator[dict[str, Any]]:
    """Make every planned run with all of several models, one right after the other.

    Which one comes first is drawn for each run, from ``options.seed``. A meter is on its model
    only while that is measured: models may share modules, or be one and the same.

    Parameters
    ----------
    vlms
        Models by the name that their rows get, all with the same number of CPU threads.
    requests, options, fetch, template, progress
        As in `measure`.

    Yields
    ------
    dict
        Rows as those of `measure`, without a fingerprint; ``order_index`` counts over all models.

    Raises
    ------
    MeasurementError
        As `measure`, for each model.
    """
    planned = plan(requests, options)
    rows = {row["request_id"]: row for row in _records(requests)}
    generator = np.random.default_rng(options.seed)
    bar = _Progress(total=len(planned) * len(vlms), disable=not progress)
    with contextlib.ExitStack() as stack:
        sessions, logs = [], [SessionLog() for _ in vlms]
        for vlm, log in zip(vlms.values(), logs, strict=True):
            stack.enter_context(undisturbed(vlm))
            session = Session(vlm, options, fetch, template, log)
            sessions.append(stack.enter_context(contextlib.closing(session)))
            session.open(list(rows.values()), list(rows.values()))
        stack.enter_context(bar)
        identities = [_identity(vlm, name) for name, vlm in vlms.items()]
        for position, run in enumerate(_records(planned)):
            for turn, which in enumerate(generator.permutation(len(sessions))):
                row = sessions[which].run(rows[run["request_id"]])
                order = {"order_index": position * len(sessions) + turn}
                yield {**row, **identities[which], **run, **order}
                bar.update()
                gc.collect(1)
                if logs[which].failures > max(1.0, options.max_failures * len(planned)):
                    raise _too_many(logs[which], options, len(planned), row["error"])


def _identity(vlm: Any, name: str, fingerprint: str | None = None) -> dict[str, Any]:
    return {
        "fingerprint": fingerprint,
        "model": name,
        "device": str(vlm.device),
        "worker": f"{platform.node()}:{os.getpid()}",
    }


def _too_many(
    log: SessionLog, options: MeasurementOptions, planned: int, last: str
) -> MeasurementError:
    return MeasurementError(
        f"{log.failures} of {log.runs} runs failed, more than "
        f"measurement.max_failures={options.max_failures:g} of {planned} allows; "
        f"the last error: {last}"
    )


class Session:
    """One meter, warm once it is open, and what a run needs besides."""

    def __init__(
        self, vlm: Any, options: MeasurementOptions, fetch: Fetch, template: str, log: SessionLog
    ) -> None:
        self.vlm = vlm
        self.options = options
        self.log = log
        self._fetch = _ByteCache(fetch)
        self._template = template
        self._noise = NoiseProbe()
        self._gpu = GpuProbe(vlm.device)
        self.meter: Any = None
        self._seen: set[Any] = set()
        self._image_tokens: dict[tuple[int, int], Any] = {}

    def open(self, rows: list[dict[str, Any]], planned: list[dict[str, Any]]) -> None:
        """Make the meter and warm up for these requests, of all that are planned.

        The length of a static cache is that of all: a command that goes on measures as the first.
        """
        start = time.perf_counter()
        # An image that is missing or broken has no size: its request fails when it is run.
        rows, planned = (
            [row for row in some if row["image_width"] is not None] for some in (rows, planned)
        )
        engine = self.vlm.options.engine
        length = None if engine == "eager" else self._cache_length(planned)

        def make(vlm: Any) -> Any:
            from vlm_latency.instrument.methods import make_meter

            return make_meter(vlm, self.options.method, engine, length)

        self.meter = self.vlm.meter(make)
        if rows:
            self._warm_up(rows)
        self.log.warmup_s = time.perf_counter() - start

    def close(self) -> None:
        """Take everything off the model again."""
        self._noise.close()
        if self.meter is not None:
            self.meter.close()

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """Measure one request; whatever goes wrong with it is in the row."""
        started_at, start = _now(), time.perf_counter()
        row: dict[str, Any] = {name: request.get(name) for name in _CARRIED}
        row |= {"started_at": started_at, "status": "ok", "error": None}
        self.log.runs += 1
        try:
            row |= self._measured(request)
        except Exception as error:  # one bad request must not cost the others
            self.log.failures += 1
            row |= {"status": "failed", "error": _message(error)}
            error.__traceback__ = None  # its frames hold on to tensors
            _free_memory(error)
        row["wall_ms"] = (time.perf_counter() - start) * 1e3
        return row

    def _measured(self, request: dict[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        data = self._fetch(request)
        self.log.fetch_s += time.perf_counter() - start
        start = time.perf_counter()
        prepared = self._prepare(data, request)
        preprocess_ms = (time.perf_counter() - start) * 1e3
        max_new_tokens, stop_at_eos = output_rule(request, self.options, self.vlm.count_tokens)
        self._noise.start()
        reading = self.meter(prepared, max_new_tokens, stop_at_eos)
        noise = self._noise.stop()
        self.log.preprocess_s += preprocess_ms / 1e3
        self.log.measured_s += reading.timed_ms / 1e3
        counts = prepared.counts
        shape = _shape(counts)
        first = shape not in self._seen
        self._seen.add(shape)
        return {
            **{name: getattr(counts, name) for name in _COUNTED},
            **_entered(counts, reading.prefill_length),
            "max_new_tokens": max_new_tokens,
            "num_output_tokens": len(reading.token_ids),
            "T_preprocess": preprocess_ms,
            **reading.times,
            "first_of_shape": first,
            **noise,
            **self._gpu.sample(),
            "peak_memory_bytes": reading.peak_memory_bytes,
            "kv_cache_bytes": reading.kv_cache_bytes,
            "generated_text": self.vlm.decode(reading.token_ids),
        }

    def prepare(self, request: dict[str, Any]) -> Any:
        """Fetch a request's image and give what the model is called with, on the device."""
        return self._prepare(self._fetch(request), request)

    def _prepare(self, data: bytes, request: dict[str, Any]) -> Any:
        """Decode, tile, normalise, tokenise and copy to the device: what T_preprocess covers."""
        from vlm_latency.vqa import decode_image

        prompt = self._template.replace("{question}", request["question"])
        return self.vlm.place(self.vlm.prepare(decode_image(data), prompt))

    def _warm_up(self, rows: list[dict[str, Any]]) -> None:
        """Run every shape until it gets no faster, the largest first.

        The largest comes first so that the allocator never grows inside a timed region.
        ``fixed`` is the seed's: so many runs of the first request, whatever follows.
        """
        options = self.options
        tokens = min(WARMUP_TOKENS, max(map(self._num_tokens, rows)))
        if options.warmup == "fixed":
            self._warm_shape(rows[0], tokens, lambda times: len(times) >= options.warmup_runs)
            return
        at_least = options.warmup_runs
        for row in self._one_per_shape(rows):
            self._warm_shape(row, tokens, partial(plateau, at_least=at_least))
            at_least = min(2, options.warmup_runs)  # code and caches are warm by now

    def _warm_shape(
        self, request: dict[str, Any], tokens: int, warm: Callable[[list[float]], bool]
    ) -> None:
        times: list[float] = []
        entry: dict[str, Any] = {"tokens": tokens, "error": None}
        try:
            prepared = self.prepare(request)
            entry["num_crops"] = prepared.counts.num_crops
            entry["num_vision_patches"] = prepared.counts.num_vision_patches
            while not warm(times) and len(times) < self.options.warmup_max_runs:
                times.append(self.meter(prepared, tokens, False).timed_ms)
        except Exception as error:  # the run itself will say so, in its row
            entry["error"] = _message(error)
            error.__traceback__ = None
            _free_memory(error)
        self.log.warmup.append(
            {
                **entry,
                "runs": len(times),
                "plateau": warm(times),
                "first_ms": times[0] if times else None,
                "last_ms": times[-1] if times else None,
            }
        )

    def _one_per_shape(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Give one request of every shape, the one with the largest first."""
        largest: dict[Any, tuple[int, dict[str, Any]]] = {}
        for row in rows:
            counts = self._counts(row)
            size = counts.num_vision_patches
            if size > largest.get(_shape(counts), (-1, row))[0]:
                largest[_shape(counts)] = (size, row)
        return [row for _, row in sorted(largest.values(), key=lambda item: -item[0])]

    def _cache_length(self, rows: list[dict[str, Any]]) -> int:
        """One length of the static cache that fits every run: nothing is compiled twice."""
        longest = 0
        for row in rows:
            counts = self._counts(row)
            prompt = self._template.replace("{question}", row["question"])
            longest = max(
                longest,
                counts.num_vision_tokens
                + counts.num_image_special_tokens
                + self.vlm.count_tokens(prompt)
                + self._num_tokens(row),
            )
        return (ceil(longest / CACHE_LENGTH_STEP) + 1) * CACHE_LENGTH_STEP

    def _num_tokens(self, row: dict[str, Any]) -> int:
        """The most tokens a request may write; 1 where its run will fail anyway."""
        try:
            return output_rule(row, self.options, self.vlm.count_tokens)[0]
        except DataError:
            return 1

    def _counts(self, row: dict[str, Any]) -> Any:
        size = (row["image_width"], row["image_height"])
        if size not in self._image_tokens:
            self._image_tokens[size] = self.vlm.architecture.image_tokens(*size)
        return self._image_tokens[size]


def plateau(times: list[float], at_least: int) -> bool:
    """Tell whether runs have stopped getting faster.

    They have when there are at least two and ``at_least``, and the last one is not 5 % faster
    than the fastest before it.

    >>> plateau([90.0, 31.0, 30.0], at_least=3), plateau([90.0, 60.0], at_least=2)
    (True, False)
    """
    if len(times) < max(2, at_least):
        return at_least == 0
    return times[-1] >= (1 - PLATEAU_GAIN) * min(times[:-1])


def output_rule(
    request: Mapping[str, Any],
    options: MeasurementOptions,
    count_tokens: Callable[[str], int],
) -> tuple[int, bool]:
    """Turn a request's ``output_length`` into a number of tokens.

    Returns
    -------
    tuple
        How many tokens, and whether the end-of-sequence token may stop earlier: ``none`` is one
        token (prefill only), ``answer`` the length of the ground-truth answer, ``natural`` up to
        ``measurement.max_new_tokens``, a number exactly that, ``≤`` and a number at most that.

    Raises
    ------
    DataError
        For ``answer`` where the request has none.
    """
    rule = str(request["output_length"])
    if rule == "none":
        return 1, False
    if rule == "natural":
        return options.max_new_tokens, True
    if rule.startswith("≤"):
        return int(rule[1:]), True
    if rule != "answer":
        return int(rule), False
    answer = request.get("answer")
    if answer is None:
        raise DataError(
            "output_length=answer needs the ground-truth answer, which this request has not; use "
            "a number or natural"
        )
    return max(1, count_tokens(answer)), False


_CARRIED = (
    "experiment",
    "request_sha256",
    "question_id",
    "image_id",
    "grid",
    "resolution",
    "pair",
    "image_width",
    "image_height",
    "output_length",
)
_COUNTED = (
    "tiling_rows",
    "tiling_cols",
    "num_crops",
    "num_vision_patches",
    "num_image_special_tokens",
)


class _ByteCache:
    """Keeps the bytes of recent images: repeats and questions about one image fetch it once."""

    def __init__(self, fetch: Fetch) -> None:
        self._fetch = fetch
        self._kept: OrderedDict[tuple[Any, Any], bytes] = OrderedDict()
        self._size = 0

    def __call__(self, request: dict[str, Any]) -> bytes:
        key = (request.get("image_path"), request.get("image_recipe"))
        if key == (None, None) or key not in self._kept:
            data = self._fetch(request)
            self._kept[key] = data
            self._size += len(data)
            while self._size > IMAGE_CACHE_BYTES:
                self._size -= len(self._kept.popitem(last=False)[1])
            return data
        self._kept.move_to_end(key)
        return self._kept[key]


class _Progress(tqdm):  # type: ignore[type-arg]
    """Runs done, rate and time left; without tqdm's watching thread."""

    monitor_interval = 0

    def __init__(self, **options: Any) -> None:
        seconds = 0.5 if sys.stderr.isatty() else 15.0  # a log file needs fewer lines
        super().__init__(unit="run", mininterval=seconds, dynamic_ncols=True, **options)


@contextlib.contextmanager
def undisturbed(vlm: Any) -> Iterator[None]:
    """The chosen number of CPU threads, and no garbage collection but between runs."""
    collecting = gc.isenabled()
    threads = vlm.set_threads(vlm.options.num_threads)
    gc.freeze()  # what is there by now stays: collections look at new objects only
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if collecting:
            gc.enable()
        vlm.set_threads(threads)


def _shape(counts: Any) -> tuple[int, int]:
    """What is warmed up apart: a number of crops; without tiles, patches to a quarter octave."""
    if counts.tiling_rows is not None:
        return counts.num_crops, 0
    return counts.num_crops, round(4 * log2(max(1, counts.num_vision_patches)))


def _entered(counts: Any, prefill_length: int | None) -> dict[str, int]:
    """The tokens that went into the language model: a model may drop some of its prompt's.

    What is missing is taken from the vision tokens, and only then from the text.
    """
    total = counts.num_total_tokens if prefill_length is None else prefill_length
    vision = max(0, counts.num_vision_tokens + total - counts.num_total_tokens)
    return {
        "num_vision_tokens": vision,
        "num_language_tokens": total - vision,
        "num_total_tokens": total,
    }


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of plain values, absent ones as None: they go into JSON lines."""
    rows: list[Any] = table.astype(object).where(table.notna(), None).to_dict("records")
    return rows


def _key(run: Mapping[str, Any]) -> tuple[str, int]:
    return run["request_id"], run["run_index"]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _message(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:ERROR_LENGTH]


def _free_memory(error: Exception) -> None:
    """Give back what a run that ran out of memory holds."""
    if "torch" not in sys.modules:
        return
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        gc.collect()
        torch.cuda.empty_cache()
