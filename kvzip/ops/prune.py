"""Packs the kept pairs of one layer: head after head, in token order, nothing in between."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvzip.ops.backend import use_triton
from kvzip.ops.types import Packed


def prune(
    k: Float[Tensor, "H S D"], v: Float[Tensor, "H S D"], keep: Bool[Tensor, "H S"], *, total: int | None = None
) -> Packed:
    """The kept rows of k and v, packed head after head, their offsets [H + 1] and their positions [N].

    Head h owns rows offsets[h]:offsets[h+1] of both, in token order; positions are columns of `keep`.

    Args:
        k, v: may be views with any strides, as long as the D values of a row are contiguous.
        total: N if the caller knows it. With it nothing waits on the host, and the CUDA kernel trusts it: kept rows
            beyond it are dropped, and if there are fewer the last rows are left unset. offsets[H] is the true number.

    Raises: ValueError if shapes, dtypes or devices disagree, if rows are not contiguous, if H*S needs more than int32,
        or (in the reference) if `total` is wrong.
    """
    _check(k, v, keep, total)
    if use_triton(k):
        from kvzip.ops.triton.prune import prune_triton as run
    else:
        run = prune_reference
    return run(k, v, keep, total=total)


def prune_reference(
    k: Float[Tensor, "H S D"], v: Float[Tensor, "H S D"], keep: Bool[Tensor, "H S"], *, total: int | None = None
) -> Packed:
    ends = keep.sum(dim=1).cumsum(dim=0)
    offsets = torch.cat([ends.new_zeros(1), ends]).int()
    positions = keep.nonzero()[:, 1].int()
    if total is not None and total != len(positions):
        raise ValueError(f"expected total to be the number of kept rows, {len(positions)}, got {total}: count `keep`")
    return k[keep], v[keep], offsets, positions


def _check(k: Tensor, v: Tensor, keep: Tensor, total: int | None) -> None:
    if k.shape != v.shape or k.shape[:2] != keep.shape:
        raise ValueError(
            f"expected k and v of one shape [H, S, D] and keep [H, S], got {list(k.shape)}, {list(v.shape)} and "
            f"{list(keep.shape)}: pass one layer of one cache, and a column of keep for each row"
        )
    if k.dtype != v.dtype or not k.device == v.device == keep.device:
        raise ValueError(
            f"expected k, v of one dtype and all on one device, got {k.dtype} on {k.device}, {v.dtype} on {v.device} "
            f"and keep on {keep.device}: convert them first"
        )
    for name, rows in (("k", k), ("v", v)):
        if rows.shape[2] > 1 and rows.stride(2) != 1:
            raise ValueError(
                f"expected {name} with contiguous rows, got a stride of {rows.stride(2)} on its last axis: "
                "call .contiguous()"
            )
    if keep.numel() >= 2**31:
        raise ValueError(f"expected fewer than 2**31 rows (offsets are int32), got {keep.numel()}: prune fewer heads")
    if total is not None and not 0 <= total <= keep.numel():
        raise ValueError(f"expected 0 <= total <= {keep.numel()} (H*S), got {total}: it is the number of kept rows")
