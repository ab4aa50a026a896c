"""Files that are either the old one or the new one, never half of it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from kedro.io import AbstractDataset
from kedro_datasets._typing import JSONPreview, TablePreview

from vlm_latency.errors import DataError
from vlm_latency.results import read_json, result_path
from vlm_latency.statistics import plain


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a temporary file beside ``path`` that takes its place once it is whole.

    Raises
    ------
    DataError
        When the folder cannot be written or the disk is full; the old file stays.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix
        )
        os.close(handle)
        temporary = Path(name)
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another "
            "output_dir"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    """The process's file mode mask, which temporary files do not follow by themselves."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


class FileDataset(AbstractDataset):
    """One place on disk, a file or a folder; what it holds is its children's matter."""

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None):
        self._path = Path(filepath)
        self._filepath = self._path  # the name under which Kedro-Viz looks for it
        self.metadata = metadata

    def _exists(self) -> bool:
        return self._path.exists()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._path)}


class AtomicJSON(FileDataset):
    """JSON without NaN, written whole or not at all.

    Parameters
    ----------
    filepath
        The file.
    metadata
        Passed through to Kedro plugins.
    """

    def load(self) -> Any:
        return read_json(self._path)

    def save(self, data: Any) -> None:
        with replacing(self._path) as temporary, temporary.open("w", encoding="utf-8") as file:
            json.dump(plain(data), file, allow_nan=False, ensure_ascii=False, indent=1)
            file.write("\n")

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


class AtomicParquet(FileDataset):
    """A table in a parquet file, written whole or not at all.

    Parameters
    ----------
    filepath
        The file.
    metadata
        Passed through to Kedro plugins.
    """

    def load(self) -> pd.DataFrame:
        return pd.read_parquet(self._path)

    def save(self, data: pd.DataFrame) -> None:
        with replacing(self._path) as temporary:
            data.to_parquet(temporary, index=False)

    def preview(self, nrows: int = 20) -> TablePreview:
        """Show the first rows in Kedro-Viz."""
        return TablePreview(plain(self.load().head(nrows).to_dict(orient="split")))
