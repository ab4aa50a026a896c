"""What measuring costs here, beside its peers, all in turn in one process.

``python tests/side_by_side.py --model small-molmo`` runs the same requests instrumented, by bare
``generate()``, by the seed study's subtraction, under ``torch.profiler`` and by optimum-benchmark's
tracker of tokens where that is installed, and prints ratios to bare ``generate()`` with their
intervals. Each round is a bare run, an instrumented one and one of a peer, which take turns, in
random order. ``generate()`` is what the request itself took meanwhile, the whole call also what
preparing and reading the instrument took.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib.metadata
import importlib.util
import logging
import math
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from vlm_latency.errors import UserError
from vlm_latency.instrument.calibration.bench import Bench, half_width, rounds_needed
from vlm_latency.instrument.environment import device_name
from vlm_latency.instrument.meter import quiet, synchronize
from vlm_latency.instrument.methods import make_meter
from vlm_latency.instrument.session import Session, SessionLog, undisturbed
from vlm_latency.models import load, thread_count
from vlm_latency.models.boundaries import boundaries
from vlm_latency.options import Options
from vlm_latency.records import REQUEST_COLUMNS, plain_rows, typed, with_hashes
from vlm_latency.statistics import compare_paired
from vlm_latency.vqa import image_bytes, open_source
from vlm_latency.vqa.images import at_size

BARE, OURS = "bare", "instrumented"
PEERS = {
    "again": "bare generate() again",
    "seed": "the seed study's subtraction",
    "profiler": "torch.profiler",
    "optimum": "optimum-benchmark",
}
HALF_WIDTH = 0.005  # of the interval of our ratio, from which on it is decided
PAIRS, PEER_PAIRS = 20, 10  # as many at least, where the time suffices
GOALS = {"cuda": (0.995, 1.005), "cpu": (0.0, 1.01)}  # where the interval should lie

Job = Callable[[Any], "float | None"]  # measures a request, gives the milliseconds of generate()


class Taken(NamedTuple):
    """What one run took, in milliseconds: ``generate()`` itself (None: not once), all of it."""

    inside: float | None
    whole: float


def main(words: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="small-molmo", help="name, hub id or folder")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--engine", default="eager")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--requests", type=int, default=4, help="different requests")
    parser.add_argument("--image", metavar="WIDTHxHEIGHT", help="default: sizes as VQA v2 has them")
    parser.add_argument("--tokens", type=int, default=8, help="written by each request")
    parser.add_argument("--seconds", type=float, default=45.0, help="at most, beside loading")
    asked = parser.parse_args(words)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler announces every start
    size = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", asked.image or "640x480")
    if asked.requests < 1 or asked.tokens < 2 or not size:
        parser.error(
            f"found --requests {asked.requests} --tokens {asked.tokens} --image {asked.image}; "
            "expected a request, a decode step (2 tokens), and a size such as 640x480"
        )
    about = {"name": asked.model, "dtype": asked.dtype, "engine": asked.engine}
    try:
        options = Options.from_parameters({"model": {**about, "device": asked.device}})
        vlm = load(options.model)
        rows = questions(
            asked.requests, asked.tokens, tuple(map(int, size.groups())) if asked.image else None
        )
        found = side_by_side(vlm, rows, asked.tokens, asked.seconds)
    except UserError as error:
        parser.error(str(error))
    print("\n".join(told(found)))
    return 0


def side_by_side(
    vlm: Any, rows: list[dict[str, Any]], tokens: int, seconds: float
) -> dict[str, Any]:
    """Run everything in turn until our interval is narrow, or the time is over.

    Returns
    -------
    dict
        ``passport`` (what ran where), ``ratios`` (by contender and ``generate()`` or ``whole``: a
        `Comparison` with bare ``generate()``), ``absent`` (by contender: why), ``pairs_needed``,
        ``seconds``.
    """
    if vlm.architecture.simulated:
        raise UserError(f"found --model {vlm.options.name}; expected a model that takes time")
    start = time.perf_counter()
    options = Options.from_parameters({"measurement": {"output_length": str(tokens)}})
    settled = options.experiment("exp2").measurement
    session = Session(vlm, settled, lambda row: image_bytes(row, None), "{question}", SessionLog())
    with undisturbed(vlm), contextlib.closing(session):
        session.open(rows, rows)
        prepared = [session.prepare(row) for row in rows]
        jobs, absent = _jobs(session.meter, tokens)
        for job in jobs.values():  # what each does for the first time
            _timed(job, prepared[0], vlm.device)
        warm = time.perf_counter() - start
        bench = Bench(session, prepared[0], np.random.default_rng(0), max(0.0, seconds - warm))
        pairs = _pairs(bench, jobs, prepared)
    ratios = {name: _ratios(*zip(*own, strict=True)) for name, own in pairs.items()}
    ours = ratios[OURS]["generate()"].ratio
    counts = [request.counts for request in prepared]
    return {
        "passport": _passport(vlm, tokens, [count.num_total_tokens for count in counts]),
        "ratios": ratios,
        "absent": absent,
        "pairs_needed": rounds_needed(ours, HALF_WIDTH),
        "seconds": time.perf_counter() - start,
    }


def questions(count: int, tokens: int, size: tuple[int, int] | None = None) -> list[dict[str, Any]]:
    """Make questions about synthetic images, of one size or of sizes as VQA v2 has them."""
    table = open_source(source="synthetic", size=count).table.drop_duplicates("image_id")
    if size is not None:
        recipes = [at_size(recipe, *size) for recipe in table["image_recipe"]]
        table = table.assign(image_recipe=recipes, image_width=size[0], image_height=size[1])
    table = table.assign(
        request_id=[f"request-{n}" for n in range(len(table))], output_length=str(tokens)
    )
    return plain_rows(with_hashes(typed(table, REQUEST_COLUMNS)))


def _jobs(meter: Any, tokens: int) -> tuple[dict[str, Job], dict[str, str]]:
    """Give what is run in turn, and why something is not."""
    absent: dict[str, str] = {}

    def bare(request: Any) -> float:
        return float(meter.bare(request, tokens)[0])

    def instrumented(request: Any) -> float:
        times = meter(request, tokens).times
        return float(times["T_total"] if times["T_total_host"] is None else times["T_total_host"])

    jobs: dict[str, Job] = {BARE: bare, OURS: instrumented, "again": bare}
    try:
        seed = make_meter(meter.vlm, "subtraction", meter.engine.name, meter.max_cache_len)
        seed.engine = meter.engine  # nothing is compiled twice
    except UserError as error:
        absent["seed"] = str(error)
    else:
        jobs["seed"] = functools.partial(_seed, seed, tokens)
    jobs["profiler"] = functools.partial(_profiled, meter, tokens)
    if importlib.util.find_spec("optimum_benchmark") is None:
        absent["optimum"] = "not installed"
    elif meter.engine.name == "loop":
        absent["optimum"] = "tracks generate()'s own loop, which engine=loop replaces"
    else:
        jobs["optimum"] = _optimum(meter, tokens)
    return jobs, absent


def _seed(meter: Any, tokens: int, request: Any) -> None:
    """Every part run and timed by itself: there is no one ``generate()`` to speak of."""
    meter(request, tokens)


def _profiled(meter: Any, tokens: int, request: Any) -> float:
    """Time components by ``torch.profiler``: ranges at the same boundaries, read from its events."""
    from torch.profiler import ProfilerActivity, profile, record_function

    on_device = meter.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_device
    ranges: list[Any] = []

    def push(label: str) -> None:
        ranges.append(record_function(label))
        ranges[-1].__enter__()

    with (
        profile(activities=activities, acc_events=True) as profiler,
        boundaries(
            meter.model,
            meter.vlm.components,
            push,
            lambda _: ranges.pop().__exit__(None, None, None),
        ),
    ):
        inside = meter.bare(request, tokens)[0]
    seen = {event.key: event.cpu_time_total for event in profiler.key_averages()}
    if "T_LLM_prefill" not in seen:
        raise UserError("torch.profiler saw no prefill; expected its range among the events")
    return float(inside)


def _optimum(meter: Any, tokens: int) -> Job:
    """Track the times of prefill and tokens as optimum-benchmark's inference scenario does."""
    from optimum_benchmark.trackers import PerTokenLatencySessionTrackerLogitsProcessor as Tracker

    logging.getLogger("latency").setLevel(logging.WARNING)

    def run(request: Any) -> float:
        tracker = Tracker(device=meter.device.type, backend="pytorch")
        arguments = meter.engine.arguments(request.inputs, tokens, False)
        with meter.engine.installed(), quiet(meter.device), tracker.session():
            start = time.perf_counter_ns()
            with tracker.track():
                meter.engine.generate({**arguments, "logits_processor": [tracker]})
            synchronize(meter.device)
            inside = (time.perf_counter_ns() - start) / 1e6
        for read in ("prefill", "decode", "generate", "per_token"):
            getattr(tracker, f"get_{read}_latency")()
        return inside

    return run


