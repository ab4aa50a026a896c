"""From one image to Molmo's overlapping crops, as flattened patches, without torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from vlm_latency.errors import UserError
from vlm_latency.molmo import tiling


class MolmoImageProcessor(BaseImageProcessor):
    """Cut an image into the global crop and a grid of overlapping tiles.

    Arguments are those of a published ``preprocessor_config.json``.

    Parameters
    ----------
    max_crops
        Tiles at most, the global crop not counted.
    overlap_margins
        Patches at the left/top and right/bottom of a crop that it shares with its neighbours.
    base_image_input_size
        Height and width of a crop in pixels, which are equal.
    image_patch_size
        Side of a patch in pixels.
    image_mean, image_std
        For normalisation of the RGB channels.
    """

    model_input_names = ["pixel_values", "image_masks", "image_input_idx"]  # noqa: RUF012

    def __init__(
        self,
        *,
        max_crops: int = 12,
        overlap_margins: Sequence[int] = (4, 4),
        base_image_input_size: Sequence[int] = (336, 336),
        image_patch_size: int = 14,
        image_mean: Sequence[float] = tuple(OPENAI_CLIP_MEAN),
        image_std: Sequence[float] = tuple(OPENAI_CLIP_STD),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.max_crops = max_crops
        self.overlap_margins = list(overlap_margins)
        self.base_image_input_size = list(base_image_input_size)
        self.image_patch_size = image_patch_size
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        if tiling.window_size(**self.geometry) <= 0:
            raise UserError(
                f"Margins of {sum(overlap_margins)} patches leave nothing of a crop of "
                f"{base_image_input_size[0] // image_patch_size} patches."
            )

    @property
    def geometry(self) -> dict[str, Any]:
        """The keyword arguments that the functions of `tiling` take."""
        return {
            "patch_size": self.image_patch_size,
            "crop": self.base_image_input_size[0],
            "margins": tuple(self.overlap_margins),
        }

    @property
    def tiles(self) -> tiling.Tiles:
        """How an image is cut, for those who count and do not cut."""
        return tiling.Tiles(max_crops=self.max_crops, **self.geometry)

    def preprocess(self, images: Any, **kwargs: Any) -> BatchFeature:
        """Crop, normalise and patch one image.

        Parameters
        ----------
        images : PIL image or uint8 array (height, width, 3), or a list of one
            Orientation tags are ignored, as in the reference.

        Returns
        -------
        BatchFeature
            ``pixel_values`` float32 (1, crops, patches, 588), values of a patch in the order
            (y, x, channel); ``image_masks`` float32 (1, crops, patches), the share of each patch
            that is image rather than padding, with the reference's shift by one crop;
            ``image_input_idx`` int64 (1, crops, tokens per crop), positions among the image tokens;
            ``image_tokens`` int8 (1, image tokens), their kinds as in
            :func:`vlm_latency.molmo.tiling.image_token_layout`.
        """
        image = _rgb(images)
        height, width = image.shape[:2]
        rows, cols = tiling.select_tiling(height, width, self.max_crops, **self.geometry)
        kinds, idx = tiling.image_token_layout(rows, cols, **self.geometry)
        crop, patch = self.base_image_input_size[0], self.image_patch_size
        side = crop // patch
        window = tiling.window_size(**self.geometry)

        # (channels, height, width) as a view of the pixels as they lie: channels last.
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float().div_(255)
        overview, _, _ = self._resize_and_pad(pixels, crop, crop)
        canvas_height = tiling.canvas_size(rows, **self.geometry)
        canvas_width = tiling.canvas_size(cols, **self.geometry)
        canvas, high, wide = self._resize_and_pad(pixels, canvas_height, canvas_width)

        values = torch.empty(rows * cols + 1, side, side, patch, patch, 3)
        values[0] = _patches(overview, patch)
        tiles = canvas.unfold(0, crop, window).unfold(1, crop, window)
        for index, tile in enumerate(tiles.permute(0, 1, 3, 4, 2).flatten(0, 1).unbind()):
            values[1 + index] = _patches(tile, patch)

        masks = torch.full((rows * cols + 1, side * side), -1.0)
        covered = _covered(canvas_height, high, patch)[:, None] * _covered(
            canvas_width, wide, patch
        )
        share = covered.float() / patch**2
        step = window // patch
        masks[:-1] = share.unfold(0, side, step).unfold(1, side, step).reshape(-1, side * side)

        return BatchFeature(
            {
                "pixel_values": values.view(1, rows * cols + 1, side * side, patch * patch * 3),
                "image_masks": masks[None],
                "image_input_idx": torch.from_numpy(idx.astype(np.int64))[None],
                "image_tokens": torch.from_numpy(kinds.copy())[None],
            }
        )

    def _resize_and_pad(
        self, pixels: torch.Tensor, height: int, width: int
    ) -> tuple[torch.Tensor, tuple[int, int], tuple[int, int]]:
        """Normalised canvas (height, width, 3), and from where to where the image lies in it."""
        own = np.array(pixels.shape[-2:], np.float32)
        # Truncated in float32, as in training; a very thin image keeps one pixel.
        scale = (np.array([height, width], np.float32) / own).min()
        new_height, new_width = np.maximum((own * scale).astype(int), 1).tolist()
        resized = torch.nn.functional.interpolate(
            pixels, (new_height, new_width), mode="bilinear", align_corners=False, antialias=True
        )[0].clamp_(0, 1)
        mean, std = torch.tensor(self.image_mean), torch.tensor(self.image_std)
        top, left = (height - new_height) // 2, (width - new_width) // 2
        canvas = (-mean / std).expand(height, width, 3).contiguous()
        inside = canvas[top : top + new_height, left : left + new_width]
        torch.sub(resized.permute(1, 2, 0), mean, out=inside).div_(std)
        return canvas, (top, top + new_height), (left, left + new_width)


def _rgb(images: Any) -> np.ndarray:
    if isinstance(images, list | tuple):
        if len(images) != 1:
            raise UserError(f"Molmo takes one image per request, not {len(images)}.")
        images = images[0]
    if isinstance(images, Image.Image):
        return np.array(images.convert("RGB"))
    array = np.asarray(images)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise UserError(
            f"Expected a PIL image or a uint8 array (height, width, 3), found {array.dtype} "
            f"{array.shape}."
        )
    return array


def _patches(crop: torch.Tensor, patch: int) -> torch.Tensor:
    """(height, width, 3) as (rows, columns, y, x, 3)."""
    return crop.unflatten(1, (-1, patch)).unflatten(0, (-1, patch)).transpose(1, 2)


def _covered(length: int, span: tuple[int, int], patch: int) -> torch.Tensor:
    """Pixels of each patch along one side that lie in the span."""
    starts = torch.arange(0, length, patch)
    return ((starts + patch).clamp(max=span[1]) - starts.clamp(min=span[0])).clamp(min=0)
