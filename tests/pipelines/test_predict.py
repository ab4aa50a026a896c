"""A prediction carries the marks of the runs that it learned from."""

from __future__ import annotations

from vlm_latency.pipelines.predict.nodes import calibration_marks


def test_what_the_predictor_learned_from_is_marked() -> None:
    made_up = {
        "environment": {"dataset": {"synthetic": True}, "model": {"weights": "random"}},
        "coverage": {"partial": True},
    }
    assert calibration_marks(made_up) == ["synthetic requests", "random weights", "partial"]
    real = {"environment": {"dataset": {"synthetic": False}, "model": {"weights": "pretrained"}}}
    assert calibration_marks(real) == []
