"""A Hugging Face dataset in parquet: only what is needed is read, at one pinned commit.

The text columns are indexed; of the images, only the row groups that hold drawn rows are read,
and each drawn image is kept as a file. ``datasets`` finds the files (on the hub or in a local
folder) and resolves the revision; it no longer runs dataset scripts, which is said as an error.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from vlm_latency.errors import DataError
from vlm_latency.hub import reachable, unreachable
from vlm_latency.option_groups import ColumnNames
from vlm_latency.vqa.source import QuestionSource, identifier, majority, question_table

if TYPE_CHECKING:
    import pyarrow.parquet as pq

_log = logging.getLogger(__name__)


def open_hub(
    name: str,
    split: str,
    hub_id: str,
    *,
    revision: str | None = None,
    columns: Mapping[str, str | None] | None = None,
    image_cache: Path | None = None,
) -> QuestionSource:
    """Index the text columns of a hub dataset, or of a local folder of parquet files.

    Parameters
    ----------
    revision
        Branch, tag or commit; the commit it stands for is recorded in the source's details.
    columns
        What the dataset calls the `ColumnNames`; question and image are needed. Without question or
        image ids, each row is its own question and image, numbered from 1.
    image_cache
        Where drawn images are kept, in one folder per dataset, commit and split.

    Raises
    ------
    DataError
        When the dataset cannot be found or reached, is a script or not parquet, or has not the
        split or the columns.
    """
    if image_cache is None:
        raise DataError("dataset.source=hub needs a folder for the drawn images (image_cache)")
    files, commit = _parquet_files(hub_id, revision, split)
    names = ColumnNames.model_validate(columns or {}).model_dump()
    texts: dict[str, list[Any]] = {}
    groups: list[_RowGroup] = []
    for file in files:
        with _opened(file) as parquet:
            _read_texts(parquet, names, file, texts)
            groups += _row_groups(parquet, file)
    count = sum(group.rows for group in groups)
    for key in ("question_id", "image_id"):
        texts.setdefault(key, list(range(1, count + 1)))
    if "answers" in texts and "answer" not in texts:
        texts["answer"] = [each and majority(json.loads(each)) for each in texts["answers"]]
    if any(len(values) != count for values in texts.values()):
        raise DataError(f"hub dataset {hub_id!r}: not all of its files have the same columns")
    table = question_table(texts, hub_id)

    slug = re.sub(r"[^\w.-]+", "--", hub_id).strip("-.")
    folder = f"{slug}@{commit or _local_version(files)}/{split}"
    fetch = partial(
        _fetch, groups=groups, column=str(names["image"]), root=image_cache, folder=folder
    )
    details = {"hub_id": hub_id, "revision": commit}
    return QuestionSource(name, "hub", split, table, image_cache, False, details, fetch)


@dataclass(frozen=True)
class _RowGroup:
    file: str
    index: int
    rows: int


def _parquet_files(hub_id: str, revision: str | None, split: str) -> tuple[list[str], str | None]:
    """The parquet files of the split, and the commit that they are pinned to (None if local)."""
    from datasets import load_dataset_builder

    online = Path(hub_id).is_dir() or reachable()
    try:
        builder = load_dataset_builder(hub_id, revision=revision)
    except Exception as error:  # not found, offline, gated, a script, several configurations, …
        reason = " ".join(str(error).split())
        if "Dataset scripts are no longer supported" in reason:
            raise DataError(
                f"hub dataset {hub_id!r} is a script, and datasets ≥ 4 no longer runs scripts "
                f"({reason}); use one in parquet, such as lmms-lab/VQAv2"
            ) from error
        if not online:
            raise DataError(unreachable(f"hub dataset {hub_id!r}", "dataset.path")) from error
        raise DataError(f"hub dataset {hub_id!r} cannot be opened: {reason}") from error
    if builder.info.builder_name != "parquet":
        raise DataError(
            f"hub dataset {hub_id!r} is stored as {builder.info.builder_name}; expected parquet"
        )
    splits = {str(key): list(files) for key, files in builder.config.data_files.items()}
    if split not in splits:
        raise DataError(
            f"hub dataset {hub_id!r} has no split {split!r}, only {', '.join(sorted(splits))}"
        )
    pinned = re.search(r"@([0-9a-f]{40})/", splits[split][0])
    return splits[split], pinned[1] if pinned else None


def _local_version(files: list[str]) -> str:
    """Local files have no commit: sizes and times tell whether kept images are still theirs."""
    stats = [(file, Path(file).stat()) for file in files]
    text = json.dumps([(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats])
    return f"local-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@contextmanager
def _opened(file: str) -> Iterator[pq.ParquetFile]:
    import fsspec
    import pyarrow.parquet as pq

    try:
        with fsspec.open(file, "rb") as stream, pq.ParquetFile(stream) as parquet:
            yield parquet
    except DataError:
        raise
    except Exception as error:  # Arrow's, the file system's and the network's errors
        raise DataError(f"{file} cannot be read: {' '.join(str(error).split())}") from error


def _row_groups(parquet: pq.ParquetFile, file: str) -> list[_RowGroup]:
    meta = parquet.metadata
    return [_RowGroup(file, i, meta.row_group(i).num_rows) for i in range(meta.num_row_groups)]


def _read_texts(
    parquet: pq.ParquetFile,
    names: Mapping[str, str | None],
    file: str,
    texts: dict[str, list[Any]],
) -> None:
    """Append the file's columns, those that it has, to ``texts``."""
    present = parquet.schema_arrow.names
    for key in ("question", "image"):
        if names[key] not in present:
            raise DataError(
                f"{file} has no column {names[key]!r} (dataset.columns.{key}), only "
                f"{', '.join(present)}"
            )
    wanted = {key: str(n) for key, n in names.items() if n in present and key != "image"}
    for batch in parquet.iter_batches(batch_size=4096, columns=sorted(set(wanted.values()))):
        for key, column in wanted.items():
            try:
                values = [_value(key, value) for value in batch.column(column).to_pylist()]
            except (TypeError, ValueError, KeyError, DataError) as error:
                raise DataError(
                    f"{file}: column {column!r} cannot serve as dataset.columns.{key}: {error}"
                ) from error
            texts.setdefault(key, []).extend(values)


