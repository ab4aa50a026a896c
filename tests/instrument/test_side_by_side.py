"""The comparison with peers: what it gives and says; never how long anything took."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm_latency.statistics import compare_paired


@pytest.fixture(scope="module")
def script() -> Any:
    path = Path(__file__).parents[1] / "side_by_side.py"
    spec = importlib.util.spec_from_file_location("side_by_side", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["side_by_side"] = module
    spec.loader.exec_module(module)
    return module


def test_all_contenders_run_in_turn(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm_latency import load_model

    vlm = load_model("tiny-molmo", device="cpu")
    rows = script.questions(2, 2, (112, 112))
    assert [(row["image_width"], row["output_length"]) for row in rows] == [(112, "2")] * 2
    order: list[str] = []
    timed = script._timed

    def noted(job: Callable[..., Any], *others: Any) -> Any:
        order.append(getattr(getattr(job, "func", job), "__name__", ""))
        return timed(job, *others)

    monkeypatch.setattr(script, "_timed", noted)
    found = script.side_by_side(vlm, rows, 2, seconds=0)
    peers = {"again", "seed", "profiler", "optimum"} - set(found["absent"])
    assert {"again", "seed", "profiler"} <= peers
    assert set(found["ratios"]) == {"instrumented", *peers}
    assert found["ratios"]["instrumented"]["whole"].n_pairs == len(peers)
    for name in peers:
        assert found["ratios"][name]["whole"].n_pairs == 1
        assert ("generate()" in found["ratios"][name]) == (name != "seed")
    rounds = order[2 + len(peers) :]  # what each does first
    assert len(rounds) == 3 * len(peers)
    for index in range(0, len(rounds), 3):
        assert {"bare", "instrumented"} <= set(rounds[index : index + 3])
    said = "\n".join(script.told(found))
    for words in script.PEERS.values():
        assert words in said
    assert "tiny-molmo" in said
    assert "goal on a CPU" in said


@pytest.mark.parametrize(
    ("kind", "ratio", "words"),
    [
        ("cpu", [1.0, 1.001, 1.002], "at most 1.01: met"),
        ("cuda", [1.0, 1.001, 1.002], "inside 0.995–1.005: met"),
        ("cuda", [0.98, 0.981, 0.98], "missed"),
        ("cpu", [1.02, 1.021, 1.022], "missed"),
        ("cpu", [0.9, 1.1, 1.0], "undecided with 3 pairs; about 7 pairs"),
        ("cuda", [1.0040, 1.0050, 1.0060], "the ratio lies at the limit"),
        ("cpu", [1.0], "undecided with 1 pairs; more pairs are needed"),
    ],
)
def test_the_interval_decides(script: Any, kind: str, ratio: list[float], words: str) -> None:
    found = compare_paired([1.0] * len(ratio), ratio)
    needed = 7 if found.n_pairs > 1 else None
    assert words in script._judged(kind, found, needed)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["--model", "null-model"], "expected a model that takes time"),
        (["--model", "tiny-mollmo"], "tiny-molmo"),
        (["--engine", "fast"], "model.engine"),
        (["--tokens", "1"], "2 tokens"),
        (["--image", "12"], "640x480"),
    ],
)
def test_what_cannot_be_compared_ends_in_one_sentence(
    script: Any, asked: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        script.main(asked)
    assert words in capsys.readouterr().err
