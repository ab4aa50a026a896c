"""Build the HTML page: questions, results with intervals, and the commands that repeat them."""

from __future__ import annotations

import base64
import io
import logging
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from vlm_latency import __version__
from vlm_latency.experiments import studies
from vlm_latency.journal import session_ratios
from vlm_latency.options import PRESETS, Options
from vlm_latency.page.collect import Study
from vlm_latency.plots.notation import interval, number
from vlm_latency.results import measured_on

FIGURE_WIDTH = 1800  # pixels; the file at full resolution is linked
PIXELS_PER_INCH = 100  # on the page

log = logging.getLogger("vlm_latency")

# Of an environment: what is told elsewhere, or differs between any two commands.
UNTOLD = {"conditions", "line", "measured", "reported"}

COVERAGE = ("planned", "measured", "failed", "missing")
# Where conf/base has another default than the library: a repeating command always says these.
ALWAYS_SAID = {"sampling.seed", "measurement.num_runs", "flops.counted"}


def build_page(found: Mapping[str, Study]) -> str:
    """Write the page.

    Parameters
    ----------
    found : mapping of name to Study
        What `collect_results` gives. The page lies in ``report/`` beside the studies' folders:
        its links go there, its figures are in it.

    Returns
    -------
    str
        One HTML file that asks for nothing else: style, scripts and figures are inside. A study
        whose result is not as this project writes it is a line on it and hides no other.
    """
    try:
        return _render(found)
    except Exception:  # whichever way a file is wrong
        return _render({name: _sound(study) for name, study in found.items()})


def _sound(study: Study) -> Study:
    """Give the study back, or, where it cannot be shown, its files and why."""
    try:
        _render({study.name: study})
    except Exception as error:
        log.debug("%s cannot be shown", study.name, exc_info=True)
        why = f"its result is not as this project writes it ({type(error).__name__}: {error})"
        again = f"run 'kedro run --pipeline {study.name}' again"
        return Study(study.name, None, files=study.files, problem=f"{why}; {again}")
    return study


