"""The official VQA accuracy: ten answers, each left out once, after the official normalisation.

Source: the VQA evaluation server's rules (visualqa.org/evaluation.html) and the public evaluation
code. That code leaves texts as they are where all ten answers agree, so that "Yes" would miss ten
times "yes"; here both sides are always normalised, as the rules say.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_ARTICLES = {"a", "an", "the"}
_DIGITS = "none:0 zero:0 one:1 two:2 three:3 four:4 five:5 six:6 seven:7 eight:8 nine:9 ten:10"
_NUMBERS = dict(pair.split(":") for pair in _DIGITS.split())
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MAX_PERIODS = 32  # the official code passes re.UNICODE (32) where re.sub takes the count

# The official list's right forms; its wrong ones are these with any one apostrophe left out.
_RIGHT_FORMS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {
    right[: mark.start()] + right[mark.end() :]: right
    for right in _RIGHT_FORMS.split()
    for mark in re.finditer("'", right)
} | {"somebody'd": "somebodyd"}  # so in the official list


def normalise_answer(text: str) -> str:
    """Normalise a text as the official evaluation compares it.

    Lower case, without articles, sentence punctuation or periods (decimal points stay), number
    words as digits, contractions with their apostrophes.

    >>> normalise_answer("The two dogs.")
    '2 dogs'
    >>> normalise_answer("Dont know, 1.5")
    "don't know 1.5"
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    glued = _DIGIT_COMMA.search(text) is not None
    out = text
    for mark in _PUNCTUATION:
        drop = glued or f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if drop else " ")
    out = _PERIOD.sub("", out, count=_MAX_PERIODS)
    words = (_NUMBERS.get(word, word) for word in out.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Compute the official VQA accuracy of one prediction, 0 to 1.

    The mean over the answers, each left out once, of ``min(1, matches among the others / 3)``
    (Antol et al. 2015, section 5; VQA v2 has ten answers per question).

    Raises
    ------
    ValueError
        When there are no answers to compare with.

    Examples
    --------
    >>> vqa_accuracy("a cat", ["cat"] * 3 + ["dog"] * 7)  # (3 × 2/3 + 7 × 1) / 10
    0.9
    """
    if not answers:
        raise ValueError("found no answers; VQA accuracy compares with the human answers (ten)")
    wanted = normalise_answer(prediction)
    hits = [normalise_answer(answer) == wanted for answer in answers]
    total = sum(hits)
    # All in thirds, so that ten perfect terms make exactly 1.
    thirds = sum(min(3, total - hit) for hit in hits)
    return thirds / (3 * len(hits))
