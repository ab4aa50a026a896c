"""An experiment is one row, one sampling rule and one report; everything else finds it there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd

from vlm_latency.experiments import ANALYSES, EXPERIMENTS, studies

PROJECT = Path(__file__).parents[2]


def test_a_made_up_experiment_is_found_everywhere(tmp_path: Path) -> None:
    script = Path(__file__).parent / "made_up_experiment" / "add.py"
    done = subprocess.run(
        [sys.executable, str(script), str(PROJECT), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {"exp9", "phase9", *EXPERIMENTS} <= set(found["pipelines"])
    assert not found["in all"]
    assert {f"exp9.{stage}" for stage in ("data_sampling", "measurement", "reporting")} <= set(
        found["stages"]
    )
    (line,) = [line for line in found["said"] if line.startswith("exp9: ")]
    assert line.startswith("exp9: 1 square × 3 runs on null-model")
    assert list(found["layers"].values()) == ["primary", "model_output", "model_output"]
    assert found["preview"] == {"runs": 3}
    assert "How long does a square take?" in found["page"]
    assert re.search(r"runs of squares.*?3", found["page"], re.S)
    result = json.loads((tmp_path / "exp9" / "exp9_squares.json").read_text())
    assert result["options"]["sampling"] == {"requests": None, "seed": 0, "side": 48}
    assert len(pd.read_parquet(tmp_path / "exp9" / "exp9_records.parquet")) == 3


def test_the_readme_names_every_row() -> None:
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    rows = {
        cells[0].strip(): line
        for line in readme.splitlines()
        if line.startswith("| ") and (cells := line.strip("|").split("|"))
    }
    for name, row in studies().items():
        assert f"`kedro run --pipeline {name}" in rows[name], name
        for figure in row.figures:
            assert f"{figure}.png" in rows[name], figure
    assert not {name for name in rows if re.fullmatch(r"exp\d", name)} - set(EXPERIMENTS)


def test_rows_are_whole() -> None:
    for name, row in studies().items():
        assert row.name == name
        assert row.title and row.question.endswith("?")
    assert not set(ANALYSES) & set(EXPERIMENTS)
    for row in EXPERIMENTS.values():
        assert set(row.earlier) <= set(row.reads)
        assert set(row.earlier.values()) <= set(EXPERIMENTS)
        assert {f"{dataset}_results" for dataset in row.earlier} <= set(row.own.model_fields)