def _timed(job: Job, request: Any, device: Any) -> Taken:
    synchronize(device)
    start = time.perf_counter_ns()
    inside = job(request)
    synchronize(device)
    taken = Taken(inside, (time.perf_counter_ns() - start) / 1e6)
    gc.collect(1)
    return taken


def _pairs(
    bench: Bench, jobs: dict[str, Job], requests: list[Any]
) -> dict[str, list[tuple[Taken, Taken]]]:
    """Make rounds; by contender: (bare, contender) of each round it was in."""
    peers = [name for name in PEERS if name in jobs]
    pairs: dict[str, list[tuple[Taken, Taken]]] = defaultdict(list)

    def enough() -> bool:
        if len(pairs[OURS]) < max(PAIRS, PEER_PAIRS * len(peers)):
            return False
        ours = _ratios(*zip(*pairs[OURS], strict=True))["generate()"].ratio
        return half_width(ours) <= HALF_WIDTH

    for index in bench.rounds(len(peers), enough=enough):
        taken = {}
        for name in bench.generator.permutation([BARE, OURS, peers[index % len(peers)]]):
            # a request meets every peer
            request = requests[index // len(peers) % len(requests)]
            taken[str(name)] = _timed(jobs[str(name)], request, bench.vlm.device)
        for name in taken.keys() - {BARE}:
            pairs[name].append((taken[BARE], taken[name]))
    return {name: pairs[name] for name in (OURS, *peers)}


def _ratios(bare: tuple[Taken, ...], other: tuple[Taken, ...]) -> dict[str, Any]:
    """Compare one contender with bare ``generate()``, inside and as a whole."""
    found = {"whole": compare_paired([one.whole for one in bare], [one.whole for one in other])}
    if all(one.inside is not None for one in other):
        inside = [one.inside for one in bare], [one.inside for one in other]
        found["generate()"] = compare_paired(*inside)
    return found


def _passport(vlm: Any, tokens: int, prompts: list[int]) -> dict[str, Any]:
    return {
        "device": device_name(str(vlm.device)),
        "kind": vlm.device.type,
        "model": vlm.options.name,
        "parameters": vlm.architecture.parameters.params_total,
        "dtype": str(vlm.dtype).removeprefix("torch."),
        "engine": vlm.options.engine,
        "threads": thread_count(vlm.options, str(vlm.device)),
        "prompt_tokens": prompts,
        "output_tokens": tokens,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    }


def told(found: dict[str, Any]) -> list[str]:
    """Say it in lines."""
    about, ratios = found["passport"], found["ratios"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    ours = ratios[OURS]["generate()"]
    lines = [
        f"{about['model']} ({about['parameters'] / 1e6:.0f} M parameters, {about['dtype']}, "
        f"engine {about['engine']}) on {about['device']}, {about['threads']} CPU threads, {versions}",
        f"prompts of {min(about['prompt_tokens'])} to {max(about['prompt_tokens'])} tokens, "
        f"{about['output_tokens']} written; bare generate() {ours.baseline_mean:.1f} ms; "
        f"{found['seconds']:.0f} s in all",
        "",
        f"{'times bare generate()':32} {'generate()':26} {'the whole call':26} pairs",
    ]
    for name, words in {OURS: "instrumented (this project)", **PEERS}.items():
        if name in found["absent"]:
            lines.append(f"{words:32} {found['absent'][name]}")
            continue
        own = ratios[name]
        inside = format(own["generate()"].ratio, ".4f") if "generate()" in own else "–"
        lines.append(f"{words:32} {inside:26} {own['whole'].ratio:.4f}    {own['whole'].n_pairs}")
    return [*lines, "", _judged(about["kind"], ours, found["pairs_needed"])]


def _judged(kind: str, ours: Any, needed: int | None) -> str:
    low, high = GOALS[kind]
    goal = f"goal on a {'GPU' if kind == 'cuda' else 'CPU'}: " + (
        f"the interval inside {low}–{high}" if low else f"at most {high}"
    )
    ratio = ours.ratio
    if ratio.within(low, high):
        return f"{goal}: met"
    if ratio.above(high) or ratio.below(low):
        return f"{goal}: missed, surely"
    width = half_width(ratio)
    more = (
        f"about {needed} pairs would give ± {HALF_WIDTH:.1%}" if needed else "more pairs are needed"
    )
    if math.isfinite(width) and width <= HALF_WIDTH:
        more = "the ratio lies at the limit"
    return f"{goal}: undecided with {ours.n_pairs} pairs; {more}"


if __name__ == "__main__":
    sys.exit(main())
