"""The published study: its numbers are those of its runs."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from vlm_latency.results import FILES, read_run
from vlm_latency.statistics import percentile

ROOT = Path(__file__).parents[1]
STUDY = ROOT / "docs" / "study"
RUN = STUDY / "molmo-7b-d-h100-eager"
PAGES = [ROOT / "README.md", STUDY / "README.md"]


def records(name: str) -> pd.DataFrame:
    return pd.read_parquet(RUN / name / f"{name}_records.parquet").query("status == 'ok'")


def median(values: pd.Series) -> str:
    found = percentile(values.dropna().astype(float), 50)
    return f"{found.value:.1f} [{found.low:.1f}, {found.high:.1f}]"


def table() -> str:
    """Medians over questions with two tiles by three, and over the answers of 512 tokens."""
    photos = records("exp1").query("tiling_rows == 2 and tiling_cols == 3")
    answers = records("exp4").query("num_output_tokens == 512")
    cells = {
        "preprocessing": median(photos["T_preprocess"]),
        "encoder": median(photos["T_vision_encoder"]),
        "projector": median(photos["T_projector"]),
        "prefill": median(photos["T_LLM_prefill"]),
        "first token": median(photos["T_first_token"]),
        "per output token": median(answers["decode_step_ms"].explode()),
    }
    return "\n".join(
        (
            f"| model, engine | {' | '.join(cells)} |",
            "| --- " * (len(cells) + 1) + "|",
            f"| Molmo-7B-D, eager | {' | '.join(cells.values())} |",
        )
    )


def findings() -> list[str]:
    found = []
    for name, stem in FILES.items():
        path = RUN / name / f"{stem}.json"
        if path.is_file():
            found.append(f"* **{name}:** {json.loads(path.read_text(encoding='utf-8'))['finding']}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=["README", "study"])
def test_the_table_is_computed_from_the_published_runs(page: Path) -> None:
    assert table() in page.read_text(encoding="utf-8"), table()


def test_the_findings_are_those_of_the_results() -> None:
    text = (STUDY / "README.md").read_text(encoding="utf-8")
    assert len(findings()) == 5
    for line in findings():
        assert line in text, line


def test_the_averaged_entries_are_those_of_the_runs() -> None:
    """The results and the table of single runs tell the same: nothing was edited in one of them."""
    for name in ("exp1", "exp2", "exp3", "exp4"):
        result = json.loads((RUN / name / f"{FILES[name]}.json").read_text(encoding="utf-8"))
        ours = records(name).groupby("request_id", sort=False)["T_total"].mean()
        entries = pd.Series([entry["T_total"] for entry in result["results"]])
        assert len(entries) == len(ours)
        assert sorted(entries) == pytest.approx(sorted(ours), rel=1e-9)


def test_anyone_can_compare_with_it() -> None:
    run = read_run(RUN)
    assert set(run.tables) == {"exp1", "exp2", "exp3", "exp4"}
    assert sum(map(len, run.tables.values())) == 630
