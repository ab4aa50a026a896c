"""The time that the hardware's limits alone would take, and how close a measurement came.

Williams, Waterman and Patterson, "Roofline", CACM 52(4), 2009, with a term for launches: a part
takes at least max(FLOPs / peak, bytes / bandwidth), and each operation costs a fixed overhead
however small it is.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vlm_latency.costs.hardware import Hardware

SIDES = ("compute", "memory", "launch")


def roofline_ms(
    flops: Any, moved: Any, launches: Any, hardware: Hardware, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """Bound one part from below.

    Parameters
    ----------
    flops, moved, launches
        FLOPs, bytes and number of operations of the part; numbers or arrays, NaN where unknown.
    hardware : Hardware
    dtype : str
        Decides which peak holds.

    Returns
    -------
    ms : float array
        Milliseconds.
    side : object array
        Which of "compute", "memory", "launch" is the largest; None for a part that does nothing,
        or of which a term is not known.

    Examples
    --------
    One TFLOP on 50 MB at 1 TFLOP/s and 1 GB/s, in ten launches of 100 µs:

    >>> machine = Hardware.from_ceilings(
    ...     {"flops_per_s": 1e12, "bytes_per_s": 1e9, "launch_overhead_us": 100})
    >>> ms, side = roofline_ms(1e12, 5e7, 10, machine, "float32")
    >>> float(ms), str(side)
    (1001.0, 'compute')
    """
    terms = np.stack(
        np.broadcast_arrays(
            np.asarray(flops, dtype=float) / hardware.peak(dtype) * 1e3,
            np.asarray(moved, dtype=float) / hardware.bytes_per_s * 1e3,
            np.asarray(launches, dtype=float) * hardware.launch_overhead_us / 1e3,
        )
    )
    side = np.array([*SIDES, None], dtype=object)[
        np.where(
            (np.nan_to_num(terms).max(axis=0) > 0) & ~np.isnan(terms).any(axis=0),
            np.nan_to_num(terms).argmax(axis=0),
            3,
        )
    ]
    return np.maximum(terms[0], terms[1]) + terms[2], side


def utilisation(done: Any, milliseconds: Any, per_second: float) -> np.ndarray:
    """Share of a peak that was achieved: MFU for FLOPs, MBU for bytes; NaN where no time passed.

    >>> float(utilisation(5e11, 1000.0, 1e12))
    0.5
    """
    time = np.asarray(milliseconds, dtype=float) / 1e3
    return np.divide(
        np.asarray(done, dtype=float),
        time * per_second,
        out=np.full(np.shape(time), np.nan),
        where=time > 0,
    )
