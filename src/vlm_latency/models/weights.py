"""Whether the weights of a local checkpoint arrived whole: their files' headers, before loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlm_latency.errors import ModelError

INDEX = "model.safetensors.index.json"
_LFS = b"version https://git-lfs"


def check_weights(folder: Path) -> None:
    """Refuse a checkpoint whose files are not all there; a hub id is not looked at.

    Raises
    ------
    ModelError
        Naming folder and file: a Git LFS pointer, half a file, a pickle, or an index that names
        what is absent or lies elsewhere.
    """
    if not folder.is_dir():
        return
    files = _named(folder) or sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = ", ".join(sorted(path.name for path in folder.glob("*.bin"))) or "none"
        raise ModelError(
            f"{folder} has no safetensors (pickled weights there: {pickles}); convert the checkpoint "
            "to safetensors, or use model.weights=random"
        )
    for path in files:
        _check_file(path)


def few(names: list[str]) -> str:
    """Give the first of many names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _named(folder: Path) -> list[Path]:
    """The files that an index names."""
    path = folder / INDEX
    if not path.is_file():
        return []
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
        files = sorted({str(name) for name in names})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} is not an index of weights: {error}; fetch it again") from None
    if foreign := [name for name in files if Path(name).name != name or "\\" in name]:
        raise ModelError(
            f"{path} names weights outside its folder ({few(foreign)}); expected files beside it"
        )
    if pickles := [name for name in files if not name.endswith(".safetensors")]:
        raise ModelError(
            f"{path} names {few(pickles)}; expected safetensors files: pickles run code when loaded"
        )
    return [folder / name for name in files]


def _check_file(path: Path) -> None:
    """Compare a file's size with what its header says that it holds."""
    length = 0
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if start + file.read(len(_LFS) - 8) == _LFS:
                raise ModelError(
                    f"{path} is a Git LFS pointer, not weights; run 'git lfs pull' there"
                )
            file.seek(8)
            length = int.from_bytes(start, "little")
            header: dict[str, Any] = json.loads(file.read(length)) if length < size else {}
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from None
    except ModelError:
        raise
    except (ValueError, RecursionError):
        header = {}
    try:
        ends = [each["data_offsets"][1] for name, each in header.items() if name != "__metadata__"]
        expected = 8 + length + max(ends)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise ModelError(f"{path} is not a whole safetensors file; fetch it again") from None
    if size != expected:
        raise ModelError(
            f"{path} has {size:,} bytes, and its header says {expected:,}: it did not arrive whole; "
            "fetch it again"
        )
