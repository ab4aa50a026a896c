"""What all figures share: colours, units, sizes, header and footer, numbers with their intervals.

Figures are bare `matplotlib.figure.Figure` objects: no pyplot, no global state, safe in any thread.
"""

from __future__ import annotations

import hashlib
import io
import math
import pickle
import re
import textwrap
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LogLocator, NullLocator
from matplotlib.transforms import ScaledTranslation, TransformNode
from numpy.typing import NDArray

from vlm_latency.option_groups import FigureOptions
from vlm_latency.plots.notation import Statistic, ends

if TYPE_CHECKING:
    from vlm_latency.statistics import BandedFit

# Okabe and Ito's colours (2008), told apart with every common colour vision. One per quantity.
COLOURS = {
    "T_vision_encoder": "#0072B2",
    "T_projector": "#56B4E9",
    "T_LLM_prefill": "#E69F00",
    "T_LLM_decode": "#D55E00",
    "T_LLM_decode_forward": "#D55E00",
    "T_LLM_decode_between": "#F3B48B",
    "T_other": "#999999",
    "T_preprocess": "#CC79A7",
    "T_first_token": "#009E73",
    "T_vision_total": "#0072B2",
    "T_total": "#333333",
}
# Several results in one panel, in Okabe and Ito's colours again.
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333", "#882255")
ALARM = "#D55E00"
MUTED = "#767676"

PAPER_WIDTHS = {1: 3.3, 2: 6.9}  # inches; one column of a two-column page, or both
PANEL = (3.9, 3.1)  # inches, width and height of one panel
PAPER_PANEL_HEIGHT = 2.2  # legends stand below the panels
LEGEND_BELOW = 0.36  # inches under the axes: past the ticks and the label


@dataclass(frozen=True)
class FigureContext:
    """What a figure has to say about where its numbers come from.

    Parameters
    ----------
    environment_line : str
        The footer: device, threads, versions, commit, date.
    marks : tuple of str
        Warnings that are true of the numbers: "synthetic", "random weights", "partial", …
    model : str
        The model's name.
    finding : str
        What was found, in a sentence that the verdict of a claim allows: the title.
    """

    environment_line: str = ""
    marks: tuple[str, ...] = ()
    model: str = ""
    finding: str = ""

    @property
    def title(self) -> str:
        """The model and what was found of it."""
        return ": ".join(part for part in (self.model, self.finding) if part)


@dataclass(frozen=True)
class Style:
    """How figures look.

    Parameters
    ----------
    paper : bool
        For a paper: without title and footer, which stand in the caption beside the figure (model
        and marks stay: they are not decoration), legends below the panels.
    columns : int
        Of the paper's page that the figure fills: 1 or 2.
    chosen : tuple of str
        Names of the panels to draw; empty for all. A figure that has none of them is drawn whole.
    dpi : int
        Of the PNG.
    vision_axis : str
        "tokens" that enter the LLM, or "patches" that leave the encoder (the seed's axis).
    """

    paper: bool = False
    dpi: int = 300
    vision_axis: Literal["tokens", "patches"] = "tokens"
    columns: Literal[1, 2] = 1
    chosen: tuple[str, ...] = ()

    @classmethod
    def of(cls, options: FigureOptions) -> Style:
        """Make the style that the user's options ask for."""
        return cls(
            options.style == "paper",
            options.dpi,
            options.vision_axis,
            options.columns,
            options.panels,
        )

    @property
    def font_size(self) -> float:
        """Size of ordinary text, in points."""
        return 7.0 if self.paper else 9.0

    def applied(self) -> AbstractContextManager[None]:
        """Return the context in which figures of this style are made and drawn."""
        size = self.font_size
        settings: dict[Any, Any] = {
            "font.family": "DejaVu Sans",  # ships with matplotlib: the same letters everywhere
            "font.size": size,
            "text.parse_math": False,  # names of models and folders may hold any mark
            "axes.titlesize": size,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.labelsize": size,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "axes.grid": True,
            "grid.color": "#e4e4e4",
            "grid.linewidth": 0.6,
            "xtick.labelsize": size - 1,
            "ytick.labelsize": size - 1,
            "legend.fontsize": size - 1.5,
            "legend.title_fontsize": size - 1.5,
            "legend.frameon": True,
            "legend.framealpha": 0.85,
            "legend.edgecolor": "none",
            "lines.linewidth": 1.0 if self.paper else 1.5,
            "lines.markersize": 3 if self.paper else 4,
            "pdf.fonttype": 42,  # TrueType: editable, and what publishers ask for
            "ps.fonttype": 42,
        }
        return matplotlib.rc_context(settings)


