"""A user's own folder of images with a CSV or JSONL of questions."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_latency.errors import DataError
from vlm_latency.vqa import QuestionSource, Sampling, draw_requests, open_source
from vlm_latency.vqa.images import image_bytes, noise_recipe


def read(root: Path, **kwargs: Any) -> QuestionSource:
    return open_source(name="mine", source="folder", path=root, **kwargs)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for name, width in (("a.jpg", 60), ("photos/b.jpg", 70)):
        data = image_bytes({"image_recipe": noise_recipe(1, width, 40)}, None)
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_csv(root: Path) -> None:
    (root / "questions.csv").write_text(
        "image,question,answer,extra\n"
        'a.jpg,"What, in one word?",red,1\n'
        "photos/b.jpg,Two lines?,,\n"
        "a.jpg,Why?,because,\n"
    )
    source = read(root)
    table = source.table
    assert table["question_id"].tolist() == ["1", "2", "3"]
    assert table["image_id"].tolist() == ["1", "2", "1"]
    assert table["question"].tolist() == ["What, in one word?", "Two lines?", "Why?"]
    assert table["answer"].fillna("-").tolist() == ["red", "-", "because"]
    assert table["answers"].fillna("-").tolist() == ['["red"]', "-", '["because"]']
    requests = draw_requests(source, Sampling(order="first"), "natural", "exp1")
    assert requests["image_width"].tolist() == [60, 70, 60]
    with pytest.raises(DataError, match="1 of 3 drawn questions have no answer"):
        draw_requests(source, Sampling(), "answer", "exp1")


def test_jsonl_and_its_optional_columns(root: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"image": "a.jpg", "question": "Ça va?", "question_id": 70, "answers": ["oui", "no", "no"]},
        {"image": "a.jpg", "question": "And?", "question_id": "71", "answers": '["x", "y"]'},
        {"image": "a.jpg", "question": "?", "question_id": 72, "answer": "z", "answers": None},
    ]
    text = "\n\n".join(json.dumps(row) for row in rows)
    (root / "q.jsonl").write_text(text, encoding="utf-8-sig")
    table = read(root).table
    assert table["question_id"].tolist() == ["70", "71", "72"]
    assert table["answer"].tolist() == ["no", "x", "z"]
    assert [json.loads(answers) for answers in table["answers"]] == [
        ["oui", "no", "no"],
        ["x", "y"],
        ["z"],
    ]


def test_which_table(root: Path) -> None:
    with pytest.raises(DataError, match=r"found none\); expected images and a .csv or .jsonl"):
        read(root)
    for name in ("a.csv", "b.csv"):
        (root / name).write_text("image,question\na.jpg,Why?\n")
    with pytest.raises(DataError, match=r"found a\.csv, b\.csv"):
        read(root)
    assert read(root, questions_file="b.csv").describe()["questions_file"] == "b.csv"
    with pytest.raises(DataError, match=r"questions_file .* is not a .csv or .jsonl"):
        read(root, questions_file="c.csv")
    with pytest.raises(DataError, match="is not a folder"):
        read(root / "a.jpg")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.csv", "", "holds no questions"),
        ("q.csv", "image,question\n", "holds no questions"),
        ("q.csv", "image,text\na.jpg,Why?\n", 'line 2: no value of "question"'),
        ("q.csv", "image,question\na.jpg,Why, now?\n", "line 2: the number of cells"),
        ("q.csv", "image,question\na.jpg\n", "line 2: the number of cells"),
        ("q.csv", 'image,question\na.jpg,"Why\n', "not valid CSV"),
        ("q.csv", "image,question\n../../x.jpg,Why?\n", r"line 2: image path '../../x.jpg' leads"),
        ("q.csv", "image,question\n/etc/passwd,Why?\n", "line 2: .* leads out"),
        (
            "q.jsonl",
            '{"image": "a.jpg", "question": "Why?", "question_id": 1.5}',
            "line 1: the id '1.5' is no name",
        ),
        ("q.csv", "image,question,question_id\na.jpg,A?,5\na.jpg,B?,5\n", "5 comes twice"),
        ("q.csv", "image,question,answers\na.jpg,A?,[1\n", 'line 2: "answers" is not a JSON'),
        ("q.jsonl", '{"image": "a.jpg", "question": "A?"}\n{"image"\n', "line 2: not valid JSON"),
        ("q.jsonl", "[]\n", "line 1: not a JSON object"),
        ("q.jsonl", '{"image": 3, "question": "A?"}\n', "line 1: \"image\" is '3'"),
        ("q.jsonl", '{"image": "a.jpg", "question": "\\ud800"}\n', "lone surrogate"),
        ("q.jsonl", '{"image": "a", "question": "?", "answers": [1]}\n', 'line 1: "answers" is'),
        ("q.jsonl", "[" * 100_000, "line 1: not valid JSON"),
        ("q.jsonl", b"\xff\xfe", "not UTF-8"),
    ],
)
def test_faults(root: Path, name: str, content: str | bytes, message: str) -> None:
    data = content if isinstance(content, bytes) else content.encode()
    (root / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        read(root)


def test_unreadable_table(root: Path) -> None:
    (root / "q.csv").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        read(root)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["q.csv", "q.jsonl"]), st.data())
def test_fuzzed_tables_give_a_table_or_a_data_error(name: str, data: st.DataObject) -> None:
    valid = {
        "q.csv": b'image,question,question_id,answers\na.jpg,"Is it, so?",7,"[""a""]"\n',
        "q.jsonl": b'{"image": "a.jpg", "question": "?", "question_id": 7, "answers": ["a"]}\n',
    }
    content = bytearray(valid[name])
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(content)))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(content)
        try:
            assert len(read(Path(folder)).table) >= 1
        except DataError as error:
            assert str(error).strip()


def test_identifiers_are_names_and_answers_are_texts(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text(
        "image,question,question_id,answer\n"
        "a.jpg,one?,01827492,[EXIT]\n"
        'a.jpg,two?,1827492,"[""a"", 1]"\n'
        "a.jpg,three?,1_23,null\n"
        "a.jpg,four?,12_3,{question}\n"
    )
    table = open_source("mine", "folder", tmp_path).table
    assert table["question_id"].tolist() == ["01827492", "1827492", "1_23", "12_3"]
    answers = ["[EXIT]", '["a", 1]', "null", "{question}"]
    assert table["answer"].tolist() == answers
    assert [json.loads(each) for each in table["answers"]] == [[each] for each in answers]
    drawn = draw_requests(
        open_source("mine", "folder", tmp_path), Sampling(order="first"), "answer", "exp1"
    )
    assert drawn["request_id"].tolist() == [f"exp1-{name}" for name in table["question_id"]]
