"""Reference numbers: the committed part, and the full set where it lies beside the checkout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vlm_latency.molmo import MolmoForConditionalGeneration, MolmoImageProcessor

COMMITTED = Path(__file__).parent / "golden"
INPUTS = ("input_ids", "attention_mask", "image_masks", "image_input_idx")
IMAGE_SIZES = {
    2: [(50, 37)],
    3: [(150, 100)],
    6: [(120, 60), None, (40, 40)],
    7: [(40, 40)],
    8: [(150, 100)],
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def image_by_formula(width: int, height: int) -> np.ndarray:
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    return ((x * (3 + 2 * c) + y * (5 + 4 * c) + (x * y) // (7 + c) + 13 * c) % 256).astype("uint8")


@pytest.fixture(scope="session")
def reference_image() -> Callable[[int, int], np.ndarray]:
    return image_by_formula


@pytest.fixture(scope="session")
def tiny_image_processor() -> MolmoImageProcessor:
    return MolmoImageProcessor(
        max_crops=6, overlap_margins=(2, 2), base_image_input_size=(84, 84), image_patch_size=14
    )


class Golden:
    """Cases of the reference: `case(family, n)` gives the model's inputs and the outputs."""

    def __init__(self, folder: Path, models: Path, images: Callable[[int], torch.Tensor]) -> None:
        self.folder = folder
        self.models = models
        self.images = images
        self.model = cache(self._model)

    def _model(self, family: str) -> MolmoForConditionalGeneration:
        return MolmoForConditionalGeneration.from_pretrained(self.models / family).eval()

    def cases(self, family: str) -> list[int]:
        return [n for n in range(9) if (self.folder / family / f"case_{n}.safetensors").exists()]

    def load(self, family: str, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / family / f"{name}.safetensors")

    def case(self, family: str, n: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        tensors = self.load(family, f"case_{n}")
        if n == 7 and (self.folder / family / "case_7_trainmask.safetensors").exists():
            del tensors["out_vit_features"]  # of the rule that is not followed
            for name, tensor in self.load(family, "case_7_trainmask").items():
                tensors[name.removesuffix("_trainmask")] = tensor
        inputs = {name: tensors[f"in_{name}"] for name in INPUTS if f"in_{name}" in tensors}
        if n == 0:
            inputs = {name: inputs[name] for name in INPUTS[:2]}
        else:
            inputs["pixel_values"] = self.images(n)
        outputs = {name[4:]: tensor for name, tensor in tensors.items() if name.startswith("out_")}
        return inputs, outputs

    def bfloat16_logits(self, family: str, n: int) -> torch.Tensor:
        name = f"case_{n}_bf16"
        if (self.folder / family / f"{name}_trainmask.safetensors").exists():
            name += "_trainmask"
        tensors = self.load(family, name)
        return next(tensor for key, tensor in tensors.items() if key.startswith("out_logits"))


def _drawn_weights(family: str) -> dict[str, torch.Tensor]:
    recipe = json.loads((COMMITTED / family / "weights.json").read_text())
    generator = torch.Generator().manual_seed(recipe["seed"])
    return {
        name: offset + scale * torch.randn(shape, generator=generator)
        for name, shape, offset, scale in recipe["tensors"]
    }


@pytest.fixture(scope="session")
def committed(tmp_path_factory, tiny_image_processor) -> Golden:
    models = tmp_path_factory.mktemp("molmo")
    for family in "DOE":
        (models / family).mkdir()
        shutil.copy(COMMITTED / family / "config.json", models / family)
        save_file(_drawn_weights(family), models / family / "model.safetensors")

    @cache
    def images(n: int) -> torch.Tensor:
        rows = [
            torch.empty(0, 36, 588)
            if size is None
            else tiny_image_processor.preprocess(image_by_formula(*size))["pixel_values"][0]
            for size in IMAGE_SIZES[n]
        ]
        crops = max(len(row) for row in rows)
        batch = torch.full((len(rows), crops, 36, 588), -1.0)
        for index, row in enumerate(rows):
            batch[index, : len(row)] = row
        if n == 7:
            batch[0, 1, 5, 77] = -1
        return batch

    return Golden(COMMITTED, models, images)


@pytest.fixture(scope="session", params=["committed", "full"])
def golden(request) -> Golden:
    """The committed part of the reference's numbers and, where it is there, the full set."""
    if request.param == "committed":
        return request.getfixturevalue("committed")
    folder = request.getfixturevalue("shared") / "golden" / "molmo"

    def images(n: int) -> torch.Tensor:
        return load_file(folder / "images" / f"case_{3 if n == 8 else n}.safetensors")["in_images"]

    return Golden(folder, folder, images)
