"""What an analysis needs to know of a model without its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_latency.errors import ModelError
from vlm_latency.hub import reachable, unreachable
from vlm_latency.models.components import (
    Components,
    Parameters,
    count_parameters,
    find_components,
)
from vlm_latency.models.requests import (
    Preparer,
    TokenCounts,
    image_token_id,
    offline_preparer,
    pretrained_preparer,
)
from vlm_latency.models.sizes import check_sizes
from vlm_latency.models.zoo import Family, is_path, load_zoo, weights_kind
from vlm_latency.molmo.tiling import Tiles
from vlm_latency.records import BYTES_PER_VALUE

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from vlm_latency.options import ModelOptions


class Architecture:
    """One model's architecture; everything but its name is worked out when first asked for.

    Attributes
    ----------
    name, hub_id, model_type
        `hub_id` is None for a model that is only ours.
    transformers_config
        The configuration object.
    components : Components
        Dotted paths of the parts.
    parameters : Parameters
        By component.
    trust_remote_code : bool
        Whether code of the checkpoint's own may be run.
    own_modules : bool
        Whether the modules may be others than the configuration says: a user's object, or code of
        the checkpoint's own.
    """

    simulated = False

    def __init__(
        self,
        name: str,
        config: PreTrainedConfig,
        build: Callable[[str], PreTrainedModel],
        make_preparer: Callable[[], Preparer],
        *,
        hub_id: str | None = None,
        component_overrides: Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
        own_modules: bool = False,
    ) -> None:
        self.name = name
        self.own_modules = own_modules or trust_remote_code
        self.trust_remote_code = trust_remote_code
        self.hub_id = hub_id
        self.transformers_config = config
        self.model_type: str = config.model_type
        self._build = build
        self._make_preparer = make_preparer
        self.component_overrides = component_overrides
        self._meta: dict[str, PreTrainedModel] = {}

    def __repr__(self) -> str:
        return f"Architecture({self.name!r}, model_type={self.model_type!r})"

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration as a JSON-able dict."""
        import json

        found: dict[str, Any] = json.loads(self.transformers_config.to_json_string(use_diff=False))
        return found

    @cached_property
    def _text(self) -> PreTrainedConfig:
        return self.transformers_config.get_text_config()

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return int(self._text.num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        """Width of the decoder."""
        return int(self._text.hidden_size)

    @property
    def num_heads(self) -> int:
        """Attention heads of a decoder layer."""
        return int(self._text.num_attention_heads)

    @property
    def num_kv_heads(self) -> int:
        """Key-value heads of a decoder layer."""
        return int(getattr(self._text, "num_key_value_heads", None) or self.num_heads)

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return int(getattr(self._text, "head_dim", None) or self.hidden_size // self.num_heads)

    @cached_property
    def vocab_size(self) -> int:
        """Outputs of the head."""
        head: Any = self.components.resolve(self.meta_model()).head
        return int(head.weight.shape[0])

    @property
    def max_positions(self) -> int | None:
        """Longest prompt and output together; None where the configuration names no limit."""
        found = getattr(self._text, "max_position_embeddings", None)
        return int(found) if found else None

    @property
    def tiles(self) -> Tiles | None:
        """Into which tiles an image is cut; None for a model that does not cut Molmo's tiles."""
        return self.preparer.tiles

    @property
    def nominal_tiles(self) -> Tiles:
        """`tiles`; the published Molmo's for a model without: models see the same images."""
        return self.tiles or Tiles()

    def image_size_for(self, rows: int, cols: int) -> tuple[int, int]:
        """Give the size (width, height) in pixels of an image that fills a grid of nominal tiles."""
        return self.nominal_tiles.image_size(rows, cols)

    @cached_property
    def components(self) -> Components:
        """Which module is which.

        Raises
        ------
        ModelError
            If the parts cannot be told apart.
        """
        return find_components(self.meta_model(), self.component_overrides)

    @cached_property
    def parameters(self) -> Parameters:
        """Parameters of each component."""
        return count_parameters(self.meta_model(), self.components)

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Give the bytes that one position takes in the key-value cache, over all layers."""
        values = 2 * self.num_layers * self.num_kv_heads * self.head_dim
        return values * BYTES_PER_VALUE[dtype]

    def weight_bytes(self, dtype: str) -> int:
        """Give the bytes of all parameters."""
        return self.parameters.params_total * BYTES_PER_VALUE[dtype]

    def encoder_backend(self, device: str, dtype: str) -> str | None:
        """Name the kernel that PyTorch chooses for the encoder's attention; None where unknown."""
        import torch

        from vlm_latency.models.attention import encoder_backend

        return encoder_backend(
            self.transformers_config, torch.device(device), getattr(torch, dtype)
        )

    def meta_model(self, attn_implementation: str = "sdpa") -> PreTrainedModel:
        """Build the model itself on the meta device: shapes, no numbers.

        Built once for each of ``sdpa`` and ``eager``.
        """
        if attn_implementation not in self._meta:
            self._meta[attn_implementation] = self._build(attn_implementation)
        return self._meta[attn_implementation]

    @cached_property
    def preparer(self) -> Preparer:
        """Prepares requests for this model, on the CPU.

        Raises
        ------
        ModelError
            If the family's image processor needs torchvision and it is absent.
        """
        return self._make_preparer()

    def image_tokens(self, width: int, height: int) -> TokenCounts:
        """Count what an image of this size (pixels) becomes, without text.

        ``num_total_tokens`` counts the vision tokens and the special ones around them. Molmo has a
        closed form; elsewhere the family's own processor is run on a blank image, once for each
        size, so that the answer is the processor's by construction.
        """
        return self._image_tokens(width, height)

    @cached_property
    def _image_tokens(self) -> Callable[[int, int], TokenCounts]:
        return lru_cache(maxsize=4096)(self._count_image)

    def _count_image(self, width: int, height: int) -> TokenCounts:
        if self.tiles is not None:
            return TokenCounts.of_tiles(self.tiles, width, height)
        counts = self._blank(width, height).counts
        return TokenCounts(
            num_crops=counts.num_crops,
            tiling_rows=None,
            tiling_cols=None,
            num_vision_patches=counts.num_vision_patches,
            num_vision_tokens=counts.num_vision_tokens,
            num_image_special_tokens=counts.num_image_special_tokens,
            num_total_tokens=counts.num_vision_tokens + counts.num_image_special_tokens,
        )

    def _blank(self, width: int, height: int) -> Any:
        from PIL import Image

        return self.preparer(Image.new("RGB", (width, height)), "")

    def dummy_inputs(
        self, width: int, height: int, num_text_tokens: int, device: str | torch.device = "meta"
    ) -> dict[str, torch.Tensor]:
        """Make inputs of exactly the names, shapes and types that the processor gives.

        Parameters
        ----------
        width, height
            Of the image, in pixels.
        num_text_tokens
            Tokens of the prompt besides the image's own (vision and special ones).
        device
            On ``meta``, integer tensors stay on the CPU: a model's control flow reads grids and
            placeholder ids.
        """
        import torch

        blank = self._blank(width, height)
        counts = blank.counts
        inputs: dict[str, torch.Tensor] = dict(blank.inputs)
        length = inputs["input_ids"].shape[1]
        wanted = counts.num_vision_tokens + counts.num_image_special_tokens + num_text_tokens
        token = image_token_id(self.transformers_config, self.preparer.processor)
        places = (inputs["input_ids"][0] == token).nonzero()
        behind_image = int(places.max()) + 1
        if wanted < behind_image:
            raise ModelError(
                f"{self.name}: a prompt of {num_text_tokens} text tokens is shorter than what "
                "stands before the image"
            )
        for name, value in inputs.items():
            if value.ndim == 2 and value.shape[1] == length and not value.is_floating_point():
                # The last position is ordinary text, and so is what is added.
                tail = value[:, -1:].expand(-1, max(0, wanted - length))
                inputs[name] = torch.cat([value[:, :wanted], tail], dim=1)
        on_meta = torch.device(device).type == "meta"
        return {
            name: value if on_meta and not value.is_floating_point() else value.to(device)
            for name, value in inputs.items()
        }

    def image_sizes_for_ladder(self, n: int) -> list[tuple[int, int]]:
        """List image sizes (width, height) of strictly increasing numbers of vision tokens.

        For models without Molmo's tiles. At most `n`; fewer where the model knows fewer numbers of
        tokens (LLaVA-1.5 and Gemma 3 give every image the same: one size; SmolVLM knows four).
        """
        sizes: dict[int, tuple[int, int]] = {}
        for width, height in self._ladder_candidates(n):
            tokens = self.image_tokens(width, height).num_vision_tokens
            sizes.setdefault(tokens, (width, height))
        ordered = [sizes[tokens] for tokens in sorted(sizes)]
        if len(ordered) <= n:
            return ordered
        if n == 1:
            return ordered[:1]
        return [ordered[round(k * (len(ordered) - 1) / (n - 1))] for k in range(n)]

    def _ladder_candidates(self, n: int) -> list[tuple[int, int]]:
        vision = self.transformers_config.vision_config
        merge = getattr(vision, "spatial_merge_size", None)
        if merge is not None:
            # One token per cell: squares of 8 … 36 cells, 64 … 1,296 tokens, evenly in tokens.
            cell = vision.patch_size * merge
            squares = [round((64 + (1296 - 64) * k / max(1, n - 1)) ** 0.5) for k in range(n)]
            return [(cell * side, cell * side) for side in squares]
        side = vision.image_size
        side = side if isinstance(side, int) else side[0]
        grids = [(cols, rows) for cols in range(1, 13) for rows in range(1, cols + 1)]
        return [(cols * side, rows * side) for cols, rows in grids if cols * rows <= 12]


def describe(options: ModelOptions) -> Architecture:
    """Find a model's architecture: a name of the zoo, a hub id or a local folder.

    Raises
    ------
    ModelError
        For an unknown name (with the nearest and all known ones), a folder without configuration,
        or an option that does not apply to the family.
    """
    from vlm_latency.molmo import register

    register()
    zoo = load_zoo(options.zoo_file)
    name = options.name
    overrides: Mapping[str, Any]
    processor_settings: Mapping[str, Any] = {}
    image_settings: Mapping[str, Any] = {}
    if not name:
        raise ModelError("model.name is not given: a name of the zoo, a hub id or a local folder")
    if is_path(name):
        hub_id: str | None = name
        config = _read_config(name, options)
        family = zoo.families.get(config.model_type, Family())
        overrides = family.components
    else:
        entry = zoo.find(name)
        hub_id = entry.hub_id
        config = _make_config(name, entry.config)
        family = zoo.families.get(config.model_type, Family())
        overrides = {**family.components, **entry.components}
        processor_settings, image_settings = entry.processor_settings, entry.image_settings
        if options.revision and weights_kind(options) == "random":
            raise ModelError(
                f"model.revision={options.revision} names a version of published weights, and "
                f"{name} has random ones; leave it out, or use model.weights=pretrained"
            )
        if weights_kind(options) == "pretrained":
            if hub_id is None:
                raise ModelError(f"{name} has no published weights; use model.weights=random")
            config = _read_config(hub_id, options)
    trust = options.trust_remote_code and not family.native
    _apply_options(config, options)

    def make_preparer() -> Preparer:
        if weights_kind(options) == "pretrained":
            preparer = pretrained_preparer(
                family,
                config,
                str(hub_id),
                revision=options.revision,
                trust_remote_code=trust,
            )
        else:
            preparer = offline_preparer(family, config, processor_settings, image_settings)
        if options.max_crops is not None:
            _limit_crops(preparer, options.max_crops)
        return preparer

    return Architecture(
        name,
        config,
        lambda attn: build_on_meta(config, attn, trust_remote_code=trust),
        make_preparer,
        hub_id=hub_id,
        component_overrides=overrides,
        trust_remote_code=trust,
    )


def build_on_meta(
    config: PreTrainedConfig,
    attn_implementation: str,
    dtype: torch.dtype | None = None,
    *,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Make the model on the meta device, in evaluation mode."""
    import torch
    from transformers import AutoModelForImageTextToText

    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(
                # A copy: the model keeps its configuration and writes into it.
                copy.deepcopy(config),
                dtype=dtype,
                attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code,
            )
    except Exception as error:  # a configuration is a user's file, and every family reads its own
        raise ModelError(
            f"a model of model_type {config.model_type!r} with attn_implementation="
            f"{attn_implementation} cannot be built: {_reason(error)}"
        ) from None
    return model.eval()


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text}"


def _make_config(name: str, values: Mapping[str, Any]) -> PreTrainedConfig:
    from transformers import AutoConfig

    fields = copy.deepcopy(dict(values))
    try:
        check_sizes(values)
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    except Exception as error:  # each configuration class raises kinds of its own
        raise ModelError(f"the zoo's configuration of {name} is not valid: {error}") from error


def _read_config(path: str, options: ModelOptions) -> PreTrainedConfig:
    from transformers import AutoConfig, PreTrainedConfig

    if path.startswith(("/", ".", "~")) and not Path(path).is_dir():
        raise ModelError(f"model.name: there is no folder {path}; expected one with a config.json")
    where = {"revision": options.revision}
    local = Path(path).is_dir()
    online = local or reachable()
    try:
        # A native family stays ours even where remote code is trusted.
        keys, _ = PreTrainedConfig.get_config_dict(path, **where)
        check_sizes(keys)
        family = load_zoo(options.zoo_file).families.get(str(keys.get("model_type")), Family())
        trust = options.trust_remote_code and not family.native
        return AutoConfig.from_pretrained(path, trust_remote_code=trust, **where)
    except Exception as error:  # a file of any content, read by any family's code
        if not online:
            raise ModelError(unreachable(path, "model.name")) from None
        raise ModelError(f"no usable configuration at {path}: {_reason(error)}") from None


def _apply_options(config: PreTrainedConfig, options: ModelOptions) -> None:
    if options.float32_attention is not None:
        if not hasattr(config, "float32_attention"):
            raise ModelError(
                f"model.float32_attention is for Molmo only, not for model_type "
                f"{config.model_type!r}; leave it out"
            )
        config.float32_attention = options.float32_attention
    if options.max_crops is not None and hasattr(config, "max_crops"):
        config.max_crops = options.max_crops


def _limit_crops(preparer: Preparer, max_crops: int) -> None:
    images = preparer.processor.image_processor
    if hasattr(images, "max_crops"):  # Molmo, Molmo2
        images.max_crops = max_crops
    elif hasattr(images, "max_patches"):  # InternVL
        images.max_patches = max_crops
    else:
        raise ModelError(
            f"model.max_crops does not apply to model_type {preparer.config.model_type!r}, which "
            "has no limit of that kind; leave it out"
        )
