"""A file is the old one or the new one, never half of it; and Kedro-Viz can show it."""

from __future__ import annotations

import base64
import errno
import inspect
import io
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from kedro.io import DatasetError
from matplotlib.figure import Figure
from PIL import Image

from vlm_latency.datasets import (
    AtomicJSON,
    AtomicParquet,
    FigureFile,
    HTMLPage,
    RecordLog,
    TableFolder,
)
from vlm_latency.datasets.atomic import TEMPORARY, replacing
from vlm_latency.errors import DataError
from vlm_latency.journal import Journal
from vlm_latency.plots.style import FigureContext, Style, panels, plainly, readable_log

TABLE = pd.DataFrame({"name": ["a", "b"], "value": [1.5, None]})


def figure() -> Figure:
    drawn = Figure(figsize=(2, 1))
    drawn.add_subplot().plot([0, 1], [0, 1])
    return drawn


SAVED: list[tuple[type, str, Any]] = [
    (AtomicJSON, "data.json", {"a": 1}),
    (AtomicParquet, "table.parquet", TABLE),
    (FigureFile, "figure.png", figure()),
    (HTMLPage, "page.html", "<!DOCTYPE html><html></html>"),
]


@pytest.mark.parametrize(("kind", "name", "data"), SAVED)
def test_a_file_is_written_whole_into_a_new_folder(
    kind: type, name: str, data: Any, tmp_path: Path
) -> None:
    path = tmp_path / "new" / name
    dataset = kind(filepath=str(path))
    assert not dataset.exists()
    dataset.save(data)
    assert dataset.exists()
    expected = {name, "figure.pdf"} if kind is FigureFile else {name}
    assert {file.name for file in path.parent.iterdir()} == expected
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def report_figure(height: float, ticks: object = plainly) -> Figure:
    context, style = FigureContext(model="tiny"), Style(dpi=40)
    with style.applied():
        drawn, axes = panels(style, context, "a title", [["one"]])
        axes["one"].plot([1, 10], [1, height])
        readable_log(axes["one"].xaxis)
        axes["one"].yaxis.set_major_formatter(ticks)
    return drawn


def test_a_figure_is_drawn_again_only_where_it_would_differ(tmp_path: Path) -> None:
    path, drawn = tmp_path / "figure.png", tmp_path / "figure.pdf"

    def save(figure: Figure, dpi: int = 40) -> bool:
        before = path.stat().st_ino if path.exists() else 0
        FigureFile(filepath=str(path), dpi=dpi).save(figure)
        return path.stat().st_ino != before and path.stat().st_size > 0

    assert save(report_figure(2.0))
    assert not save(report_figure(2.0))
    assert save(report_figure(2.5)) and save(report_figure(2.5), dpi=41)
    drawn.unlink()
    assert save(report_figure(2.5), dpi=41) and drawn.exists()
    path.write_bytes(path.read_bytes()[:-40])
    assert save(report_figure(2.5), dpi=41)
    # What a function without a name does cannot be compared.
    unknown = report_figure(2.5, lambda value, _: f"{value:g}")
    assert save(unknown, dpi=41) and save(unknown, dpi=41)


def test_contents_of_a_figure_are_the_same_in_every_process() -> None:
    code = f"import runpy; print(runpy.run_path({__file__!r})['report_figure'](2.0).contents)"
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in "12"
    }
    assert found == {f"{report_figure(2.0).contents}\n"}


