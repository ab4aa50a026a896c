"""Results are read, the seed study's own files included, and what is none is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from vlm_latency.errors import DataError
from vlm_latency.results import (
    FILES,
    entry_table,
    questions_of,
    read_earlier,
    read_json,
    read_result,
    read_run,
)


def write(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", "not JSON: .* in line 1, column 2"),
        ('{"a": 1,\n b}', "not JSON: .* in line 2"),
        ("3", "expected an object with a list 'results'"),
        ({"results": 3}, "expected an object with a list 'results'"),
        ({"results": []}, "has no entries in 'results'"),
        ({"results": [1, 2]}, "has no entries in 'results'"),
    ],
)
def test_what_is_no_result_is_refused(data: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_result(write(tmp_path / "result.json", data))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file"):
        read_json(tmp_path / "none.json")
    with pytest.raises(DataError, match="cannot read"):
        read_json(tmp_path)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot read"):
        read_json(tmp_path / "bytes.json")


def test_half_a_character_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(r'["a\ud83d\ude00", "b\ud800", "\udc00c", "\\ud800"]')
    assert read_json(path) == ["a😀", "b?", "?c", r"\ud800"]


def test_a_bare_list_is_a_result_too(tmp_path: Path) -> None:
    path = write(tmp_path / "result.json", [{"T_total": 1.0}])
    assert read_result(path)["results"] == [{"T_total": 1.0}]


def test_the_seeds_names_become_ours() -> None:
    result = {"results": [{"T_vision": 1.0, "T_data_processing": 2.0, "example_id": 7}]}
    table = entry_table(result, "exp1")
    assert table.loc[0, ["T_vision_total", "T_preprocess", "question_id"]].tolist() == [1, 2, 7]
    assert table["request_id"].tolist() == ["exp1-7"]


def test_names_of_ours_are_never_overwritten() -> None:
    result = {"results": [{"T_vision": 1.0, "T_vision_total": 3.0}]}
    assert entry_table(result, "exp1")["T_vision_total"].tolist() == [3.0]


def test_patches_are_told_from_tokens() -> None:
    crops = [{"num_crops": k, "num_vision_tokens": 576 * k} for k in (2, 3)]
    table = entry_table({"results": crops}, "exp3")
    assert "num_vision_tokens" not in table
    assert table["num_vision_patches"].tolist() == [1152, 1728]
    tokens = [*crops, {"num_crops": 4, "num_vision_tokens": 480}]
    assert "num_vision_patches" not in entry_table({"results": tokens}, "exp3")


@pytest.mark.parametrize("value", ["fast", [1, 2], {"ms": 3}, -5])
def test_what_should_be_a_number_is_one(value: Any) -> None:
    result = {"results": [{"T_total": "1.5"}, {"T_total": value}]}
    with pytest.raises(DataError) as error:
        entry_table(result, "exp3")
    told = f"the result of exp3 has an entry with T_total {str(value)!r}; expected a number of 0"
    assert str(error.value).startswith(told)


def test_what_was_not_measured_is_no_number() -> None:
    result = {"results": [{"T_total": "1.5", "T_projector": None, "num_crops": 2}] * 2}
    table = entry_table(result, "exp3")
    assert table["T_total"].tolist() == [1.5, 1.5]
    assert table["T_projector"].isna().all()
    assert table["num_crops"].tolist() == [2, 2]


@pytest.mark.parametrize(
    ("entry", "experiment", "name"),
    [
        ({"grid": 3}, "exp3", "exp3-3"),
        ({"grid": "1×3"}, "exp3", "exp3-1x3"),
        ({"query_id": 4, "max_new_tokens": 16}, "exp4", "exp4-4-n16"),
        ({"example_id": 4}, "exp2", "exp2-4"),
        ({"T_total": 1.0}, "exp1", "exp1-entry0"),
    ],
)
def test_the_seeds_entries_are_named_as_our_requests(
    entry: dict[str, Any], experiment: str, name: str
) -> None:
    assert entry_table({"results": [entry]}, experiment)["request_id"].tolist() == [name]


def test_a_folder_is_read_by_its_records_where_it_has_them(tmp_path: Path) -> None:
    entry = {"request_id": "exp1-1", "T_total": 1.5}
    for name in ("exp1", "exp2"):
        write(tmp_path / name / f"{FILES[name]}.json", {"results": [entry]})
    records = pd.DataFrame(
        {
            "request_id": ["exp1-1"] * 3,
            "T_total": [1.0, 2.0, None],
            "status": ["ok"] * 2 + ["failed"],
        }
    )
    records.to_parquet(tmp_path / "exp1" / "exp1_records.parquet")
    run = read_run(tmp_path)
    assert run.name == tmp_path.name
    assert run.tables["exp1"]["T_total"].tolist() == [1.0, 2.0]  # failed runs are no numbers
    assert run.tables["exp2"]["T_total"].tolist() == [1.5]
    assert set(run.results) == {"exp1", "exp2"}


def test_a_folder_without_results(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no results in .*; expected files like exp1/"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"experiment": "exp4", "results": [{"T_total": 1}]}, "is a result of exp4; expected one of exp3"),
        ({"experiment": "exp1", "results": [{"T_total": 1}]}, "is a result of exp1; expected one of exp3"),
        ({"results": [{"query_id": 1, "max_new_tokens": 8}]}, "is a result of exp4; expected one of exp3"),
        ({"results": [{"example_id": 1}]}, "is a result of exp1 or exp2"),
    ],
)  # fmt: skip
def test_a_result_of_another_experiment_is_refused(
    tmp_path: Path, content: dict[str, Any], said: str
) -> None:
    path = tmp_path / "some.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=said):
        read_earlier(path, "exp3")


def test_a_folder_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder; expected the file of a result of exp3"):
        read_earlier(tmp_path, "exp3")


def test_the_seeds_own_result_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_text(json.dumps({"results": [{"grid": "1×2", "T_total": 1.0}]}))
    assert read_earlier(path, "exp3")["results"][0]["grid"] == "1×2"


def test_a_dataset_is_one_by_whichever_path_it_is_reached(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data")

    def asked(path: Path, **more: str) -> str:
        about = {"source": "folder", "split": "validation", "path": str(path), **more}
        return questions_of({"dataset": about})

    assert asked(tmp_path / "data") == asked(tmp_path / "link" / ".." / "data")
    assert asked(tmp_path / "data") == asked(tmp_path / "link")
    assert asked(tmp_path / "data") != asked(tmp_path / "data", questions_file="other.jsonl")
