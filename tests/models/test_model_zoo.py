"""The zoo: names, overlays, errors, and the published sizes."""

import pytest

from vlm_latency.errors import ModelError
from vlm_latency.models import describe, known_models, weights_kind
from vlm_latency.models.zoo import is_path, load_zoo
from vlm_latency.options import ModelOptions

ZOO = load_zoo()
PUBLISHED = {name: entry.parameters for name, entry in ZOO.models.items() if entry.parameters}

PROMISED = {
    "tiny-molmo",
    "small-molmo",
    "molmoe-1b",
    "molmo-7b-o",
    "molmo-7b-d",
    "molmo-72b",
    "molmo2-4b",
    "molmo2-8b",
    "qwen2.5-vl-3b",
    "qwen2.5-vl-7b",
    "qwen3-vl-4b",
    "qwen3-vl-8b",
    "llava-1.5-7b",
    "llava-onevision-7b",
    "internvl3-8b",
    "smolvlm2-2.2b",
    "gemma-3-4b",
    "tiny-molmo-o",
    "tiny-molmoe",
    "tiny-molmo2",
    "tiny-qwen2.5-vl",
    "tiny-qwen3-vl",
    "tiny-llava",
    "tiny-llava-onevision",
    "tiny-internvl",
    "tiny-smolvlm",
    "tiny-gemma3",
}


def test_every_promised_model_is_there():
    assert set(known_models()) == PROMISED


