"""Where the time of a vision-language model's request goes, and what predicts it.

The library without Kedro is here: `measure`, `compare`, `load_model` and `VLM`; see
`vlm_latency.api`. Each is imported when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm_latency.api import ModelComparison, compare, load_model, measure
    from vlm_latency.models.loading import VLM

__version__ = "0.1.0"
__all__ = ["VLM", "ModelComparison", "compare", "load_model", "measure"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("vlm_latency." + ("models" if name == "VLM" else "api")), name)