class _Contents(pickle.Pickler):
    """Writes a figure without the addresses of its objects, which differ each time."""

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, TransformNode):
            return NotImplemented
        return object.__new__, (type(obj),), {**vars(obj), "_parents": None}


class ReportFigure(Figure):
    """A figure that keeps its style wherever it is drawn or saved, and knows its caption.

    Ticks are made while drawing and fonts are embedded while saving; both follow the settings of
    that moment, which are then the caller's.
    """

    def __init__(self, style: Style, about: Sequence[str], **kwargs: Any) -> None:
        self.style = style
        self._about = about
        self._headings: list[str] = []
        with style.applied():
            super().__init__(dpi=style.dpi, **kwargs)

    def draw(self, renderer: Any) -> None:
        """Draw under the figure's own settings."""
        with self.style.applied():
            super().draw(renderer)

    def savefig(self, fname: Any, **kwargs: Any) -> None:
        """Save under the figure's own settings, at its style's resolution; laid out once."""
        with self.style.applied():
            if engine := self.get_layout_engine():
                engine.execute(self)
                self.set_layout_engine(None)
            super().savefig(fname, **kwargs)

    @property
    def contents(self) -> str:
        """A hash of all that the drawing depends on: artists, settings, code; empty if unknown."""
        buffer = io.BytesIO()
        try:
            _Contents(buffer).dump(self)
        except (pickle.PicklingError, AttributeError, TypeError):  # holds a function without a name
            return ""
        with self.style.applied():
            settings = f"{matplotlib.__version__} {sorted(matplotlib.rcParams.items())}".encode()
        code = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
        return hashlib.sha256(buffer.getvalue() + settings + code).hexdigest()

    @property
    def caption(self) -> str:
        """What stands under the figure in a paper: the finding, the panels, where it is from."""
        said = [*self._about[:1], *self._headings, *self._about[1:]]
        ended = (text.strip() if text.strip()[-1:] in ".?" else f"{text.strip()}." for text in said)
        return " ".join(text for text in ended if len(text) > 1) + "\n"


