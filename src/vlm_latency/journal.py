"""The journal: every finished run is on disk at once, and an interrupted measurement continues.

A journal is a folder with one append-only file of JSON lines per set of measuring conditions,
``<fingerprint>.jsonl``. The first line is a header that spells the conditions out; every other
line is one run. Rows of different conditions can therefore never mix, and going back to earlier
conditions finds what was measured then.
"""

from __future__ import annotations

import io
import json
import math
import os
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import IO, Any

import pandas as pd
import pyarrow as pa
from pyarrow.json import ParseOptions, ReadOptions, read_json

from vlm_latency.errors import MeasurementError, blaming
from vlm_latency.locks import take
from vlm_latency.records import MEASURED_COLUMNS, SCHEMA_VERSION, chosen, typed

# What tells runs apart: a request that asks for something else is another one, whatever its id.
RUN = ["request_id", "request_sha256", "run_index"]

_BYTES_PER_PART = 1 << 24  # of the lines that are parsed at once
_SESSION = "session"  # the key of a line that is not a run
BEGAN = "began"  # the key of what such a line says at a command's start
_NEEDED = ("request_id", "run_index", "status")  # what every run has
_SESSION_LINE = b'{"session"'


def session_ratios(sessions: Iterable[Mapping[str, Any]]) -> tuple[float | None, float | None]:
    """Tell what share of the wall time warmed up, and what the rest was worth.

    Returns
    -------
    warmup_share, harness_ratio
        The second is wall time without warm-up over what was measured and preprocessed: 1 wastes
        nothing. None where no time was taken.
    """
    told = list(sessions)
    wall, warmup, measured, preprocess = (
        sum(session.get(f"{part}_s") or 0 for session in told)
        for part in ("wall", "warmup", "measured", "preprocess")
    )
    useful = measured + preprocess
    return warmup / wall if wall else None, (wall - warmup) / useful if useful else None


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
        self._read: tuple[Any, pd.DataFrame] | None = None  # a command reads the same file twice

    def path(self, fingerprint: str) -> Path:
        """Give the file of one set of conditions."""
        return self.folder / f"{fingerprint}.jsonl"

    def others(self, fingerprint: str) -> list[Path]:
        """List the files that were measured under other conditions."""
        return sorted(p for p in self.folder.glob("*.jsonl") if p != self.path(fingerprint))

    def conditions(self, path: Path) -> dict[str, Any]:
        """Read the conditions that a file's header spells out; none where it is torn."""
        conditions = _header(path).get("conditions")
        return conditions if isinstance(conditions, dict) else {}

    def check(self, fingerprint: str) -> None:
        """Refuse a file of another version, or of other conditions than its name says.

        Raises
        ------
        MeasurementError
            Saying what was found and how to go on.
        """
        path = self.path(fingerprint)
        if not path.exists():
            return
        header = _header(path)
        if not header:  # torn, or nothing but zeros: nothing was measured yet
            return
        for name, expected in (("schema_version", SCHEMA_VERSION), ("fingerprint", fingerprint)):
            if header.get(name) != expected:
                raise MeasurementError(
                    f"the journal {path} has the {name} {header.get(name)!r}; expected "
                    f"{expected!r}: move it away and run the command again to measure afresh"
                )

    def read(self, fingerprint: str) -> pd.DataFrame:
        """Read the runs measured under these conditions, a run that was tried again by its last try.

        Returns
        -------
        DataFrame
            Columns ``records.MEASURED_COLUMNS``; one row per ``RUN`` and model.

        Raises
        ------
        MeasurementError
            When a line before the last one is not a run, or one of other conditions: the file was
            damaged.
        """
        path = self.path(fingerprint)
        self.check(fingerprint)
        state = _state(path)
        kept, self._read = self._read, None  # for the second time, then its memory is free
        if kept is not None and kept[0] == state:
            return kept[1]
        table = _table(path, fingerprint)
        if table is None:
            runs = [line for line in _lines(path, fingerprint) if _SESSION not in line]
            with blaming(path, "a journal that 'kedro run' wrote", MeasurementError):
                table = typed(pd.DataFrame(runs), MEASURED_COLUMNS)
        # Variants that are measured in turn share their requests, and their journal.
        last = ~table.duplicated([*RUN, "model"], keep="last")
        table = chosen(table, last).reset_index(drop=True)
        self._read = state, table.copy(deep=False)
        return table

    def sessions(self, fingerprint: str) -> list[dict[str, Any]]:
        """Read what each command that measured here said at its end: warm-up, wall time."""
        return [said for said in self._said(fingerprint) if BEGAN not in said]

    def began(self, fingerprint: str) -> list[dict[str, Any]]:
        """Read what each command that measured here knew at its start: commit, load, versions."""
        return [said[BEGAN] for said in self._said(fingerprint) if BEGAN in said]

    def _said(self, fingerprint: str) -> list[dict[str, Any]]:
        lines = _lines(self.path(fingerprint), fingerprint, _SESSION_LINE)
        return [line[_SESSION] for line in lines]

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
        """Close the file and release its lock."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self, fingerprint: str, conditions: dict[str, Any]) -> IO[bytes]:
        """Open the file for appending: locked, its torn last line cut, its header written."""
        path = self.path(fingerprint)
        if self._file is not None and self._file.name == str(path):
            return self._file
        self.close()
        self.check(fingerprint)
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab+", buffering=0)
        if not take(file):
            file.close()
            raise MeasurementError(
                f"another run is writing the journal {path}; wait for it to end, or choose another "
                "output_dir"
            )
        _cut_bad_end(file, path, fingerprint)
        if file.seek(0, os.SEEK_END) == 0:
            header = {"schema_version": SCHEMA_VERSION, "fingerprint": fingerprint}
            file.write(_line({**header, "conditions": conditions}))
        self._file = file
        return file


def _state(path: Path) -> tuple[str, int, int] | None:
    """Tell whether a file is the one that was read before; None where there is none."""
    if not path.exists():
        return None
    found = path.stat()
    return str(path), found.st_size, found.st_mtime_ns


def _line(row: dict[str, Any]) -> bytes:
    """One run as a line; absent values are left out, which halves the file."""
    row = {key: value for key, value in row.items() if not _absent(value)}
    return json.dumps(row, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _header(path: Path) -> dict[str, Any]:
    """Read what the first line says; nothing where it is torn.

    Raises
    ------
    MeasurementError
        When it is no header: the file was damaged, or is not ours.
    """
    with path.open("rb") as file:
        line = file.readline()
    if not line.endswith(b"\n"):
        return {}
    header = _parsed(line)
    if header is None or "conditions" not in header:
        raise MeasurementError(
            f"line 1 of {path} is not the header of a journal: the file was damaged or is none; "
            "move it away and run the command again to measure afresh"
        )
    return header


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _is_line(found: dict[str, Any] | None, fingerprint: str) -> bool:
    """Whether it is a run of these conditions or what a command said at its end."""
    if found is None:
        return False
    if _SESSION in found:
        return isinstance(found[_SESSION], dict)
    known = all(found.get(name) is not None for name in _NEEDED)
    return known and found.get("fingerprint", fingerprint) == fingerprint and _fits(found)


# JSON's types that fit a column as they are; every run is checked, so this is looked up first.
_PLAIN: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "boolean": (bool,),
    "int": (int,),
    "float": (float, int),
}
_ALLOWED = {
    name: allowed
    for name, kind in MEASURED_COLUMNS.items()
    for start, allowed in _PLAIN.items()
    if kind.lower().startswith(start)
}


def _fits(row: dict[str, Any]) -> bool:
    """Whether the values are of their columns' types."""
    for name, value in row.items():
        allowed = _ALLOWED.get(name)
        if allowed is None or value is None:
            continue
        kind = type(value)
        if kind in allowed and (kind is not int or float in allowed or abs(value) < 2**63):
            continue
        whole = kind is float and value.is_integer() and abs(value) < 2**63
        if not (whole and allowed == (int,)):
            return False
    return True


