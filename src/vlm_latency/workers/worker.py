"""The process of one device: load the model, measure ceilings, warm up, measure requests."""

from __future__ import annotations

import gc
import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from vlm_latency.instrument.environment import code_hash, device_name, hardware, software
from vlm_latency.instrument.protocol import measure
from vlm_latency.instrument.session import Fetch, Session, SessionLog, undisturbed
from vlm_latency.models import ModelHandle, thread_count
from vlm_latency.options import MeasurementOptions, ModelOptions
from vlm_latency.records import Row, plain_rows


@dataclass(frozen=True)
class Work:
    """What all workers of one measurement are told.

    Attributes
    ----------
    methods
        Of token reduction, as `vlm_latency.reduction.method_of` makes them by name.
    root
        Where the images lie.
    """

    requests: pd.DataFrame
    measurement: MeasurementOptions
    root: Path | None
    template: str
    fingerprint: str
    methods: tuple[str, ...] = ()

    def fetch(self) -> Fetch:
        """Give what reads a request's image."""
        from vlm_latency.vqa import image_bytes

        return lambda row: image_bytes(row, self.root)

    def on(self, vlm: Any) -> Any:
        """Put the model under the methods of token reduction that are asked for."""
        if not self.methods:
            return vlm
        from vlm_latency.reduction import method_of
        from vlm_latency.reduction.vlm import Reduced

        return Reduced(vlm, {name: method_of(name) for name in self.methods})


class Worker:
    """One device's process; Ray makes an actor of it.

    Parameters
    ----------
    index
        Counted from 1.
    folder
        The working directory, which relative paths are relative to.
    handle
        Of a model that this process has already.
    """

    def __init__(
        self, index: int, model: ModelOptions, folder: str, handle: ModelHandle | None = None
    ) -> None:
        if Path(folder).is_dir():
            os.chdir(folder)
        self.index, self.handle = index, handle or ModelHandle(model)
        self.threads = thread_count(model, self.handle.device)
        self._held = ExitStack()
        self._session: Session | None = None
        self._runs: Iterator[list[Row]] = iter(())
        self._log = SessionLog()

    def describe(self) -> dict[str, Any]:
        """Say where this is, what it computes with and which code it runs."""
        device = self.handle.device
        return {
            "index": self.index,
            "host": platform.node(),
            "process": os.getpid(),
            "device": device,
            "device_name": device_name(device),
            "hardware": hardware(device),
            "software": software(device),
            "code_sha256": code_hash(),
        }

    def load(self) -> None:
        """Load the model."""
        _ = self.handle.vlm

    def ceilings(self, seconds: float) -> dict[str, Any]:
        """Measure what this device can do at most."""
        from vlm_latency.instrument.ceilings import ceilings

        return ceilings(self.handle.device, self.handle.dtype, self.threads, seconds)

    def prepare(self, work: Work, planned: pd.DataFrame) -> float:
        """Warm up for the runs of this worker.

        Returns
        -------
        float
            How many seconds that took.
        """
        self._log = SessionLog()
        self._runs = measure(
            work.on(self.handle.vlm),
            work.requests,
            work.measurement,
            planned=planned,
            fetch=work.fetch(),
            template=work.template,
            fingerprint=work.fingerprint,
            worker_index=self.index,
            log=self._log,
            progress=False,
            announce=True,
        )
        next(self._runs)
        return self._log.warmup_s

    def measure(self) -> Iterator[tuple[list[Row], dict[str, Any] | None]]:
        """Make the runs that were prepared, then say what there is to say at the end."""
        for rows in self._runs:
            yield rows, None
        yield [], {**self._log.to_dict(), "worker_index": self.index}

    def open(self, work: Work) -> None:
        """Warm up for single runs of these requests."""
        self.close()
        vlm, rows = work.on(self.handle.vlm), plain_rows(work.requests)
        self._session = Session(vlm, work.measurement, work.fetch(), work.template, SessionLog())
        self._held.enter_context(undisturbed(vlm))
        vlm.set_threads(self.threads)
        self._held.callback(self._session.close)
        self._session.open(rows, rows)

    def run(self, row: Row) -> Row:
        """Make one run, once `open` has warmed up for it."""
        assert self._session is not None
        gc.collect(1)
        return self._session.run(row)

    def close(self) -> None:
        """End what `open` began."""
        self._held.close()
