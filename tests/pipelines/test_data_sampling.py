"""Requests are drawn, or read from a table that was made before, on this machine or another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from kedro.io import DatasetError

from vlm_latency.datasets import GivenRequests
from vlm_latency.errors import DataError, UserError
from vlm_latency.models import ModelHandle
from vlm_latency.options import ExperimentOptions, Options
from vlm_latency.pipelines.data_sampling.nodes import draw_requests
from vlm_latency.pipelines.data_sampling.rules import too_long
from vlm_latency.records import REQUEST_COLUMNS
from vlm_latency.vqa import open_source

SOURCE = open_source(size=12)


def options(experiment: str, **sampling: Any) -> ExperimentOptions:
    given = {"model": {"name": "null-model"}, experiment: {"sampling": sampling}}
    return Options.from_parameters(given).experiment(experiment, "random")


def draw(experiment: str, **sampling: Any) -> pd.DataFrame:
    asked = options(experiment, **sampling)
    files = {experiment: asked.sampling.requests}
    given = GivenRequests(experiment=experiment, files=files).load()
    return draw_requests(asked, SOURCE, ModelHandle(asked.model), given)


def test_requests_of_each_experiment() -> None:
    drawn = {
        "exp1": draw("exp1", num_samples=7),
        "exp2": draw("exp2", num_samples=5),
        "exp3": draw("exp3", max_grid_size=3),
        "exp4": draw("exp4", num_samples=2, max_new_tokens_list=[4, 8], tiling="2x3"),
    }
    assert {name: len(table) for name, table in drawn.items()} == {
        "exp1": 7,
        "exp2": 5,
        "exp3": 3,
        "exp4": 4,
    }
    for name, table in drawn.items():
        assert list(table.columns) == list(REQUEST_COLUMNS)
        assert (table["experiment"] == name).all()
        assert table["request_id"].is_unique
        assert table["request_sha256"].notna().all()
    assert set(drawn["exp1"]["output_length"]) == {"answer"}
    assert set(drawn["exp3"]["output_length"]) == {"none"}
    assert sorted(drawn["exp4"]["output_length"]) == ["4", "4", "8", "8"]


@pytest.mark.parametrize(
    ("name", "sampling"),
    [
        ("exp2", {"num_samples": 2}),
        ("exp3", {"max_grid_size": 2}),
        ("exp3", {"sizes": "336x336"}),
        ("exp4", {"num_samples": 1, "max_new_tokens_list": [4]}),
    ],
)
def test_another_experiment_may_have_the_same_sampling(name: str, sampling: dict[str, Any]) -> None:
    asked = options(name, **sampling).model_copy(update={"experiment": "exp9"})
    table = draw_requests(asked, SOURCE, ModelHandle(asked.model))
    assert (table["experiment"] == "exp9").all()
    assert table["request_id"].str.startswith("exp9-").all()


def test_sizes_may_be_given_for_the_vision_sweep() -> None:
    table = draw("exp3", sizes="336x336 640x480")
    assert table["resolution"].tolist() == ["336x336", "640x480"]
    with pytest.raises(UserError, match=r"found '640': expected width x height"):
        draw("exp3", sizes="640")


def test_the_end_of_sequence_may_stop_exp4() -> None:
    asked = {"num_samples": 1, "max_new_tokens_list": [4, 8], "use_eos_token": True}
    assert draw("exp4", **asked)["output_length"].tolist() == ["≤4", "≤8"]


def test_a_length_fits_as_long_as_a_position_is_left() -> None:
    def long(length: int) -> dict[int, int]:
        asked = options("exp4", num_samples=1, max_new_tokens_list=[length], tiling="2x3")
        return too_long(asked, ModelHandle(asked.model), None)

    positions = ModelHandle(options("exp4").model).architecture.max_positions
    (needed,) = long(positions).values()
    prompt = needed - positions
    assert long(positions - prompt) == {}
    assert long(positions - prompt + 1) == {positions - prompt + 1: positions + 1}


def test_exp4_needs_lengths() -> None:
    with pytest.raises(DataError, match="give lengths: '8 16 32'"):
        draw("exp4", num_samples=2, max_new_tokens_list=[])


def test_a_table_made_before_is_measured_as_it_is(
    tmp_path: Path, kedro_run: Callable[..., Any]
) -> None:
    small = draw("exp1", num_samples=2)
    small["image_recipe"] = '{"kind": "noise", "seed": 3, "width": 40, "height": 30}'
    small.to_parquet(tmp_path / "requests.parquet")
    given = {
        "model.name": "null-model",
        "exp1.sampling.requests": str(tmp_path / "requests.parquet"),
    }
    given["exp1.measurement.noise_repeats"] = 0
    made = kedro_run("exp1", tmp_path / "out", given, to_nodes=["exp1.measurement.collect"])
    runs = made["exp1.measurements"].load()
    assert set(runs["request_id"]) == set(small["request_id"])


def spoiled(table: pd.DataFrame, how: str) -> pd.DataFrame:
    if how == "column":
        return table.drop(columns="question")
    if how == "type":
        return table.assign(image_width="wide")
    if how == "experiment":
        return table.assign(experiment=["exp1", "exp2"])
    if how == "rule":
        return table.assign(output_length="long")
    if how == "none":
        return table.assign(experiment=None)
    return table.head(0)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("column", "not a table of requests: no column question"),
        ("type", "not a table of requests: "),
        ("experiment", "holds requests of exp1, exp2; expected exp1"),
        ("none", "holds requests of no experiment; expected exp1"),
        ("rule", "output_length 'long' is not a rule of exp1; expected natural, answer, none"),
        ("empty", "holds requests of none; expected exp1"),
    ],
)
def test_what_is_no_table_of_requests(how: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "requests.parquet"
    spoiled(draw("exp1", num_samples=2), how).to_parquet(path)
    with pytest.raises(DatasetError, match=message):
        draw("exp1", requests=str(path))


def test_requests_of_exp4_say_their_lengths_in_numbers(tmp_path: Path) -> None:
    path = tmp_path / "requests.parquet"
    drawn = draw("exp4", num_samples=1, max_new_tokens_list=[4, 8])
    drawn.assign(output_length="natural").to_parquet(path)
    with pytest.raises(DatasetError, match="'natural' is not a rule of exp4; expected a number"):
        draw("exp4", requests=str(path))


def test_a_file_that_is_no_parquet(tmp_path: Path) -> None:
    path = tmp_path / "requests.parquet"
    with pytest.raises(DatasetError, match="no file"):
        draw("exp1", requests=str(path))
    path.write_text("request_id\n1\n")
    with pytest.raises(DatasetError, match="is not a parquet table"):
        draw("exp1", requests=str(path))
