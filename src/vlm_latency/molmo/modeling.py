"""Molmo v1 in PyTorch, composed of the CLIP, Qwen2, OLMo 2 and OLMoE layers of transformers.

Our own are the connector (padding vectors, 2 × 2 attention pooling, gated projector), the merge
and the float32 attention. Molmo and PixMo, arXiv 2409.17146, section 2.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPooling,
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import (
    CLIPAttention,
    CLIPEncoderLayer,
    eager_attention_forward,
)
from transformers.utils.generic import can_return_tuple

from vlm_latency.errors import UserError
from vlm_latency.molmo import checkpoint
from vlm_latency.molmo.configuration import MolmoConfig
from vlm_latency.molmo.tiling import POOL


@dataclasses.dataclass
class MolmoModelOutputWithPast(MoeModelOutputWithPast):
    """The decoder's output and, where an image came in, the connector's.

    ``image_hidden_states``: (batch, crops, tokens per crop, hidden size).
    """

    image_hidden_states: torch.Tensor | None = None


@dataclasses.dataclass
class MolmoCausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    """`MolmoModelOutputWithPast` with the head's ``logits``."""

    image_hidden_states: torch.Tensor | None = None


class MolmoAttention(CLIPAttention):
    """CLIP's attention with queries of their own, in float32 if so configured.

    `key_value_states` defaults to `hidden_states`. Without the upcast it runs through the chosen
    implementation; with it through SDPA where that one takes no float32 (flash attention).
    """

    def __init__(self, config: MolmoConfig, input_size: int | None = None) -> None:
        super().__init__(config.vision_config)
        self.float32 = config.float32_attention
        if input_size is not None:
            self.q_proj = nn.Linear(input_size, self.embed_dim)
            self.k_proj = nn.Linear(input_size, self.embed_dim)
            self.v_proj = nn.Linear(input_size, self.embed_dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        key_value_states: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if key_value_states is None:
            key_value_states = hidden_states
        heads = [
            projection(states).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for projection, states in (
                (self.q_proj, hidden_states),
                (self.k_proj, key_value_states),
                (self.v_proj, key_value_states),
            )
        ]
        implementation = self.config._attn_implementation
        dtype = heads[0].dtype
        if self.float32:
            heads = [states.float() for states in heads]
            if "flash" in implementation:
                implementation = "sdpa"
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, weights = attend(self, *heads, attention_mask, scaling=self.scale, **kwargs)
        return self.out_proj(output.flatten(2).to(dtype)), weights


class MolmoVisionLayer(CLIPEncoderLayer):
    """CLIP's pre-norm block with `MolmoAttention`."""

    def __init__(self, config: MolmoConfig) -> None:
        super().__init__(config.vision_config)
        self.self_attn = MolmoAttention(config)


class MolmoPreTrainedModel(PreTrainedModel):
    """What all parts share: loading, saving, initialisation."""

    config: MolmoConfig
    config_class = MolmoConfig
    base_model_prefix = "model"
    input_modalities: Any = ("image", "text")
    _no_split_modules = [  # noqa: RUF012 (the base class's convention)
        "MolmoVisionLayer",
        "MolmoConnector",
        "Qwen2DecoderLayer",
        "Olmo2DecoderLayer",
        "OlmoeDecoderLayer",
    ]
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.get_text_config().initializer_range
        if isinstance(module, MolmoVisionModel):
            init.normal_(module.class_embedding, std=std)
            init.normal_(module.position_embedding, std=std)
        elif isinstance(module, MolmoConnector):
            init.normal_(module.pad_embed, std=std)

    @staticmethod
    def _load_pretrained_model(
        model: Any,
        state_dict: dict | None,
        checkpoint_files: list[str] | None,
        load_config: Any,
        expected_keys: list[str] | None = None,
    ) -> tuple[Any, dict]:
        found = checkpoint.tensor_shapes(state_dict, checkpoint_files)
        source = load_config.pretrained_model_name_or_path or "the given state dict"
        if checkpoint.is_hub_format(found):
            checkpoint.check_tensors(found, checkpoint.hub_tensors(model.config), source)
            mapping = checkpoint.hub_conversions(model.config) + (load_config.weight_mapping or [])
            load_config = dataclasses.replace(load_config, weight_mapping=mapping)
        else:
            checkpoint.check_tensors(found, checkpoint.expected_tensors(model), source)
        return PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, expected_keys
        )

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save under our own names: the hub's cannot be restored from the joined tensors."""
        super().save_pretrained(*args, **{**kwargs, "save_original_format": False})


