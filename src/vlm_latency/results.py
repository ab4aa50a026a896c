"""Results on disk: their names and readers, also for the files of the seed study's scripts."""

from __future__ import annotations

import json
import math
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from vlm_latency.errors import DataError, blaming
from vlm_latency.experiments import EXPERIMENTS, measured, studies
from vlm_latency.records import COST_COLUMNS, MEASURED_COLUMNS, PATCHES_PER_CROP, ok_rows

# Runs of several folders in one file beside them, told apart by the column `study_run`.
POOLED = "runs.parquet"

_NEEDED = ("request_id", "status", "T_total")  # of a table of records
_LARGEST = 1e30  # of an entry's number: none that was measured comes near, and squares are finite
FILES = {row.name: row.stem for row in EXPERIMENTS.values()}


@dataclass(frozen=True)
class Run:
    """What one results folder holds.

    Attributes
    ----------
    name : the folder's name
    tables : experiment → runs (records) or, in a seed's folder, entries; missing columns are
        absent
    results : experiment → the JSON
    """

    name: str
    tables: dict[str, pd.DataFrame] = field(repr=False)
    results: dict[str, dict[str, Any]] = field(repr=False)


def result_path(root: Path | str, name: str) -> Path:
    """Give the place of an experiment's or analysis's result below an output folder."""
    return Path(root) / name / f"{studies()[name].stem}.json"


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises
    ------
    DataError
        When it is missing, unreadable or not JSON (with the line).
    """
    try:
        with blaming(path, "JSON"):
            text = path.read_text(encoding="utf-8")
            data = json.loads(text)
            if re.search(r"\\u[dD][89a-fA-F]", text):  # half a character is in no font and no file
                text = json.dumps(data, ensure_ascii=False).encode(errors="replace").decode()
                data = json.loads(text)
            return data
    except DataError as error:
        cause = error.__cause__
        if isinstance(cause, FileNotFoundError):
            raise DataError(f"no file {path}") from None
        if isinstance(cause, OSError | UnicodeDecodeError):
            raise DataError(f"cannot read {path}: {cause}") from None
        if isinstance(cause, json.JSONDecodeError):
            raise DataError(
                f"{path} is not JSON: {cause.msg} in line {cause.lineno}, column {cause.colno}"
            ) from None
        raise


def read_result(path: Path) -> dict[str, Any]:
    """Read one experiment's result, ours or the seed's.

    Raises
    ------
    DataError
        When it is no result: no JSON object with a list ``results``.
    """
    data = read_json(path)
    if isinstance(data, list):  # the seed's earliest files are the bare list
        data = {"results": data}
    if not isinstance(data, dict) or not isinstance(data.get("results"), list):
        raise DataError(f"{path} is no result: expected an object with a list 'results'")
    if not data["results"] or not all(isinstance(entry, dict) for entry in data["results"]):
        raise DataError(f"{path} has no entries in 'results'")
    for name in ("environment", "environment.model", "environment.conditions", "coverage"):
        group, _, key = name.partition(".")
        found = data.get(group)
        found = found.get(key) if key and isinstance(found, dict) else found
        if found is not None and not isinstance(found, dict):
            raise DataError(f"{path} has {name} {str(found)[:50]!r}; expected an object")
    return data


def read_earlier(path: Path, experiment: str) -> dict[str, Any]:
    """Read a result that must be of one experiment, ours or the seed's.

    Raises
    ------
    DataError
        Naming what was found and what was expected: a folder, another experiment's result, or
        what `read_result` refuses.
    """
    stem = EXPERIMENTS[experiment].stem
    if path.is_dir():
        raise DataError(
            f"{path} is a folder; expected the file of a result of {experiment}, such as "
            f"{path / experiment / stem}.json"
        )
    data = read_result(path)
    keys, found = set(data["results"][0]), data.get("experiment")
    if found is None:  # the seed's files do not name their experiment
        told = {"exp3": "grid", "exp4": "max_new_tokens", "exp1 or exp2": "example_id"}
        found = next((name for name, key in told.items() if key in keys), experiment)
    if found != experiment:
        raise DataError(
            f"{path} is a result of {found}; expected one of {experiment}, a file like {stem}.json"
        )
    return data


def measured_on(environment: Any) -> str:
    """Say in words which model ran on what; empty where an environment does not know."""
    about = environment.get("model") if isinstance(environment, dict) else None
    if not isinstance(about, dict) or not about.get("name"):
        return ""
    machine = environment.get("hardware")
    machine = machine if isinstance(machine, dict) else {}
    where = machine.get("gpu") or machine.get("cpu") or about.get("device")
    how = f"{about.get('weights')} weights, {about.get('engine', 'eager')}, {about.get('dtype')}"
    return f"{about['name']} ({how}, {where})"


def questions_of(environment: Any) -> str:
    """Say in words which dataset was asked; empty where an environment does not know."""
    about = environment.get("dataset") if isinstance(environment, dict) else None
    if not isinstance(about, dict) or not about.get("source"):
        return ""
    path, which = about.get("path"), about.get("hub_id")
    if path:
        which = Path(path).resolve() / (about.get("questions_file") or "")
    if which:
        return f"{which} ({about['source']}, {about.get('split')})"
    return f"{about['source']} ({about.get('split')})"


def held(root: Path) -> dict[str, dict[str, Any]]:
    """Give the environment and protocol of the results below an output folder, by study."""
    found = {}
    for name in studies():
        with suppress(DataError):  # who reads the result says what is wrong with it
            result = read_json(result_path(root, name))
            if isinstance(result, dict):
                found[name] = {key: result.get(key) for key in ("environment", "protocol")}
    return found


def entry_table(result: dict[str, Any], experiment: str) -> pd.DataFrame:
    """Put a result's entries into a table with the records' column names.

    ``T_vision`` is read as ``T_vision_total``. Where ``num_vision_tokens`` is 576 × crops in every
    entry it counts patches: it is moved to ``num_vision_patches``, never to be matched with tokens.

    Raises
    ------
    DataError
        When a time, a count or a cost is no number.
    """
    with blaming(f"the result of {experiment}", "as 'kedro run' writes it"):
        return _entry_table(result, experiment)


def _entry_table(result: dict[str, Any], experiment: str) -> pd.DataFrame:
    table = pd.DataFrame(result["results"])
    names = {
        "T_vision": "T_vision_total",
        "T_data_processing": "T_preprocess",
        "example_id": "question_id",
        "query_id": "question_id",
    }
    table = table.rename(columns={old: new for old, new in names.items() if new not in table})
    for name in filter(_counted, table):
        values = [_number(value, str(name), experiment) for value in table[name]]
        if not pd.api.types.is_numeric_dtype(table[name]):
            table[name] = values
    if "request_id" not in table:
        table["request_id"] = _request_ids(table, experiment)
    if {"num_crops", "num_vision_tokens"} <= set(table):
        tokens, crops = table["num_vision_tokens"], table["num_crops"]
        if (tokens == PATCHES_PER_CROP * crops).all() and "num_vision_patches" not in table:
            table = table.rename(columns={"num_vision_tokens": "num_vision_patches"})
    return table


def read_run(folder: Path | str) -> Run:
    """Read the measured experiments below one results folder.

    Raises
    ------
    DataError
        When there is none.
    """
    folder = Path(folder).expanduser()
    tables, results = {}, {}
    for name in measured():
        path = result_path(folder, name)
        if not path.is_file():
            continue
        results[name] = read_result(path)
        runs = _records(folder.resolve(), name)
        if runs is not None:
            tables[name] = ok_rows(runs).reset_index(drop=True)
        else:
            tables[name] = entry_table(results[name], name)
    if not tables:
        raise DataError(
            f"no results in {folder}; expected files like exp1/{FILES['exp1']}.json, which "
            "'kedro run' writes below output_dir"
        )
    return Run(folder.resolve().name, tables, results)


def _records(folder: Path, name: str) -> pd.DataFrame | None:
    """Read an experiment's runs, the folder's own or those that a published study pools.

    Raises
    ------
    DataError
        When it is no table of records, or one of their columns is of another type.
    """
    own, pooled = folder / name / f"{name}_records.parquet", folder.parent / POOLED
    path = own if own.is_file() else pooled
    if not path.is_file():
        return None
    asked = [("study_run", "==", folder.name), ("experiment", "==", name)]
    with blaming(path, "the table of records that 'kedro run' writes"):
        runs = pd.read_parquet(path, filters=None if path == own else asked)
        if path == pooled and runs.empty:
            return None
        missing = [column for column in _NEEDED if column not in runs]
        if missing:
            raise DataError(f"{path} has no column {', '.join(missing)}; 'kedro run' writes it")
        kinds = {**MEASURED_COLUMNS, **COST_COLUMNS}.items()
        runs.astype({column: kind for column, kind in kinds if column in runs and kind != "object"})
        for column in filter(_counted, runs):
            for extreme in (runs[column].min(), runs[column].max()):
                _number(None if pd.isna(extreme) else extreme, str(column), name)
        return runs.drop(columns="study_run", errors="ignore")


def _counted(name: Any) -> bool:
    return str(name).startswith(("T_", "num_", "flops_"))


def _number(value: Any, name: str, experiment: str) -> float:
    least = -_LARGEST if name.startswith("T_") and name != "T_total" else 0  # T_other is a rest
    with suppress(TypeError, ValueError, OverflowError):
        number = math.nan if value is None else float(value)
        if math.isnan(number) or least <= number <= _LARGEST:
            return number
    raise DataError(
        f"the result of {experiment} has an entry with {name} {str(value)[:50]!r}; expected a number"
        + (" of 0 or more" if least == 0 else "")
    )


def _request_ids(table: pd.DataFrame, experiment: str) -> Any:
    """Name a seed's entries as our requests are named, so that the same ones match."""
    if experiment == "exp3" and "grid" in table:
        return "exp3-" + table["grid"].astype("string").str.replace("×", "x")
    if "question_id" not in table:
        return experiment + "-entry" + table.index.astype(str)
    ids = experiment + "-" + table["question_id"].astype(str)
    if experiment == "exp4" and "max_new_tokens" in table:
        ids += "-n" + table["max_new_tokens"].astype(str)
    return ids
