"""What only a device can show: first visits, memory that runs out, a killed process that goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from vlm_latency.instrument.protocol import measure
from vlm_latency.instrument.session import SessionLog
from vlm_latency.journal import RUN
from vlm_latency.models import load
from vlm_latency.options import MeasurementOptions, ModelOptions
from vlm_latency.records import measured_table
from vlm_latency.vqa import image_bytes
from vlm_latency.vqa.images import noise_recipe

PROJECT = Path(__file__).parents[2]
pytestmark = pytest.mark.gpu


def requests(count: int) -> pd.DataFrame:
    """As many prompt lengths as requests, on images of one size."""
    return pd.DataFrame(
        {
            "request_id": [f"r{n}" for n in range(count)],
            "question": ["what " * (n + 1) for n in range(count)],
            "answer": "a",
            "image_recipe": noise_recipe(0, 336, 336),
            "image_width": 336,
            "image_height": 336,
            "output_length": "4",
        }
    )


def run(vlm: Any, table: pd.DataFrame, **changes: Any) -> tuple[pd.DataFrame, dict[str, Any]]:
    log = SessionLog()
    chunks = measure(
        vlm,
        table,
        MeasurementOptions(**changes),
        fetch=lambda row: image_bytes(row, None),
        progress=False,
        log=log,
    )
    return measured_table([row for chunk in chunks for row in chunk]), log.to_dict()


@pytest.fixture
def vlm() -> Any:
    return load(ModelOptions(name="tiny-molmo", device="cuda", dtype="bfloat16"))


@pytest.mark.parametrize("lengths", ["warm", "cold"])
def test_first_visits_are_tried_and_only_cold_runs_have_them(vlm: Any, lengths: str) -> None:
    rows, log = run(vlm, requests(20), lengths=lengths, num_runs=2)
    assert (rows["status"] == "ok").all(), rows["error"].dropna().tolist()
    found = log["lengths"]
    assert found["mode"] == lengths
    if lengths == "cold":
        assert found["prompt"]["pairs"] == found["key"]["pairs"] == 0
        assert rows["first_of_length"].sum() == 19  # one was met while its shape was warmed
        return
    assert found["prompt"]["pairs"] == 6
    assert found["key"]["pairs"] >= 6
    for kind, column in (("prompt", "first_of_length"), ("key", "new_kv_lengths")):
        cost = found[kind]["cost_ms"]
        assert cost["low"] <= cost["value"] <= cost["high"]
        if found[kind]["costs"]:  # whether they do is the device's matter
            assert not rows[column].astype(bool).any()


def test_memory_that_runs_out_costs_one_run(vlm: Any) -> None:
    table = requests(6)
    doomed = table["question"][3].strip()
    prepare = vlm.preparer.__call__
    held: list[torch.Tensor] = []

    def once_too_much(image: Any, prompt: str) -> Any:
        prepared = prepare(image, prompt)
        if doomed == prompt.strip():
            total = torch.cuda.get_device_properties(0).total_memory
            held.append(torch.empty(total // 4, dtype=torch.uint8, device="cuda"))
            torch.empty(total, dtype=torch.uint8, device="cuda")
        return prepared

    vlm.prepare = once_too_much
    before = torch.cuda.memory_allocated()
    rows, _ = run(vlm, table, max_failures=0.5, lengths="cold")
    failed = rows[rows["status"] == "failed"]
    assert failed["request_id"].tolist() == ["r3"]
    assert failed["error"].str.startswith("OutOfMemoryError").all()
    assert (rows["status"] == "ok").sum() == 5
    held.clear()
    assert torch.cuda.memory_allocated() <= before + 64 * 2**20


def test_a_killed_measurement_goes_on_and_warms_anew(tmp_path: Path) -> None:
    parameters = {
        "output_dir": tmp_path,
        "model.name": "tiny-molmo",
        "model.device": "cuda",
        "dataset.source": "synthetic",
        "exp1.sampling.num_samples": 40,
        "exp1.measurement.num_runs": 3,
        "exp1.measurement.noise_repeats": 0,
        "measurement.chunk_size": 1,
    }
    given = ",".join(f"{name}={value}" for name, value in parameters.items())
    command = [sys.executable, "-m", "kedro", "run", "--pipeline", "exp1", "--params", given]
    process = subprocess.Popen(
        command, cwd=PROJECT, stderr=subprocess.DEVNULL, start_new_session=True
    )

    def finished() -> int:
        files = (tmp_path / "exp1" / "journal").glob("*.jsonl")
        return sum(path.read_bytes().count(b'"request_id"') for path in files)

    while finished() < 20:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = finished()
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"exp1: continuing, {kept} of 120 runs are done" in done.stderr
    rows = pd.read_parquet(tmp_path / "exp1" / "exp1_records.parquet")
    assert len(rows) == len(rows.drop_duplicates(RUN)) == 120
    assert (rows["status"] == "ok").all()
    assert rows["worker"].nunique() == 2
