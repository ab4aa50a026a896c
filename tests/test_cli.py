"""An error that a user can cause is one readable message and a non-zero status, no traceback."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner, Result
from kedro.framework.startup import bootstrap_project

from vlm_latency.locks import lock_folder

PROJECT = Path(__file__).parents[1]
NULL = "model.name=null-model"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """``kedro run --env smoke`` with these options, results below ``tmp_path / out``."""
    bootstrap_project(PROJECT)
    from vlm_latency import cli

    monkeypatch.chdir(PROJECT)
    monkeypatch.delenv("VLM_LATENCY_TRACEBACK", raising=False)

    def invoke(*options: str, params: str = NULL, env: str = "smoke") -> Result:
        given = f"{params},output_dir={tmp_path / 'out'}" if params else ""
        words = ["--env", env, *options, *(["--params", given] if given else [])]
        return CliRunner().invoke(cli.run, words)

    return invoke


def message(result: Result) -> str:
    """The one message of a refused command."""
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    found = re.search(r"^Error: (.*)\n\(--traceback shows where\)$", result.output, re.M | re.S)
    assert found, result.output
    return found[1]


def test_a_mistyped_parameter_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from click.testing import CliRunner\n"
        "from kedro.framework.startup import bootstrap_project\n"
        "bootstrap_project(Path.cwd())\n"
        "from vlm_latency.cli import run\n"
        f"words = ['--params', 'exp1.measurment.num_runs=3,output_dir={tmp_path}/out']\n"
        "result = CliRunner().invoke(run, words)\n"
        "print(result.exit_code, {'torch', 'transformers', 'datasets'} & set(sys.modules))\n"
        "print(result.output)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROJECT
    )
    status, *lines = done.stdout.splitlines()
    assert status == "1 set()"
    assert (
        lines[0] == "Error: unknown parameter 'exp1.measurment'; did you mean 'exp1.measurement'?"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--pipeline", "--pipelines"])
def test_a_pipeline_that_is_none_is_refused_with_the_nearest(
    option: str, run: Callable[..., Result]
) -> None:
    told = message(run(option, "exp1,calibratoin"))
    assert told.startswith("there is no pipeline 'calibratoin'; did you mean 'calibration'?")


def test_pipelines_as_bare_words_are_told_how_they_are_named(run: Callable[..., Result]) -> None:
    assert "--pipelines exp1,exp3" in run("exp1").output


def test_filters_that_leave_nothing_are_one_message(run: Callable[..., Result]) -> None:
    assert message(run("--pipelines", "exp3", "--tags", "exp1")).startswith("Pipeline contains no")


def test_pipelines_together_make_one_page(run: Callable[..., Result], tmp_path: Path) -> None:
    done = run("--pipelines", "exp3,exp1")
    assert done.exit_code == 0, done.output
    page = (tmp_path / "out" / "report" / "index.html").read_text()
    assert "exp1" in page and "exp3" in page


def test_every_wrong_value_is_named_at_once(run: Callable[..., Result]) -> None:
    wrong = "exp1.measurement.num_runs=x,model.dtype=int3,exp4.sampling.num_samples=0"
    told = message(run("--pipeline", "exp1", params=f"{wrong},exp4.sampling.tiling=big")).split(
        "\n"
    )
    assert [line.split("'")[1] for line in told] == [
        "model.dtype",
        "exp1.measurement.num_runs",
        "exp4.sampling.num_samples",
        "exp4.sampling.tiling",
    ]
    assert "found 'int3'" in told[0]
    assert "bfloat16" in told[0]


def test_a_wrong_value_in_a_users_file_is_named(run: Callable[..., Result], tmp_path: Path) -> None:
    conf = shutil.copytree(PROJECT / "conf", tmp_path / "conf")
    (conf / "local" / "parameters_mine.yml").write_text("exp3: {measurement: {num_rums: 3}}\n")
    told = message(run("--pipeline", "exp1", "--conf-source", str(conf), env="local"))
    assert told == (
        "unknown parameter 'exp3.measurement.num_rums'; did you mean 'exp3.measurement.num_runs'?"
    )


def test_a_text_that_wants_quotes(run: Callable[..., Result]) -> None:
    told = message(run("--pipeline", "exp1", params=f"{NULL},prompt.template=Q: {{question}} A:"))
    assert "wants quotes" in told


def test_an_unknown_model_brings_the_known_names(run: Callable[..., Result]) -> None:
    told = message(run("--pipeline", "exp1", params="model.name=tiny-mlmo"))
    assert "'tiny-mlmo'" in told
    assert "did you mean 'tiny-molmo'" in told
    assert "molmo-7b-d" in told


def test_a_gpu_that_is_not_there(run: Callable[..., Result]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert "model.device=cuda" in message(run("--pipeline", "exp1", params="model.device=cuda"))


def test_a_model_that_cannot_be_built_is_refused_before_the_measurement(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    wrong = "model.name=tiny-llava,model.attn_implementation=wrong"
    assert "attn_implementation=wrong" in message(run("--pipeline", "exp3", params=wrong))
    assert not (tmp_path / "out" / "calibration").exists()
    assert "expected auto, cpu, cuda or cuda:N" in message(
        run("--pipeline", "exp3", params="model.name=tiny-llava,model.device=mps")
    )


def test_exp5_without_inputs_names_the_commands_that_make_them(
    run: Callable[..., Result],
) -> None:
    told = message(run("--pipeline", "exp5"))
    assert "kedro run --pipeline exp3" in told
    assert "kedro run --pipeline exp4" in told


def test_an_earlier_result_has_no_place_where_a_new_one_is_measured(
    run: Callable[..., Result],
) -> None:
    told = message(run("--pipeline", "phase2", params=f"{NULL},exp5.vision_results=v.json"))
    assert "exp5.vision_results" in told
    assert "kedro run --pipeline exp5" in told


@pytest.mark.parametrize("runner", ["ThreadRunner", "ParallelRunner"])
def test_a_measurement_shares_its_device_with_nothing(
    runner: str, run: Callable[..., Result]
) -> None:
    told = message(run("--pipeline", "exp1", "--runner", runner))
    assert told.startswith(f"found runner {runner}; a measurement must have its device to itself")


@pytest.mark.parametrize("options", [("--async",), ("--runner-params", "is_async=true")])
def test_nothing_overlaps_a_measurement(
    options: tuple[str, ...], run: Callable[..., Result]
) -> None:
    told = message(run("--pipeline", "exp1", *options))
    assert "overlap a measurement: leave it out" in told


def test_a_file_that_exists_is_not_a_measurement_that_is_complete(
    run: Callable[..., Result],
) -> None:
    told = message(run("--pipeline", "exp1", "--only-missing-outputs"))
    assert "the same command measures only what is missing" in told


def test_lengths_that_do_not_fit(run: Callable[..., Result]) -> None:
    lengths = "exp4.sampling.max_new_tokens_list=8 20000 999999"
    told = message(run("--pipeline", "exp4", params=f"model.name=tiny-molmo,{lengths}"))
    assert "20000, 999999 new tokens" in told
    assert "exp4.sampling.on_too_long=drop" in told


def test_the_paper_environment_asks_for_model_and_dataset(run: Callable[..., Result]) -> None:
    told = message(run(env="paper", params=""))
    assert "model.name" in told
    assert "dataset.source" in told


def test_an_output_folder_that_cannot_be_written(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("a file is in the way")
    told = message(run("--pipeline", "exp1"))
    assert f"cannot write into output_dir {tmp_path / 'out'}" in told


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ("dataset.source=official", "needs dataset.path"),
        ("dataset.source=official,dataset.path=/nowhere", "dataset.path /nowhere is not a folder"),
        ("dataset.source=folder,dataset.path=/nowhere", "/nowhere"),
        ("exp2.sampling.num_samples=1000000", "num_samples=1000000 cannot be drawn"),
        ("exp2.sampling.requests=/nowhere.parquet", "no file /nowhere.parquet"),
        ("exp3.sampling.max_grid_size=13", "max_grid_size=13 is out of range"),
        ("exp3.sampling.sizes=big", "expected width x height"),
        ("exp4.sampling.tiling=5x5", "25 tiles"),
        ("exp6.keep.a=1", "as a group of parameters and elsewhere as a list"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_the_first_experiment(
    params: str, told: str, run: Callable[..., Result], tmp_path: Path
) -> None:
    assert told in message(run("--pipeline", "all", params=f"{NULL},{params}"))
    assert not list(tmp_path.glob("out/exp*"))


def test_all_refusals_come_together(run: Callable[..., Result]) -> None:
    wrong = "exp1.sampling.num_samples=1000000,exp3.sampling.max_grid_size=13"
    told = message(run("--pipeline", "all", params=f"{NULL},{wrong}"))
    assert "num_samples=1000000" in told
    assert "max_grid_size=13" in told


def test_an_unknown_environment(run: Callable[..., Result]) -> None:
    told = message(run("--pipeline", "exp1", env="papr"))
    assert "no environment 'papr'" in told and "known are paper, smoke, study" in told


def test_an_unknown_node(run: Callable[..., Result]) -> None:
    assert "exp1.nowhere" in message(run("--pipeline", "exp1", "--to-nodes", "exp1.nowhere"))


def test_a_part_of_a_pipeline_without_its_inputs(run: Callable[..., Result]) -> None:
    told = message(run("--pipeline", "exp1", "--from-nodes", "exp1.measurement.collect"))
    assert "exp1.environment_now" in told


def test_a_traceback_on_request(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm_latency.errors import UserError

    wrong = f"{NULL},modle.name=3"
    assert isinstance(run("--traceback", params=wrong).exception, UserError)
    monkeypatch.setenv("VLM_LATENCY_TRACEBACK", "1")
    assert isinstance(run(params=wrong).exception, UserError)


def test_a_defect_of_the_program_keeps_its_traceback(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def defect(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("vlm_latency.hooks.check", defect)
    assert isinstance(run("--pipeline", "exp1").exception, ZeroDivisionError)


def test_an_interruption_says_that_nothing_is_lost(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vlm_latency.hooks.check", interrupt)
    result = run("--pipeline", "exp1")
    assert result.exit_code == 130
    assert "the same command continues where it stopped" in result.output


@pytest.mark.parametrize("option", ["--pipeline", "--pipelines"])
def test_both_spellings_of_a_pipeline_work(
    option: str, run: Callable[..., Result], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    result = run(option, "exp1", "--to-nodes", "exp1.measurement.collect")
    assert result.exit_code == 0, result.output
    assert list(tmp_path.glob("out/exp1/journal/*.jsonl"))
    assert "eprecat" not in result.output
    assert not [warning for warning in recwarn if "'--pipeline'" in str(warning.message)]


def test_lists_come_from_a_configuration_file(run: Callable[..., Result], tmp_path: Path) -> None:
    config = tmp_path / "run.yml"
    given = {"model": {"name": "null-model"}, "output_dir": str(tmp_path / "out")}
    given["exp4"] = {"sampling": {"num_samples": 1, "max_new_tokens_list": [2, 5]}}
    command = {"pipelines": "exp4", "to_nodes": "exp4.data_sampling.draw_requests"}
    config.write_text(json.dumps({"run": {**command, "params": given}}))
    result = run("--config", str(config), params="")
    assert result.exit_code == 0, result.output
    requests = pd.read_parquet(tmp_path / "out" / "exp4" / "exp4_requests.parquet")
    assert requests["output_length"].tolist() == ["2", "5"]


def test_two_commands_never_write_one_journal(run: Callable[..., Result], tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    until = ("--pipeline", "exp1", "--to-nodes", "exp1.measurement.collect")
    assert run(*until, params=f"{NULL},exp1.sampling.num_samples=1").exit_code == 0
    (journal,) = tmp_path.glob("out/exp1/journal/*.jsonl")
    before = journal.read_bytes()
    with journal.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        told = message(run(*until))
        assert "another run is writing the journal" in told
        assert journal.read_bytes() == before
    with lock_folder(tmp_path / "out" / "exp1"):
        told = message(run(*until, params=f"{NULL},measurement.resume=false"))
        assert f"exp1 is in use by process {os.getpid()} on " in told
        assert (journal.read_bytes(), list(tmp_path.rglob("*.kept"))) == (before, [])
    assert run(*until).exit_code == 0


OFFLINE = """
import ipaddress, socket
original = socket.socket.connect

