"""The shape of a request: all that its cost depends on, besides the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pandas as pd

from vlm_latency.records import COST_PARTS

# The parts that run on the device, in the order in which a request runs through them.
PARTS = COST_PARTS[:-1]


@dataclass(frozen=True)
class RequestShape:
    """One request, or many at once: every field an int, or int64 arrays of one length.

    Attributes
    ----------
    image_width, image_height : pixels; 0 without an image
    num_total_tokens : length of the prompt, image positions included
    num_vision_tokens : positions of the prompt that carry an image feature
    num_crops : crops that run through the vision encoder, the global one included
    num_vision_patches : crops × patches per crop
    num_output_tokens : tokens written, the one that prefill gives included (at least 1)
    """

    image_width: Any
    image_height: Any
    num_total_tokens: Any
    num_vision_tokens: Any
    num_crops: Any
    num_vision_patches: Any
    num_output_tokens: Any

    @classmethod
    def of_table(cls, table: pd.DataFrame) -> RequestShape:
        """Take the columns of a table, one row per request; what is missing counts as 0."""
        return cls(
            **{
                name: table[name].fillna(0).to_numpy(dtype=np.int64)
                for name in (field.name for field in fields(cls))
            }
        )

    @property
    def decode_steps(self) -> Any:
        """Decode forwards: prefill gives the first token, so N tokens take N − 1."""
        return np.maximum(np.asarray(self.num_output_tokens) - 1, 0)

    def __iter__(self) -> Iterator[RequestShape]:
        """Give the requests one by one, as ints."""
        columns = np.broadcast_arrays(*(getattr(self, field.name) for field in fields(self)))
        for values in zip(*(np.atleast_1d(column).tolist() for column in columns), strict=True):
            yield RequestShape(*values)
