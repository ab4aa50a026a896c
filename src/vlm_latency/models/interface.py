"""What every part of the project may ask of a model, whichever kind of model it is.

Three things carry the word *model*: transformers' model (modules and weights); a `LoadedModel`,
which prepares requests for it and can be measured; and a `ModelHandle`, which knows its options and
loads it when it is first run. `LoadedModel` is written here once. Behind it stand `VLM` (any
image-text-to-text model of transformers) and `NullVLM` (no weights, no torch).
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from PIL import Image

    from vlm_latency.models.components import Components, Parameters
    from vlm_latency.models.requests import Prepared, TokenCounts
    from vlm_latency.molmo.tiling import Tiles
    from vlm_latency.options import ModelOptions


class Reading(Protocol):
    """What one request took; see `vlm_latency.instrument.meter.Reading`."""

    times: dict[str, Any]
    token_ids: list[int]
    peak_memory_bytes: int | None
    kv_cache_bytes: int | None
    timed_ms: float
    prefill_length: int | None


class Meter(Protocol):
    """Runs and times one request at a time; a context manager that ends with `close`."""

    def __enter__(self) -> Meter: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def close(self) -> None:
        """Take everything off the model again."""

    def __call__(self, prepared: Any, max_new_tokens: int, stop_at_eos: bool = False) -> Any:
        """Measure one request: a `Reading`."""

    def bare(
        self, prepared: Any, max_new_tokens: int, stop_at_eos: bool = False
    ) -> tuple[float, list[int]]:
        """Give the milliseconds and tokens of one request without any instrument."""


class ModelArchitecture(Protocol):
    """What an analysis needs to know of a model without its weights.

    Attributes
    ----------
    name, model_type, hub_id
        `hub_id` is None for a model that is not published.
    config
        The configuration as a JSON-able dict.
    components, parameters
        Which module is which, and the parameters of each.
    max_positions
        Longest prompt and output together; None where the model has no limit.
    tiles, nominal_tiles
        Into which tiles an image is cut; None for a model that does not cut tiles, whose nominal
        tiles are the published Molmo's, so that models can be compared on the same images.
    simulated
        Whether there is no work behind it: nothing to count, no machine's limits to compare with.
    """

    name: str
    model_type: str
    hub_id: str | None
    simulated: bool

    @property
    def config(self) -> dict[str, Any]: ...

    @property
    def components(self) -> Components: ...

    @property
    def parameters(self) -> Parameters: ...

    @property
    def max_positions(self) -> int | None: ...

    @property
    def tiles(self) -> Tiles | None: ...

    @property
    def nominal_tiles(self) -> Tiles: ...

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Give the bytes of one position in the key-value cache, over all layers."""

    def weight_bytes(self, dtype: str) -> int:
        """Give the bytes of all parameters."""

    def encoder_backend(self, device: str, dtype: str) -> str | None:
        """Name the kernel that PyTorch chooses for the encoder's attention; None where unknown."""

    def image_tokens(self, width: int, height: int) -> TokenCounts:
        """Count what an image of this size (pixels) becomes, without text."""

    def image_sizes_for_ladder(self, n: int) -> list[tuple[int, int]]:
        """Give at most `n` image sizes of strictly increasing numbers of vision tokens."""

    def image_size_for(self, rows: int, cols: int) -> tuple[int, int]:
        """Give the size (width, height) in pixels of an image that fills a grid of nominal tiles."""


class LoadedModel(Protocol):
    """A model that can be measured.

    Attributes
    ----------
    options
        As it was asked for.
    architecture
        What is known of it without weights.
    device, dtype
        Where it runs and what it computes in; ``str()`` of them is what records hold.
    weights
        ``pretrained``, ``random``, or ``own`` for a user's object.
    revision
        Commit of a checkpoint from the hub; None elsewhere.
    """

    options: ModelOptions
    device: Any
    dtype: Any
    weights: str
    revision: str | None

    @property
    def architecture(self) -> ModelArchitecture: ...

    def prepare(self, image: Image.Image, prompt: str, **reduced: Any) -> Prepared:
        """Tile, normalise and tokenise one request on the CPU.

        `reduced` is the request's ``method`` and ``keep``, which only a model wrapped for
        `vlm_latency.reduction` takes.
        """

    def place(self, prepared: Prepared) -> Prepared:
        """Copy a request's inputs to the device, and wait for them."""

    def count_tokens(self, text: str) -> int:
        """Count the tokens of a text by itself."""

    def decode(self, token_ids: list[int]) -> str:
        """Give the text of output tokens, without special ones."""

    def meter(self, make: Callable[[Any], Meter]) -> Meter:
        """Give what measures this model.

        Parameters
        ----------
        make
            Makes a meter of `vlm_latency.instrument` for a model of transformers; one that is
            simulated has its own and does not call it.
        """

    def set_threads(self, count: int) -> int:
        """Compute with so many CPU threads from now on, and give the number before."""
