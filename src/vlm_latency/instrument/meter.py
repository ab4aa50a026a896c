"""What every method of timing a request has in common: the engine, the timed region, the hooks."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from vlm_latency.errors import MeasurementError
from vlm_latency.instrument.clock import CudaClock, HostClock
from vlm_latency.instrument.engines import Engine
from vlm_latency.instrument.intervals import OTHER
from vlm_latency.instrument.timeline import Timeline
from vlm_latency.models.attention import attending
from vlm_latency.models.boundaries import boundaries
from vlm_latency.records import Row

if TYPE_CHECKING:
    from vlm_latency.models.loading import VLM
    from vlm_latency.models.requests import Prepared

T = TypeVar("T")
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
    """Surround a timed region: no garbage collection, no autograd, device idle at the start."""
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
            Number of tokens: exactly, or with ``stop_at_eos`` at most. 1 is prefill only.

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

    def _reading(self, times: Row, tokens: list[int], output: Any, timed_ms: float) -> Reading:
        on_cuda = self.device.type == "cuda"
        return Reading(
            times=times,
            token_ids=tokens,
            peak_memory_bytes=torch.cuda.max_memory_allocated(self.device) if on_cuda else None,
            kv_cache_bytes=_cache_bytes(output.past_key_values),
            timed_ms=timed_ms,
            prefill_length=self._prefill_length,
        )

    def _tokens(
        self, output: Any, prepared: Prepared, max_new_tokens: int, stop_at_eos: bool
    ) -> list[int]:
        tokens = output.sequences[0, prepared.inputs["input_ids"].shape[1] :].tolist()
        if len(tokens) != max_new_tokens and not (stop_at_eos and tokens):
            raise MeasurementError(
                f"generate() returned {len(tokens)} tokens where {max_new_tokens} were forced"
            )
        return tokens


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
