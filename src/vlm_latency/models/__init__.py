"""Models by name: what they are without weights, and loading them; see `load` and `describe`.

Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlm_latency.models.null import NullArchitecture, NullVLM
from vlm_latency.models.zoo import NULL, load_zoo, weights_kind

if TYPE_CHECKING:
    from vlm_latency.models.architecture import Architecture
    from vlm_latency.models.loading import VLM
    from vlm_latency.options import ModelOptions

__all__ = [
    "describe",
    "dtype_name",
    "known_models",
    "load",
    "resolve_device",
    "weights_kind",
]


def load(options: ModelOptions) -> VLM | NullVLM:
    """Load the model that the options ask for; see `vlm_latency.models.loading.load`."""
    if options.name == NULL:
        return NullVLM(options)
    from vlm_latency.models import loading

    return loading.load(options)


def describe(options: ModelOptions) -> Architecture | NullArchitecture:
    """A model's architecture, no weights; see `vlm_latency.models.architecture.describe`."""
    if options.name == NULL:
        return NullArchitecture()
    from vlm_latency.models import architecture

    return architecture.describe(options)


def resolve_device(options: ModelOptions) -> str:
    """Where the model runs: ``cpu``, ``cuda:0``; a device that is not there is a `ModelError`."""
    if options.name == NULL:
        return "cpu"
    from vlm_latency.models import loading

    return str(loading.resolve_device(options))


def dtype_name(options: ModelOptions) -> str:
    """What the model computes in: ``float32``, ``bfloat16`` or ``float16``."""
    if options.name == NULL:
        return "float32"
    from vlm_latency.models import loading

    dtype = loading.resolve_dtype(options, loading.resolve_device(options))
    return str(dtype).removeprefix("torch.")


def known_models(zoo_file: str | None = None) -> list[str]:
    """The zoo's names, with those of a user's own zoo file."""
    return sorted(load_zoo(zoo_file).models)


def __getattr__(name: str) -> Any:
    if name == "VLM":
        from vlm_latency.models.loading import VLM

        return VLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
