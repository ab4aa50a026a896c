"""What a device can do at most: published peaks, or what was measured on it.

Published peaks are in ``hardware.yml``, with a source per row. Ceilings that `calibration`
measured (a large matrix product, a large copy, an empty operation) come first where there are
any: a CPU has no published peak that means much.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from vlm_latency.errors import UserError

# What tells boards of one chip apart in a device's full name; their peaks differ.
BOARDS = frozenset(
    {"laptop", "mobile", "max", "d", "ti", "super", "ada", "pcie", "nvl", "mig", "40gb", "64gb"}
    | {"94gb", "96gb", "nano", "nx"}
)


_LARGEST = 1e30  # of a rate: none comes near


@dataclass(frozen=True)
class Hardware:
    """Peaks of one device.

    Attributes
    ----------
    name : str
    flops_per_s : mapping
        FLOP/s by dtype; ``measured`` ceilings hold for the dtype they were measured in, under "*".
    bytes_per_s : float
    launch_overhead_us : float
        Microseconds that one operation costs however small it is.
    memory_bytes : float or None
    source : str
        Where the numbers are from.
    measured : bool
        On this machine, in place of published.
    boards : tuple of str
        Words of `BOARDS` that the row holds for besides those in its name.
    """

    name: str
    flops_per_s: Mapping[str, float]
    bytes_per_s: float
    launch_overhead_us: float
    memory_bytes: float | None
    source: str
    measured: bool = False
    boards: tuple[str, ...] = ()

    def peak(self, dtype: str) -> float:
        """Give the FLOP/s at a dtype.

        Raises
        ------
        UserError
            Where no peak at this dtype is known.
        """
        if "*" in self.flops_per_s:
            return self.flops_per_s["*"]
        if dtype not in self.flops_per_s:
            raise UserError(
                f"no peak of {self.name} in {dtype}; known are {', '.join(self.flops_per_s)}"
            )
        return self.flops_per_s[dtype]

    @classmethod
    def from_ceilings(cls, ceilings: Mapping[str, Any], name: str = "this machine") -> Hardware:
        """Take what `calibration` measured: flops_per_s, bytes_per_s, launch_overhead_us.

        >>> Hardware.from_ceilings(
        ...     {"flops_per_s": 5e10, "bytes_per_s": 1e10, "launch_overhead_us": 3}
        ... ).peak("float32")
        50000000000.0

        Raises
        ------
        UserError
            When one of them is no number above 0.
        """
        names = ("flops_per_s", "bytes_per_s", "launch_overhead_us")
        flops, moved, launch = (_positive(each, ceilings.get(each)) for each in names)
        return cls(
            name=name,
            flops_per_s={"*": flops},
            bytes_per_s=moved,
            launch_overhead_us=launch,
            memory_bytes=None,
            source="measured",
            measured=True,
        )


def _positive(name: str, value: Any) -> float:
    if isinstance(value, int | float) and 0 < value < _LARGEST:
        return float(value)
    raise UserError(
        f"the ceilings of the machine have {name} {repr(value)[:50]}; expected a number above 0, as "
        "'kedro run --pipeline calibration' measures it"
    )


@cache
def _devices() -> dict[str, Hardware]:
    content = yaml.safe_load(files("vlm_latency.costs").joinpath("hardware.yml").read_text())
    return {
        name: Hardware(
            name=name,
            flops_per_s={dtype: float(peak) for dtype, peak in row["flops_per_s"].items()},
            bytes_per_s=float(row["bytes_per_s"]),
            launch_overhead_us=float(content["defaults"]["launch_overhead_us"]),
            memory_bytes=float(row["memory_bytes"]),
            source=row["source"],
            boards=tuple(row.get("boards", ())),
        )
        for name, row in content["devices"].items()
    }


def known_device(name: str) -> Hardware | None:
    """Find the row whose name is in a device's full name ("NVIDIA H200" is an H200), or None.

    A device of another board than the row's has other peaks, and is not that device.

    >>> known_device("NVIDIA GeForce RTX 4090").bytes_per_s
    1008000000000.0
    >>> known_device("NVIDIA GeForce RTX 4090 Laptop GPU") is None
    True
    """
    words = set(name.lower().replace("-", " ").split())
    matches = [
        device
        for device in _devices().values()
        if set(device.name.lower().split()) <= words
        and words & BOARDS <= {*device.name.lower().split(), *device.boards}
    ]
    return max(matches, key=lambda device: len(device.name), default=None)


def hardware(name: str) -> Hardware:
    """Find the row of a device.

    Raises
    ------
    UserError
        For a device that is not in the table, with those that are.
    """
    found = known_device(name)
    if found is None:
        raise UserError(
            f"found hardware {name!r}; expected one of {', '.join(_devices())}, or none "
            "to use what calibration measured on this machine"
        )
    return found


def as_hardware(given: Hardware | Mapping[str, Any] | str | None) -> Hardware | None:
    """Take a row, a device's name, measured ceilings, or nothing."""
    if given is None or isinstance(given, Hardware):
        return given
    return hardware(given) if isinstance(given, str) else Hardware.from_ceilings(given)
