"""The tour runs from its first cell to its last on a fresh result, and is committed bare."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
from PIL import Image

nbformat = pytest.importorskip("nbformat", reason="needs the extra 'notebook'")
NotebookClient = pytest.importorskip("nbclient", reason="needs the extra 'notebook'").NotebookClient

PROJECT = Path(__file__).parents[1]
TOUR = PROJECT / "notebooks" / "tour.ipynb"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What a small run of exp2 and exp4 leaves."""
    from kedro.framework.session import KedroSession
    from kedro.framework.startup import bootstrap_project

    folder = tmp_path_factory.mktemp("results")
    bootstrap_project(PROJECT)
    given = {
        "output_dir": str(folder),
        "model": {"name": "tiny-llava"},
        "figures": {"dpi": 50},
        "flops": {"counted": False},
        "exp4": {"sampling": {"tiling": "none"}},
    }
    for name in ("exp2", "exp4"):
        with KedroSession.create(PROJECT, env="smoke", runtime_params=given) as session:
            session.run(pipeline_names=[name])
    return folder


def test_the_tour_runs(results, monkeypatch):
    monkeypatch.setenv("VLM_LATENCY_RESULTS", str(results))
    notebook = nbformat.read(TOUR, as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": TOUR.parent}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    figures = [
        Image.open(io.BytesIO(base64.b64decode(output["data"]["image/png"])))
        for output in outputs
        if "image/png" in output.get("data", {})
    ]
    assert len(figures) == 2
    for figure in figures:
        assert min(figure.size) > 300 and len(set(figure.convert("L").tobytes())) > 20
    text = "".join(output.get("text", "") for output in outputs)
    assert "P50 of T_total" in text and "needs n >= 368" in text


def test_the_tour_is_committed_without_outputs():
    for cell in nbformat.read(TOUR, as_version=4).cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None