def _lines(path: Path, fingerprint: str, containing: bytes = b"") -> Iterator[dict[str, Any]]:
    """Read the lines; a bad last one (the crash came while it was written) is passed over."""
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
            found = _parsed(line)
            if found is not None and _is_line(found, fingerprint):
                yield found
            elif file.read(1):
                raise MeasurementError(
                    f"line {number} of the journal {path} is not a run of these conditions: the "
                    f"file was damaged; to go on without it: sed -i {number}d {shlex.quote(str(path))}"
                    " (its runs are measured again), or move the file away to measure afresh"
                )


_LISTS = [name for name, kind in MEASURED_COLUMNS.items() if kind == "object"]


@cache
def _schema() -> pa.Schema:
    """Give the columns' types as pyarrow has them; its metadata are the types of pandas."""
    schema = pa.Schema.from_pandas(typed(pd.DataFrame(), MEASURED_COLUMNS), preserve_index=False)
    for name in _LISTS:
        schema = schema.set(schema.get_field_index(name), pa.field(name, pa.list_(pa.float64())))
    return schema


def _table(path: Path, fingerprint: str) -> pd.DataFrame | None:
    """Read the runs of a journal many lines at a time, in a tenth of what `_lines` takes.

    Returns
    -------
    DataFrame or None
        Columns ``records.MEASURED_COLUMNS``. None where a line is anything but one object of
        values of these columns' types, a run of these conditions: `_lines` says what it is.
    """
    schema = _schema()
    strict = ParseOptions(explicit_schema=schema, unexpected_field_behavior="error")
    parts = []
    try:
        with path.open("rb") as file:
            file.readline()
            while lines := file.readlines(_BYTES_PER_PART):
                if not lines[-1].endswith(b"\n"):  # the next run to be written cuts it
                    lines.pop()
                runs = [line for line in lines if not line.startswith(_SESSION_LINE)]
                said = (line for line in lines if line.startswith(_SESSION_LINE))
                known = all(_is_line(_parsed(line), fingerprint) for line in said)
                if not known or not all(line.startswith(b"{") for line in runs):
                    return None
                if runs:
                    data = b"".join(runs)
                    part = read_json(io.BytesIO(data), ReadOptions(block_size=1 << 22), strict)
                    part.validate(full=True)
                    if len(part) != len(runs) or any(
                        part[name].null_count for name in (*_NEEDED, "fingerprint")
                    ):
                        return None
                    parts.append(part)
    except (OSError, ValueError):  # pyarrow's own errors are one or the other
        return None
    if not parts:
        return typed(pd.DataFrame(), MEASURED_COLUMNS)
    whole = pa.concat_tables(parts).replace_schema_metadata(schema.metadata)
    if set(whole["fingerprint"].unique().to_pylist()) - {fingerprint}:
        return None
    listed = {
        name: pd.Series([math.nan if each is None else each for each in whole[name].to_pylist()])
        for name in _LISTS
    }
    whole = whole.drop_columns(_LISTS)
    table = whole.to_pandas(split_blocks=True, self_destruct=True).assign(**listed)
    return table[list(MEASURED_COLUMNS)]


def _cut_bad_end(file: IO[bytes], path: Path, fingerprint: str) -> None:
    """Cut a last line that is not whole, or the next run would be merged with it and lost.

    What is cut is kept beside the journal, in ``<fingerprint>.cut``.
    """
    size = file.seek(0, os.SEEK_END)
    keep = _start_of_last_line(file, size)
    file.seek(keep)
    line = file.read(size - keep)
    if line.endswith(b"\n") and (keep == 0 or _is_line(_parsed(line), fingerprint)):
        return
    if line:
        with path.with_suffix(".cut").open("ab") as cut:
            cut.write(line.rstrip(b"\n") + b"\n")
        file.truncate(keep)


def _start_of_last_line(file: IO[bytes], size: int) -> int:
    position = size - 1  # its own line end, if it has one, does not end another
    while position > 0:
        step = min(position, 1 << 16)
        file.seek(position - step)
        found = file.read(step).rfind(b"\n")
        if found >= 0:
            return position - step + found + 1
        position -= step
    return 0
