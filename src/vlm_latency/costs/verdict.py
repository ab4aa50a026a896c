"""How far the costs of an architecture are known: exactly, partly, or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from vlm_latency.costs.shapes import PARTS, RequestShape
from vlm_latency.costs.table import add_costs


@dataclass(frozen=True)
class Verdict:
    """See `verdict`; `reason` is empty for costs that are exact."""

    costs: Literal["exact", "partly", "refused"]
    reason: str = ""


def verdict(architecture: Any, width: int = 640, height: int = 480) -> Verdict:
    """Say how far an architecture's costs are known, on one request with an image and one without.

    Parameters
    ----------
    architecture : Architecture
        No weights are needed.
    width, height : int
        Of the image, in pixels.

    Returns
    -------
    Verdict
        ``exact``: FLOPs by arithmetic, by PyTorch's counter and by a forward of the whole model
        agree, and so does the cache. ``partly``: some parts are null, only counted, or not
        verified. ``refused``: no part is known.
    """
    shapes = [RequestShape(0, 0, 40, 0, 0, 0, 4)]
    unseen = ""
    try:
        image = architecture.image_tokens(width, height)
    except Exception as error:  # a processor that is not there, or refuses the image
        unseen = f"no image could be prepared: {' '.join(str(error).split())}"
    else:
        total, vision = image.num_total_tokens, image.num_vision_tokens
        patches = image.num_crops, image.num_vision_patches
        shapes.append(RequestShape(width, height, total + 20, vision, *patches, 4))
    found = add_costs(pd.DataFrame(map(vars, shapes)), architecture, dtype="float32")
    notes = [unseen, *found["costs_note"].dropna().unique()]
    last = found.iloc[-1]
    if pd.isna(last["predicted_kv_cache_bytes"]):
        notes.append("the size of the key-value cache is not known")
    reason = "; ".join(filter(None, notes))
    known = [last[f"flops_{part}{kind}"] for part in PARTS for kind in ("_analytic", "_counted")]
    if all(pd.isna(value) for value in known):
        return Verdict("refused", reason)
    return Verdict("partly" if reason else "exact", reason)
