"""The decoder's attention goes through the backend that was asked for; the encoder's does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from vlm_latency.errors import ModelError
from vlm_latency.models import ModelHandle, describe, load
from vlm_latency.models.attention import attending, check_backend, encoder_backend
from vlm_latency.options import ModelOptions

NAMES = ("flash", "mem_efficient", "cudnn", "math")


def allowed() -> dict[str, bool]:
    return {name: getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in NAMES}


@pytest.fixture
def image() -> Image.Image:
    return Image.effect_noise((336, 336), 64).convert("RGB")


@pytest.fixture(scope="module")
def vlm() -> Any:
    return load(ModelOptions(name="tiny-molmo"))


def seen_inside(vlm: Any, backend: str, image: Any) -> dict[str, dict[str, bool]]:
    seen: dict[str, dict[str, bool]] = {}
    parts: dict[str, nn.Module] = {
        "encoder": vlm.components.vision_encoder,
        "projector": vlm.components.projector_parts[0],
        "decoder": next(
            module
            for module in vlm.components.language_model.modules()
            if isinstance(module, nn.ModuleList)
        )[0],
    }
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: seen.update({name: allowed()}))
        for name, module in parts.items()
    ]
    inputs = vlm.place(vlm.prepare(image, "what?")).inputs
    with attending(vlm.model, vlm.components, backend):
        vlm.model.generate(**inputs, max_new_tokens=2, do_sample=False, eos_token_id=None)
    for handle in handles:
        handle.remove()
    return seen


def test_one_backend_is_allowed_in_the_decoder_alone(vlm: Any, image: Any) -> None:
    before = allowed()
    seen = seen_inside(vlm, "math", image)
    assert [name for name, on in seen["decoder"].items() if on] == ["math"]
    assert seen["encoder"] == seen["projector"] == before
    assert allowed() == before
    assert seen_inside(vlm, "auto", image)["decoder"] == before


def test_nothing_is_left_behind_where_the_decoder_fails(vlm: Any, image: Any) -> None:
    before = allowed()
    hooks = len(vlm.components.language_model._forward_hooks)

    def explode(*_: Any) -> None:
        raise RuntimeError("no")

    handle = vlm.components.head.register_forward_hook(explode)
    inside = vlm.components.language_model.register_forward_hook(explode)
    inputs = vlm.place(vlm.prepare(image, "what?")).inputs
    with pytest.raises(RuntimeError, match="no"), attending(vlm.model, vlm.components, "math"):
        vlm.model.generate(**inputs, max_new_tokens=2)
    handle.remove()
    inside.remove()
    assert allowed() == before
    assert len(vlm.components.language_model._forward_hooks) == hooks


def test_what_cannot_work_is_refused_with_what_can() -> None:
    config = describe(ModelOptions(name="tiny-molmo")).transformers_config
    cpu = torch.device("cpu")
    with pytest.raises(ModelError, match=r"sdpa_backend=cudnn .*float32 on cpu.*math"):
        check_backend(ModelOptions(sdpa_backend="cudnn"), config, cpu, torch.float32)
    with pytest.raises(ModelError, match=r"no effect with model.attn_implementation=eager"):
        check_backend(
            ModelOptions(sdpa_backend="math", attn_implementation="eager"),
            config,
            cpu,
            torch.float32,
        )
    for backend in ("auto", "math"):
        check_backend(ModelOptions(sdpa_backend=backend), config, cpu, torch.float32)


def test_it_is_refused_before_the_weights_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm_latency.models.loading.materialise", lambda *_: pytest.fail("made"))
    options = ModelOptions(name="tiny-molmo", device="cpu", sdpa_backend="efficient")
    for refused in (lambda: load(options), ModelHandle(options).check_fits):  # the preflight's
        with pytest.raises(ModelError, match="sdpa_backend=efficient"):
            refused()


def test_the_encoders_backend_is_named() -> None:
    config = describe(ModelOptions(name="tiny-molmo")).transformers_config
    assert encoder_backend(config, torch.device("cpu"), torch.float32) in ("flash", "math")
    assert encoder_backend(object(), torch.device("cpu"), torch.float32) is None


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flash", "cudnn", "efficient", "math"])
def test_a_backend_computes_the_same_on_a_gpu(backend: str, image: Any) -> None:
    """In bfloat16 and with Molmo's float32 attention in vision, which flash and cuDNN refuse."""
    vlm = load(ModelOptions(name="tiny-molmo", device="cuda", dtype="bfloat16"))
    config, device = vlm.architecture.transformers_config, vlm.device
    try:
        check_backend(ModelOptions(sdpa_backend=backend), config, device, vlm.dtype)
    except ModelError as error:
        pytest.skip(str(error))  # the tiny decoder's heads are too narrow for some
    inputs = vlm.place(vlm.prepare(image, "what?")).inputs
    with torch.inference_mode():
        expected = vlm.model(**inputs).logits
        with attending(vlm.model, vlm.components, backend):
            found = vlm.model(**inputs).logits
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.1)
