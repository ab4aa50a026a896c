"""The published texts: the page, the data card, and README's first screen."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import evidence as ev
from evidence import StudyRun

from vlm_latency.experiments import EXPERIMENTS
from vlm_latency.pipelines.reporting.results import marks
from vlm_latency.plots.notation import Statistic, ends, interval, number

BEGIN, END = "<!-- study:begin -->", "<!-- study:end -->"
FIRST = "first_and_next.png"
# By what it is called where runs are compared: the file, and what it shows.
SIDE_BY_SIDE = {
    "compare_components": ("components.png", "exp2", "Mean time of a request by component"),
    "compare_vision_tokens": ("vision_tokens.png", "exp3", "Latency against vision tokens"),
    "compare_output_tokens": ("output_tokens.png", "exp4", "Decode against output tokens"),
}
# What the data do not say by themselves; test_study.py checks the number.
REMARKS = {
    "molmo-7b-d-loop": "one prefill of exp2 and one of exp3 (64 ms) hold the capture of a CUDA graph, which today's "
    "warm-up makes before",
    "molmoe-1b-eager": "its prefill gets shorter with more vision tokens while launches bound it (at 544 tokens the device "
    "idles during 55 % of it, at 704 during 20 %): the host is done with "
    "the encoder before the device is, and the more so the more crops there are, so that the prefill's launches are "
    "partly hidden behind it; the host spends as long on the prefill of 12 crops as on that of one",
    "molmo-7b-d-loop-paper": "2,026 of the 5,250 runs of exp1 are marked for a clock under 97 % of the highest one; today's "
    "rule compares with the median, as a GPU at its power limit varies by that much all the time",
    "qwen2.5-vl-7b-loop": "its vision encoder computes what depends on its inputs' values, is not compiled and is bound "
    "by launches in the eager run: it took longer than in the eager run, on a slower host",
}
SHARED = "runs beside 16 of 32 cores were made two at a time, each on a GPU and on half of the cores of one host"
# Figures of one run that the page shows.
FIGURES = {"explain": "explain.png", "exp6": "exp6_token_reduction.png"}
FEW = 4  # numbers of a claim that its cell shows
NOT_MEASURED = "not measured"
PLANNED = {
    "Molmo-7B-D": "molmo-7b-d",
    "MolmoE-1B": "molmoe-1b",
    "LLaVA-1.5-7B": "llava-1.5-7b",
    "Qwen2.5-VL-7B": "qwen2.5-vl-7b",
}


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *map(list, rows)]
    text = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([text[0], "| --- " * len(lines[0]) + "|", *text[1:]])


def headline_table(runs: list[StudyRun]) -> str:
    """Models and engines, row by row."""
    rows = []
    for run in runs:
        found, tokens = ev.headline(run), ev.photos(run)
        if not any(found.values()):
            continue
        count = f"{int(tokens['num_vision_tokens'].median())}" if len(tokens) else NOT_MEASURED
        cells = [shown(found[name]) for name in ev.PARTS]
        rows.append([run.label, count, *cells, ev.bounds(run)])
    return table(["model, engine", "vision tokens", *ev.PARTS.values(), "bound by"], rows)


def shown(found: Statistic, unit: str = "") -> str:
    return interval(found, unit) if found else NOT_MEASURED


def caption(runs: list[StudyRun]) -> str:
    lengths = sorted({written for run in runs if (written := ev.length(run))})
    images = sorted({run.tables["exp4"]["image_id"].nunique() for run in runs if ev.length(run)})
    return (
        f"Milliseconds with 95 % intervals, images of {ev.SIZE} (exp1): medians. Per output token: mean over "
        f"{_span(images)} images of the median decode step of an answer of {_span(lengths)} tokens (exp4). "
        f"{about(runs)}."
    )


def device(run: StudyRun) -> str:
    hardware = run.environment["hardware"]
    return str(hardware.get("gpu") or hardware["cpu"])


def about(runs: list[StudyRun]) -> str:
    devices = _listed(run.environment["line"].partition(",")[0] for run in runs)
    said = _listed(
        mark for run in ev.leading(runs) for mark in marks(next(iter(run.results.values())))
    )
    return f"{devices}, batch 1, {said}, output lengths forced"


def _span(values: list[int]) -> str:
    return (
        "–".join(str(value) for value in dict.fromkeys((values[0], values[-1]))) if values else "?"
    )


def _listed(words: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(word for word in words if word))


def measured(runs: list[StudyRun]) -> str:
    lines = []
    for run in runs:
        counts = ", ".join(f"{name} {len(rows)}" for name, rows in run.tables.items())
        further = [name for name in ("exp5", "explain", "calibration") if name in run.results]
        counts += "".join(f", {name}" for name in further)
        lines.append(
            [
                f"[{run.label}](study/{run.name})",
                device(run),
                run.model["dtype"],
                run.model["weights"],
                counts,
                f"{ev.wall_seconds(run) / 60:.1f} min",
            ]
        )
    return table(["run", "device", "dtype", "weights", "single runs", "wall time"], lines)


def versions(runs: list[StudyRun]) -> str:
    keys = ("torch", "cuda", "transformers", "python", "nvidia_driver")
    found = {
        key: _listed(str(run.environment["software"].get(key) or "") for run in runs)
        for key in keys
    }
    return ", ".join(f"{key} {value}" for key, value in found.items() if value)


def claims(runs: list[StudyRun]) -> str:
    texts = list(dict.fromkeys(text for run in runs for text in run.claims()))
    rows = []
    for run in runs:
        own, cells = run.claims(), []
        for text in texts:
            claim = own.get(text)
            numbers = claim["numbers"].items() if claim else ()
            said = "".join(f"<br>{name}: {interval(value)}" for name, value in numbers)
            if len(numbers) > FEW:
                said = "<br>see what dropping vision tokens wins"
            cells.append(f"**{claim['verdict']}**{said}" if claim else NOT_MEASURED)
        rows.append([run.label, *cells])
    return table(["model, engine", *texts], rows)


def surprises(runs: list[StudyRun]) -> str:
    """What one would not have expected, each where its data are there."""
    heads: dict[str, Callable[[StudyRun], str | None]] = {
        "Attention is planned anew for every new length": _new_lengths,
        "Up to some number of vision tokens one more costs nothing": _floor,
        "The device waits": lambda run: run.statistics("explain", "finding"),
        f"Preprocessing takes a good part of the time to first token (ratio, images of {ev.SIZE})": (
            lambda run: interval(ratio) if (ratio := ev.preprocessing_ratio(run)) else None
        ),
        "Fewer parameters, slower tokens": lambda run: _slower_though_smaller(run, runs),
        "The way it is run decides": lambda run: _engines(run, runs),
        "FLOPs miss what bounds a request": _flops,
        "The host disturbs": _host,
    }
    lines: list[str] = []
    for head, find in heads.items():
        said = [f"  * {run.label}: {text}" for run in runs if (text := find(run))]
        lines += [f"* **{head}:**", *said] if said else []
    return "\n".join(lines)


def _new_lengths(run: StudyRun) -> str | None:
    lengths = run.statistics("exp1", "new_lengths") or {}
    parts = [lengths.get(part) or {} for part in ("prompt", "key")]
    return _brackets("; ".join(part["sentence"] for part in parts if part.get("costs"))) or None


def _brackets(sentence: str) -> str:
    """Write the intervals of a stored sentence, "(a to b)" when it was made, as the page does."""
    return re.sub(r"\((\S+) to (\S+)\)", r"[\1, \2]", sentence)


def _floor(run: StudyRun) -> str | None:
    floor = run.statistics("exp3", "floors", "T_LLM_prefill") or {}
    if floor.get("holds") != "floor and line":
        return None
    return (
        f"a prefill takes at least {interval(floor['floor'], 'ms')}; below "
        f"{interval(floor['free'])} vision tokens one more costs nothing"
    )


def _flops(run: StudyRun) -> str | None:
    errors = run.statistics("exp5", "held_out_error") or {}
    if not {"flops", "roofline_calibrated"} <= set(errors):
        return None
    ours, theirs = (interval(errors[name], "%", 100) for name in ("flops", "roofline_calibrated"))
    return f"on held-out shapes they err by {ours}, the calibrated roofline by {theirs}"


def _host(run: StudyRun) -> str | None:
    found = run.statistics("exp1", "disturbed") or {}
    if not found.get("moved"):
        return None
    return (
        f"{found['disturbed_runs']} of {found['of']} requests ({', '.join(found['causes'])}); "
        f"{found['number']} is {interval(found['with_all'], 'ms')} with them, "
        f"{interval(found['undisturbed'], 'ms')} without"
    )


def _active(run: StudyRun) -> float:
    """Give the parameters of the language model that a token passes through."""
    parameters = run.results.get("exp2", {}).get("parameters") or {}
    return parameters.get("params_llm_active") or parameters.get("params_llm") or float("nan")


def _slower_though_smaller(run: StudyRun, runs: list[StudyRun]) -> str | None:
    ours = ev.headline(run)["per_token"]
    found = [
        f"{other.label} ({_active(other) / 1e9:.1f} B, {interval(theirs, 'ms')})"
        for other in runs
        if other.model["engine"] == run.model["engine"]
        and _active(run) < 0.8 * _active(other)
        and _surely_above(ours, theirs := ev.headline(other)["per_token"])
    ]
    own = f"{_active(run) / 1e9:.1f} B active in the LLM, {interval(ours, 'ms')} per token"
    return f"{own}, slower than {'; '.join(found)}" if found else None


def _surely_above(one: Statistic, other: Statistic) -> bool:
    low, high = ends(one)[1], ends(other)[2]
    return low is not None and high is not None and low > high


def _engines(run: StudyRun, runs: list[StudyRun]) -> str | None:
    """Beside the same model run eagerly."""
    same = (other for other in runs if other.model["name"] == run.model["name"])
    eager = next((other for other in same if other.model["engine"] == "eager"), None)
    if eager is None or run.model["engine"] == "eager":
        return None
    before, after = ev.headline(eager), ev.headline(run)
    said = [
        f"{ev.PARTS[name]} {interval(before[name], 'ms')} → {interval(after[name], 'ms')}"
        for name in ("T_LLM_prefill", "T_first_token", "per_token")
        if before[name] and after[name]
    ]
    return f"from eager, {'; '.join(said)}" if said else None


def reductions(runs: list[StudyRun]) -> str:
    """What dropping vision tokens claims and wins, the engines of a model side by side."""
    models: dict[str, list[StudyRun]] = {}
    for run in runs:
        if "exp6" in run.results:
            models.setdefault(run.model["name"], []).append(run)
    parts = []
    for same in models.values():
        found = [
            {(entry["method"], entry["keep"]): entry for entry in run.results["exp6"]["results"]}
            for run in same
        ]
        rows = []
        for method, keep in max(found, key=len):
            entries = [own.get((method, keep)) for own in found]
            first = next(entry for entry in entries if entry)
            claimed = number(first["claimed"]["speed_up"])
            tokens = number(first["tokens"]["value"])
            cells = [cell for entry in entries for cell in _speed_ups(entry)]
            rows.append([method, f"{keep:g}", tokens, f"{claimed}×", *cells])
        head = ["method", "keep", "tokens", "claimed (FastV's formula)"]
        for run in same:
            head += [f"{run.model['engine']}: first token", f"{run.model['engine']}: total"]
        said = [f"* **{run.label}:** {run.results['exp6']['finding']}." for run in same]
        quiet = same[-1]
        figure = f"![{quiet.label}](study/{quiet.name}/exp6/{FIGURES['exp6']})"
        parts += ["\n".join(said), figure, table(head, rows)]
    return "\n\n".join(parts)


def _speed_ups(entry: dict[str, Any] | None) -> list[str]:
    if entry is None:
        return ["not run by this engine"] * 2
    first, total = (entry["measured"][name] for name in ("T_first_token", "T_total"))
    return [f"{interval(one['speed_up'])}× {one['verdict']}" for one in (first, total)]


def bound_table(runs: list[StudyRun]) -> str:
    rows = [
        [
            run.label,
            str(run.results["explain"]["results"][0]["num_vision_tokens"]),
            name,
            interval(part["wall"], "ms"),
            f"{number(part['busy'])} ms",
            f"{100 * part['idle_share']:.0f} %" if part["idle_share"] is not None else "?",
            f"{part['kernels']}",
            f"**{part['bound']}**" if part["bound"] else "—",
            part.get("roofline_bound") or "—",
        ]
        for run in runs
        for name, part in (run.results.get("explain", {}).get("components") or {}).items()
    ]
    head = [
        "model, engine",
        "vision tokens",
        "component",
        "wall",
        "busy",
        "idle",
        "kernels",
        "bound by",
        "roofline says",
    ]
    figures = [
        f"![{run.label}](study/{run.name}/explain/{FIGURES['explain']})"
        for run in runs
        if "explain" in run.results
    ]
    return "\n\n".join([table(head, rows), *figures]) if rows else ""


def calibrations(runs: list[StudyRun]) -> str:
    return "\n".join(
        f"* **{run.label}:** {_brackets('; '.join(run.results['calibration']['verdict']))}."
        for run in runs
        if "calibration" in run.results
    )


def seeds(runs: list[StudyRun]) -> str:
    """The seed's method beside the one that subtracts nothing."""
    theirs = [run for run in runs if run.seed and not run.again]
    beside = {run.kind[:2] for run in theirs}
    rows = []
    for run in (run for run in runs if run.kind[:2] in beside and not run.again):
        found, own = ev.closure(run), ev.headline(run)
        below = [
            f"{name} {n} of {of} ({100 * n / of:.1f} %)" for name, (n, of) in found["below"].items()
        ]
        rows.append(
            [
                run.label,
                "<br>".join(below) or "nothing is subtracted",
                f"{interval(found['lacking'], '%', 100)}; the least {100 * found['worst']:.1f} %",
                f"{found['exceed']} of {found['runs']}",
                shown(own["T_LLM_prefill"], "ms"),
                shown(own["per_token"], "ms"),
            ]
        )
    head = [
        "run", "differences at or below zero, clamped", "closure: what the parts lack to T_total (median)",
        "runs whose parts exceed T_total", f"prefill, {ev.SIZE}", "per output token",
    ]  # fmt: skip
    return table(head, rows) if theirs else ""


