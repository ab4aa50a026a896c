"""All proofs, one after the other, in one session."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from vlm_latency.errors import MeasurementError
from vlm_latency.instrument.calibration.bench import Bench
from vlm_latency.instrument.calibration.known_truth import known_truth
from vlm_latency.instrument.calibration.proofs import false_alarms, methods, overhead
from vlm_latency.instrument.calibration.verdict import verdict
from vlm_latency.instrument.ceilings import ceilings
from vlm_latency.instrument.clock import resolution_ns
from vlm_latency.instrument.session import Fetch, Session, SessionLog, undisturbed
from vlm_latency.models import thread_count
from vlm_latency.option_groups import CalibrationOptions
from vlm_latency.options import MeasurementOptions
from vlm_latency.records import Row, plain_rows
from vlm_latency.vqa.images import noise_recipe

if TYPE_CHECKING:
    from vlm_latency.models.interface import LoadedModel, ModelArchitecture

log = logging.getLogger("vlm_latency")


def calibrate(
    vlm: LoadedModel,
    options: CalibrationOptions,
    requests: pd.DataFrame,
    fetch: Fetch,
    *,
    template: str = "{question}",
    measurement: MeasurementOptions | None = None,
    known_ceilings: Mapping[str, object] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Prove the instrument on a loaded model.

    Parameters
    ----------
    requests
        The methods are compared on the first ``method_requests`` of them; everything else runs
        one request, with an image of noise for ``options.tiling``.
    fetch
        Gives the encoded image of a request.
    measurement
        How a session warms up and what a request writes; the method is ``timeline`` whatever it
        says, and every shape is warmed up.
    known_ceilings
        What ``ceilings`` has found before; measured here where absent.

    Returns
    -------
    dict
        JSON-able. ``injections`` (one row per injection) and ``statistics`` are what
        ``plots.calibration`` draws; ``known_truth, methods, warmup, clock, ceilings`` hold the
        details, ``runs`` how many requests each proof made, ``seconds`` how long each took, and
        ``verdict`` what it all means, in sentences.

    Raises
    ------
    MeasurementError
        For a model without times of its own, such as the null model.
    """
    if vlm.architecture.simulated:
        raise MeasurementError(
            f"found model.name={vlm.options.name}; expected a model that takes time: there is "
            "nothing to calibrate"
        )
    own = _noise_request(vlm.architecture, options)
    others = plain_rows(requests[: options.method_requests])
    fixed = {"method": "timeline", "warmup": "plateau"}
    settled = (measurement or MeasurementOptions()).model_copy(update=fixed)
    session = Session(vlm, settled, fetch, template, SessionLog())
    found: dict[str, Any] = {"seconds": {}, "runs": {}, "clock": resolution_ns()}

    def prove(name: str, proof: Callable[[], dict[str, object]]) -> dict[str, object]:
        log.info("calibration: %s", name.replace("_", " "))
        start = time.perf_counter()
        result = proof()
        found["seconds"][name] = time.perf_counter() - start
        if "runs" in result:
            found["runs"][name] = result["runs"]
        return result

    with undisturbed(vlm), contextlib.closing(session):
        warm = prove("warmup", lambda: _warmed(session, [own, *others]))
        bench = Bench(
            session, session.prepare(own), np.random.default_rng(seed), options.proof_seconds
        )
        cost = prove("overhead", partial(overhead, bench, options))
        truth = prove("known_truth", partial(known_truth, bench, options))
        alarms = prove("a_a", partial(false_alarms, bench, options))
        compared = prove("methods", partial(methods, bench, others))
    if known_ceilings is None:
        asked = (
            vlm.device,
            str(vlm.dtype).removeprefix("torch."),
            thread_count(vlm.options, str(vlm.device)),
        )
        known_ceilings = prove("ceilings", partial(ceilings, *asked, options.ceiling_seconds))
    found |= {
        "injections": truth.pop("injections"),
        "known_truth": truth,
        "warmup": warm,
        "methods": compared,
        "ceilings": dict(known_ceilings),
        "request": options.model_dump(mode="json", include={"tiling", "output_tokens"}),
        "statistics": {
            "recovery_error": truth["recovery_error"],
            "remainder": cost["remainder"],
            "overhead": cost["overhead"],
            "null": cost["null"],
            "false_alarms": alarms,
            "methods": compared["methods"],
        },
    }
    return {**found, "verdict": verdict(found)}


def _warmed(session: Session, rows: list[Row]) -> dict[str, object]:
    """Open the session, which warms up for these requests, and say what that took."""
    session.open(rows, rows)
    shapes = session.log.warmup
    return {
        "runs": sum(shape["runs"] for shape in shapes),
        "plateau": all(shape["plateau"] for shape in shapes),
        "shapes": shapes,
    }


def _noise_request(architecture: ModelArchitecture, options: CalibrationOptions) -> Row:
    """One request whose image makes exactly the tiling that is asked for."""
    width, height = architecture.image_size_for(*options.tiling)
    return {
        "request_id": "calibration",
        "question": "what is this?",
        "image_recipe": noise_recipe(0, width, height),
        "image_width": width,
        "image_height": height,
        "output_length": str(options.output_tokens),
    }
