"""From an image and a prompt to a model's inputs, and how many tokens of which kind they are.

The family's own processor does the work. With random weights it is put together offline: the
family's PIL image processor and the bundled tokenizer, with the published chat template.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from vlm_latency.errors import DataError, ModelError
from vlm_latency.models.sizes import check_sizes
from vlm_latency.models.zoo import Family
from vlm_latency.molmo.tiling import Tiles

if TYPE_CHECKING:
    import torch
    from PIL import Image


log = logging.getLogger("vlm_latency")

# Characters of a prompt. The longest context there is (a million tokens or so) is never meant by a
# question, and a tokenizer may take minutes over a text without spaces.
MAX_PROMPT = 200_000


@dataclass(frozen=True)
class TokenCounts:
    """What one request is made of.

    Attributes
    ----------
    num_crops
        Images that the encoder sees, the global one among them.
    tiling_rows, tiling_cols
        Molmo's grid of tiles; None for models that tile otherwise or not at all.
    num_vision_patches
        Patches that the encoder sees, over all crops.
    num_vision_tokens
        Positions of the prompt that carry an image feature.
    num_image_special_tokens
        What the image brings besides: start, end, row and column marks.
    num_total_tokens
        Length of the prompt.
    """

    num_crops: int
    tiling_rows: int | None
    tiling_cols: int | None
    num_vision_patches: int
    num_vision_tokens: int
    num_image_special_tokens: int
    num_total_tokens: int

    @classmethod
    def of_tiles(
        cls, tiles: Tiles, width: int, height: int, num_text_tokens: int = 0
    ) -> TokenCounts:
        """Count an image that is cut into tiles, and so many tokens of text."""
        found = tiles.image_tokens(width, height)
        total = found.num_vision_tokens + found.num_image_special_tokens + num_text_tokens
        return cls(**found._asdict(), num_total_tokens=total)

    @property
    def num_language_tokens(self) -> int:
        """All positions that carry no image feature."""
        return self.num_total_tokens - self.num_vision_tokens


class Prepared:
    """One request, ready for ``generate(**inputs)``.

    Attributes
    ----------
    inputs : dict of tensors, batch 1
    counts : TokenCounts
        Worked out when first asked for, so that timing `VLM.prepare` times the preparation only.
    """

    def __init__(self, inputs: dict[str, torch.Tensor], count: Callable[[], TokenCounts]) -> None:
        self.inputs = inputs
        self._count = count

    @cached_property
    def counts(self) -> TokenCounts:
        return self._count()

    def moved(self, inputs: dict[str, torch.Tensor]) -> Prepared:
        """Give the same request with its inputs elsewhere."""
        return Prepared(inputs, lambda: self.counts)


class Preparer:
    """Prepares requests for one model.

    Parameters
    ----------
    processor
        The family's processor.
    config
        The model's configuration.
    build_prompt
        From the user's prompt to the whole text, with the image's placeholder in it. None: the
        processor does it by itself (Molmo).
    image_mark
        How the image is written in that text.
    """

    def __init__(
        self,
        processor: Any,
        config: Any,
        build_prompt: Callable[[str], str] | None,
        image_mark: str | None,
    ) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.config = config
        self.build_prompt = build_prompt
        self.image_mark = image_mark

    @property
    def tiles(self) -> Tiles | None:
        """How the processor cuts an image, where that is into Molmo's tiles."""
        found: Tiles | None = getattr(self.processor.image_processor, "tiles", None)
        return found

    def __call__(self, image: Image.Image, prompt: str) -> Prepared:
        """Prepare one request on the CPU.

        Raises
        ------
        DataError
            When the prompt is too long or writes a mark that stands for an image, or the
            processor refuses the image.
        """
        check_prompt(prompt)
        text = prompt if self.build_prompt is None else self.build_prompt(prompt)
        self._check_marks(text, prompt)
        try:
            inputs = dict(self.processor(images=image, text=text, return_tensors="pt"))
        except MemoryError:
            raise
        except Exception as error:  # every processor refuses in its own way
            raise DataError(
                f"{type(self.processor).__name__} does not take this image of "
                f"{image.width}×{image.height} pixels with its prompt: "
                f"{type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
        size = image.size
        return Prepared(inputs, lambda: self._count(inputs, text, size))

    @cached_property
    def _marks(self) -> dict[str, int]:
        """What stands for an image in a text, and how often a prompt has it without a question's."""
        if self.build_prompt is None:
            return {}
        found = {self.image_mark, getattr(self.processor, "image_token", None)} - {None}
        bare = self.build_prompt("")
        return {str(mark): bare.count(str(mark)) for mark in found}

    def _check_marks(self, text: str, prompt: str) -> None:
        for mark, times in self._marks.items():
            if text.count(mark) != times:
                raise DataError(
                    f"the prompt {prompt[:100]!r} writes {mark!r}, which stands for an image; leave it "
                    "out"
                )

    def _count(
        self, inputs: Mapping[str, torch.Tensor], text: str, size: tuple[int, int]
    ) -> TokenCounts:
        ids = inputs["input_ids"][0]
        total = len(ids)
        if "image_input_idx" in inputs:  # the processor says which positions carry a feature
            places = inputs["image_input_idx"]
            vision = int(places[places >= 0].unique().numel())
            of_text = self.processor(text=text)["input_ids"].shape[1]
        else:
            image = (ids == image_token_id(self.config, self.processor)).nonzero()[:, 0]
            vision = len(image)
            of_text = self._text_around(ids.tolist(), text, image.tolist())
        crops, patches = self._crops_and_patches(inputs["pixel_values"])
        rows = cols = None
        if self.tiles is not None:
            rows, cols = self.tiles.grid(*size)
        return TokenCounts(
            num_crops=crops,
            tiling_rows=rows,
            tiling_cols=cols,
            num_vision_patches=patches,
            num_vision_tokens=vision,
            num_image_special_tokens=total - vision - of_text,
            num_total_tokens=total,
        )

    def _text_around(self, ids: list[int], text: str, image: list[int]) -> int:
        """Tokens of the prompt before and behind the image that are those of the text alone.

        A text by itself may have other tokens than in its place (a mark for its first word): only
        tokens that are in the prompt are counted.
        """
        first, *rest = text.split(str(self.image_mark))
        before = self.tokenizer(first)["input_ids"]
        behind = self.tokenizer(rest[-1] if rest else "", add_special_tokens=False)["input_ids"]
        start, end = (image[0], image[-1] + 1) if image else (len(ids), len(ids))
        return _same(before, ids[:start]) + _same(behind[::-1], ids[end:][::-1])

    def _crops_and_patches(self, pixels: torch.Tensor) -> tuple[int, int]:
        """Pixels come as (…, channels, height, width) or as flattened patches (…, patches, values)."""
        vision = self.config.vision_config
        shape = pixels.shape
        side, channels = vision.patch_size, getattr(vision, "num_channels", 3)
        rows, cols = (side, side) if isinstance(side, int) else side
        values = channels * rows * cols
        flat = shape[-1] == values and shape[-1] != shape[-2]
        if len(shape) >= 4 and shape[-3] == channels and not flat:
            crops = shape[:-3].numel()
            return crops, crops * (shape[-2] // rows) * (shape[-1] // cols)
        return shape[:-2].numel(), shape[:-1].numel()


def check_prompt(prompt: str) -> None:
    """Refuse a text that no tokenizer should be given.

    Raises
    ------
    DataError
        With its length.
    """
    if len(prompt) > MAX_PROMPT:
        raise DataError(
            f"the prompt has {len(prompt):,} characters, more than the {MAX_PROMPT:,} that are taken: "
            f"{prompt[:50]!r}…; shorten the question"
        )


def _same(one: list[int], other: list[int]) -> int:
    """How many values two lists have in common from their beginning."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def image_token_id(config: Any, processor: Any = None) -> int:
    """Find the id at the positions that carry an image feature."""
    for holder in (config, processor):
        for name in ("image_token_id", "image_token_index", "image_patch_id"):
            found = getattr(holder, name, None)
            if isinstance(found, int):
                return found
    raise ModelError(
        f"the configuration of model_type {config.model_type!r} has no image_token_id: the "
        "positions of the image cannot be told from the text"
    )


def offline_preparer(
    family: Family,
    config: Any,
    processor_settings: Mapping[str, Any],
    image_settings: Mapping[str, Any],
) -> Preparer:
    """Put a processor together without any file: for models with random weights."""
    tokenizer = _family_tokenizer(family, config)
    if family.native and family.processor:
        import vlm_latency.molmo

        own = getattr(vlm_latency.molmo, family.processor)
        return wrap_processor(own.from_config(config, tokenizer), config, family)
    if not (family.processor and family.image_processor and family.image):
        raise ModelError(
            f"requests for random weights of model_type {config.model_type!r} need the family's "
            "processor, image_processor and image mark: describe it under `families:` of a zoo "
            "file (model.zoo_file), or use pretrained weights, which bring their own processor"
        )
    image_class = _from_transformers(family.image_processor, config.model_type)
    image_processor = image_class(**{**family.image_settings, **image_settings})
    processor = _without_video(_from_transformers(family.processor, config.model_type))(
        image_processor=image_processor,
        tokenizer=tokenizer,
        **{**family.processor_settings, **processor_settings},
    )
    return Preparer(processor, config, _template(family), family.image)


def pretrained_preparer(
    family: Family,
    config: Any,
    path: str,
    *,
    revision: str | None,
    trust_remote_code: bool,
) -> Preparer:
    """Load the processor that a checkpoint brings."""
    from transformers import AutoProcessor
    from transformers.models.auto import processing_auto
    from transformers.utils.import_utils import is_torchvision_available

    where = {"revision": revision, "trust_remote_code": trust_remote_code}
    names: Any = vars(processing_auto)["PROCESSOR_MAPPING_NAMES"]
    known = family.processor or names.get(config.model_type)
    try:
        if family.native or not known:
            processor = AutoProcessor.from_pretrained(path, **where)
        else:
            # What AutoProcessor would load, without the video part.
            cls = _without_video(_from_transformers(known, config.model_type))
            backend = {} if is_torchvision_available() else {"backend": "pil"}
            processor = cls.from_pretrained(path, **backend, **where)
        settings = processor.to_dict()  # which a tokenizer alone does not have
    except Exception as error:  # a file of any content, read by any family's code
        raise ModelError(
            f"the processor of {path} does not load; expected the files of its tokenizer "
            "(tokenizer.json) and image processor (preprocessor_config.json) beside config.json: "
            f"{type(error).__name__}: {' '.join(str(error).split())}"
        ) from None
    check_sizes(settings)
    return wrap_processor(processor, config, family)


def wrap_processor(
    processor: Any,
    config: Any,
    family: Family,
    prompt_builder: Callable[[str], str] | None = None,
) -> Preparer:
    """Wrap a processor that is there: by its chat template, or else the family's."""
    if family.prompt is None and prompt_builder is None:
        return Preparer(processor, config, None, None)
    mark = family.image or getattr(processor, "image_token", None)
    if not mark:
        raise ModelError(
            f"{type(processor).__name__} names no image_token: where the image goes in the prompt "
            "is unknown"
        )
    _complete(processor, config)
    image_token_id(config, processor)  # refused now rather than at the first request
    marks = [mark, getattr(processor, "image_token", None) or mark]
    if prompt_builder is None:
        chat = getattr(processor, "chat_template", None)
        prompt_builder = _chat(processor, marks, family) if chat else _template(family, mark)
    if mark not in prompt_builder("x"):
        mark = marks[1]
    return Preparer(processor, config, prompt_builder, mark)


def _complete(processor: Any, config: Any) -> None:
    """Give an old checkpoint's processor what its files lacked, from the model's configuration."""
    vision = getattr(config, "vision_config", None)
    if getattr(processor, "patch_size", 0) is None:
        processor.patch_size = getattr(vision, "patch_size", None)
        if getattr(processor, "num_additional_image_tokens", None) == 0:
            has_class_token = "clip" in str(getattr(vision, "model_type", ""))
            processor.num_additional_image_tokens = int(has_class_token)
    if getattr(processor, "vision_feature_select_strategy", "") is None:
        strategy = getattr(config, "vision_feature_select_strategy", None)
        processor.vision_feature_select_strategy = strategy
    for name in ("patch_size", "vision_feature_select_strategy"):
        if getattr(processor, name, "") is None:
            raise ModelError(
                f"{type(processor).__name__} has no {name}, and neither has config.json; add it to "
                "the processor's configuration (processor_config.json)"
            )


def _template(family: Family, mark: str | None = None) -> Callable[[str], str]:
    written = family.prompt or "{image}{prompt}"
    before, after = written.replace("{image}", mark or family.image or "").split("{prompt}")
    return lambda prompt: before + prompt + after


def _chat(processor: Any, marks: list[str], family: Family) -> Callable[[str], str]:
    """Write prompts by the processor's chat template.

    A template that takes texts only is given the image's mark in the text; one that takes neither
    is replaced by the family's published prompt.

    Raises
    ------
    ModelError
        When the template places no image, and the family's prompt is not known.
    """
    bos = processor.tokenizer.bos_token
    doubled = bool(bos) and processor.tokenizer("")["input_ids"][:1] == [
        processor.tokenizer.bos_token_id
    ]

    def render(content: Any) -> str:
        text: str = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        return text.removeprefix(bos) if doubled else text

    ways: list[Callable[[str], str]] = [
        lambda prompt: render([{"type": "image"}, {"type": "text", "text": prompt}]),
        lambda prompt: render(f"{marks[0]}\n{prompt}"),
    ]
    reason = "the image's mark or the question is not in what it writes"
    for way in ways:
        try:
            found = way(_PROBE)
        except Exception as error:  # jinja's, and whatever a template raises
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            continue
        printed = "{'type'" in found or '{"type"' in found
        if found.count(_PROBE) == 1 and any(found.count(m) == 1 for m in marks) and not printed:
            return way
    if family.image and family.prompt:
        log.warning(
            "the checkpoint's chat template cannot place an image (%s); the family's published prompt "
            "is used",
            reason,
        )
        return _template(family)
    raise ModelError(
        f"the chat template of {type(processor).__name__} cannot place an image ({reason}); give a "
        "template that takes a list of an image and a text, or a prompt for the family in a zoo file "
        "(model.zoo_file)"
    )


_PROBE = "where is the image"


def _family_tokenizer(family: Family, config: Any) -> Any:
    """The bundled tokenizer with the family's special tokens at the configuration's ids."""
    from vlm_latency.models.tokenizer import build_tokenizer

    text_config = config.get_text_config()
    vocab_size = text_config.vocab_size - getattr(config, "additional_vocab_size", 0)
    rows = text_config.vocab_size + getattr(text_config, "additional_vocab_size", 0)

    def configured(key: str) -> int | None:
        for holder in (config, text_config):
            value = getattr(holder, key, None)
            value = value[0] if isinstance(value, list | tuple) else value
            if isinstance(value, int):
                return value
        return None

    named: dict[str, str] = {}
    ids: dict[str, int] = {}
    waiting: list[str] = []
    specs = [*family.tokens.items(), *((None, token) for token in family.more)]
    for name, spec in specs:
        token = spec if isinstance(spec, str) else spec["token"]
        key = f"{name}_id" if isinstance(spec, str) else spec["id"]
        if name:
            named[name] = token
        found = configured(key) if key else None
        if found is not None and found not in ids.values():
            ids.setdefault(token, found)
        elif token not in ids:
            waiting.append(token)
    top = vocab_size - 1
    for token in dict.fromkeys(waiting):
        if token in ids:
            continue
        while top in ids.values():
            top -= 1
        ids[token] = top
    return build_tokenizer(named, ids, rows)


def _from_transformers(name: str, model_type: str) -> Any:
    import transformers

    found = getattr(transformers, name, None)
    if found is None:
        raise ModelError(
            f"transformers {transformers.__version__} has no {name}, which model_type "
            f"{model_type!r} asks for in the zoo"
        )
    if "torchvision" in getattr(found, "_backends", ()):
        raise ModelError(
            f"preparing images for model_type {model_type!r} needs torchvision, which is not "
            'installed; "pip install torchvision"'
        )
    return found


def _without_video(processor_class: Any) -> Any:
    """The processor for images only: no video is measured, and that part needs torchvision."""
    from transformers.processing_utils import ProcessorMixin

    class ImagesOnly(ProcessorMixin):
        """Comes after the family's class, whose constructor hands its parts on to here."""

        def __init__(self, *parts: Any, **kwargs: Any) -> None:
            super().__init__(*(part for part in parts if part is not None), **kwargs)

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

    return type(processor_class.__name__, (processor_class, ImagesOnly), {})
