"""Requests: the tokenizer, the placeholders, and counts that are the processors' own."""

from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from vlm_latency.errors import ModelError
from vlm_latency.models import describe, known_models
from vlm_latency.models.requests import image_token_id
from vlm_latency.models.tokenizer import FILE, build_tokenizer, train
from vlm_latency.options import ModelOptions

NEEDS_TORCHVISION = {"tiny-molmo2"}
READY = [
    name
    for name in known_models()
    if name.startswith("tiny-") and (find_spec("torchvision") or name not in NEEDS_TORCHVISION)
]
SIZES = [(640, 480), (333, 500), (61, 47), (1300, 200), (896, 896)]
PROMPT = "What color is the cat?"


def image(width, height):
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def architectures():
    return {name: describe(ModelOptions(name=name)) for name in READY}


def test_bundled_tokenizer_is_what_training_gives():
    assert FILE.read_text(encoding="utf-8") == train()
    assert FILE.stat().st_size < 200_000


def test_questions_cost_about_a_token_a_word():
    tokenizer = build_tokenizer({}, {}, 2048)
    question = "What color is the man's shirt?"
    ids = tokenizer(question)["input_ids"]
    assert 6 <= len(ids) <= 12
    assert tokenizer.decode(ids) == question


def test_special_tokens_take_their_ids_and_the_others_make_room():
    tokenizer = build_tokenizer(
        {"bos_token": "<s>", "image_token": "<image>"}, {"<s>": 1, "<image>": 32000}, 32064
    )
    assert tokenizer("<image>?")["input_ids"][:2] == [1, 32000]
    assert tokenizer.image_token_id == 32000
    assert sorted(tokenizer.get_vocab().values()) == [*range(2049), 32000]
    with pytest.raises(ModelError, match="at least 32001 rows"):
        build_tokenizer({}, {"<image>": 32000}, 2304)


@pytest.mark.parametrize("name", READY)
def test_image_tokens_are_what_prepare_gives(name, architectures):
    found = architectures[name]
    for size in SIZES:
        prepared = found.preparer(image(*size), PROMPT)
        counts, of_image = prepared.counts, found.image_tokens(*size)
        ids = prepared.inputs["input_ids"]
        assert counts.num_total_tokens == ids.shape[1]
        assert counts.num_vision_tokens == int(
            (ids == image_token_id(found.transformers_config)).sum()
        )
        assert of_image.num_total_tokens == (
            counts.num_vision_tokens + counts.num_image_special_tokens
        )
        for part in ("num_crops", "num_vision_patches", "num_vision_tokens", "tiling_rows"):
            assert getattr(counts, part) == getattr(of_image, part)
        assert counts.num_language_tokens == counts.num_total_tokens - counts.num_vision_tokens


@pytest.mark.parametrize(
    ("name", "counted"),
    [  # what each processor's own count means
        ("tiny-llava", lambda c: c.num_vision_tokens),
        ("tiny-llava-onevision", lambda c: c.num_vision_tokens),
        ("tiny-qwen2.5-vl", lambda c: c.num_vision_tokens),
        ("tiny-qwen3-vl", lambda c: c.num_vision_tokens),
        ("tiny-gemma3", lambda c: c.num_vision_tokens),
        ("tiny-internvl", lambda c: c.num_vision_tokens + 2),
        ("tiny-smolvlm", lambda c: c.num_total_tokens),
        ("tiny-molmo2", lambda c: c.num_total_tokens),
    ],
)
def test_counts_equal_the_processors_own(name, counted, architectures):
    if name not in READY:
        pytest.skip("needs torchvision")
    found = architectures[name]
    for width, height in SIZES:
        own = found.preparer.processor._get_num_multimodal_tokens(image_sizes=[(height, width)])
        assert own.num_image_tokens == [counted(found.image_tokens(width, height))]


