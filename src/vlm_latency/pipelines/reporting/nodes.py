"""One report per experiment, and the page over all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vlm_latency.pipelines.reporting import exp1, exp2, exp3, exp4, exp5

REPORTS: dict[str, Callable[..., Any]] = {
    "exp1": exp1.report,
    "exp2": exp2.report,
    "exp3": exp3.report,
    "exp4": exp4.report,
    "exp5": exp5.report,
}


def publish(results: dict[str, Any], *made: Any) -> str:
    """Write the page from whatever results lie under the output folder.

    Parameters
    ----------
    results
        What ``page.collect_results`` finds.
    made
        Results of this command; that they are on disk is all that matters.
    """
    from vlm_latency.page import build_page

    return build_page(results)
