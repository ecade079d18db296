"""What public functions are given, checked at the door: each error says what was expected, what came, what to do."""

import numbers
import operator
import os
from collections.abc import Iterable
from typing import Any

from torch import Tensor

_USES = {
    "Model": "kvzip.load(directory) gives one, and it comes before a cache",
    "DenseCache": "kvzip.prefill(model, text) gives one",
    "RaggedCache": "kvzip.compress(cache, ratio) gives one",
    "Scores": "kvzip.score(model, cache).scores are some",
    "HeadScores": "kvzip.head_scores.make(model, text) gives some",
}
_PACKED = "pairs that are gone cannot be scored or chosen again; kvzip.scores.shrink keeps fewer of those it holds"


def check_kind(value: Any, *kinds: type) -> None:
    """Raises TypeError unless value is an instance of one of our kinds."""
    if not isinstance(value, kinds):
        names, got = [kind.__name__ for kind in kinds], type(value).__name__
        remedy = _PACKED if (names, got) == (["DenseCache"], "RaggedCache") else "; ".join(_USES[n] for n in names)
        raise TypeError(f"expected a {' or a '.join(names)}, got {_shown(value)}: {remedy}")


def check_path(value: Any, name: str) -> None:
    """Raises TypeError unless value is a path or the text of one."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"expected {name} to be a path, got {_shown(value)}: pass a str or a pathlib.Path")


def check_text_or_ids(value: Any, name: str) -> None:
    """Raises TypeError unless value is a text, or a tensor of token ids on one axis."""
    whole = isinstance(value, Tensor) and value.ndim == 1 and not value.is_floating_point() and not value.is_complex()
    if not (isinstance(value, str) or whole):
        raise TypeError(
            f"expected {name} to be a text, or a tensor [S] of token ids, got {_shown(value)}: join texts, or pass "
            "torch.tensor(ids)"
        )


def check_texts(value: Any, name: str) -> list[str]:
    """Returns a text as a list of one, several as a list of them. Raises TypeError for anything else."""
    texts = [value] if isinstance(value, str) else list(value) if isinstance(value, Iterable) else [value]
    wrong = [text for text in texts if not isinstance(text, str)]
    if wrong or isinstance(value, (Tensor, bytes)):
        got = _shown(wrong[0] if wrong else value)
        raise TypeError(f"expected {name} to be a text or a list of texts, got {got}: pass str")
    return texts


def check_whole_number(value: Any, name: str) -> int:
    """Returns an int of any kind (numpy's, a tensor's) as a plain one. Raises TypeError for anything else."""
    try:
        if isinstance(value, bool) or (isinstance(value, Tensor) and value.is_floating_point()):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"expected {name} to be a whole number, got {_shown(value)}: pass an int") from None


def check_real_number(value: Any, name: str) -> float:
    """Returns a number of any kind (numpy's, a tensor's of one value) as a float. Raises TypeError for other things."""
    one = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    if isinstance(value, bool) or not (isinstance(value, numbers.Real) or one):
        raise TypeError(f"expected {name} to be a number, got {_shown(value)}: pass a float")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"expected {name} that a float holds, got {value}: pass a smaller one") from None


def _shown(value: Any) -> str:
    """What came, in a few characters."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if value is None:
        return "None"
    plain = isinstance(value, (bool, int, float, str, bytes)) and len(repr(value)) <= 40
    return f"{type(value).__name__} {value!r}" if plain else type(value).__name__
