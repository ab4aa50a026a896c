"""One meter on one model, warm once it is open: what turns a request into a row of the record.

A run is: fetch the image's bytes (untimed) → decode, tile, normalise, tokenise and copy to the
device (``T_preprocess``) → measure → write the row. One after the other, in this thread: nothing
overlaps what is being timed.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from math import ceil
from typing import TYPE_CHECKING, Any

from cachetools import LRUCache

from vlm_latency.errors import DataError, MeasurementError
from vlm_latency.instrument.lengths import Met, prompt_of
from vlm_latency.instrument.noise import GpuProbe, NoiseProbe, QuietHost, host_canary_ms
from vlm_latency.instrument.plan import output_rule
from vlm_latency.instrument.warmup import Visit, WarmUp, shape_of, survive
from vlm_latency.journal import session_ratios
from vlm_latency.models import thread_count
from vlm_latency.models.requests import check_prompt
from vlm_latency.options import CAPTURED, COMPILED, MeasurementOptions
from vlm_latency.records import CARRIED_COLUMNS, COUNTED_COLUMNS, Row

if TYPE_CHECKING:
    from vlm_latency.models.interface import LoadedModel, Meter
    from vlm_latency.models.loading import VLM
    from vlm_latency.models.requests import Prepared, TokenCounts

IMAGE_CACHE_BYTES = 128 * 2**20
CACHE_LENGTH_STEP = 64  # static caches are a multiple of this, plus this for chat templates

Fetch = Callable[[Row], bytes]


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
    lengths
        ``mode`` (``measurement.lengths``); what a new ``prompt`` length and a new ``key`` length
        of a decode step cost here, found by trying; ``visited``: how many of each the process
        knew when the runs began; ``late``: runs made once before, untimed, because their length
        was not foreseen.
    engine
        What was compiled, how many seconds that took, and what had to stay eager.
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
    warmup: list[Row] = field(default_factory=list)
    lengths: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, object] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """Give everything as JSON-able data, with what `journal.session_ratios` makes of it."""
        warmup_share, harness_ratio = session_ratios([vars(self)])
        return {**vars(self), "harness_ratio": harness_ratio, "warmup_share": warmup_share}


class Session:
    """One meter, warm once it is open, and what a run needs besides."""

    def __init__(
        self,
        vlm: LoadedModel,
        options: MeasurementOptions,
        fetch: Fetch,
        template: str,
        log: SessionLog,
    ) -> None:
        self.vlm = vlm
        self.options = options
        self.log = log
        self._fetch = cached(fetch)
        self._template = template
        self._noise = NoiseProbe()
        self._gpu = GpuProbe(vlm.device)
        self._host = QuietHost(options.quiet_seconds)
        self._met = Met.of(vlm)
        self._grows = vlm.options.engine == "eager"
        self._captures = vlm.options.engine in CAPTURED
        self.meter: Any = None
        self._seen: set[tuple[int, int]] = set()
        self._image_tokens: dict[tuple[int, int], TokenCounts] = {}

    def open(
        self, rows: list[Row], planned: list[Row], say: Callable[[str], None] = lambda _: None
    ) -> None:
        """Make the meter and warm up for these requests, of all that are planned.

        The length of a static cache is that of all: a command that goes on measures as the first.

        Parameters
        ----------
        say
            Shows what is being done.
        """
        start = time.perf_counter()
        # A request that cannot be prepared fails when it is run.
        rows, planned = ([row for row in some if self._foreseen(row)] for some in (rows, planned))
        engine = self.vlm.options.engine
        length = None if self._grows else self._cache_length(planned)

        def make(vlm: VLM) -> Meter:
            from vlm_latency.instrument.methods import make_meter

            return make_meter(vlm, self.options.method, engine, length, self.options.nvtx)

        self.meter = self.vlm.meter(make)
        if self._captures:
            self._met.forget_prompts()
        if rows:
            warm_up = WarmUp(
                self.options,
                self._met,
                image_counts=self._counts,
                text_tokens=lambda row: self.vlm.count_tokens(self._prompt(row)),
                num_tokens=self._num_tokens,
                prepare=self.prepare,
                visit=self._visit,
                grows=self._grows,
                compiles=engine in COMPILED,
                captures=self._captures,
                say=say,
            )
            self.log.warmup += warm_up.shapes(rows)
            if self.options.lengths == "warm" and self.options.warmup_runs:
                warm_up.lengths(rows)
        visited = {"prompts": len(self._met.prompts), "keys": len(self._met.keys)}
        self.log.lengths = {
            "mode": self.options.lengths,
            "prompt": self._met.prompt_cost.to_dict(),
            "key": self._met.key_cost.to_dict(),
            "visited": visited,
            "late": 0,
        }
        self.log.warmup_s = time.perf_counter() - start

    def close(self) -> None:
        """Take everything off the model again."""
        self._noise.close()
        if self.meter is not None:
            if engine := getattr(self.meter, "engine", None):  # the null model's meter has none
                self.log.engine = engine.report()
            self.meter.close()

    def run(self, request: Row) -> Row:
        """Measure one request; whatever goes wrong with it is in the row."""
        started_at, start = now(), time.perf_counter()
        row: Row = {name: request.get(name) for name in CARRIED_COLUMNS}
        row |= {"started_at": started_at, "status": "ok", "error": None}
        self.log.runs += 1
        try:
            row |= self._measured(request)
        except Exception as error:  # one bad request must not cost the others
            self.log.failures += 1
            row |= {"status": "failed", "error": survive(error)}
        row["wall_ms"] = (time.perf_counter() - start) * 1e3
        return row

    def _measured(self, request: Row) -> Row:
        start = time.perf_counter()
        data = self._fetch(request)
        self.log.fetch_s += time.perf_counter() - start
        start = time.perf_counter()
        prepared = self._prepare(data, request)
        preprocess_ms = (time.perf_counter() - start) * 1e3
        max_new_tokens, stop_at_eos = output_rule(request, self.options, self.vlm.count_tokens)
        counts = prepared.counts
        self._check_positions(counts, max_new_tokens)
        self._meet(prepared, max_new_tokens, stop_at_eos)
        canary_ms, waited_ms = self._host.wait()
        self._noise.start()
        reading = self.meter(prepared, max_new_tokens, stop_at_eos)
        noise = self._noise.stop()
        self.log.preprocess_s += preprocess_ms / 1e3
        self.log.measured_s += reading.timed_ms / 1e3
        first = shape_of(counts) not in self._seen
        self._seen.add(shape_of(counts))
        entered = _entered(counts, reading.prefill_length)
        new = self._note(counts, entered["num_total_tokens"], len(reading.token_ids))
        return {
            **{name: getattr(counts, name) for name in COUNTED_COLUMNS},
            **entered,
            "max_new_tokens": max_new_tokens,
            "num_output_tokens": len(reading.token_ids),
            "T_preprocess": preprocess_ms,
            **reading.times,
            "first_of_shape": first,
            "first_of_length": new[0],
            "new_kv_lengths": new[1],
            "host_canary_ms": max(canary_ms, host_canary_ms()),
            "waited_ms": waited_ms,
            **noise,
            **self._gpu.sample(),
            "peak_memory_bytes": reading.peak_memory_bytes,
            "kv_cache_bytes": reading.kv_cache_bytes,
            "generated_text": self.vlm.decode(reading.token_ids),
        }

    def _check_positions(self, counts: TokenCounts, max_new_tokens: int) -> None:
        """Refuse what the model has no positions for; the last token is not read again."""
        positions = self.vlm.architecture.max_positions
        needed = counts.num_total_tokens + max_new_tokens - 1
        if positions and needed > positions:
            raise MeasurementError(
                f"a prompt of {counts.num_total_tokens} tokens and {max_new_tokens} new ones need "
                f"{needed} positions, and {self.vlm.architecture.name} has {positions}"
            )

    def _meet(self, prepared: Prepared, tokens: int, stop_at_eos: bool) -> None:
        """Run a request untimed whose lengths cost and were not foreseen while warming up."""
        counts, met = prepared.counts, self._met
        if self.options.lengths != "warm":
            return
        costs = met.prompt_cost.costs or self._captures
        unmet = costs and prompt_of(counts) not in met.prompts
        if not unmet and self._grows and met.key_cost.costs:
            length = counts.num_total_tokens
            unmet = any(key not in met.keys for key in range(length + 1, length + tokens))
        if unmet:
            start = time.perf_counter()
            self._visit(prepared, tokens, stop_at_eos)
            self.log.lengths["late"] += 1
            self.log.warmup_s += time.perf_counter() - start

    def _visit(self, prepared: Prepared, tokens: int, stop_at_eos: bool = False) -> Visit:
        """Run a request untimed, and take note of the lengths that are known by then."""
        reading = self.meter(prepared, tokens, stop_at_eos)
        counts = prepared.counts
        length = _entered(counts, reading.prefill_length)["num_total_tokens"]
        self._note(counts, length, len(reading.token_ids))
        return Visit(counts, length, reading.times, reading.timed_ms)

    def _note(self, counts: TokenCounts, prefill_length: int, tokens: int) -> tuple[bool, int]:
        """Which lengths of a run were new; of a static cache only the prompt's can be."""
        steps = tokens if self._grows else 0
        return self._met.note(counts, range(prefill_length + 1, prefill_length + steps))

    def prepare(self, request: Row) -> Prepared:
        """Fetch a request's image and give what the model is called with, on the device."""
        return self._prepare(self._fetch(request), request)

    def _prepare(self, data: bytes, request: Row) -> Prepared:
        """Decode, tile, normalise, tokenise and copy to the device: what T_preprocess covers."""
        from vlm_latency.vqa import decode_image

        image, prompt = decode_image(data), self._prompt(request)
        reduced = {name: request[name] for name in ("method", "keep") if request.get("method")}
        return self.vlm.place(self.vlm.prepare(image, prompt, **reduced))

    def _prompt(self, request: Row) -> str:
        return self._template.replace("{question}", request["question"])

    def _cache_length(self, rows: list[Row]) -> int:
        """One length of the static cache that fits every run: nothing is compiled twice."""
        longest = 0
        for row in rows:
            counts = self._counts(row)
            longest = max(
                longest,
                counts.num_vision_tokens
                + counts.num_image_special_tokens
                + self.vlm.count_tokens(self._prompt(row))
                + self._num_tokens(row),
            )
        return (ceil(longest / CACHE_LENGTH_STEP) + 1) * CACHE_LENGTH_STEP

    def _num_tokens(self, row: Row) -> int:
        """The most tokens a request may write; 1 where its run will fail anyway."""
        try:
            return output_rule(row, self.options, self.vlm.count_tokens)[0]
        except DataError:
            return 1

    def _foreseen(self, row: Row) -> bool:
        """Whether a request can be warmed up for: not with an image that is broken or refused."""
        if row["image_width"] is None:
            return False
        try:
            check_prompt(self._prompt(row))
            options = self.options
            if not self._grows or options.warmup != "fixed" or options.lengths == "warm":
                self._counts(row)
        except Exception as error:  # every processor refuses in its own way
            survive(error)
            return False
        return True

    def _counts(self, row: Row) -> TokenCounts:
        size = (row["image_width"], row["image_height"])
        if size not in self._image_tokens:
            self._image_tokens[size] = self.vlm.architecture.image_tokens(*size)
        return self._image_tokens[size]


