"""Warm is what the device says it is: shapes run to a plateau, lengths are visited where new ones cost.

A shape is a number of crops. Kernels may also be planned anew for every *length*: of the prompt in
a prefill, of the keys in a decode step. Whether that costs anything here is found by trying: some
new lengths are visited twice, and the first visit is compared with the second.
"""

from __future__ import annotations

import gc
import logging
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from math import log2
from typing import TYPE_CHECKING

from vlm_latency.errors import ModelError
from vlm_latency.instrument.lengths import ENOUGH_PAIRS, Met, Prompt
from vlm_latency.options import MeasurementOptions
from vlm_latency.records import UNTIL_FIRST_TOKEN

if TYPE_CHECKING:
    from vlm_latency.models.requests import Prepared, TokenCounts
    from vlm_latency.records import Row

log = logging.getLogger("vlm_latency")

PLATEAU_GAIN = 0.05  # a run that is 5 % faster than all before it says: not warm yet
WARMUP_TOKENS = 3  # outputs are short while warming: a prefill and two decode steps
KEY_PAIRS = 16  # key lengths that are tried
TRYING_SECONDS = 30.0  # a slow model gets fewer pairs

ERROR_LENGTH = 500


@dataclass(frozen=True)
class Visit:
    """One untimed run: what it was asked, and how long its parts took."""

    counts: TokenCounts
    prefill_length: int  # tokens that went into the decoder
    times: Row
    timed_ms: float


