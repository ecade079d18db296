"""The sums over ranks in a forward pass, two in each layer, and the logits that each rank has a part of."""

import os
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from .exchange import everyone, gathered
from .share import Share

REDUCTIONS = ("nccl", "one-shot")
"""Ways to add up on GPUs. "one-shot" is for small sums: every rank writes to all others' memory (NVLink or PCIe)."""

ONE_SHOT_BYTES = 256 << 10  # larger sums are NCCL's: each rank would send size - 1 times as much
BESIDE_BYTES = 8 << 20  # smaller sums are over before anything else would begin
_SIZES = (2, 4, 8)  # GPUs that machines have; tried with 2 and 4


@runtime_checkable
class Sum(Protocol):
    """Begins to add up x, whose memory it may take, over the ranks; what it returns waits for the result.

    The residual, the same on all ranks, is added to that.
    """

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Callable[[], Tensor]: ...


def make_sum(share: Share, *, device: torch.device, dtype: torch.dtype, how: str | None = None) -> Sum:
    """Returns the function that adds up tensors over the ranks. Large sums run beside what is launched until the wait.

    All ranks get the same bits: else their tokens would part. CUDA graphs may capture it. Every rank must call this.

    Args:
        how: one of REDUCTIONS, on a GPU; None for "one-shot" where all GPUs can read each other's memory, else "nccl".

    Raises: ValueError for an unknown way, or one that these ranks cannot take.
    """
    if how not in (None, *REDUCTIONS):
        raise ValueError(f"expected a reduction of {list(REDUCTIONS)}, got {how!r}: set KVZIP_REDUCTION to one of them")
    if how == "one-shot" and (device.type != "cuda" or share.size not in _SIZES):
        raise ValueError(
            f"expected {' or '.join(map(str, _SIZES))} GPUs for one-shot sums, got {share.size} ranks on "
            f"{device.type}: unset KVZIP_REDUCTION"
        )
    if how == "one-shot" and not _has_kernel():
        raise ValueError(
            "expected KVZIP_BACKEND=reference and TRITON_INTERPRET to be unset for one-shot sums, which are a kernel: "
            "unset them, or KVZIP_REDUCTION"
        )

    def by_library(x: Tensor, residual: Tensor | None = None) -> Callable[[], Tensor]:
        work = dist.all_reduce(x, group=share.group, async_op=x.nbytes >= BESIDE_BYTES)

        def wait() -> Tensor:
            if work is not None:
                work.wait()
            return x if residual is None else residual + x

        return wait

    by_library(torch.zeros(1, dtype=dtype, device=device))  # makes the communicator, which no graph can capture
    how = how or default_way(share, device)
    return _one_shot(share, by_library, device=device, dtype=dtype) if how == "one-shot" else by_library


def default_way(share: Share, device: torch.device) -> str:
    """Returns "one-shot" where each rank's GPU can read those of all others, which then are in one machine, and
    kernels may run.

    All ranks get one answer, and every rank must call it.
    """
    if device.type != "cuda" or share.size not in _SIZES:
        return "nccl"
    seen = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    own = torch.cuda.current_device() if device.index is None else device.index
    others = [x for rank, x in enumerate(everyone(share, seen[own])) if rank != share.rank]
    readable = all(x in seen and torch.cuda.can_device_access_peer(own, seen.index(x)) for x in others)
    return "one-shot" if all(everyone(share, readable and _has_kernel())) else "nccl"


def _has_kernel() -> bool:
    """Whether this process runs compiled kernels: an interpreted one would wait for words that it cannot see."""
    return os.environ.get("KVZIP_BACKEND") != "reference" and os.environ.get("TRITON_INTERPRET") != "1"


def _one_shot(share: Share, by_library: Sum, *, device: torch.device, dtype: torch.dtype) -> Sum:
    """Small sums through symmetric memory, in one kernel; others by the library."""
    import torch.distributed._symmetric_memory as symmetric

    from kvzip.ops.triton.sum_ranks import box_shape, new_turns, sum_ranks_

    count, name = ONE_SHOT_BYTES // dtype.itemsize, share.group.group_name
    shape = box_shape(share.size, count, dtype)
    box = symmetric.empty(shape, dtype=torch.int64, device=device)
    try:
        shared = symmetric.rendezvous(box, group=name)
    except RuntimeError as error:
        raise RuntimeError(f"GPUs cannot read each other's memory: set KVZIP_REDUCTION=nccl ({error})") from error
    box.zero_()
    turns = new_turns(box)
    boxes = tuple(
        box if rank == share.rank else shared.get_buffer(rank, shape, torch.int64) for rank in range(share.size)
    )
    torch.cuda.synchronize(device)
    everyone(share, None)  # nobody sends before all boxes are empty

    def add(x: Tensor, residual: Tensor | None = None) -> Callable[[], Tensor]:
        if x.dtype != dtype or not 0 < x.numel() <= count or x.nbytes % 4:
            return by_library(x, residual)
        out = sum_ranks_(x, boxes, turns, rank=share.rank, residual=residual)
        return lambda: out

    return add


def head_rows(share: Share | None, vocabulary: int, *, unit: int = 1) -> slice:
    """Returns which rows of the output embedding a rank has: as many as the others, in multiples of `unit`; the last
    ranks may have fewer."""
    if share is None:
        return slice(0, vocabulary)
    step = _step(share, vocabulary, unit)
    return slice(min(vocabulary, share.rank * step), min(vocabulary, (share.rank + 1) * step))


def whole_logits(share: Share, logits: Tensor, vocabulary: int, *, unit: int = 1) -> Tensor:
    """Returns the logits [..., V] of which each rank computed its `head_rows`."""
    step = _step(share, vocabulary, unit)
    if logits.shape[-1] < step:
        logits = torch.nn.functional.pad(logits, (0, step - logits.shape[-1]))
    return gathered(share, logits).movedim(0, -2).flatten(-2)[..., :vocabulary]


def _step(share: Share, vocabulary: int, unit: int) -> int:
    return -(-vocabulary // (share.size * unit)) * unit