@pytest.mark.parametrize(
    ("name", "size", "crops", "patches", "vision", "special"),
    [  # worked by hand
        ("tiny-molmo", (640, 480), 7, 7 * 576, 704, 36),
        ("tiny-llava", (640, 480), 1, 576, 576, 0),
        ("tiny-gemma3", (640, 480), 1, 64 * 64, 256, 6),  # two double line feeds: two tokens each
        ("tiny-qwen2.5-vl", (644, 476), 1, 46 * 34, 23 * 17, 2),
        ("tiny-qwen3-vl", (640, 480), 1, 40 * 30, 20 * 15, 2),
        ("tiny-internvl", (448, 448), 1, 1024, 256, 2),
        ("tiny-internvl", (1344, 448), 4, 4 * 1024, 4 * 256, 2),
    ],
)
def test_counts_by_hand(name, size, crops, patches, vision, special, architectures):
    counts = architectures[name].image_tokens(*size)
    assert (counts.num_crops, counts.num_vision_patches) == (crops, patches)
    assert (counts.num_vision_tokens, counts.num_image_special_tokens) == (vision, special)


@pytest.mark.parametrize("name", READY)
def test_text_tokens_are_those_of_prompt_and_template(name, architectures):
    preparer = architectures[name].preparer
    short, long = (preparer(image(64, 64), text).counts for text in ("Why?", "Why? " + PROMPT))
    more = len(preparer.tokenizer(" " + PROMPT, add_special_tokens=False)["input_ids"])
    assert long.num_total_tokens - short.num_total_tokens == more
    assert long.num_image_special_tokens == short.num_image_special_tokens


@pytest.mark.parametrize("name", READY)
def test_dummy_inputs_look_like_real_ones(name, architectures):
    found = architectures[name]
    real = found.preparer(image(500, 333), PROMPT)
    text = (
        real.counts.num_total_tokens
        - real.counts.num_vision_tokens
        - real.counts.num_image_special_tokens
    )
    dummy = found.dummy_inputs(500, 333, text, device="cpu")
    assert {k: (v.shape, v.dtype) for k, v in dummy.items()} == {
        k: (v.shape, v.dtype) for k, v in real.inputs.items()
    }
    longer = found.dummy_inputs(500, 333, text + 5)
    assert longer["input_ids"].shape[1] == real.counts.num_total_tokens + 5
    assert longer["pixel_values"].device.type == "meta"
    image_id = image_token_id(found.transformers_config)
    assert int((longer["input_ids"] == image_id).sum()) == real.counts.num_vision_tokens


def test_dummy_prompt_that_ends_before_the_image(architectures):
    with pytest.raises(ModelError, match="shorter than what stands before"):
        architectures["tiny-qwen2.5-vl"].dummy_inputs(64, 64, 2)


@pytest.mark.parametrize("name", READY)
def test_ladder_is_strictly_increasing(name, architectures):
    found = architectures[name]
    sizes = found.image_sizes_for_ladder(5)
    tokens = [found.image_tokens(*size).num_vision_tokens for size in sizes]
    assert tokens == sorted(set(tokens))
    # one number of tokens for every image; SmolVLM scales to one long edge: four shapes
    fewer = {"tiny-llava": 1, "tiny-gemma3": 1, "tiny-smolvlm": 4}
    assert len(sizes) == fewer.get(name, 5)


def test_ladder_of_a_model_with_any_size_is_even_in_tokens(architectures):
    found = architectures["tiny-qwen2.5-vl"]
    tokens = [found.image_tokens(*s).num_vision_tokens for s in found.image_sizes_for_ladder(12)]
    assert (tokens[0], tokens[-1], len(tokens)) == (64, 1296, 12)
    assert max(np.diff(tokens)) < 3 * min(np.diff(tokens))


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is here")
def test_molmo2_asks_for_torchvision():
    with pytest.raises(ModelError, match=r'molmo2.*"pip install torchvision"'):
        _ = describe(ModelOptions(name="tiny-molmo2")).preparer


def test_family_that_the_zoo_does_not_describe(tmp_path):
    own = tmp_path / "own.yml"
    own.write_text("models: {other: {config: {model_type: llava_next, image_token_index: 5}}}\n")
    with pytest.raises(ModelError, match="describe it under `families:`"):
        _ = describe(ModelOptions(name="other", zoo_file=str(own))).preparer
