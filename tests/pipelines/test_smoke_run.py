"""The five experiments, really run on the tiny model, and what they leave on disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from vlm_latency.records import COMPONENTS, MEASURED_COLUMNS
from vlm_latency.results import FILES

FIGURES = {
    "exp1": ["exp1_latency_distribution"],
    "exp2": ["exp2_parameters", "exp2_latency", "exp2_components"],
    "exp3": ["exp3_vision_tokens_vs_latency"],
    "exp4": ["exp4_language_tokens_vs_latency"],
    "exp5": ["exp5_flops_vs_latency"],
}
MEASURED = ("exp1", "exp2", "exp3", "exp4")

# What an entry of the seed study's files holds, in each experiment.
ENTRY = {
    *("num_crops", "num_vision_tokens", "num_language_tokens", "num_total_tokens"),
    *("num_output_tokens", "T_total", "T_vision_encoder", "T_vision_total", "T_projector"),
    *("T_LLM_prefill", "T_LLM_decode"),
    *("flops_vision", "flops_projector", "flops_llm_prefill", "flops_llm_decode", "flops_total"),
}
QUESTION = {"image_id", "example_id", "answers", "image_size", "T_data_processing"}
QUESTION |= {"T_system_total"}
OWN = {
    "exp1": QUESTION,
    "exp2": QUESTION,
    "exp3": {"resolution", "grid"},
    "exp4": {"query_id", "max_new_tokens", "generated_text"},
}
FRAME = {
    *("schema_version", "experiment", "protocol", "model", "environment", "options"),
    *("statistics", "coverage"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, kedro_run: Callable[..., Any]) -> Path:
    """``kedro run --env smoke``, its samples smaller still."""
    folder = tmp_path_factory.mktemp("smoke")
    parameters = {
        "exp1.sampling.num_samples": 4,
        "exp1.measurement.noise_repeats": 1,
        "exp2.sampling.num_samples": 3,
        "exp3.sampling.max_grid_size": 6,
        "exp4.sampling.max_new_tokens_list": "4 8",
        "measurement.warmup_runs": 0,
        "calibration.ceiling_seconds": 0.1,
    }
    kedro_run("all", folder, parameters)
    return folder


def strict_json(path: Path) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in {path}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def result(root: Path, experiment: str) -> dict[str, Any]:
    return strict_json(root / experiment / f"{FILES[experiment]}.json")


def records(root: Path, experiment: str) -> pd.DataFrame:
    return pd.read_parquet(root / experiment / f"{experiment}_records.parquet")


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_files_bear_the_names_of_the_seed(name: str, root: Path) -> None:
    assert (root / name / f"{FILES[name]}.json").is_file()
    for figure in FIGURES[name]:
        path = root / name / "figures" / f"{figure}.png"
        with Image.open(path) as image:
            assert [round(dots) for dots in image.info["dpi"]] == [100, 100]
            assert min(image.size) > 200
            assert len(image.convert("L").getcolors(256) or [0] * 256) > 2  # something is drawn
        assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    assert sorted(path.stem for path in (root / name / "figures").glob("*.png")) == sorted(
        FIGURES[name]
    )


def test_the_page_is_written(root: Path) -> None:
    assert "</html>" in (root / "report" / "index.html").read_text(encoding="utf-8")


def test_no_temporary_file_is_left(root: Path) -> None:
    hidden = {path.name for path in root.rglob(".*") if path.is_file()}
    assert hidden == {".lock"}  # one per study, held while it is measured


@pytest.mark.parametrize("name", MEASURED)
def test_a_result_has_the_keys_of_the_seed(name: str, root: Path) -> None:
    data = result(root, name)
    assert set(data) >= FRAME | {"results"}
    assert data["coverage"]["partial"] is False
    assert data["coverage"]["missing"] == data["coverage"]["failed"] == 0
    for entry in data["results"]:
        assert set(entry) >= ENTRY | OWN[name]
        assert entry["num_crops"] == int(entry["num_crops"])
        assert entry["flops_total"] > 0
        assert entry["T_total"] > 0


def test_top_level_keys_of_the_seed(root: Path) -> None:
    exp2, exp4, exp5 = (result(root, name) for name in ("exp2", "exp4", "exp5"))
    assert set(exp2["parameters"]) >= {
        *("params_vision_encoder", "params_projector", "params_llm", "params_llm_active"),
        *("params_total", "params_active", "moe_num_experts", "moe_top_k"),
    }
    assert exp2["average_latencies"]["T_total"] == pytest.approx(
        sum(entry["T_total"] for entry in exp2["results"]) / len(exp2["results"])
    )
    assert exp4["use_eos_token"] is False
    assert set(exp5) >= FRAME | {"exp3", "exp4"}
    assert set(exp5["exp3"]) >= {"flops", "latencies", "vision_tokens"}
    assert set(exp5["exp4"]) >= {"flops", "latencies", "output_tokens"}
    for sweep in ("exp3", "exp4", "combined"):
        assert 0 <= exp5["statistics"][sweep]["r_squared"] <= 1


@pytest.mark.parametrize("name", MEASURED)
def test_every_record_adds_up(name: str, root: Path) -> None:
    rows = records(root, name)
    assert set(rows.columns) >= set(MEASURED_COLUMNS)
    assert (rows["status"] == "ok").all()
    close = {"rtol": 1e-9, "check_names": False}
    equal = pd.testing.assert_series_equal
    equal(rows["T_vision_total"], rows["T_vision_encoder"] + rows["T_projector"], **close)
    equal(rows["T_total"], rows[list(COMPONENTS)].sum(axis=1, skipna=False), **close)
    assert (rows[["T_total", "T_first_token", *COMPONENTS]] >= 0).all(axis=None)
    assert (rows["T_first_token"] <= rows["T_total"]).all()
    tokens = rows["num_vision_tokens"] + rows["num_language_tokens"]
    assert (rows["num_total_tokens"] == tokens).all()
    assert (rows["num_vision_patches"] == 576 * rows["num_crops"]).all()
    steps = rows["decode_step_ms"].map(len)
    assert (steps == rows["num_output_tokens"] - 1).all()
    parts = [f"flops_{part}" for part in ("vision", "projector", "llm_prefill", "llm_decode")]
    assert (rows["flops_total"] == rows[parts].sum(axis=1)).all()
    assert (rows["flops_total"] == rows["flops_total_analytic"]).all()
    assert len(set(rows["fingerprint"])) == 1


def test_exp1_asks_once_of_each_image_for_answers_of_the_true_length(root: Path) -> None:
    rows = records(root, "exp1")
    assert len(result(root, "exp1")["results"]) == 4
    assert rows["image_id"].nunique() == 4
    assert len(rows) == 5  # one request is measured once more, to know the noise
    assert (rows["num_output_tokens"] == rows["max_new_tokens"]).all()
    statistics = result(root, "exp1")["statistics"]
    for name in ("T_total", "T_first_token"):
        assert {"P50", "P95", "P99", "mean", "std", "min", "max"} <= set(statistics[name])
    assert statistics["T_total"]["n"] == 4
    assert statistics["accuracy"]["value"] is None  # random weights answer nothing


def test_exp3_hits_every_grid_once(root: Path) -> None:
    data = result(root, "exp3")
    ladder = [entry for entry in data["results"] if entry["grid"].startswith("1×")]
    assert [entry["num_crops"] for entry in ladder] == [2, 3, 4, 5, 6, 7]
    assert [entry["num_vision_tokens"] for entry in ladder] == [288, 384, 480, 576, 672, 768]
    assert [entry["grid"] for entry in data["results"]] == [f"1×{k}" for k in range(1, 7)] + ["2×3"]
    pair = data["results"][-1]
    assert (pair["num_crops"], pair["num_vision_tokens"]) == (7, 704)
    assert [entry["resolution"] for entry in ladder][:2] == ["336x336", "560x336"]
    rows = records(root, "exp3")
    assert rows.groupby("request_id")["run_index"].apply(sorted).tolist() == [[0, 1]] * 7
    assert (rows["num_output_tokens"] == 1).all()
    assert (rows["T_LLM_decode"] == 0).all()
    for entry in data["results"]:
        runs = rows.loc[rows["request_id"] == entry["request_id"], "T_total"]
        assert entry["T_total"] == pytest.approx(runs.mean())


def test_exp4_forces_every_length_on_the_same_images(root: Path) -> None:
    rows = records(root, "exp4")
    assert sorted(rows["num_output_tokens"]) == [4, 4, 8, 8]
    assert rows.groupby("image_id")["num_output_tokens"].apply(sorted).tolist() == [[4, 8]] * 2
    assert len(set(rows["num_vision_tokens"])) == 1  # 2×3 tiles, whatever the image was


def test_experiments_take_turns(root: Path) -> None:
    """An experiment's results are on disk before the next one measures."""
    for before, after in (("exp1", "exp2"), ("exp2", "exp3"), ("exp3", "exp4")):
        written = (root / before / f"{FILES[before]}.json").stat().st_mtime
        started = pd.to_datetime(records(root, after)["started_at"]).min().timestamp()
        assert written < started


