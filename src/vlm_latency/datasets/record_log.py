"""The journal as a Kedro dataset."""

from __future__ import annotations

import json
from functools import cache
from typing import Any, NotRequired, TypedDict

from kedro.io import AbstractDataset
from kedro_datasets._typing import JSONPreview

from vlm_latency.journal import Journal


class Chunk(TypedDict):
    """What a measuring node yields: runs, and the conditions they were measured under."""

    fingerprint: str
    conditions: dict[str, Any]
    rows: list[dict[str, Any]]
    session: NotRequired[dict[str, Any]]


@cache
def _journal(folder: str) -> Journal:
    """One journal per folder and process: a broken run leaves its file open and locked."""
    return Journal(folder)


class RecordLog(AbstractDataset[Chunk, Journal]):
    """Append-only log of runs: saving appends a chunk, loading gives the ``Journal``.

    Parameters
    ----------
    filepath
        The journal's folder.
    metadata
        Passed through to Kedro plugins.
    """

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None):
        self._journal = _journal(filepath)
        self.metadata = metadata

    def load(self) -> Journal:
        self._journal.close()  # what is to be read is written, by this run or a broken one
        return self._journal

    def save(self, data: Chunk) -> None:
        self._journal.append(**data)

    def _release(self) -> None:
        self._journal.close()

    def _exists(self) -> bool:
        return self._journal.folder.is_dir()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._journal.folder)}

    def preview(self) -> JSONPreview:
        """Tell Kedro-Viz how many runs there are, and under which conditions."""
        found = {
            path.stem: {
                "runs": len(self._journal.read(path.stem)),
                "conditions": self._journal.conditions(path),
            }
            for path in sorted(self._journal.folder.glob("*.jsonl"))
        }
        return JSONPreview(json.dumps(found))
