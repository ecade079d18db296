"""New keys and values written after those of each question."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from kvzip.ops.backend import use_triton


def append_(
    tail_k: Float[Tensor, "B H R D"],
    tail_v: Float[Tensor, "B H R D"],
    lengths: Int32[Tensor, " B"],
    k: Float[Tensor, "B H T D"],
    v: Float[Tensor, "B H T D"],
) -> None:
    """Writes T new rows after the lengths[b] rows of each question, in place; `lengths` itself is not advanced.

    Rows that would go beyond the R reserved ones are dropped. Nothing waits for the device.

    Raises: ValueError if shapes or dtypes do not fit together.
    """
    check_append(tail_k, tail_v, lengths, k.shape, k.dtype)
    if v.shape != k.shape:
        raise ValueError(f"expected v of k's shape, got {list(v.shape)} and {list(k.shape)}")
    if use_triton(k):
        from kvzip.ops.triton.append import append_triton_ as run
    else:
        run = append_reference_
    run(tail_k, tail_v, lengths, k, v)


def check_append(tail_k: Tensor, tail_v: Tensor, lengths: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Raises: ValueError as `append_` does, for new keys and values of that shape and dtype."""
    expected = (*tail_k.shape[:2], shape[2], tail_k.shape[3])
    alike = tail_v.shape == tail_k.shape and dtype == tail_k.dtype == tail_v.dtype
    if tuple(shape) != expected or not alike or lengths.shape != tail_k.shape[:1]:
        raise ValueError(
            f"expected k and v of shape {list(expected)}, {tail_k.dtype}, got {list(shape)}, {dtype}: they must fit "
            f"the tails {list(tail_k.shape)}, {tail_k.dtype} and {list(tail_v.shape)}, {tail_v.dtype}, of which "
            f"{list(lengths.shape)} lengths are known"
        )


def append_reference_(
    tail_k: Float[Tensor, "B H R D"],
    tail_v: Float[Tensor, "B H R D"],
    lengths: Int32[Tensor, " B"],
    k: Float[Tensor, "B H T D"],
    v: Float[Tensor, "B H T D"],
) -> None:
    for b, length in enumerate(lengths.tolist()):
        room = max(min(k.shape[2], tail_k.shape[2] - length), 0)
        tail_k[b, :, length : length + room] = k[b, :, :room]
        tail_v[b, :, length : length + room] = v[b, :, :room]
