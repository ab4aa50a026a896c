"""Hashes of files' contents, kept between commands: a checkpoint of 15 GB is read once.

What is kept lies in ``contents/`` below the user's cache folder: ``$VLM_LATENCY_CACHE``, else
``$XDG_CACHE_HOME/vlm-latency``, else ``~/.cache/vlm-latency``; ``VLM_LATENCY_CACHE=off`` keeps
nothing. A file is read again when its size or one of its times of change is another.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from functools import cache
from pathlib import Path

_SMALL = 2**20  # bytes; reading these again costs nothing
_SETTLED_NS = 2 * 10**9  # a younger file may change once more without its times telling


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
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
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
