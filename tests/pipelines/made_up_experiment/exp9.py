"""The report of a made-up experiment: how many runs there were."""

from typing import Any

import pandas as pd

from vlm_latency.options import ExperimentOptions
from vlm_latency.pipelines.reporting import common


def report(
    options: ExperimentOptions,
    records: pd.DataFrame,
    requests: pd.DataFrame,
    coverage: dict[str, Any],
    environment: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, pd.DataFrame]]:
    """Count the runs."""
    result = {
        "results": common.entry_dicts(common.entries(records, requests)),
        **common.frame(options, environment, coverage, {"runs": len(records)}, []),
    }
    return result, {"runs": records[["request_id", "T_total"]]}
