"""Hub datasets, read from local folders of parquet files through the same code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlm_latency.errors import DataError
from vlm_latency.molmo.tiling import Tiles
from vlm_latency.vqa import (
    QuestionSource,
    Sampling,
    draw_requests,
    image_bytes,
    open_source,
)
from vlm_latency.vqa.images import noise_recipe

IMAGES = [image_bytes({"image_recipe": noise_recipe(i, 60 + i, 40)}, None) for i in range(5)]
TEN = [{"answer": "no", "answer_id": 0}] + [{"answer": "yes", "answer_id": i} for i in range(1, 10)]


def opened(source: QuestionSource, row: pd.Series) -> bytes:
    """The encoded image of one row of the table."""
    return image_bytes(source.with_images(row.to_frame().T).iloc[0], source.root)


def columns(**other: Any) -> dict[str, list[Any]]:
    """Ten questions on five images as lmms-lab/VQAv2 has them."""
    return {
        "question": [f"Is it {i}?" for i in range(10)],
        "question_id": [i // 2 * 1000 + i % 2 for i in range(10)],
        "image_id": [i // 2 for i in range(10)],
        "question_type": ["is it"] * 10,
        "answer_type": ["yes/no"] * 10,
        "multiple_choice_answer": ["yes"] * 10,
        "answers": [TEN] * 10,
        "image": [{"bytes": IMAGES[i // 2], "path": f"{i // 2}.jpg"} for i in range(10)],
    } | other


def write(folder: Path, data: dict[str, list[Any]], split: str = "validation") -> Path:
    """Two files, of six and four rows, in row groups of two and three."""
    table = pa.table(data)
    folder.mkdir(exist_ok=True)
    pq.write_table(table[:6], folder / f"{split}-00000-of-00002.parquet", row_group_size=2)
    pq.write_table(table[6:], folder / f"{split}-00001-of-00002.parquet", row_group_size=3)
    return folder


def read(folder: Path, **kwargs: Any) -> QuestionSource:
    cache = folder.parent / "cache"
    return open_source(source="hub", hub_id=str(folder), image_cache=cache, **kwargs)


def test_index_and_images(tmp_path: Path) -> None:
    source = read(write(tmp_path / "data", columns()))
    assert source.table["question_id"].tolist() == [str(n) for n in columns()["question_id"]]
    assert source.table["answer"].tolist() == ["yes"] * 10
    assert source.table["answers"].iloc[0] == '["no"' + ', "yes"' * 9 + "]"
    assert source.describe()["images"] == 5
    assert not (tmp_path / "cache").exists()  # nothing of an image is read for the index

    requests = draw_requests(source, Sampling(3, one_question_per_image=True), "answer", "exp1")
    assert requests["image_id"].nunique() == 3
    for _, row in requests.iterrows():
        assert image_bytes(row, source.root) == IMAGES[int(row.image_id)]
        assert row.image_width == 60 + int(row.image_id)
        assert len(row.image_sha256) == 64
    assert sum(path.is_file() for path in (tmp_path / "cache").rglob("*")) == 3
    for position in range(10):
        assert opened(source, source.table.iloc[position]) == IMAGES[position // 2]


def test_kept_images_are_not_read_again_but_belong_to_their_version(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", columns())
    source = read(folder)
    paths = source.with_images(source.table)["image_path"]
    kept = tmp_path / "cache" / paths.iloc[0]
    kept.write_bytes(b"kept")
    assert opened(source, source.table.iloc[0]) == b"kept"
    changed = columns(image=[{"bytes": IMAGES[4], "path": None}] * 10)
    again = read(write(folder, changed))
    assert opened(again, again.table.iloc[0]) == IMAGES[4]


def test_small_datasets_with_other_columns(tmp_path: Path) -> None:
    data = {"frage": ["A?", "B?"] * 5, "bild": [IMAGES[0]] * 10, "antwort": [["x", "y", "y"]] * 10}
    names = {"question": "frage", "image": "bild", "answers": "antwort", "answer_type": None}
    source = read(write(tmp_path / "data", data), columns=names)
    assert source.table["question_id"].tolist() == [str(n) for n in range(1, 11)]
    assert source.table["image_id"].tolist() == [str(n) for n in range(1, 11)]
    assert source.table["answer"].tolist() == ["y"] * 10
    assert opened(source, source.table.iloc[7]) == IMAGES[0]


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ("yes", '["yes"]'),
        (["yes", "no"], '["yes", "no"]'),
        ({"answer": ["yes", "no"], "answer_id": [1, 2]}, '["yes", "no"]'),
        (None, None),
        ([], None),
    ],
)
def test_shapes_of_answers(tmp_path: Path, answers: Any, expected: str | None) -> None:
    data = columns(answers=[answers] * 10)
    if answers in (None, []):
        data["answers"] = pa.array(data["answers"], pa.list_(pa.string()))
    table = read(write(tmp_path / "data", data)).table
    assert [None if pd.isna(each) else each for each in table["answers"]] == [expected] * 10


def test_a_row_without_image_fails_alone(tmp_path: Path) -> None:
    images = columns()["image"][:8] + [{"bytes": None, "path": "gone.jpg"}] * 2
    source = read(write(tmp_path / "data", columns(image=images)))
    requests = draw_requests(source, Sampling(order="first"), "natural", "exp1")
    assert requests["image_sha256"].isna().tolist() == [False] * 8 + [True] * 2
    with pytest.raises(DataError, match="missing"):
        image_bytes(requests.iloc[9], source.root)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question_id": [0.5] * 10}, "question_id' cannot serve as dataset.columns.question_id"),
        ({"question_id": [3] * 10}, "question_id 3 comes twice"),
        ({"image_id": [None] * 10}, "cannot serve as dataset.columns.image_id"),
        ({"question": [None] * 10}, "cannot serve as dataset.columns.question"),
        ({"answers": [[3]] * 10}, "cannot serve as dataset.columns.answers"),
        ({"answers": [{"text": "a"}] * 10}, "cannot serve as dataset.columns.answers"),
    ],
)
def test_wrong_columns(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / "data", columns(**changes)))


def test_missing_columns_and_splits(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", columns())
    with pytest.raises(DataError, match=r"no column 'photo' \(dataset.columns.image\), only quest"):
        read(folder, columns={"image": "photo"})
    with pytest.raises(DataError, match="no split 'train', only validation"):
        read(folder, split="train")
    with pytest.raises(DataError, match="stratify_by_tiling"):
        draw_requests(
            read(folder), Sampling(2, stratify_by_tiling=True, tiles=Tiles()), "none", "exp1"
        )
    with pytest.raises(DataError, match="image_cache"):
        open_source(source="hub", hub_id=str(folder))


def test_files_that_differ(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", columns())
    data = columns(question_id=list(range(90, 100)))
    del data["answer_type"]
    pq.write_table(pa.table(data), folder / "validation-00001-of-00002.parquet")
    with pytest.raises(DataError, match="same columns"):
        read(folder)
    (folder / "validation-00001-of-00002.parquet").write_bytes(b"PAR1 not at all PAR1")
    with pytest.raises(DataError, match=r"00001-of-00002.parquet cannot be read"):
        read(folder)


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", columns())
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"image .* cannot be kept: Not a directory"):
        draw_requests(read(folder), Sampling(2), "none", "exp1")


def test_refused_datasets(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.mkdir()
    (script / "script.py").write_text("raise SystemExit('was run')")
    with pytest.raises(DataError, match=r"is a script, and datasets ≥ 4 no longer runs scripts"):
        read(script)
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "validation.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="stored as csv; expected parquet"):
        read(tmp_path / "csv")
    with pytest.raises(DataError, match="not in the local cache"):
        read(tmp_path / "nowhere")
    with pytest.raises(DataError, match="not in the local cache"):  # the tests are offline
        open_source(source="hub", image_cache=tmp_path)


def test_names_of_images_never_lead_out_of_the_cache(tmp_path: Path) -> None:
    names = ["01", "1", "../../up", "a/b", "a b", "..", "1_2", "12_", "é", "x" * 150]
    source = read(write(tmp_path / "data", columns(question_id=names, image_id=names)))
    drawn = draw_requests(source, Sampling(order="first"), "none", "exp1")
    assert drawn["image_id"].tolist() == names == drawn["question_id"].tolist()
    assert drawn["image_path"].nunique() == 10
    root = (tmp_path / "cache").resolve()
    for path in drawn["image_path"]:
        assert root in (root / path).resolve().parents