def repeated(runs: list[StudyRun]) -> str:
    rows, changed = [], []
    for again in (run for run in runs if run.again):
        first = next((run for run in runs if run.kind == again.kind and not run.again), None)
        if first is None:
            continue
        if first.environment["code"]["sha256"] != again.environment["code"]["sha256"]:
            changed.append(f"{again.label}: this project's code changed since the first run.")
        for title, one, two, unit, scale in _headlines(first, again):
            if one and two:
                overlap = not (_surely_above(one, two) or _surely_above(two, one))
                rows.append(
                    [
                        again.label,
                        title,
                        interval(one, unit, scale),
                        interval(two, unit, scale),
                        f"{ends(two)[0] / ends(one)[0]:.3f}",
                        "yes" if overlap else "**no**",
                    ]
                )
    head = ["model, engine", "number", "first", "again", "again / first", "intervals overlap"]
    return "\n\n".join([table(head, rows), *changed]) if rows else ""


def _headlines(
    one: StudyRun, two: StudyRun
) -> Iterable[tuple[str, Statistic, Statistic, str, float]]:
    """Pair the numbers that a run is known by: title, either's, unit and what makes it of ms."""
    for name, title in ev.PARTS.items():
        yield title, ev.headline(one)[name], ev.headline(two)[name], "ms", 1.0
    slopes = [run.statistics("exp3", "fits", "T_total", "slope") for run in (one, two)]
    yield "per vision token (exp3)", *slopes, "µs", 1000.0


