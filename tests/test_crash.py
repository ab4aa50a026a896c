"""Killed at any moment, a measurement continues and ends with the same table."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from vlm_latency.journal import RUN
from vlm_latency.results import FILES

PROJECT = Path(__file__).parents[1]

# Measures 300 requests three times on the null model, through the pipeline's own nodes and
# dataset, in children that are killed at random moments, until one comes through.
KILLED_AGAIN_AND_AGAIN = """
import os, random, signal, sys, time
from pathlib import Path

import pandas as pd

from vlm_latency.datasets import RecordLog
from vlm_latency.models import ModelHandle
from vlm_latency.options import Options
from vlm_latency.pipelines.measurement import nodes
from vlm_latency.records import REQUEST_COLUMNS, typed, with_hashes
from vlm_latency.vqa import open_source
from vlm_latency.vqa.images import noise_recipe

folder, kills, tear = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "tear"
options = Options.from_parameters(
    {
        "model": {"name": "null-model"},
        "measurement": {"num_runs": 3, "output_length": "2", "chunk_size": 4},
    }
).experiment("exp1", "random")
requests = typed(
    pd.DataFrame(
        {
            "request_id": [f"exp1-{n}" for n in range(300)],
            "experiment": "exp1",
            "question_id": range(300),
            "question": "What is it?",
            "image_recipe": [noise_recipe(n % 9, 24 + n % 9, 24) for n in range(300)],
            "image_width": [24 + n % 9 for n in range(300)],
            "image_height": 24,
            "output_length": "2",
        }
    ),
    REQUEST_COLUMNS,
)
requests = with_hashes(requests)
source = open_source(size=3)
environment = {"fingerprint": "aa", "conditions": {"model": "null"}}


def measure():
    log = RecordLog(filepath=str(folder / "journal"))
    model = ModelHandle(options.model)
    plan = nodes.plan_runs(options, requests)
    for chunk in nodes.measure(options, requests, plan, model, source, environment, log.load()):
        log.save(chunk)
    table, *_ = nodes.collect(options, plan, environment, log.load())
    table.to_parquet(folder / "table.parquet")
    assert not {"torch", "ray"} & set(sys.modules)


def child():
    pid = os.fork()
    if pid:
        return pid
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    measure()
    os._exit(0)


def size():
    path = folder / "journal" / "aa.jsonl"
    return path.stat().st_size if path.exists() else 0


random.seed(int(sys.argv[4]))
killed = 0
while True:
    before, pid = size(), child()
    if killed < kills:
        while size() == before and os.waitpid(pid, os.WNOHANG) == (0, 0):
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if not os.WIFSIGNALED(status):
        assert status == 0, status
        break
    killed += 1
    if tear:  # as when the power fails while the last lines are written
        cut = random.randrange(2000)
        os.truncate(folder / "journal" / "aa.jsonl", max(0, size() - cut))
print(killed)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("how", ["kill", "tear"])
def test_killed_at_random_moments_the_table_is_that_of_an_undisturbed_run(
    how: str, tmp_path: Path
) -> None:
    tables = []
    for folder, kills in (("undisturbed", 0), ("killed", 25)):
        (tmp_path / folder).mkdir()
        command = [sys.executable, "-c", KILLED_AGAIN_AND_AGAIN, str(tmp_path / folder)]
        done = subprocess.run(
            [*command, str(kills), how, "7"],
            capture_output=True,
            text=True,
            check=False,
            cwd=PROJECT,
        )
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) == kills
        tables.append(pd.read_parquet(tmp_path / folder / "table.parquet"))
    whole, killed = tables
    assert len(killed) == 900
    assert not killed.duplicated(RUN).any()
    assert killed["order_index"].is_unique
    assert (killed["status"] == "ok").all()
    same = [*RUN, "question_id", "num_crops", "num_total_tokens", "num_output_tokens"]
    pd.testing.assert_frame_equal(
        whole[same].sort_values(RUN, ignore_index=True),
        killed[same].sort_values(RUN, ignore_index=True),
    )


def command(folder: Path) -> list[str]:
    parameters = [
        f"output_dir={folder}",
        "exp1.sampling.num_samples=3",
        "exp1.measurement.noise_repeats=0",
        "exp2.sampling.num_samples=2",
        "exp3.sampling.max_grid_size=6",
        "exp3.measurement.num_runs=4",
        "exp4.sampling.num_samples=1",
        "exp4.sampling.max_new_tokens_list=2 4 6",
        "measurement.warmup_runs=0",
        "measurement.chunk_size=1",
        "calibration.ceiling_seconds=0.1",
    ]
    kedro = [sys.executable, "-m", "kedro", "run", "--env", "smoke"]
    return [*kedro, "--params", ",".join(parameters)]


def finished_runs(folder: Path, experiment: str) -> int:
    journals = list((folder / experiment / "journal").glob("*.jsonl"))
    return sum(path.read_bytes().count(b'"request_id"') for path in journals)


@pytest.mark.slow
def test_killing_everything_during_exp3_leaves_exp1_and_exp2_and_continues(
    tmp_path: Path,
) -> None:
    process = subprocess.Popen(
        command(tmp_path), cwd=PROJECT, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while finished_runs(tmp_path, "exp3") < 5:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for name in ("exp1", "exp2"):
        data = json.loads((tmp_path / name / f"{FILES[name]}.json").read_text())
        assert data["coverage"]["partial"] is False
        for figure in (tmp_path / name / "figures").glob("*.png"):
            with Image.open(figure) as image:
                image.load()
        assert list((tmp_path / name / "figures").glob("*.png"))
    assert not (tmp_path / "exp3" / f"{FILES['exp3']}.json").exists()
    assert not (tmp_path / "exp4" / "journal").exists()
    kept = finished_runs(tmp_path, "exp3")

    done = subprocess.run(
        command(tmp_path), cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "exp1: all 3 runs were measured before; reporting again" in done.stderr
    assert f"exp3: continuing, {kept} of 28 runs are done" in done.stderr
    rows = pd.read_parquet(tmp_path / "exp3" / "exp3_records.parquet")
    assert len(rows) == len(rows.drop_duplicates(RUN)) == 28
    assert finished_runs(tmp_path, "exp3") == 28  # none was measured twice
    assert (tmp_path / "exp5" / f"{FILES['exp5']}.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("only", ["exp1", "journal", "files"])
def test_a_few_kills_of_the_trial_lose_double_and_keep_nothing_stale(only: str) -> None:
    done = subprocess.run(
        [sys.executable, "tests/trial_kills.py", "--whole=12", "--writer=30", f"--only={only}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=PROJECT,
    )
    assert done.returncode == 0, done.stderr
    *_, kills, lost, doubled, stale, unable, _ = done.stdout.splitlines()[-1].split("|")
    assert int(kills) > 1
    assert (int(lost), int(doubled), int(stale), int(unable)) == (0, 0, 0, 0)
