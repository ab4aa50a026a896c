"""What reports say of runs: which are alike, which ids are numbers, what disturbed them."""

import pandas as pd

from vlm_latency.pipelines.reporting import results
from vlm_latency.pipelines.reporting.entries import clusters, entry_dicts
from vlm_latency.statistics import Estimate, mean_estimate


def test_an_id_is_written_as_a_number_only_if_that_gives_it_back() -> None:
    table = pd.DataFrame({"question_id": ["12", "007", "q1", "+3"]})
    assert [entry["question_id"] for entry in entry_dicts(table)] == [12, "007", "q1", "+3"]


def test_a_run_without_an_image_stands_for_itself() -> None:
    rows = pd.DataFrame({"request_id": ["a", "b", "c"], "image_id": ["7", None, None]})
    assert clusters(rows).tolist() == ["7", "b", "c"]


def _mean(rows: pd.DataFrame) -> Estimate:
    return mean_estimate(rows["T_total"], rows["request_id"])


def _runs(times: list[float], causes: list[str | None]) -> pd.DataFrame:
    ids = [f"r{i}" for i in range(len(times))]
    return pd.DataFrame({"request_id": ids, "T_total": times, "outlier_cause": causes})


def test_runs_that_were_all_disturbed_leave_nothing_to_compare_with() -> None:
    assert results.disturbance(_runs([1.0, 2.0], ["slow host"] * 2), "mean", _mean) is None
    assert results.disturbance(_runs([1.0, 2.0], [None, "unexplained"]), "mean", _mean) is None


def test_a_number_that_disturbed_runs_move_is_named() -> None:
    steady = [10.0 + 0.01 * (i % 5) for i in range(40)]
    slow = _runs([*steady, *[13.0, 13.1] * 20], [None] * 40 + ["slow host"] * 40)
    found = results.disturbance(slow, "the mean", _mean)
    assert found is not None
    assert (found.moved, found.disturbed_runs, found.causes) == (True, 40, {"slow host": 40})
    same = _runs([*steady, 10.02], [None] * 40 + ["slow host"])
    found = results.disturbance(same, "the mean", _mean)
    assert found is not None and not found.moved


def test_each_question_is_judged_once_however_often_it_is_run() -> None:
    runs = [("a", 0, "yes"), ("a", 1, "no"), ("b", 0, "no"), ("b", 1, "no")]
    rows = pd.DataFrame(runs, columns=["request_id", "run_index", "generated_text"])
    requests = pd.DataFrame({"request_id": ["a", "b"], "answers": ['["yes"]', '["yes"]']})
    found = results.accuracy(
        rows.assign(output_length="natural"), requests, {"model": {"weights": "pretrained"}}
    )
    assert isinstance(found, Estimate)
    assert found.n == 2
