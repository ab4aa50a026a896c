"""Random weights, made in place on the device and in the type they are used in.

No second copy, no initialisation in float32: the model is built on the meta device, its parameters
are allocated on the target and filled there. transformers' own initialisation then runs for what
was not filled (norms, biases, buffers such as rotary frequencies).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# With every matrix at 1/√fan-in, attention averages its whole context: hidden states of all
# positions align, and greedy decoding repeats one token. So attention is made to choose (sharper
# scores) and to add less, and the MLP, which sees one token alone, to add more.
_GAIN = {"q_proj": 2.0, "k_proj": 2.0, "o_proj": 0.3, "out_proj": 0.3, "down_proj": 2.0, "fc2": 2.0}
_SHARPENED_NORMS = ("q_norm", "k_norm")
# An embedding that is large against what the layers add would, with a tied head, repeat its input.
_EMBEDDING_STD = 0.1


def materialise(model: PreTrainedModel, device: torch.device, seed: int) -> PreTrainedModel:
    """Give a model on the meta device random weights on `device`, in place.

    Matrices are normal with a standard deviation of (about) 1/√fan-in, so that activations neither
    vanish nor overflow at any depth. Tied weights stay tied. The same seed on the same kind of
    device gives the same weights.
    """
    generator = torch.Generator(device).manual_seed(seed)
    made: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in made:
                new = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False)
                _fill(new, module, path.rpartition(".")[2], name, generator)
                made[id(parameter)] = new
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty_like(buffer, device=device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)  # transformers draws a few vectors from the global generator
        model.initialize_weights()
    return model


def _fill(
    new: nn.Parameter, module: nn.Module, called: str, name: str, generator: torch.Generator
) -> None:
    """Fill a parameter, and mark it for transformers to pass over; vectors are left to it."""
    if called in _SHARPENED_NORMS:
        new.fill_(2.0)
    elif new.ndim < 2:
        new.zero_()  # in case transformers knows no rule for it
        return
    else:
        new.normal_(0, _std(new, module, called, name), generator=generator)
    new._is_hf_initialized = True  # type: ignore[attr-defined]


def _std(new: nn.Parameter, module: nn.Module, called: str, name: str) -> float:
    if isinstance(module, nn.Embedding) or "embed" in name:
        return _EMBEDDING_STD / float(getattr(module, "scalar_embed_scale", 1))
    experts = type(module).__name__.endswith("Experts")  # (experts, out, in)
    fan_in = new.shape[-1] if experts else new.shape[1:].numel()
    return _GAIN.get(name if experts else called, 1.0) / float(fan_in) ** 0.5
