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


def materialise(model: PreTrainedModel, device: torch.device, seed: int) -> PreTrainedModel:
    """Give a model on the meta device random weights on `device`, in place.

    Matrices are normal with a standard deviation of 1/√fan-in, so that activations neither vanish
    nor overflow at any depth. Embeddings are small against what the layers add: with a tied head
    the model would otherwise repeat its input. Tied weights stay tied. The same seed on the same
    kind of device gives the same weights.
    """
    generator = torch.Generator(device).manual_seed(seed)
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in made:
                made[id(parameter)] = _fill(module, name, parameter, device, generator)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty_like(buffer, device=device)
    model.initialize_weights()
    return model.requires_grad_(False)


@torch.no_grad()
def _fill(
    module: nn.Module,
    name: str,
    parameter: nn.Parameter,
    device: torch.device,
    generator: torch.Generator,
) -> nn.Parameter:
    if parameter.ndim < 2:
        return nn.Parameter(torch.zeros_like(parameter, device=device))
    new = nn.Parameter(torch.empty_like(parameter, device=device))
    shape = parameter.shape
    if isinstance(module, nn.Embedding) or "embed" in name:
        std = 0.1 / shape[-1] ** 0.5
    elif type(module).__name__.endswith("Experts"):  # (experts, out, in)
        std = shape[-1] ** -0.5
    else:
        std = shape[1:].numel() ** -0.5
    new.normal_(0, std, generator=generator)
    new._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers passes it over
    return new
