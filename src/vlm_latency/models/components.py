"""Which module of a model is the vision encoder, the projector, the language model and the head.

transformers names them for every model (`get_encoder`, `get_decoder`, `get_output_embeddings`). The
projector is what the base model's ``get_image_features`` uses besides the encoder, or a merger at the
encoder's end: a tower for audio or video, or a model that makes images, is no part of it. Where that
rule does not tell, the zoo's ``components:`` does. What comes of it for every architecture is in
docs/architectures.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from vlm_latency.errors import ModelError
from vlm_latency.models.experts import expert_sets

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_LISTS = ("projector", "image_projector", "more_encoders", "aside")
_MERGERS = ("merger", "deepstack_merger_list", "merger_list", "connector")


@dataclass(frozen=True)
class Modules:
    """The components themselves; see `Components`."""

    vision_encoder: nn.Module
    projector: tuple[nn.Module, ...]
    language_model: nn.Module
    head: nn.Module
    more_encoders: tuple[nn.Module, ...] = ()

    @property
    def encoders(self) -> tuple[nn.Module, ...]:
        """Every vision encoder; most models have one."""
        return (self.vision_encoder, *self.more_encoders)

    @property
    def projector_parts(self) -> tuple[nn.Module, ...]:
        """Modules of the projector that are called: of a list of modules, its items."""
        from torch import nn

        return tuple(
            part
            for module in self.projector
            for part in (module if isinstance(module, nn.ModuleList) else [module])
        )

    @property
    def mergers(self) -> tuple[nn.Module, ...]:
        """Parts of the projector that lie inside the vision encoder (Qwen's)."""
        inside = set(self.vision_encoder.modules())
        return tuple(part for part in self.projector_parts if part in inside)


@dataclass(frozen=True)
class Components:
    """Dotted paths of the components in the model.

    Attributes
    ----------
    vision_encoder, language_model, head
        One module each. A projector may lie inside the vision encoder (Qwen's merger).
    projector
        One module or more.
    image_projector
        The part of the projector behind its pooling, where the two are told apart (Molmo).
    more_encoders
        Further vision encoders that see the same image (DeepSeek-VL's hybrid: SigLIP and SAM).
    aside
        What an image and a text never run through: towers for audio or video, parts that make images.
    """

    vision_encoder: str
    projector: tuple[str, ...]
    language_model: str
    head: str
    image_projector: tuple[str, ...] = ()
    more_encoders: tuple[str, ...] = ()
    aside: tuple[str, ...] = ()

    def resolve(self, model: nn.Module) -> Modules:
        """Find the modules at these paths in `model`."""
        return Modules(
            vision_encoder=model.get_submodule(self.vision_encoder),
            projector=tuple(model.get_submodule(path) for path in self.projector),
            language_model=model.get_submodule(self.language_model),
            head=model.get_submodule(self.head),
            more_encoders=tuple(model.get_submodule(path) for path in self.more_encoders),
        )


def find_components(
    model: PreTrainedModel, overrides: Mapping[str, Any] | None = None
) -> Components:
    """Tell the parts of a model apart.

    Parameters
    ----------
    overrides
        Paths by the names of `Components`, which come before the rule.

    Raises
    ------
    ModelError
        Where a part is not found, with the modules that were.
    """
    overrides = overrides or {}
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{type(model).__name__} is an encoder-decoder: its prompt goes through an encoder of its "
            "own, which none of the components measured here is; choose a model whose decoder reads "
            "the prompt"
        )
    paths = {id(module): path for path, module in model.named_modules()}
    found: dict[str, Any] = {**_by_rule(model, paths), **overrides}
    for name in _LISTS:
        value = found.get(name) or ()
        found[name] = (value,) if isinstance(value, str) else tuple(value)

    unknown = set(overrides) - {field.name for field in fields(Components)}
    wanted = ("vision_encoder", "projector", "language_model", "head")
    missing = [name for name in wanted if not found.get(name)]
    given = [found.get(name) for name in ("vision_encoder", "language_model", "head")]
    known = set(paths.values())
    absent = [
        path
        for path in (*given, *(path for name in _LISTS for path in found[name]))
        if path and path not in known
    ]
    if missing or absent or unknown:
        seen = {name: path for name, path in found.items() if path and name in wanted}
        children = [name for name, _ in model.base_model.named_children()]
        raise ModelError(
            f"the parts of {type(model).__name__} cannot be told apart: "
            + (f"no {', '.join(missing)} found; " if missing else "")
            + (f"no module at {', '.join(absent)}; " if absent else "")
            + (f"no component is called {', '.join(sorted(unknown))}; " if unknown else "")
            + f"found {seen or 'nothing'} among the base model's children "
            f"{', '.join(children) or '(none)'}. Give the paths under `components:` of this "
            "model's entry in a zoo file (model.zoo_file)"
        )
    return Components(**found)


