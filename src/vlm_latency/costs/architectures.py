"""The table of architectures in docs/architectures.md; ``python -m vlm_latency.costs.architectures``.

Every image-text-to-text architecture that the installed transformers has is built on shapes alone,
by its default configuration with four decoder layers, and asked which module is which and whether
its costs are known. Nothing is downloaded, and no weights are made.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vlm_latency.costs.analytic import analytic
from vlm_latency.costs.census import take_census
from vlm_latency.costs.counted import Counter
from vlm_latency.costs.shapes import RequestShape
from vlm_latency.errors import ModelError
from vlm_latency.models.components import Components, find_components
from vlm_latency.models.zoo import Family, load_zoo

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAYERS = 4
PROMPT = 64  # tokens of the prefill that is counted and worked out

_ROPE = {
    kind: {"rope_type": "default", "rope_theta": 1e4}
    for kind in ("full_attention", "sliding_attention")
}
# What a configuration needs besides its defaults to be one that can be built.
SETTINGS: dict[str, dict[str, Any]] = {
    "aya_vision": {
        "vision_config": {"model_type": "siglip_vision_model", "num_attention_heads": 16}
    },
    "chameleon": {"vocabulary_map": {"<image>": 8711}},
    "cohere_compass": {"text_config": {"rope_parameters": _ROPE}},
    "deepseek_ocr2": {
        "text_config": {
            "num_hidden_layers": LAYERS,
            "mlp_layer_types": ["dense", *["sparse"] * (LAYERS - 1)],
        }
    },
    "diffusion_gemma": {
        "text_config": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64}
    },
    "emu3": {"vocabulary_map": {"<image>": 151859, "<|extra_200|>": 151859}},
    "gemma4": {"vision_config": {"model_type": "gemma4_vision"}},
    "gemma4_unified": {"vision_config": {"model_type": "gemma4_unified_vision"}},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0]],
        "spatial_target_layers": [0],
        "downsample_rate": "1/2",
    },
    "hunyuan_vl": {"text_config": {"head_dim": 128}},
}

HEAD = """# Architectures

Which module is which in every image-text-to-text architecture of transformers {version}, found by the
rule of [components.py](../src/vlm_latency/models/components.py). Made by
`python -m vlm_latency.costs.architectures`, from each architecture's default configuration, on shapes
alone: a row says what the rule finds, not that a checkpoint was run.

* **run**: `tests` where a tiny model of the family with random weights is measured in this project's tests.
* **costs**: `exact` where every module has a rule and a prefill of {prompt} tokens through {layers} layers
  costs what PyTorch's counter counts; `by rule` where the decoder does not run on shapes, so that nothing
  was compared; `partly` where the parts named are not known (their columns are empty, latency is still
  measured); `refused` where none are.
* A refused architecture says why. Where parts are not found, give their paths in a zoo file
  (`model.zoo_file`), for one model or for the whole family:

```yaml
families:
  some_model_type:
    components: {{vision_encoder: model.vision, projector: [model.connector], language_model: model.text, head: lm_head}}
```

{count} architectures: {found} with all parts, {refused} refused.

| architecture | run | vision encoder | projector | decoder | costs |
| --- | --- | --- | --- | --- | --- |
"""


class Row(NamedTuple):
    """One architecture; `refused` is why there is nothing else."""

    model_type: str
    components: Components | None = None
    costs: str = ""
    refused: str = ""

    def line(self, tested: bool) -> str:
        """Write the row of the table."""
        run = "tests" if tested else ""
        if self.components is None:
            return f"| {self.model_type} | {run} | refused: {self.refused} | | | |"
        parts = self.components
        encoders = ", ".join((parts.vision_encoder, *parts.more_encoders))
        projector = ", ".join(parts.projector)
        return (
            f"| {self.model_type} | {run} | {encoders} | {projector} | {parts.language_model} | "
            f"{self.costs} |"
        )


def rows() -> Iterator[Row]:
    """Go through all architectures, by name."""
    from transformers.models.auto import modeling_auto

    from vlm_latency.molmo import register

    register()
    names: Any = vars(modeling_auto)["MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"]
    for model_type in sorted({*names, "molmo"}):
        try:
            model = build(model_type)
            family = load_zoo().families.get(model_type, Family())
            parts = find_components(model, family.components)
        except ModelError as error:
            yield Row(model_type, refused=_short(error))
        else:
            yield Row(model_type, parts, costs(model, parts, model_type))


def build(model_type: str) -> PreTrainedModel:
    """Make an architecture's model on the meta device.

    Raises
    ------
    ModelError
        When its default configuration makes none, or needs what is not installed.
    """
    from transformers import AutoConfig

    from vlm_latency.models.architecture import build_on_meta

    try:
        config = AutoConfig.for_model(model_type, **SETTINGS.get(model_type, {}))
    except Exception as error:  # each configuration class raises kinds of its own
        raise ModelError(f"its default configuration is none: {error}") from None
    text = config.get_text_config(decoder=True)
    whole = getattr(text, "num_hidden_layers", None)
    if isinstance(whole, int) and whole > LAYERS:
        before = {name: value for name, value in vars(text).items() if isinstance(value, list)}
        try:
            text.num_hidden_layers = LAYERS
            for name, value in before.items():
                if len(value) == whole:
                    setattr(text, name, value[:LAYERS])
            return build_on_meta(config, "sdpa")
        except Exception:  # lists that name layers by number, frozen configurations
            config = AutoConfig.for_model(model_type, **SETTINGS.get(model_type, {}))
    try:
        return build_on_meta(config, "sdpa")
    except ModelError as first:
        try:
            return build_on_meta(config, "eager")
        except ModelError:
            reason = str(first).rpartition(" cannot be built: ")[2]
            kind = "" if "requires" in reason else "its default configuration makes no model: "
            raise ModelError(f"{kind}{reason}") from None


def costs(model: Any, parts: Components, model_type: str) -> str:
    """Say how far the costs of a model are known."""
    try:
        census = take_census(model, parts, model_type)
    except Exception as error:
        return f"refused: {type(error).__name__}"
    if census.has_cross_attention:
        return "refused: the decoder attends to the image in layers of its own"
    unknown = {part: names for part, names in census.unknown_by_part.items() if names}
    if unknown:
        return f"partly: not {', '.join(sorted(unknown))}"
    shape = RequestShape(0, 0, PROMPT, 0, 0, 0, 1)
    try:
        counted = Counter(model, parts, census.sliding_window).prefill(PROMPT).flops
    except Exception:  # whatever a model's code raises without values
        return "by rule"
    worked_out = int(analytic(census, shape)["llm_prefill"])
    return (
        "exact"
        if counted == worked_out
        else f"partly: prefill {worked_out / counted:.6f} of counted"
    )


def table() -> str:
    """Write the whole page."""
    import transformers

    tested = {
        str(entry.config["model_type"])
        for name, entry in load_zoo().models.items()
        if name.startswith("tiny-")
    }
    found = list(rows())
    head = HEAD.format(
        version=transformers.__version__,
        prompt=PROMPT,
        layers=LAYERS,
        count=len(found),
        found=sum(row.components is not None for row in found),
        refused=sum(row.components is None for row in found),
    )
    return head + "\n".join(row.line(row.model_type in tested) for row in found) + "\n"


def _short(error: Exception) -> str:
    """The reason in one cell: without the remedy, which the page's head has."""
    text = " ".join(str(error).split()).replace("|", "\\|")
    return text.partition(". Give the paths")[0].partition(" You can install")[0][:300]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/architectures.md")
    path.write_text(table(), encoding="utf-8")