def limits(runs: list[StudyRun]) -> list[str]:
    """Name what is missing, from what is there."""
    first = ev.leading(runs)
    absent: list[str] = []
    for title, name in PLANNED.items():
        own = [run for run in first if run.model["name"] == name]
        if not own:
            absent.append(f"{title} was not measured")
        elif all(run.model["engine"] == "eager" for run in own):
            absent.append(f"{title} was measured eager only")
    for run in first:
        lacking = [n for n in (*EXPERIMENTS, "explain", "calibration") if n not in run.results]
        if lacking:
            absent.append(f"{', '.join(lacking)} {_were(lacking)} not run on {run.label}")
    tests: dict[str, Callable[[StudyRun], bool]] = {
        "the same command was not run twice": lambda run: run.again and not run.large,
        "protocol=seed was not run": lambda run: run.seed,
    }
    absent += [text for text, test in tests.items() if not any(map(test, runs))]
    cards = {device(run) for run in runs}
    if len(cards) == 1:
        absent.append(f"one kind of device was measured, {cards.pop()}")
    absent += [
        f"{', '.join(names)} of {run.label} {_were(names)} measured beside {host}, its other results beside {hosts[0]}"
        for run in first
        for hosts in [list(run.hosts)]
        for host, names in list(run.hosts.items())[1:]
    ]
    if any("beside 16 of 32 cores" in run.environment["line"] for run in runs):
        absent.append(SHARED)
    absent += [f"{run.label}: {REMARKS[run.name]}" for run in runs if run.name in REMARKS]
    hosts = {run.environment["hardware"].get("physical_cores") for run in first}
    if len(hosts) > 1:
        told = _listed(
            f"{run.label}: {run.environment['hardware']['physical_cores']} cores" for run in first
        )
        absent.append(
            f"hosts differ ({told}): "
            "preprocessing and whatever launches bound are not comparable between them"
        )
    return absent


