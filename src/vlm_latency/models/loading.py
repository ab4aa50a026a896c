"""Load a model, ready to be measured."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlm_latency.errors import ModelError
from vlm_latency.models.architecture import Architecture, build_on_meta, describe
from vlm_latency.models.attention import check_backend
from vlm_latency.models.handle import check_room
from vlm_latency.models.random_weights import materialise
from vlm_latency.models.requests import Prepared, Preparer, check_prompt, wrap_processor
from vlm_latency.models.weights import check_weights, few
from vlm_latency.models.zoo import Family, load_zoo, weights_kind
from vlm_latency.options import ModelOptions

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedModel

    from vlm_latency.models.interface import Meter

# Settings of a generation configuration with which a token is more or less than one forward, or
# the prompt more than one; and their neutral values besides None.
_GENERATION: dict[str, tuple[Any, ...]] = {
    "prompt_lookup_num_tokens": (),
    "prefill_chunk_size": (),
    "assistant_early_exit": (),
    "use_mtp": (False,),
    "penalty_alpha": (0, 0.0),
    "dola_layers": (),
    "guidance_scale": (1, 1.0),
    "num_return_sequences": (1,),
}


class VLM:
    """A loaded model.

    Attributes
    ----------
    model : PreTrainedModel
        In evaluation mode on `device`.
    architecture : Architecture
    components : Modules
        The modules themselves.
    options : ModelOptions
    device : torch.device
    dtype : torch.dtype
    weights : str
        ``pretrained``, ``random``, or ``own`` for a user's object.
    revision : str or None
        Commit of a checkpoint from the hub.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        architecture: Architecture,
        options: ModelOptions,
        *,
        weights: str,
        revision: str | None = None,
    ) -> None:
        _check_generation(model)
        self.model = model
        self.architecture = architecture
        self.components = architecture.components.resolve(model)
        self.options = options
        self.weights = weights
        self.revision = revision
        first = next(model.parameters())
        self.device = first.device
        self.dtype: torch.dtype = model.dtype

    @classmethod
    def from_objects(
        cls,
        model: PreTrainedModel,
        processor: Any,
        name: str | None = None,
        prompt_builder: Callable[[str], str] | None = None,
    ) -> VLM:
        """Measure a model object of your own: fine-tuned, pruned or otherwise changed.

        Parameters
        ----------
        model
            Any image-text-to-text model of transformers, on the device it is to run on.
        processor
            Its processor, called as ``processor(images=..., text=..., return_tensors="pt")``.
        name
            For tables; the class's name by default.
        prompt_builder
            From the user's prompt to the text with one image placeholder; by default the
            processor's chat template.
        """
        wrapper: Any = model
        peft = hasattr(wrapper, "get_base_model")
        for config in wrapper.peft_config.values() if peft else ():
            if getattr(config, "is_prompt_learning", False):
                raise ModelError(
                    f"{name or type(model).__name__} has a peft adapter of kind "
                    f"{config.peft_type.value}, which puts positions before the prompt; expected one "
                    "that changes modules, such as LORA"
                )
        if peft:  # adapters are in the modules of what peft wraps
            model = wrapper.get_base_model()
        zoo = load_zoo()
        family = zoo.families.get(model.config.model_type, Family())
        architecture = Architecture(
            name or type(model).__name__,
            model.config,
            lambda attn: _shape_of(model, attn),
            lambda: wrap_processor(processor, model.config, family, prompt_builder),
            component_overrides=family.components,
            own_modules=True,
        )
        options = ModelOptions(
            name=architecture.name,
            device=str(model.device),
            attn_implementation=model.config._attn_implementation or "eager",
        )
        return cls(model.eval(), architecture, options, weights="own")

    @property
    def preparer(self) -> Preparer:
        """What `prepare` uses: its processor and tokenizer."""
        return self.architecture.preparer

    def prepare(self, image: Image.Image, prompt: str) -> Prepared:
        """Tile, normalise and tokenise one request on the CPU.

        The prompt is put into the model's chat template: the processor's own for pretrained
        weights, the published one (``zoo.yml``) for random weights, Molmo's
        ``" User: … Assistant:"`` in its processor.
        """
        return self.preparer(image, prompt)

    def place(self, prepared: Prepared) -> Prepared:
        """Copy the inputs to the device, floating ones in the model's type, and wait for them."""
        inputs = {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for name, value in prepared.inputs.items()
        }
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return prepared.moved(inputs)

    def decode(self, token_ids: list[int]) -> str:
        """Give the text of output tokens, without special ones."""
        text = self.preparer.tokenizer.decode(
            token_ids,
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,  # meant for WordPiece; byte pairs keep their spaces
        )
        return str(text)

    def count_tokens(self, text: str) -> int:
        """Count the tokens of a text by itself."""
        check_prompt(text)
        return len(self.preparer.tokenizer(text, add_special_tokens=False)["input_ids"])

    def meter(self, make: Callable[[Any], Meter]) -> Meter:
        """Give what measures this model: what `make` makes of it."""
        return make(self)

    def set_threads(self, count: int) -> int:
        """Compute with so many CPU threads from now on, and give the number before."""
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        return before