class MolmoVisionModel(MolmoPreTrainedModel):
    """CLIP's ViT on flattened patches, without a final norm, giving the features of some blocks.

    All blocks are computed, also those above the last one used, as the reference does.
    """

    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: MolmoConfig) -> None:
        vision = config.vision_config
        super().__init__(vision)
        width = vision.hidden_size
        self.feature_layers = [
            layer % vision.num_hidden_layers for layer in config.vision_feature_layers
        ]
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.position_embedding = nn.Parameter(
            torch.zeros(config.num_patches_per_side**2 + 1, width)
        )
        self.patch_embedding = nn.Linear(3 * vision.patch_size**2, width, bias=False)
        self.pre_layernorm = nn.LayerNorm(width, eps=vision.layer_norm_eps)
        self.layers = nn.ModuleList(
            MolmoVisionLayer(config) for _ in range(vision.num_hidden_layers)
        )
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutput:
        """Encode crops.

        Parameters
        ----------
        pixel_values : float tensor (crops, patches, 588)
            Values of a patch in the order (y, x, channel).

        Returns
        -------
        BaseModelOutput
            ``last_hidden_state`` (crops, patches, width × feature layers): the outputs of the
            feature layers side by side, without the class token.
        """
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        first = self.class_embedding.expand(len(patches), 1, -1)
        states = torch.cat([first, patches], dim=1) + self.position_embedding
        states = self.pre_layernorm(states)
        outputs = []
        for layer in self.layers:
            states = layer(states, None)
            outputs.append(states)
        features = [outputs[index][:, 1:] for index in self.feature_layers]
        return BaseModelOutput(last_hidden_state=torch.cat(features, dim=-1))


class MolmoConnector(nn.Module):
    """From ViT features to vectors of the decoder's width, one for each 2 × 2 window of patches."""

    def __init__(self, config: MolmoConfig) -> None:
        super().__init__()
        width, text = config.vision_config.hidden_size, config.text_config
        features = width * len(config.vision_feature_layers)
        self.side = config.num_patches_per_side
        self.pad_embed = nn.Parameter(torch.zeros(2, features))
        self.pooling = MolmoAttention(config, input_size=features)
        self.gate_proj = nn.Linear(width, text.intermediate_size, bias=False)
        self.up_proj = nn.Linear(width, text.intermediate_size, bias=False)
        self.down_proj = nn.Linear(text.intermediate_size, text.hidden_size, bias=False)

    def forward(self, features: torch.Tensor, image_masks: torch.Tensor | None) -> torch.Tensor:
        """Pool and project.

        Parameters
        ----------
        features : float tensor (crops, patches, 2 × width)
        image_masks : float tensor (crops, patches) or None
            Share of real pixels in a patch. Where it is 0, the first padding vector is added;
            where it is below 1 (also −1, which the processor writes for the last tile), the second.

        Returns
        -------
        float tensor (crops, tokens per crop, hidden size)
        """
        if image_masks is not None:
            table = torch.cat([torch.zeros_like(self.pad_embed[:1]), self.pad_embed])
            empty = image_masks == 0
            partial = (image_masks < 1) & ~empty
            features = features + table[empty.int() + 2 * partial.int()]
        crops, _, width = features.shape
        rows = self.side // POOL
        windows = features.view(crops, rows, POOL, rows, POOL, width).transpose(2, 3)
        windows = windows.reshape(crops * rows * rows, POOL * POOL, width)
        pooled, _ = self.pooling(windows.mean(dim=1, keepdim=True), key_value_states=windows)
        pooled = pooled.view(crops, rows * rows, -1)
        return self.down_proj(nn.functional.silu(self.gate_proj(pooled)) * self.up_proj(pooled))


