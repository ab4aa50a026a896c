"""A model that a user's own Python file makes: ``model.name=mine.py:make_model``.

The function takes no arguments and returns ``(model, processor)``: any image-text-to-text model of
transformers, fine-tuned, pruned or changed otherwise, and its processor. It is called once in a
process, and its model is moved to ``model.device`` and, where given, ``model.dtype``.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_latency.errors import ModelError
from vlm_latency.models.loading import VLM, check_fits, resolve_device
from vlm_latency.models.zoo import own_file

if TYPE_CHECKING:
    import torch

    from vlm_latency.models.architecture import Architecture
    from vlm_latency.options import ModelOptions

__all__ = ["check_fits", "describe", "load", "resolve_device", "resolve_dtype"]


def load(options: ModelOptions) -> VLM:
    """Make the model by the user's function, once in a process.

    Raises
    ------
    ModelError
        When the file or its function is missing, fails, or returns something else.
    """
    return _made(options.model_dump_json())


def describe(options: ModelOptions) -> Architecture:
    """Describe what the function made."""
    return load(options).architecture


def resolve_dtype(options: ModelOptions, device: torch.device) -> torch.dtype:
    """Give the type of the weights that the function made."""
    return load(options).dtype


@lru_cache(maxsize=8)
def _made(options_json: str) -> VLM:
    import torch

    from vlm_latency.options import ModelOptions

    options = ModelOptions.model_validate_json(options_json)
    made: Any = _call(*(own_file(options.name) or (Path(), "")))
    if not (isinstance(made, tuple) and len(made) == 2 and hasattr(made[0], "base_model")):
        raise ModelError(
            f"{options.name} returned {type(made).__name__}; expected (model, processor), an "
            "image-text-to-text model of transformers and its processor"
        )
    model, processor = made
    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    model.to(resolve_device(options), dtype)
    vlm = VLM.from_objects(model, processor, name=options.name)
    attention = model.config._attn_implementation or "eager"
    vlm.options = options.model_copy(update={"attn_implementation": attention})
    return vlm


def _call(path: Path, function: str) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ModelError(f"model.name: there is no file {path}; expected file.py:function")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return getattr(module, function)()
    except Exception as error:  # whatever the user's code raises
        raise ModelError(
            f"{path}:{function} failed: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
