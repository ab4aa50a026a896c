"""Image bytes from files and recipes, and every way in which an image can be refused."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm_latency.errors import DataError
from vlm_latency.vqa import decode_image, image_bytes
from vlm_latency.vqa.images import at_size, check_relative, image_size, noise_recipe, sha256

JPEG = image_bytes({"image_recipe": noise_recipe(1, 64, 48)}, None)


def test_synthetic_image_is_a_jpeg_like_cocos() -> None:
    row = {"image_path": None, "image_recipe": noise_recipe(3, 640, 480)}
    data = image_bytes(row, None)
    assert data == image_bytes(row, None)
    assert data != image_bytes({"image_recipe": noise_recipe(4, 640, 480)}, None)
    assert 0.12e6 < len(data) < 0.22e6  # COCO's photos of this size: 0.16 MB
    image = decode_image(data)
    assert image.format is None
    assert (image.mode, image.size) == ("RGB", (640, 480))
    # Photo-like: neighbouring pixels are alike, distant areas are not.
    pixels = np.asarray(image, float)
    step = np.abs(np.diff(pixels, axis=1)).mean()
    spread = pixels.std()
    assert step < 0.6 * spread


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "RGB"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    buffer = io.BytesIO()
    Image.new(mode, (5, 4)).save(buffer, "TIFF" if mode == "CMYK" else "PNG")
    assert decode_image(buffer.getvalue()).mode == "RGB"


def test_file_is_read_and_its_hash_checked(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(JPEG)
    row = {"image_path": "a.jpg", "image_sha256": sha256(JPEG), "image_recipe": None}
    assert image_bytes(row, tmp_path) == JPEG
    assert decode_image(image_bytes(row, tmp_path)).size == (64, 48)
    assert image_size(tmp_path / "a.jpg") == image_size(JPEG) == (64, 48)
    with pytest.raises(DataError, match="not the file that was drawn"):
        image_bytes(row | {"image_sha256": "0" * 64}, tmp_path)


def test_resize_recipe_wraps_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(JPEG)
    row = {"image_path": "a.jpg", "image_recipe": at_size(None, 784, 560)}
    assert decode_image(image_bytes(row, tmp_path)).size == (784, 560)
    assert at_size(noise_recipe(7, 10, 20), 30, 40) == noise_recipe(7, 30, 40)


@pytest.mark.parametrize(
    "path",
    [
        "../../x.jpg",
        "a/../../x.jpg",
        "/etc/passwd",
        "..",
        "",
        "..\\x.jpg",
        "C:\\x.jpg",
        "\\x",
        "a\0b",
    ],
)
def test_paths_out_of_the_folder_are_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="leads out"):
        check_relative(path)
    with pytest.raises(DataError, match="leads out"):
        image_bytes({"image_path": path}, tmp_path)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing"):
        image_bytes({"image_path": "no.jpg"}, tmp_path)
    with pytest.raises(DataError, match="missing"):
        image_size(tmp_path / "no.jpg")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")  # reading one would wait for ever
    for name in ("folder.jpg", "pipe.jpg"):
        with pytest.raises(DataError, match="missing"):
            image_bytes({"image_path": name}, tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        image_bytes({"image_path": "x" * 5000}, tmp_path)
    with pytest.raises(DataError, match="not given"):
        image_bytes({"image_path": "a.jpg"}, None)
    with pytest.raises(DataError, match="neither"):
        image_bytes({}, tmp_path)


@pytest.mark.parametrize("data", [b"", b"no image", JPEG[: len(JPEG) // 2], JPEG[:30]])
def test_corrupt_images_are_data_errors(data: bytes) -> None:
    with pytest.raises(DataError, match="cannot be decoded"):
        decode_image(data)


def test_formats_that_start_other_programs_are_refused() -> None:
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n"
    with pytest.raises(DataError, match="cannot be decoded"):
        decode_image(eps)


@pytest.mark.parametrize("limit", [64 * 48 - 1, 64 * 48 // 2 - 1])  # Pillow's warning, its error
def test_decompression_bombs_are_refused(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(DataError, match="decompression bomb"):
        decode_image(JPEG)
    with pytest.raises(DataError, match="decompression bomb"):
        image_size(JPEG)


@pytest.mark.parametrize(
    "recipe",
    [
        "",
        "3",
        "[]",
        "{}",
        '{"kind": "noise", "seed": 1, "width": 0, "height": 5}',
        '{"kind": "noise", "seed": -1, "width": 5, "height": 5}',
        '{"kind": "noise", "seed": 1, "width": "5", "height": 5}',
        '{"kind": "other", "seed": 1, "width": 5, "height": 5}',
        '{"kind": "noise", "seed": 1, "width": 16000, "height": 16000}',
        '{"kind": "noise", "seed": 1, "width": 99999, "height": 1}',
    ],
)
def test_bad_recipes_are_data_errors(recipe: str) -> None:
    with pytest.raises(DataError, match="recipe"):
        image_bytes({"image_recipe": recipe}, None)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_bytes_decode_or_are_data_errors(data: st.DataObject) -> None:
    damaged = bytearray(JPEG)
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(DataError):
        assert decode_image(bytes(damaged)).mode == "RGB"


def _encoded_as(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_become_eight_by_their_share(kind: str) -> None:
    ramp = np.linspace(0, 65535, 1024).round().astype(np.uint16).reshape(4, 256)
    pixels = np.asarray(decode_image(_encoded_as(Image.fromarray(ramp), kind)))
    assert pixels.shape == (4, 256, 3)
    assert abs(pixels.mean() - 127.5) < 0.1
    assert len(np.unique(pixels)) == 256
    assert (pixels[0, 0, 0], pixels[-1, -1, 0]) == (0, 255)


def test_numbers_without_a_known_white_are_refused() -> None:
    data = _encoded_as(
        Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)), "TIFF"
    )
    with pytest.raises(DataError, match=r"from 0 to 1 \(mode F\), whose white is not known"):
        decode_image(data)


def test_other_kinds_of_pictures_have_their_colours() -> None:
    red = decode_image(_encoded_as(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    assert np.abs(np.asarray(red)[0, 0].astype(int) - (254, 0, 0)).max() <= 3
    palette = Image.new("P", (4, 2))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    shown = np.asarray(decode_image(_encoded_as(palette, "PNG", transparency=1)))
    assert shown[0, 0].tolist() == [10, 20, 30] and shown[0, 1].tolist() == [40, 50, 60]
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    moving = _encoded_as(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(decode_image(moving))[0, 0].tolist() == [255, 0, 0]
