"""What every proof works with: a warm meter, prepared requests, chance, and a bounded time."""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from vlm_latency.instrument.meter import Meter, Reading
from vlm_latency.instrument.session import Session

if TYPE_CHECKING:
    from vlm_latency.models.loading import VLM
    from vlm_latency.models.requests import Prepared
    from vlm_latency.statistics import Estimate

AA_TOKENS = 8  # length of the text-only prompt of the A/A comparisons
ROUNDS_PER_LOOK = 5  # between two looks at whether the interval is narrow enough

log = logging.getLogger("vlm_latency")


@dataclass(frozen=True)
class Bench:
    """One session and what a proof needs beside it.

    Attributes
    ----------
    session
        Open: its meter is warm for every request of the calibration.
    prepared
        The one request that is run many times, on the device.
    generator
        Draws every order.
    seconds
        How long one proof may take.
    """

    session: Session
    prepared: Prepared
    generator: np.random.Generator
    seconds: float

    @property
    def vlm(self) -> VLM:
        """The model under test."""
        return cast("VLM", self.session.vlm)  # one that is simulated has nothing to prove

    @property
    def meter(self) -> Meter:
        """The session's own meter, a timeline."""
        meter: Meter = self.session.meter
        return meter

    def run(self, tokens: int, prepared: Prepared | None = None) -> Reading:
        """Measure the request, or another one, and collect garbage afterwards."""
        reading = self.meter(self.prepared if prepared is None else prepared, tokens)
        gc.collect(1)
        return reading

    def text_only(self) -> Prepared:
        """Give the end of the prompt without its image: the cheapest request that is a real one."""
        ids = self.prepared.inputs["input_ids"][:, -AA_TOKENS:]
        return cast(
            "Prepared",
            SimpleNamespace(inputs={"input_ids": ids, "attention_mask": torch.ones_like(ids)}),
        )

    def rounds(
        self,
        at_least: int,
        at_most: int | None = None,
        enough: Callable[[], bool] = lambda: False,
        seconds: float | None = None,
    ) -> Iterator[int]:
        """Yield the numbers of the rounds until enough are done or the time is up, at least ``at_least``.

        Parameters
        ----------
        enough
            Asked after every fifth round. It may look at the width of an interval, never at where
            that lies: stopping at a welcome result would make it come too often.
        seconds
            Another limit than the bench's.
        """
        seconds = self.seconds if seconds is None else seconds
        end = time.perf_counter() + seconds
        index = 0
        while at_most is None or index < at_most:
            if index >= at_least:
                if time.perf_counter() > end:
                    log.info("calibration: stopped after %d rounds, %.0f s", index, seconds)
                    return
                if (index - at_least) % ROUNDS_PER_LOOK == 0 and enough():
                    return
            yield index
            index += 1


def half_width(estimate: Estimate) -> float:
    """Give half the length of an estimate's interval; infinite where an end is not known."""
    if estimate.low is None or estimate.high is None:
        return math.inf
    return float(estimate.high - estimate.low) / 2


def rounds_needed(estimate: Estimate, wanted: float) -> int | None:
    """Estimate from how many rounds on the half-width would be ``wanted``: it falls as 1 / √n.

    >>> from types import SimpleNamespace
    >>> rounds_needed(SimpleNamespace(low=0.98, high=1.02, n=30), 0.01)
    120
    """
    width = half_width(estimate)
    if not math.isfinite(width):
        return None
    return math.ceil(round(estimate.n * (width / wanted) ** 2, 6))
