"""Sizes that no model has: refused as they stand in a configuration, before anything is made of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from vlm_latency.errors import ModelError

# What a key's name ends with, and the largest number that it may hold; the first that fits counts.
# Far above what was ever published: 126 layers, 512 experts, 10,485,760 positions.
_LIMITS = tuple(
    (re.compile(name), most)
    for name, most in (
        (r"(layers?|depths?|blocks|num_crops|max_crops)$", 1_000),
        (r"(experts|image_size|height|width|max_patches)$", 16_384),
        (r"(shortest_edge|min_pixels)$", 2**18),  # to which a small image is enlarged
        (r"(image_seq_len|image_seq_length|num_image_tokens)$", 2**17),  # marks in a prompt
        (r"(vocab_size|positions?|embeddings|length|pixels|edge|theta|id|ids|tokens?)$", 2**31),
        (r"(size|dim|channels|heads|groups|d_model|d_ff)$", 2**20),
        (r"", 2**53),
    )
)
# Of an image or of its parts, pixels.
_SIDE = re.compile(r"\b(height|width|shortest_edge|max_image_size\.longest_edge)$")
_LEAST = 8  # an image in parts of one pixel each takes all memory
_PER_LAYER = re.compile(r"(layer_types|depths|layers_block_type)$")  # lists with an item per layer
_MAX_DEPTH = 20  # of dicts within dicts


def check_sizes(config: Mapping[str, Any]) -> None:
    """Refuse a configuration, of a model or its image processor, with a size that no model has.

    Raises
    ------
    ModelError
        Naming the key, its value and what is taken.
    """
    for name, value in _numbers(config, _MAX_DEPTH):
        most = next(most for pattern, most in _LIMITS if pattern.search(name))
        if value > most:
            raise ModelError(f"{name}={value:,}; expected at most {most:,}")
        if value < _LEAST and _SIDE.search(name):
            raise ModelError(f"{name}={value:,}; expected at least {_LEAST}")


def _numbers(tree: Mapping[str, Any], depth: int) -> Iterator[tuple[str, int]]:
    """Every integer with its key; the length of a list that has an item per layer as `layers`."""
    if not depth:
        raise ModelError(f"dicts within dicts, deeper than {_MAX_DEPTH}")
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{key}", size) for key, size in _numbers(value, depth - 1))
        elif isinstance(value, list):
            if _PER_LAYER.search(str(name)):
                yield f"{name}, in layers", len(value)
            yield from ((str(name), each) for each in value if type(each) is int)
        elif isinstance(value, int):
            yield str(name), value