def _render(found: Mapping[str, Study]) -> str:
    here = jinja2.PackageLoader("vlm_latency.page", ".")
    templates = jinja2.Environment(
        loader=here,
        autoescape=jinja2.select_autoescape(("j2",)),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return templates.get_template("page.html.j2").render(
        version=__version__,
        marks=_marks(found),
        claims=[
            {"study": name, **claim, "numbers": _numbers(claim.get("numbers"))}
            for name, study in found.items()
            for claim in (study.result or {}).get("claims") or []
        ],
        studies=[_section(found[name]) for name in studies() if name in found],
        absent=[(name, about) for name, about in studies().items() if name not in found],
        coverage=_coverage(found),
        environments=_environments(found),
        calibrated="calibration" in found,
        measured=_measured(found),
    )


def _measured(found: Mapping[str, Study]) -> str:
    """Say when the runs were made, and when they were reported; empty where no result says."""
    environments = [(study.result or {}).get("environment") or {} for study in found.values()]
    times = [each["measured"] for each in environments if each.get("measured")]
    if not times:
        return ""
    first, last = (
        min(str(each["first"]) for each in times),
        max(str(each["last"]) for each in times),
    )
    days = [f"{time[:16].replace('T', ' ')} UTC" for time in (first, last)]
    reported = max(str(each["reported"]["at"]) for each in environments if each.get("reported"))
    return f"Measured {' to '.join(dict.fromkeys(days))}; reported {reported[:16].replace('T', ' ')} UTC"


def _marks(found: Mapping[str, Study]) -> list[str]:
    """Name what a reader must know before believing a number."""
    marks: dict[str, None] = {}
    measured: dict[str, list[str]] = {}
    for name, study in found.items():
        if on := measured_on((study.result or {}).get("environment")):
            measured.setdefault(on, []).append(name)
    if len(measured) > 1:
        told = "; ".join(f"{', '.join(names)} of {on}" for on, names in measured.items())
        marks[f"results that do not belong together: {told}"] = None
    for study in found.values():
        result = study.result or {}
        environment = result.get("environment") or {}
        if (environment.get("dataset") or {}).get("synthetic"):
            marks["synthetic requests"] = None
        if (environment.get("model") or {}).get("weights") == "random":
            marks["random weights"] = None
        if (result.get("coverage") or {}).get("partial"):
            marks[f"{study.name} is partial"] = None
        if (result.get("coverage") or {}).get("failed"):
            marks[f"{study.name} has failed runs"] = None
        for note in (result.get("coverage") or {}).get("costs") or ():
            marks[f"costs of {study.name}: {note}"] = None
        if result.get("protocol") == "seed":
            marks["protocol: seed"] = None
        method = (environment.get("measurement") or {}).get("method", "timeline")
        if method != "timeline":
            marks[f"{study.name} by method={method}"] = None
        if study.result is not None and "schema_version" not in study.result:
            marks[f"{study.name} was not written by this project"] = None
    return list(marks)


def _section(study: Study) -> dict[str, Any]:
    about, result = studies()[study.name], study.result or {}
    statistics = {**result, **(result.get("statistics") or {})}
    figures = [
        {
            "name": path.stem,
            **_figure(path),
            "links": [
                f"../{f}"
                for f in study.files
                if Path(f).stem == path.stem and Path(f).parent.name == "figures"
            ],
        }
        for path in study.figures
    ]
    return {
        "name": study.name,
        "about": about,
        "problem": study.problem,
        "model": _model_name(result),
        "line": (result.get("environment") or {}).get("line"),
        "finding": result.get("finding") or statistics.get("finding"),
        "facts": [
            (fact.label, _written(value, fact.unit, fact.scale), _note(value))
            for fact in about.facts
            if (value := _follow(statistics, fact.path)) not in (None, [], "")
        ]
        + _comparisons(result),
        "notes": _notes(result),
        "figures": figures,
        "tables": [_table(path) for path in study.tables],
        "options": flat(result.get("options") or {}),
        "command": _command(study.name, result.get("options") or {}),
        "files": [(f"../{file}", file) for file in study.files],
    }


def _comparisons(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Tell each comparison with the baseline in a line."""
    facts = []
    for name, comparison in (result.get("comparisons") or {}).items():
        total = (comparison.get("components") or {}).get("T_total") or {}
        ratio = f", T_total × {interval(total.get('ratio'))}" if total else ""
        if difference := ((result.get("differences") or {}).get(name) or {}).get("T_total"):
            ratio += f", {interval(difference, 'ms')}"
        what = "pairs of runs, made in turn" if result.get("interleaved") else "requests matched"
        note = [f"{comparison.get('n_matched', 0)} {what}"]
        if total.get("smallest_visible") is not None:
            visible = number(100 * total["smallest_visible"])
            note.append(f"differences under {visible} % could not have been seen")
        note += [total["note"]] if total.get("note") else []
        note += comparison.get("notes") or []
        facts.append((name, f"{comparison.get('verdict') or 'UNDECIDED'}{ratio}", "; ".join(note)))
    return facts


def _notes(result: Mapping[str, Any]) -> list[str]:
    """Gather what a study says in sentences."""
    notes = list((result.get("statistics") or {}).get("notes") or [])
    notes += [f"{name}: {why}" for name, why in (result.get("not_compared") or {}).items()]
    if isinstance(result.get("verdict"), list):
        notes += result["verdict"]
    for run, differing in (result.get("environment_differences") or {}).items():
        notes += [
            f"{run} differs in {condition}: {before} → {after}"
            for condition, (before, after) in differing.items()
        ]
    return notes


def _model_name(result: Mapping[str, Any]) -> str:
    model = result.get("model")
    name = model.get("name") if isinstance(model, Mapping) else model
    return str(name or "")


def _follow(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        if not isinstance(tree, Mapping):
            return None
        tree = tree.get(key)
    if isinstance(tree, Mapping) and tree.get("value", tree.get("verdict")) is None:
        return None
    return tree


def _written(value: Any, unit: str = "", scale: float = 1.0) -> str:
    if isinstance(value, Mapping) and "value" not in value:  # a test, not an estimate
        return str(value["verdict"])
    if isinstance(value, Mapping):
        return interval(value, unit, scale)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return number(scale * value, 4) + (f" {unit}" if unit else "")


def _note(value: Any) -> str:
    """Say how an interval was made, and what is to be known of it."""
    if not isinstance(value, Mapping):
        return ""
    method = value.get("method")
    size = f"n = {value['n']:,}" if value.get("n") else ""
    p = f"p = {number(value['p_value'])}" if value.get("p_value") is not None else ""
    said = ("" if method == "none" else method, p, size, value.get("note"))
    return "; ".join(filter(None, said))


def _numbers(numbers: Mapping[str, Any] | None) -> list[tuple[str, str, str]]:
    return [
        (name, "not measured" if value is None else _written(value), _note(value))
        for name, value in (numbers or {}).items()
    ]


def _figure(path: Path) -> dict[str, Any]:
    """Give a PNG as a data address of modest size, and the width at which its text is readable.

    256 colours are enough for a figure and take a quarter of the bytes.
    """
    from PIL import Image

    buffer = io.BytesIO()
    try:
        image = Image.open(path)
        image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return {"problem": f"{path.name} cannot be read: {error}"}
    with image:
        inches = image.width / image.info.get("dpi", (300, 300))[0]
        small = image.convert("RGB")
        small.thumbnail((FIGURE_WIDTH, 4 * FIGURE_WIDTH), Image.Resampling.LANCZOS)
        flat = small.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        white = [255 if value > 250 else value for value in flat.getpalette() or []]
        flat.putpalette(white)  # the octree's white is a little grey beside the page's
        flat.save(buffer, "PNG")
    data = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"problem": "", "data": data, "width": round(inches * PIXELS_PER_INCH)}


def _table(path: Path) -> dict[str, Any]:
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError, OverflowError) as error:
        return {"name": path.stem, "problem": f"{path.name} cannot be read: {error}"}
    rows = [
        [("" if pd.isna(v) else v, "" if pd.isna(v) else _cell(v)) for v in row]
        for row in table.itertuples(index=False)
    ]
    numeric = [pd.api.types.is_numeric_dtype(table[name]) for name in table]
    columns = list(zip(map(str, table.columns), numeric, strict=True))
    return {"name": path.stem, "problem": "", "columns": columns, "rows": rows}


def _cell(value: Any) -> str:
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return number(value, 4) if isinstance(value, float) else str(value)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Write a tree as dotted paths and values."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _command(name: str, options: Mapping[str, Any]) -> str:
    """Give the command that repeats a study: its folder, and what differs from the defaults.

    A value with a comma cannot stand on Kedro's command line; it is named in a comment.
    """
    given, left = repeating(name, options)
    if (folder := options.get("output_dir")) and folder != Options().output_dir:
        (left if "," in folder else given).insert(0, f"output_dir={folder}")
    command = f"kedro run --pipeline {name}"
    if given:
        command += f" --params {shlex.quote(','.join(given))}"
    return command + "".join(f"\n# and in conf/local/parameters.yml: {item}" for item in left)


def repeating(name: str, options: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """List the parameters that repeat a study: ``path=value``, where they differ from defaults.

    Returns
    -------
    given, left
        Those that can stand on Kedro's command line, and those with a comma, which cannot.
    """
    protocol = options.get("protocol", "exact")
    if protocol not in PRESETS:
        return [], []
    asked = Options(protocol=protocol)
    defaults = flat(asked.model_dump(mode="json"))
    if "experiment" in options:
        defaults |= flat(asked.experiment(name).model_dump(mode="json"))
    defaults["protocol"] = Options().protocol
    own, shared = set(type(getattr(asked, name)).model_fields), set(Options.model_fields)
    given: list[str] = []
    left: list[str] = []
    for full, value in flat(options).items():
        path = full.removeprefix("own.")
        group = path.partition(".")[0]
        if path == "output_dir" or value is None:
            continue
        if value == defaults.get(full) and not (group in own and path in ALWAYS_SAID):
            continue
        if group not in own | shared:  # such as the sampling of what draws no sample
            continue
        key = f"{name}.{path}" if group in own else path
        text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        (left if "," in text else given).append(f"{key}={text}")
    return given, left


def _coverage(found: Mapping[str, Study]) -> list[dict[str, Any]]:
    rows = []
    for study in found.values():
        coverage = (study.result or {}).get("coverage")
        if isinstance(coverage, Mapping) and "planned" in coverage:
            counts = {key: coverage.get(key, 0) for key in COVERAGE}
            rows.append(
                {
                    "study": study.name,
                    **counts,
                    "harness": _harness(coverage.get("sessions") or []),
                    "failures": list((coverage.get("failures") or {}).items()),
                    "outliers": _outliers(study),
                }
            )
    return rows


def _harness(sessions: list[Mapping[str, Any]]) -> tuple[str, str]:
    """Tell what share of the wall time warmed up, and what the rest was worth."""
    share, ratio = session_ratios(sessions)
    return (
        "" if share is None else f"{number(100 * share)} %",
        "" if ratio is None else number(ratio),
    )


def _outliers(study: Study) -> str:
    outliers = ((study.result or {}).get("statistics") or {}).get("outliers") or {}
    causes = ", ".join(f"{cause}: {n}" for cause, n in (outliers.get("causes") or {}).items())
    return f"{outliers.get('marked', 0)}" + (f" ({causes})" if causes else "")


def _environments(found: Mapping[str, Study]) -> dict[str, Any]:
    """Put the environments side by side; what is equal everywhere is told once."""
    flats = {
        name: flat({k: v for k, v in environment.items() if k not in UNTOLD})
        for name, study in found.items()
        if (environment := (study.result or {}).get("environment"))
    }
    keys = list(dict.fromkeys(key for flat in flats.values() for key in flat))
    same, different = [], []
    for key in keys:
        values = [flat.get(key) for flat in flats.values()]
        if all(value == values[0] for value in values):
            same.append((key, values[0]))
        else:
            different.append((key, values))
    return {"studies": list(flats), "same": same, "different": different}
