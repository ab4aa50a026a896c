"""The ways a request is run: how ``generate()`` is set up, compiled and replayed.

``eager``
    ``generate()`` as it comes, with a cache that grows.
``static``
    a cache of fixed length, kept from request to request.
``compiled``
    besides, each decode step is one compiled forward of ``generate()``.
``compiled-all``
    besides, encoder, projector and prefill are compiled and, on a GPU, replayed as CUDA graphs:
    one per number of crops, and one per prompt length rounded up to `PROMPT_STEP` positions.
``loop``
    as ``compiled-all``, and the decode loop is our own: embedding, layers, head and argmax are one
    compiled step that feeds itself. Greedy only; it is not ``generate()``'s loop and never stands
    for it, though ``generate()`` prepares the request and runs the prefill.

Batch 1, greedy, no padding. What is compiled pays for it at its first call, which warm-up makes.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from math import ceil
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import CompileConfig
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.modeling_outputs import BaseModelOutputWithPast

from vlm_latency.errors import MeasurementError, ModelError
from vlm_latency.instrument import graphs
from vlm_latency.instrument.graphs import Part
from vlm_latency.instrument.kept_cache import KeptCache
from vlm_latency.models.boundaries import replaced
from vlm_latency.options import CAPTURED, COMPILED

if TYPE_CHECKING:
    from transformers import (
        GenerationConfig,
        LogitsProcessorList,
        StoppingCriteria,
        StoppingCriteriaList,
    )

    from vlm_latency.models.loading import VLM

T = TypeVar("T")
Arguments = dict[str, Any]  # keyword arguments of generate() or of one forward
PROMPT_STEP = 32  # a compiled prefill runs at the next multiple of this many positions
CACHE_STEP = 64  # a cache that was given no length grows by multiples of this
FORCE_GQA = "TRANSFORMERS_SDPA_FORCE_GQA"  # read by transformers while a step is compiled
GREEDY = {
    "do_sample": False,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "num_beams": 1,
    "use_cache": True,
    "return_dict_in_generate": True,
}
# Fields of a generation configuration that change greedy decoding, and their neutral values.
NEUTRAL = {
    "repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "sequence_bias": (None,),
    "forced_eos_token_id": (None,),
}


class Engine:
    """Runs ``generate()`` for one loaded model in one of the ways of this module.

    Parameters
    ----------
    vlm
        A loaded model.
    name
        One of ``eager``, ``static``, ``compiled``, ``compiled-all``, ``loop``.
    max_cache_len
        Length of the static cache, so that nothing is compiled twice; by default as long as the
        longest request so far.

    Raises
    ------
    ModelError
        Where the engine cannot run this model, with the reason.
    """

    def __init__(self, vlm: VLM, name: str = "eager", max_cache_len: int | None = None) -> None:
        self.name = name
        self.model: Any = vlm.model
        self.device = torch.device(vlm.device)
        self.parts: dict[str, Part] = {}
        self.compile_s = 0.0
        self._components = vlm.components
        self._length = max_cache_len
        self._cache: KeptCache | None = None
        self._installed = False
        self._inputs: Arguments = {}
        self._shapes: dict[str, torch.Size] = {}
        if name == "eager":
            return
        check(vlm, name)
        # One object for all requests: what is compiled is bound to it.
        self._forward = self._filling(vlm.components.language_model.forward)
        self._config = self._compile_config()
        self._step: Callable[..., object] | None = None
        self._vision: list[tuple[nn.Module, Part]] = []
        if name in CAPTURED:
            self._pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
            self._vision = self._vision_parts()

    def close(self) -> None:
        """Forget what was compiled and captured, and the cache."""
        self.parts.clear()
        self._cache = self._step = None
        self._vision = []

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Put the engine's parts on the model for one measurement; nothing stays behind."""
        if self.name == "eager" or self._installed:
            yield
            return
        model = self.model
        with contextlib.ExitStack() as stack:
            self._installed = True
            stack.callback(setattr, self, "_installed", False)
            stack.enter_context(
                replaced(self._components.language_model, "forward", always(self._forward))
            )
            for module, part in self._vision:
                if "forward" not in vars(module):  # else someone else stands in for it
                    stack.enter_context(replaced(module, "forward", always(part)))
            if self.name in COMPILED:
                stack.enter_context(self._compile_clock())
                stack.enter_context(torch._dynamo.config.patch(recompile_limit=graphs.RECOMPILES))
                for name, value in (
                    ("_compiled_call", self._call_step),
                    ("_last_compile_config", self._config),
                ):
                    stack.enter_context(replaced(model, name, always(value)))
            yield

    def arguments(self, inputs: Arguments, max_new_tokens: int, stop_at_eos: bool) -> Arguments:
        """What ``generate()`` is given for a request; outside the timed region."""
        arguments = {**inputs, **GREEDY, "max_new_tokens": max_new_tokens}
        if not stop_at_eos:
            arguments["eos_token_id"] = None
        if self.name != "eager":
            arguments["past_key_values"] = self._cache_for(
                inputs["input_ids"].shape[1] + max_new_tokens
            )
        if self.name == "loop":
            return {**arguments, "custom_generate": self._decode, "disable_compile": True}
        if self.name in ("eager", "static"):
            return {**arguments, "disable_compile": True}
        return {**arguments, "compile_config": self._config}

    def generate(self, arguments: Arguments) -> Any:
        """Run one request, the engine being installed; what is timed."""
        if self._cache is not None:
            self._cache.start()
        return self.model.generate(**arguments)

    def report(self) -> dict[str, object]:
        """What was compiled, how long it took in seconds, and what could not be."""
        return {
            "engine": self.name,
            "compile_s": self.compile_s,
            "parts": {
                name: {"shapes": part.shapes, "seconds": part.seconds, "eager": part.left_eager}
                for name, part in self.parts.items()
            },
        }

    def _cache_for(self, length: int) -> KeptCache:
        """The cache, made anew where it is too short: what was captured with the old one is void."""
        if self._cache is None or self._cache.max_len < length:
            if self._length is None or self._length < length:
                self._length = (ceil(length / CACHE_STEP) + 1) * CACHE_STEP
            self._cache = KeptCache(self.model.config, self._length)
            self._step = None
            for name in ("the prefill", "the decode step"):
                self.parts.pop(name, None)
        return self._cache

    # Encoder and projector

    def _vision_parts(self) -> list[tuple[nn.Module, Part]]:
        """The encoder, and the projector where it is not inside it, each compiled by itself."""
        components = self._components
        modules = {"the vision encoder": components.vision_encoder}
        rest = [part for part in components.projector_parts if part not in components.mergers]
        for number, module in enumerate(rest):
            modules[f"the projector{f' ({number})' if number else ''}"] = module
        for name, module in modules.items():
            self.parts[name] = Part(
                name, module.forward, self.device, pool=self._pool, dynamic=_first_dimensions
            )
        return [(module, self.parts[name]) for name, module in modules.items()]

    # Prefill

    def _filling(
        self, original: Callable[..., BaseModelOutputWithPast]
    ) -> Callable[..., BaseModelOutputWithPast]:
        """The decoder's forward, which fills the kept cache; compiled where the engine says so."""

        @functools.wraps(original)
        def forward(*args: object, **kwargs: Any) -> BaseModelOutputWithPast:
            cache = kwargs.get("past_key_values")
            if torch.compiler.is_compiling() or not isinstance(cache, KeptCache):
                return original(*args, **kwargs)
            if not cache.layers[0].empty:
                return original(*args, **kwargs)
            embeds = kwargs.get("inputs_embeds")
            given = embeds if embeds is not None else kwargs["input_ids"]
            # The first request of a cache makes its tensors, which a graph must find in place.
            ready = self.name in CAPTURED and cache.is_initialized
            if ready and embeds is not None and not args:
                output = self._prefill(original, **kwargs)
            else:
                output = original(*args, **kwargs)
            cache.filled(given.shape[1])
            return output

        return forward

    def _prefill(
        self,
        original: Callable[..., BaseModelOutputWithPast],
        *,
        inputs_embeds: torch.Tensor,
        past_key_values: KeptCache,
        attention_mask: object = None,
        position_ids: torch.Tensor | None = None,
        **others: object,
    ) -> BaseModelOutputWithPast:
        if "the prefill" not in self.parts:

            def run(
                inputs_embeds: torch.Tensor,
                position_ids: torch.Tensor | None,
                attention_mask: object,
                others: Mapping[str, object],
            ) -> torch.Tensor | None:
                output: BaseModelOutputWithPast = original(
                    inputs_embeds=inputs_embeds,
                    position_ids=position_ids,
                    attention_mask=attention_mask,
                    past_key_values=past_key_values,
                    **others,
                )
                return output.last_hidden_state

            self.parts["the prefill"] = Part(
                "the prefill", run, self.device, required=True, pool=self._pool, dynamic=_lengths
            )
        length = inputs_embeds.shape[1]
        plain = not any(
            isinstance(leaf, torch.Tensor) for leaf in tree_leaves((attention_mask, others))
        )
        # What follows the prompt is seen by none of it under a causal mask, and what it leaves in
        # the cache is overwritten before it is attended to.
        padding = min(-length % PROMPT_STEP, past_key_values.max_len - length) if plain else 0
        if padding:
            inputs_embeds = nn.functional.pad(inputs_embeds, (0, 0, 0, padding))
            if position_ids is not None:
                position_ids = nn.functional.pad(position_ids, (0, padding))
        hidden = self.parts["the prefill"](inputs_embeds, position_ids, attention_mask, others)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden[:, :length], past_key_values=past_key_values
        )

    # The loop of our own

    def _decode(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> GenerateDecoderOnlyOutput:
        """Decode in place of ``generate()``'s greedy search, which prepared everything before."""
        if len(logits_processor):
            names = ", ".join(type(one).__name__ for one in logits_processor)
            raise MeasurementError(f"engine=loop is greedy only, but generation asks for {names}")
        outputs = model._prefill(input_ids, generation_config, model_kwargs)
        first = outputs.logits[:, -1:].argmax(dim=-1)
        count = generation_config.max_length - input_ids.shape[1]
        written = torch.empty((1, count), dtype=torch.long, device=input_ids.device)
        written[:, :1] = first
        ends = [one for one in stopping_criteria if hasattr(one, "eos_token_id")]
        done = 1
        if count > 1 and not self._ended(ends, first):
            model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
            with model._optimize_model_for_decode():
                sequence = torch.cat([input_ids, first], dim=-1)
                self._load(
                    model.prepare_inputs_for_generation(
                        sequence, next_sequence_length=1, **model_kwargs
                    )
                )
                step = model.get_compiled_call(self._config)
                token = self._inputs["input_ids"]
                while done < count:
                    step()
                    written[:, done : done + 1] = token
                    done += 1
                    if self._ended(ends, token):
                        break
        return GenerateDecoderOnlyOutput(
            sequences=torch.cat([input_ids, written[:, :done]], dim=-1),  # type: ignore[arg-type]
            past_key_values=model_kwargs["past_key_values"],
        )

    @staticmethod
    def _ended(criteria: list[StoppingCriteria], token: torch.Tensor) -> bool:
        """Whether the answer ends here; waits for the device only where it may."""
        return any(bool(one(token, None).all()) for one in criteria)

    def _load(self, inputs: Arguments) -> None:
        """Put the first decode step's inputs where the compiled step reads them."""
        inputs = {name: value for name, value in inputs.items() if name != "attention_mask"}
        tensors = {name: x for name, x in inputs.items() if isinstance(x, torch.Tensor)}
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        if "the decode step" in self.parts and shapes == self._shapes:
            for name, tensor in tensors.items():
                self._inputs[name].copy_(tensor)
            return
        self._shapes = shapes
        self._inputs = {
            name: value.clone() if isinstance(value, torch.Tensor) else value
            for name, value in inputs.items()
        }
        token, position = self._inputs["input_ids"], self._inputs["position_ids"]
        cache = self._inputs["past_key_values"]

        def step() -> None:
            logits = self.model(**self._inputs, return_dict=True).logits
            token.copy_(logits[:, -1:].argmax(dim=-1))
            position.add_(1)

        self.parts["the decode step"] = Part(
            "the decode step",
            step,
            self.device,
            required=True,
            pool=self._pool,
            state=lambda: [token, position, *(layer.cumulative_length for layer in cache.layers)],
            copy_out=False,
            tuned=True,
            static=True,
        )

    # The compiled step, our own or that of ``generate()``

    def _compile_config(self) -> CompileConfig:
        """What ``generate()`` compiles its forward with."""
        # Not dynamic: compiled for a second length of the cache, a step is as fast as for the first.
        config = CompileConfig(fullgraph=True, dynamic=False, mode=None, backend=graphs.BACKEND)  # type: ignore[arg-type]
        if options := graphs.inductor_options(self.device):
            config.options = {**options, "triton.cudagraphs": True}
        # transformers compiles on accelerators only, unless told so
        config._compile_all_devices = True  # type: ignore[assignment]
        return config

    def _call_step(self, *args: object, **kwargs: object) -> object:
        """What ``model.get_compiled_call()`` gives: meters put their marks round it."""
        if self.name == "loop":
            step: Callable[..., object] = self.parts["the decode step"]
        else:
            if self._step is None:
                self._step = torch.compile(self.model.__call__, **self._config.to_dict())
            step = self._step
        with _grouped_heads(self.model.dtype, self.device):
            return step(*args, **kwargs)

    @contextlib.contextmanager
    def _compile_clock(self) -> Iterator[None]:
        """Add up what PyTorch spends on compiling, tuning and recording graphs."""
        handler = torch._dynamo.callback.callback_handler
        began = 0.0

        def start(_: object) -> None:
            nonlocal began
            began = time.perf_counter()

        def end(_: object) -> None:
            self.compile_s += time.perf_counter() - began

        handler.register_start_callback(start)
        handler.register_end_callback(end)
        try:
            yield
        finally:
            handler.remove_start_callback(start)
            handler.remove_end_callback(end)


def always(value: T) -> Callable[[object], T]:
    """Make a replacement of an attribute that ignores the original."""
    return lambda _: value


def check(vlm: VLM, name: str) -> None:
    """Refuse an engine that cannot run a model, before anything is measured.

    Raises
    ------
    ModelError
        With what stands in the way.
    """
    model, why = vlm.model, ""
    text = model.config.get_text_config(decoder=True)
    try:
        KeptCache(model.config, 1)
    except Exception as error:  # a family may have no static cache at all
        why = f"it has no static cache of keys and values ({error})"
    if not why and name != "static":
        attention = getattr(text, "_attn_implementation", None) or "eager"
        if attention not in ("sdpa", "eager"):
            why = f"a compiled step needs model.attn_implementation=sdpa or eager, not {attention}"
    if not why and name == "loop":
        given = getattr(model, "generation_config", None)
        odd = [
            f"{key}={getattr(given, key)}"
            for key, neutral in NEUTRAL.items()
            if getattr(given, key, None) not in neutral
        ]
        if odd:
            why = f"its generation configuration asks for {', '.join(odd)}, and the loop is greedy"
    if why:
        raise ModelError(
            f"model.engine={name} cannot run {type(model).__name__}: {why}; use model.engine=eager"
        )


@contextlib.contextmanager
def _grouped_heads(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Let attention share keys and values between heads, also under a mask.

    Without, transformers repeats them for each head of a compiled step; the kernels that can
    share them are those of half precision on a GPU.
    """
    if device.type != "cuda" or dtype == torch.float32:
        yield
        return
    before = os.environ.get(FORCE_GQA)
    os.environ[FORCE_GQA] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[FORCE_GQA]
        else:
            os.environ[FORCE_GQA] = before


def _first_dimensions(tensors: list[torch.Tensor]) -> list[tuple[torch.Tensor, int]]:
    """The number of crops, wherever there is more than one."""
    return [(tensor, 0) for tensor in tensors if tensor.ndim and tensor.shape[0] > 1]


def _lengths(tensors: list[torch.Tensor]) -> list[tuple[torch.Tensor, int]]:
    """Every dimension that is as long as the prompt, the second one of the first tensor."""
    length = tensors[0].shape[1]
    return [
        (tensor, dimension)
        for tensor in tensors
        for dimension, size in enumerate(tensor.shape)
        if size == length and not (tensor is tensors[0] and dimension != 1)
    ]
