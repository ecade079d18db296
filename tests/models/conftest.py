"""What the tests of models share."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Transformers warns of every odd config, thousands of times in a test that draws them."""
    level = (logger := logging.getLogger("transformers")).level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)
