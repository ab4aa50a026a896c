"""Equal blocks are counted once, and what was counted is kept: the numbers stay to the integer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlm_latency.contents import Memory
from vlm_latency.costs import CostModel, RequestShape
from vlm_latency.costs.counted import Counter
from vlm_latency.costs.model import SECTIONS
from vlm_latency.costs.units import Census
from vlm_latency.models.architecture import describe
from vlm_latency.models.zoo import NULL, load_zoo
from vlm_latency.options import ModelOptions

TINY = [name for name in load_zoo().models if name.startswith("tiny-")]


@pytest.mark.parametrize("name", TINY)
def test_equal_blocks_give_what_all_blocks_give(
    zoo_costs: Callable[[str], CostModel], name: str
) -> None:
    costs = zoo_costs(name)
    given = costs.architecture.meta_model(), costs.architecture.components
    once, each = (
        Counter(*given, costs.census.sliding_window, equal_blocks=equal) for equal in (True, False)
    )
    if name != "tiny-molmo2":  # whose image processor needs torchvision
        for size in ((640, 480), (300, 800)):
            inputs = costs.architecture.dummy_inputs(*size, 256)
            right = each.vision(inputs)
            assert once.vision(inputs) == once.vision(inputs) == right
        assert once.whole(inputs) == each.whole(inputs)
    for length in (1, 65, 700):
        assert once.prefill(length) == each.prefill(length)
        assert once.step(length) == each.step(length)
    assert Census.from_json(json.loads(json.dumps(costs.census.to_json()))) == costs.census


def test_the_zoo_has_a_tiny_twin_of_every_family() -> None:
    types = {entry.config["model_type"] for entry in load_zoo().models.values()}
    twins = {load_zoo().models[name].config["model_type"] for name in TINY}
    assert twins == types - {NULL}


def many(architecture: Any, number: int = 24) -> RequestShape:
    """Requests with images of many sizes."""
    rng, rows = np.random.default_rng(1), []
    for width, height in rng.integers(60, 700, size=(number, 2)).tolist():
        image = architecture.image_tokens(width, height)
        tokens = image.num_total_tokens + int(rng.integers(5, 40))
        rows.append(
            [
                width,
                height,
                tokens,
                image.num_vision_tokens,
                image.num_crops,
                image.num_vision_patches,
                int(rng.integers(1, 60)),
            ]
        )
    return RequestShape(*np.array(rows).T)


@pytest.mark.parametrize(
    "name", ["tiny-qwen2.5-vl", "tiny-llava-onevision", "tiny-molmo", "tiny-smolvlm"]
)
def test_many_sizes_follow_from_few(zoo_costs: Callable[[str], CostModel], name: str) -> None:
    """What is inferred for images equals what is counted for each, launches too."""
    architecture = zoo_costs(name).architecture
    shape = many(architecture)
    few = CostModel(architecture)
    few.memory = Memory(None, SECTIONS)
    flops, launches = few.flops(shape, "counted"), few.launches(shape)
    for part, analytic in few.flops(shape).items():
        np.testing.assert_array_equal(flops[part], analytic)
    for i, one in list(enumerate(shape))[::4]:
        inputs = architecture.dummy_inputs(one.image_width, one.image_height, 256)
        vision, projector = few.counter.vision(inputs)
        assert (flops["vision"][i], flops["projector"][i]) == (vision.flops, projector.flops)
        assert launches["vision"][i] == vision.launches
        assert launches["projector"][i] == projector.launches


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLM_LATENCY_CACHE", str(tmp_path))
    return tmp_path / "costs"


def tiny(**options: Any) -> CostModel:
    return CostModel(describe(ModelOptions(name="tiny-llava", weights="random", **options)))


SHAPE = RequestShape(336, 336, 600, 576, 1, 576, 4)


def all_of(costs: CostModel) -> list[Any]:
    found = [costs.flops(SHAPE, name) for name in ("analytic", "counted", "rule")]
    return [*found, costs.launches(SHAPE), costs.does_not_add_up(SHAPE), costs.knows_cache]


def test_what_was_counted_is_not_counted_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = all_of(tiny())
    (file,) = folder.iterdir()

    def refuse(*_: object) -> None:
        raise AssertionError("nothing is built or run")

    monkeypatch.setattr("vlm_latency.models.architecture.build_on_meta", refuse)
    assert all_of(tiny()) == first
    assert [path.name for path in folder.iterdir()] == [file.name]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("229949952", "229949953"),
        lambda text: "[]",
        lambda text: json.dumps({"sha256": "0", "content": "{}"}),
    ],
    ids=["empty", "half", "another number", "a list", "another digest"],
)
def test_a_damaged_file_is_as_good_as_none(folder: Path, damage: Callable[[str], str]) -> None:
    first = all_of(tiny())
    (file,) = folder.iterdir()
    whole = file.read_text()
    file.write_text(damage(whole))
    assert file.read_text() != whole
    assert all_of(tiny()) == first
    assert json.loads(file.read_text())["sha256"] == json.loads(whole)["sha256"]


def test_two_processes_add_to_one_file(folder: Path) -> None:
    one, other = tiny(), tiny()
    assert one.memory["prefill"] == other.memory["prefill"] == {}
    one.flops(SHAPE, "counted")
    other.flops(RequestShape(336, 336, 650, 576, 1, 576, 1), "counted")
    assert {"600", "650"} <= set(tiny().memory["prefill"])


def test_another_architecture_is_another_file(folder: Path) -> None:
    _ = tiny().census
    _ = CostModel(describe(ModelOptions(name="tiny-internvl", weights="random"))).census
    assert len(list(folder.iterdir())) == 2


def test_a_users_own_object_is_not_kept(folder: Path) -> None:
    from vlm_latency import load_model
    from vlm_latency.models.loading import VLM

    vlm = load_model("tiny-llava")
    costs = CostModel(VLM.from_objects(vlm.model, vlm.preparer.processor).architecture)
    assert all_of(costs) == all_of(tiny())
    assert costs.memory.path is None
    assert len(list(folder.iterdir())) == 1


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VLM_LATENCY_CACHE", str(tmp_path / "file"))
    assert tiny().flops(SHAPE, "counted") == tiny().flops(SHAPE)
    monkeypatch.setenv("VLM_LATENCY_CACHE", "off")
    assert tiny().memory.path is None


def test_crops_that_are_not_the_images_own_are_not_remembered(folder: Path) -> None:
    """A method that made a large image smaller must not teach what a small image costs."""
    molmo = describe(ModelOptions(name="tiny-molmo"))
    small, large = molmo.image_tokens(240, 320), molmo.image_tokens(640, 480)
    seen = RequestShape(
        image_width=np.array([640, 640]),
        image_height=np.array([480, 480]),
        num_total_tokens=800,
        num_vision_tokens=np.array([small.num_vision_tokens, large.num_vision_tokens]),
        num_crops=np.array([small.num_crops, large.num_crops]),
        num_vision_patches=np.array([small.num_vision_patches, large.num_vision_patches]),
        num_output_tokens=1,
    )
    CostModel(molmo).flops(seen, "counted")
    costs = CostModel(describe(ModelOptions(name="tiny-molmo")))
    own = RequestShape(
        image_width=240,
        image_height=320,
        num_total_tokens=400,
        num_vision_tokens=small.num_vision_tokens,
        num_crops=small.num_crops,
        num_vision_patches=small.num_vision_patches,
        num_output_tokens=1,
    )
    assert costs.flops(own, "counted")["vision"] == costs.flops(own, "analytic")["vision"]
