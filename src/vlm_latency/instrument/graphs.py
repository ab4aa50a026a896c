"""Functions of tensors, compiled and, on a GPU, captured: one launch where there were thousands."""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only

from vlm_latency.errors import ModelError

BACKEND = "inductor"
RECOMPILES = 64  # shapes that one function may be compiled for before PyTorch gives up

log = logging.getLogger("vlm_latency")


class Part:
    """A function of tensors: compiled and, on a GPU, captured once per shape.

    What is ``required`` is compiled as one graph; else a part of it may stay uncompiled, as long as
    it can be captured. On a GPU inputs are copied to where they lay when the shape was captured, and outputs are
    copies of what the graph wrote. What is not ``required`` and does not compile is left as it is,
    and ``left_eager`` says why.

    Parameters
    ----------
    dynamic
        Given the arguments' tensors, which (tensor, dimension) differ from request to request.
    tuned
        Whether its kernels are tuned for bandwidth, which takes longer to compile.
    static
        Whether every shape is compiled by itself, even where only one dimension differs.
    state
        Tensors that the function changes and that trying it out must not change.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., object],
        device: torch.device,
        *,
        required: bool = False,
        pool: Any = None,
        dynamic: Callable[[list[torch.Tensor]], list[tuple[torch.Tensor, int]]] = lambda _: [],
        state: Callable[[], list[torch.Tensor]] = list,
        copy_out: bool = True,
        tuned: bool = False,
        static: bool = False,
    ) -> None:
        self.name = name
        self.left_eager: str | None = None
        self.seconds = 0.0
        self.shapes = 0
        self._function = function
        self._device = device
        self._required = required
        self._pool = pool
        self._dynamic = dynamic
        self._state = state
        self._copy_out = copy_out
        self._graphs: dict[object, tuple[torch.cuda.CUDAGraph | None, list[object], Any]] = {}
        options = inductor_options(device) if tuned else None
        self._compiled = torch.compile(
            function,
            fullgraph=required,
            backend=BACKEND,
            options=options,
            dynamic=False if static else None,
        )

    def __call__(self, *args: object, **kwargs: object) -> Any:
        if self.left_eager is not None or torch.compiler.is_compiling():
            return self._function(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        key = (str(spec), *map(_leaf_key, leaves))
        if key not in self._graphs:
            start = time.perf_counter()
            try:
                self._graphs[key] = self._prepared(leaves, spec)
            except Exception as error:  # whatever a compiler may raise
                why = " ".join(str(error).split())[:300]
                if self._required:
                    raise ModelError(
                        f"{self.name} does not compile ({type(error).__name__}: {why}); use "
                        "model.engine=eager or static"
                    ) from error
                self.left_eager = why
                log.warning("%s is not compiled and runs eagerly: %s", self.name, self.left_eager)
                return self._function(*args, **kwargs)
            self.shapes += 1
            self.seconds += time.perf_counter() - start
        graph, inputs, output = self._graphs[key]
        if graph is None:
            return self._compiled(*args, **kwargs)
        for mine, given in zip(inputs, leaves, strict=True):
            if isinstance(mine, torch.Tensor):
                mine.copy_(given)
        graph.replay()
        return tree_map_only(torch.Tensor, torch.clone, output) if self._copy_out else output

    def _prepared(
        self, leaves: list[object], spec: TreeSpec
    ) -> tuple[torch.cuda.CUDAGraph | None, list[object], Any]:
        """Compile for these shapes and, on a GPU, capture: (graph or None, its inputs, its output)."""
        log.info("compiling %s", self.name)
        on_gpu = self._device.type == "cuda"
        inputs = [x.clone() if on_gpu and isinstance(x, torch.Tensor) else x for x in leaves]
        for tensor, dimension in self._dynamic([x for x in inputs if isinstance(x, torch.Tensor)]):
            torch._dynamo.maybe_mark_dynamic(tensor, dimension)
        args, kwargs = spec.unflatten(inputs)
        if not self._required:
            _check_shapes(self._function, args, kwargs)
        state = self._state()
        before = [tensor.clone() for tensor in state]

        def run() -> object:
            return self._compiled(*args, **kwargs)

        try:
            if not on_gpu:
                run()
                return None, [], None
            side = torch.cuda.Stream(self._device)
            side.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(side):
                run()
                with _no_waiting():  # a capture that waits for the device is lost
                    run()
            torch.cuda.current_stream(self._device).wait_stream(side)
            # A graph keeps the addresses of the workspace that matrix products use: it must be
            # its own, not one that another engine's graphs left behind and may give back.
            graph = torch.cuda.CUDAGraph()
            torch._C._cuda_clearCublasWorkspaces()
            with torch.cuda.graph(graph, pool=self._pool):
                output = run()
            torch._C._cuda_clearCublasWorkspaces()
            return graph, inputs, output
        finally:
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)


def inductor_options(device: torch.device) -> dict[str, Any] | None:
    """Choose kernels of one row tuned for bandwidth: products with one token become reductions."""
    on_gpu = device.type == "cuda" and BACKEND == "inductor"
    return {"coordinate_descent_tuning": True} if on_gpu else None


@contextlib.contextmanager
def _no_waiting() -> Iterator[None]:
    """Turn every wait of the host for the device into an error."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch calls this mode a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)


def _leaf_key(leaf: object) -> object:
    if isinstance(leaf, torch.Tensor):
        return tuple(leaf.shape), leaf.dtype
    return leaf if isinstance(leaf, bool | int | float | str | None) else id(leaf)


def _check_shapes(
    function: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]
) -> None:
    """Raise where a function reads values of its inputs: its shapes are then not theirs alone."""
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        args, kwargs = tree_map_only(torch.Tensor, fake.from_tensor, (args, kwargs))
        try:
            function(*args, **kwargs)
        except DataDependentOutputException as error:
            raise ModelError(f"what it computes depends on its inputs' values ({error})") from None
