"""Kinds of faults that checkpoints, processors, prompts and settings bring; each with the right value."""

import copy
import dataclasses
import json
import struct

import numpy as np
import peft
import pytest
import torch
from PIL import Image

from vlm_latency import load_model, measure
from vlm_latency.errors import DataError, ModelError, UserError
from vlm_latency.instrument.methods import make_meter
from vlm_latency.instrument.session import _entered
from vlm_latency.models import describe
from vlm_latency.models.loading import VLM
from vlm_latency.models.requests import MAX_PROMPT, TokenCounts
from vlm_latency.models.sizes import check_sizes
from vlm_latency.models.zoo import load_zoo
from vlm_latency.options import ModelOptions, Options

QUICK = {"num_runs": 1, "output_length": 2, "warmup": "fixed", "warmup_runs": 0}


@pytest.fixture(scope="module")
def llava():
    return load_model("tiny-llava")


@pytest.fixture(scope="module")
def photo():
    return Image.effect_noise((300, 200), 50)


@pytest.fixture
def checkpoint(llava, tmp_path):
    folder = tmp_path / "model"
    llava.model.save_pretrained(folder)
    llava.preparer.processor.save_pretrained(folder)
    return folder


# ---- weights that did not arrive whole


def _pointer(folder):
    (folder / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\nsize 2\n"
    )


def _half(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _header_cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def _empty(folder):
    (folder / "model.safetensors").write_bytes(b"")


def _other_shapes(folder):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] *= 2
    (folder / "config.json").write_text(json.dumps(config))


def _more_layers(folder):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] += 1
    (folder / "config.json").write_text(json.dumps(config))


def _index(folder, name):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))


def _gone(folder):
    (folder / "model.safetensors").unlink()


def _processor(folder, settings):
    """Another image processor; none makes the processor a tokenizer only."""
    images = {"image_processor": {"image_processor_type": "CLIPImageProcessor", **settings}}
    (folder / "processor_config.json").write_text(json.dumps(images if settings else {"a": 1}))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_pointer, r"model/model.safetensors is a Git LFS pointer"),
        (_half, r"model/model.safetensors has [\d,]+ bytes, and its header says"),
        (_header_cut, "is not a whole safetensors file"),
        (_empty, "is not a whole safetensors file"),
        (_other_shapes, "the weights of .*model do not load|are not those of its configuration"),
        (_more_layers, r"are not those of its configuration: missing keys .*layers\.4"),
        (lambda folder: _index(folder, "../away.safetensors"), "outside its folder"),
        (lambda folder: _index(folder, "/etc/away.safetensors"), "outside its folder"),
        (lambda folder: _index(folder, "pytorch_model.bin"), "pickles run code"),
        (lambda folder: _index(folder, "model-2.safetensors"), "cannot be read"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("[]"), "no.* index"),
        (_gone, "has no safetensors"),
        (lambda folder: (folder / "config.json").write_text("{"), "no usable configuration"),
        (lambda folder: (folder / "config.json").write_text("[1]"), "no usable configuration"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "processor of .* not load"),
        (lambda folder: _processor(folder, {}), "processor of .* not load"),
        (lambda folder: _processor(folder, {"max_crops": 2**70}), "max_crops=.*at most 1,000"),
        (lambda folder: _processor(folder, {"size": {"shortest_edge": 10**9}}), "edge=.*at most"),
        (lambda folder: _processor(folder, {"size": {"shortest_edge": 1}}), "edge=1; .*at least 8"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused_by_folder_and_file(change, told, checkpoint):
    change(checkpoint)
    with pytest.raises(ModelError, match=told):
        load_model(str(checkpoint))


def test_a_whole_checkpoint_of_two_files_loads(llava, tmp_path):
    llava.model.save_pretrained(tmp_path, max_shard_size="1MB")
    llava.preparer.processor.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert load_model(str(tmp_path)).weights == "pretrained"


def test_a_size_that_no_header_can_have_is_no_memory_error(checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:])
    with pytest.raises(ModelError, match="not a whole safetensors"):
        load_model(str(checkpoint))


def _sizes(tree, path=()):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _sizes(value, (*path, name))
        elif type(value) is int and name.endswith(("layers", "depth")):
            yield (*path, name), 100_000
            yield (*path, name), 1_001
        elif type(value) is int and name in ("hidden_size", "intermediate_size", "embed_dim"):
            yield (*path, name), 10**7


FAMILIES = sorted(
    {entry.config["model_type"]: name for name, entry in load_zoo().models.items()}.values()
)


@pytest.mark.parametrize("model", FAMILIES)
def test_sizes_that_no_model_has_are_refused_before_a_configuration_is_made(
    model, tmp_path, monkeypatch
):
    whole = describe(ModelOptions(name=model)).config
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_, **__: pytest.fail())
    changes = list(_sizes(whole))
    assert {"hidden_size", "num_hidden_layers"} & {path[-1] for path, _ in changes}
    for path, size in changes:
        changed = copy.deepcopy(whole)
        group = changed
        for name in path[:-1]:
            group = group[name]
        group[path[-1]] = size
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ModelError, match=f"{path[-1]}={size:,}; expected at most"):
            describe(ModelOptions(name=str(tmp_path)))


