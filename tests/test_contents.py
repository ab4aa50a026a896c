"""A file is read once, and again as soon as anything of it may have changed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vlm_latency import contents

OLD = 10**18  # nanoseconds: a file that nobody is writing


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLM_LATENCY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(contents, "_SETTLED_NS", 0)
    path = tmp_path / "model.safetensors"
    write(path, b"a")
    return path


def write(path: Path, letter: bytes) -> None:
    path.write_bytes(letter * contents._SMALL)
    os.utime(path, ns=(OLD, OLD))


def sha(letter: bytes) -> str:
    return hashlib.sha256(letter * contents._SMALL).hexdigest()


def in_another_process(path: Path) -> str:
    contents._hashed.cache_clear()
    return contents.file_sha256(path)


def test_a_file_is_read_once_by_all_commands(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert in_another_process(file) == sha(b"a")
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("it was read again"))
    assert in_another_process(file) == sha(b"a")
    told = "import sys, hashlib; hashlib.file_digest = None; from pathlib import Path; " + (
        "from vlm_latency.contents import file_sha256; print(file_sha256(Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", told, str(file)]
    assert subprocess.run(
        command, capture_output=True, text=True, check=True
    ).stdout.strip() == sha(b"a")


def test_other_contents_of_the_same_size_and_time_are_seen(file: Path) -> None:
    assert in_another_process(file) == sha(b"a")
    write(file, b"b")  # what changed it kept its size and set its time back
    assert in_another_process(file) == sha(b"b")


def test_what_is_kept_of_another_path_or_damaged_is_not_believed(file: Path) -> None:
    assert in_another_process(file) == sha(b"a")
    (kept,) = (file.parent / "cache" / "contents").glob("*.json")
    for wrong in (
        "{",
        "[]",
        "{}",
        "[" * 100_000,
        kept.read_text().replace(sha(b"a"), "zz"),
        '{"state": 1}',
    ):
        kept.write_text(wrong)
        assert in_another_process(file) == sha(b"a")


def test_nothing_is_kept_of_small_and_of_fresh_files_or_where_it_is_off(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "_SETTLED_NS", 2 * 10**9)
    in_another_process(file)  # its change is no two seconds ago
    monkeypatch.setattr(contents, "_SETTLED_NS", 0)
    small = file.with_name("config.json")
    small.write_text("{}")
    in_another_process(small)
    monkeypatch.setenv("VLM_LATENCY_CACHE", "off")
    in_another_process(file)
    assert not (file.parent / "cache").exists()
    monkeypatch.setenv("VLM_LATENCY_CACHE", str(small))  # a file: nothing can be written there
    assert in_another_process(file) == sha(b"a")
