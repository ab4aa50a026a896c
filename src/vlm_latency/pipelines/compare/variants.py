"""Variants of a model, measured in turn in one process, so that a small difference can be told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pandas as pd

from vlm_latency.journal import BEGAN, RUN
from vlm_latency.options import ExperimentOptions, Options
from vlm_latency.pipelines.measurement.nodes import (
    begun,
    covered,
    in_order,
    measured_in,
    plan_runs,
    say_what_lies_there,
    worth_measuring,
)
from vlm_latency.records import ok_rows, with_hashes

if TYPE_CHECKING:
    from vlm_latency.api import ModelComparison
    from vlm_latency.datasets.record_log import Chunk
    from vlm_latency.datasets.variants import Variants
    from vlm_latency.journal import Journal
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


def describe_variants(settings: Options, runs: Compared) -> dict[str, Any]:
    """Record on what, and under which conditions, the variants are measured.

    Returns
    -------
    dict
        ``variants``: the environment of each by name; ``conditions``: what of all of them could
        change a number, and ``fingerprint`` its hash. Empty for results folders.
    """
    if isinstance(runs, list):
        return {}
    from vlm_latency.instrument.environment import environment, fingerprint

    found = {
        name: environment(
            handle.options,
            _options(settings).measurement,
            architecture=handle.architecture,
            dataset=runs.questions.describe(),
            template=settings.prompt.template,
        )
        for name, handle in runs.models.items()
    }
    conditions = {name: about["conditions"] for name, about in found.items()}
    return {"variants": found, "conditions": conditions, "fingerprint": fingerprint(conditions)}


def measure_variants(
    settings: Options, runs: Compared, environment: dict[str, Any], journal: Journal
) -> Iterator[Chunk]:
    """Make the runs that the journal lacks, with all variants one right after the other.

    A run is made again with all of them where one of them has none: pairs are neighbours in time.

    Parameters
    ----------
    runs
        Variants; or results folders, of which nothing is measured.

    Yields
    ------
    Chunk
        Runs as they finish, ``model`` the name of the variant.
    """
    if isinstance(runs, list):
        return
    from vlm_latency.instrument.protocol import interleave
    from vlm_latency.vqa.images import image_bytes

    options, requests = _options(settings), draw(settings, runs)
    plan, mark = plan_runs(options, requests), environment["fingerprint"]
    head = {"fingerprint": mark, "conditions": environment["conditions"]}
    say_what_lies_there(options, environment, journal)
    finished = journal.read(mark)
    count = ok_rows(finished).groupby(RUN)["model"].nunique()
    held = plan[RUN].merge(count[count == len(runs.models)].reset_index()[RUN], on=RUN)
    if not worth_measuring(options, len(held), len(plan)):
        return
    told = {name: begun(about) for name, about in environment["variants"].items()}
    yield {**head, "rows": [], "session": {BEGAN: told}}  # type: ignore[typeddict-item]
    done = set(zip(held["request_id"], held["run_index"], strict=True))
    keys = zip(plan["request_id"], plan["run_index"], strict=True)
    for rows in interleave(
        {name: handle.vlm for name, handle in runs.models.items()},
        requests,
        options.measurement,
        left=plan[[key not in done for key in keys]],
        start_index=0 if finished.empty else int(finished["order_index"].max()) + 1,
        fetch=lambda row: image_bytes(row, runs.questions.root),
        template=settings.prompt.template,
        fingerprint=mark,
    ):
        yield {**head, "rows": rows}  # type: ignore[typeddict-item]


def collect_variants(
    settings: Options, runs: Compared, environment: dict[str, Any], journal: Journal
) -> tuple[pd.DataFrame, dict[str, Any], dict[str, dict[str, Any]]]:
    """Gather the runs of all variants, and refuse to go on with a part of them.

    Returns
    -------
    records : DataFrame
        Columns ``records.MEASURED_COLUMNS``.
    coverage : dict
        How many runs were planned, measured and failed.
    environments : dict
        Of each variant, by the command that measured (`measured_in`). All three are empty for
        results folders.

    Raises
    ------
    MeasurementError
        When runs are missing and ``measurement.allow_partial`` is not set.
    """
    if isinstance(runs, list):
        return pd.DataFrame(), {}, {}
    options = _options(settings)
    plan = plan_runs(options, draw(settings, runs))
    found = in_order(journal.read(environment["fingerprint"]), plan)
    coverage = covered(options, len(plan) * len(runs.models), found)
    began = journal.began(environment["fingerprint"])
    about = {
        name: measured_in(each, [said[name] for said in began], found[found["model"] == name])
        for name, each in environment["variants"].items()
    }
    return found, coverage, about


def judge(settings: Options, variants: Variants, measured: pd.DataFrame) -> ModelComparison:
    """Compare each variant with the first over the pairs of runs."""
    from vlm_latency.api import ModelComparison

    done = ok_rows(measured)
    records = {name: done[done["model"] == name] for name in variants.models}
    return ModelComparison.of(records, settings.compare.margin)


def _options(settings: Options) -> ExperimentOptions:
    """Give what settles a measurement; how much is measured stands in ``compare.*``."""
    asked, options = settings.compare, settings.experiment("compare")
    changed = {"num_runs": asked.num_runs, "output_length": str(asked.output_tokens)}
    measurement = options.measurement.model_copy(update=changed)
    return options.model_copy(update={"measurement": measurement})
