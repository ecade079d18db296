"""What public functions are given, checked at the door: each error says what was expected, what came, what to do."""

import numbers
import operator
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .cache import DenseCache, RaggedCache, Scores
from .models import Model

_USES = {
    Model: "kvzip.load(directory) gives one, and it comes first where a cache is needed too",
    DenseCache: "kvzip.prefill(model, text) gives one",
    RaggedCache: "kvzip.compress(cache, ratio) gives one",
    Scores: "kvzip.score(model, cache).scores are some",
}


def check_kind(value: Any, *kinds: type, name: str = "a", remedy: str = "") -> None:
    """Raises TypeError unless value is an instance of one of the kinds."""
    if not isinstance(value, kinds):
        expected = " or ".join(f"kvzip.{kind.__name__}" if kind in _USES else kind.__name__ for kind in kinds)
        remedy = remedy or "; ".join(_USES[kind] for kind in kinds if kind in _USES)
        raise TypeError(f"expected {name} {expected}, got {type(value).__name__}: {remedy}")


def check_model(value: Any) -> None:
    """Raises TypeError unless value is a model."""
    check_kind(value, Model)


def check_cache(value: Any) -> None:
    """Raises TypeError unless value is a cache of either kind."""
    check_kind(value, DenseCache, RaggedCache)


def check_dense(value: Any) -> None:
    """Raises TypeError unless value is a dense cache."""
    remedy = "it is compressed already: kvzip.scores.shrink keeps fewer of its pairs, and scoring needs all of them"
    check_kind(value, DenseCache, remedy=remedy if isinstance(value, RaggedCache) else "")


def check_text_or_ids(value: Any, name: str) -> None:
    """Raises TypeError unless value is a text, or a tensor of token ids on one axis."""
    whole = isinstance(value, Tensor) and value.ndim == 1 and not value.is_floating_point() and not value.is_complex()
    if not (isinstance(value, str) or whole):
        shape = f" {list(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else ""
        raise TypeError(
            f"expected {name} to be a text, or a tensor [S] of token ids, got {type(value).__name__}{shape}: join "
            "texts, or pass torch.tensor(ids)"
        )


def check_texts(value: Any, name: str) -> list[str]:
    """Returns a text as a list of one, or the texts of a list or another iterable. Raises TypeError for other things."""
    texts = [value] if isinstance(value, str) else list(value) if isinstance(value, Iterable) else [value]
    wrong = [text for text in texts if not isinstance(text, str)]
    if wrong or isinstance(value, (Tensor, bytes)):
        got = type(wrong[0]).__name__ if wrong else type(value).__name__
        raise TypeError(f"expected {name} to be a text or a list of texts, got {got}: pass str")
    return texts


def check_whole_number(value: Any, name: str) -> int:
    """Returns an int of any kind (numpy's, a tensor's) as a plain one. Raises TypeError for anything else."""
    try:
        if isinstance(value, bool) or (isinstance(value, Tensor) and value.is_floating_point()):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(
            f"expected {name} to be a whole number, got {value!r} ({type(value).__name__}): pass an int"
        ) from None


def check_real_number(value: Any, name: str) -> float:
    """Returns a number of any kind (numpy's, a tensor's of one value) as a float. Raises TypeError for anything else."""
    one = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    if isinstance(value, bool) or not (isinstance(value, numbers.Real) or one):
        raise TypeError(f"expected {name} to be a number, got {value!r} ({type(value).__name__}): pass a float")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"expected {name} that a float holds, got {value}: pass a smaller one") from None
