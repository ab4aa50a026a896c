"""Molmo v1 (arXiv 2409.17146) as a transformers model: MolmoE-1B, 7B-O, 7B-D and 72B.

``import vlm_latency.molmo`` is light; touching any of the names below imports transformers and
registers them with its Auto classes. :mod:`vlm_latency.molmo.tiling` needs neither torch nor
transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm_latency.molmo.configuration import MolmoConfig
    from vlm_latency.molmo.image_processing import MolmoImageProcessor
    from vlm_latency.molmo.modeling import MolmoForConditionalGeneration, MolmoModel
    from vlm_latency.molmo.processing import MolmoProcessor

__all__ = [
    "MolmoConfig",
    "MolmoForConditionalGeneration",
    "MolmoImageProcessor",
    "MolmoModel",
    "MolmoProcessor",
    "register",
]


def register() -> None:
    """Make the Auto classes of transformers build and load ``model_type: molmo`` with these."""
    from vlm_latency.molmo import _auto  # noqa: F401


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vlm_latency.molmo import _auto

    return getattr(_auto, name)
