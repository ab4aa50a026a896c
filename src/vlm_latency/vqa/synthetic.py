"""A synthetic VQA v2: questions, answers and image sizes that follow the real distributions.

The tables in ``facts/`` were counted from public annotation files (see ``facts/README.md``).
Everything is made from a seed; images are recipes until one is asked for.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vlm_latency.errors import DataError
from vlm_latency.vqa.images import noise_recipe
from vlm_latency.vqa.source import QuestionSource, question_table

IMAGES, QUESTIONS = 40_504, 214_354  # VQA v2 validation
ANSWER_TYPES = {"other": 0.494, "yes/no": 0.376, "number": 0.130}
_MIN_QUESTIONS = 3  # per image, as in VQA v2

# How many of the ten annotators agree: a + Binomial(10 − a, Beta(b, c)); the means (6.1, 8.9 and
# 7.8 of ten) and the wide, two-humped shapes are those of 120 real questions.
_AGREEMENT = {"other": (2, 0.8, 0.76), "yes/no": (5, 1.6, 0.45), "number": (2, 0.9, 0.34)}

_NOUNS = (
    "man woman boy girl dog cat bus car bike table chair plate pizza bowl boat truck train horse "
    "bird bench tree house sign phone clock shirt hat ball sink oven bed couch lamp cup fork "
    "window street beach field kitchen picture person people building umbrella elephant"
)
_SIZES = "big small old new tall little long young clean main"
_KINDS = "red white blue black green wooden brown metal yellow gray"
_LINKS = "on in by near behind under"
# Questions of type "none of the above" begin with other words than the named types.
_OTHER_STARTS = "who where did does would when were will if should"


def make_source(name: str, split: str, seed: int, images: int | None = None) -> QuestionSource:
    """Make the question table of ``images`` synthetic images (40,504 by default).

    Each image has three questions or more, 5.29 on average; ids are ``image_id * 1000 + n``.
    """
    images = IMAGES if images is None else images
    if images < 1:
        raise DataError(f"dataset.size={images}; expected at least one synthetic image")
    questions = round(images * QUESTIONS / IMAGES)
    random = np.random.default_rng([seed, int(split == "train")])

    sizes = _facts("coco_val2014_sizes.csv")
    drawn = random.choice(len(sizes), images, p=sizes["count"] / sizes["count"].sum())
    widths, heights = sizes["width"].to_numpy()[drawn], sizes["height"].to_numpy()[drawn]
    seeds = random.integers(0, 2**32, images)
    recipes = np.array(
        [noise_recipe(*map(int, each)) for each in zip(seeds, widths, heights, strict=True)], object
    )

    spread = questions - _MIN_QUESTIONS * images
    per_image = _MIN_QUESTIONS + random.multinomial(spread, np.full(images, 1 / images))
    of = np.repeat(np.arange(images), per_image)
    nth = np.arange(questions) - np.repeat(np.cumsum(per_image) - per_image, per_image)

    answer_types = random.choice(list(ANSWER_TYPES), questions, p=list(ANSWER_TYPES.values()))
    texts = pd.concat(
        _texts(str(answer_type), np.flatnonzero(answer_types == answer_type), random)
        for answer_type in ANSWER_TYPES
    ).sort_index()
    columns = {
        "question_id": (of + 1) * 1000 + nth,
        "image_id": of + 1,
        "image_recipe": recipes[of],
        "image_width": widths[of],
        "image_height": heights[of],
        **{column: texts[column].tolist() for column in texts},
    }
    table = question_table(columns, "synthetic questions")
    return QuestionSource(name, "synthetic", split, table, None, True, {"seed": seed})


@cache
def _facts(file: str) -> pd.DataFrame:
    return pd.read_csv(Path(__file__).parent / "facts" / file, keep_default_na=False)


def _draw(file: str, column: str, answer_type: str, count: int, random: Any) -> np.ndarray:
    facts = _facts(file)
    share = facts[f"fraction_{answer_type}"].to_numpy()
    return random.choice(facts[column].to_numpy(object), count, p=share / share.sum())


def _texts(answer_type: str, index: np.ndarray, random: np.random.Generator) -> pd.DataFrame:
    """Questions and answers of one answer type, at the given rows."""
    count = len(index)
    types = _draw("vqa2_question_types.csv", "question_type", answer_type, count, random)
    lengths = _draw("vqa2_question_words_dist.csv", "question_words", answer_type, count, random)
    starts = types.copy()
    unnamed = types == "none of the above"
    starts[unnamed] = random.choice(_OTHER_STARTS.split(), unnamed.sum())
    needed = np.array([len(start.split()) for start in starts], int)
    lengths = _long_enough(lengths.astype(int), needed + 1, random)
    ends = _phrases(np.maximum(lengths - needed, 1), random)
    answers = _answers(answer_type, count, random)
    return pd.DataFrame(
        {
            "question": [f"{a.capitalize()} {b}?" for a, b in zip(starts, ends, strict=True)],
            "question_type": types,
            "answer_type": answer_type,
            "answer": answers[:, 0],
            "answers": _ten_answers(answer_type, answers, random),
        },
        index=index,
    )


def _long_enough(lengths: np.ndarray, needed: np.ndarray, random: Any) -> np.ndarray:
    """Deal the lengths out so that each type fits into its own; both marginals stay as drawn."""
    dealt = np.zeros_like(lengths)
    left = random.permutation(lengths)
    for need in np.unique(needed)[::-1]:  # the longest types choose first
        takers = np.flatnonzero(needed == need)
        fitting = np.flatnonzero(left >= need)[: len(takers)]
        short = np.flatnonzero(left < need)[: len(takers) - len(fitting)]
        chosen = np.concatenate([fitting, short])
        dealt[takers] = left[chosen]
        left = np.delete(left, chosen)
    return dealt


def _phrases(words: np.ndarray, random: Any) -> np.ndarray:
    """A noun phrase of exactly so many words each: "old red bus on the street"."""
    phrases = np.empty(len(words), object)
    for length in np.unique(words):
        rows = np.flatnonzero(words == length)
        links, head = divmod(int(length) - 1, 3)  # a link and its noun are three words
        lists = [_SIZES, _KINDS][:head] + [_NOUNS] + [_LINKS, "the", _NOUNS] * links
        picked = [random.choice(np.array(each.split(), object), len(rows)) for each in lists]
        phrases[rows] = [" ".join(each) for each in zip(*picked, strict=True)]
    return phrases


@cache
def _known_answers(answer_type: str) -> pd.DataFrame:
    facts = _facts("vqa2_top_answers.csv")
    facts = facts[facts["answer_type"] == answer_type]
    return facts.assign(words=[len(text.split()) for text in facts["answer"]])


def _answers(answer_type: str, count: int, random: Any) -> np.ndarray:
    """(count, 10): the majority's answer and nine others, all different if the type has so many."""
    known = _known_answers(answer_type)
    lengths = _draw("vqa2_answer_words_dist.csv", "answer_words", answer_type, count, random)
    lengths = lengths.astype(int)
    answers = np.empty((count, 10), object)
    for length in np.unique(lengths):
        rows = np.flatnonzero(lengths == length)
        fitting = known[known["words"] == length]
        if len(fitting) < 10 and answer_type != "yes/no":
            answers[rows, 0] = _phrases(np.full(len(rows), length), random)
        else:
            share = fitting["fraction_reweighted"].to_numpy()
            picked = random.choice(len(fitting), len(rows), p=share / share.sum())
            answers[rows, 0] = fitting["answer"].to_numpy(object)[picked]
    # Neighbours in the list of answers are distinct from each other, and from the majority's.
    texts = known["answer"].to_numpy(object)
    first = random.integers(0, len(texts), count)
    place = {text: i for i, text in enumerate(texts)}
    majority = np.array([place.get(text, -1) for text in answers[:, 0]])
    first = np.where(majority >= 0, majority + 1, first)
    answers[:, 1:] = texts[(first[:, None] + np.arange(9) % (len(texts) - 1)) % len(texts)]
    return answers


def _ten_answers(answer_type: str, answers: np.ndarray, random: Any) -> list[str]:
    least, a, b = _AGREEMENT[answer_type]
    share = random.beta(a, b, len(answers))
    agree = least + random.binomial(10 - least, share)
    quoted = {text: json.dumps(text) for text in set(answers.ravel())}
    return [
        f"[{', '.join([quoted[row[0]]] * n + [quoted[text] for text in row[1 : 11 - n]])}]"
        for row, n in zip(answers, agree, strict=True)
    ]
