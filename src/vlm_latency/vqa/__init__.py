"""VQA v2 and its like: questions, images and the requests drawn from them; no Kedro, no torch.

>>> from vlm_latency.vqa import Sampling, draw_requests, open_source
>>> source = open_source(source="synthetic", size=20)
>>> requests = draw_requests(source, Sampling(num_samples=5), "natural", "exp1")
>>> len(requests)
5
"""

from vlm_latency.vqa.accuracy import normalise_answer, vqa_accuracy
from vlm_latency.vqa.images import decode_image, image_bytes
from vlm_latency.vqa.opening import open_source
from vlm_latency.vqa.sampling import (
    Sampling,
    draw_requests,
    sweep_language_requests,
    sweep_sizes_requests,
    sweep_vision_requests,
)
from vlm_latency.vqa.source import QUESTION_COLUMNS, QuestionSource

__all__ = [
    "QUESTION_COLUMNS",
    "QuestionSource",
    "Sampling",
    "decode_image",
    "draw_requests",
    "image_bytes",
    "normalise_answer",
    "open_source",
    "sweep_language_requests",
    "sweep_sizes_requests",
    "sweep_vision_requests",
    "vqa_accuracy",
]