@pytest.mark.parametrize("changed", ["matplotlib", "a setting", "the code", "the style"])
def test_whatever_could_change_a_drawing_changes_its_contents(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, figure = report_figure(2.0).contents, report_figure(2.0)
    if changed == "matplotlib":
        monkeypatch.setattr("matplotlib.__version__", "0")
    elif changed == "a setting":
        monkeypatch.setitem(matplotlib.rcParams, "image.cmap", "gray")
    elif changed == "the code":
        (tmp_path / "style.py").write_text("another")
        monkeypatch.setattr("vlm_latency.plots.style.__file__", str(tmp_path / "style.py"))
    else:
        monkeypatch.setattr(figure, "style", Style(paper=True, dpi=40))
    assert figure.contents != before


@pytest.mark.parametrize(("kind", "name", "data"), SAVED)
def test_a_full_disk_leaves_the_old_file_whole(
    kind: type, name: str, data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / name
    dataset = kind(filepath=str(path))
    dataset.save(data)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr("vlm_latency.datasets.atomic.os.fsync", full)
    with pytest.raises(DatasetError) as error:
        dataset.save(data)
    assert isinstance(error.value.__cause__, DataError)
    assert "No space left on device; free some space" in str(error.value)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize(("kind", "name", "data"), SAVED)
def test_who_reads_while_it_is_written_reads_the_old_file(
    kind: type, name: str, data: Any, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(b"the old one")
    with path.open("rb") as reader:
        kind(filepath=str(path)).save(data)
        assert reader.read() == b"the old one"
    assert path.read_bytes() != b"the old one"


@pytest.mark.parametrize("broken", [{1, 2}, object()])
def test_what_cannot_be_written_leaves_the_old_file_whole(broken: Any, tmp_path: Path) -> None:
    dataset = AtomicJSON(filepath=str(tmp_path / "data.json"))
    dataset.save({"a": 1})
    with pytest.raises(DatasetError):
        dataset.save({"a": broken})
    assert dataset.load() == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["data.json"]


def test_json_holds_no_nan_and_no_infinity(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    values = {"a": float("nan"), "b": [np.inf, np.float64(2)], "c": np.int64(3), "d": pd.NA}
    AtomicJSON(filepath=str(path)).save(values)
    assert json.loads(path.read_text()) == {"a": None, "b": [None, 2.0], "c": 3, "d": None}


def test_broken_json_is_told_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('{"a": 1,\n"b": }')
    with pytest.raises(DatasetError, match=r"data.json is not JSON: .* in line 2"):
        AtomicJSON(filepath=str(path)).load()


def test_tables_are_csv_and_latex(tmp_path: Path) -> None:
    TableFolder(filepath=str(tmp_path / "tables")).save({"times": TABLE})
    assert sorted(p.name for p in (tmp_path / "tables").iterdir()) == ["times.csv", "times.tex"]
    assert pd.read_csv(tmp_path / "tables" / "times.csv")["value"].tolist()[0] == 1.5
    assert r"\toprule" in (tmp_path / "tables" / "times.tex").read_text()


def test_a_table_without_columns_is_no_file(tmp_path: Path) -> None:
    dataset = TableFolder(filepath=str(tmp_path / "tables"))
    dataset.save({"times": TABLE, "peaks": TABLE})
    dataset.save({"times": TABLE, "peaks": pd.DataFrame()})  # on another machine: none are known
    assert sorted(p.name for p in (tmp_path / "tables").iterdir()) == ["times.csv", "times.tex"]
    assert "<table" in dataset.preview()


def test_a_broken_run_does_not_lock_out_the_next_one_of_its_process(tmp_path: Path) -> None:
    """As in a notebook, where the traceback of the broken run keeps its catalog alive."""
    chunk = {"fingerprint": "aa", "conditions": {"model": "null"}}
    row = {"request_id": "r", "request_sha256": "s", "status": "ok"}
    broken = RecordLog(filepath=str(tmp_path / "journal"))
    broken.save({**chunk, "rows": [{**row, "run_index": 0}]})
    following = RecordLog(filepath=str(tmp_path / "journal"))
    assert len(following.load().read("aa")) == 1
    following.save({**chunk, "rows": [{**row, "run_index": 1}]})
    assert len(following.load().read("aa")) == 2
    other = Journal(tmp_path / "journal")  # as another process has: the lock is free
    other.append("aa", {}, [{**row, "run_index": 2}])
    other.close()


class TestPreviews:
    """What Kedro-Viz finds out from the annotation, and what it then expects."""

    def kind(self, dataset: Any) -> str:
        return str(inspect.signature(dataset.preview).return_annotation)

    def test_of_a_result_leaves_out_its_entries(self, tmp_path: Path) -> None:
        dataset = AtomicJSON(filepath=str(tmp_path / "data.json"))
        dataset.save({"results": [{"T_total": 1.0}] * 9, "statistics": {"mean": 1.0}})
        assert self.kind(dataset) == "JSONPreview"
        assert json.loads(dataset.preview()) == {"statistics": {"mean": 1.0}}

    def test_of_a_table_is_its_first_rows(self, tmp_path: Path) -> None:
        dataset = AtomicParquet(filepath=str(tmp_path / "table.parquet"))
        dataset.save(pd.concat([TABLE] * 20))
        assert self.kind(dataset) == "TablePreview"
        preview = json.loads(json.dumps(dataset.preview(), allow_nan=False))
        assert preview["columns"] == ["name", "value"]
        assert preview["data"][:2] == [["a", 1.5], ["b", None]]
        assert len(preview["data"]) == 20

    def test_of_a_folder_of_tables_is_all_of_them(self, tmp_path: Path) -> None:
        dataset = TableFolder(filepath=str(tmp_path / "tables"))
        dataset.save({"times": TABLE, "sizes": TABLE})
        assert self.kind(dataset) == "HTMLPreview"
        headings = re.findall("<h3>(.*?)</h3>", dataset.preview())
        assert headings == ["sizes", "times"]
        assert dataset.preview().count("<td>1.5</td>") == 2

    def test_of_a_figure_is_its_png(self, tmp_path: Path) -> None:
        dataset = FigureFile(filepath=str(tmp_path / "figure.png"), dpi=100)
        dataset.save(figure())
        assert self.kind(dataset) == "ImagePreview"
        with Image.open(io.BytesIO(base64.b64decode(dataset.preview()))) as image:
            assert (image.format, image.size) == ("PNG", (200, 100))

    def test_of_the_page_is_the_page(self, tmp_path: Path) -> None:
        dataset = HTMLPage(filepath=str(tmp_path / "page.html"))
        dataset.save("<html></html>")
        assert self.kind(dataset) == "HTMLPreview"
        assert dataset.preview() == "<html></html>"

    def test_of_the_journal_counts_its_runs(self, tmp_path: Path) -> None:
        dataset = RecordLog(filepath=str(tmp_path / "journal"))
        assert json.loads(dataset.preview()) == {}
        row = {"request_id": "r", "request_sha256": "s", "run_index": 0, "status": "ok"}
        chunk = {"fingerprint": "aa", "conditions": {"model": "null"}, "rows": [row]}
        dataset.save({**chunk, "session": {"runs": 1}})
        dataset.release()
        assert self.kind(dataset) == "JSONPreview"
        found = {"aa": {"runs": 1, "conditions": {"model": "null"}}}
        assert json.loads(dataset.preview()) == found


def test_what_a_killed_writer_left_is_removed_and_a_living_one_kept(tmp_path: Path) -> None:
    left = tmp_path / f".x-abc{TEMPORARY}.json"
    left.touch()
    path = tmp_path / "x.json"
    with replacing(path) as living:
        assert not left.exists()
        with replacing(path) as second:
            second.write_text("2")
        assert living.exists()
        living.write_text("1")
    assert path.read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
