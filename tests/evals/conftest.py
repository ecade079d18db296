"""What the tests of evals share."""

from typing import Any

import pytest


@pytest.fixture(scope="module")
def model() -> Any:
    """A small random model of two layers without a window."""
    import random_model  # which imports kvzip: not before jaxtyping's import hook stands

    return random_model.make(random_model.config())
