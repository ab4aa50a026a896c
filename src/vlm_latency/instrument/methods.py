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
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vlm_latency.errors import MeasurementError
from vlm_latency.instrument.intervals import DECODE, OTHER, TIMES, intervals
from vlm_latency.instrument.meter import Meter, Reading
from vlm_latency.instrument.timeline import partition
from vlm_latency.models.boundaries import ENCODER, PREFILL, PROJECTOR, blocks_of, boundaries
from vlm_latency.options import unable_to_part
from vlm_latency.records import Row

if TYPE_CHECKING:
    from vlm_latency.models.loading import VLM
    from vlm_latency.models.requests import Prepared


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
        times: Row = dict.fromkeys(TIMES)
        if device_marks is None:
            times.update(host)
        else:
            times.update(intervals(device_marks, len(tokens)))
            times.update({name: host.get(name[:-5]) for name in TIMES if name.endswith("_host")})
        return self._reading(times, tokens, output, host["T_total"])

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
        times: Row = dict.fromkeys(TIMES)
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
        return self._reading(
            times, tokens, output, features_ms + encoder_ms + (forward_ms or 0.0) + total_ms
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
        blocks = blocks_of(self.vlm.components.language_model)
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
        For a method that cannot run with this model or engine.
    """
    if why := unable(vlm, method, engine):
        raise MeasurementError(f"{why}; use timeline")
    return METERS[method](vlm, engine, max_cache_len, nvtx)


def unable(vlm: VLM, method: str, engine: str) -> str | None:
    """Say why a method cannot run with this model and engine; None where it can."""
    if method == "timeline":
        return None
    if vlm.components.more_encoders:
        return (
            f"{vlm.options.name} has {len(vlm.components.encoders)} vision encoders, and "
            f"measurement.method={method} runs one by itself"
        )
    return unable_to_part(method, engine)
