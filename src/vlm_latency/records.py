"""The record of one measured run: its columns, their units, and what must hold between them.

Times are milliseconds, sizes bytes, nothing is rounded. Names are those of the study the project
grows from, so that its users find every number again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 1

Row = dict[str, Any]  # one run, or one request: plain values by column

# The parts that add up to T_total, in the order in which a request runs through them.
COMPONENTS = ("T_vision_encoder", "T_projector", "T_LLM_prefill", "T_LLM_decode", "T_other")
UNTIL_FIRST_TOKEN = COMPONENTS[:3]

# What a cost belongs to, and the time of each.
COST_PARTS = ("vision", "projector", "llm_prefill", "llm_decode", "total")
COST_TIMES = dict(zip(COST_PARTS, (*COMPONENTS[:4], "T_total"), strict=True))

# flops.estimator → what its columns' names end with.
ESTIMATORS = {"analytic": "_analytic", "counted": "_counted", "parameter_rule": "_rule"}

# Runs that are alike in these do the same work.
SHAPE = ("num_crops", "num_vision_tokens", "num_total_tokens", "num_output_tokens")

BYTES_PER_VALUE = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
}  # by the dtypes models are measured in

# What the seed's files call vision tokens are the encoder's patches, so many of each crop.
PATCHES_PER_CROP = 576


@dataclass(frozen=True)
class Column:
    """One column of the record.

    Attributes
    ----------
    name
        As in the files.
    dtype
        pandas' name; ``object`` for a list.
    unit
        ``ms``, ``B``, …; empty for texts and counts.
    meaning
        What it holds, and where it is absent.
    """

    name: str
    dtype: str
    unit: str
    meaning: str


def _text(name: str, meaning: str) -> Column:
    return Column(name, "string", "", meaning)


def _count(name: str, meaning: str) -> Column:
    return Column(name, "Int64", "", meaning)


def _flag(name: str, meaning: str) -> Column:
    return Column(name, "boolean", "", meaning)


def _bytes(name: str, meaning: str) -> Column:
    return Column(name, "Int64", "B", meaning)


def _ms(name: str, meaning: str) -> Column:
    return Column(name, "float64", "ms", meaning)


def _real(name: str, unit: str, meaning: str) -> Column:
    return Column(name, "float64", unit, meaning)


_REQUEST = (
    _text("request_id", "names a request, the same for any model"),
    _text("experiment", "which experiment asks"),
    _text("dataset", "where the question comes from"),
    _flag("synthetic", "whether the image is made, not taken"),
    _text("question_id", "the dataset's name of it"),
    _text("image_id", "the dataset's name of it"),
    _text("question", "without the prompt's template"),
    _text("question_type", "the dataset's"),
    _text("answer_type", "the dataset's"),
    _text("answer", "the most common answer"),
    _text("answers", "all answers, a JSON list"),
    _text("image_path", "relative to the dataset's root"),
    _text("image_sha256", "of the image's file"),
    _text("image_recipe", "JSON: how to make the image, where there is no file"),
    Column("image_width", "Int64", "pixel", "of the image as it is asked about"),
    Column("image_height", "Int64", "pixel", "of the image as it is asked about"),
    _count("tiling_rows", "rows of tiles: asked for in a request, what came out in a run"),
    _count("tiling_cols", "columns of tiles: asked for in a request, what came out in a run"),
    _text("grid", "tiling in words, such as 1x4"),
    _text("resolution", "image size in words"),
    _text("pair", "requests with equal crops and different tokens share a name"),
    _text(
        "output_length",
        "how much is written: natural, answer, none (prefill only), a number, or ≤ and a number "
        "(at most, until the end of sequence)",
    ),
    _count("seed", "that drew the request"),
    _text("method", "how its vision tokens are reduced; absent where they are not"),
    _real("keep", "", "the share of vision tokens that the method is asked to keep"),
    _text("request_sha256", "of what is asked: image, texts, rule of the output's length"),
)

_IDENTITY = (
    "experiment",
    "request_id",
    "request_sha256",
    "question_id",
    "image_id",
    "method",
    "keep",
    _count("run_index", "which run of its request"),
    _count("order_index", "position in the order of measuring"),
    _count("block_index", "which random block of runs"),
    _text("started_at", "ISO 8601, UTC"),
    _text("fingerprint", "hash of the conditions of the measurement"),
    _text("model", "name of the model"),
    _text("device", "where it ran"),
    _text("worker", "host and process"),
    _count(
        "worker_index", "which of several workers, or which shard, from 1; 1 where there is one"
    ),
    _text(
        "worker_device", "what that worker computes on, with the device's own number if it has one"
    ),
    _text("status", "ok or failed"),
    _text("error", "what went wrong, where it failed"),
)

_INPUT = (
    "grid",
    "resolution",
    "pair",
    "image_width",
    "image_height",
    "tiling_rows",
    "tiling_cols",
    _count("num_crops", "images that the encoder sees, the global one among them"),
    _count("num_vision_patches", "patches that the encoder sees, over all crops"),
    _count("num_vision_tokens", "positions in the decoder that carry an image feature"),
    _count("num_vision_tokens_kept", "those that the last layer sees, where a method reduces them"),
    _count("num_image_special_tokens", "what the image brings besides: start, end, row marks"),
    _count("num_language_tokens", "positions that carry no image feature"),
    _count("num_total_tokens", "positions that go into the decoder"),
    "output_length",
    _count("max_new_tokens", "the most tokens it might write"),
    _count("num_output_tokens", "tokens that it wrote"),
)

_OWNED = (
    _ms("T_total", "from the call of generate() to its return, device idle at both ends"),
    _ms("T_vision_encoder", "inside the vision encoder"),
    _ms("T_projector", "all of get_image_features outside the encoder"),
    _ms("T_vision_total", "T_vision_encoder + T_projector"),
    _ms("T_LLM_prefill", "the model's first forward, without vision"),
    _ms("T_LLM_decode", "from the end of the prefill to the end of the last forward"),
    _ms("T_LLM_decode_forward", "the part of T_LLM_decode inside the model's forwards"),
    _ms("T_LLM_decode_between", "the rest of T_LLM_decode: choosing a token, stopping, the loop"),
    _ms("T_reduction", "inside a method that reduces tokens, and in no other part; else absent"),
    _ms("T_other", "what remains of T_total"),
    _ms("T_first_token", "from the call to the end of the prefill"),
)

_TIME = (
    _ms("T_preprocess", "decode, tile, normalise, tokenise, copy to the device; not in T_total"),
    *_OWNED,
    _ms("T_per_output_token", "T_LLM_decode over the decode steps; absent without one"),
    _ms("T_first_decode_step", "the first of decode_step_ms; absent without one"),
    Column("decode_step_ms", "object", "ms", "list, one entry per decode step"),
    *(
        _ms(f"{column.name}_host", f"{column.name} by the host's clock, beside the device's")
        for column in _OWNED
    ),
    *(
        _ms(f"raw_{name}", f"{name} as a signed difference, before clamping (seed's methods)")
        for name in ("T_projector", "T_LLM_prefill", "T_LLM_decode")
    ),
)

_NOISE = (
    _flag("first_of_shape", "first run of its number of crops after the warm-up"),
    _flag(
        "first_of_length",
        "its prompt's length was new to this process or, with captured graphs, to this experiment",
    ),
    _count("new_kv_lengths", "key lengths of decode steps that this process met first here"),
    _ms("host_canary_ms", "a fixed piece of work on the host before and after the run, the slower"),
    _ms("waited_ms", "waiting for a quick host before the run, measurement.quiet_seconds at most"),
    _count("involuntary_switches", "times that the process was interrupted"),
    _ms("steal_ms", "time that a hypervisor gave to others, over all cores"),
    _real("sm_clock_mhz", "MHz", "the GPU's clock, sampled between runs"),
    _real("gpu_temperature_c", "°C", "sampled between runs"),
    _real("gpu_power_w", "W", "sampled between runs"),
    _text("throttle_reasons", "why the GPU's clock was held down, if it was"),
    _ms("wall_ms", "everything that this run took, fetching and preparing included"),
)

_MEMORY = (
    _bytes("peak_memory_bytes", "most memory allocated on the device, weights included"),
    _bytes("kv_cache_bytes", "keys and values at the end; a static cache as allocated"),
    _text("generated_text", "what the model wrote"),
)

_MARKS = (
    Column("outlier", "bool", "", "took much longer than others of its shape; never removed"),
    Column("outlier_cause", "object", "", "likely cause, from columns that do not hold a time"),
)

_FLOPS = {
    "": "by the estimator chosen (flops.estimator)",
    "_rule": "by the seed's rule of parameters",
    "_analytic": "analytic, attention as a full square",
    "_analytic_causal": "analytic, attention below the diagonal only",
    "_counted": "counted by PyTorch on the meta device",
}
_PART_COSTS = (
    *(Column(f"flops_{{}}{suffix}", "Int64", "FLOP", text) for suffix, text in _FLOPS.items()),
    _bytes("bytes_{}", "bytes moved: weights, keys and values, activations"),
    _count("launches_{}", "kernels launched"),
    _real("arithmetic_intensity_{}", "FLOP/B", "flops over bytes"),
    _ms("roofline_ms_{}", "the least time that this machine's ceilings allow"),
    Column(
        "roofline_bound_{}", "object", "", "what that time is bound by: compute, memory, launch"
    ),
    _real("mfu_{}", "", "analytic FLOPs over time, as a share of the peak"),
    _real("mbu_{}", "", "bytes over time, as a share of the bandwidth"),
)

_COSTS = (
    *(
        replace(column, name=column.name.format(part), meaning=f"{part}: {column.meaning}")
        for column in _PART_COSTS
        for part in COST_PARTS
        if (column.name, part) != ("roofline_bound_{}", "total")
    ),
    _bytes("predicted_kv_cache_bytes", "keys and values, predicted"),
    _bytes("predicted_peak_memory_bytes", "most memory on the device, predicted"),
    Column(
        "costs_note",
        "object",
        "",
        "why a cost is not known, or what of it is not confirmed; else null",
    ),
)

_ONCE = {column.name: column for column in _REQUEST}


def _columns(table: Sequence[Column | str]) -> dict[str, Column]:
    """By name; one that a request has already is only named."""
    found = [_ONCE[item] if isinstance(item, str) else item for item in table]
    return {column.name: column for column in found}


# Stage of the pipeline that adds the columns → heading → the columns themselves.
STAGES: dict[str, dict[str, dict[str, Column]]] = {
    "data_sampling": {"Requests": _columns(_REQUEST)},
    "measurement": {
        "Which run": _columns(_IDENTITY),
        "What went in and came out": _columns(_INPUT),
        "Times": _columns(_TIME),
        "What disturbed it": _columns(_NOISE),
        "Memory and text": _columns(_MEMORY),
        "Marks": _columns(_MARKS),
    },
    "flops_estimation": {"Costs": _columns(_COSTS)},
}


def _types(columns: dict[str, Column]) -> dict[str, str]:
    return {name: column.dtype for name, column in columns.items()}


REQUEST_COLUMNS = _types(_columns(_REQUEST))
IDENTITY_COLUMNS = _types(_columns(_IDENTITY))
INPUT_COLUMNS = _types(_columns(_INPUT))
TIME_COLUMNS = _types(_columns(_TIME))
NOISE_COLUMNS = _types(_columns(_NOISE))
MEMORY_COLUMNS = _types(_columns(_MEMORY))
COST_COLUMNS = _types(_columns(_COSTS))
MEASURED_COLUMNS = {
    **IDENTITY_COLUMNS,
    **INPUT_COLUMNS,
    **TIME_COLUMNS,
    **NOISE_COLUMNS,
    **MEMORY_COLUMNS,
}

# What a run takes over from its request, and what is counted once its inputs are prepared.
CARRIED_COLUMNS = tuple(
    name
    for name in (*IDENTITY_COLUMNS, *INPUT_COLUMNS)
    if name in REQUEST_COLUMNS and name not in ("request_id", "tiling_rows", "tiling_cols")
)
COUNTED_COLUMNS = (
    "tiling_rows",
    "tiling_cols",
    "num_crops",
    "num_vision_patches",
    "num_image_special_tokens",
)

# What makes two requests of one id the same request.
_CONTENT = (
    "question",
    "answer",
    "image_path",
    "image_sha256",
    "image_recipe",
    "output_length",
)


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


def ok_rows(runs: pd.DataFrame) -> pd.DataFrame:
    """Leave out the runs that failed; a table without ``status`` has none."""
    return chosen(runs, runs["status"] == "ok") if "status" in runs else runs


def chosen(table: pd.DataFrame, which: pd.Series) -> pd.DataFrame:
    """Give the rows that are chosen; all of them are the table itself, not a copy of it."""
    which = which.fillna(False).astype(bool)
    return table if which.all() else table[which]


def plain_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Give a table's rows with plain values, absent ones as None, as JSON lines need them."""
    rows: list[Any] = table.astype(object).where(table.notna(), None).to_dict("records")
    return rows


def measured_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Make the table of runs from the journal's rows, in the order they were measured."""
    import pandas as pd

    table = typed(pd.DataFrame(rows), MEASURED_COLUMNS)
    return table.sort_values("order_index", kind="stable").reset_index(drop=True)


def columns_page() -> str:
    """Write docs/columns.md: every column of the record (``python -m vlm_latency.records``)."""
    lines = [
        "# Columns of the record",
        "",
        "`expN/expN_records.parquet` has one row per run. Written from `vlm_latency/records.py` by "
        "`python -m vlm_latency.records > docs/columns.md`.",
    ]
    for stage, groups in STAGES.items():
        for heading, columns in groups.items():
            lines += ["", f"## {heading} (`{stage}`)", ""]
            lines += ["| column | type | unit | meaning |", "| --- | --- | --- | --- |"]
            lines += [
                f"| `{c.name}` | {c.dtype} | {c.unit} | {c.meaning} |" for c in columns.values()
            ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(columns_page(), end="")
