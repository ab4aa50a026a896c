"""Publish a study: ``python docs/study RUNS_FOLDER`` adds runs; without a folder it is written again.

Either way the results are reported anew from the published runs, so that all are by the same code.
"""

from __future__ import annotations

import sys
from pathlib import Path

import again
import evidence as ev
import page
from gather import gather, shrink

from vlm_latency.pipelines.compare.nodes import side_by_side
from vlm_latency.pipelines.reporting.exp6 import SHOWN
from vlm_latency.pipelines.reporting.results import marks
from vlm_latency.plots.explanation import explanation
from vlm_latency.plots.first_and_next import first_and_next
from vlm_latency.plots.reduction import claimed_and_measured
from vlm_latency.plots.style import FigureContext, Style
from vlm_latency.results import Run

STUDY = Path(__file__).parent
ROOT = STUDY.parents[1]


def texts() -> dict[Path, str]:
    """Make every published text from what is published of the runs."""
    runs = ev.load(STUDY)
    readme = ROOT / "README.md"
    return {
        readme: page.filled(readme.read_text(encoding="utf-8"), page.readme_block(runs)),
        ROOT / "docs" / "study.md": page.study_page(runs, ROOT / "conf"),
        STUDY / "README.md": page.data_card(runs),
    }


def draw() -> None:
    """Draw models and engines side by side, with the project's own plots."""
    runs = ev.leading(ev.load(STUDY))
    said = dict.fromkeys(m for run in runs for m in marks(next(iter(run.results.values()))))
    lines = dict.fromkeys(run.environment["line"] for run in runs)
    line = next(iter(lines)) if len(lines) == 1 else page.about(runs)
    context = FigureContext(
        environment_line=line,
        marks=tuple(said),
        finding=f"Medians of {ev.SIZE} images, and of the decode steps of long answers",
    )
    style = Style(dpi=150)
    found = {run.label: ev.headline(run) for run in runs}
    found = {label: numbers for label, numbers in found.items() if any(numbers.values())}
    first_and_next(found, context, style).savefig(STUDY / page.FIRST)
    shown = [Run(run.label, run.tables, {}) for run in runs]
    for run in ev.load(STUDY):
        for name, figure in page.FIGURES.items():
            if (result := run.results.get(name)) is None:
                continue
            told = FigureContext(
                environment_line=result["environment"]["line"],
                marks=marks(result),
                model=run.label,
                finding=result["finding"],
            )
            if name == "exp6":
                drawn = claimed_and_measured(result["results"], SHOWN, told, style)
            else:
                drawn = explanation(result["results"], result["statistics"], told, style)
            drawn.savefig(path := STUDY / run.name / name / figure)
            shrink(path)
    for name, drawn in side_by_side(shown, context, style).items():
        drawn.savefig(STUDY / page.SIDE_BY_SIDE[name][0])


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        raise SystemExit("expected one folder of runs, or none")
    if arguments:
        gather(Path(arguments[0]), STUDY)
    again.refresh(STUDY)
    draw()
    for path, text in texts().items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main(sys.argv[1:])
