from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from vlm_latency import molmo
from vlm_latency.errors import ModelError
from vlm_latency.molmo import MolmoConfig, MolmoForConditionalGeneration
from vlm_latency.molmo.checkpoint import hub_tensors

COMMITTED = Path(__file__).parent / "golden"


@pytest.mark.parametrize("family", "DOE")
def test_names_and_shapes_of_the_published_checkpoints(family):
    published = json.loads((COMMITTED / "real_sizes.json").read_text())["tensors"][family]
    config = MolmoConfig(**json.loads((COMMITTED / family / "real_config.json").read_text()))
    templates: dict[str, list] = {}
    for name, shape in hub_tensors(config).items():
        template = re.sub(r"\.experts\.\d+\.", ".experts.{e}.", name)
        template = re.sub(r"resblocks\.\d+\.", "resblocks.{l}.", template)
        template = re.sub(r"(?<!res)blocks\.\d+\.", "blocks.{i}.", template)
        entry = templates.setdefault(template, [list(shape), 0])
        entry[1] += 1
    assert templates == published


def write(folder: Path, tensors: dict[str, torch.Tensor], config: Path) -> Path:
    folder.mkdir()
    shutil.copy(config, folder / "config.json")
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("family", "DOE")
def test_wrong_tensors_are_named(family, committed, tmp_path):
    source = committed.models / family
    expert = "model.transformer.blocks.1.mlp.experts.3.up_proj.weight"
    lost = expert if family == "E" else "model.transformer.wte.new_embedding"
    vit = "model.vision_backbone.image_vit.patch_embedding.weight"
    tensors = load_file(source / "model.safetensors")
    del tensors[lost]
    tensors["model.transformer.blocks.9.attn_norm.weight"] = torch.ones(3)
    tensors[vit] = tensors[vit].T.contiguous()
    folder = write(tmp_path / family, tensors, source / "config.json")
    with pytest.raises(ModelError) as error:
        MolmoForConditionalGeneration.from_pretrained(folder)
    message = str(error.value)
    assert f"missing {lost}" in message
    assert "unexpected model.transformer.blocks.9.attn_norm.weight" in message
    assert f"of another shape {vit} (588, 64) instead of (64, 588)" in message


@pytest.mark.parametrize("family", "DOE")
def test_saved_and_loaded_again(family, committed, tmp_path):
    molmo.register()
    model = committed.model(family)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(again) is MolmoForConditionalGeneration
    inputs, _ = committed.case(family, 2)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)

    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.multi_modal_projector.pad_embed"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"missing model\.multi_modal_projector\.pad_embed"):
        MolmoForConditionalGeneration.from_pretrained(tmp_path)


def test_sharded_checkpoint(committed, tmp_path):
    source = committed.models / "E"
    shutil.copy(source / "config.json", tmp_path)
    save_torch_state_dict(load_file(source / "model.safetensors"), tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    sharded = MolmoForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    whole = committed.model("E").state_dict()
    assert sharded.keys() == whole.keys()
    assert all(torch.equal(sharded[name], whole[name]) for name in whole)


def test_embedding_tables_are_joined_at_load(committed):
    tensors = load_file(committed.models / "D" / "model.safetensors")
    table = committed.model("D").get_input_embeddings().weight
    parts = [tensors[f"model.transformer.wte.{name}"] for name in ("embedding", "new_embedding")]
    assert torch.equal(table, torch.cat(parts))


def test_the_drawn_weights_are_the_reference_weights(committed, shared):
    for family in "DOE":
        drawn = load_file(committed.models / family / "model.safetensors")
        full = load_file(shared / "golden" / "molmo" / family / "model.safetensors")
        assert drawn.keys() == full.keys()
        assert all(torch.allclose(drawn[name], full[name], atol=1e-6) for name in full)
