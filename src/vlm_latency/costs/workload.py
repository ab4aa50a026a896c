"""Predict latencies of requests that were not run, and what dropping vision tokens could save."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from vlm_latency.costs.bytes_moved import element_bytes
from vlm_latency.costs.model import CostModel
from vlm_latency.costs.prediction import PART_TIMES, Predictor
from vlm_latency.costs.roofline import roofline_ms
from vlm_latency.costs.shapes import PARTS, RequestShape
from vlm_latency.errors import UserError
from vlm_latency.records import SHAPE

# Where a pruned vision token leaves the model: it costs nothing from there on.
PLACES = ("before the encoder", "after the projector", "at decoder layer")


def workload_columns(
    costs: CostModel,
    image: tuple[int, int],
    prompt_tokens: int,
    output_tokens: ArrayLike,
    dtype: str,
    vision_tokens: ArrayLike | None = None,
    encoded: ArrayLike | None = None,
) -> pd.DataFrame:
    """Compute costs of requests that were not run: one image size, other numbers of vision tokens.

    Parameters
    ----------
    image : (width, height)
        In pixels.
    prompt_tokens : int
        Text tokens of the prompt; the image's special tokens are added.
    output_tokens, vision_tokens : sequences of one length
        Tokens written; vision tokens that enter the decoder (default: the image's own).
    encoded : sequence of float, optional
        Share of the image's vision work that is done; default: vision tokens over the image's
        own. FLOPs and activations of encoder and projector are in proportion to it, weights and
        launches are not.
    """
    if costs.unknown:
        raise UserError(
            f"no latency of {costs.architecture.name} can be predicted, because its costs are not "
            "known: " + "; ".join(f"{part}: {why}" for part, why in costs.unknown.items())
        )
    own = costs.architecture.image_tokens(*image)
    outputs = np.asarray(output_tokens, dtype=np.int64)
    vision = np.broadcast_to(
        own.num_vision_tokens if vision_tokens is None else np.asarray(vision_tokens), outputs.shape
    ).astype(np.int64)
    share = vision / own.num_vision_tokens if encoded is None else np.asarray(encoded)
    rest = own.num_total_tokens - own.num_vision_tokens + prompt_tokens
    shape = RequestShape(
        image_width=np.full_like(outputs, image[0]),
        image_height=np.full_like(outputs, image[1]),
        num_total_tokens=vision + rest,
        num_vision_tokens=np.full_like(outputs, own.num_vision_tokens),
        num_crops=np.full_like(outputs, own.num_crops),
        num_vision_patches=np.full_like(outputs, own.num_vision_patches),
        num_output_tokens=outputs,
    )
    flops, moved = costs.flops(shape), costs.bytes_moved(shape, dtype)
    launches = costs.launches(shape)
    for part, tally in (("vision", costs.census.vision), ("projector", costs.census.projector)):
        weights = tally.weights * element_bytes(dtype)
        flops[part] = flops[part] * share
        moved[part] = weights + (moved[part] - weights) * share
    return pd.DataFrame(
        {
            "num_vision_tokens": vision,
            "num_total_tokens": vision + rest,
            "num_output_tokens": outputs,
            **{f"flops_{part}": flops[part] for part in PARTS},
            **{f"bytes_{part}": moved[part] for part in PARTS},
            **{f"launches_{part}": launches[part] for part in PARTS},
        }
    )


def predict_workload(
    costs: CostModel,
    predictor: Predictor,
    width: int,
    height: int,
    prompt_tokens: int,
    output_tokens: int,
) -> dict[str, Any]:
    """Predict one request without running it.

    Parameters
    ----------
    costs : CostModel
        Of the model in question, calibrated or not.
    predictor : Predictor
    width, height : int
        Of the image, in pixels.
    prompt_tokens, output_tokens : int
        Text tokens before, tokens written after.

    Returns
    -------
    dict
        Token counts, milliseconds of each part and ``T_total``, ``T_first_token``,
        ``T_total_low``, ``T_total_high`` (None without a calibration), ``binds`` (which side of
        the roofline each part is on), ``predicted_kv_cache_bytes``, ``predicted_peak_memory_bytes``.
    """
    table = workload_columns(
        costs, (width, height), prompt_tokens, [output_tokens], predictor.dtype
    )
    row = table.iloc[0].to_dict()
    predicted = predictor.predict(table)
    times = {str(name): float(predicted[name].iloc[0]) for name in predicted}
    own = costs.architecture.image_tokens(width, height)
    shape = RequestShape(
        width,
        height,
        int(row["num_total_tokens"]),
        own.num_vision_tokens,
        own.num_crops,
        own.num_vision_patches,
        output_tokens,
    )
    binds = {
        part: roofline_ms(
            row[f"flops_{part}"],
            row[f"bytes_{part}"],
            row[f"launches_{part}"],
            predictor.hardware,
            predictor.dtype,
        )[1]
        for part in PARTS
    }
    first = sum(times[column] for part, column in PART_TIMES.items() if part != "llm_decode")
    return {
        "num_crops": own.num_crops,
        **{name: int(row[name]) for name in SHAPE[1:]},
        **{name: None if np.isnan(value) else value for name, value in times.items()},
        "extrapolated": bool(predictor.outside(table)[0]),
        "T_first_token": float(first),
        "binds": binds,
        "predicted_kv_cache_bytes": int(costs.kv_cache_bytes(shape, predictor.dtype)),
        "predicted_peak_memory_bytes": int(costs.peak_memory_bytes(shape, predictor.dtype)),
    }


def latency_grid(
    costs: CostModel,
    predictor: Predictor,
    image: tuple[int, int],
    prompt_tokens: int,
    vision_tokens: Sequence[int],
    output_tokens: Sequence[int],
) -> pd.DataFrame:
    """Predict latency over vision tokens × output tokens, one row per cell.

    The vision part is in proportion to that of `image`. Columns: ``num_vision_tokens``,
    ``num_output_tokens``, what `Predictor.predict` gives, and ``extrapolated``: whether the cell is
    outside of what was measured.
    """
    vision, outputs = (
        axis.ravel() for axis in np.meshgrid(vision_tokens, output_tokens, indexing="ij")
    )
    table = workload_columns(costs, image, prompt_tokens, outputs, predictor.dtype, vision)
    cells = table[["num_vision_tokens", "num_output_tokens"]].join(predictor.predict(table))
    return cells.assign(extrapolated=predictor.outside(table))


def pruning_table(
    costs: CostModel,
    predictor: Predictor,
    image: tuple[int, int],
    prompt_tokens: int,
    output_tokens: int,
    keep: Sequence[float],
    drop_layer: int,
) -> pd.DataFrame:
    """Predict what dropping vision tokens could save at best, by where they are dropped.

    Before the encoder all parts shrink; after the projector prefill and decode do; at decoder
    layer k the first k layers still see every token, in prefill and in the cache. Choosing which
    tokens to drop is taken to cost nothing.

    Parameters
    ----------
    keep : sequence of float
        Shares of the vision tokens kept, 1 for all.
    drop_layer : int
        k: number of decoder layers that see all tokens.

    Returns
    -------
    DataFrame
        One row per place and share: ``place``, ``keep``, ``num_vision_tokens`` kept, the columns
        of `Predictor.predict`, ``speed_up`` (over keeping all) and ``saved_ms``.

    Raises
    ------
    UserError
        For a share outside 0 … 1, or a layer that the decoder has not.
    """
    layers = len(costs.census.kv_widths)
    if not all(0 < share <= 1 for share in keep):
        raise UserError(f"found keep {list(keep)}; expected shares above 0 and up to 1")
    if not 0 < drop_layer < layers:
        raise UserError(
            f"found drop_layer {drop_layer}; expected 1 … {layers - 1}: the decoder has {layers} "
            "layers"
        )
    own = costs.architecture.image_tokens(*image).num_vision_tokens
    shares = np.asarray(keep, dtype=float)
    kept = np.rint(shares * own).astype(np.int64)
    outputs = np.full_like(kept, output_tokens)

    def columns(tokens: np.ndarray, encoded: np.ndarray) -> pd.DataFrame:
        return workload_columns(
            costs, image, prompt_tokens, outputs, predictor.dtype, tokens, encoded
        )

    everything = np.ones_like(shares)
    full = columns(np.full_like(kept, own), everything)
    dropped = columns(kept, everything)
    # Layers are alike, so a part of them is that part of the work.
    above = drop_layer / layers
    mixed = dropped.copy()
    for name in full.columns[full.columns.str.endswith(("_llm_prefill", "_llm_decode"))]:
        mixed[name] = above * full[name] + (1 - above) * dropped[name]
    rows = []
    for place, table in zip(PLACES, (columns(kept, shares), dropped, mixed), strict=True):
        times = predictor.predict(table)
        label = f"{place} {drop_layer}" if place == PLACES[2] else place
        rows.append(
            pd.DataFrame({"place": label, "keep": shares, "num_vision_tokens": kept})
            .join(times)
            .assign(extrapolated=predictor.outside(table))
        )
    found = pd.concat(rows, ignore_index=True)
    whole = predictor.predict(full)["T_total"].iloc[0]
    return found.assign(speed_up=whole / found["T_total"], saved_ms=whole - found["T_total"])
