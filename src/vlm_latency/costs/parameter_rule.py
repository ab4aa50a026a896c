"""The rule of thumb 2 × parameters × tokens, as the study this project grows from applied it.

Kept under its own name so that its numbers can be reproduced. What is wrong with it:

- the projector has no token factor: it is too small by the number of vectors projected (about a
  thousand);
- the decoder's parameters include the embedding table, which is looked up and not multiplied, the
  head on every position although prefill computes it on the last one only, and all experts of a
  mixture although a token visits ``top_k`` of them;
- decode counts N steps for N tokens, where the first comes from prefill;
- attention's own products, quadratic in the length, are missing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vlm_latency.costs.shapes import RequestShape


def parameter_rule(parameters: Any, shape: RequestShape) -> dict[str, Any]:
    """Estimate FLOPs of each part by the four formulas, verbatim.

    Parameters
    ----------
    parameters
        With ``params_vision_encoder``, ``params_projector``, ``params_image_projector`` (the gated
        projector alone, where the model has one; None elsewhere) and ``params_llm``.
    shape : RequestShape

    Returns
    -------
    dict
        FLOPs by part (``vision``, ``projector``, ``llm_prefill``, ``llm_decode``) and ``total``.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> sizes = SimpleNamespace(params_vision_encoder=300, params_projector=50,
    ...                         params_image_projector=None, params_llm=1000)
    >>> shape = RequestShape(336, 336, 20, 16, 1, 64, 4)
    >>> {part: int(flops) for part, flops in parameter_rule(sizes, shape).items()}
    {'vision': 38400, 'projector': 100, 'llm_prefill': 40000, 'llm_decode': 8000, 'total': 86500}
    """
    projector = parameters.params_image_projector
    if projector is None:
        projector = parameters.params_projector
    has_image = np.minimum(shape.num_crops, 1)
    flops = {
        "vision": parameters.params_vision_encoder * shape.num_vision_patches * 2,
        "projector": projector * has_image * 2,
        "llm_prefill": parameters.params_llm * shape.num_total_tokens * 2,
        "llm_decode": parameters.params_llm * shape.num_output_tokens * 2,
    }
    return {**flops, "total": sum(flops.values())}