def _value(key: str, value: Any) -> Any:
    if key == "answers":
        answers = _answer_list(value)
        return None if answers is None else json.dumps(answers, ensure_ascii=False)
    if key in ("question_id", "image_id"):
        if value is None:
            raise TypeError("an id is missing")
        return identifier(value)
    if not isinstance(value, str) and (value is not None or key == "question"):
        raise TypeError(f"{str(value)[:50]!r} is not a text")
    return value


def _answer_list(value: Any) -> list[str] | None:
    """Answers as VQA v2's dicts, as texts, as one text, or as columns of a struct."""
    if value is None:
        return None
    if isinstance(value, dict):
        value = value["answer"]
    values = [value] if isinstance(value, str) else value
    answers = [each["answer"] if isinstance(each, dict) else each for each in values]
    if not all(isinstance(answer, str) for answer in answers):
        raise TypeError("an answer is not a text")
    return answers or None


def _fetch(
    rows: pd.DataFrame, groups: list[_RowGroup], column: str, root: Path, folder: str
) -> pd.DataFrame:
    """Keep the rows' images under ``root`` (once per image id) and name them in ``image_path``."""
    paths = folder + "/" + rows["image_id"].map(_file_name)
    wanted = pd.DataFrame({"path": paths, "position": rows.index}).drop_duplicates("path")
    wanted = wanted[[not (root / path).exists() for path in wanted["path"]]]
    if len(wanted):
        ends = np.cumsum([group.rows for group in groups])
        of = np.searchsorted(ends, wanted["position"].to_numpy(int), side="right")
        numbers = np.unique(of)
        _log.info("reading %d images from %d row groups", len(wanted), len(numbers))
        for number in numbers:
            here = wanted[of == number]
            places = here["position"] - (ends[number] - groups[number].rows)
            targets = {place: root / path for place, path in zip(places, here["path"], strict=True)}
            _keep(groups[number], column, targets)
    return rows.assign(image_path=paths)


def _file_name(image_id: str) -> str:
    """A file's name for an image: its own where that is one, a hash where it could lead elsewhere."""
    if re.fullmatch(r"[\w-][\w.-]{0,99}", image_id, re.ASCII):
        return image_id
    return f"sha256-{hashlib.sha256(image_id.encode()).hexdigest()}"


def _keep(group: _RowGroup, column: str, targets: dict[int, Path]) -> None:
    """Write the images at the given places of a row group to their files."""
    with _opened(group.file) as parquet:
        start = 0
        for batch in parquet.iter_batches(256, [group.index], [column]):
            for place in range(start, start + len(batch)):
                if place in targets:
                    value = batch.column(0)[place - start].as_py()
                    data = value.get("bytes") if isinstance(value, dict) else value
                    if isinstance(data, bytes):  # else the request says that it is missing
                        _write(targets[place], data)
            start += len(batch)


def _write(path: Path, data: bytes) -> None:
    """The whole file or none: what is there counts as kept."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        raise DataError(f"image {path} cannot be kept: {error.strerror or error}") from error