def _check_generation(model: PreTrainedModel) -> None:
    """Refuse a way of generating in which a token is not one forward.

    Raises
    ------
    ModelError
        Naming the setting.
    """
    config = getattr(model, "generation_config", None)
    for name, neutral in _GENERATION.items():
        value = getattr(config, name, None)
        if value is not None and value not in neutral:
            raise ModelError(
                f"generation_config.{name}={value!r}: a token would not be one forward of the model, "
                "which is what is measured; set it to None"
            )


def load(options: ModelOptions) -> VLM:
    """Load the model that the options ask for.

    Raises
    ------
    ModelError
        Unknown model, no such device, not enough memory (with the numbers), unloadable weights.
    """
    device = resolve_device(options)
    dtype = resolve_dtype(options, device)
    architecture = describe(options)
    check_fits(architecture, options)
    _ = architecture.preparer  # before the weights: it may ask for what is not installed
    weights = weights_kind(options)
    revision = None
    if weights == "random":
        model = build_on_meta(
            architecture.transformers_config,
            options.attn_implementation,
            dtype,
            trust_remote_code=architecture.trust_remote_code,
        )
        materialise(model, device, options.seed)
    else:
        model = _load_pretrained(architecture, options, device, dtype)
        revision = getattr(model.config, "_commit_hash", None) or options.revision
    return VLM(model, architecture, options, weights=weights, revision=revision)


def resolve_device(options: ModelOptions) -> torch.device:
    """Choose the device: ``auto`` is the GPU where there is one.

    Raises
    ------
    ModelError
        For a device that is not there.
    """
    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):  # whose time can be taken at component boundaries
        raise ModelError(
            f"model.device: found {options.device!r}; expected auto, cpu, cuda or cuda:N"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise ModelError(
            f"model.device={options.device}, but {found or 'no'} CUDA devices are here; use "
            "model.device=cpu" + (f" or cuda:0 … cuda:{found - 1}" if found else "")
        )
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def resolve_dtype(options: ModelOptions, device: torch.device) -> torch.dtype:
    """Choose the type of weights: ``auto`` is bfloat16 on a GPU and float32 on the CPU."""
    if options.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, options.dtype)
    return dtype


def check_fits(architecture: Architecture, options: ModelOptions) -> None:
    """Refuse what cannot be built, or has no room or no such kernel here; nothing is loaded.

    Raises
    ------
    ModelError
        With the bytes wanted and the bytes free, or the attention backends that work.
    """
    device = resolve_device(options)
    check_builds(architecture, options)
    dtype = str(resolve_dtype(options, device)).removeprefix("torch.")
    check_room(architecture, str(device), dtype)


def check_builds(architecture: Architecture, options: ModelOptions) -> None:
    """Refuse what cannot be built or has no such kernel here.

    Raises
    ------
    ModelError
        Of the configuration, or with the attention backends that work.
    """
    device = resolve_device(options)
    dtype = resolve_dtype(options, device)
    check_backend(options, architecture.transformers_config, device, dtype)
    architecture.meta_model(options.attn_implementation)


def _load_pretrained(
    architecture: Architecture, options: ModelOptions, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    from transformers import AutoModelForImageTextToText

    path = str(architecture.hub_id)
    check_weights(Path(path))
    loader: Any = AutoModelForImageTextToText
    try:
        model, info = loader.from_pretrained(
            path,
            config=copy.deepcopy(architecture.transformers_config),
            revision=options.revision,
            dtype=dtype,
            device_map={"": device},
            attn_implementation=options.attn_implementation,
            trust_remote_code=architecture.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except ModelError:
        raise
    except Exception as error:  # safetensors', the hub's, and whatever a family's code raises
        text = " ".join(str(error).split())
        raise ModelError(
            f"the weights of {path} do not load: {type(error).__name__}: {text[:500]}"
        ) from error
    absent = {name: sorted(map(str, info[name])) for name in ("missing_keys", "mismatched_keys")}
    if any(absent.values()):
        found = "; ".join(
            f"{name.replace('_', ' ')} {few(each)}" for name, each in absent.items() if each
        )
        raise ModelError(
            f"the weights of {path} are not those of its configuration: {found}. Layers without "
            "weights would be random; check that config.json and the weights belong together and are "
            "complete"
        )
    loaded: PreTrainedModel = model.eval().requires_grad_(False)
    return loaded


def _shape_of(model: PreTrainedModel, attn_implementation: str) -> PreTrainedModel:
    """A copy of the model on the meta device: its numbers are never copied."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(
            torch.empty_like(parameter, device="meta"), requires_grad=False
        )
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    shape = copy.deepcopy(model, memo)
    shape.set_attn_implementation(attn_implementation)
    return shape
