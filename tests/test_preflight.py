"""What cannot work is refused before anything is loaded, all of it at once."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from vlm_latency.datasets import EarlierResult, GivenRequests, ModelDataset, VQADataset
from vlm_latency.errors import MeasurementError, UserError
from vlm_latency.molmo.tiling import Tiles
from vlm_latency.options import Options
from vlm_latency.preflight import check, refuse_contradictions
from vlm_latency.results import result_path
from vlm_latency.vqa import Sampling, open_source, sweep_language_requests

ALL = ["exp1", "exp2", "exp3", "exp4"]
SIZES = {
    "exp1": {"sampling": {"num_samples": 5}},
    "exp2": {"sampling": {"num_samples": 3}},
    "exp3": {"sampling": {"max_grid_size": 4}},
    "exp4": {"sampling": {"num_samples": 2, "max_new_tokens_list": [8, 16], "tiling": "2x3"}},
}
SYNTHETIC = {"source": "synthetic", "size": 20}


def checked(
    root: Path, experiments: list[str] = ALL, runs_model: bool = False, **parameters: Any
) -> list[str]:
    given = {"model": {"name": "null-model"}, "dataset": SYNTHETIC, **SIZES, **parameters}
    options = Options.from_parameters(given)
    return check(
        options,
        root,
        experiments=experiments,
        runs_model=runs_model,
        model=ModelDataset(options=options.model.model_dump()),
        questions=VQADataset(options=options.dataset.model_dump()),
        earlier={},
        given={
            name: GivenRequests(
                experiment=name, files={name: getattr(options, name).sampling.requests}
            )
            for name in experiments
        },
    )


def test_nvtx_ranges_are_refused_without_cuda(tmp_path: Path) -> None:
    asked = {"runs_model": True, "exp1": {"measurement": {"nvtx": True}}}
    with pytest.raises(UserError, match=r"nvtx=true on cpu; NVTX ranges exist on CUDA only"):
        checked(tmp_path, ["exp1"], **asked)
    assert checked(tmp_path, ["exp2"], **asked)  # which does not ask for them


def refusals(root: Path, **parameters: Any) -> list[str]:
    with pytest.raises(UserError) as error:
        checked(root, **parameters)
    return str(error.value).splitlines()


def test_a_folder_belongs_to_one_model(tmp_path: Path) -> None:
    root = tmp_path / "motivation"
    on = {"name": "tiny-molmo", "weights": "random", "engine": "static", "dtype": "float32"}
    result = {"environment": {"model": on, "hardware": {"gpu": "H100"}}}
    for name in ("exp1", "calibration"):
        path = result_path(root, name)
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(result), encoding="utf-8")
    (told,) = refusals(root, experiments=["exp2"], runs_model=True)
    assert "exp1, calibration of tiny-molmo (random weights, static, float32, H100)" in told
    assert "this command measures null-model (" in told
    assert told.endswith(f"output_dir={tmp_path / 'motivation-null-model'}")
    assert checked(root, ["exp2"])  # only looks
    assert checked(tmp_path / "motivation-null-model", ["exp2"], runs_model=True)

    (own,) = re.findall(r"measures (\S+) \((\S+) weights, (\S+), (\S+), (.*)\):", told)
    about = dict(zip(("name", "weights", "engine", "dtype"), own, strict=False))
    result["environment"] = {"model": about, "hardware": {"cpu": own[-1]}}
    for name in ("exp1", "calibration"):
        result_path(root, name).write_text(json.dumps(result), encoding="utf-8")
    assert checked(root, ["exp2"], runs_model=True)


def left(root: Path, name: str, protocol: str = "exact", split: str = "validation") -> None:
    """Leave a result of exp1 to exp4 below an output folder."""
    asked = {"name": "coco_2014_vqa", "source": "synthetic", "split": split}
    path = result_path(root, name)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"protocol": protocol, "environment": {"dataset": asked}}))


def test_a_folder_belongs_to_one_protocol(tmp_path: Path) -> None:
    left(tmp_path, "exp1", protocol="seed")
    (told,) = refusals(tmp_path, experiments=["exp3"], runs_model=True)
    assert "by another protocol: exp1 of seed; this command measures by exact" in told
    assert f"output_dir={tmp_path}-exact" in told
    assert checked(tmp_path, ["exp1", "exp3"], runs_model=True)  # exp1 is made anew
    assert checked(tmp_path, ["exp3"], runs_model=True, protocol="seed")


def test_a_folder_belongs_to_one_dataset(tmp_path: Path) -> None:
    left(tmp_path, "exp1", split="train")
    (told,) = refusals(tmp_path, experiments=["exp4", "exp3"], runs_model=True)
    assert "on another dataset: exp1 of synthetic (train); this command" in told
    assert "synthetic (validation): give it a folder" in told
    assert checked(tmp_path, ["exp1", "exp4"], runs_model=True)
    assert checked(tmp_path, ["exp3"], runs_model=True)  # which asks no questions
    train = {**SYNTHETIC, "split": "train"}
    assert checked(tmp_path, ["exp4"], runs_model=True, dataset=train)


def test_a_line_says_what_each_experiment_will_do(tmp_path: Path) -> None:
    lines = checked(tmp_path)
    assert [line.split(":")[0] for line in lines] == ALL
    assert "5 questions" in lines[0]
    assert "grids 1×1 … 1×4" in lines[2]
    assert "2 images × 2 lengths" in lines[3]
    assert all("null" in line for line in lines)
    assert not list(tmp_path.iterdir())  # nothing is left of the attempt to write


def test_the_line_of_exp3_names_what_it_sweeps(tmp_path: Path) -> None:
    (pairs,) = checked(tmp_path, ["exp3"], exp3={"sampling": {"max_grid_size": 6}})
    assert "grids 1×1 … 1×6 and 1 of equal crops on" in pairs
    (sizes,) = checked(tmp_path, ["exp3"], exp3={"sampling": {"sizes": "336x336 640x480"}})
    assert "2 image sizes on" in sizes


def test_everything_is_refused_at_once(tmp_path: Path) -> None:
    told = refusals(
        tmp_path,
        exp1={"sampling": {"num_samples": 500}},
        exp3={"sampling": {"max_grid_size": 20}},
        exp4={"sampling": {"num_samples": 2, "max_new_tokens_list": [8, 2**31], "tiling": "9x9"}},
    )
    assert [line.split(" ")[0] for line in told] == [
        "num_samples=500",
        "max_grid_size=20",
        "exp4.sampling.max_new_tokens_list:",
        "tiling",
    ]


def test_model_and_dataset_are_asked_for_together(tmp_path: Path) -> None:
    (told,) = refusals(tmp_path, model={"name": None}, dataset={"source": None})
    assert "model.name" in told
    assert "dataset.source" in told


def test_both_earlier_results_are_asked_for(tmp_path: Path) -> None:
    earlier = {name: EarlierResult(root=str(tmp_path), made_by=name) for name in ("exp3", "exp4")}
    with pytest.raises(UserError) as error:
        check(Options(), tmp_path, experiments=[], earlier=earlier)
    first, second = str(error.value).splitlines()
    assert "kedro run --pipeline exp3" in first
    assert "kedro run --pipeline exp4" in second


def test_questions_without_answers_have_no_answers_length(tmp_path: Path) -> None:
    table = pd.DataFrame({"image": ["a.png"], "question": ["What is it?"]})
    folder = tmp_path / "photos"
    folder.mkdir()
    table.to_csv(folder / "questions.csv", index=False)
    (folder / "a.png").write_bytes(b"is not opened here")
    given = {
        "dataset": {"source": "folder", "path": str(folder)},
        "exp1": {"sampling": {"num_samples": 1}},
    }
    (told,) = refusals(tmp_path / "out", experiments=["exp1"], **given)
    assert "have no answer, which output_length=answer needs" in told
    without = {**given, "measurement": {"output_length": "natural"}}
    assert len(checked(tmp_path / "out", ["exp1"], **without)) == 1


def test_lengths_that_do_not_fit_can_be_dropped(tmp_path: Path) -> None:
    sampling = {"num_samples": 2, "max_new_tokens_list": [8, 2**31], "tiling": "2x3"}
    (told,) = refusals(tmp_path, experiments=["exp4"], exp4={"sampling": sampling})
    assert f"{2**31} new tokens" in told
    dropping = {"sampling": {**sampling, "on_too_long": "drop"}}
    (line,) = checked(tmp_path, ["exp4"], exp4=dropping)
    assert "2 images × 1 lengths" in line
    none = {"sampling": {**dropping["sampling"], "max_new_tokens_list": [2**31]}}
    (told,) = refusals(tmp_path, experiments=["exp4"], exp4=none)
    assert f"none of the output lengths ({2**31}) fits" in told


def test_a_table_made_before_is_checked_as_it_is(tmp_path: Path) -> None:
    table = sweep_language_requests(open_source(size=4), Sampling(3, tiles=Tiles()), [8, 2**31])
    table.to_parquet(tmp_path / "requests.parquet")
    given = {"sampling": {**SIZES["exp4"]["sampling"], "requests": f"{tmp_path}/requests.parquet"}}
    (told,) = refusals(tmp_path, experiments=["exp4"], exp4=given)
    assert f"{2**31} new tokens" in told
    given["sampling"]["on_too_long"] = "drop"
    (line,) = checked(tmp_path, ["exp4"], exp4=given)
    assert "3 images × 1 lengths" in line


@pytest.mark.parametrize(
    ("name", "output"), [("vision_results", "exp3.result"), ("language_results", "exp4.result")]
)
def test_an_earlier_result_and_a_new_one_contradict_each_other(name: str, output: str) -> None:
    options = Options.from_parameters({"exp5": {name: "earlier.json"}})
    refuse_contradictions(options, {"exp5.result"})
    with pytest.raises(MeasurementError, match=rf"exp5\.{name} names an earlier result"):
        refuse_contradictions(options, {output, "exp5.result"})


def test_one_length_for_all_questions_must_fit_too(tmp_path: Path) -> None:
    asked = {"measurement": {"output_length": str(2**31)}}
    (told,) = refusals(
        tmp_path, experiments=["exp1"], exp1={"sampling": {"num_samples": 2}, **asked}
    )
    assert told.startswith(f"exp1.measurement.output_length: {2**31} new tokens need up to")


def test_nvtx_ranges_without_a_gpu_are_refused(tmp_path: Path) -> None:
    lines = refusals(tmp_path, measurement={"nvtx": True})
    assert lines == [
        "found measurement.nvtx=true on cpu; NVTX ranges need a CUDA device: set "
        "model.device=cuda, or measurement.nvtx=false"
    ]
