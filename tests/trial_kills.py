"""The trial: commands killed at random moments, and the same command again.

``python tests/trial_kills.py --whole 200 --writer 800`` kills so many whole ``kedro run`` and so many
processes that write a journal, a result, a figure or the page. After every kill the same command
runs again and must end with the complete table: nothing lost, doubled or stale, and able to report.
Every command is forked from a process that has imported everything, so that a thousand are no
matter of days; that process computes with one thread, as OpenMP's others would be missing in a fork
and waited for (torch's attention then never returns). The suite runs a few of them (``test_crash.py``), never this file.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch and Arrow are imported

import pandas as pd
from tqdm import tqdm

PROJECT = Path(__file__).parents[1]
FAULTS = ("lost", "doubled", "stale", "unable")
PATIENCE = 300  # seconds, for a command that hangs

SMALL = {
    "figures.dpi": 50,
    "exp1.sampling.num_samples": 4,
    "exp1.measurement.noise_repeats": 1,
    "exp2.sampling.num_samples": 3,
    "exp3.sampling.max_grid_size": 4,
    "exp3.measurement.num_runs": 2,
    "exp4.sampling.num_samples": 2,
    "exp4.sampling.max_new_tokens_list": "2 4 6",
    "measurement.chunk_size": 1,
    "measurement.warmup_runs": 0,
    "calibration.ceiling_seconds": 0.05,
    "calibration.proof_seconds": 0.2,
    "calibration.aa_comparisons": 2,
    "calibration.aa_pairs": 2,
    "calibration.pairs": 2,
    "calibration.injections": 2,
    "calibration.delays_ms": "5",
    "calibration.method_requests": 1,
    "calibration.output_tokens": 2,
}
NULL = {**SMALL, "model.name": "null-model"}
BOTH = ("null-model all", "tiny-molmo all")  # what compare reads


@dataclass
class Command:
    """What is run and killed, and how often of all."""

    name: str
    share: float
    run: Callable[[Path, Callable[[str], None]], None]
    whole: bool
    tear: bool = False  # as when the power fails while the last lines are written
    undisturbed: Path | None = None
    moments: list[tuple[str, float]] = field(default_factory=list)  # of an undisturbed run
    seconds: float = 0.0


# What is run ---------------------------------------------------------------------------------------
def kedro(pipeline: str, parameters: dict[str, Any]) -> Callable[..., None]:
    """Make the command ``kedro run --env smoke --pipeline …``."""

    def run(folder: Path, at: Callable[[str], None]) -> None:
        from kedro.framework.hooks import hook_impl
        from kedro.framework.session import KedroSession

        class Moments:
            @hook_impl
            def before_node_run(self, node: Any) -> None:
                at(node.name)

        given: dict[str, Any] = {}
        for name, value in {**parameters, "output_dir": str(folder)}.items():
            group = given
            *path, last = name.split(".")
            for part in path:
                group = group.setdefault(part, {})
            group[last] = value
        with KedroSession.create(
            project_path=PROJECT, env="smoke", runtime_params=given
        ) as session:
            session._hook_manager.register(Moments())
            session.run(pipeline_names=[pipeline])

    return run


def measure_runs(folder: Path, at: Callable[[str], None]) -> None:
    """Measure 50 requests three times on the null model through the pipeline's own nodes."""
    from vlm_latency.datasets import AtomicParquet, RecordLog
    from vlm_latency.models import ModelHandle
    from vlm_latency.options import Options
    from vlm_latency.pipelines.measurement import nodes
    from vlm_latency.records import REQUEST_COLUMNS, typed, with_hashes
    from vlm_latency.vqa import open_source
    from vlm_latency.vqa.images import noise_recipe

    settings = {"num_runs": 3, "output_length": "2", "chunk_size": 4}
    options = Options.from_parameters(
        {"model": {"name": "null-model"}, "measurement": settings}
    ).experiment("exp1", "random")
    asked = {
        "request_id": [f"exp1-{n}" for n in range(50)],
        "experiment": "exp1",
        "question_id": [str(n) for n in range(50)],
        "question": "What is it?",
        "image_recipe": [noise_recipe(n % 9, 24 + n % 9, 24) for n in range(50)],
        "image_width": [24 + n % 9 for n in range(50)],
        "image_height": 24,
        "output_length": "2",
    }
    requests = with_hashes(typed(pd.DataFrame(asked), REQUEST_COLUMNS))
    environment = {"fingerprint": "aa", "conditions": {"model": "null"}}
    log, model = RecordLog(filepath=str(folder / "exp1" / "journal")), ModelHandle(options.model)
    plan = nodes.plan_runs(options, requests)
    at("measure")
    for chunk in nodes.measure(
        options, requests, plan, model, open_source(size=3), environment, log.load()
    ):
        log.save(chunk)
    at("collect")
    table, *_ = nodes.collect(options, plan, environment, log.load())
    AtomicParquet(filepath=str(folder / "exp1" / "exp1_records.parquet")).save(table)


