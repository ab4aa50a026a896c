"""A small byte-level BPE tokenizer for models with random weights, which have no tokenizer of their own.

``tokenizer.json`` beside this module was written by ``python -m vlm_latency.models.tokenizer``. Its
merges were learned from the words of VQA v2's question types and answers, so that a question costs
about as many tokens as with a real tokenizer; what the ids mean to a random model is nothing.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_latency.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FILE = Path(__file__).with_name("tokenizer.json")
VOCAB_SIZE = 2048
_FACTS = Path(__file__).parents[1] / "vqa" / "facts"

# What the tables do not hold: the words between a question's beginning and its end, and the words
# of the templates around it.
_TEXT = (
    "are there any people in the background of this picture? does he look happy or sad? "
    "what is behind the person holding an umbrella near the water? how many are visible here? "
    "who would be using that kind of vehicle, and where did they come from? she has had her hands "
    "on his head while walking under trees at night. which one does not have its own color? "
    "could you tell if it was taken with a black and white camera, or something else? "
    "were these made for children? should we wear a helmet? will it rain today? "
    "Answer the question using a single word or phrase. Describe the image in detail. "
    "User: vqa2: Assistant: system user assistant model You are a helpful assistant. ASSISTANT: USER:"
)


def _corpus() -> list[str]:
    """Each text as often as the tables say, in ten thousand; each word at least once."""
    texts: list[str] = []
    for name, column in (
        ("vqa2_question_types.csv", "question_type"),
        ("vqa2_top_answers.csv", "answer"),
    ):
        with (_FACTS / name).open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                text = row[column]
                times = 1 + round(1e4 * float(row["fraction_reweighted"]))
                texts += [text, text.capitalize(), f" {text}"] * times
    texts += [text for word in _TEXT.split(" ") for text in (f" {word}", word)] * 20
    return texts


def train() -> str:
    """Learn the merges anew; the JSON text that `FILE` holds."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    return str(tokenizer.to_str())


def build_tokenizer(
    named: Mapping[str, str], ids: Mapping[str, int], vocab_size: int
) -> PreTrainedTokenizerFast:
    """Make the tokenizer of a model with random weights.

    Parameters
    ----------
    named
        Attribute of the tokenizer to special token: ``{"image_token": "<image>"}``. A beginning of
        text (``bos_token``) is put before every text, as the families that have one do.
    ids
        The special tokens' ids. The ordinary tokens take the lowest ids that are left.
    vocab_size
        Rows of the model's embedding; no id lies beyond.

    Raises
    ------
    ModelError
        If the embedding has too few rows.
    """
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    spec: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    taken = set(ids.values())
    free = (number for number in count() if number not in taken)
    vocab = {token: next(free) for token in spec["model"]["vocab"]} | dict(ids)
    if max(vocab.values()) >= vocab_size:
        raise ModelError(
            f"a random model's embedding needs at least {max(vocab.values()) + 1} rows for the "
            f"bundled tokenizer; the configuration has vocab_size {vocab_size}"
        )
    spec["model"]["vocab"] = vocab
    spec["added_tokens"] = [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token, number in sorted(ids.items(), key=lambda item: item[1])
    ]
    backend = Tokenizer.from_str(json.dumps(spec))
    if bos := named.get("bos_token"):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, ids[bos])]
        )
    standard = ("bos_token", "eos_token", "pad_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        extra_special_tokens={key: token for key, token in named.items() if key not in standard},
        **{key: token for key, token in named.items() if key in standard},
    )


if __name__ == "__main__":
    FILE.write_text(train(), encoding="utf-8")
