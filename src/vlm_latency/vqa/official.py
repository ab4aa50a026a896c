"""VQA v2 in its own layout: two JSON files and a folder of COCO images per split."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm_latency.errors import DataError
from vlm_latency.vqa.source import QuestionSource, question_table

_SUBTYPES = {"validation": "val2014", "train": "train2014"}


def open_official(name: str, split: str, root: Path) -> QuestionSource:
    """Index one split of VQA v2 (214,354 questions of validation) without opening an image.

    ``root`` holds ``v2_OpenEnded_mscoco_val2014_questions.json``,
    ``v2_mscoco_val2014_annotations.json`` (may be absent: answers are unknown then) and
    ``val2014/COCO_val2014_000000000042.jpg``; likewise ``train2014``.

    Raises
    ------
    DataError
        When the layout is another, a file is malformed, or a question has no annotation.
    """
    subtype = _SUBTYPES[split]
    questions_path = root / f"v2_OpenEnded_mscoco_{subtype}_questions.json"
    annotations_path = root / f"v2_mscoco_{subtype}_annotations.json"
    images = root / subtype
    if not root.is_dir():
        raise DataError(f"dataset.path {root} is not a folder; {_layout(subtype)}")
    if not questions_path.is_file():
        raise DataError(f"{root} has no {questions_path.name}; {_layout(subtype)}")
    if not images.is_dir() or next(images.iterdir(), None) is None:
        raise DataError(f"{root} has no images in {subtype}/; {_layout(subtype)}")

    columns = _questions(questions_path, subtype)
    if annotations_path.exists():
        columns |= _annotations(annotations_path, columns["question_id"])
    table = question_table(columns, questions_path)
    return QuestionSource(name, "official", split, table, root, details={"path": str(root)})


def _layout(subtype: str) -> str:
    return (
        f"expected v2_OpenEnded_mscoco_{subtype}_questions.json, {subtype}/COCO_{subtype}_*.jpg "
        f"and, for answers, v2_mscoco_{subtype}_annotations.json"
    )


def _questions(path: Path, subtype: str) -> dict[str, list[Any]]:
    records = _records(path, "questions")
    image_ids = [_integer(path, "questions", i, r, "image_id") for i, r in enumerate(records)]
    return {
        "question_id": [
            _integer(path, "questions", i, r, "question_id") for i, r in enumerate(records)
        ],
        "image_id": image_ids,
        "question": [_string(path, "questions", i, r, "question") for i, r in enumerate(records)],
        "image_path": [f"{subtype}/COCO_{subtype}_{image_id:012d}.jpg" for image_id in image_ids],
    }


def _annotations(path: Path, question_ids: list[int]) -> dict[str, list[Any]]:
    """The annotations' columns in the order of the questions; those of other questions are left."""
    by_question: dict[int, tuple[int, dict[str, Any]]] = {}
    for i, record in enumerate(_records(path, "annotations", _answer_text)):
        question_id = _integer(path, "annotations", i, record, "question_id")
        if question_id in by_question:
            raise DataError(f"{path}: question_id {question_id} comes twice; expected it once")
        by_question[question_id] = (i, record)
    missing = [question_id for question_id in question_ids if question_id not in by_question]
    if missing:
        raise DataError(
            f"{path}: {len(missing)} of {len(question_ids)} questions have no annotation, the "
            f"first is question_id {missing[0]}; give the annotations of the same split, or none"
        )
    found = [by_question[question_id] for question_id in question_ids]
    names = {
        "question_type": "question_type",
        "answer_type": "answer_type",
        "answer": "multiple_choice_answer",
    }
    columns: dict[str, list[Any]] = {
        column: [_string(path, "annotations", i, record, key) for i, record in found]
        for column, key in names.items()
    }
    columns["answers"] = [_answers(path, i, record) for i, record in found]
    return columns


def _answer_text(parsed: dict[str, Any]) -> Any:
    """Fold each answer to its text while parsing: two million small dicts would take a gigabyte."""
    answer = parsed.get("answer")
    return sys.intern(answer) if isinstance(answer, str) and "answer_id" in parsed else parsed


def _records(
    path: Path, key: str, hook: Callable[[dict[str, Any]], Any] | None = None
) -> list[Any]:
    try:
        document = json.loads(path.read_text("utf-8-sig"), object_hook=hook)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, nested lists
        raise DataError(f"{path} is not valid JSON: {error}") from error
    records = document.get(key) if isinstance(document, dict) else None
    if not isinstance(records, list):
        raise DataError(f'{path}: expected an object with a list "{key}" at the top level')
    return records


def _value(path: Path, where: str, index: int, record: Any, key: str) -> Any:
    if not isinstance(record, dict):
        raise DataError(f"{path}: {where}[{index}] is not an object")
    if key not in record:
        raise DataError(f'{path}: {where}[{index}] has no "{key}"')
    return record[key]


def _integer(path: Path, where: str, index: int, record: Any, key: str) -> int:
    value = _value(path, where, index, record, key)
    if type(value) is not int or not 0 <= value < 2**63:
        raise DataError(
            f'{path}: "{key}" of {where}[{index}] is {str(value)[:50]!r}; expected an integer ≥ 0'
        )
    return value


def _string(path: Path, where: str, index: int, record: Any, key: str) -> str:
    value = _value(path, where, index, record, key)
    if not isinstance(value, str):
        raise DataError(
            f'{path}: "{key}" of {where}[{index}] is {str(value)[:50]!r}; expected a text'
        )
    return value


def _answers(path: Path, index: int, record: Any) -> str:
    answers = _value(path, "annotations", index, record, "answers")
    if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers) or not answers:
        raise DataError(
            f'{path}: "answers" of annotations[{index}] is not a list of '
            '{"answer": text, "answer_id": number}'
        )
    return json.dumps(answers, ensure_ascii=False)