def write_files(folder: Path, at: Callable[[str], None]) -> None:
    """Write what a command writes at its end, several times over, and the page of what is there."""
    from matplotlib.figure import Figure

    from vlm_latency import datasets as ds
    from vlm_latency.page import build_page

    numbers = list(range(3000))
    table = pd.DataFrame({"n": numbers, "text": [f"row {n}" for n in numbers]})
    result = {"experiment": "exp1", "results": table.head(1500).to_dict("records")}
    figure = Figure(figsize=(2, 2))
    figure.subplots().plot(numbers)
    tables = {"percentiles": table.head(200)}
    place = folder / "exp1"
    files: dict[str, tuple[Any, Any]] = {
        "ceilings": (
            ds.AtomicJSON(filepath=str(folder / "calibration" / "ceilings.json")),
            {"flops_per_s": 1.0, "many": numbers},
        ),
        "table of records": (ds.AtomicParquet(filepath=str(place / "rows.parquet")), table),
        "result": (ds.ResultFile(root=str(folder), study="exp1"), result),
        "figure": (ds.FigureFile(filepath=str(place / "figures" / "one.png"), dpi=40), figure),
        "tables": (ds.TableFolder(filepath=str(place / "tables")), tables),
    }
    for _ in range(3):
        for name, (dataset, data) in files.items():
            at(name)
            dataset.save(data)
        at("page")
        found = ds.ResultsFolder(filepath=str(folder)).load()
        ds.HTMLPage(filepath=str(folder / "report" / "index.html")).save(build_page(found))


def commands(home: Path) -> list[Command]:
    """List what is killed, with its share."""
    tiny = {**SMALL, "model.name": "tiny-molmo"}
    baseline, candidate = (str(home / "undisturbed" / name) for name in BOTH)
    pair = {"compare.baseline": baseline, "compare.candidate": candidate}
    (home / "variants.yml").write_text("one: {}\ntwo: {}\nslow: {model.null_sleep_ms: 2}\n")
    turns = {"compare.variants": str(home / "variants.yml"), "compare.num_runs": 6}
    return [
        Command("null-model all", 0.03, kedro("all", NULL), whole=True),
        Command("tiny-molmo all", 0.02, kedro("all", tiny), whole=True),
        Command("exp1", 0.24, kedro("exp1", NULL), whole=True),
        Command("exp2", 0.18, kedro("exp2", NULL), whole=True),
        Command("exp3", 0.17, kedro("exp3", NULL), whole=True),
        Command("exp4", 0.15, kedro("exp4", NULL), whole=True),
        Command("calibration", 0.05, kedro("calibration", tiny), whole=True),
        Command("compare", 0.08, kedro("compare", {**NULL, **pair}), whole=True),
        Command("variants", 0.08, kedro("compare", {**NULL, **turns}), whole=True),
        Command("journal", 0.4, measure_runs, whole=False),
        Command("torn journal", 0.2, measure_runs, whole=False, tear=True),
        Command("files", 0.4, write_files, whole=False),
    ]