def cached(fetch: Fetch) -> Fetch:
    """Keep the bytes of recent images: repeats and questions about one image fetch it once."""
    kept: LRUCache[tuple[object, object], bytes] = LRUCache(IMAGE_CACHE_BYTES, getsizeof=len)

    def fetched(request: Row) -> bytes:
        key = (request.get("image_path"), request.get("image_recipe"))
        if key in kept:
            return kept[key]
        data = fetch(request)
        if key != (None, None) and len(data) <= kept.maxsize:
            kept[key] = data
        return data

    return fetched


@contextlib.contextmanager
def undisturbed(vlm: LoadedModel) -> Iterator[None]:
    """Hold the chosen number of CPU threads, and collect no garbage but between runs."""
    collecting = gc.isenabled()
    threads = vlm.set_threads(thread_count(vlm.options, str(vlm.device)))
    gc.freeze()  # what is there by now stays: collections look at new objects only
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if collecting:
            gc.enable()
        vlm.set_threads(threads)


def now() -> str:
    """Give the time in UTC, as the record has it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _entered(counts: TokenCounts, prefill_length: int | None) -> dict[str, int]:
    """The tokens that went into the language model: a model may drop some of its prompt's.

    What is missing is taken from the vision tokens, and only then from the text.

    Raises
    ------
    MeasurementError
        When more positions than the prompt has went in, or the parts are not counts.
    """
    if prefill_length is not None and prefill_length > counts.num_total_tokens:
        raise MeasurementError(
            f"the first forward read {prefill_length} positions and the prompt has "
            f"{counts.num_total_tokens}; expected one forward per token: no draft model, prompt "
            "lookup or learned prefix"
        )
    text = counts.num_total_tokens - counts.num_vision_tokens - counts.num_image_special_tokens
    if min(counts.num_vision_tokens, counts.num_image_special_tokens, text) < 0:
        raise MeasurementError(f"the tokens of the prompt do not add up: {counts}")
    total = counts.num_total_tokens if prefill_length is None else prefill_length
    vision = max(0, counts.num_vision_tokens + total - counts.num_total_tokens)
    return {
        "num_vision_tokens": vision,
        "num_language_tokens": total - vision,
        "num_total_tokens": total,
    }
