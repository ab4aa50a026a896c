from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_latency.errors import UserError
from vlm_latency.molmo import MolmoImageProcessor

REFERENCE = json.loads((Path(__file__).parent / "golden" / "preprocess.json").read_text())


@pytest.mark.parametrize(
    "case",
    [case for case in REFERENCE["sizes"] if "samples" in case],
    ids=lambda case: "x".join(map(str, case["size"])),
)
def test_equals_the_reference(case, reference_image):
    width, height = case["size"]
    output = MolmoImageProcessor().preprocess(Image.fromarray(reference_image(width, height)))
    masks = output["image_masks"][0].numpy()
    assert hashlib.sha256(masks.tobytes()).hexdigest()[:12] == case["sha"][2]
    assert output["pixel_values"].dtype == torch.float32
    patches, values = zip(*REFERENCE["sample_positions"], strict=True)
    found = output["pixel_values"][0][:, list(patches), list(values)].numpy()
    np.testing.assert_allclose(found, case["samples"], atol=1e-5)


def test_equals_the_full_reference(shared, reference_image, tiny_image_processor):
    arrays = np.load(shared / "golden" / "molmo" / "preprocess_arrays.npz")
    names = [name.removesuffix("_crops") for name in arrays.files if name.endswith("x37_crops")]
    names += [name.removesuffix("_crops") for name in arrays.files if name.startswith("tiny_")]
    for name in {name for name in names if name.count("_") == 1}:
        size = tuple(map(int, name.split("_")[1].split("x")))
        output = tiny_image_processor.preprocess(reference_image(*size))
        crops = arrays[f"{name}_crops"]
        atol = 1e-5 if crops.dtype == np.float32 else 1e-3
        np.testing.assert_allclose(output["pixel_values"][0].numpy(), crops, atol=atol)
        assert (output["image_masks"][0].numpy() == arrays[f"{name}_image_masks"]).all()
        assert (output["image_input_idx"][0].numpy() == arrays[f"{name}_image_input_idx"]).all()
    strip = arrays["real_640x480_crops_first_row_of_patches_float32"]
    output = MolmoImageProcessor().preprocess(reference_image(640, 480))
    np.testing.assert_allclose(output["pixel_values"][0, :, ::97].numpy(), strip, atol=1e-5)


def test_all_masks_equal_the_full_reference(shared, reference_image):
    cases = json.loads((shared / "golden" / "molmo" / "preprocess.json").read_text())["sizes"]
    for case in [case for case in cases if not case.get("error")]:
        small = case["w"] * case["h"] < 300_000
        size = (case["w"], case["h"])
        # Masks depend on the size alone.
        image = reference_image(*size) if small else np.zeros((*size[::-1], 3), np.uint8)
        output = MolmoImageProcessor().preprocess(image)
        masks = output["image_masks"][0].numpy()
        assert hashlib.sha256(masks.tobytes()).hexdigest() == case["mask_sha256_float32"]
        if small:
            means = output["pixel_values"][0].mean((1, 2)).numpy()
            np.testing.assert_allclose(means, case["crop_mean"], atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1000), (1000, 1)])
def test_a_thin_image_keeps_one_pixel(size, reference_image):
    output = MolmoImageProcessor().preprocess(reference_image(*size))
    assert output["pixel_values"].shape == (1, 2, 576, 588)
    assert output["pixel_values"].isfinite().all()
    # A line of one pixel through 24 patches of the first crop.
    covered = output["image_masks"][0, 0]
    assert (covered > 0).sum() == 24
    assert covered.max() == pytest.approx(14 / 196)


def test_refuses_margins_without_a_window():
    with pytest.raises(UserError, match="8 patches leave nothing of a crop of 6"):
        MolmoImageProcessor(base_image_input_size=(84, 84))


def test_inputs_it_takes(reference_image):
    array = reference_image(60, 40)
    processor = MolmoImageProcessor()
    expected = processor.preprocess(array)["pixel_values"]
    assert torch.equal(processor.preprocess([Image.fromarray(array)])["pixel_values"], expected)
    gray = Image.fromarray(array[..., 0])
    rgb = Image.fromarray(array[..., [0, 0, 0]])
    assert torch.equal(
        processor.preprocess(gray)["pixel_values"], processor.preprocess(rgb)["pixel_values"]
    )
    with pytest.raises(UserError, match="one image per request, not 2"):
        processor.preprocess([array, array])
    with pytest.raises(UserError, match="uint8 array"):
        processor.preprocess(array.astype(np.float32))
