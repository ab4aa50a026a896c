"""Traces written by hand: whose a kernel is, how long the device computed, what bounds it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from vlm_latency.instrument.attribution import (
    MARK,
    attention_backends,
    attribute,
    bound,
    components_of,
    marks_of,
    ranges,
)
from vlm_latency.records import COMPONENTS

Events = list[dict[str, Any]]
FORWARD = "T_LLM_decode_forward"


def event(cat: str, name: str, ts: float, dur: float, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": 1, "args": args}


def request(**at: tuple[float, float]) -> Events:
    """The boundaries of a request of three tokens, a component each 100 µs long unless said."""
    edges = {"T_projector": (100, 300), "T_vision_encoder": (100, 200), "T_LLM_prefill": (300, 400)}
    edges |= {f"{FORWARD} 0": (410, 500), f"{FORWARD} 1": (510, 600), "T_other": (0, 650)}
    order = ["T_other", "T_projector", "T_vision_encoder", "T_LLM_prefill"]
    order += [f"{FORWARD} 0", f"{FORWARD} 1"]
    found = []
    for place, name in enumerate(order):
        start, end = (edges | at)[name]
        label = name.split(" ")[0]
        shift = place / 1000  # what opens at one time opens in this order, and closes in the other
        found.append(event("user_annotation", f"{MARK}open {label}", start + shift, 0.0))
        found.append(event("user_annotation", f"{MARK}close {label}", end - shift, 0.0))
    return found


def launched(kernels: Iterable[tuple[str, float, float, float]], call: str = "cudaLaunchKernel"):
    """Kernels by name, time of launch, start and length, each with its call."""
    found = []
    for number, (name, at, start, dur) in enumerate(kernels):
        found.append(event("cuda_runtime", call, at, 2.0, correlation=number))
        found.append(event("kernel", name, start, dur, correlation=number))
    return found


def test_boundaries_are_read_in_order() -> None:
    marks = marks_of(reversed(request()))
    assert [mark.label for mark in marks][:3] == ["T_other", "T_projector", "T_vision_encoder"]
    owned = dict.fromkeys(COMPONENTS, 0)
    for span in components_of(marks):
        owned[span.owner] += span.end_ns - span.start_ns
    rounded = {name: round(ns / 1e3) for name, ns in owned.items()}
    expected = {"T_vision_encoder": 100, "T_projector": 100, "T_LLM_prefill": 100}
    assert rounded == {**expected, "T_LLM_decode": 200, "T_other": 150}


def test_a_kernel_belongs_to_the_component_that_launched_it() -> None:
    """However late it runs: the encoder's kernel ends when the host is in the decoder."""
    kernels = [("conv", 110, 115, 330), ("gelu", 210, 445, 20), ("gemm", 310, 465, 30)]
    kernels += [("gemv", 420, 495, 15), ("argmax", 505, 512, 2), ("gemv", 520, 525, 15)]
    kernels += [("index", 50, 55, 3)]
    shares, total = attribute([*request(), *launched(kernels)], on_device=True)
    assert list(shares) == list(COMPONENTS)
    busy = {name: round(1e3 * share.busy_ms, 6) for name, share in shares.items()}
    expected = {"T_vision_encoder": 330, "T_projector": 20, "T_LLM_prefill": 30}
    assert busy == {**expected, "T_LLM_decode": 32, "T_other": 3}
    assert [share.kernels for share in shares.values()] == [1, 1, 1, 3, 1]
    assert total["attributed"] == 1
    assert total["busy_ms"] == pytest.approx(0.415)
    decode = shares["T_LLM_decode"].largest
    assert [(k["name"], k["count"]) for k in decode] == [("gemv", 2), ("argmax", 1)]
    assert decode[0]["share"] == pytest.approx(30 / 32)


def test_kernels_of_a_graph_belong_to_its_launch() -> None:
    graph = [event("cuda_runtime", "cudaGraphLaunch", 520, 5, correlation=7)]
    graph += [event("kernel", f"triton_{i}", 530 + 20 * i, 18, correlation=7) for i in range(4)]
    graph += [event("gpu_memcpy", "Memcpy DtoD", 640, 4, correlation=7)]
    driver = [event("cuda_driver", "cuLaunchKernelEx", 420, 3, correlation=8)]
    driver += [event("kernel", "triton_mm", 430, 50, correlation=8)]
    shares, total = attribute([*request(), *graph, *driver], on_device=True)
    assert shares["T_LLM_decode"].kernels == 6
    assert shares["T_LLM_decode"].busy_ms == pytest.approx(0.126)
    assert total["attributed"] == 1


def test_kernels_that_overlap_make_the_device_busy_once() -> None:
    kernels = [("gemm", 310, 320, 40), ("copy", 315, 330, 40), ("gemm", 330, 380, 10)]
    share = attribute([*request(), *launched(kernels)], on_device=True)[0]["T_LLM_prefill"]
    assert share.busy_ms == pytest.approx(0.060)
    assert share.work_ms == pytest.approx(0.090)


