"""All of VQA v2 validation: what a report of 214,354 requests needs and how large its files are."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

PROJECT = Path(__file__).parents[2]
IMAGES, REQUESTS = 40_504, 214_354

# A command that says at its end the most memory that it ever had, which its parent's is no part of.
WATCHED = """
import atexit, re, runpy, sys
from pathlib import Path

def told():
    found = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
    print("most memory in KiB:", found[1])

atexit.register(told)
sys.argv[0] = "kedro"
runpy.run_module("kedro", run_name="__main__")
"""


def finish(folder: Path) -> None:
    """Write a run of every request into the journal, made of the few that were measured."""
    (journal,) = (folder / "exp1" / "journal").glob("*.jsonl")
    lines = [json.loads(line) for line in journal.read_bytes().splitlines()]
    runs = [line for line in lines if "request_id" in line]
    requests = pd.read_parquet(folder / "exp1" / "exp1_requests.parquet")
    assert len(requests) == REQUESTS
    own = requests[["request_id", "request_sha256", "question_id", "image_id"]].to_dict("records")
    times = np.random.default_rng(0).lognormal(3, 0.4, REQUESTS).tolist()
    with journal.open("w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines if "request_id" not in line)
        for number, (request, ms) in enumerate(zip(own, times, strict=True)):
            run = runs[number % len(runs)]
            parts = {
                "T_vision_encoder": ms / 2,
                "T_LLM_prefill": ms / 4,
                "T_first_token": ms * 0.75,
            }
            told = {**run, **request, **parts, "order_index": number, "T_total": ms}
            file.write(json.dumps(told) + "\n")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's count of memory")
def test_214354_requests_are_reported_in_little_memory_and_small_files(
    tmp_path: Path, kedro_run: Callable[..., dict[str, Any]]
) -> None:
    given = {
        "model.name": "null-model",
        "dataset.size": IMAGES,
        "measurement.output_length": 2,
        "exp1.measurement.noise_repeats": 0,
        "exp1.sampling.one_question_per_image": False,
    }
    kedro_run("exp1", tmp_path, given | {"exp1.sampling.num_samples": 40})
    every = given | {"exp1.sampling.num_samples": REQUESTS}
    kedro_run("exp1", tmp_path, every, to_outputs=["exp1.requests"])
    finish(tmp_path)

    parameters = ",".join(f"{k}={v}" for k, v in {**every, "output_dir": tmp_path}.items())
    command = [sys.executable, "-c", WATCHED, "run", "--env", "smoke", "--pipeline", "exp1"]
    done = subprocess.run(
        [*command, "--params", parameters], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"all {REQUESTS} runs were measured before; reporting again" in done.stderr
    most = int(done.stdout.rpartition("most memory in KiB:")[2]) * 1024
    assert most <= 1.2e9

    result = json.loads((tmp_path / "exp1" / "exp1_latency_distribution.json").read_text())
    assert result["coverage"]["measured"] == REQUESTS
    assert len(result["results"]) + result["num_entries_in_records_only"] == REQUESTS
    largest = {"report/index.html": 5e6, "exp1/exp1_latency_distribution.json": 20e6}
    for figure in (tmp_path / "exp1" / "figures").iterdir():
        largest[figure.relative_to(tmp_path).as_posix()] = 2e6
    sizes = {name: (tmp_path / name).stat().st_size for name in largest}
    assert len(sizes) == 5  # PNG, PDF and caption of one figure
    assert not {name: size for name, size in sizes.items() if size > largest[name]}
