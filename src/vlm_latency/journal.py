"""The journal: every finished run is on disk at once, and an interrupted measurement continues.

A journal is a folder with one append-only file of JSON lines per set of measuring conditions,
``<fingerprint>.jsonl``. The first line is a header that spells the conditions out; every other
line is one run. Rows of different conditions can therefore never mix, and going back to earlier
conditions finds what was measured then.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import pandas as pd

from vlm_latency.errors import MeasurementError
from vlm_latency.records import MEASURED_COLUMNS, SCHEMA_VERSION, typed

# What tells runs apart: a request that asks for something else is another one, whatever its id.
RUN = ["request_id", "request_sha256", "run_index"]

_ROWS_PER_FRAME = 8192  # rows parsed before they are packed into typed columns
_SESSION = "session"  # the key of a line that is not a run
_SESSION_LINE = b'{"session"'


class Journal:
    """The append-only record of runs below one folder.

    Parameters
    ----------
    folder
        Where the files lie; made when the first run is written.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self._file: IO[bytes] | None = None

    def path(self, fingerprint: str) -> Path:
        """Give the file of one set of conditions."""
        return self.folder / f"{fingerprint}.jsonl"

    def others(self, fingerprint: str) -> list[Path]:
        """List the files that were measured under other conditions."""
        return sorted(p for p in self.folder.glob("*.jsonl") if p != self.path(fingerprint))

    def conditions(self, path: Path) -> dict[str, Any]:
        """Read the conditions that a file's header spells out; none where it is torn."""
        with path.open("rb") as file:
            header = file.readline()
        return dict(json.loads(header)["conditions"]) if header.endswith(b"\n") else {}

    def read(self, fingerprint: str) -> pd.DataFrame:
        """Read the runs measured under these conditions, a run that was tried again by its last try.

        Returns
        -------
        DataFrame
            Columns ``records.MEASURED_COLUMNS``; one row per ``RUN``.

        Raises
        ------
        MeasurementError
            When a line before the last one is not a run: the file was damaged.
        """
        path = self.path(fingerprint)
        runs = (line for line in _lines(path) if _SESSION not in line)
        frames = [typed(pd.DataFrame(rows), MEASURED_COLUMNS) for rows in _packs(runs)]
        if not frames:
            return typed(pd.DataFrame(), MEASURED_COLUMNS)
        table = pd.concat(frames, ignore_index=True)
        return table.drop_duplicates(RUN, keep="last", ignore_index=True)

    def sessions(self, fingerprint: str) -> list[dict[str, Any]]:
        """Read what each command that measured here said at its end: warm-up, wall time."""
        path = self.path(fingerprint)
        return [line[_SESSION] for line in _lines(path, containing=_SESSION_LINE)]

    def append(
        self,
        fingerprint: str,
        conditions: dict[str, Any],
        rows: list[dict[str, Any]],
        session: dict[str, Any] | None = None,
    ) -> None:
        """Write runs, and what there is to say at a command's end, and flush them to the disk.

        Raises
        ------
        MeasurementError
            When another process writes the same journal, or the disk is full; what was written
            before stays whole.
        """
        file, start = None, 0
        try:
            file = self._open(fingerprint, conditions)
            start = file.seek(0, os.SEEK_END)
            ending = [{_SESSION: session}] if session else []
            left = memoryview(b"".join(_line(row) for row in [*rows, *ending]))
            while left:  # a nearly full disk takes a part and says so only at the next write
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except OSError as error:
            if file is not None:
                file.truncate(start)  # half a line would swallow the next one
            self.close()
            raise MeasurementError(
                f"cannot write the journal {self.path(fingerprint)}: {error.strerror}; free some "
                "space and run the same command again, it continues where it stopped"
            ) from error

    def set_aside(self, fingerprint: str) -> Path | None:
        """Keep what was measured under another name, so that the measurement starts afresh."""
        path = self.path(fingerprint)
        if not path.exists():
            return None
        self.close()
        kept = path.with_suffix(f".{time.strftime('%Y%m%dT%H%M%S')}-{time.time_ns() % 10**6}.kept")
        return path.rename(kept)

    def close(self) -> None:
        """Let another process write."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self, fingerprint: str, conditions: dict[str, Any]) -> IO[bytes]:
        """Open the file for appending: locked, its torn last line cut, its header written."""
        path = self.path(fingerprint)
        if self._file is not None and self._file.name == str(path):
            return self._file
        self.close()
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab+", buffering=0)
        _lock(file, path)
        _cut_torn_line(file)
        if file.seek(0, os.SEEK_END) == 0:
            header = {"schema_version": SCHEMA_VERSION, "fingerprint": fingerprint}
            file.write(_line({**header, "conditions": conditions}))
        self._file = file
        return file


def _line(row: dict[str, Any]) -> bytes:
    """One run as a line; absent values are left out, which halves the file."""
    row = {key: value for key, value in row.items() if not _absent(value)}
    return json.dumps(row, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _lines(path: Path, containing: bytes = b"") -> Iterator[dict[str, Any]]:
    """Read the lines; a torn last one (the crash came while it was written) is passed over."""
    if not path.exists():
        return
    with path.open("rb") as file:
        if not file.readline().endswith(b"\n"):  # the header itself was torn
            return
        for number, line in enumerate(file, start=2):
            if not line.endswith(b"\n"):  # the next run to be written cuts it
                return
            if not line.startswith(containing):
                continue
            try:
                yield json.loads(line)
            except ValueError:
                if file.read(1):
                    raise MeasurementError(
                        f"line {number} of the journal {path} is not a run: the file was damaged; "
                        "move it away and run the command again to measure afresh"
                    ) from None


def _packs(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    pack: list[dict[str, Any]] = []
    for row in rows:
        pack.append(row)
        if len(pack) == _ROWS_PER_FRAME:
            yield pack
            pack = []
    if pack:
        yield pack


def _lock(file: IO[bytes], path: Path) -> None:
    """Hold the file for this process alone, where the system can (not on Windows)."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise MeasurementError(
            f"another run is writing the journal {path}; wait for it to end, or choose another "
            "output_dir"
        ) from None


def _cut_torn_line(file: IO[bytes]) -> None:
    """Cut what follows the last line end, or the next run would be merged with it and lost."""
    size = file.seek(0, os.SEEK_END)
    position = size
    while position:
        step = min(position, 1 << 16)
        file.seek(position - step)
        found = file.read(step).rfind(b"\n")
        if found >= 0:
            position += found + 1 - step
            break
        position -= step
    if position < size:
        file.truncate(position)