def connect(self, address):
    if self.family != socket.AF_UNIX and not ipaddress.ip_address(address[0]).is_loopback:
        raise AssertionError(f"a connection to {address}")
    return original(self, address)

def lookup(host, *_, **__):
    raise AssertionError(f"a look-up of {host}")

socket.socket.connect = connect
socket.getaddrinfo = lookup
"""


def test_a_run_makes_no_connection(tmp_path: Path) -> None:
    """Neither telemetry nor a hub: every connection would end the command."""
    (tmp_path / "sitecustomize.py").write_text(OFFLINE)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "DO_NOT_TRACK"))}
    options = [
        "exp3.sampling.max_grid_size=3",
        "exp3.measurement.num_runs=1",
        "measurement.warmup_runs=0",
        f"output_dir={tmp_path / 'out'}",
    ]
    before = (PROJECT / "pyproject.toml").read_bytes()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "kedro", "run", "--env", "smoke", "--pipeline", "exp3"),
            *("--params", ",".join(options)),
        ],
        env={**environment, "PYTHONPATH": str(tmp_path)},
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "a connection to" not in done.stderr
    assert "a look-up of" not in done.stderr
    name = tmp_path / "out" / "exp3" / "exp3_vision_tokens_vs_latency.json"
    entries = json.loads(name.read_text())["results"]
    assert [entry["num_crops"] for entry in entries] == [2, 3, 4]
    assert (PROJECT / "pyproject.toml").read_bytes() == before


def test_the_guard_against_connections_does_guard(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(OFFLINE)
    done = subprocess.run(
        [sys.executable, "-c", "import socket; socket.create_connection(('192.0.2.1', 9))"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "a look-up of 192.0.2.1" in done.stderr


def test_sigterm_keeps_the_rows_of_its_chunk(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from vlm_latency.instrument.session import Session\n"
        "measured = Session.run\n"
        "count = 0\n"
        "def call(self, *args, **given):\n"
        "    global count\n"
        "    count += 1\n"
        "    if count == 5:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return measured(self, *args, **given)\n"
        "Session.run = call\n"
        "from kedro.framework.cli.cli import main\n"
        "sys.argv = ['kedro', 'run', '--env', 'smoke', '--pipeline', 'exp1', '--params',\n"
        f"    '{NULL},output_dir={tmp_path},measurement.chunk_size=64']\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=PROJECT
    )
    assert done.returncode == 143, done.stderr
    assert "Terminated. Finished runs are kept" in done.stderr
    (journal,) = (tmp_path / "exp1" / "journal").glob("*.jsonl")
    assert journal.read_bytes().count(b'"request_id"') == 4


def test_telemetry_is_off_from_whichever_folder(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from kedro.framework.startup import bootstrap_project\n"
        f"bootstrap_project(Path({str(PROJECT)!r}))\n"
        "from vlm_latency import cli\n"
        "from kedro_telemetry.plugin import _check_for_telemetry_consent\n"
        "print(_check_for_telemetry_consent(Path.cwd()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.split()[-1] == "False"


def test_every_parameter_is_listed_with_its_values() -> None:
    metadata = bootstrap_project(PROJECT)
    from vlm_latency import cli
    from vlm_latency.options import Options

    done = CliRunner().invoke(cli.options, [], obj=metadata)
    assert done.exit_code == 0, done.output
    listed = dict(re.findall(r"^(\S+) = (.*)$", done.output, re.M))
    assert listed["model.name"] == "tiny-molmo"  # of conf/base
    assert listed["exp4.sampling.tiling"] == "2x3"
    assert listed["measurement.order"] == "blocks (protocol=exact), ascending (protocol=seed)"
    for group in ("model", "dataset", "calibration", "compare"):
        for name in type(getattr(Options(), group)).model_fields:
            assert any(each.startswith(f"{group}.{name}") for each in listed), name
    assert "\n    eager | static | compiled | compiled-all | loop" in done.output
    few = CliRunner().invoke(cli.options, ["exp4"], obj=metadata).output
    assert "exp4.sampling" in few and "model.name" not in few
    none = CliRunner().invoke(cli.options, ["nothing"], obj=metadata)
    assert none.exit_code == 1 and "no parameter begins with 'nothing'" in none.output


def test_models_are_listed_with_their_size(tmp_path: Path) -> None:
    bootstrap_project(PROJECT)
    from vlm_latency import cli

    done = CliRunner().invoke(cli.models, [])
    assert done.exit_code == 0, done.output
    lines = {line.split()[0]: line.split() for line in done.output.splitlines() if line}
    assert lines["molmo-7b-d"][1:4] == ["8.02", "B", "14.94"]
    assert lines["molmo-7b-d"][-1] == "model.name=allenai/Molmo-7B-D-0924"
    assert {line[4] for line in lines.values() if line[2] in "BM"} <= {"yes", "no"}
    none = CliRunner().invoke(cli.models, ["--zoo-file", str(tmp_path / "no.yml")])
    assert none.exit_code == 1 and "there is no file" in none.output
    assert "parameters" not in none.output  # no head of a table


def test_a_list_with_commas_is_told_how_it_is_written(run: Callable[..., Result]) -> None:
    done = run("--pipeline", "exp4", params=f"{NULL},exp4.sampling.max_new_tokens_list=8,16")
    assert done.exit_code == 2
    assert "max_new_tokens_list='8 16 32'" in " ".join(done.output.split())


@pytest.mark.parametrize("asked", ["model.name=nobody/nothing", "dataset.hub_id=nobody/nothing"])
def test_a_hub_that_does_not_answer_is_asked_once(
    asked: str, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    from vlm_latency import hub

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    hub.reachable.cache_clear()
    source = "dataset.source=hub," if "hub_id" in asked else ""
    params = asked if "model" in asked else f"{NULL},{source}{asked}"
    told = message(run("--pipeline", "exp2", params=params))
    hub.reachable.cache_clear()
    assert "nobody/nothing" in told and "http://127.0.0.1:9 does not answer" in told
    assert constants.HF_HUB_OFFLINE  # what comes next is not asked five times either


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/study.md"])
def test_a_page_names_files_that_are_there(page: str) -> None:
    """Links, and what the shell blocks copy."""
    text = (PROJECT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    copied = re.findall(r"\bcp (\S+)", text)
    folder = (PROJECT / page).parent
    assert [name for name in links if not (folder / name).exists()] == []
    assert [name for name in copied if not (PROJECT / name).exists()] == []
