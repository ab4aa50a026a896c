"""What is asked of several devices before any is started; nothing of Ray is imported here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from typing import Any

from vlm_latency.errors import MeasurementError
from vlm_latency.models import ModelHandle, thread_count
from vlm_latency.option_groups import RayOptions
from vlm_latency.options import MeasurementOptions, ModelOptions


def needs_workers(measurement: MeasurementOptions, ray: RayOptions) -> bool:
    """Tell whether the runs are made by other processes than this one."""
    return measurement.workers != 1 or ray.address is not None


def count_workers(measurement: MeasurementOptions, handle: ModelHandle) -> int:
    """Count the workers of this machine: as many as asked for, or as it has devices.

    Raises
    ------
    MeasurementError
        When there are fewer devices than workers, or the device is one of several.
    """
    asked, options = measurement.workers, handle.options
    if handle.device.startswith("cuda"):
        import torch

        if options.device not in ("auto", "cuda"):
            raise MeasurementError(
                f"found model.device={options.device} with measurement.workers={asked}; every worker "
                "has a device of its own: leave model.device out, CUDA_VISIBLE_DEVICES chooses some"
            )
        found, what = torch.cuda.device_count(), "CUDA devices"
    else:
        found = max(1, (os.cpu_count() or 1) // thread_count(options, "cpu"))
        what = f"times {thread_count(options, 'cpu')} CPU cores (model.num_threads)"
    count = found if asked == "all" else int(asked)
    if count > found:
        raise MeasurementError(
            f"found measurement.workers={asked} and {found} {what} on this machine; ask for {found} "
            "or all, or name a cluster with ray.address"
        )
    return count


def ask_for(measurement: MeasurementOptions, ray: RayOptions, handle: ModelHandle) -> None:
    """Refuse workers that cannot be had.

    Raises
    ------
    MeasurementError
        Without Ray, or without as many devices.
    """
    if not needs_workers(measurement, ray):
        return
    if importlib.util.find_spec("ray") is None:
        raise MeasurementError(
            f"found measurement.workers={measurement.workers}"
            + (f", ray.address={ray.address}" if ray.address else "")
            + ", and Ray is not installed: pip install 'vlm-latency[ray]', or pip install -e '.[ray]' "
            "in a checkout"
        )
    if ray.address is None:
        count_workers(measurement, handle)


def settled(handle: ModelHandle, measurement: MeasurementOptions, ray: RayOptions) -> ModelOptions:
    """Give the model's options with a number of CPU threads: workers of a machine share its cores."""
    options = handle.options
    if options.num_threads is not None:
        return options
    sharing = 1 if ray.address else count_workers(measurement, handle)
    return options.model_copy(update={"num_threads": max(1, thread_count(options) // sharing)})


def describe(
    handle: ModelHandle, measurement: MeasurementOptions, ray: RayOptions
) -> dict[str, Any]:
    """Say of the conditions of a measurement that it was made by workers, and by how many."""
    count = measurement.workers if ray.address else count_workers(measurement, handle)
    return {"ray": importlib.metadata.version("ray"), "count": count}
