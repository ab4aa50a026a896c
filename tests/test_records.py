"""Requests are known again by what they ask; tables have exactly the record's columns."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from vlm_latency.records import (
    MEASURED_COLUMNS,
    REQUEST_COLUMNS,
    STAGES,
    Column,
    columns_page,
    measured_table,
    typed,
    with_hashes,
)

REQUEST = {
    "request_id": "exp1-1",
    "question": "What is it?",
    "answer": "a cat",
    "image_path": "a.jpg",
    "image_sha256": "00",
    "image_recipe": None,
    "output_length": "answer",
}


def sha(**changed: object) -> str:
    return with_hashes(pd.DataFrame([{**REQUEST, **changed}]))["request_sha256"].iloc[0]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("question", "What is this?"),
        ("answer", "a dog"),
        ("image_path", "b.jpg"),
        ("image_sha256", "01"),
        ("image_recipe", "{}"),
        ("output_length", "none"),
        ("answer", None),
    ],
)
def test_a_request_that_asks_for_something_else_has_another_hash(
    column: str, value: object
) -> None:
    assert sha(**{column: value}) != sha()


def test_its_name_and_place_do_not_matter() -> None:
    assert sha(request_id="exp2-9") == sha(seed=3) == sha()


def test_no_text_and_empty_text_differ_and_so_do_shifted_ones() -> None:
    assert sha(answer="") != sha(answer=None)
    assert sha(question="a", answer="bc") != sha(question="ab", answer="c")


def test_requests_have_exactly_their_columns() -> None:
    table = with_hashes(pd.DataFrame([REQUEST]))
    assert list(table.columns) == list(REQUEST_COLUMNS)
    assert table["image_width"].isna().all()


def test_typing_keeps_what_is_further_and_fills_what_is_missing() -> None:
    table = typed(pd.DataFrame({"own": [1], "run_index": [2.0]}), MEASURED_COLUMNS)
    assert list(table.columns) == [*MEASURED_COLUMNS, "own"]
    assert str(table["run_index"].dtype) == "Int64"
    assert table["T_total"].isna().all()
    assert str(table["T_total"].dtype) == "float64"


def test_runs_come_in_the_order_they_were_measured() -> None:
    rows = [{"request_id": "b", "order_index": 1}, {"request_id": "a", "order_index": 0}]
    assert measured_table(rows)["request_id"].tolist() == ["a", "b"]


def test_the_page_of_columns_is_current() -> None:
    page = (Path(__file__).parents[1] / "docs" / "columns.md").read_text(encoding="utf-8")
    assert page == columns_page(), "python -m vlm_latency.records > docs/columns.md"


def test_every_column_is_declared_once_and_explained() -> None:
    declared: dict[str, Column] = {}
    for groups in STAGES.values():
        for columns in groups.values():
            for name, column in columns.items():
                assert column.meaning
                assert declared.setdefault(name, column) is column, f"{name} is declared twice"
    times = [column for column in declared.values() if column.name.startswith("T_")]
    assert {column.unit for column in times} == {"ms"}
