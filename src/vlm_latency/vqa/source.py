"""A source of questions: the indexed table, where its images are, and what identifies it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from vlm_latency.errors import DataError

MAX_NAME = 200  # characters of an id
QUESTION_COLUMNS: dict[str, Any] = {
    "question_id": "string",
    "image_id": "string",
    "question": "string",
    "question_type": "string",
    "answer_type": "string",
    "answer": "string",  # the annotators' most frequent answer
    "answers": "string",  # all of them, as a JSON list of strings
    "image_path": "string",  # relative to the source's root
    "image_recipe": "string",  # of a synthetic image
    "image_width": "Int64",
    "image_height": "Int64",
}


@dataclass(frozen=True)
class QuestionSource:
    """Questions about images, indexed; the images themselves are opened when asked for.

    Attributes
    ----------
    table
        One row per question, columns and dtypes of ``QUESTION_COLUMNS``; unknown values are NA.
        Image sizes are known for synthetic images only: the others' headers are read when drawn.
    root
        The folder that ``image_path`` is relative to; None for synthetic images.
    fetch
        For a hub dataset: brings the images of the given rows into ``root`` and returns the rows
        with their ``image_path``.
    """

    name: str
    source: str
    split: str
    table: pd.DataFrame = field(repr=False)
    root: Path | None = None
    synthetic: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)
    fetch: Callable[[pd.DataFrame], pd.DataFrame] | None = field(default=None, repr=False)

    def describe(self) -> dict[str, Any]:
        """Say what identifies the questions, for JSON: names, counts and the table's SHA-256."""
        return {
            "name": self.name,
            "source": self.source,
            "split": self.split,
            "synthetic": self.synthetic,
            "questions": len(self.table),
            "images": int(self.table["image_id"].nunique()),
            "sha256": self._sha256,
            **self.details,
        }

    @cached_property
    def _sha256(self) -> str:
        return table_sha256(self.table)

    def with_images(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Bring the images of the given rows into reach under ``root``."""
        return rows if self.fetch is None else self.fetch(rows)


def identifier(value: Any) -> str | None:
    """Give the name that a question or an image has: a text as it is, an integer by its digits.

    >>> identifier("01827492"), identifier(1827492), identifier("1_23")
    ('01827492', '1827492', '1_23')

    Raises
    ------
    DataError
        For anything else, which has more than one way of being written.
    """
    if value is None or (isinstance(value, str) and value and len(value) <= MAX_NAME):
        return value
    if type(value) is not int:
        raise DataError(f"the id {str(value)[:50]!r} is no name; expected a text or an integer")
    return str(value)


def question_table(columns: Mapping[Any, Any], origin: Path | str) -> pd.DataFrame:
    """Make the question table of checked columns of values; those not given are NA.

    Raises
    ------
    DataError
        When there are no questions, a question id comes twice, or a text is not valid Unicode.
    """
    try:
        table = pd.DataFrame(
            {
                name: pd.array(v if hasattr(v, "dtype") else list(v), dtype=QUESTION_COLUMNS[name])
                for name, v in columns.items()
            }
        )
    except UnicodeEncodeError as error:
        raise DataError(f"{origin}: a text has a lone surrogate, which no file can hold") from error
    except OverflowError as error:
        raise DataError(f"{origin}: an id has more than 63 bits") from error
    if table.empty:
        raise DataError(f"{origin} holds no questions")
    again = table["question_id"].duplicated()
    if again.any():
        first = table.loc[again, "question_id"].iloc[0]
        raise DataError(f"{origin}: question_id {first} comes twice; expected it to be unique")
    for name, dtype in QUESTION_COLUMNS.items():
        if name not in table:
            table[name] = pd.array([pd.NA] * len(table), dtype=dtype)
    return table[list(QUESTION_COLUMNS)]


def majority(answers: list[str] | None) -> str | None:
    """Find the most frequent answer, the earliest of several; None where there are no answers."""
    return Counter(answers).most_common(1)[0][0] if answers else None


def table_sha256(table: pd.DataFrame) -> str:
    """Hash a table's column names and values, whatever file they came from (SHA-256)."""
    digest = hashlib.sha256()
    for name, column in table.items():
        texts = column.astype("string").fillna("\x00").tolist()
        digest.update("\x1f".join([str(name), *texts, "\x1e"]).encode())
    return digest.hexdigest()
