"""The record of one measured run: its columns, their units, and what must hold between them.

Times are milliseconds, sizes bytes, nothing is rounded. Names are those of the study the project
grows from, so that its users find every number again.
"""

from __future__ import annotations

import hashlib
from typing import Any

import pandas as pd

SCHEMA_VERSION = 1

# The parts that add up to T_total, in the order in which a request runs through them.
COMPONENTS = ("T_vision_encoder", "T_projector", "T_LLM_prefill", "T_LLM_decode", "T_other")
COST_PARTS = ("vision", "projector", "llm_prefill", "llm_decode", "total")

REQUEST_COLUMNS: dict[str, str] = {
    "request_id": "string",
    "experiment": "string",
    "dataset": "string",
    "synthetic": "boolean",
    "question_id": "Int64",
    "image_id": "Int64",
    "question": "string",
    "question_type": "string",
    "answer_type": "string",
    "answer": "string",
    "answers": "string",  # JSON list
    "image_path": "string",  # relative to the dataset's root
    "image_sha256": "string",
    "image_recipe": "string",  # JSON; how to make the image, where there is no file
    "image_width": "Int64",
    "image_height": "Int64",
    "tiling_rows": "Int64",  # asked for (exp3, exp4); what came out is in the record
    "tiling_cols": "Int64",
    "grid": "string",
    "resolution": "string",
    "pair": "string",  # requests with equal crops and different tokens share a name
    "output_length": "string",  # natural | answer | none | a number | ≤ and a number: or until EOS
    "seed": "Int64",
    "request_sha256": "string",  # of what is asked: image, texts, rule of the output's length
}

# What makes two requests of one id the same request.
_CONTENT = (
    "question",
    "answer",
    "image_path",
    "image_sha256",
    "image_recipe",
    "output_length",
)

IDENTITY_COLUMNS: dict[str, str] = {
    "experiment": "string",
    "request_id": "string",
    "request_sha256": "string",
    "question_id": "Int64",
    "image_id": "Int64",
    "run_index": "Int64",
    "order_index": "Int64",
    "block_index": "Int64",
    "started_at": "string",  # ISO 8601, UTC
    "fingerprint": "string",
    "model": "string",
    "device": "string",
    "worker": "string",
    "status": "string",  # ok | failed
    "error": "string",
}

INPUT_COLUMNS: dict[str, str] = {
    "grid": "string",
    "resolution": "string",
    "pair": "string",
    "image_width": "Int64",
    "image_height": "Int64",
    "tiling_rows": "Int64",
    "tiling_cols": "Int64",
    "num_crops": "Int64",
    "num_vision_patches": "Int64",
    "num_vision_tokens": "Int64",
    "num_image_special_tokens": "Int64",
    "num_language_tokens": "Int64",
    "num_total_tokens": "Int64",
    "output_length": "string",
    "max_new_tokens": "Int64",
    "num_output_tokens": "Int64",
}

TIME_COLUMNS: dict[str, str] = {
    "T_preprocess": "float64",
    "T_total": "float64",
    "T_vision_encoder": "float64",
    "T_projector": "float64",
    "T_vision_total": "float64",
    "T_LLM_prefill": "float64",
    "T_LLM_decode": "float64",
    "T_LLM_decode_forward": "float64",
    "T_LLM_decode_between": "float64",
    "T_other": "float64",
    "T_first_token": "float64",
    "T_per_output_token": "float64",
    "T_first_decode_step": "float64",
    "decode_step_ms": "object",  # list, one entry per decode forward
    "T_total_host": "float64",
    "T_vision_encoder_host": "float64",
    "T_projector_host": "float64",
    "T_vision_total_host": "float64",
    "T_LLM_prefill_host": "float64",
    "T_LLM_decode_host": "float64",
    "T_other_host": "float64",
    "T_first_token_host": "float64",
    # signed differences of the seed's methods, before clamping at zero
    "raw_T_projector": "float64",
    "raw_T_LLM_prefill": "float64",
    "raw_T_LLM_decode": "float64",
}

NOISE_COLUMNS: dict[str, str] = {
    "first_of_shape": "boolean",
    "involuntary_switches": "Int64",
    "steal_ms": "float64",
    "sm_clock_mhz": "float64",
    "gpu_temperature_c": "float64",
    "gpu_power_w": "float64",
    "throttle_reasons": "string",
    "wall_ms": "float64",  # everything this run took, fetching and preparing included
}

MEMORY_COLUMNS: dict[str, str] = {
    "peak_memory_bytes": "Int64",
    "kv_cache_bytes": "Int64",
    "generated_text": "string",
}

MEASURED_COLUMNS: dict[str, str] = {
    **IDENTITY_COLUMNS,
    **INPUT_COLUMNS,
    **TIME_COLUMNS,
    **NOISE_COLUMNS,
    **MEMORY_COLUMNS,
}


def with_hashes(requests: pd.DataFrame) -> pd.DataFrame:
    """Give each request the hash of its content, by which the journal knows it again."""
    columns = [requests[name].astype("string").fillna("\0").tolist() for name in _CONTENT]
    lines = map("\x1f".join, zip(*columns, strict=True))
    hashes = [hashlib.sha256(line.encode()).hexdigest()[:16] for line in lines]
    return typed(requests.assign(request_sha256=hashes), REQUEST_COLUMNS)


def typed(table: pd.DataFrame, columns: dict[str, str]) -> pd.DataFrame:
    """Give a table exactly these columns, in this order and of these types.

    Columns that are missing come out empty; further ones follow, as they are.
    """
    extra = [name for name in table.columns if name not in columns]
    table = table.reindex(columns=[*columns, *extra])
    return table.astype({name: kind for name, kind in columns.items() if kind != "object"})


def measured_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Make the table of runs from the journal's rows, in the order they were measured."""
    table = typed(pd.DataFrame(rows), MEASURED_COLUMNS)
    return table.sort_values("order_index", kind="stable").reset_index(drop=True)
