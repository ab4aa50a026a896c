"""The workers of a command: started once, given their part of each plan, replaced when all died."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

import vlm_latency
from vlm_latency.errors import MeasurementError, UserError
from vlm_latency.instrument.environment import code_hash, software
from vlm_latency.models import ModelHandle
from vlm_latency.option_groups import RayOptions
from vlm_latency.options import MeasurementOptions, ModelOptions
from vlm_latency.records import Row
from vlm_latency.shards import difference
from vlm_latency.workers.asked import count_workers, settled
from vlm_latency.workers.worker import Work, Worker

log = logging.getLogger("vlm_latency")

AUTH_MODE = "RAY_AUTH_MODE"  # token, or disabled: as the cluster was started
OBJECT_STORE_BYTES = 80 * 2**20  # rows are small; Ray wants 75 MB at least
Chunk = tuple[list[Row], dict[str, Any] | None]
Deal = Callable[[pd.DataFrame, int], Any]


class Pool:
    """Workers, each with a device of its own.

    Parameters
    ----------
    model
        What each of them loads.
    count
        How many; None: as many as a cluster has devices of the kind.
    uses_gpu
        Whether each needs a GPU, or a CPU.
    address
        Of a cluster that runs already; None: this machine.
    """

    def __init__(
        self, model: ModelOptions, count: int | None, uses_gpu: bool, address: str | None
    ) -> None:
        if address not in (None, "auto") and _has_token():
            # For a cluster by address Ray must be told, and before it is imported.
            os.environ.setdefault(AUTH_MODE, "token")
        import ray

        self._ray = ray
        self._model, self._gpu = model, uses_gpu
        _start(ray, count, uses_gpu, address)
        kind = "GPU" if uses_gpu else "CPU"
        there = int(ray.cluster_resources().get(kind, 0))
        if there < (count or 1):
            raise MeasurementError(
                f"the cluster at {address} has {there} {kind}s; expected {count or 'at least 1'}: ask for "
                "fewer workers, or add nodes"
            )
        self.count = count or there
        self._alive: dict[int, Any] = {}
        self.workers: list[dict[str, Any]] = []
        self._begin()

    def line(self) -> str:
        """Say in words who measures."""
        names = [f"{one['index']} {one['device_name']} on {one['host']}" for one in self.workers]
        return f"{len(names)} workers: {', '.join(names)}"

    def call(self, index: int, what: str, *given: Any) -> Any:
        """Let one worker do something."""
        found = self._ask(what, *given, each={index: ()})
        if index not in found:
            raise MeasurementError(f"worker {index} died; run the same command again")
        return found[index]

    def ceilings(self, seconds: float) -> list[dict[str, Any]]:
        """Measure what each worker's device can do at most, all at the same time."""
        found = self._ask("ceilings", seconds)
        return [{**found[index], "worker_index": index} for index in sorted(found)]

    def measure(
        self, work: Work, left: pd.DataFrame, deal: Deal, say: Callable[[str], None]
    ) -> Iterator[Chunk]:
        """Make runs on all workers.

        A worker that dies gives its runs back: they are dealt to the others when these are done,
        and to new workers where no other is left.

        Parameters
        ----------
        left
            Columns of `plan.plan` and ``request_sha256``: the runs to make, in their order.
        deal
            Assigns each run to one of a number of workers (`shards.deal`).
        say
            Shows what is being done.

        Yields
        ------
        rows, session
            As they come from whichever worker; what a worker said at the end of its hand.

        Raises
        ------
        MeasurementError
            When all workers died and none had made a run; says how many are missing.
        """
        planned = len(left)
        while len(left):
            if not self._alive:
                self._begin()
            made: set[tuple[str, int]] = set()
            for rows, session in self._round(work, left, deal, say):
                made |= {(row["request_id"], row["run_index"]) for row in rows}
                yield rows, session
            keys = zip(left["request_id"], left["run_index"], strict=True)
            left = left[[key not in made for key in keys]]
            if len(left) and not made:
                raise MeasurementError(
                    f"every worker died before it made a run, {len(left)} of {planned} runs are "
                    "missing; those that were made are kept: run the same command again, or with "
                    "measurement.workers=1, which shows what is wrong"
                )
            if len(left):
                log.warning("%d runs were given back and are dealt again", len(left))

    def _round(
        self, work: Work, left: pd.DataFrame, deal: Deal, say: Callable[[str], None]
    ) -> Iterator[Chunk]:
        """Deal runs to the workers that are alive, and yield what they make until all are done."""
        ray = self._ray
        hands = deal(left, len(self._alive))
        parts = {index: left[hands == n] for n, index in enumerate(sorted(self._alive))}
        parts = {index: part.reset_index(drop=True) for index, part in parts.items() if len(part)}
        say(f"warming up {len(parts)} workers")
        shared = ray.put(work)
        self._ask("prepare", shared, each={index: (part,) for index, part in parts.items()})
        ready = time.perf_counter()
        streams = {
            self._alive[index].measure.options(num_returns="streaming").remote(): index
            for index in parts
            if index in self._alive
        }
        while streams:
            (stream,), _ = ray.wait(list(streams), num_returns=1)
            try:
                rows, session = ray.get(next(stream))
            except StopIteration:
                del streams[stream]
                continue
            except ray.exceptions.RayError as error:
                self._bury(streams.pop(stream), error)
                continue
            if session:
                session = {**session, "from_all_ready_s": time.perf_counter() - ready}
            yield rows, session

    def _begin(self) -> None:
        """Start all workers, and refuse those that run something else than this process."""
        actor = self._ray.remote(
            num_cpus=1, num_gpus=1 if self._gpu else 0, max_restarts=0, max_task_retries=0
        )(Worker)
        self._alive = {
            index: actor.remote(index, self._model, str(Path.cwd()))
            for index in range(1, self.count + 1)
        }
        self.workers = list(self._ask("describe").values())
        refuse_other_code(self.workers)
        for note in unlike(self.workers):
            log.warning("%s", note)
        self._ask("load")
        if not self._alive:
            raise MeasurementError(
                "every worker died while it loaded the model; run the same command with "
                "measurement.workers=1, which shows what is wrong"
            )

    def _ask(
        self, what: str, *given: Any, each: dict[int, tuple[Any, ...]] | None = None
    ) -> dict[int, Any]:
        """Call a method of all workers, or some, at the same time; drop those that die."""
        asked = each if each is not None else dict.fromkeys(self._alive, ())
        answers = {
            index: getattr(self._alive[index], what).remote(*given, *own)
            for index, own in asked.items()
        }
        found = {}
        for index, answer in answers.items():
            try:
                found[index] = self._ray.get(answer)
            except self._ray.exceptions.RayError as error:
                self._bury(index, error)
        return found

    def _bury(self, index: int, error: Any) -> None:
        """Drop a worker that died; an error that its code raised is raised here."""
        cause = getattr(error, "cause", None)
        if isinstance(cause, UserError):
            raise cause from None
        if cause is not None:  # a defect, with the worker's own traceback
            raise error
        self._alive.pop(index, None)
        host = next((w["host"] for w in self.workers if w["index"] == index), "its host")
        log.warning("worker %d on %s died (%s)", index, host, type(error).__name__)


