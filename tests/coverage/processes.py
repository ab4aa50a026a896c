"""Cells and claims simulated in several processes; the numbers are the same however many."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from cells import cells
from table import Cell, Row, Verdicts, simulate
from verdicts import claims, count_verdicts

_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Processes:
    """New Python processes, each with one cell or claim at a time.

    Every cell and claim has its own random stream, and a cell is made anew for each simulation of
    it: neither the order nor the number of processes can change a number.
    """

    number: int = 1
    scale: float = 1.0

    def rows(self, asked: Iterable[Cell]) -> Iterator[Row]:
        """Simulate cells, each as soon as those before it are given."""
        kept = list(asked)
        names = [(cell.statistic, cell.data, cell.n) for cell in kept]
        for cell, found in zip(kept, self._map(_found, names), strict=True):
            yield Row(cell, *found)

    def verdicts(self, names: Iterable[str]) -> Iterator[Verdicts]:
        """Count the verdicts of claims, given by name."""
        return self._map(count_verdicts, list(names))

    def _map(self, function: Callable[..., _Found], asked: list[Any]) -> Iterator[_Found]:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.number, mp_context=context) as pool:
            yield from pool.map(partial(function, scale=self.scale), asked)


def matching(text: str) -> tuple[list[Cell], list[str]]:
    """Give the cells and claims whose statistic, or data, contains a text; all for the empty one."""
    found = [cell for cell in cells() if text in cell.statistic or text in cell.data]
    return found, [name for name in claims() if text in name]


def _found(name: tuple[str, str, str], scale: float) -> tuple[float, int, float, float]:
    cell = next(own for own in cells() if (own.statistic, own.data, own.n) == name)
    row = simulate(cell, scale)
    return row.held, row.runs, row.without, row.warned