def test_the_same_command_reports_again_without_a_model_or_what_makes_one(
    root: Path, tmp_path: Path
) -> None:
    again = shutil.copytree(root, tmp_path / "again")
    (again / "exp3" / f"{FILES['exp3']}.json").unlink()
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.modules['torch._C'] = sys.modules['transformers.utils'] = None\n"
    )
    given = f"output_dir={again},exp3.sampling.max_grid_size=6,measurement.warmup_runs=0"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "kedro", "run", "--env", "smoke", "--pipeline", "exp3"),
            *("--params", given),
        ],
        cwd=Path(__file__).parents[2],
        env={
            **os.environ,
            "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "exp3: all 14 runs were measured before; reporting again" in done.stderr
    assert result(again, "exp3")["results"] == result(root, "exp3")["results"]


class TestExp5:
    """exp5 by itself, from files."""

    def test_from_the_results_under_the_output_folder(
        self, root: Path, tmp_path: Path, kedro_run: Callable[..., Any]
    ) -> None:
        for name in ("exp3", "exp4", "calibration"):
            shutil.copytree(root / name, tmp_path / name)
        kedro_run("exp5", tmp_path)
        alone, chained = result(tmp_path, "exp5"), result(root, "exp5")
        assert alone["exp3"] == chained["exp3"]
        assert alone["statistics"]["combined"] == chained["statistics"]["combined"]

    def test_files_it_is_pointed_to_are_never_written(
        self, root: Path, tmp_path: Path, kedro_run: Callable[..., Any]
    ) -> None:
        pointed = []
        for name in ("exp3", "exp4"):
            copy = tmp_path / "earlier" / f"{name}.json"
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(root / name / f"{FILES[name]}.json", copy)
            copy.chmod(0o444)
            pointed.append(copy)
        before = [(hashlib.sha256(p.read_bytes()).digest(), p.stat().st_mtime_ns) for p in pointed]
        out = tmp_path / "out"
        chosen = {"exp5.vision_results": str(pointed[0]), "exp5.language_results": str(pointed[1])}
        kedro_run("exp5", out, chosen)
        after = [(hashlib.sha256(p.read_bytes()).digest(), p.stat().st_mtime_ns) for p in pointed]
        assert before == after
        assert {p.name for p in out.iterdir()} == {"exp5", "report"}
        assert result(out, "exp5")["exp3"]["flops"] == result(root, "exp5")["exp3"]["flops"]

    def test_files_of_the_seed_itself_will_do(
        self, tmp_path: Path, kedro_run: Callable[..., Any]
    ) -> None:
        vision, language = tmp_path / "v.json", tmp_path / "l.json"
        vision.write_text(json.dumps({"results": [seed_vision(k) for k in range(2, 14)]}))
        language.write_text(
            json.dumps(
                {
                    "results": [seed_language(n, i) for n in (8, 16, 32, 64) for i in range(3)],
                    "use_eos_token": False,
                }
            )
        )
        chosen = {"exp5.vision_results": str(vision), "exp5.language_results": str(language)}
        kedro_run("exp5", tmp_path / "out", chosen)
        data = result(tmp_path / "out", "exp5")
        assert len(data["exp3"]["flops"]) == len(data["exp4"]["flops"]) == 12
        assert data["exp3"]["latencies"] == [20.0 + 9.0 * k for k in range(2, 14)]
        assert data["statistics"]["exp3"]["r_squared"] == pytest.approx(1)
        assert data["statistics"]["combined"]["r_squared"] < 1
        assert (tmp_path / "out" / "exp5" / "figures" / "exp5_flops_vs_latency.png").is_file()


def seed_vision(crops: int) -> dict[str, Any]:
    """An entry as the seed's third script wrote it: patches for tokens, ``T_vision``."""
    return {
        "grid": f"1×{crops - 1}",
        "resolution": f"{336 * (crops - 1)}x336",
        "num_crops": crops,
        "num_vision_tokens": 576 * crops,
        "num_language_tokens": 30,
        "num_total_tokens": 576 * crops + 30,
        "num_output_tokens": 1,
        "T_total": 20.0 + 9.0 * crops,
        "T_vision": 5.0 * crops,
        "T_vision_encoder": 4.5 * crops,
        "T_projector": 0.5 * crops,
        "T_LLM_prefill": 20.0 + 4.0 * crops,
        "T_LLM_decode": None,
        "flops_vision": 10**11 * crops,
        "flops_projector": 10**9 * crops,
        "flops_llm_prefill": 10**10 * (144 * crops + 30),
        "flops_llm_decode": 0,
        "flops_total": 10**11 * crops + 10**9 * crops + 10**10 * (144 * crops + 30),
    }


def seed_language(length: int, image: int) -> dict[str, Any]:
    """An entry as the seed's fourth script wrote it."""
    return {
        "query_id": image,
        "max_new_tokens": length,
        "num_crops": 7,
        "num_vision_tokens": 576 * 7,
        "num_output_tokens": length,
        "T_total": 90.0 + 25.0 * length + image,
        "T_LLM_prefill": 40.0,
        "T_LLM_decode": 25.0 * length + image,
        "flops_llm_decode": 10**10 * length,
        "flops_total": 10**12 + 10**10 * length,
    }


@pytest.mark.slow
def test_real_questions_by_parameters_alone(
    shared: Path, tmp_path: Path, kedro_run: Callable[..., Any]
) -> None:
    given = {
        "dataset.source": "official",
        "dataset.path": str(shared / "real" / "vqa_v2_mini"),
        "exp1.sampling.num_samples": 4,
        "measurement.warmup_runs": 0,
    }
    kedro_run("exp1", tmp_path, given)
    data = result(tmp_path, "exp1")
    assert data["coverage"]["failed"] == 0
    assert data["environment"]["dataset"]["synthetic"] is False
    assert all(len(entry["answers"]) == 10 for entry in data["results"])
    rows = records(tmp_path, "exp1")
    assert (rows["num_output_tokens"] >= 1).all()
    assert not list((shared / "real" / "vqa_v2_mini").glob("**/*.parquet"))