def _were(names: list[str]) -> str:
    return "were" if len(names) > 1 else "was"


def filled(text: str, block: str) -> str:
    """Put a block between the markers of a text."""
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"expected the markers {BEGIN} and {END}, one after the other")
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def readme_block(runs: list[StudyRun]) -> str:
    first = ev.leading(runs)
    return f"![Models and engines side by side](docs/study/{FIRST})\n\n{headline_table(first)}\n\n{caption(first)}"


def study_page(runs: list[StudyRun], conf: Path) -> str:
    first = ev.leading(runs)
    commands = "\n".join(ev.commands(run, conf) for run in runs)
    drawn = {
        experiment: f"![{shown}](study/{file})"
        for file, experiment, shown in SIDE_BY_SIDE.values()
        if sum(experiment in run.tables for run in first) > 1
    }
    sections = {
        "What was measured on what": f"{about(runs)}. {versions(runs)}. Images and questions are made, with the sizes "
        "and lengths of VQA v2's; the weights are random values of the real architectures, which leaves the work of a "
        "dense model as it is (routing in a mixture of experts depends on values). Wall time is that of measuring, "
        f"warm-up included, loading not.\n\n{measured(runs)}",
        "Where the time goes": f"![Models and engines side by side](study/{FIRST})\n\n{headline_table(first)}\n\n{caption(first)}",
        "The seed study's claims": f"Each verdict is made by the rule in the run's JSON, from the number below it.\n\n{claims(ev.leading(runs, large=True))}",
        "What a request is made of": drawn.get("exp2", ""),
        "What a vision token costs": drawn.get("exp3", ""),
        "What an output token costs": drawn.get("exp4", ""),
        "What surprised": surprises(first),
        "What bounds each part": bound_table(first),
        "What dropping vision tokens wins": reductions(first),
        "The seed's method beside this one": seeds(runs),
        "Measured again": repeated(runs),
        "How far the instrument can be trusted": calibrations(first),
        "Limits": "\n".join(f"* {text}." for text in limits(runs)),
        "The commands": f"```bash\n{commands}\n```\n\n`kedro run --pipeline compare --params "
        f"compare.baseline=docs/study/{first[0].name},compare.candidate=results/mine` compares a machine with this one.",
    }
    text = (
        "# Where does the time of a vision-language model's request go, and do FLOPs predict it?\n\n"
        "Written by `python docs/study` from [what was measured](study/README.md). `tests/test_study.py` writes it again,\n"
        "reports exp1 to exp5 anew from the single runs, and computes the headline numbers and the speed-ups by other code.\n"
        "`[a, b]` is a 95 % interval, `?` an end that so few runs do not bound.\n"
    )
    return text + "".join(f"\n## {title}\n\n{body}\n" for title, body in sections.items() if body)


