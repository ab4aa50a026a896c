"""The entries of a result: the runs of each request averaged, under the seed's names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pandas as pd

from vlm_latency.records import COST_PARTS, ESTIMATORS, INPUT_COLUMNS, TIME_COLUMNS, ok_rows

# Questions in a result of exp1 or exp2, as many as the seed had; all are in the records.
MOST_ENTRIES = 5000
# What an entry holds beside its times and counts; everything else is in the records.
_ENTRY_TEXTS = ("grid", "resolution", "pair", "generated_text", "image_id", "question_id")
_ENTRY_NUMBERS = (
    *INPUT_COLUMNS,
    *TIME_COLUMNS,
    "kv_cache_bytes",
    "peak_memory_bytes",
    *(f"flops_{part}" for part in COST_PARTS),
)
# What exp5 and predict learn from, of each part and in total.
COSTS = tuple(
    f"{kind}_{part}{suffix}"
    for part in COST_PARTS
    for kind, suffix in (
        *(("flops", suffix) for suffix in ESTIMATORS.values()),
        ("bytes", ""),
        ("launches", ""),
        ("roofline_ms", ""),
        ("mfu", ""),
        ("mbu", ""),
    )
)
# Entry key of the seed's exp1 and exp2 → column.
_QUESTION_KEYS = {"example_id": "question_id", "T_data_processing": "T_preprocess"}


def succeeded(records: pd.DataFrame) -> pd.DataFrame:
    """Give the runs that succeeded; failed ones are counted, never averaged."""
    return ok_rows(records).reset_index(drop=True)


def clusters(rows: pd.DataFrame) -> pd.Series:
    """Say which runs are alike: those of one image; one without an image stands for itself."""
    if "image_id" not in rows:  # such as entries of the seed study's files
        return rows["request_id"]
    return rows["image_id"].astype("string").fillna(rows["request_id"])


def averaged(
    records: pd.DataFrame, requests: pd.DataFrame, further: Sequence[str] = ()
) -> pd.DataFrame:
    """Average the runs of each request, as the seed's files have it.

    Parameters
    ----------
    further
        Columns to average beside times, counts and FLOPs.

    Returns
    -------
    DataFrame
        One row per request that succeeded at least once, indexed by ``request_id`` in the order
        of the requests; numbers are means over the runs (``runs_ms``: the T_total of each), texts
        are the first run's; what was not
        measured is missing, a time that was measured in no run at all is left out if it is ours.
    """
    shown = succeeded(records)
    groups = shown.groupby("request_id")
    kept = [name for name in dict.fromkeys((*_ENTRY_NUMBERS, *further)) if name in shown]
    numbers = [name for name in kept if pd.api.types.is_numeric_dtype(shown[name])]
    ours = {"T_reduction", "num_vision_tokens_kept"} & set(numbers)
    ours |= {name for name in numbers if name.endswith("_host") or name.startswith("raw_")}
    numbers = [name for name in numbers if name not in ours or shown[name].notna().any()]
    means = groups[numbers].mean().astype("Float64")
    for name in numbers:  # a count is the same in every run, and stays a whole number
        whole = means[name].round()
        if shown[name].dtype.kind in "iu" and (means[name] == whole).fillna(True).all():
            means[name] = whole.astype("Int64")
    texts = [name for name in (*_ENTRY_TEXTS, "output_length") if name in shown]
    table = groups[texts].first().join(means).assign(num_runs=groups.size())
    if "T_total" in shown:
        table["runs_ms"] = groups["T_total"].agg(list)
    return table.reindex([name for name in requests["request_id"] if name in table.index])


def question_entries(records: pd.DataFrame, requests: pd.DataFrame) -> dict[str, Any]:
    """Give the seed's entries of exp1 and exp2: one per question, with what was asked.

    Returns
    -------
    dict
        ``results``: the first `MOST_ENTRIES` of the requests that succeeded at least once;
        ``num_entries_in_records_only``: how many others there are, which the records have.
    """
    shown = succeeded(records)
    answered = requests[["request_id"]].merge(shown[["request_id"]].drop_duplicates())
    first = answered["request_id"].head(MOST_ENTRIES)
    requests = requests[requests["request_id"].isin(first)]
    table = averaged(shown[shown["request_id"].isin(first)], requests)
    asked = requests.set_index("request_id").loc[table.index]
    table["answers"] = [None if pd.isna(text) else json.loads(text) for text in asked["answers"]]
    table["question"] = asked["question"]
    sizes = [
        None if pd.isna(width) else [int(width), int(height)]
        for width, height in zip(table["image_width"], table["image_height"], strict=True)
    ]
    table["image_size"] = pd.Series(sizes, index=table.index, dtype=object)
    table["T_system_total"] = table["T_total"] + table["T_preprocess"]
    return {
        "results": entry_dicts(table, _QUESTION_KEYS),
        "num_entries_in_records_only": len(answered) - len(requests),
    }


def entry_dicts(table: pd.DataFrame, columns: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """Write entries as the seed's files do, its own names first, further columns after.

    Parameters
    ----------
    table
        One row per entry.
    columns
        Entry key → column, for keys that are called otherwise in the records.
    """
    renamed = table.reset_index().rename(columns={old: new for new, old in (columns or {}).items()})
    shown = renamed.astype(object)
    for name in {"question_id", "image_id", *(columns or {})} & set(shown):
        shown[name] = [_as_the_seed_writes_it(value) for value in shown[name]]
    rows: list[Any] = shown.where(shown.notna(), None).to_dict("records")
    return rows


def _as_the_seed_writes_it(name: Any) -> Any:
    """A name that is an integer's own digits as that integer, as VQA v2 has it; others as they are."""
    plain = isinstance(name, str) and name.isascii() and name.isdecimal()
    return int(name) if plain and str(int(name)) == name else name
