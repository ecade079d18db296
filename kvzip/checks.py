"""Checks of the arguments of public functions: each error says what was expected, what came and what to do."""

import math
import numbers
import operator
import os
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

import torch
from torch import Tensor

from .ratios import check_ratio

_USES = {
    "Model": "kvzip.load(directory) gives one, and it comes before a cache",
    "DenseCache": "kvzip.prefill(model, text) gives one",
    "RaggedCache": "kvzip.compress(cache, ratio) gives one",
    "Scores": "kvzip.score(model, cache).scores are some",
    "HeadScores": "kvzip.head_scores.make(model, text) gives some",
    "Decoder": "kvzip.Decoder(model, cache) makes one",
}
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_PACKED = "pairs that are gone cannot be scored or chosen again; kvzip.scores.shrink keeps fewer of those it holds"


def check_kind(value: Any, *kinds: type) -> None:
    """Raises TypeError unless value is an instance of one of our kinds."""
    if not isinstance(value, kinds):
        names, got = [kind.__name__ for kind in kinds], type(value).__name__
        remedy = _PACKED if (names, got) == (["DenseCache"], "RaggedCache") else "; ".join(_USES[n] for n in names)
        raise TypeError(f"expected a {' or a '.join(names)}, got {_shown(value)}: {remedy}")


def check_path(value: Any, name: str) -> None:
    """Raises TypeError unless value is a path or the text of one, ValueError for text that no file system takes."""
    text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(text, str):
        raise TypeError(f"expected {name} to be a path, got {_shown(value)}: pass a str or a pathlib.Path")
    try:
        nameless = b"\0" in os.fsencode(text)
    except UnicodeEncodeError:
        nameless = True
    if nameless:
        raise ValueError(
            f"expected {name} to be a path that a file can have, got {text!a}: take NUL characters and halves of "
            "surrogate pairs out of it"
        )


def check_mapping(value: Any, name: str) -> None:
    """Raises TypeError unless value is None or a mapping with str keys."""
    if value is not None and not (isinstance(value, Mapping) and all(isinstance(key, str) for key in value)):
        raise TypeError(
            f"expected {name} to be a dict of values by their names, got {_shown(value)}: pass one, or None"
        )


def check_text(value: Any, name: str) -> None:
    """Raises TypeError unless value is None or a text."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"expected {name} to be a text, got {_shown(value)}: pass a str, or None")


def check_choice(value: Any, name: str, choices: Iterable[str]) -> None:
    """Raises ValueError unless value is None or one of some words."""
    words = list(choices)
    if value is not None and not (isinstance(value, str) and value in words):
        raise ValueError(f"expected {name} to be one of {words}, got {_shown(value)}: pass one, or None")


def check_dtype(value: Any) -> None:
    """Raises TypeError unless value is a floating dtype of 16 bits or more."""
    if not isinstance(value, torch.dtype) or not value.is_floating_point or value.itemsize < 2:
        raise TypeError(
            f"expected dtype to be a floating type of 16 bits or more, got {_shown(value)}: pass torch.bfloat16"
        )


def check_values(values: Any, name: str) -> None:
    """Raises TypeError unless the values of scores are in float32, as files hold them."""
    if not isinstance(values, Tensor) or values.dtype != torch.float32:
        raise TypeError(f"expected {name} in float32, got {_shown(values)}: pass values.float()")


def check_text_or_ids(value: Any, name: str) -> None:
    """Raises TypeError unless value is a text, or a tensor of token ids on one axis."""
    ids = isinstance(value, Tensor) and value.ndim == 1 and value.dtype in _WHOLE
    if not (isinstance(value, str) or ids):
        raise TypeError(
            f"expected {name} to be a text, or a tensor [S] of token ids, got {_shown(value)}: join texts, or pass "
            "torch.tensor(ids)"
        )


def check_texts(value: Any, name: str) -> list[str]:
    """Returns one text or several as a list. Raises TypeError for anything else."""
    one = isinstance(value, (str, bytes, Tensor)) or not isinstance(value, Iterable)
    one = one or getattr(value, "shape", None) == ()  # a zero-dimensional array cannot be iterated
    texts: list[Any] = [value] if one else list(value)
    wrong = [text for text in texts if not isinstance(text, str)]
    if wrong:
        raise TypeError(f"expected {name} to be a text or a list of texts, got {_shown(wrong[0])}: pass str")
    return texts


def whole(value: Any, name: str, *, least: int | None = None) -> int:
    """Returns a whole number of any type as a Python int.

    Raises: TypeError for anything else (also 3.0, "3" and True); ValueError for less than `least`.
    """
    bound = "" if least is None else f" of {least} or more"
    try:
        found = operator.index(_plain(value))
    except TypeError:
        raise TypeError(f"expected {name} to be a whole number, got {_shown(value)}: pass an int{bound}") from None
    if least is not None and found < least:
        raise ValueError(f"expected {name} to be at least {least}, got {found}: pass an int{bound}")
    return found


def number(value: Any, name: str, *, finite: bool = True) -> float:
    """Returns a number of any type as the Python float nearest to it.

    Raises: TypeError for anything else (also "0.3" and True); ValueError for NaN and infinities if `finite`.
    """
    plain = _plain(value)
    if not isinstance(plain, (numbers.Real, Decimal)):
        raise TypeError(f"expected {name} to be a number, got {_shown(value)}: pass a float")
    try:
        found = float(plain)
    except ValueError:  # a signaling NaN
        found = math.nan
    except OverflowError:  # an int or a fraction beyond float64
        found = math.inf if operator.gt(plain, 0) else -math.inf
    if finite and not math.isfinite(found):
        shown = "NaN" if math.isnan(found) else found
        raise ValueError(f"expected a {name} that is a number, got {shown}: pass a finite one")
    return found


def kept_ratio(value: Any, *, of: str = "pairs") -> float:
    """Returns a ratio of any numeric type as a Python float, so that int(ratio * total) is computed in float64.

    A float32 0.3 becomes 0.30000001192092896, a Fraction the nearest float64.

    Raises: TypeError for what is no number; ValueError unless 0 < ratio <= 1.
    """
    return check_ratio(number(value, "ratio", finite=False), of=of)


def _plain(value: Any) -> Any:
    """The number in a numpy scalar or a zero-dimensional tensor; None for bools and arrays; other values unchanged."""
    if hasattr(value, "shape"):
        try:
            value = value.item() if value.shape == () else None
        except RuntimeError:  # a meta tensor has no value
            return None
    return None if isinstance(value, bool) else value


def _shown(value: Any) -> str:
    """A short description of a value, for errors."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if value is None:
        return "None"
    if isinstance(value, torch.dtype):
        return str(value)
    plain = isinstance(value, (bool, int, float, str, bytes)) and len(repr(value)) <= 40
    return f"{type(value).__name__} {value!r}" if plain else type(value).__name__
