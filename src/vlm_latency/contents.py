"""What is kept between commands, below the user's cache folder.

That is ``$VLM_LATENCY_CACHE``, else ``$XDG_CACHE_HOME/vlm-latency``, else ``~/.cache/vlm-latency``;
``VLM_LATENCY_CACHE=off`` keeps nothing. In ``contents/`` lie hashes of files: a checkpoint of 15 GB
is read once, and again when its size or one of its times of change is another. What is known of a
model is a `Memory`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_SMALL = 2**20  # bytes; reading these again costs nothing
_SETTLED_NS = 2 * 10**9  # a younger file may change once more without its times telling
_DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


def cache_folder() -> Path | None:
    """Give the user's cache folder; None where nothing is to be kept."""
    given = os.environ.get("VLM_LATENCY_CACHE")
    if given == "off":
        return None
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlm-latency"


def file_sha256(path: Path) -> str:
    """Hash a file, or take what was found when it last had this size and these times."""
    state = path.stat()
    return _hashed(path.resolve(), state.st_size, state.st_mtime_ns, state.st_ctime_ns)


@cache
def _hashed(path: Path, size: int, modified_ns: int, changed_ns: int) -> str:
    folder = cache_folder() if size >= _SMALL else None
    state = [str(path), size, modified_ns, changed_ns]
    kept = None
    if folder is not None:
        name = hashlib.sha256(os.fsencode(path)).hexdigest()[:32]
        kept = folder / "contents" / f"{name}.json"
        with contextlib.suppress(*_DAMAGED):
            found = json.loads(kept.read_text(encoding="utf-8"))
            if found["state"] == state and len(bytes.fromhex(found["sha256"])) == 32:
                return str(found["sha256"])
    settled = time.time_ns() - max(modified_ns, changed_ns) > _SETTLED_NS
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if kept is not None and settled:
        keep_text(kept, json.dumps({"state": state, "sha256": digest}))
    return digest


def keep_text(path: Path, content: str) -> bool:
    """Write a file of the cache whole, or not at all; whether it could be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=path.suffix)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(content)
        Path(name).replace(path)
    except OSError:  # a cache that cannot be written saves no time, and that is all
        return False
    return True


class Memory:
    """Sections of remembered values by name, in one JSON file.

    The file is replaced whole, and one that is damaged is as good as none.

    Parameters
    ----------
    path : Path or None
        None: remembered in this object only.
    sections : sequence of str
        Their names.
    """

    def __init__(self, path: Path | None, sections: Sequence[str]) -> None:
        self.path = path
        self._names = tuple(sections)
        self.sections: dict[str, dict[str, Any]] = self._read()
        self._saved = self._sizes()

    @classmethod
    def of(cls, kind: str, sections: Sequence[str], *given: Any) -> Memory:
        """Read what was remembered of a model.

        Parameters
        ----------
        kind
            The folder below the cache folder.
        given
            All that what is remembered follows from, beside the versions of torch, transformers and
            Pillow, whether torchvision is there, and this package's code that knows models: their hash is the file's name.
        """
        if (folder := cache_folder()) is None:
            return cls(None, sections)
        known = json.dumps(
            [*given, *map(version, ("torch", "transformers", "pillow")), _source()],
            sort_keys=True,
            default=str,
        )
        name = hashlib.sha256(known.encode()).hexdigest()[:32]
        return cls(folder / kind / f"{name}.json", sections)

    def __getitem__(self, section: str) -> dict[str, Any]:
        return self.sections[section]

    def save(self) -> None:
        """Write what is new, beside what another process wrote meanwhile."""
        if self.path is None or self._sizes() == self._saved:
            return
        for section, values in self._read().items():
            self.sections[section] = {**values, **self.sections[section]}
        content = json.dumps(self.sections)
        if keep_text(self.path, json.dumps({"sha256": _digest(content), "content": content})):
            self._saved = self._sizes()

    def _read(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {section: {} for section in self._names}
        try:
            whole = json.loads(self.path.read_text()) if self.path else {}
            if whole and _digest(whole["content"]) == whole["sha256"]:
                found |= json.loads(whole["content"])
        except _DAMAGED:
            pass
        return found

    def _sizes(self) -> list[int]:
        return [len(self.sections[section]) for section in self._names]


@cache
def _source() -> str:
    """Hash of the code that knows models: what an older version found is not taken for this one's."""
    digest = hashlib.sha256()
    digest.update(str(find_spec("torchvision") is not None).encode())
    digest.update((files("vlm_latency") / "records.py").read_bytes())
    for package in ("costs", "models", "molmo"):
        folder = files("vlm_latency") / package
        for file in sorted(folder.iterdir(), key=lambda file: file.name):
            if file.name.endswith(".py"):
                digest.update(file.read_bytes())
    return digest.hexdigest()


def _digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()