@pytest.mark.parametrize(
    "said",
    [
        {"image_seq_len": 10**9},
        {"image_processor": {"max_image_size": {"longest_edge": True}}},
        {"image_processor": {"size": {"height": 0, "width": 384}}},
    ],
)
def test_sizes_of_a_processor_that_would_take_all_memory_are_refused(said):
    with pytest.raises(ModelError, match="expected at"):
        check_sizes(said)


@pytest.mark.parametrize(
    "said",
    [
        {"image_processor": {"size": {"shortest_edge": 256 * 28 * 28, "longest_edge": 2**24}}},
        {"image_processor": {"min_pixels": 147_456, "size": {"longest_edge": 1}}},
        {"image_processor": {"max_patches": 4096}},
        {"text_config": {"conv1d_width": 4}, "grid_width": 4, "pooling_kernel_height": 2},
    ],
)
def test_sizes_that_models_and_processors_have_are_taken(said):
    check_sizes(said)


def test_sizes_of_the_zoo_and_of_the_users_zoo_file_are_looked_at_too(tmp_path):
    own = {
        "model_type": "llava",
        "text_config": {"model_type": "llama", "num_hidden_layers": 10**9},
    }
    (tmp_path / "zoo.yml").write_text(json.dumps({"models": {"mine": {"config": own}}}))
    with pytest.raises(
        ModelError, match=r"mine is not valid: text_config.num_hidden_layers=1,000,000,000"
    ):
        describe(ModelOptions(name="mine", zoo_file=str(tmp_path / "zoo.yml")))


# ---- chat templates and old processors

TEXTS_ONLY = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}GO:"
REFUSES = (
    "{% for m in messages %}{% if m['content'] is not string %}{{ raise_exception('text only') }}"
    "{% endif %}{{ m['content'] }}{% endfor %}"
)
PRINTS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}ASSISTANT:"
RAISES = "{{ raise_exception('no') }}"


@pytest.mark.parametrize(
    ("template", "begins"),
    [
        (TEXTS_ONLY, "user: <image>\nx\nGO:"),
        (REFUSES, "<image>\nx"),
        (PRINTS, "user: <image>\nx\nASSISTANT:"),
        (RAISES, "USER: <image>\nx ASSISTANT:"),  # the family's own
        ("{{ messages[0].nothing.at.all }}", "USER: <image>\nx ASSISTANT:"),
    ],
)
def test_templates_for_texts_place_the_image(template, begins, llava, photo):
    processor = copy.copy(llava.preparer.processor)
    processor.chat_template = template
    own = VLM.from_objects(llava.model, processor)
    assert own.preparer.build_prompt("x").strip() == begins
    counts = own.prepare(photo, "What?").counts
    assert (counts.num_vision_tokens, counts.num_image_special_tokens) == (576, 0)


def test_a_template_that_places_no_image_is_refused_by_name(llava, monkeypatch):
    from vlm_latency.models.requests import wrap_processor
    from vlm_latency.models.zoo import Family

    processor = copy.copy(llava.preparer.processor)
    processor.chat_template = RAISES
    with pytest.raises(ModelError, match="chat template of LlavaProcessor cannot place an image"):
        wrap_processor(processor, llava.model.config, Family())


def test_an_old_processor_takes_what_it_lacks_from_the_configuration(checkpoint, photo):
    path = checkpoint / "processor_config.json"
    content = json.loads(path.read_text())
    lacking = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")
    path.write_text(json.dumps({k: v for k, v in content.items() if k not in lacking}))
    records = measure(str(checkpoint), [(photo, "What?")], **QUICK)
    assert records[["num_vision_tokens", "status"]].values.tolist() == [[576, "ok"]]


# ---- prompts


def test_marks_in_a_question_are_not_images(llava, photo):
    for text in ("What is <image>?", "<image><image>"):
        with pytest.raises(DataError, match="writes '<image>', which stands for an image"):
            llava.prepare(photo, text)
    records = measure(llava, [(photo, "a <image>"), (photo, "b")], **QUICK)
    assert records.set_index("request_id").status.to_dict() == {
        "request-0": "failed",
        "request-1": "ok",
    }


def test_a_question_of_a_megabyte_is_refused_at_once(llava, photo):
    with pytest.raises(DataError, match=r"has 1,000,000 characters"):
        llava.prepare(photo, "x" * 1_000_000)
    with pytest.raises(DataError, match=f"more than the {MAX_PROMPT:,}"):
        llava.count_tokens("x" * 1_000_000)
    records = measure(llava, [(photo, "y" * 1_000_000), (photo, "b")], num_runs=1, output_length=1)
    assert sorted(records["status"]) == ["failed", "ok"]


