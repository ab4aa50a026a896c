"""The published study: its numbers are those of its runs."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from vlm_latency.results import POOLED, read_run, result_path

ROOT = Path(__file__).parents[1]
STUDY = ROOT / "docs" / "study"
RUNS = pd.read_parquet(STUDY / POOLED)
FOLDERS = sorted(RUNS["study_run"].unique())
OK = RUNS[RUNS["status"] == "ok"]


@pytest.fixture(scope="module")
def tool() -> Any:
    """``python docs/study`` as a module."""
    sys.path.insert(0, str(STUDY))
    specification = importlib.util.spec_from_file_location("study_tool", STUDY / "__main__.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    yield module
    sys.path.remove(str(STUDY))


@pytest.fixture(scope="module")
def runs(tool: Any) -> Any:
    """All that is published, read once."""
    return tool.ev.load(STUDY)


def result(folder: str, name: str) -> dict[str, Any]:
    return json.loads(result_path(STUDY / folder, name).read_text(encoding="utf-8"))


def test_every_text_is_what_its_data_give(tool: Any) -> None:
    for path, text in tool.texts().items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: python docs/study writes it"


EXPERIMENTS = [
    pytest.param(folder, name, marks=() if name == "exp3" else pytest.mark.slow)
    for folder in FOLDERS
    for name in ("exp1", "exp2", "exp3", "exp4", "exp5")
    if (STUDY / folder / name).is_dir()
]


@pytest.mark.parametrize(("folder", "name"), EXPERIMENTS)
def test_results_are_reported_from_the_published_runs(tool: Any, folder: str, name: str) -> None:
    """Fits, percentiles, intervals, verdicts and sentences, by the project's code as it is."""
    found = result(folder, name)
    if name == "exp5":
        ours = tool.again.related(found, result(folder, "exp3"), result(folder, "exp4"))
    else:
        ours = tool.again.reported(found, name, read_run(STUDY / folder).tables[name])
    assert {"statistics", "claims", "finding"} <= set(ours)
    for key, value in ours.items():
        same(value, found[key], f"{folder}/{name}/{key}")


def same(one: Any, other: Any, where: str) -> None:
    """Equal but for the last digits, which libraries of linear algebra disagree on."""
    if isinstance(one, dict):
        assert set(one) == set(other), where
        for key in one:
            same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            same(*pair, f"{where}/{number}")
    elif isinstance(one, float):
        assert other == pytest.approx(one, rel=1e-5, abs=1e-9), where
    else:
        assert one == other, where


def test_the_remark_on_captures_holds() -> None:
    """One prefill of exp2 and one of exp3 stand out, as the page's limits say."""
    rows = OK[OK["study_run"] == "molmo-7b-d-loop"]
    for name in ("exp2", "exp3"):
        slow = rows[(rows["experiment"] == name) & (rows["T_LLM_prefill"] > 40)]
        assert slow["T_LLM_prefill"].round().tolist() == [64]


def test_the_remark_on_a_prefill_that_shrinks_holds() -> None:
    """Device time of MolmoE's prefill falls, the encoder's rises beyond the host's, which stays."""
    rows = OK[(OK["study_run"] == "molmoe-1b-eager") & (OK["experiment"] == "exp3")]
    few, many = (
        rows[rows["num_vision_tokens"] == n].median(numeric_only=True) for n in (384, 1344)
    )
    assert many["T_LLM_prefill"] < 0.7 * few["T_LLM_prefill"]
    assert many["T_vision_encoder"] > 2 * many["T_vision_encoder_host"]
    assert many["T_LLM_prefill_host"] == pytest.approx(few["T_LLM_prefill_host"], rel=0.1)