# Running and killing ------------------------------------------------------------------------------
class Child:
    """A command in a process of its own, whose phase can be seen from here."""

    def __init__(self, command: Command, folder: Path):
        self._seen = mmap.mmap(-1, 256)
        self.began, self.log = time.monotonic(), folder.with_suffix(".log")
        self.status: int | None = None
        self.moments: list[tuple[str, float]] = []
        self.pid = os.fork()
        if self.pid == 0:
            self._be(command, folder)

    def _be(self, command: Command, folder: Path) -> None:
        status = 1
        try:
            out = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            faulthandler.dump_traceback_later(PATIENCE / 2)  # where a command hangs

            def at(phase: str) -> None:
                self._seen[:] = phase.encode()[:255].ljust(256, b"\0")

            at("start")
            command.run(folder, at)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    @property
    def phase(self) -> str:
        return self._seen[:].rstrip(b"\0").decode() or "start"

    def ended(self) -> bool:
        """Whether it ended by itself; its phases are noted on the way."""
        if not self.moments or self.moments[-1][0] != self.phase:
            self.moments.append((self.phase, time.monotonic() - self.began))
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = status
            elif time.monotonic() - self.began > PATIENCE:
                os.kill(self.pid, signal.SIGKILL)
                _, self.status = os.waitpid(self.pid, 0)
        return self.status is not None

    def kill(self) -> bool:
        """Kill it at once; whether it was still at work."""
        if self.ended():
            return False
        os.kill(self.pid, signal.SIGKILL)
        _, self.status = os.waitpid(self.pid, 0)
        return os.WIFSIGNALED(self.status)


def whole_run(command: Command, folder: Path) -> Child:
    """Run a command to its end."""
    child = Child(command, folder)
    while not child.ended():
        time.sleep(0.001)
    return child


def killed_run(command: Command, folder: Path) -> tuple[bool, str]:
    """Run a command and kill it; whether it was killed, and in which phase.

    The moment is one of all, or one within a phase, or one at which a file is being written.
    """
    child = Child(command, folder)
    how = random.choice(("moment", "phase", "phase", "file"))
    if how == "moment":
        end = child.began + random.uniform(0, command.seconds)
        _until(child, lambda: time.monotonic() >= end)
    elif how == "phase":
        number = random.randrange(len(command.moments))
        name, begins = command.moments[number]
        later = [moment for _, moment in command.moments[number + 1 :]]
        length = (later[0] if later else command.seconds) - begins
        _until(child, lambda: child.phase == name)
        end = time.monotonic() + random.uniform(0, length)
        _until(child, lambda: time.monotonic() >= end)
    else:
        wanted, seen = random.randrange(1, 30), set[str]()

        def enough() -> bool:
            seen.update(str(path) for path in folder.rglob(".*.part*"))
            return len(seen) >= wanted

        _until(child, enough)
    phase = child.phase
    return child.kill(), phase


def _until(child: Child, reached: Callable[[], bool]) -> None:
    while not child.ended() and not reached():
        time.sleep(0.0002)


# What must be true afterwards ----------------------------------------------------------------------
def on_disk(folder: Path) -> dict[str, dict[tuple[Any, ...], Any]]:
    """Read the whole lines of every journal: experiment → run → when and how long."""
    found: dict[str, dict[tuple[Any, ...], Any]] = {}
    for path in folder.glob("*/journal/*.jsonl"):
        runs = found.setdefault(path.parts[-3], {})
        runs |= {_run(row): _measured(row) for row in _rows(path)}
    return found


def _run(row: Any) -> tuple[Any, ...]:
    return (row["request_id"], row["request_sha256"], int(row["run_index"]), row["model"])


def _measured(row: Any) -> tuple[Any, ...]:
    return (int(row["order_index"]), float(row["T_total"]))


