"""Counts at many lengths and of many images, from few that are counted.

Lengths are many, so prefill is counted at four: three determine the quadratic, which the fourth
must confirm, and likewise a decode step at three cache lengths on either side of a sliding
window. Images are counted one by one up to `COUNTED_IMAGES` distinct ones; beyond, those that are
linearly independent in crops, patches, pairs and windows are, and some more that must confirm. All
in whole numbers; where a count does not confirm, all are counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise, repeat
from typing import Any

COUNTED_IMAGES = 12
CONFIRMED_IMAGES = 4


def prefill_flops(prefill: Callable[[int], int], lengths: Iterable[int]) -> dict[int, int]:
    """Count the FLOPs of prefill at each prompt length; `prefill` counts one."""
    lengths = sorted(set(lengths))
    curve = _polynomial(prefill, 2, lengths)
    return {tokens: curve(tokens) for tokens in lengths}


def decode_flops(
    step: Callable[[int], int], pairs: Iterable[tuple[int, int]], window: int | None = None
) -> dict[tuple[int, int], int]:
    """Count the FLOPs of all decode forwards, for each (prompt length, number of decode forwards).

    Parameters
    ----------
    step : callable
        Counts one step after so many cached tokens.
    window : int, optional
        Keys that a sliding layer sees: a step's line breaks there.
    """
    pairs = sorted(set(pairs))
    written = [(prompt, steps) for prompt, steps in pairs if steps]
    # Keys seen by a step, itself included.
    first = min((prompt + 1 for prompt, _ in written), default=1)
    last = max((prompt + steps for prompt, steps in written), default=0)
    turn = min(max(window or last, first - 1), last)
    seen = [range(first, turn + 1), range(turn + 1, last + 1)]
    curves = [_polynomial(lambda keys: step(keys - 1), 1, wanted) for wanted in seen]
    sums = {}
    for prompt, steps in pairs:
        flops = 0
        for keys, curve in zip(seen, curves, strict=True):
            low = max(prompt + 1, keys.start)
            high = min(prompt + steps, keys.stop - 1)
            if low > high:
                continue
            if curve.is_polynomial:
                # The sum of a line is its middle times the number of points.
                flops += (curve(low) + curve(high)) * (high - low + 1) // 2
            else:
                flops += sum(curve(length) for length in range(low, high + 1))
        sums[prompt, steps] = flops
    return sums


def count_images(
    traits: Mapping[Any, Sequence[int]], count: Callable[[Any], Sequence[int]]
) -> dict[Any, tuple[int, ...]]:
    """Count many images; counts are linear in their traits; see the module's docstring.

    Parameters
    ----------
    traits : mapping
        By image: whole numbers, a constant 1 among them, that its counts are linear in.
    count : callable
        Gives the counts of one image.

    Examples
    --------
    >>> counted = []
    >>> def count(image):
    ...     counted.append(image)
    ...     return (3 * image + 5,)
    >>> found = count_images({image: (1, image) for image in range(100)}, count)
    >>> found[71], len(counted) < 15
    ((218,), True)
    """
    if len(traits) <= COUNTED_IMAGES:
        return {image: tuple(count(image)) for image in traits}
    basis: list[tuple[int, list[Fraction]]] = []  # traits then counts, each with its pivot
    found: dict[Any, tuple[int, ...]] = {}
    confirm = set(list(traits)[:: max(1, len(traits) // CONFIRMED_IMAGES)])
    for image, numbers in traits.items():
        rest = [Fraction(number) for number in numbers]
        known: list[Fraction] = []
        for pivot, row in basis:
            factor = rest[pivot]
            rest = [a - factor * b for a, b in zip(rest, row[: len(rest)], strict=True)]
            shares = [factor * b for b in row[len(rest) :]]
            known = [a + b for a, b in zip(known, shares, strict=True)] if known else shares
        pivot = next((i for i, left in enumerate(rest) if left), -1)
        if pivot >= 0 or image in confirm:
            found[image] = tuple(count(image))
        else:
            found[image] = tuple(int(value) for value in known)
        if pivot >= 0:
            so_far = known or repeat(Fraction(0))
            own = [Fraction(a) - b for a, b in zip(found[image], so_far, strict=False)]
            basis.append((pivot, [value / rest[pivot] for value in [*rest, *own]]))
        elif image in confirm and list(found[image]) != known:
            return {image: tuple(count(image)) for image in traits}
    return found


class _Curve:
    """Counts by length: by a polynomial that was confirmed, else one by one."""

    def __init__(self, at: Callable[[int], int], is_polynomial: bool) -> None:
        self.at = at
        self.is_polynomial = is_polynomial

    def __call__(self, length: int) -> int:
        return self.at(length)


def _polynomial(count: Callable[[int], int], degree: int, wanted: Sequence[int]) -> _Curve:
    """The polynomial through the counts at the first lengths, confirmed at the last one wanted.

    Newton's forward differences keep it in whole numbers. Few wanted are counted one by one.
    """
    if len(wanted) <= degree + 1:
        return _Curve(count, False)
    start, last = wanted[0], wanted[-1]
    values = [count(start + i) for i in range(degree + 1)]
    differences = []
    while values:
        differences.append(values[0])
        values = [after - before for before, after in pairwise(values)]

    def curve(n: int) -> int:
        return sum(math.comb(n - start, i) * value for i, value in enumerate(differences))

    # A curve that goes in steps may be met at one length by chance.
    middle = wanted[len(wanted) // 2]
    if any(curve(n) != count(n) for n in (middle, last)):
        return _Curve(count, False)
    return _Curve(curve, True)
