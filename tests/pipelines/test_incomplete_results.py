"""A report counts what failed and what is missing, and averages neither."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from vlm_latency.results import FILES


@pytest.fixture
def exp1(dataset: Any, tmp_path: Path, kedro_run: Callable[..., Any]) -> Callable[..., Any]:
    """Run exp1 on the tiny model; give its result."""

    def run(samples: int, **measurement: Any) -> dict[str, Any]:
        given = {
            "dataset.source": "official",
            "dataset.path": str(dataset.root),
            "exp1.sampling.num_samples": samples,
            "exp1.measurement.noise_repeats": 0,
            "measurement.output_length": "2",
            "measurement.warmup_runs": 0,
            "measurement.max_failures": 0.5,
            "calibration.ceiling_seconds": 0.1,
            **{f"measurement.{name}": value for name, value in measurement.items()},
        }
        kedro_run("exp1", tmp_path / "out", given)
        path = tmp_path / "out" / "exp1" / f"{FILES['exp1']}.json"
        return json.loads(path.read_text(encoding="utf-8"))

    return run


def test_failed_and_missing_runs_are_counted_and_never_averaged(
    exp1: Callable[..., Any], dataset: Any, tmp_path: Path
) -> None:
    dataset.break_image(4, "truncated")
    result = exp1(len(dataset))
    counted = {key: result["coverage"][key] for key in ("planned", "measured", "failed", "missing")}
    assert counted == {"planned": 12, "measured": 11, "failed": 1, "missing": 0}
    assert result["coverage"]["partial"] is False
    (reason,) = result["coverage"]["failures"]
    assert "cannot be decoded" in reason
    rows = pd.read_parquet(tmp_path / "out" / "exp1" / "exp1_records.parquet")
    assert rows["status"].tolist().count("failed") == 1
    ok = rows[rows["status"] == "ok"]
    assert "4" not in set(ok["question_id"])
    assert result["statistics"]["T_total"]["n"] == 11
    assert result["statistics"]["T_total"]["mean"]["value"] == pytest.approx(ok["T_total"].mean())
    assert sorted(str(entry["example_id"]) for entry in result["results"]) == sorted(
        ok["question_id"]
    )
    assert rows.loc[rows["status"] == "failed", "flops_total"].isna().all()

    journal = next((tmp_path / "out" / "exp1" / "journal").glob("*.jsonl"))
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:8]))  # as if it had been killed after six runs
    part = exp1(len(dataset), allow_partial=True)
    assert part["coverage"]["partial"] is True
    assert part["coverage"]["missing"] == 6
    assert (
        part["statistics"]["T_total"]["n"] == part["coverage"]["measured"] == len(part["results"])
    )
    assert len(journal.read_bytes().splitlines()) == 8  # nothing more was measured
