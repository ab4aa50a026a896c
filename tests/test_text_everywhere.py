"""Marks that mean something to TeX, Markdown, HTML, OmegaConf or Kedro are text wherever users write."""

from __future__ import annotations

import html
import json
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from kedro.framework.startup import bootstrap_project
from PIL import Image

from vlm_latency.config_loader import ConfigLoader
from vlm_latency.plots.tables import to_latex

PROJECT = Path(__file__).parents[1]
_LOADER = {"base_env": "base", "merge_strategy": {"parameters": "soft"}}
EVERYTHING = r"a $b$ {experiment} ${params:seed} ${c \textbf{d} **e** <i>&amp; `k` %_#~^ x}y \\"


@settings(max_examples=30, deadline=None)
@given(st.text(st.sampled_from("ab$\\{}'\":. ,")))
def test_no_text_of_the_command_line_is_a_reference(text: str) -> None:
    loader = ConfigLoader(str(PROJECT / "conf"), "smoke", {"exp1": {"anything": text}}, **_LOADER)
    assert loader["parameters"]["exp1"]["anything"] == text


@pytest.mark.parametrize("name", [EVERYTHING, "{study}", "a{b", "x}y", "${params:output_dir}"])
def test_names_of_folders_datasets_and_questions_are_text(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bootstrap_project(PROJECT)
    from vlm_latency import cli

    monkeypatch.chdir(PROJECT)
    data, out = tmp_path / name / "data", tmp_path / name / "out"
    data.mkdir(parents=True)
    Image.effect_noise((300, 200), 50).save(data / "one.png")
    question = {"image": "one.png", "question": f"What is {name}?", "answer": name}
    (data / "questions.jsonl").write_text(json.dumps(question))
    parameters = {
        "model.name": "null-model",
        "output_dir": out,
        "dataset.name": f"'{name}'",  # YAML takes a text that begins with a brace for a dict
        "dataset.source": "folder",
        "dataset.path": data,
        "exp1.sampling.num_samples": 1,
        "exp1.measurement.noise_repeats": 0,
        "figures.dpi": 50,
    }
    words = ["--env", "smoke", "--pipeline", "exp1", "--params"]
    done = CliRunner().invoke(
        cli.run, [*words, ",".join(f"{k}={v}" for k, v in parameters.items())]
    )
    assert done.exit_code == 0, done.output
    result = json.loads((out / "exp1" / "exp1_latency_distribution.json").read_text())
    assert result["environment"]["dataset"]["name"] == name
    assert result["results"][0]["question"] == f"What is {name}?"
    assert sorted(path.name for path in (out / "exp1").glob("*.parquet")) == [
        "exp1_records.parquet",
        "exp1_requests.parquet",
    ]
    page = (out / "report" / "index.html").read_text()
    assert name in html.unescape(page)
    assert "<i>" not in page


def test_names_are_text_in_latex_tables() -> None:
    marks = r"\ $ { } & % _ # ~ ^ < >"
    table = to_latex(pd.DataFrame({marks: ["a\nb", marks]})).splitlines()
    told = (
        r"\textbackslash{} \$ \{ \} \& \% \_ \# \textasciitilde{} \textasciicircum{} "
        r"\textless{} \textgreater{}"
    )
    assert table[2:6] == [rf"{told} \\", r"\midrule", r"a b \\", rf"{told} \\"]
