"""Atomic writing: a file on the disk is the old one or the new one, never a part of it."""

from __future__ import annotations

import contextlib
import glob
import gzip
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from kedro.io import AbstractDataset, DatasetError
from kedro_datasets._typing import JSONPreview, TablePreview
from kedro_datasets.json import JSONDataset
from kedro_datasets.pandas import ParquetDataset

from vlm_latency.errors import DataError
from vlm_latency.locks import take
from vlm_latency.results import read_json, result_path
from vlm_latency.statistics import plain

TEMPORARY = ".part"  # before the suffix of a file that is being written


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a temporary file beside ``path`` that takes its place once it is whole.

    Raises
    ------
    DataError
        When the folder cannot be written or the disk is full; the old file stays.
    """
    temporary = held = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.stem}-", suffix=f"{TEMPORARY}{path.suffix}"
        )
        temporary = Path(name)
        held = os.fdopen(handle)
        take(held)
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        held.close()  # where a file that is open cannot be moved
        temporary.replace(path)
    except (OSError, DatasetError) as error:
        cause = error.__cause__ if isinstance(error, DatasetError) else error
        if not isinstance(cause, OSError):
            raise
        raise DataError(
            f"cannot write {path}: {cause.strerror or cause}; free some space or choose another "
            "output_dir"
        ) from cause
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if held is not None:
            held.close()


def _sweep(path: Path) -> None:
    """Remove what killed writers of this file left; one that is at work holds its own."""
    for left in path.parent.glob(f".{glob.escape(path.stem)}-*{TEMPORARY}{path.suffix}"):
        with contextlib.suppress(OSError), left.open("rb") as file:
            if take(file):
                left.unlink()


def _umask() -> int:
    """The process's file mode mask, which temporary files do not follow by themselves."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


class FileDataset(AbstractDataset):
    """One place on disk, a file or a folder; subclasses say how it is read and written.

    Parameters
    ----------
    filepath
        The file or folder.
    metadata
        Passed through to Kedro plugins.
    """

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None):
        self._path = Path(filepath)
        self._filepath = self._path  # the name under which Kedro-Viz looks for it
        self.metadata = metadata

    def _exists(self) -> bool:
        return self._path.exists()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._path)}


class AtomicJSON(JSONDataset):
    """JSON without NaN, written whole or not at all."""

    def load(self) -> Any:
        return read_json(Path(self._filepath))

    def save(self, data: Any) -> None:
        with replacing(Path(self._filepath)) as temporary:
            text = json.dumps(plain(data), allow_nan=False, ensure_ascii=False, indent=1)
            temporary.write_text(text, encoding="utf-8")

    def preview(self) -> JSONPreview:
        """Show the result in Kedro-Viz, all but its entries."""
        data = self.load()
        if isinstance(data, dict):
            data = {key: value for key, value in data.items() if key != "results"}
        return JSONPreview(json.dumps(data))


class ResultFile(AtomicJSON):
    """The result of an experiment or an analysis.

    Parameters
    ----------
    root
        The output folder.
    study
        The experiment or analysis.
    metadata
        Passed through to Kedro plugins.
    """

    def __init__(self, *, root: str, study: str, metadata: dict[str, Any] | None = None):
        super().__init__(filepath=str(result_path(root, study)), metadata=metadata)


class CompressedJSON(FileDataset):
    """JSON of one line, compressed by gzip, such as a trace for a viewer."""

    def load(self) -> Any:
        with gzip.open(self._path, "rt", encoding="utf-8") as file:
            return json.load(file)

    def save(self, data: Any) -> None:
        with replacing(self._path) as temporary:
            temporary.write_bytes(gzip.compress(json.dumps(data).encode()))


class AtomicParquet(ParquetDataset):
    """A table in a parquet file, written whole or not at all."""

    def save(self, data: pd.DataFrame) -> None:
        with replacing(Path(self._filepath)) as temporary:
            whole = ParquetDataset(filepath=temporary.as_posix(), save_args={"index": False})
            whole.save(data)

    def preview(self, nrows: int = 20) -> TablePreview:
        """Show the first rows in Kedro-Viz."""
        return TablePreview(plain(self.load().head(nrows).to_dict(orient="split")))
