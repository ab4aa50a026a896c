"""Find results by their known names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_latency.errors import DataError
from vlm_latency.experiments import studies
from vlm_latency.results import read_json, result_path


@dataclass(frozen=True)
class Study:
    """What lies on disk of one experiment or analysis.

    Parameters
    ----------
    name : str
        A row of `vlm_latency.experiments`.
    result : dict or None
        Its JSON file; None when it cannot be read, and `problem` then says why.
    figures : tuple of Path
        Its PNG files; a PDF of the same name may lie beside each.
    tables : tuple of Path
        Its CSV files.
    files : tuple of str
        All of its files, relative to the results folder.
    """

    name: str
    result: dict[str, Any] | None
    figures: tuple[Path, ...] = ()
    tables: tuple[Path, ...] = ()
    files: tuple[str, ...] = ()
    problem: str = ""


def collect_results(root: str | Path) -> dict[str, Study]:
    """Read the results under a folder; what was not run is absent.

    A file that cannot be read does not hide the others: its study says so.
    """
    root = Path(root)
    found = {}
    for name in studies():
        folder, path = root / name, result_path(root, name)
        if not path.is_file():
            continue
        result, problem = _read(path)
        figures = tuple(_visible(folder / "figures", "*.png"))
        tables = tuple(_visible(folder / "tables", "*.csv"))
        beside = [p for p in _visible(folder, "*") if p != path]
        drawn = [p for figure in figures for p in (figure, figure.with_suffix(".pdf"))]
        written = [p for table in tables for p in (table, table.with_suffix(".tex"))]
        files = [p for p in (path, *beside, *drawn, *written) if p.is_file()]
        found[name] = Study(
            name,
            result,
            figures,
            tables,
            tuple(p.relative_to(root).as_posix() for p in files),
            problem,
        )
    return found


def _visible(folder: Path, pattern: str) -> list[Path]:
    """List files but those whose name begins with a dot: half-written ones and locks."""
    return sorted(
        path for path in folder.glob(pattern) if path.is_file() and not path.name.startswith(".")
    )


def _read(path: Path) -> tuple[dict[str, Any] | None, str]:
    try:
        result = read_json(path)
    except DataError as error:
        return None, f"{path.name} cannot be read: {error}"
    if not isinstance(result, dict):
        kind = type(result).__name__
        return None, f"{path.name} holds a {kind}; expected an object with results"
    return result, ""
