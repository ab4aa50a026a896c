"""Parts of a plan that are measured without coordination, and how their journals become one.

Shard 3 of 8 of every experiment lies in ``output_dir/shard-3of8`` and is nothing but journals:
``output_dir/shard-3of8/exp1/journal``.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vlm_latency.errors import MeasurementError
from vlm_latency.journal import BEGAN, RUN, Journal
from vlm_latency.option_types import Shard
from vlm_latency.records import Row, ok_rows, plain_rows

_NAMED = 3  # requests that a refusal names


def deal(planned: pd.DataFrame, shapes: Mapping[str, Hashable], count: int) -> np.ndarray:
    """Deal the runs of a plan to so many hands, which all get every shape.

    Where a shape has as many requests as there are hands, requests are dealt with all of their
    runs, so that repeats of one tell the noise of one device; else single runs are. Those of one
    shape come after those of another, so hands differ by one deal at most, in each shape and in all.

    Parameters
    ----------
    planned
        Columns ``request_id`` and ``run_index``.
    shapes
        What each request is made of; requests of equal shapes do the same work.

    Returns
    -------
    array of int
        For each run its hand, from 0. A shape of fewer runs than hands is not in every hand.

    Examples
    --------
    >>> planned = pd.DataFrame({"request_id": list("abcabc"), "run_index": [0, 0, 0, 1, 1, 1]})
    >>> deal(planned, {"a": 1, "b": 1, "c": 2}, 2).tolist()
    [0, 1, 0, 0, 1, 1]
    """
    codes = {shape: code for code, shape in enumerate(dict.fromkeys(shapes.values()))}
    of_request = {name: number for number, name in enumerate(shapes)}
    runs = pd.DataFrame(
        {
            "shape": planned["request_id"].map({name: codes[of] for name, of in shapes.items()}),
            "request": planned["request_id"].map(of_request),
            "run": planned["run_index"].astype(int),
        }
    ).reset_index(drop=True)
    runs["weight"] = -runs.groupby("request")["run"].transform("size")
    whole = runs.groupby("shape")["request"].transform("nunique") >= count
    runs["unit"] = runs["run"].where(~whole, 0)
    runs.loc[~whole, "weight"] = 0
    dealt = runs.drop_duplicates(["request", "unit"])
    dealt = dealt.sort_values(["shape", "weight", "unit", "request"]).assign(hand=0)
    dealt["hand"] = np.arange(len(dealt)) % count
    return runs.merge(dealt[["request", "unit", "hand"]], on=["request", "unit"])["hand"].to_numpy()


def rare(planned: pd.DataFrame, shapes: Mapping[str, Hashable], count: int) -> int:
    """Count the shapes that have fewer runs than there are hands."""
    runs = planned["request_id"].map({name: str(shape) for name, shape in shapes.items()})
    return int((runs.value_counts() < count).sum())


def journals_of_shards(folder: Path) -> dict[Shard, Journal]:
    """Find the journals of shards that belong to an experiment's own.

    Parameters
    ----------
    folder
        The experiment's own journal, ``output_dir/exp1/journal``.

    Returns
    -------
    dict
        By shard, whichever exist.

    Raises
    ------
    MeasurementError
        When there are shards of several divisions.
    """
    experiment, root = folder.parent.name, folder.parent.parent
    found = {}
    for path in root.glob(f"shard-*of*/{experiment}/journal"):
        name = path.parent.parent.name
        if (match := re.fullmatch(r"shard-([0-9]+)of([0-9]+)", name)) and any(path.glob("*.jsonl")):
            found[Shard(int(match[1]), int(match[2]))] = Journal(path)
    if len({shard.total for shard in found}) > 1:
        raise MeasurementError(
            f"{root} holds shards of several divisions of {experiment}: "
            f"{', '.join(shard.folder for shard in sorted(found))}; expected one: move the others away"
        )
    return dict(sorted(found.items()))


def gather(
    own: Journal,
    parts: Mapping[Shard, Journal],
    plan: pd.DataFrame,
    hands: np.ndarray,
    environment: Mapping[str, Any],
    *,
    allow_partial: bool = False,
) -> Iterator[tuple[list[Row], list[Row]]]:
    """Bring the runs of all shards together.

    Parameters
    ----------
    own
        What was measured, or gathered, without a shard.
    parts
        The shards' journals; at least one.
    plan
        All runs, with columns `journal.RUN`.
    hands
        For each run the shard that it was dealt to, from 0 (`deal`).
    environment
        Its ``conditions`` and ``fingerprint`` are those of every shard.

    Yields
    ------
    rows, sessions
        Of each shard, what ``own`` does not hold yet; ``order_index`` is the order of time.

    Raises
    ------
    MeasurementError
        When a run is in two shards, in none, or was measured under other conditions, naming them.
    """
    mark = environment["fingerprint"]
    experiment = own.folder.parent.name
    for shard, journal in parts.items():
        _refuse_other_conditions(shard, journal, environment)
    tables = {
        shard: journal.read(mark).merge(plan[RUN], on=RUN) for shard, journal in parts.items()
    }
    before = own.read(mark)
    _refuse_doubles(experiment, before, tables)
    if not allow_partial:
        _refuse_gaps(experiment, before, tables, plan, hands)
    copied = set(before[[*RUN, "started_at"]].itertuples(index=False, name=None))
    new = {}
    for shard, table in tables.items():
        known = table[[*RUN, "started_at"]].itertuples(index=False, name=None)
        new[shard] = table[[run not in copied for run in known]]
    starts = pd.concat([table["started_at"] for table in new.values()], keys=range(len(new)))
    first = 0 if before.empty else int(before["order_index"].max()) + 1
    places = starts.rank(method="first").astype(int) - 1 + first
    sessions = [*own.sessions(mark), *({BEGAN: said} for said in own.began(mark))]
    for number, (shard, table) in enumerate(new.items()):
        rows = table.assign(order_index=places.loc[[number]].to_numpy()) if len(table) else table
        told = [{**session, "shard": str(shard)} for session in parts[shard].sessions(mark)]
        told += [{BEGAN: said} for said in parts[shard].began(mark)]
        yield plain_rows(rows), [one for one in told if one not in sessions]


def _refuse_other_conditions(
    shard: Shard, journal: Journal, environment: Mapping[str, Any]
) -> None:
    mark = environment["fingerprint"]
    if journal.path(mark).exists():
        return
    told = "; ".join(
        difference(journal.conditions(path), environment["conditions"])
        for path in journal.others(mark)
    )
    raise MeasurementError(
        f"{journal.folder.parent.name}: shard {shard} was measured under other conditions than those "
        f"of this command ({told}); give this command the parameters, machine and version of the "
        f"shards, or measure the shard again with measurement.shard={shard} and this command's"
    )


def _refuse_doubles(
    experiment: str, before: pd.DataFrame, tables: Mapping[Shard, pd.DataFrame]
) -> None:
    """Refuse a run that two shards measured, or a shard and a command without one."""
    one = [*RUN, "started_at", "worker"]
    named = [table.assign(where=f"shard {shard}") for shard, table in tables.items()]
    runs = pd.concat(named, ignore_index=True)
    held = ok_rows(before).assign(where="the journal without shard")
    gathered = held[one].merge(runs[one].drop_duplicates(), on=one, how="left", indicator=True)
    runs = pd.concat([runs, held[(gathered["_merge"] == "left_only").to_numpy()]])
    twice = runs[runs.duplicated(RUN, keep=False)].sort_values([*RUN, "where"])
    if twice.empty:
        return
    places = " and ".join(twice["where"].unique())
    raise MeasurementError(
        f"{experiment}: {len(twice.drop_duplicates(RUN))} runs are in {places}: {_runs(twice)}; "
        "expected each run in one of them: move away the one that is not wanted"
    )


def _refuse_gaps(
    experiment: str,
    before: pd.DataFrame,
    tables: Mapping[Shard, pd.DataFrame],
    plan: pd.DataFrame,
    hands: np.ndarray,
) -> None:
    """Refuse runs that no shard measured, naming the shard that each was dealt to."""
    count = next(iter(tables)).total
    held = pd.concat([before, *tables.values()], ignore_index=True)[RUN].drop_duplicates()
    found = plan[RUN].assign(hand=hands).merge(held, on=RUN, how="left", indicator=True)
    missing = found[found["_merge"] == "left_only"]
    if missing.empty:
        return
    told = []
    for hand in sorted(missing["hand"].unique()):
        shard, runs = Shard(int(hand) + 1, count), missing[missing["hand"] == hand]
        absent = "" if shard in tables else " (not there at all)"
        told.append(f"shard {shard}{absent} lacks {len(runs)}: {_runs(runs)}")
    raise MeasurementError(
        f"{experiment}: {len(missing)} of {len(plan)} runs are in no shard; {'; '.join(told)}; run "
        "the same command with that measurement.shard again, or report on the part with "
        "measurement.allow_partial=true"
    )


def _runs(table: pd.DataFrame) -> str:
    runs = table.drop_duplicates(RUN)
    shown = [
        f"{run.request_id} run {run.run_index}" for run in runs.head(_NAMED).itertuples(index=False)
    ]
    return ", ".join(shown) + (", …" if len(runs) > _NAMED else "")


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Name what differs between two sets of conditions, such as ``model.seed``."""
    before, after = _flat(old), _flat(new)
    names = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    told = [f"{key}: {before.get(key)} → {after.get(key)}" for key in names[:4]]
    return ", ".join(told) or "none named"


def _flat(conditions: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in conditions.items():
        found |= _flat(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
    return found