class MolmoModel(MolmoPreTrainedModel):
    """Vision tower, connector and decoder, without the head."""

    def __init__(self, config: MolmoConfig) -> None:
        super().__init__(config)
        self.vision_tower = MolmoVisionModel(config)
        self.multi_modal_projector = MolmoConnector(config)
        text = config.text_config
        odd = text.hidden_size % 8 or text.intermediate_size % 8
        if text.model_type == "olmoe" and odd and text._experts_implementation is None:
            # Grouped matrix products, the default, want rows of a multiple of 16 bytes.
            text._experts_implementation = "batched_mm"
        self.language_model = AutoModel.from_config(text)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Give the joined table of all tokens, those without an output of the head last."""
        return self.language_model.get_input_embeddings()

    def get_image_features(
        self, pixel_values: torch.Tensor, image_masks: torch.Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Run vision tower and connector.

        Parameters
        ----------
        pixel_values : float tensor (batch, crops, patches, 588)
        image_masks : float tensor (batch, crops, patches), optional

        Returns
        -------
        BaseModelOutputWithPooling
            ``last_hidden_state`` (batch, crops, patches, 2 × width), zero for a crop whose values
            are all −1; ``pooler_output`` (batch, crops, tokens per crop, hidden size).
        """
        shape = pixel_values.shape[:2]
        crops = pixel_values.flatten(0, 1)
        features = self.vision_tower(crops).last_hidden_state
        # The training code's rule, in every family: a crop is padding if all its values are −1.
        empty = (crops == -1).flatten(1).all(dim=1)
        features = features.masked_fill(empty[:, None, None], 0)
        masks = None if image_masks is None else image_masks.flatten(0, 1)
        projected = self.multi_modal_projector(features, masks)
        return BaseModelOutputWithPooling(
            last_hidden_state=features.unflatten(0, shape),
            pooler_output=projected.unflatten(0, shape),
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_masks: torch.Tensor | None = None,
        image_input_idx: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> MolmoModelOutputWithPast:
        """See `MolmoForConditionalGeneration.forward`."""
        if inputs_embeds is None:
            if input_ids is None:
                raise UserError("Give input_ids or inputs_embeds.")
            # −1 stands for padding; what its position holds is never looked at.
            inputs_embeds = self.get_input_embeddings()(input_ids.clamp(min=0))

        image_features = None
        if pixel_values is not None:
            if image_input_idx is None:
                raise UserError("pixel_values came without image_input_idx.")
            image_features = self.get_image_features(pixel_values, image_masks)["pooler_output"]
            inputs_embeds = self._add_image_features(inputs_embeds, image_features, image_input_idx)

        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            position_ids = position_ids[:, -inputs_embeds.shape[1] :]

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return MolmoModelOutputWithPast(**outputs, image_hidden_states=image_features)

    @staticmethod
    def _add_image_features(
        inputs_embeds: torch.Tensor, features: torch.Tensor, image_input_idx: torch.Tensor
    ) -> torch.Tensor:
        batch, length, width = inputs_embeds.shape
        # Unused vectors (negative index) are added as zeros to position 0: no shape then depends on
        # the values, and a device need not be waited for.
        unused = image_input_idx < 0
        first = torch.arange(batch, device=inputs_embeds.device) * length
        index = image_input_idx.masked_fill(unused, 0).flatten(1) + first[:, None]
        features = features.masked_fill(unused[..., None], 0).to(inputs_embeds)
        flat = inputs_embeds.flatten(0, 1)
        return flat.index_add(0, index.flatten(), features.reshape(-1, width)).view(
            batch, length, width
        )


class MolmoForConditionalGeneration(MolmoPreTrainedModel, GenerationMixin):
    """Molmo with its language-modelling head; `generate()` takes what `MolmoProcessor` gives.

    ``from_pretrained(folder or hub id)`` reads the published checkpoints as they are, as well as
    what `save_pretrained` wrote; tensors that are missing, unexpected or misshapen are an error.
    """

    def __init__(self, config: MolmoConfig) -> None:
        super().__init__(config)
        self.model = MolmoModel(config)
        # Untied, and with no output for the additional rows of the embedding.
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.head_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """Give the head."""
        return self.lm_head

    def get_image_features(
        self, pixel_values: torch.Tensor, image_masks: torch.Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """See `MolmoModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, image_masks, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_masks: torch.Tensor | None = None,
        image_input_idx: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> MolmoCausalLMOutputWithPast:
        """One pass of the whole model.

        Parameters
        ----------
        input_ids : int tensor (batch, length)
            −1 is padding.
        pixel_values : float tensor (batch, crops, patches, 588), optional
            Normalised crops, the global one first; without it the pass is text only.
        image_masks : float tensor (batch, crops, patches), optional
            Share of real pixels in each patch.
        image_input_idx : int tensor (batch, crops, tokens per crop)
            Position in the prompt that each pooled vector is added to; negative for none.
        attention_mask : int tensor (batch, length), optional
            1 for tokens, 0 for padding on either side.
        position_ids : int tensor (batch, length), optional
            Default: count of tokens before, from `attention_mask`.
        inputs_embeds : float tensor (batch, length, hidden size), optional
            In place of `input_ids`.
        logits_to_keep
            Compute the head on the last so many positions only; 0 for all, or a tensor of indices.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_masks=image_masks,
            image_input_idx=image_input_idx,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        return MolmoCausalLMOutputWithPast(
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            image_hidden_states=outputs.image_hidden_states,
        )

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """Hand on what comes with the image in the first forward only, as its pixels are."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        if not kwargs.get("is_first_iteration") and kwargs.get("use_cache", True):
            for name in ("image_masks", "image_input_idx"):
                inputs.pop(name, None)
        return inputs

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        mask = model_kwargs.get("attention_mask")
        if mask is not None and not bool(mask[:, -1].all()):
            raise UserError(
                "generate() got a batch that is padded on the right (attention_mask ends in 0), "
                "where the next token would follow the padding: pad it on the left and shift "
                "image_input_idx by the padding, or generate row by row."
            )
        super()._validate_model_kwargs(model_kwargs)  # type: ignore[misc]
