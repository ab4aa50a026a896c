"""Nothing that was measured is lost, whatever happens to the file's end."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_latency.errors import MeasurementError
from vlm_latency.journal import Journal, _fits, _lines, _table
from vlm_latency.records import MEASURED_COLUMNS, typed

CONDITIONS = {"model": "null"}


def row(request: int, run: int = 0, **further: Any) -> dict[str, Any]:
    return {
        "request_id": f"r{request}",
        "run_index": run,
        "status": "ok",
        "T_total": 1.5,
        **further,
    }


def write(folder: Path, *rows: dict[str, Any], mark: str = "aa") -> None:
    journal = Journal(folder)
    journal.append(mark, CONDITIONS, list(rows))
    journal.close()


def test_what_is_written_is_read_with_every_column(tmp_path: Path) -> None:
    write(tmp_path, row(1, decode_step_ms=[0.5, 0.25], T_LLM_decode=None))
    table = Journal(tmp_path).read("aa")
    assert list(table.columns) == list(MEASURED_COLUMNS)
    assert table.loc[0, "decode_step_ms"] == [0.5, 0.25]
    assert table["T_LLM_decode"].isna().all()
    assert Journal(tmp_path).conditions(tmp_path / "aa.jsonl") == CONDITIONS


def test_a_whole_journal_is_parsed_at_once_and_nothing_else_is(tmp_path: Path) -> None:
    path = tmp_path / "aa.jsonl"
    own = {"fingerprint": "aa"}
    write(tmp_path, row(1, **own), row(2, decode_step_ms=[1, 0.5], new_kv_lengths=3, **own))
    at_once = _table(path, "aa")
    assert at_once is not None and len(at_once) == 2
    pd.testing.assert_frame_equal(
        at_once, typed(pd.DataFrame(_lines(path, "aa")), MEASURED_COLUMNS)
    )
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"torn')
    again = _table(path, "aa")
    assert again is not None and len(again) == 2
    good = json.dumps(row(3, **own)).encode()
    for bad in (
        *(b"", b" " + good, good + good, good.replace(b'"aa"', b'"bb"'), good[:-1] + b',"more":1}'),
        *(
            good.replace(b"1.5", b'"1.5"'),
            good.replace(b'"r3"', b"null"),
            good.replace(b"r3", b"\xff"),
        ),
        *(good.replace(b'"status"', b'"status":"ok","status"'), b'{"session":3}', b"[1]", b"{"),
    ):
        path.write_bytes(whole + bad + b"\n")
        assert _table(path, "aa") is None, bad


def test_an_absent_journal_is_empty_and_makes_no_folder(tmp_path: Path) -> None:
    folder = tmp_path / "none"
    assert Journal(folder).read("aa").empty
    assert not folder.exists()


@given(cut=st.integers(min_value=0, max_value=400))
def test_a_file_cut_anywhere_loses_only_the_torn_line(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    folder = tmp_path_factory.mktemp("journal")
    write(folder, row(1), row(2), row(3))
    path = folder / "aa.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: min(cut, len(whole))])
    kept = max(0, whole[: min(cut, len(whole))].count(b"\n") - 1)  # the header is no run
    assert len(Journal(folder).read("aa")) == kept
    write(folder, row(9))
    assert list(Journal(folder).read("aa")["request_id"]) == [f"r{n + 1}" for n in range(kept)] + [
        "r9"
    ]


def test_a_tail_of_zeros_is_cut(tmp_path: Path) -> None:
    write(tmp_path, row(1))
    path = tmp_path / "aa.jsonl"
    path.write_bytes(path.read_bytes() + b"\0" * 5000)
    write(tmp_path, row(2))
    assert list(Journal(tmp_path).read("aa")["request_id"]) == ["r1", "r2"]


def test_damage_in_the_middle_is_named(tmp_path: Path) -> None:
    write(tmp_path, row(1), row(2))
    path = tmp_path / "aa.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"{broken\n" + lines[2])
    with pytest.raises(MeasurementError, match=r"line 2 of the journal .* damaged"):
        Journal(tmp_path).read("aa")


@pytest.mark.parametrize(
    "bad",
    [
        b"{broken",
        b"7",
        b"[1]",
        b"[" * 100_000,
        b'{"request_id":1,"run_index":0,"status":"ok"}',
        b'{"request_id":"r","run_index":0,"status":"ok","T_total":"x"}',
        b'{"request_id":"r","run_index":0,"status":"ok","fingerprint":"bb"}',
        b'{"session":3}',
    ],
)
def test_a_bad_line_is_cut_at_the_end_and_named_in_the_middle(tmp_path: Path, bad: bytes) -> None:
    write(tmp_path, row(1), row(2))
    path = tmp_path / "aa.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + bad + b"\n")
    assert list(Journal(tmp_path).read("aa")["request_id"]) == ["r1", "r2"]
    write(tmp_path, row(3))
    assert list(Journal(tmp_path).read("aa")["request_id"]) == ["r1", "r2", "r3"]
    assert path.with_suffix(".cut").read_bytes() == bad + b"\n"

    path.write_bytes(whole + bad + b"\n" + whole.splitlines(keepends=True)[1])
    with pytest.raises(MeasurementError, match=r"line 4 of the journal .*sed -i 4d"):
        Journal(tmp_path).read("aa")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3] + lines[4:]))  # what the sentence says
    assert list(Journal(tmp_path).read("aa")["request_id"]) == ["r2", "r1"]


@pytest.mark.parametrize(
    "header",
    [
        b"7",
        b'{"an":"unrelated line"}',
        b'{"schema_version":99,"fingerprint":"aa","conditions":{}}',
        b'{"schema_version":1,"fingerprint":"bb","conditions":{}}',
    ],
)
def test_a_file_that_is_not_this_journal_is_refused_and_left_as_it_is(
    tmp_path: Path, header: bytes
) -> None:
    (tmp_path / "aa.jsonl").write_bytes(header + b"\n")
    with pytest.raises(MeasurementError, match="measure afresh"):
        Journal(tmp_path).read("aa")
    with pytest.raises(MeasurementError, match="measure afresh"):
        Journal(tmp_path).append("aa", CONDITIONS, [row(1)])
    assert (tmp_path / "aa.jsonl").read_bytes() == header + b"\n"


def test_other_conditions_are_kept_apart(tmp_path: Path) -> None:
    write(tmp_path, row(1), mark="aa")
    write(tmp_path, row(2), mark="bb")
    journal = Journal(tmp_path)
    assert list(journal.read("aa")["request_id"]) == ["r1"]
    assert journal.others("aa") == [tmp_path / "bb.jsonl"]
    (tmp_path / "cc.jsonl").write_bytes(b"7\n")  # no journal at all
    with pytest.raises(MeasurementError, match=r"cc\.jsonl"):
        journal.conditions(tmp_path / "cc.jsonl")


def test_a_run_tried_again_counts_once_by_its_last_try(tmp_path: Path) -> None:
    write(tmp_path, row(1, status="failed"), row(1))
    table = Journal(tmp_path).read("aa")
    assert list(table["status"]) == ["ok"]


def test_a_request_that_asks_for_something_else_is_another_one(tmp_path: Path) -> None:
    write(tmp_path, row(1), row(1, request_sha256="c1"))
    assert len(Journal(tmp_path).read("aa")) == 2


def test_what_a_command_says_at_its_end_is_no_run(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append("aa", CONDITIONS, [row(1)])
    journal.append("aa", CONDITIONS, [], session={"warmup_share": 0.1})
    journal.append("aa", CONDITIONS, [row(2)])
    journal.close()
    assert len(journal.read("aa")) == 2
    assert journal.sessions("aa") == [{"warmup_share": 0.1}]


def test_setting_aside_starts_afresh_and_keeps_the_old(tmp_path: Path) -> None:
    write(tmp_path, row(1))
    journal = Journal(tmp_path)
    kept = journal.set_aside("aa")
    assert kept is not None
    assert kept.exists()
    assert journal.read("aa").empty
    assert journal.set_aside("aa") is None


def test_two_writers_are_refused(tmp_path: Path) -> None:
    first, second = Journal(tmp_path), Journal(tmp_path)
    first.append("aa", CONDITIONS, [row(1)])
    with pytest.raises(MeasurementError, match="another run is writing"):
        second.append("aa", CONDITIONS, [row(2)])
    first.close()
    second.append("aa", CONDITIONS, [row(2)])
    second.close()
    assert len(Journal(tmp_path).read("aa")) == 2


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path)
    journal.append("aa", CONDITIONS, [row(1)])
    before = journal.path("aa").read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(MeasurementError, match="No space left on device; free some space"):
        journal.append("aa", CONDITIONS, [row(2)])
    journal.close()
    assert journal.path("aa").read_bytes() == before


def test_not_a_number_never_reaches_the_file(tmp_path: Path) -> None:
    write(tmp_path, row(1, T_projector=float("nan")))
    for line in (tmp_path / "aa.jsonl").read_text().splitlines():
        assert "T_projector" not in json.loads(line)


def test_a_second_reading_sees_what_was_written_since_and_no_change_of_the_first(
    tmp_path: Path,
) -> None:
    log = Journal(tmp_path)
    row = {"request_id": "a", "request_sha256": "f", "status": "ok", "T_total": 1.5}
    log.append("aa", {}, [{**row, "run_index": 0}])
    first = log.read("aa")
    first["T_total"] = 7.0
    assert log.read("aa")["T_total"].tolist() == [1.5]
    log.read("aa")
    log.append("aa", {}, [{**row, "run_index": 1}])
    assert len(log.read("aa")) == 2
    log.close()


@pytest.mark.parametrize(
    ("column", "value", "fits"),
    [
        ("T_total", 3, True),
        ("T_total", True, False),
        ("T_total", "3", False),
        ("num_crops", 2.0, True),
        ("num_crops", 2.5, False),
        ("num_crops", 2**63, False),
        ("num_crops", True, False),
        ("first_of_shape", True, True),
        ("first_of_shape", 1, False),
        ("generated_text", 5, False),
        ("request_sha256", "f", True),
        ("anything else", [1], True),
        ("num_crops", None, True),
    ],
)
def test_values_of_a_line_are_of_their_columns_types(column: str, value: Any, fits: bool) -> None:
    assert _fits({column: value}) is fits
