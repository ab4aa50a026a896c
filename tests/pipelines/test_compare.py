"""A run against itself is the same; one with a slowdown put in is slower, and says by how much."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

sys.path.insert(0, str(Path(__file__).parent))
import made_up as m

from vlm_latency.datasets import RecordLog
from vlm_latency.datasets.variants import Variants
from vlm_latency.errors import DataError, MeasurementError, UserError
from vlm_latency.journal import RUN
from vlm_latency.models import ModelHandle
from vlm_latency.options import Options
from vlm_latency.pipelines.compare.nodes import compare_runs, fail_if_slower, side_by_side
from vlm_latency.pipelines.compare.variants import (
    collect_variants,
    describe_variants,
    measure_variants,
)
from vlm_latency.plots.style import FigureContext, Style
from vlm_latency.results import FILES, Run, read_run
from vlm_latency.statistics import plain
from vlm_latency.vqa import open_source

NONE = pd.DataFrame()  # no variants were measured


def compare(*folders: Path, **options: Any) -> dict[str, Any]:
    result, tables, figure, _ = compare_runs(
        Options.from_parameters({"compare": options}),
        [read_run(folder) for folder in folders],
        NONE,
        {},
        {},
    )
    assert len(tables["compare"])
    made_up = any("schema_version" in data for data in read_run(folders[0]).results.values())
    drawn = " ".join(text.get_text() for text in figure.findobj(Text))
    assert ("synthetic requests · random weights" in drawn) == made_up
    assert figure.axes
    return dict(plain(result))  # as it is read from disk


def changed(folder: Path) -> Path:
    """Say that a run was measured on another machine."""
    for path in folder.glob("*/*.json"):
        data = json.loads(path.read_text())
        data["environment"]["conditions"]["hardware"]["cpu"] = "another"
        path.write_text(json.dumps(data))
    return folder


def test_a_run_with_itself_is_the_same(tmp_path: Path) -> None:
    folder = m.write_run(tmp_path / "a")
    result = compare(folder, folder)
    assert set(result["verdicts"].values()) == {"SAME"}
    assert result["runs"] == ["a (2)"]


def test_a_slowdown_beyond_the_drift_is_found(tmp_path: Path) -> None:
    before = m.write_run(tmp_path / "before", seed=1)
    after = changed(m.write_run(tmp_path / "after", scale=1.1, seed=2))
    assert set(compare(before, after)["verdicts"].values()) == {"UNDECIDED"}
    result = compare(before, after, drift=0.02)
    assert set(result["verdicts"].values()) == {"SLOWER"}
    total = result["comparisons"]["after: exp1"]["components"]["T_total"]
    assert total["ratio"]["low"] < 1.1 < total["ratio"]["high"]
    assert "a drift of up to 2%" in total["note"]
    assert result["environment"]["line"] == "made up"


def test_the_same_configuration_is_never_faster(tmp_path: Path) -> None:
    before, after = m.write_run(tmp_path / "a"), m.write_run(tmp_path / "b", scale=0.8, seed=2)
    result = compare(before, after)
    assert set(result["verdicts"].values()) == {"UNDECIDED"}
    assert result["environment_differences"] == {"b": {}}
    notes = result["comparisons"]["b: exp1"]["notes"]
    assert "the same configuration: what differs is drift, × 0.80" in notes


def test_repeated_sessions_tell_the_drift(tmp_path: Path) -> None:
    folders = [
        m.write_run(tmp_path / name, scale, seed=i)
        for i, (name, scale) in enumerate((("a", 1), ("b", 1.01), ("c", 0.99), ("d", 1.08)))
    ]
    changed(folders[-1])
    result = compare(*folders)
    # ± t(0.975, 2) · √2 · 1 % of three sessions: 6 %, so 8 % is seen, which 10 % would hide
    assert result["verdicts"]["d: exp1"] == "SLOWER"
    total = result["comparisons"]["d: exp1"]["components"]["T_total"]
    assert "the spread of 3 sessions" in total["ratio"]["method"]
    assert result["verdicts"]["b: exp1"] in {"SAME", "UNDECIDED"}


def test_the_gate_fails_where_the_user_says(tmp_path: Path) -> None:
    before, after = m.write_run(tmp_path / "a"), m.write_run(tmp_path / "b", scale=1.1)
    result = compare(before, changed(after), drift=0.02)
    for limit in (20, None):
        settings = Options.from_parameters({"compare": {"fail_if_slower": limit}})
        assert fail_if_slower(settings, result, "page")
    settings = Options.from_parameters({"compare": {"fail_if_slower": 5}})
    with pytest.raises(MeasurementError, match=r"b: exp1 is slower than a: T_total × 1\.100"):
        fail_if_slower(settings, result, "page")


def test_several_runs_are_each_compared_with_the_first(tmp_path: Path) -> None:
    folders = [
        m.write_run(tmp_path / name, scale) for name, scale in (("a", 1), ("b", 0.5), ("c", 2))
    ]
    for folder in folders[1:]:
        changed(folder)
    verdicts = compare(*folders)["verdicts"]
    assert verdicts["b: exp1"] == "FASTER"
    assert verdicts["c: exp3"] == "SLOWER"


def test_what_differs_between_environments_is_listed(tmp_path: Path) -> None:
    before, after = m.write_run(tmp_path / "a"), m.write_run(tmp_path / "b")
    path = after / "exp1" / f"{FILES['exp1']}.json"
    data = json.loads(path.read_text())
    data["environment"]["conditions"]["hardware"]["cpu"] = "another"
    path.write_text(json.dumps(data))
    (after / "exp3" / f"{FILES['exp3']}.json").unlink()
    result = compare(before, after)
    assert result["environment_differences"]["b"] == {"hardware.cpu": ["none", "another"]}


def test_files_of_the_seeds_scripts_are_compared_too(tmp_path: Path) -> None:
    for name, factor in (("one", 1.0), ("two", 1.2)):
        folder = tmp_path / name / "exp3"
        folder.mkdir(parents=True)
        entries = [
            {"grid": f"1×{k}", "num_crops": k + 1, "num_vision_tokens": 576 * (k + 1),
             "T_total": factor * (10.0 * k + 0.01 * k * k), "T_vision": factor * 8.0 * k}
            for k in range(1, 13)
        ]  # fmt: skip
        (folder / f"{FILES['exp3']}.json").write_text(json.dumps({"results": entries}))
    result = compare(tmp_path / "one", tmp_path / "two")
    assert result["verdicts"] == {"two: exp3": "SLOWER"}


def test_an_experiment_that_nothing_of_matches_is_named_and_the_others_are_compared(
    tmp_path: Path,
) -> None:
    before, after = m.write_run(tmp_path / "a"), m.write_run(tmp_path / "b")
    path = after / "exp3" / "exp3_records.parquet"
    records = pd.read_parquet(path)
    records.assign(request_id="other-" + records["request_id"], num_crops=99).to_parquet(path)
    result = compare(before, after)
    assert result["verdicts"] == {"b: exp1": "SAME"}
    assert "requests match by num_crops" in result["not_compared"]["b: exp3"]


def test_runs_without_a_common_experiment_are_refused(tmp_path: Path) -> None:
    before, after = m.write_run(tmp_path / "a"), m.write_run(tmp_path / "b")
    for folder, name in ((before, "exp1"), (after, "exp3")):
        (folder / name / f"{FILES[name]}.json").unlink()
    with pytest.raises(DataError, match="no experiment in common"):
        compare(before, after)


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no results in"):
        read_run(tmp_path)


def test_what_runs_share_is_drawn_side_by_side(tmp_path: Path) -> None:
    folders = [m.write_run(tmp_path / name, scale) for name, scale in (("a", 1), ("b", 2))]
    runs = [read_run(folder) for folder in folders]
    drawn = side_by_side(runs, FigureContext(), Style())
    assert set(drawn) == {"compare_vision_tokens"}  # exp2 and exp4 are in neither
    texts = [text.get_text() for text in drawn["compare_vision_tokens"].axes[0].get_legend().texts]
    assert texts[0].startswith("a (n = 50): ")
    assert texts[1].startswith("b (n = 50): ")
    assert side_by_side(runs[:1], FigureContext(), Style()) == {}


def test_engines_are_drawn_against_output_tokens(tmp_path: Path) -> None:
    def run(name: str, per_token: float) -> Run:
        rows = [
            {
                "request_id": f"{image}-{tokens}",
                "image_id": image,
                "status": "ok",
                "num_output_tokens": tokens,
                "T_LLM_decode": per_token * (tokens - 1) * (1 + 0.001 * image * (-1) ** tokens),
            }
            for image in range(5)
            for tokens in (8, 33, 128)
        ]
        return Run(name, {"exp4": pd.DataFrame(rows)}, {})

    drawn = side_by_side([run("eager", 20.0), run("loop", 0.5)], FigureContext(), Style())
    (axes,) = drawn["compare_output_tokens"].axes
    assert axes.get_xlabel() == "output tokens"
    eager, loop = (text.get_text() for text in axes.get_legend().texts)
    assert eager.startswith("eager (n = 15): 20")
    assert "20.05 ms [" in eager and eager.endswith("] per token")
    assert loop.startswith("loop (n = 15): 50")
    assert " µs [" in loop and loop.endswith("] per token")


def variants(tmp_path: Path, text: str) -> dict[str, Any]:
    (tmp_path / "variants.yml").write_text(text)
    return {"model.name": "null-model", "compare.variants": str(tmp_path / "variants.yml")}


def test_variants_are_measured_in_turn_and_compared(
    tmp_path: Path, kedro_run: Callable[..., dict[str, Any]]
) -> None:
    given = variants(tmp_path, "same: {}\nalso: {}\nslow: {model.null_sleep_ms: 40}\n")
    small = {
        "compare.num_samples": 2,
        "compare.num_runs": 10,
        "compare.output_tokens": 3,
        "model.null_sleep_ms": 10,
    }
    kedro_run("compare", tmp_path / "out", {**given, **small})
    runs = pd.read_parquet(tmp_path / "out" / "compare" / "compare_records.parquet")
    turns = runs.sort_values("order_index")["model"].tolist()
    assert {tuple(sorted(turns[i : i + 3])) for i in range(0, 60, 3)} == {("also", "same", "slow")}
    result = json.loads((tmp_path / "out" / "compare" / "compare.json").read_text())
    assert (result["baseline"], result["runs"]) == ("same", ["also", "slow"])
    assert result["verdicts"]["slow"] == "SLOWER"
    difference, none = (result["differences"][name]["T_total"] for name in ("slow", "also"))
    assert none["high"] < difference["low"]  # a verdict on the same twice is wrong now and then
    assert difference["low"] <= 35 and difference["high"] >= 25  # a sleep may last longer
    page = (tmp_path / "out" / "report" / "index.html").read_text()
    assert "20 pairs of runs, made in turn" in page

    before = m.write_run(tmp_path / "before")
    folders = {"compare.baseline": str(before), "compare.candidate": str(before)}
    kedro_run("compare", tmp_path / "out", folders)
    assert not (tmp_path / "out" / "compare" / "compare_records.parquet").exists()
    assert not (tmp_path / "out" / "compare" / "figures" / "compare_components.png").exists()


def test_variants_continue_where_a_kill_stopped_them(tmp_path: Path) -> None:
    settings = Options.from_parameters(
        {
            "model": {"name": "null-model"},
            "measurement": {"warmup_runs": 0},
            "compare": {"num_samples": 2, "num_runs": 4, "output_tokens": 2},
        }
    )
    names = ("one", "two", "three")
    runs = Variants({name: ModelHandle(settings.model) for name in names}, open_source(size=4))
    about = describe_variants(settings, runs)
    log = RecordLog(filepath=str(tmp_path / "journal"))

    def measured() -> tuple[pd.DataFrame, dict[str, Any], dict[str, Any]]:
        for chunk in measure_variants(settings, runs, about, log.load()):
            log.save(chunk)
        return collect_variants(settings, runs, about, log.load())

    before, *_ = measured()
    (path,) = (tmp_path / "journal").glob("*.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if b'"request_id"' in line][:14]  # four turns and a part
    path.write_bytes(b"".join([*lines[:2], *kept[:-1], kept[-1][:50]]))
    with pytest.raises(MeasurementError, match="13 of 24 runs of compare are measured; run"):
        collect_variants(settings, runs, about, log.load())

    after, coverage, environments = measured()
    assert len(after) == 24 and not after.duplicated([*RUN, "model"]).any()
    told = [*RUN, "model", "order_index", "T_total"]
    same = before.nsmallest(12, "order_index")[told].merge(after[told])
    assert len(same) == 12  # what was whole is not measured again
    turns = after.groupby(np.arange(24) // 3)  # and what was not, with all variants in turn
    assert (turns["order_index"].agg(np.ptp) == 2).all()
    assert (turns["model"].nunique() == 3).all() and (turns[RUN].nunique().max() == 1).all()
    assert (coverage["planned"], coverage["measured"], coverage["partial"]) == (24, 24, False)
    assert {each["measured"]["commands"] for each in environments.values()} == {2}
    assert not list(measure_variants(settings, runs, about, log.load()))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("one: {}\n", r"holds 1 variant\(s\); expected two or more names"),
        ("- one\n- two\n", "holds list; expected two or more"),
        ("a: {}\nb: static\n", "b is 'static'; expected names, each with what it changes"),
        ("a: {}\nb: {prompt.template: x}\n", "b changes 'prompt.template'; variants differ in"),
        ("a: {}\nb: {model.engin: static}\n", "b: unknown parameter 'model.engin'; did you mean"),
        ("a: {}\nb: {model: {name: tiny-molm}}\n", "no model is called 'tiny-molm'"),
        ("a: {", "is not YAML"),
    ],
)
def test_variants_that_are_none_are_refused(
    tmp_path: Path, kedro_run: Callable[..., dict[str, Any]], text: str, told: str
) -> None:
    with pytest.raises(UserError, match=told):
        kedro_run("compare", tmp_path / "out", variants(tmp_path, text))