def data_card(runs: list[StudyRun]) -> str:
    found = "\n".join(
        f"* `{run.name}/{name}`: {result['finding']}"
        for run in runs
        for name, result in run.results.items()
        if result.get("finding")
    )
    dates = sorted(
        str(rows["started_at"].min())[:10] for run in runs for rows in run.tables.values()
    )
    rows = sum(len(table) for run in runs for table in run.tables.values())
    return f"""# Data of the study

{about(runs)}; {versions(runs)}; {_listed((dates[0], dates[-1]))}. The page over it: [docs/study.md](../study.md).

* `runs.parquet`: {rows:,} single runs that ended well, and those that failed, of {len(runs)} folders; `study_run` names
  the folder, `experiment` the experiment, the others are [the record's columns](../columns.md). Nothing was edited or rounded.
* `<run>/<experiment>/*.json`: statistics with their intervals, claims with their rules, options and conditions;
  exp1 to exp5 are reported from `runs.parquet`. Left out were absolute paths, the host's process, bands of figures, generated texts, and of the entries of exp1 and exp2
  all but which request it is and T_total: they are means of the runs in the table.
* `gather.py`, `again.py`, `evidence.py`, `page.py`: `python docs/study RUNS_FOLDER` publishes the folders below `RUNS_FOLDER` (each an
  `output_dir`) beside these, or in place of those of the same name; `python docs/study` writes the texts again. `kedro run --pipeline compare` and
  `vlm_latency.results.read_run` read `docs/study/<run>` as they read an `output_dir`.

Not for: quality of answers (random weights write nonsense), tails of real traffic (requests are synthetic and run alone).

## What each result says

{found}

Licence: that of the project (Apache 2.0).
"""
