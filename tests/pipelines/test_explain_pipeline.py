"""``kedro run --pipeline explain`` on the tiny model, and how its requests are chosen."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from vlm_latency.errors import UserError
from vlm_latency.models import ModelHandle
from vlm_latency.options import Options
from vlm_latency.pipelines.explain.nodes import choose_requests
from vlm_latency.records import COMPONENTS
from vlm_latency.vqa import open_source


def chosen(model: str = "tiny-molmo", **asked: Any) -> pd.DataFrame:
    settings = Options.from_parameters(
        {
            "model": {"name": model},
            "exp2": {"sampling": {"num_samples": 40, "seed": 1}},
            "explain": asked,
        }
    )
    questions = open_source(name="coco_2014_vqa", source="synthetic", size=200, split="val")
    return choose_requests(settings, ModelHandle(settings.model), questions)


def test_requests_are_one_for_each_shape_of_exp2() -> None:
    architecture = ModelHandle(Options.from_parameters({"model": {"name": "tiny-molmo"}}).model)
    every = chosen(max_shapes=99)
    counts = [
        architecture.architecture.image_tokens(width, height).num_crops
        for width, height in zip(every["image_width"], every["image_height"], strict=True)
    ]
    assert len(set(counts)) == len(counts) > 2
    few = chosen(max_shapes=2, output_tokens=5)
    assert few["request_id"].tolist() == every["request_id"].tolist()[:2]
    assert few["request_id"].str.startswith("explain-").all()
    assert set(few["output_length"]) == {"5"}


def test_sizes_may_be_asked_for() -> None:
    assert chosen(sizes="640x480 336×336")["resolution"].tolist() == ["640x480", "336x336"]
    with pytest.raises(UserError, match=r"explain\.sizes.*expected width x height"):
        chosen(sizes="large")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, kedro_run: Callable[..., Any]) -> Path:
    root = tmp_path_factory.mktemp("explained")
    parameters = {
        "model.name": "tiny-llava",
        "explain.sizes": "336x336 448x336",
        "explain.num_runs": 2,
        "calibration.ceiling_seconds": 0.1,
    }
    kedro_run("explain", root, parameters)
    return root


def test_a_result_has_busy_idle_and_bound_of_each_component(folder: Path) -> None:
    result = json.loads((folder / "explain" / "explain.json").read_text(encoding="utf-8"))
    assert len(result["results"]) == 2
    assert result["components"] == result["results"][0]["components"]
    for entry in result["results"]:
        assert entry["attributed"] > 0.9  # an operator after the request may be interrupted
        assert list(entry["components"]) == list(COMPONENTS)
        for name, about in entry["components"].items():
            wall = about["wall"]["value"]
            assert about["idle"] == pytest.approx(wall - about["busy"])
            assert about["idle_share"] == pytest.approx(about["idle"] / wall)
            assert about["bound"] in {"launches", "memory", "compute", None}
            if name != "T_other":
                assert about["bound"] and about["roofline_bound"]
                assert about["flops_per_s"] == pytest.approx(about["flops"] / wall * 1e3)
                assert about["bytes_share_of_ceiling"] > 0
    assert "bound by" in result["statistics"]["finding"]
    assert "under the profiler it took" in result["statistics"]["notes"][0]
    runs = pd.read_parquet(folder / "explain" / "explain_records.parquet")
    assert len(runs) == 4
    ids = [entry["request_id"] for entry in result["results"]]
    for entry in result["results"]:
        own = runs[runs["request_id"] == entry["request_id"]]
        for name in COMPONENTS:
            wall = entry["components"][name]["wall"]["value"]
            assert wall == pytest.approx(own[name].median())
    assert ids == ["explain-336x336", "explain-448x336"]


def test_files_are_where_they_are_said_to_be(folder: Path) -> None:
    files = {path.relative_to(folder / "explain").as_posix() for path in folder.rglob("*.*")
             if path.parent.parent == folder / "explain" or path.parent == folder / "explain"}  # fmt: skip
    assert {"figures/explain.png", "figures/explain.pdf", "trace.json.gz"} <= files
    assert {f"tables/{t}.{s}" for t in ("components", "kernels") for s in ("csv", "tex")} <= files
    with gzip.open(folder / "explain" / "trace.json.gz", "rt", encoding="utf-8") as file:
        trace = json.load(file)
    names = {e["name"] for e in trace["traceEvents"] if e.get("cat") == "component"}
    assert names == set(COMPONENTS)
    page = (folder / "report" / "index.html").read_text(encoding="utf-8")
    assert "What bounds each component" in page


def test_the_null_model_is_refused_before_anything_is_loaded(
    tmp_path: Path, kedro_run: Callable[..., Any]
) -> None:
    with pytest.raises(UserError, match="there is nothing to explain"):
        kedro_run("explain", tmp_path, {"model.name": "null-model"})
