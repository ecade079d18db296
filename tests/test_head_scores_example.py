"""The head scores that come with the library, and the example that answers with them, on real weights."""

import io

import pytest
import torch
from rich.console import Console

import demo
import head_scores as example
import kvzip
import small_models
from kvzip import head_scores


@pytest.fixture(scope="module")
def model() -> kvzip.Model:
    try:
        path = small_models.model_dir(demo.DEFAULT_MODEL)
    except small_models.Unavailable as missing:
        pytest.skip(f"left out, {demo.DEFAULT_MODEL} cannot be had here: {missing}")
    return kvzip.load(path, dtype=torch.float32)


def test_a_model_finds_its_own_scores_by_its_weights(model: kvzip.Model) -> None:
    found, named = head_scores.shipped(model), head_scores.shipped("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert torch.equal(found.values, named.values) and found.sources == named.sources
    assert found.values.shape == (30, 3) and found.fingerprint == head_scores.fingerprint_of(model)


def test_the_example_answers_from_part_of_the_heads(model: kvzip.Model) -> None:
    shown = io.StringIO()
    answers = example.run(model, None, Console(file=shown, width=100))
    assert sum(map(demo.is_right, demo.QUESTIONS, answers)) >= 4, answers
    heads = [line for line in shown.getvalue().splitlines() if line.startswith("head ")]
    assert [len(line) - len("head 0  ") for line in heads] == [30] * 3
    assert sum(line.count("\u2588") for line in heads) == int(0.6 * 90)
