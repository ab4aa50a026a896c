"""Boundary marks in one pass, and the partition that gives every interval exactly one owner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from vlm_latency.instrument.clock import Clock


class Mark(NamedTuple):
    """One boundary: a label opens or closes.

    Attributes
    ----------
    time_ns
        When, in nanoseconds from any fixed origin.
    label
        Whose boundary it is.
    opens
        True where the label's interval begins, False where it ends.
    """

    time_ns: int
    label: str
    opens: bool


class Timeline:
    """Collects marks while a request runs; every slot is allocated before it starts.

    Parameters
    ----------
    host
        The host's clock.
    device
        A second clock for work that runs asynchronously, stamped at the same boundaries.

    Attributes
    ----------
    listener
        Told of every boundary as it is reached: its label, and whether that opens. None, as a rule:
        what it does is timed too.
    """

    def __init__(self, host: Clock, device: Clock | None = None) -> None:
        self.listener: Callable[[str, bool], None] | None = None
        self._clocks = [host] if device is None else [host, device]
        self._host = host
        self._device = device
        self._labels: list[tuple[str, bool]] = []
        self._count = 0

    def restart(self, capacity: int) -> None:
        """Forget all marks and have room for ``capacity`` of them; outside the timed region."""
        self._count = 0
        self._reserve(capacity)

    def open(self, label: str) -> None:
        """Mark that ``label`` begins."""
        self._mark((label, True))

    def close(self, label: str) -> None:
        """Mark that ``label`` ends."""
        self._mark((label, False))

    def finish(self, label: str) -> None:
        """Close ``label`` once the device is idle: the host's time includes the waiting."""
        slot = self._next((label, False))
        if self._device is not None:
            self._device.stamp(slot)
            self._device.synchronize()
        self._host.stamp(slot)

    def host_marks(self) -> list[Mark]:
        """Give the marks in the order they were made, by the host's clock."""
        return self._read(self._host)

    def device_marks(self) -> list[Mark] | None:
        """Give the same marks by the device's clock; None where there is none."""
        return None if self._device is None else self._read(self._device)

    def _mark(self, what: tuple[str, bool]) -> None:
        slot = self._next(what)
        self._host.stamp(slot)
        if self._device is not None:
            self._device.stamp(slot)

    def _next(self, what: tuple[str, bool]) -> int:
        slot = self._count
        if slot == len(self._labels):  # more boundaries than foreseen: lose time, not a mark
            self._reserve(2 * slot + 2)
        self._labels[slot] = what
        self._count = slot + 1
        if self.listener is not None:
            self.listener(*what)
        return slot

    def _reserve(self, capacity: int) -> None:
        self._labels.extend([("", False)] * (capacity - len(self._labels)))
        for clock in self._clocks:
            clock.reserve(len(self._labels))

    def _read(self, clock: Clock) -> list[Mark]:
        times = clock.read(self._count)
        return [
            Mark(time, *what) for time, what in zip(times, self._labels[: self._count], strict=True)
        ]


class Span(NamedTuple):
    """A stretch of time between two neighbouring marks, and whose it is."""

    start_ns: int
    end_ns: int
    owner: str


def spans(marks: Sequence[Mark], outside: str = "") -> list[Span]:
    """Attribute the time between the first and the last mark to exactly one owner each.

    The owner of a stretch is the label opened last and not yet closed; ``outside`` owns what
    no label does. A label may open inside another, inside itself, and as often as it likes; a
    label that is closed while another, opened later, is still open leaves that one in place.

    Parameters
    ----------
    marks
        In the order they were made; times never decrease.

    Returns
    -------
    list of Span
        Without gaps, from the first to the last mark.

    Raises
    ------
    ValueError
        When a label closes that is not open, one stays open, or time runs backwards.
    """
    found: list[Span] = []
    stack: list[str] = []
    before: Mark | None = None
    for mark in marks:
        if before is not None:
            if mark.time_ns < before.time_ns:
                raise ValueError(f"time runs backwards from {before} to {mark}")
            found.append(Span(before.time_ns, mark.time_ns, stack[-1] if stack else outside))
        if mark.opens:
            stack.append(mark.label)
        elif mark.label in stack:
            innermost = len(stack) - 1 - stack[::-1].index(mark.label)
            del stack[innermost]
        else:
            raise ValueError(f"{mark.label!r} closes at {mark.time_ns} ns but is not open")
        before = mark
    if stack:
        raise ValueError(f"still open after the last mark: {stack}")
    return found


def partition(marks: Sequence[Mark], outside: str = "") -> dict[str, int]:
    """Add up every owner's stretches of time; see `spans`.

    Returns
    -------
    dict
        Nanoseconds per label; they add up to last minus first mark, exactly.

    Examples
    --------
    >>> inner = [Mark(3, "b", True), Mark(5, "b", False)]
    >>> partition([Mark(0, "a", True), *inner, Mark(9, "a", False)])
    {'a': 7, 'b': 2}
    """
    owned = {mark.label: 0 for mark in marks}
    for start, end, owner in spans(marks, outside):
        owned[owner] = owned.get(owner, 0) + end - start
    return owned