def test_prompts_beyond_the_positions_fail_by_name(llava, photo):
    long = "word " * 9_000
    records = measure(llava, [(photo, long), (photo, "b")], **QUICK)
    failed = records[records["status"] == "failed"].iloc[0]
    assert "positions, and tiny-llava has 8192" in failed["error"]


def test_tokens_add_up_or_the_run_fails():
    counts = TokenCounts(1, None, None, 576, 576, 2, 600)
    assert _entered(counts, 600)["num_language_tokens"] == 24
    assert _entered(counts, 300) == {
        "num_vision_tokens": 276,
        "num_language_tokens": 24,
        "num_total_tokens": 300,
    }
    with pytest.raises(UserError, match="read 610 positions and the prompt has 600"):
        _entered(counts, 610)
    with pytest.raises(UserError, match="do not add up"):
        _entered(TokenCounts(1, None, None, 576, 576, -1, 600), 600)


def test_an_image_that_the_processor_refuses_is_one_failed_run():
    requests = [(Image.effect_noise((160 + 8 * i, 120), 60), "What?") for i in range(3)]
    requests.append((Image.effect_noise((2200, 10), 60), "What?"))
    for engine in ("eager", "static"):
        vlm = load_model("tiny-qwen2.5-vl", engine=engine)
        records = measure(vlm, requests, num_runs=1, output_length=1)
        assert sorted(records["status"]) == ["failed", "ok", "ok", "ok"]
        assert "2200×10" in records[records["status"] == "failed"].iloc[0]["error"]


# ---- inputs and ways of generating


def test_every_floating_input_has_the_models_type(llava):
    from vlm_latency.models.requests import Prepared

    own = VLM.__new__(VLM)
    own.device, own.dtype = torch.device("cpu"), torch.bfloat16
    inputs = {
        "input_ids": torch.ones(1, 3).long(),
        "high_res_pixel_values": torch.zeros(1, 3, 4, 4),
    }
    placed = own.place(Prepared(inputs, lambda: None)).inputs
    assert [value.dtype for value in placed.values()] == [torch.int64, torch.bfloat16]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt_lookup_num_tokens", 3),
        ("prefill_chunk_size", 64),
        ("assistant_early_exit", 2),
        ("guidance_scale", 1.5),
        ("penalty_alpha", 0.6),
        ("num_return_sequences", 2),
    ],
)
def test_what_breaks_one_forward_per_token_is_refused_by_its_name(name, value, llava):
    model = copy.copy(llava.model)
    model.generation_config = copy.deepcopy(model.generation_config)
    setattr(model.generation_config, name, value)
    with pytest.raises(ModelError, match=f"generation_config.{name}={value}"):
        VLM.from_objects(model, llava.preparer.processor)


@pytest.mark.parametrize("method", ["subtraction", "hook"])
def test_methods_that_run_one_encoder_by_itself_refuse_several(method, llava):
    own = copy.copy(llava)
    encoder = own.components.vision_encoder
    own.components = dataclasses.replace(own.components, more_encoders=(encoder,))
    with pytest.raises(UserError, match=f"2 vision encoders, and measurement.method={method}"):
        make_meter(own, method)


@pytest.mark.parametrize("found", [float("inf"), 1234567])
def test_a_revision_that_reads_as_a_number_must_be_quoted(found):
    with pytest.raises(UserError, match="must be quoted"):
        Options.from_parameters({"model": {"revision": found}})


# ---- peft


def test_lora_is_measured_as_what_it_does(photo):
    vlm = load_model("tiny-llava")
    before = measure(vlm, [(photo, "What?")], **QUICK).iloc[0]
    rank, size = 4, 64
    config = peft.LoraConfig(r=rank, target_modules=["q_proj"], lora_alpha=8)
    adapted = peft.get_peft_model(copy.deepcopy(vlm.model), config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=5.0)
    own = VLM.from_objects(adapted, vlm.preparer.processor, name="lora")
    row = measure(own, [(photo, "What?")], **QUICK).iloc[0]
    assert row["status"] == "ok"
    for part in ("T_vision_encoder", "T_projector", "T_LLM_prefill"):
        assert row[part] > 0
    assert row["num_vision_tokens"] == before["num_vision_tokens"] == 576
    added = own.architecture.parameters.params_llm - vlm.architecture.parameters.params_llm
    assert added == 4 * rank * (size + size)  # A and B of each of four layers
    assert own.decode([]) == ""
    prepared = own.place(own.prepare(photo, "What?"))
    with torch.no_grad():
        changed = own.model(**prepared.inputs).logits
        plain = vlm.model(**prepared.inputs).logits
    assert not np.allclose(changed, plain)  # the adapter takes part


def test_prompt_tuning_is_refused_by_its_name():
    vlm = load_model("tiny-llava")
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=4,
        token_dim=64,
        num_layers=4,
        num_attention_heads=4,
        num_transformer_submodules=1,
    )
    adapted = peft.get_peft_model(copy.deepcopy(vlm.model), config)
    with pytest.raises(ModelError, match="PROMPT_TUNING"):
        VLM.from_objects(adapted, vlm.preparer.processor)
