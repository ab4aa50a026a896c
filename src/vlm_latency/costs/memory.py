"""What is known of an architecture's costs, kept between runs.

One JSON file per architecture in ``costs/`` below the user's cache folder
(`vlm_latency.contents.cache_folder`). A file's name is the hash of all that its content follows from: the configuration, which
module is which, the versions of torch and transformers, and the source code that counts. It is
replaced whole, and one that is damaged is as good as none.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from vlm_latency.contents import cache_folder, keep_text

SECTIONS = ("census", "parameters", "images", "prefill", "step", "checks")


class Memory:
    """Sections of remembered values by name; see the module's docstring.

    Parameters
    ----------
    path : Path or None
        None: remembered in this object only.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.sections: dict[str, dict[str, Any]] = self._read()
        self._saved = self._sizes()

    @classmethod
    def of(cls, architecture: Any) -> Memory:
        """Read what was remembered of an architecture that a configuration describes."""
        folder = cache_folder()
        if folder is None or getattr(architecture, "own_modules", True):
            return cls(None)
        known = json.dumps(
            [
                architecture.config,
                str(architecture.component_overrides),
                version("torch"),
                version("transformers"),
                _source(),
            ],
            sort_keys=True,
            default=str,
        )
        return cls(folder / "costs" / f"{hashlib.sha256(known.encode()).hexdigest()[:32]}.json")

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
        found: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
        try:
            whole = json.loads(self.path.read_text()) if self.path else {}
            if whole and _digest(whole["content"]) == whole["sha256"]:
                found |= json.loads(whole["content"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass
        return found

    def _sizes(self) -> list[int]:
        return [len(self.sections[section]) for section in SECTIONS]


@cache
def _source() -> str:
    """Hash of the code that counts: what an older version found is not taken for this one's."""
    digest = hashlib.sha256()
    for package in ("costs", "models", "molmo"):
        folder = files("vlm_latency") / package
        for file in sorted(folder.iterdir(), key=lambda file: file.name):
            if file.name.endswith(".py"):
                digest.update(file.read_bytes())
    return digest.hexdigest()


def _digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()
