"""Three ways to time one request behind one interface.

``timeline``
    one real ``generate()``, marked at component boundaries; nothing is subtracted or clamped.
``subtraction``, ``hook``
    the methods of the study this project grows from: each part is run and timed by itself and
    components come out as differences. Kept to show the error they make.

Intervals are defined in the README's method notes; all times are milliseconds.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from vlm_latency.errors import MeasurementError
from vlm_latency.instrument.clock import CudaClock, HostClock
from vlm_latency.instrument.engines import Engine
from vlm_latency.instrument.timeline import Mark, Timeline, partition
from vlm_latency.models.attention import attending
from vlm_latency.models.boundaries import (
    DECODE_FORWARD,
    ENCODER,
    PREFILL,
    PROJECTOR,
    boundaries,
)
from vlm_latency.records import TIME_COLUMNS, Row

if TYPE_CHECKING:
    from vlm_latency.models.loading import VLM
    from vlm_latency.models.requests import Prepared

T = TypeVar("T")
DECODE, OTHER = "T_LLM_decode", "T_other"
VISION_MARKS = 256  # slots for boundaries of the vision part; further ones are made on demand


@dataclass(frozen=True)
class Reading:
    """What one request took.

    Attributes
    ----------
    times
        Every time column of the record but ``T_preprocess``; milliseconds, None where the method
        or engine cannot tell.
    token_ids
        The tokens that were generated.
    peak_memory_bytes
        Most memory allocated on the device during the request, weights included; None on a CPU,
        where the process has no such number of its own.
    kv_cache_bytes
        What the keys and values occupy at the end; a static cache counts as allocated.
    timed_ms
        All that the method timed: ``T_total``, and for the seed's methods every run of a part.
    prefill_length
        Positions that went into the decoder in the first forward: fewer than the prompt has where
        a model drops tokens before its decoder; None where the decoder was not seen.
    """

    times: Row
    token_ids: list[int]
    peak_memory_bytes: int | None
    kv_cache_bytes: int | None
    timed_ms: float
    prefill_length: int | None = None


@contextlib.contextmanager
def quiet(device: torch.device) -> Iterator[None]:
    """Around a timed region: no garbage collection, no autograd, device idle at the start."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        with torch.inference_mode():
            synchronize(device)
            yield
    finally:
        if collecting:
            gc.enable()


