"""A VQA v2 of five images and ten questions in the official layout, made anew for each test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlm_latency.vqa.images import image_bytes, noise_recipe

SIZES = [(64, 48), (48, 64), (50, 50), (80, 40), (64, 48)]


def documents() -> tuple[dict[str, Any], dict[str, Any]]:
    """The questions' and the annotations' file, as objects."""
    questions, annotations = [], []
    for image_id in range(1, 6):
        for n in range(2):
            question_id = image_id * 1000 + n
            questions.append(
                {"image_id": image_id, "question": f"Is it {n}?", "question_id": question_id}
            )
            answers = ["yes"] * 9 + ["no"]
            annotations.append(
                {
                    "question_type": "is it",
                    "multiple_choice_answer": "yes",
                    "answers": [
                        {"answer": answer, "answer_confidence": "yes", "answer_id": i + 1}
                        for i, answer in enumerate(answers)
                    ],
                    "image_id": image_id,
                    "answer_type": "yes/no",
                    "question_id": question_id,
                }
            )
    return {"info": {}, "questions": questions}, {"info": {}, "annotations": annotations}


class Official:
    """The folder, and its files to be written again with faults."""

    def __init__(self, root: Path, subtype: str = "val2014") -> None:
        self.root, self.subtype = root, subtype
        self.images = root / subtype
        self.images.mkdir(parents=True)
        for image_id, (width, height) in enumerate(SIZES, start=1):
            data = image_bytes({"image_recipe": noise_recipe(image_id, width, height)}, None)
            self.image(image_id).write_bytes(data)
        self.questions_path = root / f"v2_OpenEnded_mscoco_{subtype}_questions.json"
        self.annotations_path = root / f"v2_mscoco_{subtype}_annotations.json"
        self.questions, self.annotations = documents()
        self.write()

    def image(self, image_id: int) -> Path:
        return self.images / f"COCO_{self.subtype}_{image_id:012d}.jpg"

    def write(self) -> None:
        self.questions_path.write_text(json.dumps(self.questions))
        self.annotations_path.write_text(json.dumps(self.annotations))


@pytest.fixture
def official(tmp_path: Path) -> Official:
    return Official(tmp_path / "vqa")
