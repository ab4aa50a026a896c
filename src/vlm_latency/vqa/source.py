"""A source of questions: the indexed table, where its images are, and what identifies it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from vlm_latency.errors import DataError
from vlm_latency.vqa.images import image_bytes

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
        """What identifies the questions, ready for JSON: names, counts and the table's SHA-256."""
        return {
            "name": self.name,
            "source": self.source,
            "split": self.split,
            "synthetic": self.synthetic,
            "questions": len(self.table),
            "images": int(self.table["image_id"].nunique()),
            "sha256": table_sha256(self.table),
            **self.details,
        }

    def with_images(self, rows: pd.DataFrame) -> pd.DataFrame:
        """The given rows of the table with their images in reach under ``root``."""
        return rows if self.fetch is None else self.fetch(rows)

    def open_image(self, row: pd.Series) -> bytes:
        """The encoded image of one row of the table.

        Raises
        ------
        DataError
            When the image is missing or unreadable.
        """
        return image_bytes(self.with_images(row.to_frame().T).iloc[0], self.root)


VQA_V2, VQA_V2_ON_HUB = "coco_2014_vqa", "lmms-lab/VQAv2"


def open_source(
    name: str = VQA_V2,
    source: str = "synthetic",
    path: Path | str | None = None,
    split: str = "validation",
    *,
    hub_id: str = VQA_V2_ON_HUB,
    revision: str | None = None,
    columns: Mapping[str, str | None] | None = None,
    questions_file: str | None = None,
    seed: int = 0,
    size: int | None = None,
    image_cache: Path | str | None = None,
) -> QuestionSource:
    """Index the questions of a dataset.

    Parameters
    ----------
    name
        What results call the dataset; the default stands for VQA v2 only: other data are called by
        their folder or hub id.
    source
        ``official``: a folder in VQA v2's own layout at ``path``; ``hub``: a Hugging Face dataset
        in parquet; ``folder``: a folder of images at ``path`` and a table of questions in it;
        ``synthetic``: made from ``seed``, no files needed.
    split
        ``validation`` (or ``val``) or ``train``.
    hub_id, revision, columns
        Hub datasets: which, at which commit, and what it calls its columns.
    questions_file
        Folder datasets: the CSV or JSONL, relative to ``path`` (needed only where there are
        several).
    size
        Synthetic: the number of images; by default VQA v2 validation's 40,504.
    image_cache
        Hub datasets: the folder that drawn images are kept in; it becomes the source's ``root``.

    Raises
    ------
    DataError
        When something is missing, malformed or contradictory; one sentence says what and where.
    """
    if path is not None and source in ("synthetic", "hub"):
        raise DataError(
            f"dataset.path={path} is not read by dataset.source={source}; set dataset.source=official "
            "or folder for it, dataset.hub_id for a folder of parquet files, or leave it out"
        )
    split = "validation" if split == "val" else split
    if split not in ("validation", "train"):
        raise DataError(f"split {split!r} is not known; expected validation (or val) or train")
    if source == "synthetic":
        from vlm_latency.vqa import synthetic

        return synthetic.make_source(name, split, seed, size)
    if source == "hub":
        from vlm_latency.vqa import hub

        if name == VQA_V2 and hub_id != VQA_V2_ON_HUB:
            name = hub_id

        return hub.open_hub(
            name,
            split,
            hub_id,
            revision=revision,
            columns=columns,
            image_cache=None if image_cache is None else Path(image_cache),
        )
    if source not in ("official", "folder"):
        raise DataError(
            f"dataset source {source!r} is not known; expected official, hub, folder or synthetic"
        )
    if path is None:
        raise DataError(
            f"dataset.source={source} needs dataset.path: the folder that the dataset is in"
        )
    root = Path(path).expanduser()
    if source == "official":
        from vlm_latency.vqa import official

        return official.open_official(name, split, root)
    from vlm_latency.vqa import folder

    name = root.resolve().name if name == VQA_V2 else name
    return folder.open_folder(name, split, root, questions_file)


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
    """The question table of checked columns of values; those not given are NA.

    Raises
    ------
    DataError
        When there are no questions, a question id comes twice, or a text is not valid Unicode.
    """
    try:
        table = pd.DataFrame(
            {name: pd.array(list(v), dtype=QUESTION_COLUMNS[name]) for name, v in columns.items()}
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
    """The most frequent answer, the earliest of several; None where there are no answers."""
    return Counter(answers).most_common(1)[0][0] if answers else None


def table_sha256(table: pd.DataFrame) -> str:
    """SHA-256 of a table's column names and values, whatever file they came from."""
    digest = hashlib.sha256()
    for name, column in table.items():
        texts = column.astype("string").fillna("\x00")
        digest.update("\x1f".join([str(name), *texts, "\x1e"]).encode())
    return digest.hexdigest()
