"""Decoding a batch on the GPU: programs take items of a work list that the device made."""

import torch
from jaxtyping import Float
from torch import Tensor

from kvzip.ops.triton.common import check_rows
from kvzip.ops.triton.decode_kernel import QueryArgs, TailArgs, WorkArgs
from kvzip.ops.triton.decode_launch import Sizes, context_args, forms, run
from kvzip.ops.triton.decode_plan import Plan, plan_triton
from kvzip.ops.types import ContextTable, Pages, QueryRows


def decode_rows_triton(
    q: Float[Tensor, "N Hq D"],
    table: ContextTable,
    layer: int,
    rows: QueryRows,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    pages: Pages | None = None,
    plan: Plan | None = None,
) -> tuple[Float[Tensor, "N Hq D"], Float[Tensor, "N Hq"]]:
    """`decode_rows` by two launches whose grids follow from shapes alone."""
    count, query_heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if q.numel() == 0:
        return out, lse
    if plan is None:
        plan = plan_triton(table, rows, query_heads=query_heads, dtype=q.dtype, pages=pages)
    form, config = table.formats[layer], plan.launches[layer]
    heads = len(form.offsets) - 1
    tail_k, tail_v, names = (q[None], q[None], rows.length) if pages is None else (pages.k, pages.v, pages.table)
    check_rows(q=q, tail_k=tail_k, tail_v=tail_v)
    page = 0 if pages is None else pages.k.shape[2]
    shapes = forms(
        q, form.k, form.v, config, group=query_heads // heads, tail_m=plan.tail_block, softcap=softcap is not None,
        window=window is not None, bias=form.bias is not None, short=True, page=page,
    )  # fmt: skip
    tails = 0 if pages is None else len(plan.tail_items)
    pitch = shapes[0].M * shapes[0].PARTS
    sizes = Sizes(count * shapes[0].G, heads, plan.items.shape[1], 1, 0, 1, pitch, shapes[1].M)
    run(
        out, lse,
        QueryArgs(q, q.stride(0), q.stride(1), 0, rows.length, plan.order),
        context_args(form.k, form.v, form.offsets, form.bias, table.addresses[layer]),
        TailArgs(tail_k, tail_v, names, *tail_k.stride()[:3], *tail_v.stride()[:3]),
        WorkArgs(plan.items[layer], plan.tail_items, plan.first[layer], plan.places),
        sizes, shapes, config,
        places=plan.items.shape[1] * pitch + tails * shapes[1].M, programs=plan.items.shape[1] + tails,
        scale=scale, softcap=softcap, window=window, tokens=1, tail_rows=0,
        capacity=0 if pages is None else page * pages.table.shape[1], tailed=True, listed=True,
    )  # fmt: skip
    return out, lse
