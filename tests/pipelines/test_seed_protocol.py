"""``protocol=seed`` measures as the seed study's scripts did, its flaws included."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from vlm_latency.results import FILES

MEASURED = ("exp1", "exp2", "exp3", "exp4")
CLAMPED = ("T_projector", "T_LLM_prefill", "T_LLM_decode")

pytestmark = pytest.mark.slow  # two whole runs


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, kedro_run: Callable[..., Any]) -> Path:
    folder = tmp_path_factory.mktemp("seed")
    parameters = {
        "protocol": "seed",
        "exp1.sampling.num_samples": 3,
        "exp1.measurement.noise_repeats": 0,
        "exp2.sampling.num_samples": 2,
        "exp3.sampling.max_grid_size": 4,
        "exp4.sampling.max_new_tokens_list": "2 4",
        "measurement.warmup_runs": 2,
        "calibration.ceiling_seconds": 0.1,
    }
    kedro_run("all", folder, parameters)
    return folder


def result(root: Path, name: str) -> dict[str, Any]:
    return json.loads((root / name / f"{FILES[name]}.json").read_text(encoding="utf-8"))


def records(root: Path, name: str) -> pd.DataFrame:
    return pd.read_parquet(root / name / f"{name}_records.parquet")


@pytest.mark.parametrize("name", MEASURED)
def test_the_result_says_how_it_was_measured(name: str, root: Path) -> None:
    data = result(root, name)
    assert data["protocol"] == "seed"
    settled = data["options"]
    assert settled["measurement"]["method"] == "subtraction"
    assert settled["measurement"]["order"] == "ascending"
    assert settled["measurement"]["warmup"] == "fixed"
    drawn = {"equal_crop_pairs": False}
    if name != "exp3":
        drawn = {"order": "first", "one_question_per_image": False}
    assert drawn.items() <= settled["sampling"].items()
    assert settled["flops"]["estimator"] == "parameter_rule"
    assert settled["figures"]["vision_axis"] == "patches"


@pytest.mark.parametrize("name", MEASURED)
def test_differences_are_clamped_and_kept_raw(name: str, root: Path) -> None:
    rows = records(root, name)
    assert (rows["status"] == "ok").all()
    for column in CLAMPED:
        raw, clamped = rows[f"raw_{column}"], rows[column]
        known = raw.notna()
        assert (clamped[known] == raw[known].clip(lower=0)).all()
    assert rows["raw_T_projector"].notna().all()
    assert rows["raw_T_LLM_prefill"].notna().all()


@pytest.mark.parametrize("name", MEASURED)
def test_flops_are_the_rule_of_parameters(name: str, root: Path) -> None:
    rows = records(root, name)
    for part in ("vision", "projector", "llm_prefill", "llm_decode", "total"):
        assert (rows[f"flops_{part}"] == rows[f"flops_{part}_rule"]).all()


@pytest.mark.parametrize("name", MEASURED)
def test_the_warm_up_is_a_fixed_number_of_the_first_request(name: str, root: Path) -> None:
    (session,) = result(root, name)["coverage"]["sessions"]
    assert [shape["runs"] for shape in session["warmup"]] == [2]


def test_exp1_takes_the_first_questions_and_prefill_only(root: Path) -> None:
    rows = records(root, "exp1").sort_values("order_index")
    requests = pd.read_parquet(root / "exp1" / "exp1_requests.parquet")
    assert rows["request_id"].tolist() == requests["request_id"].tolist()
    assert requests["image_id"].astype(int).is_monotonic_increasing
    assert (rows["num_output_tokens"] == 1).all()
    assert (rows["output_length"] == "none").all()


def test_exp3_images_are_336k_wide_and_measured_ascending(root: Path) -> None:
    entries = result(root, "exp3")["results"]
    assert [entry["resolution"] for entry in entries] == [
        "336x336",
        "672x336",
        "1008x336",
        "1344x336",
    ]
    # 672 × 336 pixels need three tiles, not two: the seed's grids are not all different ones.
    assert [entry["num_crops"] for entry in entries] == [2, 4, 5, 7]
    rows = records(root, "exp3").sort_values("order_index")
    runs = list(zip(rows["request_id"], rows["run_index"], strict=True))
    assert runs == [(f"exp3-seed-1x{k}", run) for k in range(1, 5) for run in (0, 1)]


def test_the_axis_counts_patches(root: Path) -> None:
    assert result(root, "exp3")["statistics"]["axis"] == "num_vision_patches"
    rows = records(root, "exp3")
    assert (rows["num_vision_patches"] == 576 * rows["num_crops"]).all()


def test_the_projector_is_the_image_projector_alone(root: Path) -> None:
    parameters = result(root, "exp2")["parameters"]
    assert parameters["params_projector"] == parameters["params_image_projector"]
