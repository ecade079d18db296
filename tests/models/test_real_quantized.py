"""A real model with rounded weights answers the questions that the 16-bit one answers."""

from pathlib import Path

import pytest
import torch

import kvzip

QUESTIONS = ["Who keeps the bees?", "Where does the boat lie?", "What is the color of the door?"]
ANSWERS = ["anna", "barn", "green"]
TEXT = (
    "Anna keeps the bees behind her house. Her brother Tom repairs clocks in the next town. The old boat lies in the barn "
    "since the summer. The door of the house is painted green, and the roof is new."
)


def answers(model: kvzip.Model) -> list[str]:
    cache = kvzip.prefill(model, TEXT)
    return [answer.text for answer in kvzip.generate(model, cache, QUESTIONS, max_tokens=24)]


@pytest.mark.slow
@pytest.mark.parametrize("form", [None, "fp8", "int8", "int4"])
def test_rounded_weights_answer_the_same_questions(smollm2: Path, form: str | None) -> None:
    model = kvzip.load(smollm2, dtype=torch.float32, device="cpu", weights=form)
    found = answers(model)
    right = sum(word in text.lower() for word, text in zip(ANSWERS, found, strict=True))
    assert right >= (2 if form == "int4" else 3), found
