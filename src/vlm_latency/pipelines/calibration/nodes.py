"""What the machine can do, and how far the instrument's numbers can be trusted on it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from vlm_latency.option_groups import CalibrationOptions
from vlm_latency.options import ExperimentOptions, Options
from vlm_latency.workers.asked import needs_workers, settled

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from vlm_latency.models import ModelHandle
    from vlm_latency.vqa import QuestionSource

log = logging.getLogger("vlm_latency")


def measure_ceilings(
    settings: Options, model: ModelHandle, known: dict[str, Any] | None
) -> dict[str, Any]:
    """Measure the machine's ceilings: a large matmul, a large copy, the cost of a launch.

    Parameters
    ----------
    known
        What was measured before; it is used again where device, dtype and threads are the same.

    Returns
    -------
    dict
        ``flops_per_s``, ``bytes_per_s`` and ``launch_overhead_us`` with their intervals, and what
        they were measured on; empty for the null model, which runs on nothing.
    """
    if model.architecture.simulated:
        return {}
    from vlm_latency.instrument.ceilings import ceilings
    from vlm_latency.models import thread_count

    device, dtype = model.device, model.dtype
    spread = needs_workers(settings.measurement, settings.ray)
    shared = settled(model, settings.measurement, settings.ray) if spread else model.options
    threads = thread_count(shared, device)
    asked = {"device": device, "dtype": dtype, "threads": threads}
    if known and asked.items() <= known.items():
        return known
    seconds = settings.calibration.ceiling_seconds
    if spread:
        return {**_ceilings_of_workers(settings, model, seconds), **asked}
    log.info("ceilings: measuring what %s can do in %s, about %.0f s", device, dtype, seconds)
    return {**ceilings(device, dtype, threads, seconds), **asked}


def _ceilings_of_workers(settings: Options, model: ModelHandle, seconds: float) -> dict[str, Any]:
    """Let every worker measure its own device; what holds for the table is the first one's."""
    from vlm_latency.workers.pool import pool_of

    pool = pool_of(model, settings.measurement, settings.ray)
    log.info("ceilings: measuring what %s can do, about %.0f s", pool.line(), seconds)
    found = pool.ceilings(seconds)
    return {**found[0], "workers": found}


def _beside_a_worker(
    found: dict[str, Any],
    options: ExperimentOptions,
    asked: CalibrationOptions,
    model: ModelHandle,
    requests: pd.DataFrame,
    questions: QuestionSource,
) -> None:
    """Add to what a calibration found whether runs take as long in a worker."""
    from vlm_latency.records import plain_rows
    from vlm_latency.workers.gate import comparison, sentence
    from vlm_latency.workers.pool import pool_of
    from vlm_latency.workers.worker import Work, Worker

    log.info("calibration: beside a worker")
    measurement = options.measurement.model_copy(update={"method": "timeline"})
    shared = settled(model, options.measurement, options.ray)
    compared, same_device = comparison(
        pool_of(model, options.measurement, options.ray),
        Worker(1, shared, ".", model),
        Work(requests, measurement, questions.root, options.prompt.template, ""),
        plain_rows(requests),
        pairs=asked.pairs,
        seconds=asked.proof_seconds,
        half_width=asked.half_width,
    )
    found["statistics"]["workers"] = compared.to_dict()
    found["verdict"] = [*found["verdict"], sentence(compared, same_device)]


def calibrate(
    options: ExperimentOptions,
    settings: Options,
    model: ModelHandle,
    questions: QuestionSource,
    ceilings: dict[str, Any],
) -> tuple[dict[str, Any], Figure]:
    """Prove the instrument on the model and device at hand.

    Returns
    -------
    result, figure
        ``calibration.json`` with a verdict in words, and the figure.
    """
    import pandas as pd

    from vlm_latency.instrument import calibration
    from vlm_latency.instrument.environment import environment, fingerprint
    from vlm_latency.pipelines.reporting import results
    from vlm_latency.plots.calibration import calibration as draw
    from vlm_latency.plots.style import Style
    from vlm_latency.vqa import Sampling, draw_requests, image_bytes

    asked = settings.calibration
    sampling = Sampling(num_samples=asked.method_requests, seed=options.sampling.seed)
    requests = draw_requests(questions, sampling, asked.output_tokens, "calibration")
    found = calibration.calibrate(
        model.vlm,
        asked,
        requests,
        lambda row: image_bytes(row, questions.root),
        template=options.prompt.template,
        measurement=options.measurement,
        known_ceilings=ceilings or None,
    )
    if needs_workers(options.measurement, options.ray):
        _beside_a_worker(found, options, asked, model, requests, questions)
    about = environment(
        options.model,
        options.measurement,
        architecture=model.architecture,
        dataset=questions.describe(),
        template=options.prompt.template,
    )
    about["fingerprint"] = fingerprint(about["conditions"])
    for sentence in found["verdict"]:
        log.info("calibration: %s", sentence)
    figure = draw(
        pd.DataFrame(found["injections"]),
        found["known_truth"]["cases"],
        found["statistics"],
        results.context(options, about, {}),
        Style.of(options.figures),
    )
    coverage = {"sessions": [], "requests": len(requests)}
    result = {**results.frame(options, about, coverage, found.pop("statistics"), []), **found}
    result["options"]["calibration"] = asked.model_dump(mode="json")
    return result, figure
