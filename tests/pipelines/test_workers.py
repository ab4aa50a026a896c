"""One plan on several workers through Ray: one journal, and nothing is lost when something dies."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from vlm_latency.errors import UserError
from vlm_latency.journal import RUN
from vlm_latency.options import Options

PROJECT = Path(__file__).parents[2]
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="needs Ray: pip install -e '.[ray]'"
)
needs_two = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two CPU cores")
SAME = [*RUN, "num_crops", "num_total_tokens", "num_output_tokens", "status"]


@needs_ray
@needs_two
def test_two_workers_are_the_table_of_one_device(
    tmp_path: Path, kedro_run: Callable[..., dict[str, Any]]
) -> None:
    given = {
        "model.name": "null-model",
        "exp1.sampling.num_samples": 24,
        "exp1.measurement.noise_repeats": 4,
    }
    tables = {}
    for workers in (1, 2):
        made = kedro_run(
            "exp1",
            tmp_path / str(workers),
            {**given, "measurement.workers": workers},
            to_nodes=["exp1.measurement.collect"],
        )
        tables[workers] = made["exp1.measurements"].load()
    one, two = tables[1], tables[2]
    pd.testing.assert_frame_equal(
        one[SAME].sort_values(RUN, ignore_index=True),
        two[SAME].sort_values(RUN, ignore_index=True),
    )
    assert two["order_index"].tolist() == list(range(28))
    assert two.groupby("worker_index")["worker"].nunique().to_dict() == {1: 1, 2: 1}
    assert two["worker"].nunique() == 2
    assert two["worker_device"].notna().all()
    assert not set(one["fingerprint"]) & set(two["fingerprint"])
    (journal,) = (tmp_path / "2" / "exp1" / "journal").glob("*.jsonl")
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert lines[0]["conditions"]["workers"]["count"] == 2
    sessions = [line["session"] for line in lines if "session" in line]
    assert sorted(one["worker_index"] for one in sessions if "runs" in one) == [1, 2]
    assert [len(one["workers"]) for one in sessions if "workers" in one] == [2]


@pytest.mark.slow
@needs_ray
@needs_two
def test_workers_of_a_cluster_by_address_are_the_table_of_one_device(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    cluster = subprocess.Popen(
        [
            Path(sys.executable).parent / "ray",
            "start",
            "--head",
            "--block",
            f"--port={port}",
            "--num-cpus=2",
            "--include-dashboard=false",
        ],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        assert cluster.stdout is not None
        said = iter(cluster.stdout.readline, "")
        assert any("Ray runtime started" in line for line in said)
        asked = {"one": "", "two": f",measurement.workers=2,ray.address=127.0.0.1:{port}"}
        tables = {}
        for name, further in asked.items():
            given = (
                f"model.name=null-model,exp1.sampling.num_samples=24,output_dir={tmp_path / name}"
            )
            done = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "kedro",
                    "run",
                    "--pipeline",
                    "exp1",
                    "--params",
                    given + further,
                ],
                cwd=PROJECT,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            table = pd.read_parquet(tmp_path / name / "exp1" / "exp1_records.parquet")
            tables[name] = table.sort_values(RUN, ignore_index=True)
    finally:
        os.killpg(cluster.pid, signal.SIGTERM)
        cluster.communicate(timeout=60)
    pd.testing.assert_frame_equal(tables["one"][SAME], tables["two"][SAME])
    assert tables["two"]["worker"].nunique() == 2


# Measures 400 requests of 5 ms on two workers, through the pipeline's own nodes and dataset.
ON_TWO_WORKERS = """
import sys
from pathlib import Path

import pandas as pd

from vlm_latency.datasets import RecordLog
from vlm_latency.models import ModelHandle
from vlm_latency.options import Options
from vlm_latency.pipelines.measurement import nodes
from vlm_latency.records import REQUEST_COLUMNS, typed, with_hashes
from vlm_latency.vqa import open_source
from vlm_latency.vqa.images import noise_recipe

folder, count, sleep_ms, workers = Path(sys.argv[1]), *map(int, sys.argv[2:])
options = Options.from_parameters(
    {
        "model": {"name": "null-model", "null_sleep_ms": sleep_ms},
        "measurement": {"output_length": "2", "chunk_size": 4, "workers": workers},
    }
).experiment("exp1", "random")
sizes = [24 + n % 9 for n in range(count)]
requests = pd.DataFrame(
    {
        "request_id": [f"exp1-{n}" for n in range(count)],
        "experiment": "exp1",
        "question_id": range(count),
        "question": "What is it?",
        "image_recipe": [noise_recipe(n % 9, width, 24) for n, width in enumerate(sizes)],
        "image_width": sizes,
        "image_height": 24,
        "output_length": "2",
    }
)
requests = with_hashes(typed(requests, REQUEST_COLUMNS))
source, model = open_source(size=3), ModelHandle(options.model)
environment = {"fingerprint": "aa", "conditions": {"model": "null"}, "code": {}, "process": {}}
log = RecordLog(filepath=str(folder / "journal"))
plan = nodes.plan_runs(options, requests)
for chunk in nodes.measure(options, requests, plan, model, source, environment, log.load()):
    log.save(chunk)
