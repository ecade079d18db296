"""The head scores that come with the library, on real weights."""

from pathlib import Path

import pytest
import torch

import kvzip
from kvzip import head_scores


@pytest.fixture(scope="module")
def model(smollm2: Path) -> kvzip.Model:
    return kvzip.load(smollm2, dtype=torch.float32)


def test_a_model_finds_its_own_scores_by_its_weights(model: kvzip.Model) -> None:
    found, named = head_scores.shipped(model), head_scores.shipped("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert torch.equal(found.values, named.values) and found.sources == named.sources
    assert found.values.shape == (30, 3) and found.fingerprint == head_scores.fingerprint_of(model)
