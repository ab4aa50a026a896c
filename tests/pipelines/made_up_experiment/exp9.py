"""The report of a made-up experiment: how many runs there were."""

from typing import Any

import pandas as pd

from vlm_latency.options import ExperimentOptions
from vlm_latency.pipelines.reporting import entries, results


def report(
    options: ExperimentOptions,
    records: pd.DataFrame,
    requests: pd.DataFrame,
    coverage: dict[str, Any],
    environment: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, pd.DataFrame]]:
    """Count the runs."""
    result = {
        "results": entries.entry_dicts(entries.averaged(records, requests)),
        **results.frame(options, environment, coverage, {"runs": len(records)}, []),
    }
    return result, {"runs": records[["request_id", "T_total"]]}