def panels(
    style: Style,
    context: FigureContext,
    title: str,
    names: Sequence[Sequence[str]],
    *,
    heights: Sequence[float] | None = None,
    widths: Sequence[float] | None = None,
    panel: tuple[float, float] = PANEL,
    reading: str = "",
) -> tuple[Figure, dict[str, Axes]]:
    """Make a figure with a header, a footer and lettered panels between them.

    Parameters
    ----------
    title : str
        The finding with its number; wrapped to the figure's width, in a paper the caption's.
    names : rows of names
        Where each panel lies; a name that fills several cells spans them. In a paper as many
        stand side by side as the figure has columns, and chosen ones stand below each other.
    heights, widths : sequence of float, optional
        Relative sizes of the rows and columns.
    panel : (float, float)
        Inches; width and height of a cell of relative size 1.
    reading : str
        What the caption says of how to read it.

    Returns
    -------
    Figure and dict of Axes
        The axes of the chosen panels by name. Use within ``style.applied()``.
    """
    row_sizes = list(heights or [1.0] * len(names))
    order = list(dict.fromkeys(name for row in names for name in row))
    chosen = [name for name in order if name in style.chosen] or order
    grid = [list(row) for row in names]
    if style.paper or chosen != order:
        across = min(style.columns, len(chosen)) if style.paper else 1
        row_of = {name: i for i, row in reversed(list(enumerate(names))) for name in row}
        cells = [*chosen, *["."] * (-len(chosen) % across)]  # a full stop leaves a cell empty
        grid = [cells[i : i + across] for i in range(0, len(cells), across)]
        row_sizes = [max(row_sizes[row_of[name]] for name in row if name != ".") for row in grid]
        widths = None
    width, unit = panel[0] * sum(widths or [1.0] * len(grid[0])), panel[1]
    if style.paper:
        width, unit = PAPER_WIDTHS[style.columns], PAPER_PANEL_HEIGHT * panel[1] / PANEL[1]
    header = _header_lines(style, context, title, width)
    footer = [] if style.paper else _wrapped(context.environment_line, width, style.font_size - 2)
    top = sum(size * 1.3 / 72 for _, size, _ in header) + (0.12 if header else 0.02)
    bottom = len(footer) * (style.font_size - 2) * 1.3 / 72 + (0.08 if footer else 0.02)
    height = unit * sum(row_sizes) + top + bottom

    body = (0, bottom / height, 1, 1 - (top + bottom) / height)
    layout = ConstrainedLayoutEngine(rect=body, w_pad=0.06, h_pad=0.06)
    marks = "; ".join(context.marks)
    about = (title, reading, marks[:1].upper() + marks[1:], context.environment_line)
    figure = ReportFigure(style, about, figsize=(width, height), layout=layout)
    y = height - 0.06
    for text, size, kind in header:
        bold, colour = ("bold", "black") if kind == "title" else ("normal", ALARM)
        figure.text(
            0.08 / width,
            y / height,
            text,
            size=size,
            weight=bold,
            color=colour,
            va="top",
            ha="left",
        )
        y -= size * 1.3 / 72
    if footer:
        figure.text(
            0.08 / width,
            0.05 / height,
            "\n".join(footer),
            size=style.font_size - 2,
            color=MUTED,
            va="bottom",
            ha="left",
        )
    mosaic: Any = grid
    axes = figure.subplot_mosaic(
        mosaic, height_ratios=row_sizes, width_ratios=list(widths) if widths else None
    )
    return figure, axes


def _header_lines(
    style: Style, context: FigureContext, title: str, width: float
) -> list[tuple[str, float, str]]:
    size = style.font_size
    lines = []
    if not style.paper:
        lines = [(t, size + 3, "title") for t in _wrapped(title, width, size + 3, bold=True)]
    marks = [context.model, *context.marks] if style.paper and context.model else context.marks
    if marks:
        lines += [(line, size, "marks") for line in _wrapped(" · ".join(marks), width, size)]
    return lines


def _wrapped(text: str, width: float, size: float, *, bold: bool = False) -> list[str]:
    """Break lines by the mean width of a letter, but not between a number and its unit."""
    glued = re.sub(r" (?=(?:ms|µs|%|=|\[))|(?<=[=,×]) (?=[\d?])", "\N{NO-BREAK SPACE}", text)
    letter = (0.63 if bold else 0.55) * size / 72
    return textwrap.wrap(glued, max(20, int((width - 0.2) / letter)))


def headline(axes: Axes, text: str) -> None:
    """Give a panel its letter and its wrapped heading."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    if len(figure.axes) > 1:
        text = f"({'abcdefghijkl'[figure.axes.index(axes)]}) {text}"
    if isinstance(figure, ReportFigure):
        figure._headings.append(text)
    cell = axes.get_subplotspec()
    assert cell is not None
    ratios = np.asarray(cell.get_gridspec().get_width_ratios(), dtype=float)
    share = ratios[cell.colspan.start : cell.colspan.stop].sum() / ratios.sum()
    width = figure.get_figwidth() * share - 0.5  # the y axis and its label stand left of it
    size = matplotlib.rcParams["axes.titlesize"]
    axes.set_title("\n".join(_wrapped(text, width, size, bold=True)))


def small() -> float:
    """Return the size of the smallest text, in points."""
    return float(matplotlib.rcParams["legend.fontsize"])


def legend(
    axes: Axes, loc: str = "upper left", *, title: str | None = None, reverse: bool = False
) -> None:
    """Draw a panel's legend where no data are: above them, in a paper below the panel."""
    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        return
    figure = axes.get_figure(root=True)
    if isinstance(figure, ReportFigure) and figure.style.paper:
        ticks = [label.get_text() for label in axes.get_xticklabels()]
        lines = max((text.count("\n") for text in ticks), default=0)
        depth = LEGEND_BELOW + 1.3 * lines * figure.style.font_size / 72
        below = ScaledTranslation(0, -depth, figure.dpi_scale_trans)
        short = max(map(len, labels)) <= 24 and len(labels) > 2
        place: dict[str, Any] = {
            "loc": "upper left",
            "bbox_to_anchor": (0, 0),
            "bbox_transform": axes.transAxes + below,
            "ncols": 2 if short else 1,
            "borderpad": 0,
        }
    else:
        headroom(axes, sum(text.count("\n") + 1 for text in (*labels, *([title] if title else []))))
        place = {"loc": loc}
    axes.legend(handles, labels, title=title, alignment="left", reverse=reverse, **place)


