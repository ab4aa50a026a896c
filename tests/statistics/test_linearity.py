import numpy as np
import pytest
import scipy.stats

from vlm_latency.statistics import linearity_test, staircase


def test_lack_of_fit_by_hand() -> None:
    x, y = np.repeat([0.0, 1, 2], 4), np.array([-1.0, 1, -1, 1, 2, 4, 2, 4, -1, 1, -1, 1])
    # the line is flat at 1; means 0, 3, 0: lack 4·(1 + 4 + 1) = 24, pure error 12 over 9
    found = linearity_test(x, y)
    assert found.statistic == pytest.approx(24 / (12 / 9))
    assert found.p_value == pytest.approx(scipy.stats.f.sf(18, 1, 9))
    assert found.max_departure == pytest.approx(2)
    assert found.verdict == "not a line"


@pytest.mark.parametrize("replicates", [1, 5])
def test_false_alarms_on_a_line(replicates: int) -> None:
    rng = np.random.default_rng(replicates)
    x = np.repeat(np.arange(1.0, 13), replicates)
    alarms = [
        linearity_test(x, 5 + x + rng.normal(size=x.size), permutations=199).verdict
        for _ in range(300)
    ]
    assert 0.02 <= alarms.count("not a line") / 300 <= 0.09


def test_noise_that_grows_along_the_line_is_no_bend() -> None:
    rng = np.random.default_rng(2)
    x = np.linspace(10, 1_500, 15)
    found = [
        linearity_test(x, 5 + x * np.exp(rng.normal(0, 0.05, 15)), permutations=199).verdict
        for _ in range(400)
    ]
    assert 0.02 <= found.count("not a line") / 400 <= 0.08


def test_what_a_request_does_to_all_its_runs_is_no_bend() -> None:
    rng = np.random.default_rng(1)
    request = np.repeat(np.arange(15), 5)
    x = np.linspace(288, 1344, 15)[request]
    found = []
    for _ in range(200):
        effect = rng.normal(0, 0.02, 15)[request] + rng.normal(0, 0.02, 75)
        y = (10 + 0.14 * x) * np.exp(effect)
        found.append(linearity_test(x, y, request, permutations=199).verdict)
    assert found.count("not a line") <= 20
    bent = (10 + 1e-4 * x**2) * np.exp(rng.normal(0, 0.01, 15)[request])
    assert linearity_test(x, bent, request).verdict == "not a line"


@pytest.mark.parametrize("replicates", [1, 3])
def test_a_bend_is_seen(replicates: int) -> None:
    x = np.repeat(np.arange(1.0, 21), replicates)
    y = x**2 + np.random.default_rng(0).normal(size=x.size)
    found = linearity_test(x, y)
    assert found.verdict == "not a line"
    assert found.n_levels == 20


def test_made_up_latencies_without_noise() -> None:
    x = np.repeat([1.0, 2, 3], 3)
    assert linearity_test(x, 2 * x).verdict == "line"
    assert linearity_test(x, x**2).verdict == "not a line"
    assert linearity_test(x, np.full(9, 7.0)).verdict == "line"
    nothing = linearity_test(x, np.zeros(9))  # a component that a model lacks
    assert (nothing.verdict, nothing.max_departure) == ("line", 0)
    assert staircase(x, np.zeros(9), x).verdict == "line"


@pytest.mark.parametrize("x", [[1, 1, 2, 2], [1, 2, 3, 4]])
def test_too_little_is_undecided(x: list[float]) -> None:
    found = linearity_test(x, [1.0, 2.0, 2.5, 4.5])
    assert (found.verdict, found.p_value) == ("undecided", None)
    assert "needs" in found.note


CROPS = np.repeat(np.arange(1, 9), 6)
TOKENS = 144.0 * CROPS + np.tile([0, 10, 20, 30, 40, 50], 8)


@pytest.mark.parametrize(
    ("latency", "verdict"),
    [
        (0.1 * TOKENS, "line"),
        (40.0 * CROPS, "staircase"),
        (40.0 * CROPS + 0.1 * TOKENS, "line with steps"),
    ],
)
def test_the_shape_that_made_the_data_is_found(latency: np.ndarray, verdict: str) -> None:
    noise = np.random.default_rng(0).normal(0, 0.5, TOKENS.size)
    found = staircase(TOKENS, latency + noise, CROPS)
    assert found.verdict == verdict
    assert len(found.break_points) == 7
    first = found.break_points[0]
    assert (first.x, first.step_from, first.step_to) == ((194 + 288) / 2, 1, 2)


def test_what_a_request_does_to_all_its_runs_is_no_step() -> None:
    rng = np.random.default_rng(3)
    request = np.repeat(np.arange(48), 5)
    x, crops = TOKENS[request], CROPS[request]
    found = []
    for _ in range(40):
        y = (10 + 0.14 * x) * (1 + rng.normal(0, 0.02, 48)[request] + rng.normal(0, 0.005, 240))
        found.append(staircase(x, y, crops, request))
    assert [each.verdict for each in found].count("line") >= 36
    assert {each.n for each in found} == {48}
    alone = staircase(x, y, request, request)  # nothing tells a step from its only request
    assert (alone.verdict, alone.break_points[0].jump.low) == ("undecided", None)


def test_jumps_beside_the_line() -> None:
    noise = np.random.default_rng(1).normal(0, 0.5, TOKENS.size)
    found = staircase(TOKENS, 40.0 * CROPS + noise, CROPS)
    assert found.p_value is not None and found.p_value < 1e-6
    assert all(point.jump.low < 40 < point.jump.high for point in found.break_points[:3])
    assert found.break_points[0].jump_of_line == pytest.approx(40, rel=0.05)


def test_one_crop_count_has_no_stairs() -> None:
    found = staircase([1.0, 2, 3, 4], [1.0, 2, 3, 4], [1, 1, 1, 1])
    assert found.verdict == "undecided"
    assert found.break_points == ()


def test_jumps_between_single_and_between_flat_steps() -> None:
    single = staircase([1.0, 2, 3], [5.0, 6, 8], [1, 2, 3]).break_points[1].jump
    assert (single.value, single.low) == (2.0, None)
    flat = staircase(TOKENS, 40.0 * CROPS, CROPS).break_points[0].jump
    assert (flat.low, flat.high) == (40, 40)
