"""Variants of a model, measured in turn in one process, so that a small difference can be told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from vlm_latency.options import MeasurementOptions, Options
from vlm_latency.records import ok_rows, with_hashes

if TYPE_CHECKING:
    from vlm_latency.api import ModelComparison
    from vlm_latency.datasets.variants import Variants
    from vlm_latency.models import ModelHandle
    from vlm_latency.results import Run

    Compared = list[Run] | Variants


def draw(settings: Options, variants: Variants) -> pd.DataFrame:
    """Draw the questions that every variant is asked, one of an image.

    Raises
    ------
    DataError
        When there are not as many as asked for.
    """
    from vlm_latency import vqa

    asked = settings.compare
    sampling = vqa.Sampling(num_samples=asked.num_samples, one_question_per_image=True)
    length = str(asked.output_tokens)
    return with_hashes(vqa.draw_requests(variants.questions, sampling, length, "compare"))


def measure_variants(settings: Options, runs: Compared) -> pd.DataFrame:
    """Make every run with all variants, one right after the other in random order.

    Parameters
    ----------
    runs
        Variants; or results folders, of which nothing is measured.

    Returns
    -------
    DataFrame
        Columns ``records.MEASURED_COLUMNS``, ``model`` the name of the variant; empty for folders.
    """
    if isinstance(runs, list):
        return pd.DataFrame()
    from vlm_latency.api import compare

    given = settings.measurement.model_dump(exclude={"num_runs", "output_length"})
    models: Any = {name: handle.vlm for name, handle in runs.models.items()}
    found = compare(
        models,
        draw(settings, runs),
        num_runs=settings.compare.num_runs,
        prompt=settings.prompt.template,
        folder=runs.questions.root,
        margin=settings.compare.margin,
        progress=True,
        **given,
    )
    return pd.concat(found.records.values(), ignore_index=True)


def judge(settings: Options, variants: Variants, measured: pd.DataFrame) -> ModelComparison:
    """Compare each variant with the first over the pairs of runs."""
    from vlm_latency.api import ModelComparison

    done = ok_rows(measured)
    records = {name: done[done["model"] == name] for name in variants.models}
    return ModelComparison.of(records, settings.compare.margin)


def environments(settings: Options, variants: Variants) -> dict[str, dict[str, Any]]:
    """Record hardware, software and settings of each variant."""
    from vlm_latency.instrument.environment import environment

    return {
        name: environment(
            handle.options,
            _measurement(settings, handle),
            architecture=handle.architecture,
            dataset=variants.questions.describe(),
            template=settings.prompt.template,
        )
        for name, handle in variants.models.items()
    }


def _measurement(settings: Options, handle: ModelHandle) -> MeasurementOptions:
    asked = settings.compare
    settled = settings.experiment("compare", handle.weights).measurement
    length = str(asked.output_tokens)
    return settled.model_copy(update={"num_runs": asked.num_runs, "output_length": length})
