"""A model without work: to try the machinery around a model at any scale, without torch.

Its runs take no time, or as long as ``model.null_sleep_ms`` says.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vlm_latency.models.components import Components, Parameters
from vlm_latency.models.requests import Prepared, TokenCounts
from vlm_latency.models.zoo import NULL
from vlm_latency.molmo.tiling import Tiles

if TYPE_CHECKING:
    from types import TracebackType

    from PIL import Image

    from vlm_latency.models.interface import Meter
    from vlm_latency.options import ModelOptions


def load(options: ModelOptions) -> NullVLM:
    """Make the null model."""
    return NullVLM(options)


def describe(options: ModelOptions) -> NullArchitecture:
    """Describe the null model."""
    return NullArchitecture()


def resolve_device(options: ModelOptions) -> str:
    """Give the host, whatever device is asked for."""
    return "cpu"


def resolve_dtype(options: ModelOptions, device: str) -> str:
    """Give the type that results name; nothing is computed."""
    return "float32"


def check_fits(architecture: NullArchitecture, options: ModelOptions) -> None:
    """Accept any device: there are no weights."""


class NullArchitecture:
    """Molmo's image geometry around no parameters at all; a `ModelArchitecture`."""

    name = NULL
    model_type = "null"
    hub_id = None
    simulated = True
    config: dict[str, Any] = {}  # noqa: RUF012
    tiles = nominal_tiles = Tiles()
    components = Components("", (), "", "")
    parameters = Parameters(0, 0, None, 0, 0, 0, 0, None, None)
    num_layers = hidden_size = num_heads = num_kv_heads = head_dim = vocab_size = 0
    max_positions = 2**31

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Give zero: nothing is cached."""
        return 0

    def weight_bytes(self, dtype: str) -> int:
        """Give zero: there are no weights."""
        return 0

    def encoder_backend(self, device: str, dtype: str) -> None:
        """Give None: nothing attends."""

    def image_tokens(self, width: int, height: int) -> TokenCounts:
        """Count as a Molmo with the published geometry does."""
        return TokenCounts.of_tiles(self.tiles, width, height)

    def image_size_for(self, rows: int, cols: int) -> tuple[int, int]:
        """Give the size that a Molmo with the published geometry needs."""
        return self.tiles.image_size(rows, cols)

    def image_sizes_for_ladder(self, n: int) -> list[tuple[int, int]]:
        """Give sizes of images of one row of 1 … n tiles."""
        return [self.image_size_for(1, cols) for cols in range(1, n + 1)]


class NullVLM:
    """A `LoadedModel` without a model: it prepares nothing, and its meter sleeps."""

    device = "cpu"
    dtype = "float32"
    weights = "random"
    revision = None

    def __init__(self, options: ModelOptions) -> None:
        self.options = options
        self.architecture = NullArchitecture()

    def prepare(self, image: Image.Image, prompt: str) -> Prepared:
        """Count the request's tokens, a word being a token."""
        of_text = self.count_tokens(prompt)
        counts = TokenCounts.of_tiles(self.architecture.tiles, *image.size, of_text)
        return Prepared({}, lambda: counts)

    def place(self, prepared: Prepared) -> Prepared:
        """Give the request back: there is nothing to copy."""
        return prepared

    def decode(self, token_ids: list[int]) -> str:
        """Give one word for each token."""
        return " ".join("null" for _ in token_ids)

    def count_tokens(self, text: str) -> int:
        """Count words."""
        return len(text.split())

    def meter(self, make: Callable[[Any], Meter]) -> Meter:
        """Give what stands in for a meter of `vlm_latency.instrument`."""
        return NullMeter(self.options.null_sleep_ms)

    def set_threads(self, count: int) -> int:
        """Give the number back: there is nothing to compute."""
        return count


class NullMeter:
    """Sleeps once per run and reads how long; its tokens are zeros, as many as asked for."""

    def __init__(self, sleep_ms: float = 0.0) -> None:
        self.sleep_ms = sleep_ms

    def __enter__(self) -> NullMeter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Do nothing: there is nothing to remove."""

    def __call__(
        self, prepared: Prepared, max_new_tokens: int, stop_at_eos: bool = False
    ) -> NullReading:
        return NullReading(max_new_tokens, self._sleep())

    def bare(
        self, prepared: Prepared, max_new_tokens: int, stop_at_eos: bool = False
    ) -> tuple[float, list[int]]:
        """Give the milliseconds and tokens of an uninstrumented run."""
        return self._sleep(), [0] * max_new_tokens

    def _sleep(self) -> float:
        """The milliseconds that were slept, by the clock."""
        if not self.sleep_ms:
            return 0.0
        start = time.perf_counter_ns()
        time.sleep(self.sleep_ms / 1e3)
        return (time.perf_counter_ns() - start) / 1e6


class NullReading:
    """As `vlm_latency.instrument`'s Reading; all of the time is ``T_other``."""

    peak_memory_bytes = 0
    kv_cache_bytes = 0
    prefill_length = None

    def __init__(self, num_tokens: int, total_ms: float = 0.0) -> None:
        from vlm_latency.records import TIME_COLUMNS

        self.token_ids = [0] * num_tokens
        self.times: dict[str, Any] = {
            name: 0.0
            for name in TIME_COLUMNS
            if name != "T_preprocess" and not name.startswith("raw_")
        }
        self.times |= dict.fromkeys(("T_total", "T_total_host", "T_other"), total_ms)
        self.times["decode_step_ms"] = [0.0] * (num_tokens - 1)
        self.times["T_reduction"] = self.times["T_reduction_host"] = None
        if num_tokens < 2:
            self.times["T_per_output_token"] = None

    @property
    def timed_ms(self) -> float:
        """All that was timed."""
        return float(self.times["T_total"])
