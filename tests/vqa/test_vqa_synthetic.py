"""The synthetic sample follows the real distributions it was made from."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from scipy.stats import chisquare

from vlm_latency.errors import DataError
from vlm_latency.molmo.tiling import image_token_counts
from vlm_latency.vqa import QUESTION_COLUMNS, QuestionSource, decode_image, image_bytes, open_source
from vlm_latency.vqa.synthetic import IMAGES, QUESTIONS, _facts

ALPHA = 0.001  # per test; seeds are fixed, so a pass stays a pass


@pytest.fixture(scope="module")
def source() -> QuestionSource:
    return open_source(source="synthetic", size=4000, seed=1)


@pytest.fixture(scope="module")
def table(source: QuestionSource) -> pd.DataFrame:
    return source.table


def assert_follows(values: pd.Series, shares: dict) -> None:
    """Chi-square test of the values' frequencies; what is rare or unknown is one class."""
    expected = pd.Series(shares) / sum(shares.values()) * len(values)
    common = expected[expected >= 10]
    observed = values.value_counts().reindex(common.index, fill_value=0)
    rare, rare_expected = len(values) - observed.sum(), len(values) - common.sum()
    assert abs(rare - rare_expected) <= 4 * np.sqrt(max(rare_expected, 0)) + 1
    if len(common) > 1:
        scaled = common * observed.sum() / common.sum()
        assert chisquare(observed, scaled).pvalue > ALPHA


def fractions(file: str, column: str, of: str) -> dict:
    facts = _facts(file)
    return dict(zip(facts[column], facts[of], strict=True))


def test_shape_and_ids(source: QuestionSource, table: pd.DataFrame) -> None:
    assert source.synthetic
    assert source.root is None
    assert {name: str(dtype) for name, dtype in table.dtypes.items()} == QUESTION_COLUMNS
    assert len(table) == round(4000 * QUESTIONS / IMAGES)
    assert table["image_id"].nunique() == 4000
    per_image = table.groupby("image_id").size()
    assert per_image.min() == 3
    assert (table["question_id"].astype(int) // 1000 == table["image_id"].astype(int)).all()
    assert table["question_id"].astype(int).is_monotonic_increasing
    assert table.drop(columns="image_path").notna().all(axis=None)


def test_tilings(table: pd.DataFrame) -> None:
    images = table.drop_duplicates("image_id")
    sizes = zip(images["image_width"], images["image_height"], strict=True)
    crops = pd.Series([image_token_counts(width, height).num_crops for width, height in sizes])
    shares = {7: 0.795, 5: 0.093, 10: 0.05, 3: 0.0475, 4: 0.012, 2: 0.002}
    assert_follows(crops, shares)


def test_sizes(table: pd.DataFrame) -> None:
    images = table.drop_duplicates("image_id")
    sizes = images["image_width"].astype(str) + "x" + images["image_height"].astype(str)
    facts = _facts("coco_val2014_sizes.csv")
    names = facts["width"].astype(str) + "x" + facts["height"].astype(str)
    assert_follows(sizes, dict(zip(names, facts["count"], strict=True)))


def test_answer_types(table: pd.DataFrame) -> None:
    assert_follows(table["answer_type"], {"other": 0.494, "yes/no": 0.376, "number": 0.130})


@pytest.mark.parametrize("answer_type", ["other", "yes/no", "number"])
def test_texts_by_answer_type(table: pd.DataFrame, answer_type: str) -> None:
    rows = table[table["answer_type"] == answer_type]
    of = f"fraction_{answer_type}"
    words = rows["question"].str.split().str.len()
    assert_follows(words, fractions("vqa2_question_words_dist.csv", "question_words", of))
    types = fractions("vqa2_question_types.csv", "question_type", of)
    assert_follows(rows["question_type"], types)
    words = rows["answer"].str.split().str.len()
    assert_follows(words, fractions("vqa2_answer_words_dist.csv", "answer_words", of))


def test_question_lengths_over_all(table: pd.DataFrame) -> None:
    words = table["question"].str.split().str.len()
    assert words.mean() == pytest.approx(6.2, abs=0.1)
    assert words.quantile([0.05, 0.5, 0.95, 0.99]).tolist() == [4, 6, 10, 12]
    assert table["question"].str.len().mean() == pytest.approx(30.95, rel=0.06)


def test_questions_begin_with_their_type(table: pd.DataFrame) -> None:
    named = table[table["question_type"] != "none of the above"]
    pairs = zip(named["question"].str.lower(), named["question_type"], strict=True)
    assert all(question.startswith(kind + " ") for question, kind in pairs)
    assert table["question"].str.fullmatch(r"[A-Z][^?]*\?").all()


def test_ten_answers(table: pd.DataFrame) -> None:
    agreement: dict[str, list[int]] = {}
    for _, row in table.iterrows():
        answers = json.loads(row.answers)
        assert len(answers) == 10
        assert Counter(answers).most_common(1)[0] == (row.answer, answers.count(row.answer))
        agreement.setdefault(row.answer_type, []).append(answers.count(row.answer))
    means = {key: float(np.mean(values)) for key, values in agreement.items()}
    expected = {"other": 6.1, "yes/no": 8.9, "number": 7.8}  # of 120 real questions
    assert means == pytest.approx(expected, abs=0.15)


def test_images_open_at_their_size(table: pd.DataFrame) -> None:
    row = table.iloc[11]
    assert decode_image(image_bytes(row, None)).size == (row.image_width, row.image_height)


def test_seeds_and_splits() -> None:
    tables = [
        open_source(size=50, seed=seed, split=split).describe()["sha256"]
        for seed, split in [(0, "validation"), (0, "val"), (1, "validation"), (0, "train")]
    ]
    assert tables[0] == tables[1]
    assert len(set(tables)) == 3


def test_the_smallest_and_the_whole() -> None:
    assert len(open_source(size=1).table) == 5
    with pytest.raises(DataError, match="at least one synthetic image"):
        open_source(size=0)
    source = open_source()
    assert (len(source.table), source.describe()["images"]) == (214_354, 40_504)
