"""Tables as CSV and as LaTeX (booktabs)."""

from __future__ import annotations

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
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "\n": " ",
        "\r": " ",
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
    kinds = ["r" if pd.api.types.is_numeric_dtype(table[name]) else "l" for name in table]
    return (
        table.astype(object)
        .map(_cell)
        .rename(columns=_cell)
        .to_latex(index=False, escape=False, column_format="".join(kinds))
        .rstrip("\n")
    )


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
