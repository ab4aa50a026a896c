"""A model by its options: described at once, loaded when it is first run."""

from __future__ import annotations

import ctypes
import importlib.util
import runpy
import sys
from collections.abc import Iterable, Sequence
from functools import cache, cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_latency.errors import ModelError, UserError
from vlm_latency.models.known import KnownArchitecture, is_known
from vlm_latency.models.zoo import NULL, load_zoo, own_file, weights_kind

if TYPE_CHECKING:
    from vlm_latency.models.interface import LoadedModel, ModelArchitecture
    from vlm_latency.options import ModelOptions

# Positions of key-value cache that a model must have room for beside its weights, at most.
_CACHE_TOKENS = 4096
# Activations, workspace and the device's own context, as a share of the weights and in bytes.
_MARGIN_SHARE = 0.05
_MARGIN_BYTES = {"cuda": 2**30, "cpu": 2**28}


def room_of(options: ModelOptions) -> Any:
    """Give the module that makes this kind of model: each has the functions that are used below."""
    name = "null" if options.name == NULL else "own" if own_file(options.name) else "loading"
    return import_module(f"vlm_latency.models.{name}")


class ModelHandle:
    """A model that is described at once and loaded when it is first run."""

    def __init__(self, options: ModelOptions):
        self.options = options

    @cached_property
    def weights(self) -> str:
        """``pretrained``, ``random`` or ``own``; known without loading anything."""
        return weights_kind(self.options)

    @cached_property
    def architecture(self) -> ModelArchitecture:
        """What analyses need to know, without weights."""
        if is_known(self.options) and self.device == "cpu":
            return KnownArchitecture(self.options)
        return describe(self.options)

    @cached_property
    def device(self) -> str:
        """Where it runs: ``cpu``, ``cuda:0``; a device that is not there is an error."""
        return resolve_device(self.options)

    @cached_property
    def dtype(self) -> str:
        """What it computes in: ``float32``, ``bfloat16`` or ``float16``."""
        return dtype_name(self.options)

    def check_fits(self) -> None:
        """Refuse a model that cannot be built, or that the device's free memory does not hold."""
        found = self.architecture
        if isinstance(found, KnownArchitecture):
            found.once("builds", lambda: room_of(self.options).check_builds(found, self.options))
            check_room(found, self.device, self.dtype)
        else:
            room_of(self.options).check_fits(found, self.options)

    @cached_property
    def vlm(self) -> LoadedModel:
        """The model on its device, ready to measure."""
        return load(self.options)


def check_fit_together(handles: Sequence[ModelHandle]) -> None:
    """Refuse models whose weights the free memory of their device does not hold at once.

    Raises
    ------
    ModelError
        With the bytes wanted and the bytes free.
    """
    for device in dict.fromkeys(handle.device for handle in handles):
        here = [h for h in handles if h.device == device and h.weights != "own"]
        wanted = sum(handle.architecture.weight_bytes(handle.dtype) for handle in here)
        if wanted > (free := free_bytes(device)):
            raise ModelError(
                f"{len(here)} models do not fit on {device} at once: {wanted / 2**30:.2f} GiB of "
                f"weights, and {free / 2**30:.2f} GiB are free; compare fewer, or smaller ones"
            )


def check_room(architecture: ModelArchitecture, device: str, dtype: str) -> None:
    """Refuse a model whose weights and cache the free memory of a device does not hold.

    Raises
    ------
    ModelError
        With the bytes wanted and the bytes free.
    """
    weights = architecture.weight_bytes(dtype)
    positions = min(architecture.max_positions or _CACHE_TOKENS, _CACHE_TOKENS)
    cache = positions * architecture.kv_bytes_per_token(dtype)
    margin = round(weights * _MARGIN_SHARE) + _MARGIN_BYTES.get(device.partition(":")[0], 0)
    free = free_bytes(device)
    if weights + cache + margin > free:
        raise ModelError(
            f"{architecture.name} does not fit on {device}: weights in {dtype} "
            f"{_gib(weights)} + key-value cache of {positions} positions {_gib(cache)} + margin "
            f"{_gib(margin)} = {_gib(weights + cache + margin)}, but {_gib(free)} are free. Use a "
            "smaller model, a narrower model.dtype or another device"
        )


def free_bytes(device: str) -> int:
    """Give the free memory of a device."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    import psutil

    return int(psutil.virtual_memory().available)


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


def load(options: ModelOptions) -> LoadedModel:
    """Load the model that the options ask for; see `vlm_latency.models.loading.load`."""
    found: LoadedModel = room_of(options).load(options)
    return found


def describe(options: ModelOptions) -> ModelArchitecture:
    """Describe a model's architecture; see `vlm_latency.models.architecture.describe`."""
    found: ModelArchitecture = room_of(options).describe(options)
    return found


def resolve_device(options: ModelOptions) -> str:
    """Say where the model runs: ``cpu``, ``cuda:0``; a missing device is a `ModelError`."""
    if options.device == "cpu" or (options.device == "auto" and not _may_have_gpu()):
        return "cpu"  # as torch would say, which takes seconds to import
    return str(room_of(options).resolve_device(options))


def dtype_name(options: ModelOptions) -> str:
    """Say what the model computes in: ``float32``, ``bfloat16`` or ``float16``."""
    if is_known(options) and resolve_device(options) == "cpu":
        return "float32" if options.dtype == "auto" else options.dtype
    room = room_of(options)
    return str(room.resolve_dtype(options, room.resolve_device(options))).removeprefix("torch.")


@cache
def _may_have_gpu() -> bool:
    """Whether torch, which is not imported for it, might find a GPU: a driver is here, and a build for it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return True
    build = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    if build.get("hip") or not build.get("cuda"):
        return bool(build.get("hip"))
    if sys.platform != "linux":
        return True
    try:
        ctypes.CDLL("libcuda.so.1")  # what CUDA's own runtime looks for
    except OSError:
        return any(Path("/dev", name).exists() for name in ("nvidiactl", "nvidia0", "dxg"))
    return True


def thread_count(options: ModelOptions, device: str | None = None) -> int:
    """Count CPU threads while measuring: those asked for, or 1, or torch's default with a GPU."""
    if options.num_threads is not None:
        return options.num_threads
    if (device or resolve_device(options)).startswith("cpu"):
        return 1
    import torch

    return torch.get_num_threads()


def check_threads(models: Iterable[ModelHandle | LoadedModel]) -> None:
    """Refuse models of one process that ask for different numbers of CPU threads.

    Raises
    ------
    UserError
        Naming the numbers.
    """
    threads = {thread_count(model.options, str(model.device)) for model in models}
    if len(threads) > 1:
        raise UserError(
            f"found models with num_threads {sorted(threads)}; expected one number for all: give "
            "num_threads"
        )


def known_models(zoo_file: str | None = None) -> list[str]:
    """List the zoo's names, with those of a user's own zoo file."""
    return sorted(load_zoo(zoo_file).models)
