"""From an image and a question to everything that a Molmo model takes."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BatchFeature, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin

from vlm_latency.errors import UserError
from vlm_latency.molmo import tiling
from vlm_latency.molmo.configuration import MolmoConfig
from vlm_latency.molmo.image_processing import MolmoImageProcessor


class MolmoProcessor(ProcessorMixin):
    """Molmo's prompt: end of text, image tokens, then ``" User: " + text + " Assistant:"``.

    Parameters
    ----------
    image_processor : MolmoImageProcessor
    tokenizer
        Any fast tokenizer. The ids below default to its ``<im_start>``, ``<im_end>``,
        ``<im_patch>``, ``<im_col>`` and to its beginning or else end of text.
    image_start_token_id, image_end_token_id, image_token_id, image_col_token_id, bos_token_id
        Ids that need not be in the tokenizer.
    """

    def __init__(
        self,
        image_processor: MolmoImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        image_start_token_id: int | None = None,
        image_end_token_id: int | None = None,
        image_token_id: int | None = None,
        image_col_token_id: int | None = None,
        bos_token_id: int | None = None,
        chat_template: str | None = None,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

        def known(given: int | None, token: str) -> int:
            found = tokenizer.get_vocab().get(token) if given is None else given
            if found is None:
                raise UserError(f"The tokenizer has no {token}: give its id to MolmoProcessor.")
            return found

        self.image_start_token_id = known(image_start_token_id, "<im_start>")
        self.image_end_token_id = known(image_end_token_id, "<im_end>")
        self.image_token_id = known(image_token_id, "<im_patch>")
        self.image_col_token_id = known(image_col_token_id, "<im_col>")
        for found in (bos_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id):
            if found is not None:
                self.bos_token_id = found
                break
        else:
            raise UserError("The tokenizer has no end of text: give bos_token_id.")

    @classmethod
    def from_config(cls, config: MolmoConfig, tokenizer: PreTrainedTokenizerBase) -> MolmoProcessor:
        """Make the processor of a configuration; the tokenizer may lack the special tokens."""
        crop = config.vision_config.image_size
        images = MolmoImageProcessor(
            max_crops=config.max_crops,
            overlap_margins=config.overlap_margins,
            base_image_input_size=(crop, crop),
            image_patch_size=config.vision_config.patch_size,
        )
        return cls(
            images,
            tokenizer,
            image_start_token_id=config.image_start_token_id,
            image_end_token_id=config.image_end_token_id,
            image_token_id=config.image_token_id,
            image_col_token_id=config.image_col_token_id,
            bos_token_id=config.eos_token_id
            if config.bos_token_id is None
            else config.bos_token_id,
        )

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] = "",
        message_format: str = "role",
        always_start_with_space: bool = True,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare one request.

        Parameters
        ----------
        images : PIL image or uint8 array (height, width, 3), or a list of one, optional
        text
            The user's text.
        message_format
            ``"role"`` puts it between ``User:`` and ``Assistant:``, ``"none"`` leaves it.
        always_start_with_space
            Whether a space precedes it all.

        Returns
        -------
        BatchFeature
            ``input_ids`` and ``attention_mask`` int64 (1, length), and with an image also
            ``pixel_values``, ``image_masks`` and ``image_input_idx`` (positions in the prompt)
            of :meth:`MolmoImageProcessor.preprocess`. Always torch tensors.
        """
        ids = [self.bos_token_id]
        data = {}
        if images is not None:
            image = self.image_processor.preprocess(images)
            special = torch.empty(4, dtype=torch.int64)
            special[tiling.START] = self.image_start_token_id
            special[tiling.END] = self.image_end_token_id
            special[tiling.PATCH] = self.image_token_id
            special[tiling.COLUMN] = self.image_col_token_id
            ids += special[image.pop("image_tokens")[0].long()].tolist()
            idx = image["image_input_idx"]
            image["image_input_idx"] = torch.where(idx < 0, idx, idx + 1)  # behind end of text
            data = dict(image)
        ids += self.tokenizer.encode(
            self._prompt(text, message_format, always_start_with_space), add_special_tokens=False
        )
        input_ids = torch.tensor([ids])
        return BatchFeature(
            {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **data}
        )

    @staticmethod
    def _prompt(text: str | list[str], message_format: str, always_start_with_space: bool) -> str:
        if not isinstance(text, str):
            if len(text) != 1:
                raise UserError(f"Molmo's processor takes one request at a time, not {len(text)}.")
            text = text[0]
        if message_format == "role":
            text = f"User: {text} Assistant:"
        elif message_format != "none":
            raise UserError(f"message_format is 'role' or 'none', not {message_format!r}.")
        return f" {text}" if always_start_with_space else text

    @property
    def model_input_names(self) -> list[str]:
        """What `__call__` gives."""
        return ["input_ids", "attention_mask", *self.image_processor.model_input_names]
