"""What the tests of ops share."""

import math

import pytest
import torch


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel does not write reads as NaN."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        fresh = empty(*args, **kwargs)
        return fresh.fill_(math.nan) if fresh.is_floating_point() else fresh

    monkeypatch.setattr(torch, "empty", poisoned)