def faults(command: Command, folder: Path, child: Child, before: Any) -> dict[str, str]:
    """Compare what the command made after a kill with what an undisturbed one makes."""
    if child.status != 0:
        return {"unable": f"status {child.status}, {child.log}"}
    assert command.undisturbed is not None
    found: dict[str, str] = {}
    ours, theirs = _files(folder), _files(command.undisturbed)
    if absent := theirs - ours:
        found["lost"] = f"no {sorted(absent)}"
    if left := ours - theirs:
        found["stale"] = f"left over: {sorted(left)}"
    for name in sorted(ours & theirs):
        try:
            _opens(folder / name)
        except Exception as error:
            found["unable"] = f"{name}: {error}"
    for path in folder.glob("*/*_records.parquet"):
        study = path.parent.name
        rows = pd.read_parquet(path).to_dict("records")
        runs = {_run(row): _measured(row) for row in rows}
        expected = pd.read_parquet(command.undisturbed / study / path.name).to_dict("records")
        if {_run(row) for row in expected} - set(runs):
            found["lost"] = f"{study}: runs of the plan"
        lines = [line for log in path.parent.glob("journal/*.jsonl") for line in _rows(log)]
        if len(runs) < len(rows) or len(lines) > len(set(map(_run, lines))):
            found["doubled"] = f"{study}: {len(rows)} rows, {len(lines)} lines, {len(runs)} runs"
        if len(runs) > len(expected):
            found["stale"] = f"{study}: {len(runs)} runs in place of {len(expected)}"
        kept = before.get(study, {})
        if changed := [run for run, measured in kept.items() if runs.get(run) != measured]:
            found["lost"] = f"{study}: {len(changed)} runs that were on the disk"
        if runs != {_run(line): _measured(line) for line in lines}:
            found["stale"] = f"{study}: records are not those of the journal"
    if told := list(_disagreeing(folder)):
        found["stale"] = "; ".join(told)
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    """Read the runs of a journal's whole lines."""
    lines = [json.loads(line) for line in path.read_bytes().split(b"\n")[1:-1]]
    return [line for line in lines if "request_id" in line]


def _files(folder: Path) -> set[str]:
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    return {n for n in names if not n.endswith((".lock", ".cut")) and "/journal/" not in n}


def _opens(path: Path) -> None:
    if path.suffix == ".png":
        from PIL import Image

        with Image.open(path) as image:
            image.load()
    elif path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
    elif path.suffix == ".csv":
        pd.read_csv(path)
    elif path.suffix == ".html" and not path.read_text(encoding="utf-8").endswith("</html>"):
        raise ValueError("half a page")


def _disagreeing(folder: Path) -> Iterator[str]:
    """Name results that say something else than the tables beside them, and an older page."""
    page = folder / "report" / "index.html"
    for path in folder.glob("exp[1-5]/exp*.json"):
        result, study = json.loads(path.read_text(encoding="utf-8")), path.parent.name
        if page.exists() and page.stat().st_mtime_ns < path.stat().st_mtime_ns:
            yield f"the page is older than {path.name}"
        records = path.parent / f"{study}_records.parquet"
        if records.exists() and "coverage" in result:
            means = pd.read_parquet(records).groupby("request_id")["T_total"].mean()
            told = {entry["request_id"]: entry["T_total"] for entry in result["results"]}
            if any(abs(told[name] - means[name]) > 1e-9 for name in told) or len(told) < len(means):
                yield f"{path.name} is not of the records beside it"
        if study == "exp5":
            for sweep in ("exp3", "exp4"):
                made = next((folder / sweep).glob(f"{sweep}_*.json"))
                entries = json.loads(made.read_text(encoding="utf-8"))["results"]
                if result[sweep]["latencies"] != [entry["T_total"] for entry in entries]:
                    yield f"exp5 is not of {sweep} beside it"


