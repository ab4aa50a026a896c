"""What a device meets for the first time, and what that costs.

Kernels may be planned anew for every length: of the prompt in a prefill, of the keys in a decode
step. A service that meets new lengths pays for it; a steady state does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from vlm_latency.records import UNTIL_FIRST_TOKEN, Row, ok_rows

if TYPE_CHECKING:
    from vlm_latency.models.interface import LoadedModel
    from vlm_latency.models.requests import TokenCounts

ENOUGH_PAIRS = 6  # from six on, a median's interval has two ends
SMALLEST_COST = 0.05  # of the second visit: less than this is not worth a visit

PROMPT_LENGTH, KEY_LENGTH = "prompt length", "key length of a decode step"

Prompt = tuple[int, int, int]  # crops, patches, tokens: what a prefill's kernels depend on


@dataclass
class Novelty:
    """What a length costs when it is met for the first time: first minus second visit, in pairs.

    Attributes
    ----------
    of
        What has the length.
    first_ms, again_ms
        One entry per pair; milliseconds of a prefill or a decode step.
    parts
        The same differences by component, for prompt lengths.
    """

    of: str
    first_ms: list[float] = field(default_factory=list)
    again_ms: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)

    @property
    def differences(self) -> list[float]:
        """Milliseconds, one per pair."""
        return [a - b for a, b in zip(self.first_ms, self.again_ms, strict=True)]

    @property
    def costs(self) -> bool:
        """Whether a new length surely costs more than 5 % of a known one.

        Judged by the interval of the median difference; of fewer than six pairs each must say so.
        """
        return _surely_costs(tuple(self.differences), tuple(self.again_ms))

    def to_dict(self) -> Row:
        """Give medians with their intervals, and a sentence."""
        from vlm_latency.statistics import percentile

        if not self.first_ms:
            return {"pairs": 0, "costs": None, "sentence": f"no new {self.of} was there to try"}
        cost = percentile(self.differences, 50)
        return {
            "pairs": len(self.first_ms),
            "costs": self.costs,
            "cost_ms": cost.to_dict(),
            "again_ms": float(np.median(self.again_ms)),
            "parts_ms": {
                name: percentile(values, 50).to_dict() for name, values in self.parts.items()
            },
            "sentence": self._sentence(cost.value, cost.low, cost.high),
        }

    def _sentence(self, value: float | None, low: float | None, high: float | None) -> str:
        found = f"{value:.3g} ms"
        if low is not None and high is not None:
            found += f" [{low:.3g}, {high:.3g}]"
        found += f" beside {float(np.median(self.again_ms)):.3g} ms, {len(self.first_ms)} pairs"
        if not self.costs:
            return f"a {self.of} met for the first time costs nothing to speak of here: {found}"
        medians = {name: float(np.median(values)) for name, values in self.parts.items()}
        most = max(medians, key=lambda name: medians[name], default=None)
        part = f", {medians[most]:.3g} ms of it in {most}" if most else ""
        return f"a {self.of} met for the first time costs {found}{part}"


@dataclass
class Met:
    """What the device has met with one model since the process began."""

    prompts: set[Prompt] = field(default_factory=set)
    keys: set[int] = field(default_factory=set)  # key lengths of decode steps
    tried: set[Prompt] = field(default_factory=set)  # prompts as they are estimated
    prompt_cost: Novelty = field(default_factory=lambda: Novelty(PROMPT_LENGTH))
    key_cost: Novelty = field(default_factory=lambda: Novelty(KEY_LENGTH))

    @classmethod
    def of(cls, vlm: LoadedModel) -> Met:
        """Give what was met with this model; kept on it, since another one has other kernels."""
        met: Met = vars(vlm).setdefault("_met", cls())
        return met

    def forget_prompts(self) -> None:
        """Meet all prompts anew, as graphs do that were captured for an engine that is gone."""
        self.prompts.clear()
        self.tried.clear()

    def note(self, counts: TokenCounts, keys: range) -> tuple[bool, int]:
        """Take note of a run, and tell what was new: its prompt, and how many key lengths."""
        prompt = prompt_of(counts)
        first = prompt not in self.prompts
        unmet = sum(length not in self.keys for length in keys)
        self.prompts.add(prompt)
        self.keys.update(keys)
        return first, unmet


def prompt_of(counts: TokenCounts) -> Prompt:
    """Give what the kernels of a prefill depend on."""
    return counts.num_crops, counts.num_vision_patches, counts.num_total_tokens


def found_in_runs(runs: pd.DataFrame) -> tuple[Novelty, Novelty]:
    """Compare first visits with later ones of the same lengths, among runs that were measured.

    Parameters
    ----------
    runs
        Columns of ``records.MEASURED_COLUMNS``.

    Returns
    -------
    Novelty, Novelty
        Of prompt lengths, by the time to the first token; of key lengths, by the decode step.
    """
    prompt, key = Novelty(PROMPT_LENGTH), Novelty(KEY_LENGTH)
    shape = ["num_crops", "num_vision_patches", "num_total_tokens"]
    told = ["status", "first_of_length", "new_kv_lengths", "num_output_tokens", "T_LLM_decode"]
    shown = ok_rows(runs[[*shape, *told, *UNTIL_FIRST_TOKEN, "T_first_token"]])
    shown = shown[shown["first_of_length"].notna()]
    for _, same in shown.groupby(shape):
        new = same["first_of_length"].astype(bool)
        if new.any() and not new.all():
            first, later = same[new].iloc[0], same[~new]
            _pair(prompt, float(first["T_first_token"]), float(later["T_first_token"].median()))
            for name in UNTIL_FIRST_TOKEN:
                if pd.notna(first[name]) and pd.notna(first["T_first_token"]):
                    parts = prompt.parts.setdefault(name, [])
                    parts.append(float(first[name] - later[name].median()))
    for _, same in shown.groupby([*shape, "num_output_tokens"]):
        new = same["new_kv_lengths"] > 0
        if new.any() and not new.all():
            first, known_ms = same[new].iloc[0], same[~new]["T_LLM_decode"].median()
            again = float(known_ms) / (first["num_output_tokens"] - 1)
            more = float(first["T_LLM_decode"] - known_ms) / first["new_kv_lengths"]
            _pair(key, again + more, again)
    return prompt, key


def summary(runs: pd.DataFrame, sessions: Sequence[Row]) -> Row:
    """Say what new lengths cost: as tried while warming up, or else as the runs themselves show.

    Parameters
    ----------
    sessions
        What the commands that measured said at their end (`session.SessionLog`).

    Returns
    -------
    dict
        ``mode``; for ``prompt`` and ``key`` a `Novelty`; ``costs``: whether either costs anything,
        None where nobody could tell; ``first_visits``: how many of the runs met a new length.
    """
    told = [session["lengths"] for session in sessions if session.get("lengths")]
    seen = dict(zip(("prompt", "key"), found_in_runs(runs), strict=True))
    found: Row = {"mode": told[-1]["mode"] if told else None}
    for name, of_runs in seen.items():
        tried = [one[name] for one in told if one[name]["pairs"]]
        found[name] = max(tried, key=lambda one: one["pairs"]) if tried else of_runs.to_dict()
    known = [found[name]["costs"] for name in seen if found[name]["costs"] is not None]
    new = runs["first_of_length"].fillna(False).astype(bool) | (runs["new_kv_lengths"] > 0)
    return {
        **found,
        "costs": any(known) if known else None,
        "first_visits": int(new.fillna(False).sum()),
    }


@lru_cache(maxsize=16)
def _surely_costs(differences: tuple[float, ...], again_ms: tuple[float, ...]) -> bool:
    """As `Novelty.costs`, which is asked before every run and changes with a pair only."""
    from vlm_latency.statistics import percentile

    if not differences:
        return False
    smallest = SMALLEST_COST * float(np.median(again_ms))
    if len(differences) < ENOUGH_PAIRS:
        return min(differences) > smallest
    return percentile(differences, 50).above(smallest)


def _pair(novelty: Novelty, first: float, again: float) -> None:
    if np.isfinite([first, again]).all():  # the seed's methods know no time to the first token
        novelty.first_ms.append(first)
        novelty.again_ms.append(again)
