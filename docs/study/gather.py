"""From folders of runs to what is published of them: slim JSONs and one table of single runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from vlm_latency.experiments import measured, studies
from vlm_latency.records import COST_COLUMNS, MEASURED_COLUMNS, typed
from vlm_latency.results import POOLED, read_json, result_path

LIMIT = 10_000_000  # bytes, of the whole published folder
COLOURS = 128  # of a published figure: a third of the bytes
# An entry of these is a question; its runs are in the table.
OF_QUESTIONS = ("exp1", "exp2")
NAMED = ("request_id", "T_total")
# What only the figures of one run, or its host, need.
LEFT_OUT = ("band", "process", "warmup", "runs_ms", "answers", "generated_text", "image_cache")
ABSOLUTE = re.compile(r"(?<![\w.:/])/(?:[\w.+-]+/)+([\w.+-]+)")


def published(folder: Path) -> list[Path]:
    """List the folders of runs below a folder: those that hold a result."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_dir() and any(result_path(path, name).is_file() for name in studies())
    )


def gather(folder: Path, study: Path) -> None:
    """Publish results of runs beside those published before, and in place of the same ones."""
    runs = published(folder)
    if not runs:
        raise SystemExit(f"no folder below {folder} holds a result of {', '.join(measured())}")
    _complete(runs)
    tables, new = [], set()
    for run in runs:
        for name in studies():
            if not (path := result_path(run, name)).is_file() or name in ("predict", "compare"):
                continue
            target = result_path(study / run.name, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            write(target, slim(read_json(path), name))
            if name in measured():
                records = pd.read_parquet(run / name / f"{name}_records.parquet")
                tables.append(records.assign(study_run=run.name))
                new.add((run.name, name))
    if (study / POOLED).is_file():
        rows = pd.read_parquet(study / POOLED)
        still = [
            pair not in new and result_path(study / pair[0], pair[1]).is_file()
            for pair in zip(rows["study_run"], rows["experiment"], strict=True)
        ]
        tables.insert(0, rows[still])
    columns = {"study_run": "string", **MEASURED_COLUMNS, **COST_COLUMNS}
    # Absent columns of one run must not decide the type of another's.
    whole = typed(pd.concat([table.astype(object) for table in tables]), columns)
    floats = [name for name in whole if str(whole[name].dtype) == "float64"]
    whole.reset_index(drop=True).to_parquet(
        study / POOLED,
        compression="zstd",
        compression_level=19,
        use_dictionary=[name for name in whole if name not in floats],
        use_byte_stream_split=floats,
    )
    size = sum(path.stat().st_size for path in study.rglob("*") if path.is_file())
    if size > LIMIT:
        raise SystemExit(f"{study} holds {size:,} bytes; expected at most {LIMIT:,}")


def shrink(figure: Path) -> None:
    """Leave a figure few colours, which nobody sees."""
    Image.open(figure).convert("RGB").quantize(COLOURS).save(figure, optimize=True)


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a published result, each of its entries and of its parts on one line."""
    parts = [f"{json.dumps(key)}: {_line(value)}" for key, value in result.items()]
    path.write_text("{" + ",\n".join(parts) + "}\n", encoding="utf-8")


def _line(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ",\n".join(json.dumps(one, ensure_ascii=False) for one in value) + "]"
    return json.dumps(value, ensure_ascii=False)


def _complete(runs: list[Path]) -> None:
    """Refuse folders that lack what would be published of them, before anything is written."""
    for run in runs:
        there = [name for name in studies() if result_path(run, name).is_file()]
        needed = [run / name / f"{name}_records.parquet" for name in there if name in measured()]
        if missing := [str(path) for path in needed if not path.is_file()]:
            raise SystemExit(f"{run} lacks {', '.join(missing)}; nothing was published")


def slim(result: dict[str, Any], name: str) -> Any:
    """Leave out of a result what neither the page nor `compare` reads, and where files lay."""
    if name in OF_QUESTIONS:
        entries = [{key: entry.get(key) for key in NAMED} for entry in result["results"]]
        result = {**result, "results": entries}
    return _slim(result)


def _slim(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _slim(own) for key, own in value.items() if key not in LEFT_OUT}
    if isinstance(value, list):
        return [_slim(own) for own in value]
    return ABSOLUTE.sub(r"\1", value) if isinstance(value, str) else value