# The trial -------------------------------------------------------------------------------------------
def trial(command: Command, folder: Path, table: dict[Any, Counter[str]]) -> bool:
    """Kill a command once in an empty folder, run it again, and count the faults by phase.

    Returns
    -------
    bool
        Whether it was killed; it may have ended before.
    """
    folder.mkdir()
    killed, phase = killed_run(command, folder)
    found: dict[str, str] = {}
    if killed:
        kind = "whole run" if command.whole else "writer"
        row = table[(kind, command.name, phase.rpartition(".")[2])]
        row["kills"] += 1
        for journal in folder.glob("*/journal/*.jsonl") if command.tear else ():
            size = journal.stat().st_size
            os.truncate(journal, max(0, size - random.randrange(2000)))
        before = on_disk(folder)
        found = faults(command, folder, whole_run(command, folder), before)
        for fault, why in found.items():
            row[fault] += 1
            print(f"{command.name}, killed in {phase}: {fault}: {why}", file=sys.stderr)
    if not found:  # what went wrong can be looked at
        shutil.rmtree(folder)
    return killed


def show(table: dict[Any, Counter[str]]) -> str:
    """Write the table as Markdown."""
    columns = ["kills", *FAULTS]
    lines = [f"| command | what | phase | {' | '.join(columns)} |", "|---" * 8 + "|"]
    total: Counter[str] = Counter()
    for key, row in sorted(table.items()):
        total.update(row)
        lines.append(f"| {' | '.join(key)} | {' | '.join(str(row[c]) for c in columns)} |")
    lines.append(f"| all | | | {' | '.join(str(total[c]) for c in columns)} |")
    return "\n".join(lines)


def warm() -> None:
    """Import and start whatever a command needs, in the process that all are forked from."""
    from kedro.framework.startup import bootstrap_project

    # tqdm's own lock is a semaphore that forks share: one killed while it held it stopped all later.
    tqdm.set_lock(threading.RLock())
    bootstrap_project(PROJECT)
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        kedro("all", {**SMALL, "model.name": "tiny-molmo"})(Path(folder), lambda _: None)
        write_files(Path(folder), lambda _: None)
    logging.disable(logging.NOTSET)


def main(arguments: list[str] | None = None) -> int:
    """Do the trial; the status is the number of faults."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--whole", type=int, default=200, help="kills of whole kedro runs")
    parser.add_argument("--writer", type=int, default=800, help="kills of a forked writer")
    parser.add_argument("--only", default="", help="commands whose name holds this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no command after these")
    asked = parser.parse_args(arguments)
    random.seed(asked.seed)
    table: dict[Any, Counter[str]] = defaultdict(Counter)
    until = time.monotonic() + 60 * asked.minutes
    home = Path(tempfile.mkdtemp(prefix="trial-"))
    (home / "undisturbed").mkdir()
    warm()
    compares = bool(asked.whole) and asked.only in "compare"
    ahead: list[Command] = []  # one after the other in any order: a trial cut short has them all
    for command in commands(home):
        kills = round(command.share * (asked.whole if command.whole else asked.writer))
        kills = kills if asked.only in command.name else 0
        if not kills and not (compares and command.name in BOTH):
            continue
        command.undisturbed = home / "undisturbed" / command.name
        command.undisturbed.mkdir()
        child = whole_run(command, command.undisturbed)
        assert child.status == 0, child.log.read_text()
        command.moments, command.seconds = child.moments, time.monotonic() - child.began
        print(f"{command.name}: {command.seconds:.1f} s undisturbed", file=sys.stderr, flush=True)
        ahead += [command] * kills
    random.shuffle(ahead)
    number = 0
    while ahead and time.monotonic() < until:
        number += 1
        if trial(ahead[-1], home / f"{number} {ahead[-1].name}", table):
            ahead.pop()
    print(show(table), flush=True)
    if not any(row[fault] for row in table.values() for fault in FAULTS):
        shutil.rmtree(home)
    return sum(row[fault] for row in table.values() for fault in FAULTS)


if __name__ == "__main__":
    sys.exit(min(main(), 100))
