"""Where a request passes from one component to the next: the one place that knows where to hook.

The timeline, profiler ranges, NVTX ranges and injected delays all listen here, so that they mean
the same components.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from vlm_latency.errors import ModelError
from vlm_latency.models.components import Modules

ENCODER, PROJECTOR = "T_vision_encoder", "T_projector"
PREFILL, DECODE_FORWARD = "T_LLM_prefill", "T_LLM_decode_forward"

Listener = Callable[[str], None]


@contextlib.contextmanager
def boundaries(
    model: nn.Module, components: Modules, on_open: Listener, on_close: Listener
) -> Iterator[None]:
    """Call ``on_open(label)`` and ``on_close(label)`` at every edge of a component, for a while.

    One context is one ``generate()``: its first forward is ``T_LLM_prefill``, each later one
    ``T_LLM_decode_forward``, whether a decode step is compiled or not. ``T_vision_encoder`` is
    around the encoder; ``T_projector`` around ``get_image_features``, the encoder being nested in
    it, and around every module of the projector. Nothing is called from inside a compiled graph.
    Contexts nest: the inner one opens first and closes last, so that it sees what the outer one
    does at an edge as part of the component.

    Parameters
    ----------
    model
        The whole model, whose ``generate()`` will be called.
    components
        Its parts.

    Notes
    -----
    Where a component raises, its label stays open. All hooks are removed at the end.
    """
    named = _Forwards(on_open, on_close)
    with contextlib.ExitStack() as stack:
        stack.enter_context(around(model, named.open, named.close))
        stack.enter_context(around_compiled_step(model, named.open, named.close))
        parts = [(encoder, ENCODER) for encoder in components.encoders]
        parts += [(part, PROJECTOR) for part in components.projector_parts]
        for module, label in parts:
            edges = functools.partial(on_open, label), functools.partial(on_close, label)
            stack.enter_context(around(module, *edges))
        base: Any = getattr(model, "base_model", model)
        if hasattr(base, "get_image_features"):

            def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
                opens, closes = (functools.partial(f, PROJECTOR) for f in (on_open, on_close))
                return _between(function, opens, closes)

            stack.enter_context(replaced(base, "get_image_features", wrap))
        yield


def blocks_of(module: nn.Module) -> nn.ModuleList:
    """Find the blocks of an encoder or decoder: the longest list of modules it has.

    Raises
    ------
    ModelError
        When it has none.
    """
    lists = [each for each in module.modules() if isinstance(each, nn.ModuleList)]
    if not lists:
        raise ModelError(
            f"{type(module).__name__} has no list of blocks to hook, which measurement.method=hook "
            "and methods of token reduction need; use another method"
        )
    return max(lists, key=len)


@contextlib.contextmanager
def replaced(owner: Any, name: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    """Wrap one method or attribute of one instance, for a while; None where it has none."""
    own = vars(owner)
    before = own.get(name)
    own[name] = wrap(getattr(owner, name, None))
    try:
        yield
    finally:
        if before is None:
            del own[name]
        else:
            own[name] = before


@contextlib.contextmanager
def around(
    module: nn.Module, opens: Callable[[], None], closes: Callable[[], None], always: bool = False
) -> Iterator[None]:
    """Hook a module's forward on both sides; hooks rest while it is being compiled.

    Parameters
    ----------
    always
        Whether to close where the forward raises.
    """

    def before(*_: Any) -> None:
        if not torch.compiler.is_compiling():
            opens()

    def after(*_: Any) -> None:
        if not torch.compiler.is_compiling():
            closes()

    handles = [
        module.register_forward_pre_hook(before, prepend=True),
        module.register_forward_hook(after, always_call=always),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def around_compiled_step(
    model: Any, opens: Callable[[], None], closes: Callable[[], None]
) -> Iterator[None]:
    """Go around every call of the decode step that ``generate()`` compiles."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def get_compiled_call(*args: Any, **kwargs: Any) -> Callable[..., Any]:
            return _between(function(*args, **kwargs), opens, closes)

        return get_compiled_call

    if not hasattr(model, "get_compiled_call"):
        yield
        return
    with replaced(model, "get_compiled_call", wrap):
        yield


class _Forwards:
    """Names a request's forwards: the first one is the prefill."""

    def __init__(self, on_open: Listener, on_close: Listener) -> None:
        self._on_open, self._on_close = on_open, on_close
        self._label = PREFILL

    def open(self) -> None:
        self._on_open(self._label)

    def close(self) -> None:
        self._on_close(self._label)
        self._label = DECODE_FORWARD


def _between(
    function: Callable[..., Any], opens: Callable[[], None], closes: Callable[[], None]
) -> Callable[..., Any]:
    @functools.wraps(function)  # generate() reads the signature
    def called(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        opens()
        result = function(*args, **kwargs)
        closes()
        return result

    return called