def headroom(axes: Axes, lines: int) -> None:
    """Leave the top of a panel free for a legend of so many lines."""
    figure, cell = axes.get_figure(root=True), axes.get_subplotspec()
    assert figure is not None and cell is not None
    engine = figure.get_layout_engine()
    body = engine.get()["rect"][3] if isinstance(engine, ConstrainedLayoutEngine) else 1.0
    rows = cell.get_gridspec().nrows
    height = body * figure.get_figheight() / rows - 0.8  # less heading and x axis
    share = min(0.65, (1.6 * small() * lines / 72 + 0.25) / height)
    to_axis = axes.yaxis.get_transform()
    low, high = to_axis.transform(np.array(axes.get_ylim()))
    top = to_axis.inverted().transform(np.array([low + (high - low) / (1 - share)]))[0]
    axes.set_ylim(top=float(top))


def nothing(axes: Axes, why: str = "not measured") -> None:
    """Say in an empty panel why it is empty."""
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", va="center", color=MUTED)
    axes.set_axis_off()


def plainly(value: float, _: float = 0) -> str:
    """Write a tick without an exponent where that is short."""
    return f"{value:g}"


def readable_log(*drawn: Axis) -> None:
    """Label logarithmic axes at 1, 2 and 5 times powers of ten, or at these, without exponents."""
    for axis in drawn:
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,)))
        axis.set_major_formatter(plainly)
        axis.set_minor_locator(NullLocator())


def whiskers(statistic: Statistic, scale: float = 1.0) -> NDArray[np.float64]:
    """Return the lengths of both error bars, shape (2, 1); zero where an end is not known."""
    value, low, high = ends(statistic)
    below = 0.0 if low is None else max(0.0, value - low)
    above = 0.0 if high is None else max(0.0, high - value)
    return scale * np.array([[below], [above]])


def column(records: pd.DataFrame, name: str) -> NDArray[np.float64]:
    """Return a column as floats, NaN where it was not measured or does not exist."""
    if name not in records:
        return np.full(len(records), math.nan)
    return pd.to_numeric(records[name]).to_numpy(dtype=float, na_value=math.nan)


def jitter(count: int, width: float) -> NDArray[np.float64]:
    """Return offsets within ± width / 2 that let equal points be seen side by side."""
    return np.random.default_rng(0).uniform(-width / 2, width / 2, count)


def point_style(count: int) -> dict[str, Any]:
    """Return how raw points look: the more, the fainter."""
    return {
        "s": 14 if count <= 200 else 6,
        "alpha": float(np.clip(60 / max(count, 1), 0.12, 0.7)),
        "linewidths": 0,
        "rasterized": count > 2_000,
    }


def draw_fit(
    axes: Axes, fit: BandedFit | None, colour: str, label: str, *, unit: float = 1.0
) -> None:
    """Draw a straight line with its band; nothing for None.

    Parameters
    ----------
    unit : float
        What the axis counts in: 1e9 for GFLOP.
    """
    if fit is None:
        return
    x = fit.band["x"]
    line = ends(fit.intercept)[0] + ends(fit.slope)[0] * x
    axes.plot(x / unit, line, color=colour, label=label, zorder=3)
    axes.fill_between(
        x / unit, fit.band["low"], fit.band["high"], color=colour, alpha=0.2, linewidth=0
    )
