"""Which kernel computes attention: chosen for the decoder, named for the encoder.

PyTorch's scaled-dot-product attention has several backends. ``model.sdpa_backend`` allows one of
them in the decoder. Vision keeps PyTorch's own choice: Molmo's attention is in float32 there, which
flash attention and cuDNN refuse on a GPU.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlm_latency.errors import ModelError
from vlm_latency.models.boundaries import around, around_compiled_step

if TYPE_CHECKING:
    from vlm_latency.models.components import Modules
    from vlm_latency.options import ModelOptions

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
_PROBE = 16  # positions of a probe: kernels are refused for type, width and mask, not for length


@contextlib.contextmanager
def attending(model: Any, components: Modules, backend: str) -> Iterator[None]:
    """Let the decoder attend through one backend, for a while; a compiled step is one of it.

    Parameters
    ----------
    backend
        ``auto`` leaves the choice to PyTorch.
    """
    if backend == "auto":
        yield
        return
    inside: list[Any] = []

    def enter() -> None:
        inside.append(sdpa_kernel([BACKENDS[backend]]))
        inside[-1].__enter__()

    def leave() -> None:
        inside.pop().__exit__(None, None, None)

    with contextlib.ExitStack() as stack:
        stack.enter_context(around(components.language_model, enter, leave, always=True))
        stack.enter_context(around_compiled_step(model, enter, leave))
        try:
            yield
        finally:
            while inside:  # a compiled step that raised
                leave()


def check_backend(
    options: ModelOptions, config: Any, device: torch.device, dtype: torch.dtype
) -> None:
    """Refuse a backend that the decoder cannot use here, before anything is loaded.

    transformers' own attention is tried on a few positions of the decoder's shape: a prefill, and
    a decode step as the engine makes it (a static cache needs a mask).

    Raises
    ------
    ModelError
        Naming the backends that work.
    """
    asked = options.sdpa_backend
    if asked == "auto":
        return
    if options.attn_implementation != "sdpa":
        raise ModelError(
            f"model.sdpa_backend={asked} has no effect with model.attn_implementation="
            f"{options.attn_implementation}; expected attn_implementation=sdpa, or "
            "sdpa_backend=auto"
        )
    masked = options.engine != "eager"
    text = config.get_text_config()
    if not _works(BACKENDS[asked], text, device, dtype, masked):
        there = [n for n, b in BACKENDS.items() if _works(b, text, device, dtype, masked)]
        raise ModelError(
            f"model.sdpa_backend={asked} does not compute this decoder's attention "
            f"({str(dtype).removeprefix('torch.')} on {device}, engine {options.engine}); found "
            f"{', '.join(there) or 'none'} working here, or use auto"
        )


def encoder_backend(config: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """Name the backend that PyTorch chooses for the encoder; None where its shape is not known."""
    vision = getattr(config, "vision_config", None)
    heads = getattr(vision, "num_attention_heads", None) or getattr(vision, "num_heads", None)
    width = getattr(vision, "hidden_size", None)
    if not (heads and width):
        return None
    if getattr(config, "float32_attention", False):
        dtype = torch.float32
    query = torch.zeros(1, heads, _PROBE, width // heads, device=device, dtype=dtype)
    chosen = SDPBackend(torch._fused_sdp_choice(query, query, query))
    return next((name for name, backend in BACKENDS.items() if backend == chosen), None)


def _works(
    backend: SDPBackend, text: Any, device: torch.device, dtype: torch.dtype, masked: bool
) -> bool:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    heads = int(text.num_attention_heads)
    shared = int(getattr(text, "num_key_value_heads", None) or heads)
    width = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    layer: Any = SimpleNamespace(num_key_value_groups=heads // shared, is_causal=True)

    def zeros(heads: int, length: int) -> torch.Tensor:
        return torch.zeros(1, heads, length, width, device=device, dtype=dtype)

    keys = zeros(shared, _PROBE)
    mask = torch.ones(1, 1, 1, _PROBE, device=device, dtype=torch.bool) if masked else None
    try:
        with sdpa_kernel([backend]), torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they say why it is refused
            for queries, allowed in ((_PROBE, None), (1, mask)):
                sdpa_attention_forward(layer, zeros(heads, queries), keys, keys, allowed)
    except RuntimeError:
        return False
    return True
