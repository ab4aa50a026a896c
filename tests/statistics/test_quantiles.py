import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from vlm_latency.errors import UserError
from vlm_latency.statistics import needed_n, percentile, summary, tail_ratio

LATENCIES = st.lists(st.floats(0.001, 1e6), min_size=1, max_size=80)


@pytest.mark.parametrize("q", [1, 5, 50, 90, 95, 99])
@pytest.mark.parametrize("n", [1, 5, 6, 40, 71, 72, 367, 368, 1000])
def test_the_interval_is_that_of_scipy(q: float, n: int) -> None:
    values = np.random.default_rng(n).permutation(np.arange(float(n)))
    found = percentile(values, q)
    test = scipy.stats.quantile_test(values, q=0, p=q / 100)
    expected = test.confidence_interval(0.95)
    assert found.value == np.percentile(values, q)
    low, high = np.minimum(expected.low, found.value), np.maximum(expected.high, found.value)
    assert found.low == (None if np.isnan(low) else low)
    assert found.high == (None if np.isnan(high) else high)


@pytest.mark.parametrize(("q", "n"), [(99, 368), (95, 72), (50, 6), (1, 368)])
def test_p99_becomes_a_statement_at_368(q: float, n: int) -> None:
    assert needed_n(q) == n
    enough, short = percentile(np.arange(float(n)), q), percentile(np.arange(n - 1.0), q)
    assert None not in (enough.low, enough.high)
    assert enough.note == ""
    assert None in (short.low, short.high)
    assert f"needs n >= {n} (found {n - 1})" in short.note


def test_both_ends_unbounded_are_both_told() -> None:
    note = percentile([3.0, 4.0], 50).note
    assert note == (
        "the lower bound of P50 needs n >= 6 and the upper bound of P50 needs n >= 6 (found 2)"
    )


def test_percent_not_a_fraction() -> None:
    with pytest.raises(UserError, match="between 0 and 100"):
        percentile([1.0, 2.0], 100)


@given(LATENCIES, st.floats(1, 99), st.floats(0.1, 10))
def test_the_interval_holds_the_value_and_scales(
    values: list[float], q: float, factor: float
) -> None:
    found = percentile(values, q)
    assert found.value is not None
    assert found.low is None or found.low <= found.value * (1 + 1e-12)
    assert found.high is None or found.high >= found.value * (1 - 1e-12)
    scaled = percentile(np.array(values) * factor, q)
    for end in ("low", "high"):
        one, other = getattr(found, end), getattr(scaled, end)
        assert other == (None if one is None else pytest.approx(one * factor, rel=1e-12))


@given(LATENCIES, st.sampled_from([50, 95, 99]))
def test_clusters_of_one_change_nothing(values: list[float], q: float) -> None:
    plain, clustered = percentile(values, q), percentile(values, q, clusters=range(len(values)))
    assert clustered.value == plain.value
    # Ties at the quantile can only widen it.
    assert plain.low is None or clustered.low is None or clustered.low <= plain.low
    assert plain.high is None or clustered.high is None or clustered.high >= plain.high


def test_questions_of_one_image_count_once_when_they_are_alike() -> None:
    images = np.random.default_rng(0).lognormal(size=100)
    alone = percentile(images, 90)
    repeated = percentile(np.repeat(images, 5), 90, clusters=np.repeat(np.arange(100), 5))
    assert (repeated.low, repeated.high) == (alone.low, alone.high)
    assert "effective n of 100" in repeated.method


def test_few_images_tell_no_design_effect() -> None:
    """Each image counts once: six are what the median's bounds need."""
    values = np.arange(120.0)
    five, six = (percentile(values, 50, clusters=np.arange(120) % n) for n in (5, 6))
    assert (five.low, five.high) == (None, None) and "found 120, worth 5" in five.note
    assert six.low is not None and six.high is not None


@pytest.mark.parametrize(("q", "truth"), [(50, 1.0), (95, np.exp(1.6448536))])
def test_coverage_with_clusters(q: float, truth: float) -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(400):
        image = np.repeat(rng.normal(0, np.sqrt(0.8), 80), 5)
        values = np.exp(image + rng.normal(0, np.sqrt(0.2), 400))
        found = percentile(values, q, clusters=np.repeat(np.arange(80), 5))
        hits += (found.low or 0) <= truth and (found.high is None or found.high >= truth)
    assert hits / 400 >= 0.93


def test_the_tail_ratio_is_at_least_as_sure_as_it_says() -> None:
    rng = np.random.default_rng(2)
    truth = np.exp(scipy.stats.norm.ppf(0.99) * 0.3)
    found = [tail_ratio(rng.lognormal(0, 0.3, 500)) for _ in range(300)]
    assert np.mean([e.low <= truth <= e.high for e in found]) >= 0.95
    assert tail_ratio(rng.lognormal(0, 0.3, 435)).high is None


def test_a_constant_has_no_tail() -> None:
    ratio = tail_ratio([0.1 + 0.2, 0.3])
    assert (ratio.value, ratio.low, ratio.high) == (1, 1, 1)
    assert tail_ratio([5.0]).high is None


def test_summary_by_hand() -> None:
    found = summary([1.0, 2.0, 3.0, 6.0], clusters=["a", "a", "b", "b"])
    assert (found.n, found.n_clusters, found.min, found.max) == (4, 2, 1.0, 6.0)
    assert found.mean.value == 3.0
    assert found.std == pytest.approx(np.sqrt(14 / 3))
    assert found.P50.value == 2.5
    assert summary([-1.0, 2.0]).tail_ratio is None
