"""Models by name: what they are without weights, and loading them; see `load` and `describe`.

Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from typing import Any

from vlm_latency.models.handle import (
    ModelHandle,
    check_fit_together,
    check_threads,
    describe,
    dtype_name,
    known_models,
    load,
    resolve_device,
    thread_count,
)
from vlm_latency.models.zoo import weights_kind

__all__ = [
    "ModelHandle",
    "check_fit_together",
    "check_threads",
    "describe",
    "dtype_name",
    "known_models",
    "load",
    "resolve_device",
    "thread_count",
    "weights_kind",
]


def __getattr__(name: str) -> Any:
    if name == "VLM":
        from vlm_latency.models.loading import VLM

        return VLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
