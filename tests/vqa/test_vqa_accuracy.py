"""The official accuracy, on cases worked by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_latency.vqa import normalise_answer, vqa_accuracy


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes.", "yes"),
        ("  the\tCat\n", "cat"),
        ("an apple, a pear", "apple pear"),
        ("Two dogs", "2 dogs"),
        ("none", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("1.5", "1.5"),
        ("Mr. Smith.", "mr smith"),
        ("12:30", "12:30"),
        ("1,000", "1000"),  # a digit's comma glues all punctuation
        ("1,000/2-x", "10002x"),
        ("black-white", "black white"),
        ("black- white", "black white"),
        ("black -white", "black white"),
        ("red/white", "red white"),
        ("what?!", "what"),
        ("dont", "don't"),
        ("Couldntve", "couldntve"),  # two apostrophes missing is not in the list
        ("couldn'tve", "couldn't've"),
        ("couldnt've", "couldn't've"),
        ("oclock", "o'clock"),
        ("somebody'd", "somebodyd"),
        ("she's", "she's"),
        ("lets", "lets"),
        ("man's", "man's"),
        ("." * 40, "." * 8),  # the official code removes 32 periods at most
        ("", ""),
    ],
)
def test_normalise_answer(text: str, expected: str) -> None:
    assert normalise_answer(text) == expected


@pytest.mark.parametrize("matches", range(11))
def test_accuracy_leaves_each_answer_out_once(matches: int) -> None:
    # With m matches: m of the ten leave m − 1 others, 10 − m leave m.
    expected = (matches * min(1, (matches - 1) / 3) + (10 - matches) * min(1, matches / 3)) / 10
    answers = ["yes"] * matches + [f"other {i}" for i in range(10 - matches)]
    assert vqa_accuracy("yes", answers) == pytest.approx(expected, abs=1e-15)


def test_accuracy_known_values() -> None:
    by_matches = [vqa_accuracy("cat", ["cat"] * m + ["dog"] * (10 - m)) for m in range(5)]
    assert by_matches == pytest.approx([0, 0.3, 0.6, 0.9, 1])


def test_accuracy_normalises_both_sides() -> None:
    assert vqa_accuracy("Two.", ["2"] * 10) == 1
    assert vqa_accuracy("2", ["two"] * 5 + ["a two"] * 5) == 1
    assert vqa_accuracy("The cat!", ["cat"] * 4 + ["dog"] * 6) == 1


def test_accuracy_refuses_no_answers() -> None:
    with pytest.raises(ValueError, match="no answers"):
        vqa_accuracy("yes", [])


@given(st.text(), st.lists(st.text(), min_size=1, max_size=10))
def test_accuracy_is_a_share(prediction: str, answers: list[str]) -> None:
    assert 0 <= vqa_accuracy(prediction, answers) <= 1
    assert vqa_accuracy(answers[0], answers * 4) == 1
