"""Decoding on the GPU: splits of context and tails in one launch, their partial results combined in another."""

import torch
import triton
from jaxtyping import Float, Int32
from torch import Tensor

from kvzip.ops.schedule import decode_schedule
from kvzip.ops.triton.common import check_rows, interpreted, overlaps_launches
from kvzip.ops.triton.decode_kernel import QueryArgs, TailArgs, WorkArgs
from kvzip.ops.triton.decode_launch import (
    Sizes,
    choose_cut,
    choose_launch,
    context_args,
    forms,
    run,
    tail_block,
)
from kvzip.ops.types import DecodeSchedule, Quantized, TailTensors

_TAIL_ROWS = 256  # rows of a tail in one split, for each block of query rows


def decode_triton(
    q: Float[Tensor, "B Hq T D"],
    k: Float[Tensor, "N D"] | Quantized,
    v: Float[Tensor, "N D"] | Quantized,
    offsets: Int32[Tensor, " H1"],
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    bias: Float[Tensor, " N"] | None = None,
    schedule: DecodeSchedule | None = None,
    tail: TailTensors | None = None,
) -> tuple[Float[Tensor, "B Hq T D"], Float[Tensor, "B Hq T"]]:
    """`decode` by two launches whose sizes follow from shapes and the schedule alone.

    Reads each context byte from memory once for up to 128 query rows (questions x tokens x group; fewer if the context
    is quantized, see `launch_config`), more rows from L2: 2 N D values and 4 rows N D operations. Measured:
    docs/tuning.md.
    """
    queries, query_heads, tokens, width = q.shape
    heads = len(offsets) - 1
    group = query_heads // heads
    rows = queries * tokens * group
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if q.numel() == 0:
        return out, lse
    context = context_args(k, v, offsets, bias)
    hopper = overlaps_launches(q) or interpreted()
    config = choose_launch(k, v, width, rows, q.dtype, hopper=hopper)
    splits = choose_cut(decode_schedule(offsets) if schedule is None else schedule, config, rows)
    tail_k, tail_v, lengths = (q, q, offsets) if tail is None else tail
    check_rows(q=q, k=context.k, v=context.v, tail_k=tail_k, tail_v=tail_v)
    capacity = 0 if tail is None else tail_k.shape[2]
    shapes = forms(
        q, k, v, config, group=group, tail_m=tail_block(config, tokens * group, q.dtype), softcap=softcap is not None,
        window=window is not None, bias=bias is not None, short=len(context.k) < config.block_n,
    )  # fmt: skip
    tail_blocks = triton.cdiv(tokens * group, shapes[1].M)
    tail_rows = _TAIL_ROWS * tail_blocks
    sizes = Sizes(
        rows,
        heads,
        len(splits.bounds),
        triton.cdiv(rows, config.block_m),
        triton.cdiv(capacity, tail_rows),
        tail_blocks,
        pitch=min(config.block_m, rows) * shapes[0].PARTS,
        tail_pitch=min(shapes[1].M, tokens * group),
    )
    context_items = sizes.count * sizes.row_blocks
    tail_items = queries * heads * sizes.tail_splits * tail_blocks
    run(
        out, lse,
        QueryArgs(q, *q.stride()[:3], lengths, offsets),
        context,
        TailArgs(tail_k, tail_v, offsets, *tail_k.stride()[:3], *tail_v.stride()[:3]),
        WorkArgs(splits.bounds, offsets, splits.first, offsets),
        sizes, shapes, config,
        places=context_items * sizes.pitch + tail_items * sizes.tail_pitch, programs=context_items + tail_items,
        scale=scale, softcap=softcap, window=window, tokens=tokens, tail_rows=tail_rows, capacity=capacity,
        tailed=tail_items > 0 or window is None,  # matters with a window only; else one variant to compile
        listed=False,
    )  # fmt: skip
    return out, lse