def test_every_family_has_a_tiny_twin():
    twins = {e.config["model_type"] for name, e in ZOO.models.items() if name.startswith("tiny-")}
    assert twins == {entry.config["model_type"] for entry in ZOO.models.values()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_total_parameters_equal_the_published_ones(name):
    assert describe(ModelOptions(name=name)).parameters.params_total == PUBLISHED[name]


def test_totals_without_a_published_one_are_the_sum_of_published_parts():
    # InternViT-300M and Qwen2.5-7B (7,615,616,512 with 152,064 rows; here 151,674), and their MLP
    internvl = describe(ModelOptions(name="internvl3-8b")).parameters
    assert internvl.params_llm == 7_615_616_512 - (152_064 - 151_674) * 2 * 3584
    # Qwen2-7B with 152,000 rows
    onevision = describe(ModelOptions(name="llava-onevision-7b")).parameters
    assert onevision.params_llm == 7_615_616_512 - (152_064 - 152_000) * 2 * 3584
    # Qwen3-8B with 128 embedding rows more
    molmo2 = describe(ModelOptions(name="molmo2-8b")).parameters
    assert molmo2.params_llm == 8_190_735_360 + 128 * 4096
    assert molmo2.params_vision_encoder == (
        describe(ModelOptions(name="molmo2-4b")).parameters.params_vision_encoder
    )


def test_small_molmo_is_of_the_promised_size():
    total = describe(ModelOptions(name="small-molmo")).parameters.params_total
    assert 100e6 < total < 150e6


def test_tiny_molmo_has_the_real_geometry_and_room_for_4096_tokens():
    tiny, real = (describe(ModelOptions(name=name)) for name in ("tiny-molmo", "molmo-7b-d"))
    assert tiny.tiles == real.tiles
    for size in ((640, 480), (500, 333), (1000, 1000), (2800, 336)):
        assert tiny.image_tokens(*size) == real.image_tokens(*size)
    assert tiny.max_positions >= 1600 + 4096
    assert tiny.transformers_config.vision_config.num_hidden_layers >= 10


def test_unknown_name_names_the_nearest_and_all():
    with pytest.raises(ModelError, match="did you mean 'molmo-7b-d'") as error:
        describe(ModelOptions(name="molmo-7bd"))
    assert all(name in str(error.value) for name in known_models())


@pytest.mark.parametrize(
    ("name", "weights", "kind"),
    [
        ("tiny-molmo", "auto", "random"),
        ("molmo-7b-d", "pretrained", "pretrained"),
        ("allenai/Molmo-7B-D-0924", "auto", "pretrained"),
        ("allenai/Molmo-7B-D-0924", "random", "random"),
    ],
)
def test_weights_kind(name, weights, kind):
    assert weights_kind(ModelOptions(name=name, weights=weights)) == kind


def test_folder_without_slash_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint").mkdir()
    assert not is_path("checkpoint")
    (tmp_path / "checkpoint" / "config.json").write_text("{}")
    assert is_path("checkpoint")


def test_own_zoo_is_laid_over(tmp_path):
    own = tmp_path / "own.yml"
    own.write_text(
        "models:\n"
        "  mine:\n"
        "    config: {model_type: molmo, text_config: {model_type: qwen2, vocab_size: 2432, "
        "hidden_size: 32, intermediate_size: 64, num_hidden_layers: 3, num_attention_heads: 2, "
        "num_key_value_heads: 1}, vision_config: {hidden_size: 32, intermediate_size: 64, "
        "num_hidden_layers: 9, num_attention_heads: 2}}\n"
    )
    assert set(known_models(str(own))) == {*PROMISED, "mine"}
    found = describe(ModelOptions(name="mine", zoo_file=str(own)))
    assert (found.num_layers, found.num_kv_heads, found.head_dim) == (3, 1, 16)
    # 2 (keys, values) × 3 layers × 1 head × 16 values × 4 bytes
    assert found.kv_bytes_per_token("float32") == 384


@pytest.mark.parametrize(
    "text", ["models: [1]", "models: {a: {nothing: 1}}", "a: b", "models: {a: {config: {}}}", "{"]
)
def test_malformed_own_zoo(tmp_path, text):
    own = tmp_path / "own.yml"
    own.write_text(text)
    with pytest.raises(ModelError, match=r"own\.yml"):
        known_models(str(own))


def test_missing_own_zoo():
    with pytest.raises(ModelError, match="no file"):
        known_models("nowhere.yml")


def test_pretrained_weights_of_a_tiny_twin_do_not_exist():
    with pytest.raises(ModelError, match="no published weights"):
        describe(ModelOptions(name="tiny-molmo", weights="pretrained"))


def test_folder_without_configuration(tmp_path):
    with pytest.raises(ModelError, match="there is no folder"):
        describe(ModelOptions(name=str(tmp_path / "nothing")))
    with pytest.raises(ModelError, match="no usable configuration"):
        describe(ModelOptions(name=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "bytes_bf16"),
    [
        ("molmoe-1b", 131_072),
        ("molmo-7b-o", 524_288),
        ("molmo-7b-d", 57_344),
        ("molmo-72b", 327_680),
    ],
)
def test_key_value_bytes_of_molmo(name, bytes_bf16):
    assert describe(ModelOptions(name=name)).kv_bytes_per_token("bfloat16") == bytes_bf16


def test_position_limits():
    limits = {
        name: describe(ModelOptions(name=name)).max_positions
        for name in ("molmo-7b-d", "molmoe-1b", "llava-1.5-7b", "gemma-3-4b")
    }
    assert limits == {
        "molmo-7b-d": 4096,
        "molmoe-1b": 32768,
        "llava-1.5-7b": 4096,
        "gemma-3-4b": 131072,
    }


def test_options_of_one_family_are_refused_by_others():
    with pytest.raises(ModelError, match="float32_attention is for Molmo"):
        describe(ModelOptions(name="tiny-llava", float32_attention=True))
    with pytest.raises(ModelError, match="revision=v2 names a version of published weights"):
        describe(ModelOptions(name="tiny-llava", revision="v2"))
    with pytest.raises(ModelError, match="max_crops does not apply"):
        _ = describe(ModelOptions(name="tiny-llava", max_crops=4)).preparer


def test_options_reach_the_model():
    found = describe(ModelOptions(name="tiny-molmo", float32_attention=False, max_crops=4))
    assert found.transformers_config.float32_attention is False
    assert found.image_tokens(2000, 2000).num_crops == 5
    assert found.config["max_crops"] == 4
    internvl = describe(ModelOptions(name="tiny-internvl", max_crops=4))
    assert internvl.image_tokens(2000, 2000).num_crops == 5
