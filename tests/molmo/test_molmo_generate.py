from __future__ import annotations

import pytest
import torch
from transformers import CompileConfig

from vlm_latency.errors import UserError

GREEDY = {"max_new_tokens": 16, "do_sample": False}


def new_tokens(model, inputs, **kwargs) -> torch.Tensor:
    output = model.generate(**inputs, **GREEDY, **kwargs)
    return output[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize(
    "how",
    [{}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}],
    ids=["dynamic cache", "no cache", "static cache"],
)
@pytest.mark.parametrize("family", "DOE")
def test_greedy_tokens_equal_the_reference(family, how, golden):
    model = golden.model(family)
    for n in golden.cases(family):
        inputs, expected = golden.case(family, n)
        if "greedy_tokens" not in expected or len(inputs["input_ids"]) > 1:
            continue
        assert torch.equal(new_tokens(model, inputs, **how), expected["greedy_tokens"]), n


@pytest.mark.parametrize("family", "DOE")
def test_rows_of_the_padded_batch_one_by_one(family, shared, golden):
    inputs, expected = golden.case(family, 6)
    if "greedy_tokens" not in expected:
        pytest.skip("only in the full set")
    model = golden.model(family)
    for row, tokens in enumerate(expected["greedy_tokens"]):
        length = int(inputs["attention_mask"][row].sum())
        single = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        single["input_ids"] = single["input_ids"][:, :length]
        single["attention_mask"] = single["attention_mask"][:, :length]
        assert torch.equal(new_tokens(model, single)[0], tokens)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", "DOE")
def test_compiled_decode_is_one_graph(family, backend, committed):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = committed.model(family)
    inputs, expected = committed.case(family, 3)
    compiling = CompileConfig(fullgraph=True, dynamic=False, mode=None, backend=backend)
    compiling._compile_all_devices = True  # generate() would compile on accelerators only
    tokens = new_tokens(model, inputs, cache_implementation="static", compile_config=compiling)
    assert torch.equal(tokens, expected["greedy_tokens"])
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("family", "DOE")
def test_one_request_needs_no_mask_and_one_row_of_the_head(family, committed):
    model = committed.model(family)
    inputs, _ = committed.case(family, 3)
    masks, head_rows, encoded = [], [], []
    layer = model.get_decoder().layers[0]
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        ),
        model.lm_head.register_forward_pre_hook(lambda _, args: head_rows.append(args[0].shape[1])),
        model.get_encoder(modality="image").register_forward_pre_hook(
            lambda _, args: encoded.append(args[0].shape[0])
        ),
    ]
    new_tokens(model, inputs)
    assert masks == [None] * 16
    assert head_rows == [1] * 16
    assert encoded == [7]
    for hook in hooks:
        hook.remove()


def test_refuses_a_batch_padded_on_the_right(committed):
    inputs, _ = committed.case("D", 6)
    with pytest.raises(UserError, match="padded on the right"):
        committed.model("D").generate(**inputs, **GREEDY)


def test_takes_a_batch_padded_on_the_left(committed):
    inputs, expected = committed.case("D", 3)
    text, text_expected = committed.case("D", 0)
    length = max(inputs["input_ids"].shape[1], text["input_ids"].shape[1])

    def padded(row):
        missing = length - row.shape[1]
        return torch.nn.functional.pad(row, (missing, 0))

    shift = length - inputs["input_ids"].shape[1]
    idx = inputs["image_input_idx"]
    both = {
        "input_ids": torch.cat([padded(inputs["input_ids"]), padded(text["input_ids"])]),
        "attention_mask": torch.cat(
            [padded(inputs["attention_mask"]), padded(text["attention_mask"])]
        ),
        "image_input_idx": torch.cat(
            [torch.where(idx < 0, idx, idx + shift), torch.full_like(idx, -1)]
        ),
        "pixel_values": inputs["pixel_values"].expand(2, -1, -1, -1),
        "image_masks": inputs["image_masks"].expand(2, -1, -1),
    }
    tokens = new_tokens(committed.model("D"), both)
    assert torch.equal(tokens[:1], expected["greedy_tokens"])
    assert torch.equal(tokens[1:], text_expected["greedy_tokens"])