def test_what_no_component_launched_is_not_attributed() -> None:
    kernels = [("gemm", 310, 320, 99), ("later", 700, 705, 1)]
    events = [*request(), *launched(kernels)]
    assert attribute(events, on_device=True)[1]["attributed"] == pytest.approx(0.99)
    orphan = event("kernel", "lost", 330, 100, correlation=99)  # its call is not in the trace
    shares, _ = attribute([*events, orphan], on_device=True)
    assert shares["T_LLM_prefill"].kernels == 2  # it counts where it ran


def test_known_device_work_and_host_spins_come_back() -> None:
    """Twenty kernels of 3 µs, of which the host launches one each 4 µs; then it spins for 20 µs."""
    kernels = [("k", 302 + 4 * i, 305 + 4 * i, 3.0) for i in range(20)]
    events = [*request(), *launched(kernels)]
    events.append(event("cuda_runtime", "cudaStreamSynchronize", 385, 10))
    share = attribute(events, on_device=True)[0]["T_LLM_prefill"]
    wall_ms = 0.1  # the host's 80 µs of launching and 20 of spinning
    assert share.busy_ms == pytest.approx(0.060)
    assert wall_ms - share.busy_ms == pytest.approx(20 * 0.001 + 0.020)
    assert share.host_ms == pytest.approx(wall_ms, abs=1e-4)
    assert share.waiting_ms == pytest.approx(0.010)


def test_a_launch_bound_component_is_told_from_a_memory_bound_one() -> None:
    waiting = [("gemv", 302 + 9 * i, 307 + 9 * i, 4.0) for i in range(10)]
    full = [("gemv", 302 + i, 305 + 9.5 * i, 9.5) for i in range(10)]
    shares = [
        attribute([*request(), *launched(kernels)], on_device=True)[0]["T_LLM_prefill"]
        for kernels in (waiting, full)
    ]
    ceilings = {"compute_ms": 0.001, "memory_ms": 0.035}  # both read the same weights
    said = [bound(0.1, share.busy_ms, **ceilings) for share in shares]
    assert said == ["launches", "memory"]


def test_what_bounds_a_component() -> None:
    assert bound(10, 9, 5, 2) == "compute"
    assert bound(10, 12, 5, 7) == "memory"  # a profiled run may be slower than the others
    assert bound(10, 6, 6, 0) == "launches"
    assert bound(10, 7, 6, 0) == "compute"
    assert bound(10, 9, None, None) is None  # what lies between the components has no FLOPs
    assert bound(10, 2, None, None) == "launches"
    assert bound(0, 0, 1, 1) is None


def test_operators_are_the_work_of_a_cpu() -> None:
    """Linear holds mm holds resolve_conj: the device is busy once, each has its own time."""
    operators = [("aten::linear", 310, 50), ("aten::mm", 315, 40), ("aten::resolve_conj", 316, 1)]
    operators += [("aten::gelu", 370, 20), ("aten::gelu", 395, 3)]
    events = [*request(), *(event("cpu_op", *op) for op in operators)]
    share = attribute(events, on_device=False)[0]["T_LLM_prefill"]
    assert share.kernels == 3
    assert share.busy_ms == pytest.approx(0.073)
    assert share.work_ms == pytest.approx(0.073)
    own = {kernel["name"]: round(1e3 * kernel["ms"], 6) for kernel in share.largest}
    names = ("aten::mm", "aten::gelu", "aten::linear", "aten::resolve_conj")
    assert own == dict(zip(names, (39, 23, 10, 1), strict=True))


@pytest.mark.parametrize(
    ("names", "backends"),
    [
        (["nvjet_tst", "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16"], ["cudnn"]),
        (["fmha_cutlassF_f32_aligned_64x64_rf_sm80(PyTorchMemEffAttention)"], ["efficient"]),
        (["void pytorch_flash::flash_fwd_kernel<...>", "softmax_warp_forward"], ["flash"]),
        (["void (anonymous)::softmax_warp_forward<float>", "gemm"], ["math"]),
        (["aten::_scaled_dot_product_flash_attention_for_cpu"], ["flash"]),
        (["aten::mm"], []),
    ],
)
def test_attention_is_known_by_its_kernels(names: list[str], backends: list[str]) -> None:
    assert attention_backends(names) == backends


def test_components_become_ranges_on_host_and_device() -> None:
    kernels = [("conv", 110, 115, 330), ("gemm", 310, 465, 30)]
    events = [*request(), *launched(kernels)]
    drawn = [e for e in ranges(events, on_device=True, title="a") if e["ph"] == "X"]
    device = [(e["name"], e["ts"], e["dur"]) for e in drawn if e["tid"] == 2]
    assert device == [("T_vision_encoder", 115, 330), ("T_LLM_prefill", 465, 30)]
    host = {e["name"] for e in drawn if e["tid"] == 1}
    assert host == set(COMPONENTS)
    assert all(e["tid"] == 1 for e in ranges(events, on_device=False) if e["ph"] == "X")