class WarmUp:
    """Runs the shapes, and where they cost the lengths, that will be measured.

    Parameters
    ----------
    met
        What the device knows already; taken note of by `visit`.
    image_counts
        What a request's image is made of, without preparing it.
    text_tokens
        Tokens of a request's text; they may be off by a constant (a chat template's).
    num_tokens
        The most tokens that a request may write.
    prepare
        A request's inputs on the device.
    visit
        Runs inputs with so many tokens, forced.
    grows
        Whether keys grow with every decode step; a static cache has all of its length at once.
    compiles
        Whether the first decode step will be compiled.
    captures
        Whether a prefill is captured per range of lengths: the lengths that were tried may lie in
        one range, and a new range takes seconds.
    say
        Shows what is being done.
    """

    def __init__(
        self,
        options: MeasurementOptions,
        met: Met,
        *,
        image_counts: Callable[[Row], TokenCounts],
        text_tokens: Callable[[Row], int],
        num_tokens: Callable[[Row], int],
        prepare: Callable[[Row], Prepared],
        visit: Callable[[Prepared, int], Visit],
        grows: bool,
        compiles: bool,
        captures: bool,
        say: Callable[[str], None],
    ) -> None:
        self.options = options
        self.met = met
        self.shift = 0  # of the real length of a prompt against the estimated one
        self._image_counts, self._text_tokens = image_counts, text_tokens
        self._num_tokens, self._prepare, self._visit_once = num_tokens, prepare, visit
        self._grows, self._compiles, self._captures = grows, compiles, captures
        self._say = say

    def shapes(self, rows: list[Row]) -> list[Row]:
        """Run every shape until it gets no faster, the largest first.

        The largest comes first so that the allocator never grows inside a timed region.
        ``fixed`` is the seed's: so many runs of the first request, whatever follows.

        Returns
        -------
        list of dict
            What each shape is, how many runs it took, whether the plateau was reached.
        """
        options = self.options
        tokens = min(WARMUP_TOKENS, max(map(self._num_tokens, rows)))
        if self._compiles and tokens > 1:
            self._say("compiling the decode step")
        if options.warmup == "fixed":
            return [self._shape(rows[0], tokens, lambda t: len(t) >= options.warmup_runs)]
        found, at_least = [], options.warmup_runs
        representatives = self._one_per_shape(rows)
        for number, row in enumerate(representatives, 1):
            if number > 1:
                self._say(f"warming up: {number} of {len(representatives)} shapes")
            found.append(self._shape(row, tokens, partial(plateau, at_least=at_least)))
            at_least = min(2, options.warmup_runs)  # code and caches are warm by now
        return found

    def lengths(self, rows: list[Row]) -> None:
        """Visit every length that will be measured, if it turns out that new ones cost.

        Those of requests whose tokens are reduced were visited as shapes.
        """
        rows = [row for row in rows if not row.get("method")]
        self._prompts(rows)
        if self._grows:
            self._keys(rows)

    def _prompts(self, rows: list[Row]) -> None:
        new: dict[Prompt, Row] = {}
        for row in rows:
            estimated = self._estimate(row)
            if estimated not in self.met.tried:
                new.setdefault(estimated, row)
        waiting = [row for _, row in sorted(new.items(), key=lambda item: item[0], reverse=True)]
        cost = self.met.prompt_cost
        missing = ENOUGH_PAIRS - len(cost.first_ms)
        if waiting and missing > 0:
            tried, waiting = waiting[-missing:], waiting[:-missing]  # the shortest cost least
            self._try_prompts(tried)
        if not (cost.costs or self._captures):
            return
        for number, row in enumerate(waiting, 1):
            self._say(f"warming up: {number} of {len(waiting)} lengths")
            self._visits(row, 1)

    def _try_prompts(self, rows: list[Row]) -> None:
        cost, start = self.met.prompt_cost, time.perf_counter()
        for number, row in enumerate(rows, 1):
            self._say(f"trying new lengths: {number} of {len(rows)}")
            known = len(self.met.prompts)
            visits = self._visits(row, 1, 2)
            if len(visits) < 2 or len(self.met.prompts) == known:  # failed, or not new after all
                continue
            first, again = visits
            cost.first_ms.append(first.timed_ms)
            cost.again_ms.append(again.timed_ms)
            for name in UNTIL_FIRST_TOKEN:
                if first.times.get(name) is not None:
                    differences = cost.parts.setdefault(name, [])
                    differences.append(first.times[name] - again.times[name])
            if time.perf_counter() - start > TRYING_SECONDS:
                break
        if cost.first_ms:
            log.info("%s", cost.to_dict()["sentence"])

    def _keys(self, rows: list[Row]) -> None:
        prompts = {self._length(row): row for row in rows}
        wanted: set[int] = set()
        for row in rows:
            length = self._length(row)
            wanted.update(range(length + 1, length + self._num_tokens(row)))
        stretches = consecutive(wanted - self.met.keys)
        cost = self.met.key_cost
        if not cost.first_ms and stretches:
            longest = max(stretches, key=len)
            self._try_keys(self._below(prompts, longest.start), longest[:KEY_PAIRS])
            stretches = consecutive(wanted - self.met.keys)
        if not cost.costs:
            return
        total = sum(map(len, stretches))
        done = 0
        for stretch in stretches:
            self._say(f"warming up: {done} of {total} key lengths")
            row = self._below(prompts, stretch.start)
            self._visits(row, stretch.stop - self._length(row))
            done += len(stretch)

    def _try_keys(self, row: Row, keys: range) -> None:
        self._say("trying new key lengths")
        tokens = keys.stop - self._length(row)
        visits = self._visits(row, tokens, 2)
        if len(visits) < 2 or not visits[0].times.get("decode_step_ms"):
            return
        cost = self.met.key_cost
        for found, visit in zip((cost.first_ms, cost.again_ms), visits, strict=True):
            found.extend(visit.times["decode_step_ms"][-len(keys) :])
        log.info("%s", cost.to_dict()["sentence"])

    def _below(self, prompts: Mapping[int, Row], key: int) -> Row:
        """The request whose prompt is the longest that a step with this many keys can follow."""
        return prompts[max(length for length in prompts if length < key)]

    def _estimate(self, row: Row) -> Prompt:
        counts = self._image_counts(row)
        of_image = counts.num_vision_tokens + counts.num_image_special_tokens
        return (
            counts.num_crops,
            counts.num_vision_patches,
            of_image + self._text_tokens(row),
        )

    def _length(self, row: Row) -> int:
        return self._estimate(row)[2] + self.shift

    def _visit(self, row: Row, prepared: Prepared, tokens: int) -> Visit:
        visit = self._visit_once(prepared, tokens)
        estimated = self._estimate(row)
        self.met.tried.add(estimated)
        self.shift = visit.prefill_length - estimated[2]
        return visit

    def _visits(self, row: Row, tokens: int, times: int = 1) -> list[Visit]:
        """Run a request so many times; fewer where it fails, as its own run will say."""
        visits: list[Visit] = []
        try:
            prepared = self._prepare(row)
            visits.extend(self._visit(row, prepared, tokens) for _ in range(times))
        except Exception as error:
            survive(error)
        return visits

    def _shape(self, row: Row, tokens: int, warm: Callable[[list[float]], bool]) -> Row:
        times: list[float] = []
        entry: Row = {"tokens": tokens, "error": None}
        try:
            prepared = self._prepare(row)
            entry["num_crops"] = prepared.counts.num_crops
            entry["num_vision_patches"] = prepared.counts.num_vision_patches
            while not warm(times) and len(times) < self.options.warmup_max_runs:
                times.append(self._visit(row, prepared, tokens).timed_ms)
        except ModelError:  # no run of this model can succeed
            raise
        except Exception as error:  # the run itself will say so, in its row
            entry["error"] = survive(error)
        return {
            **entry,
            "runs": len(times),
            "plateau": warm(times),
            "first_ms": times[0] if times else None,
            "last_ms": times[-1] if times else None,
        }

    def _one_per_shape(self, rows: list[Row]) -> list[Row]:
        """Give one request of every shape, the one with the largest first.

        A request whose tokens are reduced is one of its own: what is left of it is seen by running.
        """
        largest: dict[object, tuple[int, Row]] = {}
        for row in rows:
            counts = self._image_counts(row)
            size = counts.num_vision_patches
            key = row["request_id"] if row.get("method") else shape_of(counts)
            if size > largest.get(key, (-1, row))[0]:
                largest[key] = (size, row)
        return [row for _, row in sorted(largest.values(), key=lambda item: -item[0])]


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


def shape_of(counts: TokenCounts) -> tuple[int, int]:
    """Say what is warmed up apart: a number of crops; without tiles, patches to ¼ octave."""
    if counts.tiling_rows is not None:
        return counts.num_crops, 0
    return counts.num_crops, round(4 * log2(max(1, counts.num_vision_patches)))


def consecutive(numbers: Iterable[int]) -> list[range]:
    """Put whole numbers together into ranges without a gap.

    >>> consecutive({3, 4, 5, 9})
    [range(3, 6), range(9, 10)]
    """
    groups = groupby(enumerate(sorted(set(numbers))), lambda item: item[1] - item[0])
    stretches = [[number for _, number in group] for _, group in groups]
    return [range(stretch[0], stretch[-1] + 1) for stretch in stretches]


def survive(error: Exception) -> str:
    """Say what went wrong, and give back the memory that it holds on to."""
    error.__traceback__ = None  # its frames hold on to tensors
    if "torch" in sys.modules:
        import torch

        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            gc.collect()
            torch.cuda.empty_cache()
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:ERROR_LENGTH]
