"""Locks that die with their holder: the system lets go of them, however the process ends."""

from __future__ import annotations

import os
import platform
import sys
import time
from pathlib import Path
from typing import IO, Any

from vlm_latency.errors import MeasurementError

FILE = ".lock"


def take(file: IO[Any]) -> bool:
    """Hold a file for this process alone, where the system can (not on Windows).

    Returns
    -------
    bool
        Whether nobody else holds it.
    """
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def lock_folder(folder: Path) -> IO[str]:
    """Hold a folder until the file is closed or the process ends.

    Returns
    -------
    file
        What holds it; its text tells others who does.

    Raises
    ------
    MeasurementError
        When another command holds it, naming that, or it cannot be written.
    """
    path = folder / FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise MeasurementError(
            f"cannot write {path}: {error.strerror}; choose another output_dir"
        ) from None
    if not take(file):
        with file:
            file.seek(0)
            holder = file.read().strip() or "another command"
        raise MeasurementError(
            f"{folder} is in use by {holder}; wait for it to end, or choose another output_dir"
        )
    file.truncate(0)
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(f"process {os.getpid()} on {platform.node()} since {started} ({command})\n")
    file.flush()
    return file