def _by_rule(model: PreTrainedModel, paths: Mapping[int, str]) -> dict[str, Any]:
    # peft's wrapper answers for its adapters; what it wraps, for the model.
    wrapped: Any = getattr(model, "get_base_model", None)
    model = wrapped() if wrapped else model
    base = model.base_model
    encoder, decoder = model.get_encoder(modality="image"), model.get_decoder()
    head = model.get_output_embeddings()
    if head is None and hasattr(decoder, "get_output_embeddings"):
        head = decoder.get_output_embeddings()
    found: dict[str, Any] = {}
    # Both getters give the model itself, or nothing, where they find nothing.
    if encoder not in (None, model, base):
        found["vision_encoder"] = paths[id(encoder)]
    if decoder not in (None, model, base):
        found["language_model"] = paths[id(decoder)]
    if head is not None:
        found["head"] = paths[id(head)]
    if "vision_encoder" in found and "language_model" in found:
        apart = {
            name: child
            for name, child in base.named_children()
            if not {encoder, decoder, head} & set(child.modules())
            and any(True for _ in child.parameters())
        }
        owner = base if hasattr(base, "get_image_features") else model
        if not hasattr(owner, "get_image_features") and hasattr(owner, "get_video_features"):
            raise ModelError(
                f"{type(model).__name__} takes videos and no images; choose a model for images"
            )
        of_image = _used(owner, "get_image_features") & set(apart)
        others = {
            name
            for getter in dir(type(owner))
            if getter.startswith("get_") and getter.endswith(("audio_features", "video_features"))
            for name in _used(owner, getter)
        } - of_image
        towers = [name for name in of_image if _is_encoder(apart[name])]
        mergers = [child for name, child in encoder.named_children() if name in _MERGERS]
        # Some call the projector in their forward only (Llama 4, Mllama, Kosmos-2).
        names = of_image - set(towers) or (set() if mergers else _used(base, "forward") - others)
        projector = [child for name, child in apart.items() if name in names] or mergers
        found["projector"] = tuple(paths[id(module)] for module in projector)
        found["more_encoders"] = tuple(paths[id(apart[name])] for name in apart if name in towers)
        idle = others | (set(apart) - of_image - _used(base, "forward"))
        found["aside"] = tuple(
            paths[id(child)]
            for name, child in apart.items()
            if name in idle and name not in towers and child not in projector
        )
    return found


def _used(owner: nn.Module, method: str) -> set[str]:
    """The names that a method of a module uses, and other methods of its that it calls."""
    names: set[str] = set()
    waiting = [method]
    while waiting:
        function = inspect.unwrap(getattr(type(owner), waiting.pop(), None) or _nothing)
        codes = [function.__code__]
        while codes:
            code = codes.pop()
            codes += [each for each in code.co_consts if inspect.iscode(each)]
            waiting += [
                name
                for name in set(code.co_names) - names
                if name != "forward" and inspect.isfunction(getattr(type(owner), name, None))
            ]
            names |= set(code.co_names)
    return names


def _nothing() -> None: ...


def _is_encoder(module: nn.Module) -> bool:
    """Whether a module is a model of its own that takes pixels."""
    from transformers import PreTrainedModel

    return isinstance(module, PreTrainedModel) and module.main_input_name.startswith("pixel_values")


@dataclass(frozen=True)
class Parameters:
    """Parameters of each component; tied ones count once.

    Embeddings, extra embedding rows and the head belong to the language model; pooling and padding
    vectors to the projector, as do parameters that lie in no component; those of `Components.aside`
    are in the total only.
    """

    params_vision_encoder: int
    params_projector: int
    params_image_projector: int | None  # without pooling and padding vectors, where told apart
    params_llm: int
    params_llm_active: int  # that one token of text runs through: top-k of the experts
    params_total: int
    params_active: int
    moe_num_experts: int | None
    moe_top_k: int | None

    def to_dict(self) -> dict[str, int | None]:
        """Give the numbers by the names that results use."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def count_parameters(model: PreTrainedModel, components: Components) -> Parameters:
    """Count the parameters of each component; works on the meta device."""
    parts = components.resolve(model)

    def ids(*modules: nn.Module) -> dict[int, int]:
        return {id(p): p.numel() for module in modules for p in module.parameters()}

    everything = ids(model)
    projector = ids(*parts.projector)
    vision = {key: n for key, n in ids(*parts.encoders).items() if key not in projector}
    llm = ids(parts.language_model, parts.head)
    aside = ids(*(model.get_submodule(path) for path in components.aside))
    loose = set(everything) - set(vision) - set(llm) - set(projector) - set(aside)
    total, vision_total, llm_total = (sum(d.values()) for d in (everything, vision, llm))
    image_projector = ids(*(model.get_submodule(path) for path in components.image_projector))

    sets = expert_sets(parts.language_model)
    # Of experts for images a token of text visits none.
    idle = sum(
        found.parameters
        if found.visitors == "vision"
        else found.parameters * (found.number - found.top_k) // found.number
        for found in sets
        if found.top_k
    )
    return Parameters(
        params_vision_encoder=vision_total,
        params_projector=sum(projector.values()) + sum(everything[key] for key in loose),
        params_image_projector=sum(image_projector.values()) or None,
        params_llm=llm_total,
        params_llm_active=llm_total - idle,
        params_total=total,
        params_active=total - idle,
        moe_num_experts=sets[0].number if sets else None,
        moe_top_k=(sets[0].top_k or None) if sets else None,
    )
