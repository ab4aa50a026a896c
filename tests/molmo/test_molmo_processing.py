from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

from vlm_latency import molmo
from vlm_latency.errors import UserError
from vlm_latency.molmo import MolmoConfig, MolmoImageProcessor, MolmoProcessor

END = "<|endoftext|>"
TINY = {"max_crops": 6, "overlap_margins": (2, 2)}  # what the published D and O do not tell


@pytest.fixture(scope="module")
def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte and an end of text; none of Molmo's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)} | {END: 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


@pytest.fixture(scope="module")
def config(committed) -> MolmoConfig:
    return MolmoConfig.from_pretrained(committed.models / "D", **TINY)


def test_text_only(bytes_tokenizer, config):
    processor = MolmoProcessor.from_config(config, bytes_tokenizer)
    output = processor(text="Why?")
    assert output["input_ids"][0, 0] == 256
    assert bytes_tokenizer.decode(output["input_ids"][0, 1:]) == " User: Why? Assistant:"
    assert set(output) == {"input_ids", "attention_mask"}
    plain = processor(text="Why?", message_format="none", always_start_with_space=False)
    assert bytes_tokenizer.decode(plain["input_ids"][0, 1:]) == "Why?"


@pytest.mark.parametrize(("n", "size"), [(2, (50, 37)), (3, (150, 100))])
def test_image_part_equals_the_reference(n, size, committed, bytes_tokenizer, reference_image):
    for family in "DOE":
        config = MolmoConfig.from_pretrained(committed.models / family, **TINY)
        processor = MolmoProcessor.from_config(config, bytes_tokenizer)
        output = processor(images=reference_image(*size), text="Why?")
        inputs, _ = committed.case(family, n)
        image_tokens = output["input_ids"].shape[1] - processor(text="Why?")["input_ids"].shape[1]
        part = slice(1, 1 + image_tokens)
        assert torch.equal(output["input_ids"][:, part], inputs["input_ids"][:, part])
        assert torch.equal(output["image_masks"], inputs["image_masks"])
        used = output["image_input_idx"] >= 0
        assert torch.equal(used, inputs["image_input_idx"] >= 0)
        assert torch.equal(output["image_input_idx"][used], inputs["image_input_idx"][used])
        assert output["attention_mask"].all()


def test_says_what_the_tokenizer_lacks(bytes_tokenizer):
    with pytest.raises(UserError, match="no <im_start>"):
        MolmoProcessor(MolmoImageProcessor(), bytes_tokenizer)


def test_refuses_batches_and_unknown_formats(bytes_tokenizer, config):
    processor = MolmoProcessor.from_config(config, bytes_tokenizer)
    with pytest.raises(UserError, match="one request at a time, not 2"):
        processor(text=["a", "b"])
    with pytest.raises(UserError, match="'chat'"):
        processor(text="a", message_format="chat")


def test_saved_and_loaded_again(bytes_tokenizer, config, tmp_path, reference_image):
    processor = MolmoProcessor.from_config(config, bytes_tokenizer)
    processor.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, MolmoProcessor)
    image = reference_image(90, 64)
    before, after = processor(images=image, text="a"), loaded(images=image, text="a")
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_prompts_with_the_real_tokenizer_of_a_published_folder(shared, tmp_path, reference_image):
    golden = shared / "golden" / "molmo"
    for file in (golden / "tokenizer_molmoe").iterdir():
        shutil.copyfile(file, tmp_path / file.name)
    shutil.copyfile(
        golden / "real_configs" / "MolmoE-1B-0924.config.json", tmp_path / "config.json"
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    processor = molmo.MolmoProcessor(MolmoImageProcessor(), tokenizer)
    prompts = json.loads((golden / "prompts.json").read_text())["families"]["E"]["prompts"]
    assert len(prompts) == 31
    for prompt in prompts:
        size = prompt["image_wh"]
        image = None if size is None else reference_image(*size)
        output = processor(images=image, text=prompt["text"], **prompt["kwargs"])
        assert output["input_ids"][0].tolist() == prompt["input_ids"], prompt["text"]
        if image is not None:
            idx = np.ascontiguousarray(output["image_input_idx"][0].numpy())
            digest = hashlib.sha256(idx.tobytes()).hexdigest()
            assert digest == prompt["image_input_idx_sha256_int64"]


def test_loads_from_a_published_folder(shared, tmp_path, reference_image):
    golden = shared / "golden" / "molmo"
    for file in (golden / "tokenizer_molmoe").iterdir():
        shutil.copyfile(file, tmp_path / file.name)
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copyfile(golden / "E" / name, tmp_path / name)
    molmo.register()
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(processor, MolmoProcessor)
    assert processor.image_processor.max_crops == 6
    output = processor(images=reference_image(50, 37), text="What is this?")
    assert output["pixel_values"].shape == (1, 2, 36, 588)
    assert processor.image_token_id == 50282
