"""Marks the pairs to keep: the highest scores across all layers and heads, exactly as many as asked for."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float32, Int32
from torch import Tensor

from kvzip.ops.backend import use_triton
from kvzip.ops.types import Mask, Scores


def select(scores: Scores, *, ratio: float, nan: Int32[Tensor, " 1"] | None = None) -> Mask:
    """Marks the int(ratio * total) highest scores, across all layers and heads.

    Equal scores are kept in index order (layer, head, token; -0.0 equals 0.0), so the result is the same on
    every device and `select(s, ratio=a)` is a subset of `select(s, ratio=b)` whenever a <= b.

    Args:
        scores: one tensor, or one [H E] per layer (E may differ), which gives the result of their concatenation
            as a list.
        ratio: the fraction of the scores that is kept, 0 < ratio <= 1; the product is taken in float64.
        nan: a flag owned by the caller, on the device of the scores. It is set to 1 if a score is NaN, which then
            counts as -inf, and nothing waits on the host. Without it a NaN raises, which waits for the device.

    Raises: ValueError if ratio is outside (0, 1], or a score is NaN and `nan` is not given.
    Source: KVzip, arXiv 2505.23416. The authors' code compares with a threshold and keeps fewer or more among equal
    scores; we keep the exact count.
    """
    ratio = _checked(ratio)
    return select_count(scores, count=int(ratio * _total(scores)), nan=nan)


def select_count(scores: Scores, *, count: int, nan: Int32[Tensor, " 1"] | None = None) -> Mask:
    """Marks the `count` highest scores, across all layers and heads: `select` with the number given.

    Raises: ValueError if count is negative or more than there are scores, or a score is NaN and `nan` is not given.
    """
    layers, total = _layers(scores), _total(scores)
    if not 0 <= count <= total:
        raise ValueError(f"expected 0 <= count <= {total} (the number of scores), got {count}: ask for fewer")
    _check_devices(layers, nan)
    if isinstance(scores, Tensor):
        return _select_rows(scores.reshape(1, -1), count, nan).view(scores.shape)
    if not layers:
        return []
    flat = torch.cat([layer.reshape(-1) for layer in layers])
    parts = _select_rows(flat[None], count, nan)[0].split([layer.numel() for layer in layers])
    return [part.view(layer.shape) for part, layer in zip(parts, layers, strict=True)]


def select_uniform(
    scores: Float32[Tensor, "L H E"], *, ratio: float, nan: Int32[Tensor, " 1"] | None = None
) -> Bool[Tensor, "L H E"]:
    """Marks the int(ratio * E) highest scores of each head: the same number everywhere. Ties and `nan` as in `select`.

    Raises: ValueError if ratio is outside (0, 1], or a score is NaN and `nan` is not given.
    """
    ratio = _checked(ratio)
    return select_uniform_count(scores, count=int(ratio * scores.shape[-1]), nan=nan)


def select_uniform_count(
    scores: Float32[Tensor, "L H E"], *, count: int, nan: Int32[Tensor, " 1"] | None = None
) -> Bool[Tensor, "L H E"]:
    """Marks the `count` highest scores of each head: `select_uniform` with the number given.

    Raises: ValueError if count is negative or more than a head has, or a score is NaN and `nan` is not given.
    """
    if not 0 <= count <= scores.shape[-1]:
        raise ValueError(f"expected 0 <= count <= {scores.shape[-1]} (scores of a head), got {count}: ask for fewer")
    _check_devices([scores], nan)
    return _select_rows(scores.flatten(0, 1), count, nan).view(scores.shape)


def _select_rows(scores: Float32[Tensor, "P n"], count: int, nan: Int32[Tensor, " 1"] | None) -> Bool[Tensor, "P n"]:
    """Marks the `count` highest scores of each row."""
    flag = torch.zeros(1, dtype=torch.int32, device=scores.device) if nan is None else nan
    if use_triton(scores):
        from kvzip.ops.triton.select import select_rows_triton as run
    else:
        run = select_rows_reference
    mask = run(scores, count=count, nan=flag)
    if nan is None and flag.item():
        raise ValueError("expected scores without NaN, got at least one: the forward pass that made them overflowed")
    return mask


def select_rows_reference(
    scores: Float32[Tensor, "P n"], *, count: int, nan: Int32[Tensor, " 1"] | None = None
) -> Bool[Tensor, "P n"]:
    """NaN counts as -inf and sets `nan`; adding 0.0 makes -0.0 equal 0.0; a stable sort keeps ties in index order."""
    missing = scores.isnan()
    if nan is not None:
        nan |= missing.any()
    order = (scores.masked_fill(missing, -torch.inf) + 0.0).sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order[..., :count], True)


def _layers(scores: Scores) -> Sequence[Tensor]:
    return [scores] if isinstance(scores, Tensor) else scores


def _total(scores: Scores) -> int:
    return sum(layer.numel() for layer in _layers(scores))


def _checked(ratio: float) -> float:
    if not 0 < ratio <= 1:
        raise ValueError(f"expected 0 < ratio <= 1, got {ratio}: it is the fraction that is kept")
    return float(ratio)  # numpy's float32 would multiply in float32


def _check_devices(layers: Sequence[Tensor], nan: Tensor | None) -> None:
    devices = {tensor.device for tensor in [*layers, *([] if nan is None else [nan])]}
    if len(devices) > 1:
        found = sorted(map(str, devices))
        raise ValueError(f"expected all scores and `nan` on one device, got {found}: move them together")
