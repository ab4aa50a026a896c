"""Images of requests: safe files, synthetic photos and recipes; bytes first, decoding apart.

``image_bytes`` gives the encoded JPEG (or whatever the file holds) and stays outside what is
timed; ``decode_image`` turns the bytes into pixels and is part of ``T_preprocess``.

A recipe is a small JSON object: ``{"kind": "noise", "seed": s, "width": w, "height": h}`` makes a
synthetic photo; ``{"kind": "resize", "width": w, "height": h}`` beside an image path cuts the
file's image to that shape and scales it to that size.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image, ImageOps

from vlm_latency.errors import DataError

# Formats that Pillow decodes by itself: EPS, for one, would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
_QUALITY = 90
MAX_SIDE = 16_384  # pixels, of an image made or resized by a recipe


def noise_recipe(seed: int, width: int, height: int) -> str:
    """Write the recipe of a synthetic photo of ``width`` × ``height`` pixels, as JSON."""
    return f'{{"kind": "noise", "seed": {seed}, "width": {width}, "height": {height}}}'


def at_size(recipe: str | None, width: int, height: int) -> str:
    """Write the recipe of the same image at ``width`` × ``height`` pixels.

    A file's image (no recipe) is cut and scaled, a synthetic one is made anew from its seed.
    """
    if recipe is None or pd.isna(recipe):
        return f'{{"kind": "resize", "width": {width}, "height": {height}}}'
    seed, _, _ = _parse(recipe, "noise", "seed", "width", "height")
    return noise_recipe(seed, width, height)


def check_relative(path: str) -> None:
    """Refuse a path that leads out of the dataset's folder.

    Links inside the folder are the user's own (``val2014`` often is one) and are followed.

    Raises
    ------
    DataError
        When the path is empty, absolute or contains ``..``.
    """
    posix, windows = PurePosixPath(path), PureWindowsPath(path)
    outside = posix.is_absolute() or windows.drive or windows.root or ".." in windows.parts
    if not posix.parts or outside or "\0" in path:
        raise DataError(
            f"image path {path!r} leads out of the dataset's folder; expected a path inside it"
        )


def decode_image(data: bytes) -> Image.Image:
    """Decode an encoded image into an RGB image (orientation tags are not applied).

    Sixteen bits become eight by their share of the whole range; of several pictures in one file the
    first is taken; what is transparent keeps its colour, as the models' own processors do.

    Raises
    ------
    DataError
        When the bytes are truncated, corrupt, of an unknown format, hold more pixels than
        Pillow's limit (``PIL.Image.MAX_IMAGE_PIXELS``), or numbers without a known range.
    """
    with _opened(data) as image:
        return _eight_bits(image).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """An image of at most eight bits a channel."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise DataError(
                f"its values are numbers from {values.min():g} to {values.max():g} (mode {image.mode}), "
                "whose white is not known; save it with 8 or 16 bits a channel"
            )
        return Image.fromarray(np.rint(values / 257).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA")
    return image


def image_size(source: Path | bytes) -> tuple[int, int]:
    """Read width and height in pixels from the header of a file or of its bytes.

    Raises
    ------
    DataError
        When the file is missing or its header cannot be read.
    """
    if isinstance(source, Path):
        with _readable(source), _opened(source) as image:
            return image.size
    with _opened(source) as image:
        return image.size


def image_bytes(row: Mapping[str, Any] | pd.Series, root: Path | str | None) -> bytes:
    """Read the encoded image of a request from its file, or make it by its recipe.

    Parameters
    ----------
    row
        A request or question: ``image_path``, ``image_recipe`` and, where present,
        ``image_sha256`` (the file must still have it) are used.
    root
        The folder that ``image_path`` is relative to; not needed by synthetic images.

    Raises
    ------
    DataError
        When the file is missing, unreadable, outside ``root`` or another than was drawn, or the
        recipe is not one.
    """
    path, recipe = _text(row, "image_path"), _text(row, "image_recipe")
    if path is None and recipe is None:
        raise DataError("this request has neither an image_path nor an image_recipe")
    if path is None:
        return _from_recipe(recipe or "")
    if root is None:
        raise DataError(f"image {path!r} is relative to the dataset's folder, which is not given")
    data = read_file(Path(root), path)
    expected = _text(row, "image_sha256")
    if expected is not None and sha256(data) != expected:
        raise DataError(f"image {path} is not the file that was drawn (its sha256 differs)")
    return data if recipe is None else _resized(data, recipe)


def read_file(root: Path, path: str) -> bytes:
    """Read the bytes of the file at ``path`` inside ``root``.

    Raises
    ------
    DataError
        When the path leads out of ``root``, or the file is missing or unreadable.
    """
    check_relative(path)
    with _readable(root / path):
        return (root / path).read_bytes()


def sha256(data: bytes) -> str:
    """Compute the SHA-256 of an encoded image, as hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


@contextmanager
def _opened(source: Path | bytes) -> Iterator[Image.Image]:
    """Pillow's image with every way in which its decoders fail turned into ``DataError``."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            file = io.BytesIO(source) if isinstance(source, bytes) else source
            with Image.open(file, formats=FORMATS) as image:
                yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"image refused as a decompression bomb: {error}") from error
    except (MemoryError, DataError):
        raise
    except Exception as error:  # decoders raise all sorts: OSError, SyntaxError, struct.error, …
        name = f" {source.name}" if isinstance(source, Path) else ""
        # Pillow names the buffer by its address, which would make every failure another one.
        reason = re.sub(r" <_io\.BytesIO object at \w+>", "", str(error)) or type(error).__name__
        raise DataError(f"image{name} cannot be decoded: {reason}") from error


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        if not path.is_file():
            raise DataError(f"image {path} is missing")
        yield
    except OSError as error:
        raise DataError(f"image {path} cannot be read: {error.strerror or error}") from error


