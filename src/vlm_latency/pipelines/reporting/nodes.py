"""One report per experiment, and the page over all of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from typing import Any

log = logging.getLogger("vlm_latency")


def report_of(experiment: str) -> Callable[..., Any]:
    """Find the report of an experiment: ``report`` in this package's module of its name."""
    found: Callable[..., Any] = import_module(f"{__package__}.{experiment}").report
    return found


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

    for name, study in results.items():
        coverage = (study.result or {}).get("coverage") or {}
        if coverage.get("failed"):
            reasons = "; ".join(
                f"{count} × {reason}" for reason, count in coverage["failures"].items()
            )
            log.warning(
                "%s: %d of %d runs failed and are in no statistic: %s",
                name,
                coverage["failed"],
                coverage["planned"],
                reasons,
            )
    return build_page(results)
