"""Which part is which, and how many parameters it has."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vlm_latency.costs.architectures import build, table
from vlm_latency.errors import ModelError
from vlm_latency.models import describe, known_models
from vlm_latency.models.components import count_parameters, find_components
from vlm_latency.options import ModelOptions

TINY = [name for name in known_models() if name.startswith("tiny-")]


@pytest.mark.parametrize("name", TINY)
def test_parts_are_told_apart_and_add_up(name):
    found = describe(ModelOptions(name=name))
    modules = found.components.resolve(found.meta_model())
    assert modules.vision_encoder is not modules.language_model
    assert modules.projector
    counts = found.parameters
    assert counts.params_total == (
        counts.params_vision_encoder + counts.params_projector + counts.params_llm
    )
    assert min(counts.params_vision_encoder, counts.params_projector, counts.params_llm) > 0
    assert counts.params_total == sum(p.numel() for p in found.meta_model().parameters())


def test_merger_in_the_encoder_is_the_projector():
    components = describe(ModelOptions(name="tiny-qwen3-vl")).components
    assert components.vision_encoder == "model.visual"
    assert components.projector == ("model.visual.merger", "model.visual.deepstack_merger_list")


@pytest.mark.parametrize(
    ("name", "projector", "image_projector"),
    [
        ("molmoe-1b", 11_542_528, 4_194_304),
        ("molmo-7b-o", 74_981_376, 67_633_152),
        ("molmo-7b-d", 114_040_832, 106_692_608),
        ("molmo-72b", 310_124_544, None),
    ],
)
def test_molmo_by_component(name, projector, image_projector):
    counts = describe(ModelOptions(name=name)).parameters
    assert counts.params_vision_encoder == 290_909_184
    assert counts.params_projector == projector
    if image_projector is not None:
        assert counts.params_image_projector == image_projector
    # pooling (four matrices with biases) and two padding vectors are the rest
    assert counts.params_projector - counts.params_image_projector == 7_344_128 + 4_096


def test_active_parameters_of_a_mixture_of_experts():
    moe = describe(ModelOptions(name="molmoe-1b")).parameters
    assert moe.params_active == 1_584_731_136
    assert (moe.moe_num_experts, moe.moe_top_k) == (64, 8)
    assert moe.params_total - moe.params_active == moe.params_llm - moe.params_llm_active
    dense = describe(ModelOptions(name="molmo-7b-d")).parameters
    assert dense.params_active == dense.params_total
    assert dense.moe_num_experts is dense.moe_top_k is None


def test_loose_parameters_belong_to_the_projector():
    found = describe(ModelOptions(name="tiny-llava-onevision"))
    model = found.meta_model()
    projector = sum(p.numel() for p in model.model.multi_modal_projector.parameters())
    newline = model.model.image_newline.numel()
    assert found.parameters.params_projector == projector + newline


def test_overrides_come_first():
    model = describe(ModelOptions(name="tiny-llava")).meta_model()
    path = "model.multi_modal_projector.linear_2"
    components = find_components(model, {"projector": path})
    assert components.projector == (path,)
    with pytest.raises(ModelError, match=r"no module at model\.nowhere"):
        find_components(model, {"projector": ["model.nowhere"]})
    with pytest.raises(ModelError, match="no component is called projectr"):
        find_components(model, {"projectr": path})


class Odd(nn.Module):
    """A model with a decoder and a head, but with eyes of an unknown name."""

    def __init__(self):
        super().__init__()
        self.eyes = nn.Linear(2, 2)
        self.decoder = nn.Linear(2, 2)
        self.head = nn.Linear(2, 2)
        self.config = SimpleNamespace()

    @property
    def base_model(self):
        return self

    def get_encoder(self, modality=None):
        return self

    def get_decoder(self):
        return self.decoder

    def get_output_embeddings(self):
        return self.head


def test_refusal_says_what_was_found():
    with torch.device("meta"), pytest.raises(ModelError, match="no vision_encoder, projector") as e:
        find_components(Odd())
    assert "'language_model': 'decoder'" in str(e.value)
    assert "eyes, decoder, head" in str(e.value)
    assert "zoo_file" in str(e.value)
    found = find_components(Odd(), {"vision_encoder": "eyes", "projector": "eyes"})
    assert found.vision_encoder == "eyes"


# ---- every architecture of transformers


@pytest.mark.parametrize(
    ("model_type", "encoders", "projector"),
    [
        # an audio tower is no projector: the merger is
        ("qwen2_5_omni_thinker", ["model.visual"], ["model.visual.merger"]),
        # a model that makes images is no projector
        ("janus", ["model.vision_model"], ["model.aligner"]),
        # a tower for videos beside the one for images
        ("video_llava", ["model.image_tower"], ["model.multi_modal_projector"]),
        # two encoders see one image
        (
            "deepseek_vl_hybrid",
            ["model.vision_model", "model.high_res_vision_model"],
            [
                "model.high_res_vision_neck",
                "model.high_res_vision_proj",
                "model.aligner",
            ],
        ),
        # a language model with its head inside is no projector
        ("instructblip", ["vision_model"], ["qformer", "language_projection"]),
        # called by the forward, not by get_image_features
        ("llama4", ["vision_model"], ["multi_modal_projector"]),
        ("mllama", ["model.vision_model"], ["model.multi_modal_projector"]),
        ("granite_docling", ["model.vision_model"], ["model.vision_model.connector"]),
    ],
)
def test_the_projector_is_what_makes_image_features(model_type, encoders, projector):
    model = build(model_type)
    found = find_components(model)
    assert [found.vision_encoder, *found.more_encoders] == encoders
    assert list(found.projector) == projector
    counts = count_parameters(model, found)
    modules = [model.get_submodule(path) for path in encoders]
    inside = {id(p) for path in projector for p in model.get_submodule(path).parameters()}
    own = {id(p): p.numel() for module in modules for p in module.parameters()}
    assert counts.params_vision_encoder == sum(n for key, n in own.items() if key not in inside)
    if found.aside:  # what makes or hears something else is in the total only
        parts = [model.get_submodule(path) for path in projector]
        assert counts.params_projector == sum(p.numel() for m in parts for p in m.parameters())


@pytest.mark.parametrize(
    ("model_type", "told"),
    [
        ("inkling_mm_model", "no projector found"),  # its audio tower is none
        ("instructblipvideo", "takes videos and no images"),
        ("florence2", "encoder-decoder"),
        ("fuyu", "no vision_encoder, projector found"),
    ],
)
def test_what_cannot_be_told_apart_is_refused_by_name(model_type, told):
    with pytest.raises(ModelError, match=told):
        find_components(build(model_type))


@pytest.mark.slow
def test_the_page_of_architectures_is_what_the_command_makes():
    page = Path(__file__).parents[2] / "docs" / "architectures.md"
    assert page.read_text(encoding="utf-8") == table()


def test_the_readme_counts_architectures_as_their_page_does():
    root = Path(__file__).parents[2]
    page, readme = ((root / name).read_text() for name in ("docs/architectures.md", "README.md"))
    (found,) = re.findall(r"^(\d+) architectures: (\d+) with all parts, (\d+) refused", page, re.M)
    number, measured, refused = found
    assert f"[{measured} of its {number} architectures](docs/architectures.md)" in readme
    assert f"why {refused} of the {number} are refused" in readme
