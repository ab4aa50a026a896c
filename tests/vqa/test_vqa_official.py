"""The official files: what is read, and one sentence for each fault."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_latency.errors import DataError
from vlm_latency.vqa import QUESTION_COLUMNS, image_bytes, open_source


def read(root: Path) -> Any:
    return open_source(source="official", path=root)


def test_index(official: Any) -> None:
    source = read(official.root)
    table = source.table
    assert {name: str(dtype) for name, dtype in table.dtypes.items()} == QUESTION_COLUMNS
    assert len(table) == 10
    row = table.iloc[3]
    assert (row.question_id, row.image_id, row.question) == ("2001", "2", "Is it 1?")
    assert (row.question_type, row.answer_type, row.answer) == ("is it", "yes/no", "yes")
    assert json.loads(row.answers) == ["yes"] * 9 + ["no"]
    assert row.image_path == "val2014/COCO_val2014_000000000002.jpg"
    assert image_bytes(row, source.root) == official.image(2).read_bytes()
    assert not source.synthetic
    described = source.describe()
    assert (described["questions"], described["images"]) == (10, 5)
    assert json.loads(json.dumps(described)) == described


def test_the_hash_is_of_the_content(official: Any) -> None:
    before = read(official.root).describe()["sha256"]
    official.questions_path.write_text(json.dumps(official.questions, indent=1))
    assert read(official.root).describe()["sha256"] == before
    official.questions["questions"][0]["question"] += "?"
    official.write()
    assert read(official.root).describe()["sha256"] != before


def test_annotations_are_optional_and_may_be_of_more_questions(official: Any) -> None:
    del official.questions["questions"][4:]
    official.write()
    assert read(official.root).table["answer"].eq("yes").sum() == 4
    official.annotations_path.unlink()
    assert read(official.root).table["answer"].isna().all()


def test_train_split(official: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no v2_OpenEnded_mscoco_train2014_questions\.json"):
        open_source(source="official", path=official.root, split="train")
    train = type(official)(tmp_path / "train", "train2014")
    source = open_source(source="official", path=train.root, split="train")
    assert source.table["image_path"].iloc[0] == "train2014/COCO_train2014_000000000001.jpg"
    assert image_bytes(source.table.iloc[0], source.root) == train.image(1).read_bytes()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"source": "official"}, "needs dataset.path"),
        ({"source": "official", "path": "/no/such"}, "is not a folder; expected v2_OpenEnded"),
        ({"source": "ofical"}, "expected official, hub, folder or synthetic"),
        ({"split": "test"}, "expected validation"),
        ({"path": "/data/vqa_v2"}, "dataset.path=/data/vqa_v2 is not read by .*=synthetic"),
        ({"source": "hub", "path": "/data/hub"}, "dataset.hub_id for a folder of parquet"),
    ],
)
def test_wrong_options(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_source(**kwargs)


def test_layout_faults(official: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"has no v2_OpenEnded_mscoco_val2014_questions.json"):
        read(tmp_path / "empty")
    for image in official.images.iterdir():
        image.unlink()
    with pytest.raises(DataError, match=r"no images in val2014/; expected .*COCO_val2014_\*\.jpg"):
        read(official.root)
    official.images.rmdir()
    with pytest.raises(DataError, match="no images in val2014/"):
        read(official.root)


def test_malformed_json_is_told_with_its_line(official: Any) -> None:
    official.questions_path.write_text('{\n "questions": [\n  {"image_id": 1,}\n]}')
    with pytest.raises(DataError, match=r"questions.json is not valid JSON: line 3, column"):
        read(official.root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "line 1"),
        (b'{"questions": [', "line 1"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"[]", 'a list "questions"'),
        (b'{"questions": {}}', 'a list "questions"'),
        (b'{"questions": []}', "holds no questions"),
        (b'{"questions": [3]}', r"questions\[0\] is not an object"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"questions": [' + b"9" * 5000 + b"]}", "not valid JSON"),
    ],
)
def test_malformed_questions(official: Any, content: bytes, message: str) -> None:
    official.questions_path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(official.root)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("question_id", None, r"\"question_id\" of questions\[2\] is 'None'"),
        ("question_id", "7", "expected an integer"),
        ("question_id", True, "expected an integer"),
        ("question_id", 2**63, "expected an integer"),
        ("image_id", -1, "expected an integer"),
        ("image_id", "../../x", "expected an integer"),
        ("question", 5, "expected a text"),
        ("question", "\ud800", "lone surrogate"),
    ],
)
def test_wrong_values(official: Any, key: str, value: Any, message: str) -> None:
    official.questions["questions"][2][key] = value
    official.write()
    with pytest.raises(DataError, match=message):
        read(official.root)


@pytest.mark.parametrize("key", ["question_id", "image_id", "question"])
def test_missing_question_keys(official: Any, key: str) -> None:
    del official.questions["questions"][2][key]
    official.write()
    with pytest.raises(DataError, match=rf'questions.json: questions\[2\] has no "{key}"'):
        read(official.root)


@pytest.mark.parametrize(
    "key", ["question_id", "question_type", "answer_type", "multiple_choice_answer", "answers"]
)
def test_missing_annotation_keys(official: Any, key: str) -> None:
    del official.annotations["annotations"][2][key]
    official.write()
    with pytest.raises(DataError, match=rf'annotations.json: annotations\[2\] has no "{key}"'):
        read(official.root)


@pytest.mark.parametrize("answers", [[], None, ["yes", 3], [{"answer": 3, "answer_id": 1}], "yes"])
def test_wrong_answers(official: Any, answers: Any) -> None:
    official.annotations["annotations"][2]["answers"] = answers
    official.write()
    with pytest.raises(DataError, match=r'"answers" of annotations\[2\]'):
        read(official.root)


def test_duplicate_and_missing_ids(official: Any) -> None:
    questions, annotations = official.questions["questions"], official.annotations["annotations"]
    questions.append(copy.deepcopy(questions[0]))
    official.write()
    with pytest.raises(DataError, match="question_id 1000 comes twice"):
        read(official.root)
    questions.pop()
    annotations.append(copy.deepcopy(annotations[0]))
    official.write()
    with pytest.raises(DataError, match=r"annotations.json: question_id 1000 comes twice"):
        read(official.root)
    del annotations[6:]
    official.write()
    with pytest.raises(DataError, match=r"4 of 10 questions have no annotation.*4000"):
        read(official.root)


def test_unreadable_file(official: Any) -> None:
    official.annotations_path.unlink()
    official.annotations_path.mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        read(official.root)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(
            st.sampled_from(["answer", "answer_id", "answers", "question_id", "x"]),
            children,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@st.composite
def faulty_documents(draw: st.DrawFn) -> tuple[Any, Any]:
    """The two documents with a few values, anywhere in them, replaced or removed."""
    question = {"image_id": 1, "question": "Is it?", "question_id": 1000}
    answers = [{"answer": "yes", "answer_confidence": "yes", "answer_id": 1}]
    annotation = {
        "question_type": "is it",
        "multiple_choice_answer": "yes",
        "answers": answers,
        "image_id": 1,
        "answer_type": "yes/no",
        "question_id": 1000,
    }
    pair: list[Any] = copy.deepcopy([{"questions": [question]}, {"annotations": [annotation]}])
    for _ in range(draw(st.integers(1, 3))):
        place: Any = pair
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            deeper = isinstance(place[key], dict | list) and draw(st.integers(0, 3))
            if not deeper:
                if draw(st.booleans()) or place is pair:
                    place[key] = draw(JSON)
                else:
                    del place[key]
                break
            place = place[key]
    return pair[0], pair[1]


def _open_or_refuse(questions: bytes, annotations: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "val2014").mkdir()
        (root / "val2014" / "a.jpg").touch()
        (root / "v2_OpenEnded_mscoco_val2014_questions.json").write_bytes(questions)
        (root / "v2_mscoco_val2014_annotations.json").write_bytes(annotations)
        try:
            assert len(read(root).table) >= 1
        except DataError as error:
            assert str(error).strip()


@settings(max_examples=300, deadline=None)
@given(faulty_documents())
def test_fuzzed_values_give_a_table_or_a_data_error(pair: tuple[Any, Any]) -> None:
    _open_or_refuse(json.dumps(pair[0]).encode(), json.dumps(pair[1]).encode())


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_fuzzed_bytes_give_a_table_or_a_data_error(data: st.DataObject) -> None:
    contents = [
        bytearray(b'{"questions": [{"image_id": 1, "question": "Is it?", "question_id": 7}]}'),
        bytearray(
            b'{"annotations": [{"question_id": 7, "question_type": "", "answer_type": "", '
            b'"multiple_choice_answer": "a", "answers": [{"answer": "a", "answer_id": 1}]}]}'
        ),
    ]
    for content in contents:
        for _ in range(data.draw(st.integers(0, 3))):
            at = data.draw(st.integers(0, len(content) - 1))
            length = data.draw(st.integers(0, 3))
            content[at : at + length] = data.draw(st.binary(max_size=3))
            if not content:
                break
    _open_or_refuse(bytes(contents[0]), bytes(contents[1]))
