"""Which requests an experiment makes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from vlm_latency.errors import DataError
from vlm_latency.options import ExperimentOptions
from vlm_latency.pipelines.data_sampling.rules import number, rule_of, too_long
from vlm_latency.records import with_hashes

if TYPE_CHECKING:
    from vlm_latency.models import ModelHandle
    from vlm_latency.vqa import QuestionSource


def draw_requests(
    options: ExperimentOptions[Any],
    questions: QuestionSource,
    model: ModelHandle,
    given: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Draw the requests of one experiment, or take a table of them made before.

    Returns
    -------
    DataFrame
        Columns ``records.REQUEST_COLUMNS``, one row per request.

    Raises
    ------
    DataError
        When there are not as many questions as asked for, or no output length fits the model.
    """
    rule = rule_of(options)
    requests = rule.draw(options, questions, model) if given is None else given
    if rule.drops(options):
        requests = _fitting(requests, too_long(options, model, given), options, model)
    return with_hashes(requests)


def _fitting(
    requests: pd.DataFrame,
    long: dict[int, int],
    options: ExperimentOptions[Any],
    model: ModelHandle,
) -> pd.DataFrame:
    """Leave the lengths out that do not fit the model."""
    kept = requests[~requests["output_length"].map(number).isin(long)].reset_index(drop=True)
    if kept.empty:
        raise DataError(
            f"{options.experiment}: none of the output lengths "
            f"({', '.join(map(str, sorted(long)))}) fits the {model.architecture.max_positions} "
            f"positions of {model.architecture.name}"
        )
    return kept