def synchronize(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Meter:
    """Runs ``generate()`` for one request at a time; each method says how it is timed.

    Hooks are in place only while a request is being measured, so that ``bare`` is bare and
    nothing is left behind, whatever happens.

    Parameters
    ----------
    vlm
        A loaded model.
    engine
        How a request is run; see `vlm_latency.instrument.engines`.
    max_cache_len
        Length of the static cache, the same for all requests, so that nothing is compiled twice;
        by default as long as the longest request so far.
    nvtx
        Whether to put NVTX ranges around the components.

    Raises
    ------
    MeasurementError
        On a device without a clock of its own or work that runs in order, such as ``mps``.
    ModelError
        Where the engine cannot run this model.
    """

    def __init__(
        self,
        vlm: VLM,
        engine: str = "eager",
        max_cache_len: int | None = None,
        nvtx: bool = False,
    ) -> None:
        self.vlm = vlm
        self.model: Any = vlm.model
        self.device = torch.device(vlm.device)
        self.max_cache_len = max_cache_len
        options = getattr(vlm, "options", None)
        self._sdpa_backend = options.sdpa_backend if options else "auto"
        self._nvtx = nvtx
        if self.device.type not in ("cpu", "cuda"):
            raise MeasurementError(
                f"found model.device={self.device.type}; expected cpu or cuda, the devices whose "
                "time can be taken at component boundaries; set model.device"
            )
        self.engine = Engine(vlm, engine, max_cache_len)
        on_cuda = self.device.type == "cuda"
        self.timeline = Timeline(HostClock(), CudaClock(self.device) if on_cuda else None)

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Forget what the engine has compiled, captured and cached."""
        self.engine.close()

    def __call__(
        self, prepared: Prepared, max_new_tokens: int, stop_at_eos: bool = False
    ) -> Reading:
        """Measure one request, its inputs already on the device.

        Parameters
        ----------
        max_new_tokens
            Exactly so many tokens; with ``stop_at_eos`` at most so many. 1 is prefill only.

        Raises
        ------
        MeasurementError
            When the number of tokens or forwards is not what was asked for.
        """
        raise NotImplementedError

    def bare(
        self, prepared: Prepared, max_new_tokens: int, stop_at_eos: bool = False
    ) -> tuple[float, list[int]]:
        """Time ``generate()`` without any instrument.

        Returns
        -------
        tuple
            Milliseconds, and the tokens that were generated.
        """
        arguments = self.engine.arguments(prepared.inputs, max_new_tokens, stop_at_eos)
        with self.engine.installed():
            elapsed, output = self._timed(lambda: self.engine.generate(arguments))
        return elapsed, self._tokens(output, prepared, max_new_tokens, stop_at_eos)

    def _timed(self, function: Callable[[], T]) -> tuple[float, T]:
        with self._attending(), quiet(self.device):
            start = time.perf_counter_ns()
            result = function()
            synchronize(self.device)
            return (time.perf_counter_ns() - start) / 1e6, result

    def _generate_on_timeline(self, arguments: Row) -> Any:
        """One ``generate()``; the marks of whatever is attached lie between its two ends."""
        self.timeline.restart(VISION_MARKS + 2 * arguments["max_new_tokens"])
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with (
            self._attending(),
            self._prefill_observed(),
            self._ranges(),
            quiet(self.device),
        ):
            self.timeline.open(OTHER)
            output = self.engine.generate(arguments)
            self.timeline.finish(OTHER)
        return output

    def _attending(self) -> contextlib.AbstractContextManager[None]:
        return attending(self.model, self.vlm.components, self._sdpa_backend)

    @contextlib.contextmanager
    def _ranges(self) -> Iterator[None]:
        """NVTX ranges around the components, outside of their marks."""
        if not self._nvtx:
            yield
            return
        from torch.cuda import nvtx

        depth = 0

        def push(label: str) -> None:
            nonlocal depth
            nvtx.range_push(label)
            depth += 1

        def pop(_: str) -> None:
            nonlocal depth
            nvtx.range_pop()
            depth -= 1

        with boundaries(self.model, self.vlm.components, push, pop):
            try:
                yield
            finally:
                while depth:  # a component that raised left its range open
                    pop("")

    @contextlib.contextmanager
    def _prefill_observed(self) -> Iterator[None]:
        """Note how many positions the decoder is given first, behind all hooks of the model's own."""
        self._prefill_length: int | None = None

        def note(_: nn.Module, args: tuple[object, ...], kwargs: Row) -> None:
            if torch.compiler.is_compiling():
                return
            handle.remove()  # decode steps go without
            given = [kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args]
            tensors = [value for value in given if isinstance(value, torch.Tensor)]
            self._prefill_length = tensors[0].shape[1] if tensors else None

        decoder = self.vlm.components.language_model
        handle = decoder.register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _peak_memory(self) -> int | None:
        on_cuda = self.device.type == "cuda"
        return torch.cuda.max_memory_allocated(self.device) if on_cuda else None

    def _tokens(
        self, output: Any, prepared: Prepared, max_new_tokens: int, stop_at_eos: bool
    ) -> list[int]:
        tokens = output.sequences[0, prepared.inputs["input_ids"].shape[1] :].tolist()
        if len(tokens) != max_new_tokens and not (stop_at_eos and tokens):
            raise MeasurementError(
                f"generate() returned {len(tokens)} tokens where {max_new_tokens} were forced"
            )
        return tokens


class TimelineMeter(Meter):
    """One pass, no subtraction: marks at component boundaries inside one ``generate()``."""

    def __call__(
        self, prepared: Prepared, max_new_tokens: int, stop_at_eos: bool = False
    ) -> Reading:
        arguments = self.engine.arguments(prepared.inputs, max_new_tokens, stop_at_eos)
        with self.engine.installed(), self._attached():
            output = self._generate_on_timeline(arguments)
        tokens = self._tokens(output, prepared, max_new_tokens, stop_at_eos)
        host = intervals(self.timeline.host_marks(), len(tokens))
        device_marks = self.timeline.device_marks()
        times: Row = dict.fromkeys(_TIMES)
        if device_marks is None:
            times.update(host)
        else:
            times.update(intervals(device_marks, len(tokens)))
            times.update({name: host.get(name[:-5]) for name in _TIMES if name.endswith("_host")})
        return Reading(
            times=times,
            token_ids=tokens,
            peak_memory_bytes=self._peak_memory(),
            kv_cache_bytes=_cache_bytes(output.past_key_values),
            timed_ms=host["T_total"],
            prefill_length=self._prefill_length,
        )

    @contextlib.contextmanager
    def _attached(self) -> Iterator[None]:
        """Put a mark at every boundary, and take all of them away again."""
        timeline = self.timeline
        with boundaries(self.model, self.vlm.components, timeline.open, timeline.close):
            yield


class SubtractionMeter(Meter):
    """The seed's method: every part run and timed by itself, components as differences.

    Image features, the encoder alone, a full forward and ``generate()`` are timed one after the
    other, the device idle at both ends of each. Differences are kept signed in ``raw_*`` and
    clamped at zero in the seed's columns; ``T_other`` is what the clamped parts lack to
    ``T_total``, negative where they exceed it. Where the projector is part of the encoder, running
    the encoder alone cannot tell them apart: both are None.
    """

    def __call__(
        self, prepared: Prepared, max_new_tokens: int, stop_at_eos: bool = False
    ) -> Reading:
        arguments = self.engine.arguments(prepared.inputs, max_new_tokens, stop_at_eos)
        with self.engine.installed():
            features_ms, calls = self._time_image_features(prepared.inputs)
            encoder = self.vlm.components.vision_encoder
            encoder_ms, _ = self._timed(
                lambda: [encoder(*args, **kwargs) for args, kwargs in calls]
            )
            prefill_ms, forward_ms = self._time_prefill(prepared.inputs, features_ms)
            with self._attached():
                output = self._generate_on_timeline(arguments)
        tokens = self._tokens(output, prepared, max_new_tokens, stop_at_eos)
        owned = partition(self.timeline.device_marks() or self.timeline.host_marks())
        total_ms = sum(owned.values()) / 1e6
        times: Row = dict.fromkeys(_TIMES)
        if forward_ms is None:
            prefill_ms = owned[PREFILL] / 1e6
        else:
            times["raw_T_LLM_prefill"] = prefill_ms
        times |= {
            "T_total": total_ms,
            "T_vision_total": features_ms,
            PREFILL: max(0.0, prefill_ms),
            DECODE: 0.0,
        }
        if not self.vlm.components.mergers:
            times[ENCODER] = encoder_ms
            times["raw_T_projector"] = features_ms - encoder_ms
            times[PROJECTOR] = max(0.0, features_ms - encoder_ms)
        if len(tokens) > 1:
            times["raw_T_LLM_decode"] = total_ms - features_ms - times[PREFILL]
            times[DECODE] = max(0.0, times["raw_T_LLM_decode"])
            times["T_per_output_token"] = times[DECODE] / (len(tokens) - 1)
        times[OTHER] = total_ms - features_ms - times[PREFILL] - times[DECODE]
        return Reading(
            times=times,
            token_ids=tokens,
            peak_memory_bytes=self._peak_memory(),
            kv_cache_bytes=_cache_bytes(output.past_key_values),
            timed_ms=features_ms + encoder_ms + (forward_ms or 0.0) + total_ms,
            prefill_length=self._prefill_length,
        )

    def _time_image_features(
        self, inputs: Row
    ) -> tuple[float, list[tuple[tuple[object, ...], Row]]]:
        """Time ``get_image_features`` and note what the encoder was called with."""
        function = self.model.base_model.get_image_features
        known = inspect.signature(function).parameters
        arguments = {name: value for name, value in inputs.items() if name in known}
        calls: list[tuple[tuple[object, ...], Row]] = []
        handle = self.vlm.components.vision_encoder.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        )
        try:
            elapsed, _ = self._timed(lambda: function(**arguments))
        finally:
            handle.remove()
        return elapsed, calls

    def _time_prefill(self, inputs: Row, features_ms: float) -> tuple[float, float | None]:
        """Time one full forward, as ``generate()`` calls it; prefill is what vision leaves."""
        last = {"logits_to_keep": 1} if self._keeps_logits() else {}
        forward_ms, _ = self._timed(lambda: self.model(**inputs, **last, use_cache=True))
        return forward_ms - features_ms, forward_ms

    def _keeps_logits(self) -> bool:
        return "logits_to_keep" in inspect.signature(self.model.forward).parameters

    @contextlib.contextmanager
    def _attached(self) -> Iterator[None]:
        yield