_pools: dict[tuple[Any, ...], Pool] = {}


def pool_of(handle: ModelHandle, measurement: MeasurementOptions, ray: RayOptions) -> Pool:
    """Give the workers of this command: those of the experiment before, or new ones."""
    model = settled(handle, measurement, ray)
    count: int | None
    if ray.address:
        count = None if measurement.workers == "all" else int(measurement.workers)
    else:
        count = count_workers(measurement, handle)
    uses_gpu = handle.device.startswith("cuda")
    key = (model.model_dump_json(), count, uses_gpu, ray.address)
    if key not in _pools:
        close()
        try:
            _pools[key] = Pool(model, count, uses_gpu, ray.address)
        except BaseException:
            _shut_down()
            raise
    return _pools[key]


def close() -> None:
    """End all workers."""
    if _pools:
        _pools.clear()
        _shut_down()


def _shut_down() -> None:
    if ray := sys.modules.get("ray"):
        ray.shutdown()


def refuse_other_code(workers: Sequence[dict[str, Any]]) -> None:
    """Refuse workers that run other code or other versions than this process.

    Raises
    ------
    MeasurementError
        Naming the worker and what differs.
    """
    for worker in workers:
        here = {"software": software(worker["device"]), "code_sha256": code_hash()}
        there = {name: worker[name] for name in here}
        if there != here:
            raise MeasurementError(
                f"worker {worker['index']} on {worker['host']} differs from this process "
                f"({difference(here, there)}); install the same versions on every node"
            )


def unlike(workers: Sequence[dict[str, Any]]) -> list[str]:
    """Name the workers whose machine is another one than the first worker's."""
    first = workers[0]
    return [
        f"worker {worker['index']} on {worker['host']} has another machine than worker "
        f"{first['index']}: {difference(first['hardware'], worker['hardware'])}"
        for worker in workers
        if worker["hardware"] != first["hardware"]
    ]


def _start(ray: Any, count: int | None, uses_gpu: bool, address: str | None) -> None:
    """Start Ray on this machine alone, quiet, or join a cluster; SIGTERM stays with the command."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")  # nothing else may end a worker
    source = str(Path(vlm_latency.__file__).parents[1])
    before = os.environ.get("PYTHONPATH", "")
    if source not in before.split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [source, before]))
    handler = signal.getsignal(signal.SIGTERM)
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address is None:
            ray.init(
                address="local",
                num_cpus=count,
                num_gpus=count if uses_gpu else 0,
                object_store_memory=OBJECT_STORE_BYTES,
                _node_ip_address="127.0.0.1",
                **quiet,
            )
        else:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, OSError, ValueError, RuntimeError) as error:
        told = " ".join(str(error).split())[:300]
        where = f"to the cluster at ray.address={address}" if address else "on this machine"
        mode = os.environ.get(AUTH_MODE, "not set")
        asked = f" ({AUTH_MODE} is {mode}: it must be the cluster's)" if address else ""
        raise MeasurementError(
            f"Ray did not start {where}: {told}{asked}; measurement.workers=1 does without it"
        ) from None
    finally:
        if handler is not None and signal.getsignal(signal.SIGTERM) is not handler:
            signal.signal(signal.SIGTERM, handler)


def _has_token() -> bool:
    """Whether a token for clusters that ask for one is where Ray looks for it."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return True
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"
    return Path(path).is_file()