def test_the_remark_on_an_encoder_that_is_not_compiled_holds() -> None:
    rows = OK[OK["experiment"] == "exp1"].groupby("study_run").median(numeric_only=True)
    eager, loop = rows.loc["qwen2.5-vl-7b-eager"], rows.loc["qwen2.5-vl-7b-loop"]
    assert loop["T_vision_encoder"] > eager["T_vision_encoder"]
    assert loop["host_canary_ms"] > 1.3 * eager["host_canary_ms"]
    said = result("qwen2.5-vl-7b-loop", "exp1")["coverage"]["sessions"][0]["engine"]["parts"]
    assert "depends on its inputs' values" in said["the vision encoder"]["eager"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_commands_ask_for_what_was_measured(tool: Any, runs: Any, folder: str) -> None:
    """Each as Kedro reads it: the environment's files, then the parameters of the line."""
    from omegaconf import OmegaConf

    run = next(run for run in runs if run.name == folder)
    found = []
    for line in tool.ev.commands(run, ROOT / "conf").splitlines():
        words = dict(zip(*[iter(shlex.split(line)[2:])] * 2, strict=True))
        folders = [ROOT / "conf" / name for name in ("base", words.get("--env", "base"))]
        files = [path for one in folders for path in one.glob("parameters*.yml")]
        given = dict(text.split("=", 1) for text in words["--params"].split(","))
        del given["output_dir"]
        written = OmegaConf.merge(*map(OmegaConf.load, files))
        for name in words["--pipelines"].split(","):
            assert tool.ev.unlike(run, name, written, given) == {}, line
            found.append(name)
    assert sorted(found) == sorted(run.results)


def test_the_remark_on_clocks_holds() -> None:
    rows = RUNS[(RUNS["study_run"] == "molmo-7b-d-loop-paper") & (RUNS["experiment"] == "exp1")]
    marked = rows["outlier_cause"] == "clock drop or throttling"
    assert (marked.sum(), len(rows)) == (2026, 5250)
    assert not (rows["sm_clock_mhz"][marked] < 0.97 * rows["sm_clock_mhz"].median()).all()


REDUCED = [folder for folder in FOLDERS if (STUDY / folder / "exp6").is_dir()]


@pytest.mark.parametrize("folder", REDUCED)
def test_speed_ups_by_other_means(folder: str) -> None:
    """Pairs of runs of one question; Student's t on the logarithms of their ratios."""
    rows = OK[(OK["study_run"] == folder) & (OK["experiment"] == "exp6")]
    pair = ["question_id", "run_index"]
    before = rows[rows["method"] == "baseline"].set_index(pair)
    for entry in result(folder, "exp6")["results"]:
        own = rows[(rows["method"] == entry["method"]) & (rows["keep"] == entry["keep"])]
        own = own.set_index(pair)
        for column in ("T_first_token", "T_total"):
            logs = np.log(before[column] / own[column]).dropna()
            half = stats.t.ppf(0.975, len(logs) - 1) * logs.sem()
            told = entry["measured"][column]["speed_up"]
            assert told["value"] == pytest.approx(np.exp(logs.mean()), rel=1e-9)
            assert told["low"] == pytest.approx(np.exp(logs.mean() - half), rel=1e-6)
            assert told["high"] == pytest.approx(np.exp(logs.mean() + half), rel=1e-6)
            verdict = entry["measured"][column]["verdict"]
            assert verdict != "FASTER" or told["low"] > 1
            assert verdict != "SLOWER" or told["high"] < 1


@pytest.mark.parametrize(
    "folder", [name for name in FOLDERS if (STUDY / name / "explain").is_dir()]
)
def test_idle_is_what_busy_leaves(folder: str) -> None:
    for part in result(folder, "explain")["components"].values():
        idle = 1 - part["busy"] / part["wall"]["value"]
        assert part["idle_share"] == pytest.approx(idle, abs=0.02)
        assert part["bound"] == "launches" or idle < 0.5


def test_what_a_run_lacks_is_not_measured_and_a_cpu_is_a_device(tool: Any, runs: Any) -> None:
    run = next(run for run in runs if "exp3" in run.tables)
    results = json.loads(json.dumps({"exp3": {**run.results["exp3"], "protocol": "seed"}}))
    hardware = results["exp3"]["environment"]["hardware"]
    del hardware["gpu"]
    hardware["cpu"] = "a processor"
    sweep = dataclasses.replace(run, tables={"exp3": run.tables["exp3"]}, results=results)
    assert tool.page.seeds([sweep]).endswith("| not measured | not measured |")
    assert "one kind of device was measured, a processor" in tool.page.limits([sweep])
    assert "| a processor |" in tool.page.measured([sweep])


def numbers(cell: str) -> list[float]:
    """Take "12.9 [12.3, 13.5]" apart."""
    value, _, ends = cell.rstrip("]").partition(" [")
    return [float(text.replace(",", "")) for text in (value, *ends.split(", "))]


def order_statistics(values: np.ndarray) -> tuple[float, float]:
    """The ranks of a sign test, counted by hand: P(at most k heads of n) ≤ 2.5 %."""
    n, share, rank = len(values), 0.0, 0
    chance = 0.5**n
    while share + chance <= 0.025:
        share += chance
        rank += 1
        chance *= (n - rank + 1) / rank
    ordered = np.sort(values)
    return ordered[rank - 1], ordered[n - rank]


def readme_rows() -> list[list[str]]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text.partition("<!-- study:begin -->")[2].partition("<!-- study:end -->")[0]
    lines = [line for line in block.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_headline_table_by_other_means(runs: Any) -> None:
    """Medians and their intervals, and the mean of the images' median steps, in plain numpy."""
    head, _, *rows = readme_rows()
    named = {run.label: run for run in runs}
    columns = {
        "preprocessing": "T_preprocess",
        "encoder": "T_vision_encoder",
        "projector": "T_projector",
        "prefill": "T_LLM_prefill",
        "first token": "T_first_token",
    }
    compared = 0
    for row in rows:
        cells = dict(zip(head, row, strict=True))
        own = OK[OK["study_run"] == named[cells["model, engine"]].name]
        photos = own[(own["experiment"] == "exp1") & (own["resolution"] == "640x480")]
        for title, column in columns.items():
            values = photos[column].dropna().to_numpy(float)
            if not len(values):
                assert cells[title] == "not measured"
                continue
            value, low, high = numbers(cells[title])
            assert value == pytest.approx(np.median(values), rel=0.02)
            narrow = order_statistics(values)  # each run counts: no narrower than this
            assert low <= narrow[0] * 1.02 and high >= narrow[1] * 0.98
            compared += 1
        answers = own[own["experiment"] == "exp4"]
        if answers.empty:
            continue
        lengths = set(answers["num_output_tokens"])
        long = answers[answers["num_output_tokens"] == (512 if 512 in lengths else max(lengths))]
        steps = long["decode_step_ms"].map(np.median).groupby(long["image_id"]).mean()
        value, low, high = numbers(cells["per output token"])
        assert value == pytest.approx(steps.mean(), rel=0.03)
        assert low < steps.mean() < high
        assert high - low > 2 * steps.sem()  # images are what is independent, not steps
        compared += 1
    assert compared >= 2 * len(rows) > 0


@pytest.mark.parametrize("folder", FOLDERS)
def test_results_are_means_of_the_published_runs(folder: str) -> None:
    """The results and the table of single runs tell the same: nothing was edited in one of them."""
    for name in ("exp1", "exp2", "exp3", "exp4"):
        if not (STUDY / folder / name).is_dir():
            continue
        rows = OK[(OK["study_run"] == folder) & (OK["experiment"] == name)]
        ours = rows.groupby("request_id", sort=False)["T_total"].mean()
        found = result(folder, name)
        entries = [entry["T_total"] for entry in found["results"]]
        assert sorted(entries) == pytest.approx(sorted(ours), rel=1e-9)
        statistics = found["statistics"]
        if name == "exp1":
            by_request = rows.groupby("request_id")["T_total"].mean()
            first = rows[rows["run_index"] == 0]["T_total"]
            medians = [np.percentile(values, 50) for values in (by_request, first)]
            assert any(statistics["T_total"]["P50"]["value"] == pytest.approx(m) for m in medians)
        if name == "exp2":
            for column, mean in statistics["means"].items():
                assert mean["value"] == pytest.approx(rows[column].mean(), rel=1e-9)


def test_no_path_of_a_machine_is_published() -> None:
    for path in STUDY.rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\"/|/(?:home|root|tmp|work|data)/", text), path
        assert '"process"' not in text


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in STUDY.rglob("*") if path.is_file()) <= 10_000_000


@pytest.mark.parametrize("folder", FOLDERS)
def test_anyone_can_compare_with_it(folder: str) -> None:
    run = read_run(STUDY / folder)
    assert sum(map(len, run.tables.values())) == (OK["study_run"] == folder).sum()
    for name, table in run.tables.items():
        assert set(table["experiment"]) == {name}
        assert "study_run" not in table