def _text(row: Mapping[str, Any] | pd.Series, column: str) -> str | None:
    value = row.get(column)
    return None if value is None or pd.isna(value) else str(value)


def _parse(recipe: str, kind: str, *keys: str) -> list[int]:
    """The recipe's numbers by key; a table of requests can come from anywhere."""
    try:
        parsed = json.loads(recipe)
        values = [parsed[key] for key in keys]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"image recipe {recipe[:200]!r} is not a {kind} recipe") from error
    width, height = values[-2:]
    integers = all(type(value) is int and value >= 0 for value in values)
    if parsed.get("kind") != kind or not integers or min(width, height) < 1:
        raise DataError(f"image recipe {recipe[:200]!r} is not a {kind} recipe")
    if max(width, height) > MAX_SIDE or width * height > (Image.MAX_IMAGE_PIXELS or 0):
        raise DataError(f"image recipe asks for {width}×{height} pixels, more than is decoded")
    return values


def _encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


def _resized(data: bytes, recipe: str) -> bytes:
    width, height = _parse(recipe, "resize", "width", "height")
    return _encoded(ImageOps.fit(decode_image(data), (width, height), Image.Resampling.BICUBIC))


def _from_recipe(recipe: str) -> bytes:
    """Noise at several scales, smooth areas and grain: some 0.15 MB at 640×480, as in COCO.

    It is drawn while nothing is timed, but a study waits for it: all but the grain is made at a
    quarter of the size.
    """
    seed, width, height = _parse(recipe, "noise", "seed", "width", "height")
    bits = np.random.PCG64(seed)

    def parts(cell: int) -> tuple[int, int]:
        return -(-width // cell), -(-height // cell)

    image = Image.new("RGB", parts(4), (128, 128, 128))
    for cell, share in ((160, 0.9), (40, 0.45), (12, 0.3), (4, 0.16)):
        layer = _noise(bits, *parts(cell)).resize(image.size, Image.Resampling.BILINEAR)
        image = Image.blend(image, layer, share)
    image = image.resize(parts(2), Image.Resampling.BILINEAR)
    image = image.resize((width, height), Image.Resampling.NEAREST)
    return _encoded(Image.blend(image, _noise(bits, width, height), 0.22))


def _noise(bits: np.random.PCG64, width: int, height: int) -> Image.Image:
    count = width * height * 3
    words = bits.random_raw(-(-count // 8)).astype("<u8")
    return Image.frombytes("RGB", (width, height), words.tobytes()[:count])
