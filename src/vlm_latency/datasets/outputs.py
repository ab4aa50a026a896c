"""Figures, tables and the page as Kedro datasets, each written whole or not at all."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import pandas as pd
from kedro_datasets._typing import HTMLPreview, ImagePreview

from vlm_latency.datasets.atomic import FileDataset, replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONTENTS = "Contents"  # the field of a PNG that holds the hash of what it shows


class FigureFile(FileDataset):
    """A matplotlib figure, saved as PNG and, beside it, as PDF; its caption as text.

    The PNG says of which contents it was drawn: a figure that is there already stays as it is.

    Parameters
    ----------
    filepath
        The PNG.
    dpi
        Resolution of the PNG, dots per inch.
    metadata
        Passed through to Kedro plugins.
    """

    def __init__(self, *, filepath: str, dpi: int = 300, metadata: dict[str, Any] | None = None):
        super().__init__(filepath=filepath, metadata=metadata)
        self._dpi = dpi

    def load(self) -> bytes:
        return self._path.read_bytes()

    def save(self, data: Figure) -> None:
        contents = f"{self._dpi} {known}" if (known := getattr(data, "contents", "")) else ""
        pdf = self._path.with_suffix(".pdf")
        if not (contents and pdf.exists() and self._drawn_of() == contents):
            # Last comes the file that says of both what they show.
            with replacing(pdf) as temporary:
                data.savefig(temporary, format="pdf")
            with replacing(self._path) as temporary:
                said = {CONTENTS: contents}
                data.savefig(temporary, format="png", dpi=self._dpi, metadata=said)
        if caption := getattr(data, "caption", ""):
            with replacing(self._path.with_suffix(".txt")) as temporary:
                temporary.write_text(caption, encoding="utf-8")

    def _drawn_of(self) -> str | None:
        """Read what the PNG says of its contents; None where it is missing or damaged."""
        from PIL import Image

        try:
            with Image.open(self._path) as image:
                image.verify()
                return image.info.get(CONTENTS)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return None

    def preview(self) -> ImagePreview:
        """Show the figure in Kedro-Viz."""
        return ImagePreview(base64.b64encode(self.load()).decode())


class FigureFolder(FileDataset):
    """Figures by name in one folder, where which ones there are depends on the data.

    Those of an earlier command that this one has not drawn are removed.

    Parameters
    ----------
    filepath
        The folder.
    dpi
        As of `FigureFile`.
    metadata
        Passed through to Kedro plugins.
    """

    def __init__(self, *, filepath: str, dpi: int = 300, metadata: dict[str, Any] | None = None):
        super().__init__(filepath=filepath, metadata=metadata)
        self._dpi = dpi

    def load(self) -> NoReturn:
        raise NotImplementedError("figures are drawn for people; read the records or the result")

    def save(self, data: Mapping[str, Figure]) -> None:
        study = self._path.parent.name
        for path in self._path.glob(f"{study}_*"):
            if path.stem not in data:
                path.unlink()
        for name, figure in data.items():
            FigureFile(filepath=str(self._path / f"{name}.png"), dpi=self._dpi).save(figure)


class TableFolder(FileDataset):
    """Tables by name, each as CSV and LaTeX (booktabs); one without columns is no file."""

    def load(self) -> NoReturn:
        raise NotImplementedError("tables are written for people; read the records or the result")

    def save(self, data: Mapping[str, pd.DataFrame]) -> None:
        from vlm_latency.plots.tables import to_csv, to_latex

        for name, table in data.items():
            for suffix, write in ((".csv", to_csv), (".tex", to_latex)):
                path = self._path / f"{name}{suffix}"
                if table.columns.empty:
                    path.unlink(missing_ok=True)
                    continue
                with replacing(path) as temporary:
                    temporary.write_text(write(table), encoding="utf-8")

    def preview(self) -> HTMLPreview:
        """Show all tables in Kedro-Viz."""
        found = [
            f"<h3>{path.stem}</h3>{pd.read_csv(path).to_html(index=False, na_rep='')}"
            for path in sorted(self._path.glob("*.csv"))
        ]
        return HTMLPreview("".join(found))


class HTMLPage(FileDataset):
    """One HTML page."""

    def load(self) -> str:
        return self._path.read_text(encoding="utf-8")

    def save(self, data: str) -> None:
        with replacing(self._path) as temporary:
            temporary.write_text(data, encoding="utf-8")

    def preview(self) -> HTMLPreview:
        """Show the page in Kedro-Viz."""
        return HTMLPreview(self.load())
