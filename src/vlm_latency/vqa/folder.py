"""A folder of images with a table of questions: for people with data of their own."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm_latency.errors import DataError
from vlm_latency.vqa.images import check_relative
from vlm_latency.vqa.source import QuestionSource, identifier, majority, question_table

_TABLES = (".csv", ".jsonl")
_LAYOUT = (
    "expected images and a .csv or .jsonl with the columns image (a path inside the folder) and "
    "question, and optionally question_id, question_type, answer_type, answer and answers"
)


def open_folder(
    name: str, split: str, root: Path, questions_file: str | None = None
) -> QuestionSource:
    """Index the questions of a folder without opening an image.

    The table's columns: ``image`` (a path inside the folder) and ``question``; optionally
    ``question_id`` (a name; else the row's number, from 1), ``answers`` (a list; in CSV a JSON
    list) or ``answer`` (a text, whatever it begins with), ``question_type``, ``answer_type``. Images are numbered in the order in
    which they first appear. The split is the user's own business and only recorded.

    Raises
    ------
    DataError
        When the table is missing or malformed (with its line), or an image path leads out.
    """
    if not root.is_dir():
        raise DataError(f"dataset.path {root} is not a folder; {_LAYOUT}")
    path = _questions_path(root, questions_file)
    image_ids: dict[str, int] = {}
    rows: list[dict[str, Any]] = []
    for line, record in _records(path):
        try:
            row = _row(record)
        except DataError as error:
            raise DataError(f"{path}, line {line}: {error}") from error
        row["image_id"] = image_ids.setdefault(row["image_path"], len(image_ids) + 1)
        if row["question_id"] is None:
            row["question_id"] = str(len(rows) + 1)
        rows.append(row)
    columns = {key: [row[key] for row in rows] for key in (rows[0] if rows else ["question_id"])}
    table = question_table(columns, path)
    details = {"path": str(root), "questions_file": path.name}
    return QuestionSource(name, "folder", split, table, root, details=details)


def _questions_path(root: Path, questions_file: str | None) -> Path:
    if questions_file is not None:
        path = root / questions_file
        if not path.is_file() or path.suffix.lower() not in _TABLES:
            raise DataError(f"dataset.questions_file {path} is not a .csv or .jsonl; {_LAYOUT}")
        return path
    tables = sorted(each for each in root.iterdir() if each.suffix.lower() in _TABLES)
    if len(tables) != 1:
        names = ", ".join(each.name for each in tables) or "none"
        raise DataError(
            f"{root} has not one table of questions (found {names}); {_LAYOUT}, and set "
            "dataset.questions_file where there are several"
        )
    return tables[0]


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each record of the table with its line."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".csv":
                reader = csv.DictReader(file, strict=True)
                for record in reader:
                    if None in record or None in record.values():
                        raise DataError(
                            f"{path}, line {reader.line_num}: the number of cells is not the "
                            "header's; quote texts with commas"
                        )
                    yield reader.line_num, {k: v for k, v in record.items() if v}
            else:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield number, _json_object(path, number, line)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start})") from error
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not valid CSV: {error}") from error


def _json_object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {number}: not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"{path}, line {number}: not a JSON object")
    return {key: value for key, value in record.items() if value is not None}


def _row(record: dict[str, Any]) -> dict[str, Any]:
    """One record's values, checked."""
    for key in ("image", "question"):
        if key not in record:
            raise DataError(f'no value of "{key}"; {_LAYOUT}')
    for key in ("image", "question", "question_type", "answer_type", "answer"):
        if not isinstance(record.get(key, ""), str):
            raise DataError(f'"{key}" is {str(record[key])[:50]!r}; expected a text')
    check_relative(record["image"])
    answers = _answers(record)
    return {
        "question_id": identifier(record.get("question_id")),
        "image_id": None,
        "question": record["question"],
        "question_type": record.get("question_type"),
        "answer_type": record.get("answer_type"),
        "answer": record.get("answer") or majority(answers),
        "answers": json.dumps(answers, ensure_ascii=False) if answers else None,
        "image_path": record["image"],
    }


def _answers(record: dict[str, Any]) -> list[str]:
    answers = record.get("answers")
    if answers is None:
        answers = [record["answer"]] if "answer" in record else []
    elif isinstance(answers, str) and answers.startswith("["):
        try:
            answers = json.loads(answers)
        except (ValueError, RecursionError) as error:
            raise DataError(f'"answers" is not a JSON list: {error}') from error
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not all(isinstance(each, str) for each in answers):
        raise DataError(f'"answers" is {str(answers)[:50]!r}; expected a text or a list of texts')
    return answers
