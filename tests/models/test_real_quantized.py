"""A real model with rounded weights: what it thinks of a text, and whether it answers what the 16-bit one answers."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import kvzip
from kvzip import prompts
from kvzip.models import forward, logits

ROOT = Path(__file__).parents[2]
QUESTIONS, ANSWERS = ["Who keeps the bees?", "Where does the boat lie?"], ["anna", "barn"]
TEXT = (
    "Anna keeps the bees behind her house. Her brother Tom repairs clocks in the next town. The old boat lies in the "
    "barn since the summer. The door of the house is painted green, and the roof is new."
)
WORSE = {"int8": 0.02, "fp8": 0.04, "int4": 0.5}  # nats a token, at most; measured 0.009, 0.020 and 0.32 of 3.31


def surprise(model: kvzip.Model) -> float:
    """Mean negative log-likelihood of a text's tokens."""
    text = (ROOT / "examples" / "document.txt").read_text(encoding="utf-8")
    ids = torch.tensor(prompts.encode_text(model.tokenizer, text)[:400])

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    with torch.no_grad():
        out = logits(model, forward(model, ids[None], torch.arange(len(ids)), attend))[0]
    return float(torch.nn.functional.cross_entropy(out[:-1].float(), ids[1:]))


@pytest.mark.slow
def test_rounded_weights_say_what_the_16_bit_ones_say(smollm2: Path) -> None:
    def load(form: str | None) -> kvzip.Model:
        return kvzip.load(smollm2, dtype=torch.bfloat16, device="cpu", weights=form)

    plain = surprise(load(None))
    found = {}
    for form, most in WORSE.items():
        model = load(form)
        found[form] = surprise(model) - plain
        assert abs(found[form]) < most, found
        if form != "int4":
            cache = kvzip.prefill(model, TEXT)
            texts = [answer.text.lower() for answer in kvzip.generate(model, cache, QUESTIONS, max_tokens=12)]
            assert all(word in text for word, text in zip(ANSWERS, texts, strict=True)), texts
    assert found["int4"] > 5 * abs(found["int8"]), "fewer bits say less"
