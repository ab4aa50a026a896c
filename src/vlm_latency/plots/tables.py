"""Tables as CSV and as LaTeX (booktabs)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd

from vlm_latency.plots.notation import number

_ESCAPED = str.maketrans(
    {
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "\\": r"\textbackslash{}",
        "×": r"$\times$",
        "≥": r"$\geq$",
        "µ": r"\textmu{}",
        "±": r"$\pm$",
        "−": r"$-$",
    }
)


def to_csv(table: pd.DataFrame) -> str:
    """Write a table as CSV, numbers in full."""
    return table.to_csv(index=False, lineterminator="\n")


def to_latex(table: pd.DataFrame) -> str:
    r"""Write a table as a booktabs `tabular`, numbers to four digits and right-aligned.

    Examples
    --------
    >>> print(to_latex(pd.DataFrame({"part": ["T_total"], "ms": [12.345678]})))
    \begin{tabular}{lr}
    \toprule
    part & ms \\
    \midrule
    T\_total & 12.35 \\
    \bottomrule
    \end{tabular}
    """
    numeric = [pd.api.types.is_numeric_dtype(table[name]) for name in table]
    lines = [
        rf"\begin{{tabular}}{{{''.join('r' if right else 'l' for right in numeric)}}}",
        r"\toprule",
        _row(table.columns),
        r"\midrule",
        *(_row(row) for row in table.itertuples(index=False)),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines)


def _row(cells: Iterable[Any]) -> str:
    return " & ".join(_cell(cell) for cell in cells) + r" \\"


def _cell(value: Any) -> str:
    if pd.isna(value):
        return "--"
    if isinstance(value, bool | str):
        return str(value).translate(_ESCAPED)
    if isinstance(value, int):
        return str(value)
    return (
        number(float(value), 4) if hasattr(value, "__float__") else str(value).translate(_ESCAPED)
    )
