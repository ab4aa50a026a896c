"""What the machine can do, and how far the instrument's numbers can be trusted on it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from vlm_latency.options import Options

if TYPE_CHECKING:
    from vlm_latency.datasets.inputs import Model

log = logging.getLogger("vlm_latency")


def measure_ceilings(
    parameters: dict[str, Any], model: Model, known: dict[str, Any] | None
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
    if model.options.name == "null":
        return {}
    from vlm_latency.instrument.calibration import ceilings

    options = Options.from_parameters(parameters)
    device, dtype, threads = model.device, model.dtype, model.options.num_threads
    asked = {"device": device, "dtype": dtype, "threads": threads}
    if known and asked.items() <= known.items():
        return known
    seconds = options.calibration.ceiling_seconds
    log.info("ceilings: measuring what %s can do in %s, about %.0f s", device, dtype, seconds)
    return {**ceilings(device, dtype, threads, seconds), **asked}


def calibrate(*_: Any) -> Any:
    raise NotImplementedError