class HookMeter(SubtractionMeter):
    """The seed's other method: prefill between the ends of the first and the last decoder block.

    It misses the first block, the final norm and the head.
    """

    def _time_prefill(self, inputs: Row, features_ms: float) -> tuple[float, None]:
        return 0.0, None

    @contextlib.contextmanager
    def _attached(self) -> Iterator[None]:
        """Hooks on first and last block that act in the first forward only."""
        blocks = decoder_blocks(self.vlm.components.language_model)
        timeline = self.timeline

        def first(*_: object) -> None:
            timeline.open(PREFILL)
            handles[0].remove()

        def last(*_: object) -> None:
            timeline.close(PREFILL)
            handles[1].remove()

        handles = [blocks[0].register_forward_hook(first), blocks[-1].register_forward_hook(last)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


METERS: dict[str, type[Meter]] = {
    "timeline": TimelineMeter,
    "subtraction": SubtractionMeter,
    "hook": HookMeter,
}

_TIMES = tuple(name for name in TIME_COLUMNS if name != "T_preprocess")


def make_meter(
    vlm: VLM,
    method: str = "timeline",
    engine: str = "eager",
    max_cache_len: int | None = None,
    nvtx: bool = False,
) -> Meter:
    """Make the meter of a method (``timeline``, ``subtraction``, ``hook``) for a loaded model.

    Raises
    ------
    MeasurementError
        For a method that runs the encoder by itself, on a model that has several.
    """
    if method != "timeline" and vlm.components.more_encoders:
        raise MeasurementError(
            f"{vlm.options.name} has {len(vlm.components.encoders)} vision encoders, and "
            f"measurement.method={method} runs one by itself; use timeline"
        )
    return METERS[method](vlm, engine, max_cache_len, nvtx)


def intervals(marks: Sequence[Mark], num_output_tokens: int) -> Row:
    """Turn the marks of one ``generate()`` into the record's intervals.

    Parameters
    ----------
    marks
        ``T_other`` around everything and, in it, the labels of `models.boundaries.boundaries`.
    num_output_tokens
        How many tokens came out; as many forwards must be there.

    Returns
    -------
    dict
        Milliseconds by time column; ``T_total = T_vision_total + T_LLM_prefill + T_LLM_decode +
        T_other``, ``T_vision_total = T_vision_encoder + T_projector`` and ``T_LLM_decode =
        T_LLM_decode_forward + T_LLM_decode_between``, to floating-point rounding.

    Raises
    ------
    MeasurementError
        When the number of forwards is not the number of tokens.
    """
    forwards = (PREFILL, DECODE_FORWARD)
    ends = [mark.time_ns for mark in marks if mark.label in forwards and not mark.opens]
    if len(ends) != num_output_tokens:
        raise MeasurementError(
            f"{num_output_tokens} tokens came from {len(ends)} forwards; one each was expected "
            "(does the model generate in another way, or cut its prefill into chunks?)"
        )
    owned = dict.fromkeys((ENCODER, PROJECTOR, PREFILL, DECODE_FORWARD, DECODE, OTHER), 0)
    owned |= partition(with_decode(marks))
    between = owned[DECODE]
    owned[DECODE] += owned[DECODE_FORWARD]
    times: Row = {label: ns / 1e6 for label, ns in owned.items()}
    times["T_LLM_decode_between"] = between / 1e6
    times["T_vision_total"] = (owned[ENCODER] + owned[PROJECTOR]) / 1e6
    times["T_total"] = (marks[-1].time_ns - marks[0].time_ns) / 1e6
    times["T_first_token"] = (ends[0] - marks[0].time_ns) / 1e6
    steps = [(later - earlier) / 1e6 for earlier, later in itertools.pairwise(ends)]
    times["decode_step_ms"] = steps
    times["T_first_decode_step"] = steps[0] if steps else None
    times["T_per_output_token"] = times[DECODE] / len(steps) if steps else None
    return times


def with_decode(marks: Sequence[Mark]) -> list[Mark]:
    """Put ``T_LLM_decode`` from the end of the prefill to the end of the last forward."""
    ends = [i for i, mark in enumerate(marks) if mark.label == DECODE_FORWARD and not mark.opens]
    if not ends:
        return list(marks)
    first = marks.index(next(m for m in marks if m.label == PREFILL and not m.opens)) + 1
    last = ends[-1] + 1
    return [
        *marks[:first],
        Mark(marks[first - 1].time_ns, DECODE, True),
        *marks[first:last],
        Mark(marks[last - 1].time_ns, DECODE, False),
        *marks[last:],
    ]


def decoder_blocks(decoder: nn.Module) -> nn.ModuleList:
    """Find a decoder's blocks: the longest list of modules it has.

    Raises
    ------
    MeasurementError
        When it has none.
    """
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise MeasurementError(
            f"{type(decoder).__name__} has no list of blocks to hook; use measurement.method="
            "timeline or subtraction"
        )
    return max(lists, key=len)


def _cache_bytes(cache: Any) -> int | None:
    """Add up the keys and values that a cache holds."""
    if cache is None:
        return None
    tensors = [
        tensor
        for layer in cache.layers
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
    ]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
