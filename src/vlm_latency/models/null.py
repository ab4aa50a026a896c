"""A model that takes no time: to try the machinery around a model at any scale, without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlm_latency.models.components import Components, Parameters
from vlm_latency.models.requests import Prepared, TokenCounts
from vlm_latency.models.zoo import NULL
from vlm_latency.molmo.tiling import image_token_counts

if TYPE_CHECKING:
    from PIL import Image

    from vlm_latency.options import ModelOptions


class NullArchitecture:
    """Molmo's image geometry around no parameters at all; as `Architecture`."""

    name = NULL
    model_type = "null"
    hub_id = None
    config: dict[str, Any] = {}  # noqa: RUF012
    tiling: dict[str, Any] = {  # noqa: RUF012
        "max_crops": 12,
        "patch_size": 14,
        "crop": 336,
        "margins": (4, 4),
    }
    components = Components("", (), "", "")
    parameters = Parameters(0, 0, None, 0, 0, 0, 0, None, None)
    num_layers = hidden_size = num_heads = num_kv_heads = head_dim = vocab_size = 0
    max_positions = 2**31

    def kv_bytes_per_token(self, dtype: str) -> int:
        """None at all."""
        return 0

    def weight_bytes(self, dtype: str) -> int:
        """None at all."""
        return 0

    def image_tokens(self, width: int, height: int) -> TokenCounts:
        """As a Molmo with the published geometry."""
        found = image_token_counts(width, height, **self.tiling)
        return TokenCounts(
            **found._asdict(),
            num_total_tokens=found.num_vision_tokens + found.num_image_special_tokens,
        )


class NullVLM:
    """As `VLM`; it prepares nothing, and its meter reads zero milliseconds."""

    model = None
    components = None
    device = "cpu"
    dtype = "float32"
    weights = "random"
    revision = None

    def __init__(self, options: ModelOptions) -> None:
        self.options = options
        self.architecture = NullArchitecture()

    def prepare(self, image: Image.Image, prompt: str) -> Prepared:
        """Count the request's tokens, a word being a token."""
        of_image = self.architecture.image_tokens(*image.size)
        counts = TokenCounts(
            **{
                **vars(of_image),
                "num_total_tokens": of_image.num_total_tokens + self.count_tokens(prompt),
            }
        )
        return Prepared({}, lambda: counts)

    def place(self, prepared: Prepared) -> Prepared:
        """There is nothing to copy."""
        return prepared

    def decode(self, token_ids: list[int]) -> str:
        """A word for each token."""
        return " ".join("null" for _ in token_ids)

    def count_tokens(self, text: str) -> int:
        """Words."""
        return len(text.split())

    def meter(self) -> NullMeter:
        """What stands in for a meter of `vlm_latency.instrument`."""
        return NullMeter()


class NullMeter:
    """Every time is zero; the tokens are zeros, as many as asked for."""

    def __enter__(self) -> NullMeter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """There is nothing to remove."""

    def __call__(
        self, prepared: Prepared, max_new_tokens: int, stop_at_eos: bool = False
    ) -> NullReading:
        return NullReading(max_new_tokens)

    def bare(
        self, prepared: Prepared, max_new_tokens: int, stop_at_eos: bool = False
    ) -> tuple[float, list[int]]:
        """Milliseconds and tokens of an uninstrumented run."""
        return 0.0, [0] * max_new_tokens


class NullReading:
    """As `vlm_latency.instrument`'s Reading."""

    peak_memory_bytes = 0
    kv_cache_bytes = 0

    def __init__(self, num_tokens: int) -> None:
        from vlm_latency.records import TIME_COLUMNS

        self.token_ids = [0] * num_tokens
        self.times: dict[str, float | list[float] | None] = {
            name: 0.0
            for name in TIME_COLUMNS
            if name != "T_preprocess" and not name.startswith("raw_")
        }
        self.times["decode_step_ms"] = [0.0] * (num_tokens - 1)
        if num_tokens < 2:
            self.times["T_per_output_token"] = None
