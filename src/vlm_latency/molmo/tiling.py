"""How Molmo cuts an image into crops and how many tokens that makes: arithmetic, no pixels.

Molmo (arXiv 2409.17146, section 2) shows the vision encoder one resized view of the whole image
and a grid of overlapping square crops. Neighbouring crops share a margin, of which each crop keeps
only its own side, so that every place of the canvas becomes exactly one token.

In the published geometry (crops of 336 px, patches of 14 px, margins of 4 patches, 2 × 2 pooling)
a tiling of r × c gives ``r c + 1`` crops, ``144 + (8 r + 4)(8 c + 4)`` vision tokens and
``160 + (8 r + 4)(8 c + 5)`` image tokens with the special ones.

Every function takes the geometry as keyword arguments: ``max_crops`` (tiles at most, the global
crop not counted), ``patch_size`` and ``crop`` (pixels), ``margins`` (patches, left/top and
right/bottom).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

POOL = 2  # one token stands for a window of 2 × 2 patches

START, END, PATCH, COLUMN = range(4)  # the kinds of image token that `image_token_layout` gives


class ImageTokens(NamedTuple):
    """What one image becomes.

    Attributes
    ----------
    num_crops : crops that the encoder sees, with the global one
    tiling_rows, tiling_cols : the grid of tiles
    num_vision_tokens : positions of the prompt that carry an image feature
    num_image_special_tokens : start, end and end-of-row tokens beside them
    num_vision_patches : patches that the encoder sees, over all crops
    """

    num_crops: int
    tiling_rows: int
    tiling_cols: int
    num_vision_tokens: int
    num_image_special_tokens: int
    num_vision_patches: int


def window_size(patch_size: int = 14, crop: int = 336, margins: tuple[int, int] = (4, 4)) -> int:
    """Give the pixels by which neighbouring crops are apart: a crop less both its margins (224)."""
    return crop - sum(margins) * patch_size


def canvas_size(
    tiles: int, patch_size: int = 14, crop: int = 336, margins: tuple[int, int] = (4, 4)
) -> int:
    """Give the pixels that `tiles` overlapping crops cover along one side (224 n + 112)."""
    return tiles * window_size(patch_size, crop, margins) + sum(margins) * patch_size


@lru_cache
def _candidates(max_crops: int) -> np.ndarray:
    grids = [
        (rows, cols) for rows in range(1, max_crops + 1) for cols in range(1, max_crops // rows + 1)
    ]
    return np.array(sorted(grids, key=lambda grid: (grid[0] * grid[1], grid[0])), np.int32)


def select_tiling(
    height: int,
    width: int,
    max_crops: int = 12,
    *,
    patch_size: int = 14,
    crop: int = 336,
    margins: tuple[int, int] = (4, 4),
) -> tuple[int, int]:
    """Choose the grid of tiles for an image of this size.

    Of all grids with at most `max_crops` tiles, the one that needs the least upscaling; if every
    grid would shrink the image, the one that shrinks it least. The first in the order (tiles, rows)
    wins ties. Scales are taken in float32, as the reference does.

    Parameters
    ----------
    height, width
        The image's own size in pixels; the margins are taken off here.

    Returns
    -------
    rows, cols

    Examples
    --------
    >>> select_tiling(480, 640)
    (2, 3)
    >>> select_tiling(336, 336)
    (1, 1)
    """
    grids = _candidates(max_crops)
    margin = sum(margins) * patch_size
    inner = np.array([height - margin, width - margin], np.float32)
    # An image no larger than the margins has a scale that is negative or infinite; the reference
    # compares those like any other.
    with np.errstate(divide="ignore"):
        sizes = (grids * window_size(patch_size, crop, margins)).astype(np.float32)
        scale = (sizes / inner).min(axis=1)
    shrinks = scale < 1
    best = scale.argmax() if shrinks.all() else np.where(shrinks, np.inf, scale).argmin()
    rows, cols = grids[best].tolist()
    return rows, cols


def image_size_for_tiling(
    rows: int,
    cols: int,
    patch_size: int = 14,
    crop: int = 336,
    margins: tuple[int, int] = (4, 4),
) -> tuple[int, int]:
    """Give the (width, height) of an image that fills a grid of rows × cols tiles unscaled.

    Examples
    --------
    >>> image_size_for_tiling(2, 3)
    (784, 560)
    """
    return (
        canvas_size(cols, patch_size, crop, margins),
        canvas_size(rows, patch_size, crop, margins),
    )


def _tokens_along(pixels: int, patch_size: int) -> int:
    return -(-(pixels // patch_size) // POOL)


def image_token_counts(
    width: int,
    height: int,
    max_crops: int = 12,
    *,
    patch_size: int = 14,
    crop: int = 336,
    margins: tuple[int, int] = (4, 4),
) -> ImageTokens:
    """Count crops, tokens and patches of an image of this size (pixels).

    Examples
    --------
    >>> image_token_counts(640, 480)
    ImageTokens(num_crops=7, tiling_rows=2, tiling_cols=3, num_vision_tokens=704, \
num_image_special_tokens=36, num_vision_patches=4032)
    """
    rows, cols = select_tiling(
        height, width, max_crops, patch_size=patch_size, crop=crop, margins=margins
    )
    crops = rows * cols + 1
    side = _tokens_along(crop, patch_size)
    high = _tokens_along(canvas_size(rows, patch_size, crop, margins), patch_size)
    wide = _tokens_along(canvas_size(cols, patch_size, crop, margins), patch_size)
    return ImageTokens(
        num_crops=crops,
        tiling_rows=rows,
        tiling_cols=cols,
        num_vision_tokens=side * side + high * wide,
        num_image_special_tokens=4 + side + high,
        num_vision_patches=crops * (crop // patch_size) ** 2,
    )


@dataclass(frozen=True)
class Tiles:
    """Molmo's way of cutting images, with the geometry of one model; the published one by default."""

    max_crops: int = 12
    patch_size: int = 14
    crop: int = 336
    margins: tuple[int, int] = (4, 4)

    @property
    def _cut(self) -> dict[str, Any]:
        return {"patch_size": self.patch_size, "crop": self.crop, "margins": self.margins}

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Give rows and columns for an image of this size; see `select_tiling`."""
        return select_tiling(height, width, self.max_crops, **self._cut)

    def image_size(self, rows: int, cols: int) -> tuple[int, int]:
        """Give (width, height) of an image that fills a grid; see `image_size_for_tiling`."""
        return image_size_for_tiling(rows, cols, **self._cut)

    def image_tokens(self, width: int, height: int) -> ImageTokens:
        """Count crops, tokens and patches of an image; see `image_token_counts`."""
        return image_token_counts(width, height, self.max_crops, **self._cut)


def _canvas_places(tiles: int, patch_size: int, crop: int, margins: tuple[int, int]) -> np.ndarray:
    """(tiles, tokens per crop side): each token's place on the canvas; −1 if a neighbour has it."""
    left, right = margins
    window = crop // patch_size - left - right
    places = np.full((tiles, _tokens_along(crop, patch_size)), -1, np.int32)
    done = 0
    for tile in range(tiles):
        first = 0 if tile == 0 else left // POOL
        patches = window + (left if tile == 0 else 0) + (right if tile == tiles - 1 else 0)
        owned = -(-patches // POOL)
        places[tile, first : first + owned] = np.arange(done, done + owned)
        done += owned
    return places


@lru_cache(maxsize=256)
def image_token_layout(
    rows: int,
    cols: int,
    patch_size: int = 14,
    crop: int = 336,
    margins: tuple[int, int] = (4, 4),
) -> tuple[np.ndarray, np.ndarray]:
    """Lay out the image's part of the prompt, and where each crop's features go in it.

    The global crop comes first, then the canvas of all tiles, each row by row as
    ``START (PATCH… COLUMN)… END``.

    Returns
    -------
    kinds : int8 array (image tokens,)
        `START`, `END`, `PATCH` or `COLUMN`.
    image_input_idx : int32 array (rows · cols + 1, tokens per crop)
        Position among the image tokens that each crop's token is added to; −100 where a
        neighbouring crop has that place. The arrays are shared between calls: do not write.
    """
    side = _tokens_along(crop, patch_size)
    ys = _canvas_places(rows, patch_size, crop, margins)
    xs = _canvas_places(cols, patch_size, crop, margins)
    high, wide = int(ys.max()) + 1, int(xs.max()) + 1

    def grid(height: int, width: int) -> list[int]:
        return [START, *([PATCH] * width + [COLUMN]) * height, END]

    overview = grid(side, side)
    kinds = np.array(overview + grid(high, wide), np.int8)

    idx = np.empty((rows * cols + 1, side, side), np.int32)
    steps = np.arange(side, dtype=np.int32)
    idx[0] = 1 + steps[:, None] * (side + 1) + steps
    y, x = ys[:, None, :, None], xs[None, :, None, :]
    places = len(overview) + 1 + y * (wide + 1) + x
    idx[1:] = np.where((y >= 0) & (x >= 0), places, -100).reshape(-1, side, side)
    flat = idx.reshape(rows * cols + 1, side * side)
    kinds.flags.writeable = flat.flags.writeable = False
    return kinds, flat