table, coverage, _ = nodes.collect(options, plan, environment, log.load())
table.to_parquet(folder / "table.parquet")
print([session.get("from_all_ready_s") for session in coverage["sessions"]])
print([s["wall_s"] - s["warmup_s"] for s in coverage["sessions"] if "wall_s" in s])
"""


def start(folder: Path, count: int, sleep_ms: int, workers: int = 2) -> subprocess.Popen[str]:
    given = [str(folder), str(count), str(sleep_ms), str(workers)]
    return subprocess.Popen(
        [sys.executable, "-c", ON_TWO_WORKERS, *given],
        cwd=PROJECT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def whole_lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / "journal" / "aa.jsonl"
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)[1:]
    rows = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return [row for row in rows if "request_id" in row]


def wait_for_more(folder: Path, than: int, process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    while len(rows := whole_lines(folder)) <= than:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    return rows


def check(folder: Path, count: int) -> pd.DataFrame:
    rows = whole_lines(folder)
    table = pd.read_parquet(folder / "table.parquet")
    assert len(rows) == len(table) == len(table.drop_duplicates(RUN)) == count
    assert table["order_index"].is_unique
    assert (table["status"] == "ok").all()
    return table


@needs_ray
@needs_two
@pytest.mark.slow
def test_workers_killed_at_ten_random_moments_lose_nothing(tmp_path: Path) -> None:
    moments = random.Random(5)
    process, killed = start(tmp_path, 600, 40), 0
    seen: set[int] = set()
    while killed < 10:
        rows = wait_for_more(tmp_path, len(whole_lines(tmp_path)), process)
        time.sleep(moments.uniform(0, 0.3))
        victim = int(rows[-1]["worker"].rpartition(":")[2])
        if victim not in seen:
            os.kill(victim, signal.SIGKILL)
            seen.add(victim)
            killed += 1
    told = process.communicate(timeout=300)[1]
    assert process.returncode == 0, told
    assert told.count("runs were given back") >= 5
    table = check(tmp_path, 600)
    assert seen <= {int(worker.rpartition(":")[2]) for worker in table["worker"]}


@needs_ray
@needs_two
@pytest.mark.slow
def test_a_driver_killed_at_ten_random_moments_loses_nothing(tmp_path: Path) -> None:
    moments = random.Random(6)
    for _ in range(10):
        process = start(tmp_path, 600, 20)
        wait_for_more(tmp_path, len(whole_lines(tmp_path)), process)
        time.sleep(moments.uniform(0, 0.2))
        process.kill()
        process.communicate()
        workers = {int(row["worker"].rpartition(":")[2]) for row in whole_lines(tmp_path)}
        until = time.monotonic() + 60
        while any(map(alive, workers)):  # they end with the command
            assert time.monotonic() < until
            time.sleep(0.1)
    process = start(tmp_path, 600, 20)
    told = process.communicate(timeout=300)[1]
    assert process.returncode == 0, told
    check(tmp_path, 600)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@needs_ray
@needs_two
@pytest.mark.slow
def test_the_measuring_time_of_two_workers_is_printed(tmp_path: Path) -> None:
    """What ``pytest --slow -s`` shows is the speed-up; no time is asserted."""
    seconds = {}
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        process = start(folder, 1000, 20, workers)
        folder.mkdir()
        out, err = process.communicate()
        assert process.returncode == 0, err
        ready, alone = (json.loads(line.replace("None", "null")) for line in out.splitlines())
        told = [value for value in (ready if workers > 1 else alone) if value]
        assert len(told) == workers
        seconds[workers] = max(told)
        check(folder, 1000)
    print(f"{seconds[1]:.1f} s alone, {seconds[2]:.1f} s from the moment both are ready: ", end="")
    print(f"{seconds[1] / seconds[2]:.2f} times shorter")


@pytest.mark.parametrize("wrong", [0, -1, "many", "1.5"])
def test_a_number_of_workers_that_is_none_is_refused(wrong: Any) -> None:
    with pytest.raises(
        UserError, match=r"measurement.workers'.*expected a number of workers, or all"
    ):
        Options.from_parameters({"measurement": {"workers": wrong}})


def test_workers_are_of_the_whole_command() -> None:
    with pytest.raises(UserError, match=r"'exp2.measurement.workers' has no effect"):
        Options.from_parameters({"exp2": {"measurement": {"workers": 2}}})


def test_more_workers_than_devices_are_refused(
    tmp_path: Path, kedro_run: Callable[..., dict[str, Any]]
) -> None:
    pytest.importorskip("ray", reason="needs Ray: pip install -e '.[ray]'")
    given = {"model.name": "null-model", "measurement.workers": 4096}
    with pytest.raises(
        UserError, match=r"found measurement.workers=4096 and \d+ times 1 CPU cores"
    ):
        kedro_run("exp1", tmp_path, given)


def test_without_ray_the_refusal_says_what_to_install(
    tmp_path: Path, kedro_run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *more: None if name == "ray" else find(name, *more)
    )
    given = {"model.name": "null-model", "measurement.workers": 2}
    with pytest.raises(UserError, match=r"Ray is not installed: pip install 'vlm-latency\[ray\]'"):
        kedro_run("exp1", tmp_path, given)
