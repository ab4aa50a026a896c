"""What earlier commands found of a model is what it would say itself, as long as it is that model."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml

from vlm_latency.models import ModelHandle, handle, loading, resolve_device
from vlm_latency.models.architecture import describe
from vlm_latency.models.known import KnownArchitecture
from vlm_latency.options import ModelOptions

SIZES = [(640, 480), (333, 500)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLM_LATENCY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def said(found: Any) -> list[Any]:
    return [
        *(found.name, found.hub_id, found.model_type, found.simulated, found.own_modules),
        *(found.config, str(found.component_overrides), found.parameters, found.max_positions),
        *(found.tiles, found.nominal_tiles, found.image_size_for(2, 3)),
        *(found.weight_bytes("float32"), found.kv_bytes_per_token("bfloat16")),
        *(found.image_tokens(*size) for size in SIZES),
        *(found.image_sizes_for_ladder(3), found.encoder_backend("cpu", "float32")),
    ]


def refuse(*_: Any) -> None:
    raise AssertionError("the model is described anew")


@pytest.mark.parametrize("name", ["tiny-molmo", "tiny-llava", "tiny-qwen2.5-vl"])
def test_what_is_remembered_is_what_the_model_says(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ModelOptions(name=name)
    own = said(describe(options))
    assert said(KnownArchitecture(options)) == own
    monkeypatch.setattr("vlm_latency.models.known.describe", refuse)
    assert said(KnownArchitecture(options)) == own
    assert said(pickle.loads(pickle.dumps(KnownArchitecture(options)))) == own


def test_a_size_that_is_remembered_is_never_counted_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ModelOptions(name="tiny-llava")
    counts = KnownArchitecture(options).image_tokens(640, 480)
    monkeypatch.setattr("vlm_latency.models.known._MOST_SIZES", 0)
    monkeypatch.setattr("vlm_latency.models.known.describe", refuse)
    assert KnownArchitecture(options).image_tokens(640, 480) == counts


def test_another_option_version_or_zoo_is_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo = tmp_path / "zoo.yml"
    config = describe(ModelOptions(name="tiny-llava")).config
    zoo.write_text(yaml.safe_dump({"models": {"mine": {"config": config}}}))
    options = ModelOptions(name="mine", zoo_file=str(zoo))
    first = KnownArchitecture(options).parameters
    config["text_config"]["num_hidden_layers"] += 1
    zoo.write_text(yaml.safe_dump({"models": {"mine": {"config": config}}}))
    assert KnownArchitecture(options).parameters.params_total > first.params_total

    for crops in (12, 4):
        tiles = KnownArchitecture(ModelOptions(name="tiny-molmo", max_crops=crops)).tiles
        assert tiles is not None and tiles.max_crops == crops

    monkeypatch.setattr("vlm_latency.contents.version", lambda package: "another")
    monkeypatch.setattr("vlm_latency.models.known.describe", refuse)
    with pytest.raises(AssertionError, match="described anew"):
        _ = KnownArchitecture(options).parameters


def test_only_what_the_zoo_alone_tells_is_remembered(tmp_path: Path, folder: Path) -> None:
    describe(ModelOptions(name="tiny-llava")).transformers_config.save_pretrained(tmp_path / "own")
    for options in (
        ModelOptions(name=str(tmp_path / "own"), weights="random"),
        ModelOptions(name="null-model"),
        ModelOptions(name="tiny-llava", trust_remote_code=True),
    ):
        found = ModelHandle(options).architecture
        assert not isinstance(found, KnownArchitecture) and found.parameters
    assert not folder.exists()


def test_memory_is_asked_for_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ModelOptions(name="tiny-llava", device="cpu")
    ModelHandle(options).check_fits()
    monkeypatch.setattr(loading, "check_builds", refuse)
    ModelHandle(options).check_fits()
    monkeypatch.setattr(handle, "free_bytes", lambda device: 2**20)
    with pytest.raises(handle.ModelError, match="does not fit on cpu"):
        ModelHandle(options).check_fits()


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_the_device_is_the_one_that_torch_gives(device: str) -> None:
    options = ModelOptions(name="tiny-llava", device=device)
    assert resolve_device(options) == str(loading.resolve_device(options))


@pytest.mark.parametrize(
    ("build", "driver", "asked"),
    [
        ("cuda = hip = None", True, False),
        ("cuda = '13.0'\nhip = None", True, True),
        ("cuda = '13.0'\nhip = None", False, False),
        ("cuda = None\nhip = '7.0'", False, True),
    ],
)
def test_torch_is_asked_where_its_build_and_a_driver_may_give_a_gpu(
    build: str, driver: bool, asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    (tmp_path / "torch" / "version.py").write_text(build)
    spec = importlib.util.spec_from_file_location("torch", tmp_path / "torch" / "__init__.py")
    monkeypatch.setattr(handle.importlib.util, "find_spec", lambda name: spec)

    def load(name: str) -> None:
        if not driver:
            raise OSError(name)

    monkeypatch.setattr(handle.ctypes, "CDLL", load)
    monkeypatch.setattr(handle.sys, "platform", "linux")
    assert handle._may_have_gpu.__wrapped__() is asked
