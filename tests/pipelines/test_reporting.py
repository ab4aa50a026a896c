"""Reports on latencies that follow a known formula say what the formula says."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import made_up as m

from vlm_latency.errors import DataError
from vlm_latency.options import Options
from vlm_latency.page.collect import Study
from vlm_latency.pipelines.reporting import entries, exp1, exp2, exp3, exp4, exp5, nodes, results
from vlm_latency.plots.tables import to_latex
from vlm_latency.statistics import linear_fit


@pytest.fixture
def architecture() -> Any:
    parameters = {
        "params_vision_encoder": 100,
        "params_projector": 20,
        "params_image_projector": 10,
        "params_llm": 880,
        "params_llm_active": 880,
        "params_total": 1000,
        "params_active": 1000,
        "moe_num_experts": None,
        "moe_top_k": None,
    }
    return SimpleNamespace(
        architecture=SimpleNamespace(
            parameters=SimpleNamespace(to_dict=lambda: parameters),
            max_positions=100_000,
            image_tokens=_tokens,
        )
    )


def test_exp1_gives_the_order_statistics_and_the_spread_by_crops() -> None:
    records, requests = m.questions(60, spread=0.0)
    result, tables, figure = exp1.report(
        m.options("exp1"), records, requests, m.COVERAGE, m.ENVIRONMENT
    )
    statistics = result["statistics"]
    assert statistics["T_total"].max == records["T_total"].max()
    assert statistics["T_total"].P50.value == records["T_total"].median()
    assert statistics["T_total"].P99.high is None  # 60 requests cannot bound it
    assert statistics["variance_budget"].shares["tiling"].value > 0.8
    assert len(result["results"]) == 60
    entry = result["results"][0]
    assert entry["T_system_total"] == entry["T_total"] + entry["T_data_processing"]
    assert {"example_id", "image_id", "answers", "image_size"} <= set(entry)
    assert statistics["accuracy"]["refused"]
    assert set(tables) == {"paper", "percentiles", "by_tiling", "by_output_length"}
    assert figure.axes


def test_questions_beyond_the_most_are_in_the_records_alone(
    architecture: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, requests = m.questions(60, spread=0.0)
    whole, *_ = exp1.report(m.options("exp1"), records, requests, m.COVERAGE, m.ENVIRONMENT)
    assert whole["num_entries_in_records_only"] == 0
    monkeypatch.setattr(entries, "MOST_ENTRIES", 50)
    records.loc[3, "status"] = "failed"
    succeeded = len(entries.averaged(records, requests))
    first, *_ = exp1.report(m.options("exp1"), records, requests, m.COVERAGE, m.ENVIRONMENT)
    second, *_ = exp2.report(
        m.options("exp2"), records, requests, m.COVERAGE, m.ENVIRONMENT, architecture
    )
    for result in (first, second):
        assert len(result["results"]) == 50
        assert result["num_entries_in_records_only"] == succeeded - 50
    kept = [entry for entry in whole["results"] if entry["request_id"] != records["request_id"][3]]
    assert first["results"] == kept[:50]
    assert first["statistics"]["T_total"].n == 59  # statistics are of all
    assert second["statistics"]["n"] == succeeded


def test_constant_latencies_contradict_the_tail() -> None:
    records, requests = m.questions(50, spread=0.0)
    records["T_total"] = 100.0
    result, *_ = exp1.report(m.options("exp1"), records, requests, m.COVERAGE, m.ENVIRONMENT)
    assert [claim.verdict for claim in result["claims"]] == ["contradicted"]


def test_failed_runs_are_counted_and_never_averaged() -> None:
    records, requests = m.questions(30, spread=0.0)
    records.loc[0, "status"] = "failed"
    records.loc[0, ["T_total", "T_first_token"]] = None
    coverage = {**m.COVERAGE, "failed": 1}
    result, _, figure = exp1.report(m.options("exp1"), records, requests, coverage, m.ENVIRONMENT)
    assert len(result["results"]) == 29
    assert result["statistics"]["T_total"].n == 29
    assert any("1 runs failed" in text.get_text() for text in figure.texts)


def test_exp2_shares_are_those_of_the_formula(architecture: Any) -> None:
    records, requests = m.questions(40, spread=0.0)
    environment = {**m.ENVIRONMENT, "model": {**m.ENVIRONMENT["model"], "name": "Molmo-7B-D-0924"}}
    result, _, pie, latency, bars = exp2.report(
        m.options("exp2"), records, requests, m.COVERAGE, environment, architecture
    )
    for figure in (pie, latency, bars):
        assert sum(text.get_weight() == "bold" for text in figure.texts) <= 2  # lines of the title
    share = records["T_vision_encoder"].sum() / records["T_total"].sum()
    assert result["statistics"]["shares"]["T_vision_encoder"].value == pytest.approx(share)
    assert result["average_latencies"]["T_total"] == pytest.approx(records["T_total"].mean())
    assert result["parameters"]["params_projector"] == 20
    assert not {"image_id", "question_id", "example_id"} & set(result["average_latencies"])
    assert [claim.verdict for claim in result["claims"]] == ["contradicted"]
    assert pie.axes
    assert bars.axes


def test_the_seeds_protocol_counts_the_image_projector_alone(architecture: Any) -> None:
    records, requests = m.questions(20, spread=0.0)
    options = m.options("exp2").model_copy(update={"protocol": "seed"})
    result, *_ = exp2.report(options, records, requests, m.COVERAGE, m.ENVIRONMENT, architecture)
    assert result["parameters"]["params_projector"] == 10


def test_exp3_tells_the_encoders_crops_from_the_decoders_tokens() -> None:
    records, requests = m.vision_sweep()
    result, _, figure = exp3.report(
        m.options("exp3"), records, requests, m.COVERAGE, m.ENVIRONMENT, {}
    )
    found = result["statistics"]
    assert found["encoder_per_crop"].value == pytest.approx(m.CROP, rel=0.05)
    assert found["prefill_per_token"].value == pytest.approx(m.TOKEN, rel=0.1)
    assert found["encoder_per_token"].low < 0 < found["encoder_per_token"].high
    assert found["fits"]["T_LLM_prefill"].slope.value == pytest.approx(m.TOKEN, rel=0.05)
    assert len(result["results"]) == requests["request_id"].nunique()
    assert result["results"][0]["num_runs"] == 5
    verdicts = {claim.name: claim.verdict for claim in result["claims"]}
    assert verdicts["prefill_grows"] == "supported"
    assert figure.axes


def test_exp4_gives_the_cost_of_a_step() -> None:
    records, requests = m.language_sweep()
    result, *_ = exp4.report(
        m.options("exp4"), records, requests, m.COVERAGE, m.ENVIRONMENT, {}, None
    )
    found = result["statistics"]
    assert found["fits"]["T_LLM_decode"].slope.value == pytest.approx(m.STEP, rel=0.02)
    assert found["step_growth"].value == pytest.approx(1, abs=0.02)
    assert found["exponent"].value == pytest.approx(1, abs=0.02)
    assert [claim.verdict for claim in result["claims"]] == ["supported"]
    assert [line["num_output_tokens"] for line in found["lengths"]] == [8, 16, 32, 64, 128]


def test_the_band_of_the_steps_is_one_over_images() -> None:
    for images, banded in ((5, False), (12, True)):  # a median needs six that are independent
        records, requests = m.language_sweep(images=images)
        result, *_ = exp4.report(
            m.options("exp4"), records, requests, m.COVERAGE, m.ENVIRONMENT, {}, None
        )
        ends = result["statistics"]["steps"]
        assert any(low is not None for low in (*ends["low"], *ends["high"])) is banded


def _costed(table: pd.DataFrame) -> pd.DataFrame:
    flops = {
        "vision": table["num_crops"] * 1e9,
        "projector": table["num_crops"] * 1e7,
        "llm_prefill": table["num_total_tokens"] * 1e6,
        "llm_decode": (table["num_output_tokens"] - 1) * 1e6,
    }
    columns = {f"flops_{part}": values.astype(float) for part, values in flops.items()}
    columns["flops_total"] = sum(columns.values())
    columns |= {f"{name}_analytic": values for name, values in list(columns.items())}
    return table.assign(
        **columns,
        **{f"bytes_{part}": 1e6 for part in flops},
        **{f"launches_{part}": 10 for part in flops},
    )


CEILINGS = {
    "flops_per_s": 1e11,
    "bytes_per_s": 1e10,
    "launch_overhead_us": 5.0,
    "dtype": "float32",
}


def test_exp5_finds_that_a_flop_of_decode_costs_more() -> None:
    sweeps = []
    for name, (records, requests), report in (
        ("exp3", m.vision_sweep(), exp3.report),
        ("exp4", m.language_sweep(), exp4.report),
    ):
        further = [None] if name == "exp4" else []
        result, *_ = report(
            m.options(name),
            _costed(records),
            requests,
            m.COVERAGE,
            m.ENVIRONMENT,
            CEILINGS,
            *further,
        )
        sweeps.append(result)
    result, tables, figure = exp5.report(m.options("exp5"), *sweeps)
    found = result["statistics"]
    assert found["ms_per_tflop"]["encoder"].value == pytest.approx(m.CROP / 1e-3, rel=0.01)
    assert found["ms_per_tflop"]["decode"].value == pytest.approx(m.STEP / 1e-6, rel=0.01)
    assert found["exp3"]["r_squared"] > 0.9
    assert found["exp4"]["r_squared"] > 0.9
    assert found["combined"]["r_squared"] < 0.5
    assert found["held_out_error"]["tokens"].value < 0.05
    assert result["claims"][0].verdict == "supported"
    assert "FLOPs alone do not predict latency" in found["verdict"]
    assert set(result["exp3"]) == {"flops", "latencies", "vision_tokens"}
    assert set(result["exp4"]) == {"flops", "latencies", "output_tokens"}
    images = sweeps[1]["results"]
    over = f"over {len({entry['image_id'] for entry in images})} clusters"
    assert found["ms_per_tflop"]["decode"].method.endswith(over)
    assert found["exp4"]["fit"].method.endswith(over)
    lengths = len({entry["num_output_tokens"] for entry in images})
    assert found["transfer"]["exp3 predicts exp4"].method.endswith(f"over {lengths} clusters")
    assert len(tables["predictors"]) == 4
    assert figure.axes


def test_what_a_compiled_step_does_not_tell_is_said() -> None:
    for engine, said in (("compiled", True), ("static", False)):
        environment = {**m.ENVIRONMENT, "model": {**m.ENVIRONMENT["model"], "engine": engine}}
        result, *_ = exp3.report(m.options("exp3"), *m.vision_sweep(), m.COVERAGE, environment, {})
        notes = result["statistics"]["notes"]
        assert any("modules inside it cannot be told apart" in note for note in notes) is said


def _tokens(width: int, height: int) -> Any:
    return SimpleNamespace(num_vision_tokens=704, num_image_special_tokens=30)


def test_exp5_reads_the_seeds_own_files() -> None:
    vision = {
        "results": [
            {"grid": f"1×{k}", "num_crops": k + 1, "num_vision_tokens": 576 * (k + 1),
             "T_total": 10.0 * k, "T_vision": 8.0 * k, "flops_total": 1e9 * k}
            for k in range(1, 9)
        ]
    }  # fmt: skip
    language = {
        "results": [
            {"query_id": 1, "max_new_tokens": n, "num_output_tokens": n, "T_total": 2.0 * n,
             "flops_total": 1e7 * n}
            for n in (8, 16, 32, 64)
        ]
    }  # fmt: skip
    result, _, figure = exp5.report(m.options("exp5"), vision, language)
    assert result["exp3"]["vision_tokens"] == [576 * (k + 1) for k in range(1, 9)]
    assert result["statistics"]["exp3"]["r_squared"] == pytest.approx(1)
    assert "not both results record their environment" in " ".join(result["statistics"]["notes"])
    assert figure.axes


def test_two_environments_are_told_on_the_figure() -> None:
    one, two = (
        {"environment": {**m.ENVIRONMENT, "conditions": {"hardware": {"cpu": name}}}}
        for name in ("a", "b")
    )
    notes: list[str] = []
    _, marks = exp5._environment({"exp3": one, "exp4": two}, notes)
    assert marks == ("two environments: hardware differ",)
    assert "another hardware" in notes[0]


def test_entries_come_in_the_order_of_the_requests() -> None:
    records, requests = m.vision_sweep()
    shuffled = records.sample(frac=1, random_state=1)
    table = entries.averaged(shuffled, requests)
    assert list(table.index) == list(requests["request_id"])
    assert table["num_crops"].dtype == "Int64"


def test_the_images_of_a_sweep_are_marked_synthetic_beside_a_real_dataset() -> None:
    records, requests = m.vision_sweep()
    real = {**m.ENVIRONMENT, "dataset": {"name": "coco_2014_vqa", "synthetic": False}}
    result, _, figure = exp3.report(
        m.options("exp3"), records, requests.assign(synthetic=True), m.COVERAGE, real, {}
    )
    assert result["environment"]["dataset"]["synthetic"] is True
    assert any("synthetic requests" in text.get_text() for text in figure.texts)


def test_a_request_measured_again_to_know_the_noise_counts_once() -> None:
    records, requests = m.questions(30)
    again = records.head(6).assign(run_index=1, T_total=1e4)
    result, tables, _ = exp1.report(
        m.options("exp1"),
        pd.concat([records, again], ignore_index=True),
        requests,
        m.COVERAGE,
        m.ENVIRONMENT,
    )
    total = result["statistics"]["T_total"]
    assert (total.n, total.max) == (30, records["T_total"].max())
    assert tables["by_tiling"]["n"].sum() == 30
    assert result["statistics"]["outliers"]["of"] == 36  # marked like any other


def test_repeats_of_a_request_are_one_cluster_of_a_line() -> None:
    offset = pd.Series([3.0, -2.0, 1.0, -3.0, 2.0, -1.0, 2.5, -2.5])
    x = pd.Series(range(8), dtype=float)
    rows = pd.DataFrame(
        {
            "request_id": [f"r{i}" for i in range(8)] * 5,
            "x": [*x] * 5,
            "T_total": [*(x + offset)] * 5,  # five runs that say the same
        }
    )
    lines = results.fits(rows, "x", ["T_total"], rows["request_id"], [])
    found = lines["T_total"].least_squares.slope
    alone = linear_fit(rows["x"], rows["T_total"]).slope
    assert found.high - found.low > 1.5 * (alone.high - alone.low)


def test_exp4_names_the_lengths_that_were_asked_for_and_left_out() -> None:
    records, requests = m.language_sweep()
    lengths = [str(n) for n in (8, 16, 32, 64, 128, 4096)]
    requests["output_length"] = requests["request_id"].str.split("-n").str[1]
    asked = Options.from_parameters(
        {"exp4": {"sampling": {"max_new_tokens_list": " ".join(lengths)}}}
    ).experiment("exp4")
    given = pd.DataFrame({"output_length": [f"≤{n}" for n in lengths]})
    for options, table in ((asked, None), (m.options("exp4"), given)):
        result, *_ = exp4.report(options, records, requests, m.COVERAGE, m.ENVIRONMENT, {}, table)
        assert result["statistics"]["dropped_lengths"] == [4096]


def test_results_of_two_models_are_refused() -> None:
    one, two = (
        {
            "results": [{"T_total": 1.0, "flops_total": 1.0}],
            "environment": {"model": {"name": name}},
        }
        for name in ("a", "b")
    )
    with pytest.raises(DataError, match="exp3 of a and exp4 of b; expected both of one"):
        exp5.report(m.options("exp5"), one, two)


def test_steps_of_one_cost_with_three_per_cent_of_noise_are_linear() -> None:
    verdicts = []
    for seed in range(40):
        generator = np.random.default_rng(seed)
        records, _ = m.language_sweep(seed, images=5)
        records["decode_step_ms"] = [
            m.STEP * (1 + 0.03 * generator.standard_normal(len(steps)))
            for steps in records["decode_step_ms"]
        ]
        records["T_LLM_decode"] = [sum(steps) for steps in records["decode_step_ms"]]
        verdicts.append(exp4.linear(records, [])[0].verdict)
    assert verdicts.count("supported") >= 36


def test_where_disturbed_runs_move_a_headline_both_numbers_are_given() -> None:
    records, requests = m.questions(100, spread=0.01)
    late = records.index[:10]
    times = [name for name in records if str(name).startswith("T_")]
    records.loc[late, times] *= 5
    records.loc[late, "outlier_cause"] = "first visit of a length"
    result, _, figure = exp1.report(m.options("exp1"), records, requests, m.COVERAGE, m.ENVIRONMENT)
    found = result["statistics"]["disturbed"]
    assert found.moved
    assert found.with_all.value > 300 > found.undisturbed.value
    assert found.causes == {"first visit of a length": 10}
    assert result["statistics"]["T_total"].n == 100  # nothing is removed
    said = result["finding"]
    assert "without the 10 of 100 runs that were disturbed (first visit of a length)" in said
    title = " ".join(text.get_text() for text in figure.texts).replace("\N{NO-BREAK SPACE}", " ")
    assert "10 of 100 runs" in title.replace("\n", " ")


def test_a_percentile_without_an_upper_bound_is_no_headline() -> None:
    records, requests = m.questions(60, spread=0.0)
    result, *_ = exp1.report(m.options("exp1"), records, requests, m.COVERAGE, m.ENVIRONMENT)
    assert "cannot be said from n = 60" in result["finding"]
    assert "?" not in result["finding"]


def test_claims_on_random_weights_say_so() -> None:
    result, *_ = exp3.report(m.options("exp3"), *m.vision_sweep(), m.COVERAGE, m.ENVIRONMENT, {})
    assert all(
        "judged on made-up, a model with random weights" in claim.note for claim in result["claims"]
    )


def test_a_floor_is_a_headline_of_its_own() -> None:
    records, requests = m.vision_sweep()
    tokens = records["num_vision_tokens"].astype(float)
    noise = 1 + 0.002 * np.random.default_rng(0).standard_normal(len(records))
    records["T_total"] = (100 + 0.2 * (tokens - 650).clip(lower=0)) * noise
    result, *_ = exp3.report(m.options("exp3"), records, requests, m.COVERAGE, m.ENVIRONMENT, {})
    assert result["statistics"]["floors"]["T_total"].holds == "floor and line"
    assert "vision tokens one costs nothing" in result["finding"]
    assert "costs nothing" in result["claims"][0].note


def test_what_was_not_computed_has_a_word() -> None:
    records, requests = m.questions(20)
    result, *_ = exp1.report(
        m.options("exp1"), records.assign(mfu_vision=26.0), requests, m.COVERAGE, m.ENVIRONMENT
    )
    assert "vision: MFU 26 is more than the machine can do" in result["statistics"]["notes"][0]


def test_failed_runs_are_told_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    coverage = {"planned": 6, "failed": 2, "failures": {"out of memory": 2}}
    nodes.publish({"exp1": Study("exp1", {"coverage": coverage})})
    assert "exp1: 2 of 6 runs failed and are in no statistic: 2 × out of memory" in caplog.text


def test_the_table_for_a_paper_has_five_columns() -> None:
    _, tables, _ = exp3.report(m.options("exp3"), *m.vision_sweep(), m.COVERAGE, m.ENVIRONMENT, {})
    latex = to_latex(tables["paper"])
    assert "quantity & unit & value & 95" in latex
    assert latex.splitlines()[0].startswith(r"\begin{tabular}{lll")


@pytest.mark.parametrize(
    ("noise", "slow", "said"),
    [
        (0.001, 0.0, r"^each vision token costs 1[34]\d\S* µs \[.*\] of T_total$"),
        (0.05, 0.0, r"^a vision token costs .* of T_total on average of the sweep$"),
        (0.001, 300.0, r"of T_total.* in the typical run$"),
    ],
)
def test_a_cost_per_token_says_no_more_than_the_sweep(noise: float, slow: float, said: str) -> None:
    """Each token costs it where the cost is known not to change, and slow runs are not the mean."""
    from vlm_latency import statistics as st

    rng = np.random.default_rng(1)
    request = np.repeat(np.arange(15), 5)
    tokens = np.linspace(288, 1344, 15)[request]
    total = (10 + 0.14 * tokens) * np.exp(rng.normal(0, noise, 15)[request])
    total[-8:] += slow * rng.random(8)
    nothing = dict.fromkeys(("encoder_per_crop", "prefill_per_token", "disturbed"))
    found = {
        **nothing,
        "lines": {"T_total": st.headline_line(tokens, total, request)},
        "floors": {},
        "linearity": None,
        "marginal_change": st.marginal_change(tokens, total, request),
        "sizes": [],
    }
    assert re.search(said, exp3._finding(found, "tokens"))
