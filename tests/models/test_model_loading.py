"""Loading: random weights in place, checkpoints from a folder, objects of one's own."""

import copy
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from vlm_latency import models
from vlm_latency.errors import ModelError
from vlm_latency.models import ModelHandle, describe, known_models, load
from vlm_latency.models.architecture import build_on_meta
from vlm_latency.models.interface import LoadedModel, ModelArchitecture
from vlm_latency.models.loading import VLM, check_fits, resolve_device, resolve_dtype
from vlm_latency.models.random_weights import materialise
from vlm_latency.options import ModelOptions

TINY = [name for name in known_models() if name.startswith("tiny-")]
NEEDS_TORCHVISION = {"tiny-molmo2"}
READY = [name for name in TINY if find_spec("torchvision") or name not in NEEDS_TORCHVISION]
PROMPT = "What color is the cat?"


@pytest.fixture(scope="module")
def image():
    pixels = np.random.default_rng(0).integers(0, 255, (200, 260, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def random_model(name, seed=0, dtype=torch.float32, attn="sdpa"):
    config = describe(ModelOptions(name=name)).transformers_config
    return materialise(build_on_meta(config, attn, dtype), torch.device("cpu"), seed)


def generate(vlm, image, tokens):
    prepared = vlm.place(vlm.prepare(image, PROMPT))
    with torch.inference_mode():
        out = vlm.model.generate(
            **prepared.inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=None
        )
    return out[0, prepared.counts.num_total_tokens :].tolist()


@pytest.mark.parametrize("name", READY)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tiny_twin_answers(name, dtype, image):
    vlm = load(ModelOptions(name=name, device="cpu", dtype=dtype))
    assert (vlm.weights, vlm.dtype) == ("random", getattr(torch, dtype))
    assert {p.dtype for p in vlm.model.parameters()} == {vlm.dtype}
    prepared = vlm.place(vlm.prepare(image, PROMPT))
    assert prepared.inputs["pixel_values"].dtype == vlm.dtype
    assert not prepared.inputs["input_ids"].is_floating_point()
    with torch.inference_mode():
        assert vlm.model(**prepared.inputs).logits.isfinite().all()
    tokens = generate(vlm, image, 16)
    assert len(tokens) == 16
    assert len(set(tokens)) > 2
    assert isinstance(vlm.decode(tokens), str)


@pytest.mark.parametrize("name", TINY)
def test_buffers_equal_those_of_a_model_built_as_usual(name):
    from transformers import AutoModelForImageTextToText

    config = describe(ModelOptions(name=name)).transformers_config
    usual = AutoModelForImageTextToText.from_config(copy.deepcopy(config))
    ours = random_model(name)
    buffers, expected = dict(ours.named_buffers()), dict(usual.named_buffers())
    assert buffers.keys() == expected.keys()
    for path, value in expected.items():
        torch.testing.assert_close(buffers[path], value, rtol=0, atol=0, msg=path)
    # norms and biases are transformers' own as well, but for the norms of queries and keys
    for path, value in usual.named_parameters():
        constant = value.ndim == 1 and value.detach().unique().numel() == 1
        if constant and "q_norm" not in path and "k_norm" not in path:
            assert torch.equal(ours.get_parameter(path), value), path


@pytest.mark.parametrize("name", TINY)
def test_weights_are_seeded_and_filled(name):
    first, again, other = (dict(random_model(name, s).named_parameters()) for s in (0, 0, 1))
    for path, value in first.items():
        assert torch.equal(value, again[path]), path
        assert value.isfinite().all(), path
        if value.ndim > 1:
            assert value.std() > 0, path
            assert not torch.equal(value, other[path]), path


def test_tied_weights_stay_tied():
    tied = random_model("tiny-gemma3")
    assert tied.lm_head.weight is tied.get_input_embeddings().weight
    loose = random_model("tiny-llava")
    assert loose.lm_head.weight is not loose.get_input_embeddings().weight


def test_a_second_copy_is_never_made():
    """What is allocated while loading is the parameters and buffers, once."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Count(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if "empty" in str(func) or "zeros" in str(func) or "_to_copy" in str(func):
                self.total += sum(t.nbytes for t in tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    config = describe(ModelOptions(name="tiny-qwen2.5-vl")).transformers_config
    model = build_on_meta(config, "sdpa", torch.bfloat16)
    with Count() as count:
        materialise(model, torch.device("cpu"), 0)
    own = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert own <= count.total < 1.05 * own


def test_attention_implementation_reaches_every_part(image):
    outputs = {}
    for attn in ("sdpa", "eager"):
        vlm = load(ModelOptions(name="tiny-qwen2.5-vl", device="cpu", attn_implementation=attn))
        assert vlm.model.config.vision_config._attn_implementation == attn
        assert vlm.model.config.text_config._attn_implementation == attn
        with torch.inference_mode():
            outputs[attn] = vlm.model(**vlm.prepare(image, PROMPT).inputs).logits
    torch.testing.assert_close(outputs["sdpa"], outputs["eager"], atol=1e-3, rtol=1e-3)
    with pytest.raises(ModelError, match="attn_implementation=wrong"):
        load(ModelOptions(name="tiny-llava", device="cpu", attn_implementation="wrong"))


# ---- checkpoints


@pytest.mark.parametrize("name", ["tiny-molmo", "tiny-qwen2.5-vl", "tiny-smolvlm", "tiny-gemma3"])
def test_folder_gives_the_same_model_back(name, image, tmp_path):
    vlm = load(ModelOptions(name=name, device="cpu"))
    vlm.model.save_pretrained(tmp_path)
    vlm.preparer.processor.save_pretrained(tmp_path)
    again = load(ModelOptions(name=str(tmp_path), device="cpu"))
    assert again.weights == "pretrained"
    ours, theirs = (each.prepare(image, PROMPT) for each in (vlm, again))
    assert ours.counts == theirs.counts
    for key, value in ours.inputs.items():
        # where torchvision is installed, it resizes a checkpoint's images: a level or two apart
        atol = 0.05 if value.is_floating_point() and find_spec("torchvision") else 0
        torch.testing.assert_close(theirs.inputs[key], value, atol=atol, rtol=0, msg=key)
    with torch.inference_mode():
        assert torch.equal(vlm.model(**ours.inputs).logits, again.model(**ours.inputs).logits)
    random = load(ModelOptions(name=str(tmp_path), device="cpu", weights="random"))
    assert random.weights == "random"
    for mine, original in zip(random.model.parameters(), vlm.model.parameters(), strict=True):
        assert torch.equal(mine, original)  # the same seed


def test_chat_template_of_the_processor_comes_first(image, tmp_path):
    vlm = load(ModelOptions(name="tiny-gemma3", device="cpu"))
    vlm.preparer.processor.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% for c in m['content'] %}"
        "{{ '<start_of_image>' if c['type'] == 'image' else 'Q: ' + c['text'] }}"
        "{% endfor %}{% endfor %} A:"
    )
    vlm.model.save_pretrained(tmp_path)
    vlm.preparer.processor.save_pretrained(tmp_path)
    again = load(ModelOptions(name=str(tmp_path), device="cpu"))
    ids = again.prepare(image, PROMPT).inputs["input_ids"][0]
    tokenizer = again.preparer.tokenizer
    assert (ids == tokenizer.bos_token_id).sum() == 1  # the tokenizer adds it: not twice
    assert tokenizer.decode(ids, skip_special_tokens=True).strip().endswith(f"Q: {PROMPT} A:")


def test_molmo_folder_of_the_hub_format(shared):
    folder = shared / "golden" / "molmo" / "D"
    found = describe(ModelOptions(name=str(folder), trust_remote_code=True))
    assert type(found.meta_model()).__module__ == "vlm_latency.molmo.modeling"


def test_folder_without_weights(tmp_path):
    vlm = load(ModelOptions(name="tiny-llava", device="cpu"))
    vlm.model.config.save_pretrained(tmp_path)
    vlm.preparer.processor.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has no safetensors"):
        load(ModelOptions(name=str(tmp_path), device="cpu"))


def test_folder_without_processor(tmp_path):
    load(ModelOptions(name="tiny-llava", device="cpu")).model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"processor of .* does not load; .*tokenizer\.json"):
        load(ModelOptions(name=str(tmp_path), device="cpu"))


# ---- objects


def test_own_objects(image):
    vlm = load(ModelOptions(name="tiny-qwen2.5-vl", device="cpu"))
    model = copy.deepcopy(vlm.model)
    model.model.language_model.layers = nn.ModuleList(model.model.language_model.layers[:2])
    model.config.text_config.num_hidden_layers = 2
    own = VLM.from_objects(model, vlm.preparer.processor, name="pruned")
    assert (own.weights, own.architecture.name, own.architecture.num_layers) == ("own", "pruned", 2)
    layers = vlm.model.model.language_model.layers[2:]
    gone = sum(p.numel() for p in layers.parameters())
    whole, left = vlm.architecture.parameters, own.architecture.parameters
    assert whole.params_llm - left.params_llm == gone
    assert whole.params_vision_encoder == left.params_vision_encoder
    assert {p.device.type for p in own.architecture.meta_model().parameters()} == {"meta"}
    assert own.prepare(image, PROMPT).counts == vlm.prepare(image, PROMPT).counts
    assert len(generate(own, image, 3)) == 3


def test_own_prompt(image):
    vlm = load(ModelOptions(name="tiny-llava", device="cpu"))
    own = VLM.from_objects(
        vlm.model, vlm.preparer.processor, prompt_builder=lambda prompt: f"<image>{prompt}"
    )
    counts = own.prepare(image, PROMPT).counts
    # the beginning of text, the image, the question
    assert counts.num_total_tokens == 1 + 576 + own.count_tokens(PROMPT)
    assert own.architecture.name == "LlavaForConditionalGeneration"


# ---- devices and memory


def test_devices():
    assert resolve_device(ModelOptions(device="cpu")) == torch.device("cpu")
    with pytest.raises(ModelError, match="found 'gpu'"):
        resolve_device(ModelOptions(device="gpu"))
    with pytest.raises(ModelError, match="CUDA devices are here"):
        resolve_device(ModelOptions(device="cuda:99"))


def test_names_of_device_and_dtype():
    options = ModelOptions(name="tiny-molmo", device="cpu", dtype="bfloat16")
    assert (models.resolve_device(options), models.dtype_name(options)) == ("cpu", "bfloat16")


def test_dtypes():
    auto = ModelOptions()
    assert resolve_dtype(auto, torch.device("cpu")) == torch.float32
    assert resolve_dtype(auto, torch.device("cuda")) == torch.bfloat16
    assert resolve_dtype(ModelOptions(dtype="float16"), torch.device("cpu")) == torch.float16


def test_a_model_that_does_not_fit_is_refused_with_the_numbers(monkeypatch):
    from vlm_latency.models import handle

    options = ModelOptions(name="molmo-7b-d", device="cpu", dtype="bfloat16")
    found = describe(options)
    monkeypatch.setattr(handle, "free_bytes", lambda device: 17 * 2**30)
    check_fits(found, options)
    monkeypatch.setattr(handle, "free_bytes", lambda device: 15 * 2**30)
    # 8,021,025,280 × 2 bytes; 4096 positions of 57,344 bytes
    with pytest.raises(ModelError, match=r"14\.94 GiB \+ .* 4096 positions 0\.22 GiB.*15\.00 GiB"):
        load(options)


# ---- no torch


@pytest.mark.parametrize(
    "code",
    [
        "import vlm_latency.models",
        "from vlm_latency.models import known_models; known_models()",
        "from vlm_latency.models import load; from vlm_latency.options import ModelOptions;"
        "from PIL import Image; v = load(ModelOptions(name='null-model'));"
        "p = v.place(v.prepare(Image.new('RGB', (640, 480)), 'a cat?'));"
        "assert p.counts.num_vision_tokens == 704 and p.counts.num_total_tokens == 742;"
        "r = v.meter(None)(p, 3); assert r.token_ids == [0] * 3 and r.times['T_total'] == 0;"
        "assert r.times['decode_step_ms'] == [0, 0]; v.decode(r.token_ids)",
        "from vlm_latency.models import describe, dtype_name, resolve_device;"
        "from vlm_latency.options import ModelOptions; o = ModelOptions(name='null-model');"
        "assert (resolve_device(o), dtype_name(o)) == ('cpu', 'float32');"
        "assert describe(o).tiles.max_crops == 12",
    ],
)
def test_no_torch_where_none_is_needed(code):
    check = "import sys; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", f"{code}; {check}"], check=True)


@pytest.mark.gpu
def test_random_weights_on_a_gpu(image):
    vlm = load(ModelOptions(name="tiny-molmo", device="cuda"))
    assert (vlm.device.type, vlm.dtype) == ("cuda", torch.bfloat16)
    assert len(set(generate(vlm, image, 16))) > 2


# ---- one interface


def test_every_kind_of_model_answers_the_same_interface(image, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from vlm_latency import load_model\n"
        "def make_model():\n"
        "    vlm = load_model('tiny-llava', seed=3)\n"
        "    return vlm.model, vlm.preparer.processor\n"
    )
    asked = {name for name in vars(LoadedModel) if not name.startswith("_")} | {
        *LoadedModel.__annotations__
    }
    handles = [ModelHandle(ModelOptions(name=n)) for n in ("null-model", "tiny-molmo")]
    handles.append(ModelHandle(ModelOptions(name=f"{mine}:make_model", dtype="bfloat16")))
    for handle in handles:
        handle.check_fits()
        vlm = handle.vlm
        assert [name for name in asked if not hasattr(vlm, name)] == []
        known = vlm.architecture
        for name in {*ModelArchitecture.__annotations__, *vars(ModelArchitecture)}:
            assert name.startswith("_") or hasattr(known, name), name
        assert str(vlm.device) == handle.device
        assert str(vlm.dtype).removeprefix("torch.") == handle.dtype
        counts = vlm.place(vlm.prepare(image, "What?")).counts
        assert counts.num_language_tokens + counts.num_vision_tokens == counts.num_total_tokens
        rows, cols = known.nominal_tiles.grid(*known.image_size_for(2, 3))
        assert (rows, cols) == (2, 3)
        assert vlm.set_threads(1) >= 1
    assert handles[2].weights == "own" and handles[2].dtype == "bfloat16"
    assert handles[2].vlm is ModelHandle(handles[2].options).vlm  # made once


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("def other(): pass", "has no attribute 'make_model'"),
        ("def make_model(): return 3", r"returned int; expected \(model, processor\)"),
        ("def make_model(): raise KeyError('weights')", "KeyError: 'weights'"),
        ("def make_model(:", "SyntaxError"),
    ],
)
def test_a_file_that_makes_no_model_is_refused(body, told, tmp_path):
    (tmp_path / "mine.py").write_text(body)
    with pytest.raises(ModelError, match=told):
        load(ModelOptions(name=f"{tmp_path}/mine.py:make_model"))
    with pytest.raises(ModelError, match="there is no file"):
        load(ModelOptions(name=f"{tmp_path}/yours.py:make_model"))


def test_null_model_sleeps_as_long_as_it_is_told(image):
    vlm = load(ModelOptions(name="null-model", null_sleep_ms=2.0))
    with vlm.meter(None) as meter:
        reading = meter(vlm.prepare(image, "a"), 1)
        assert reading.times["T_total"] == reading.times["T_other"] == reading.timed_ms >= 2
        assert meter.bare(None, 1)[0] >= 2
