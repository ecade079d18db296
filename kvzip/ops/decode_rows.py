"""Attention of a batch of query rows, each over its own context and tail: contract, reference and host."""

from typing import TYPE_CHECKING

import torch
from einops import rearrange
from jaxtyping import Float, Int32
from torch import Tensor

from kvzip.ops.backend import is_forced, use_triton
from kvzip.ops.decode import check_logits, decode, decode_reference
from kvzip.ops.types import Context, ContextTable, Pages, Quantized, QueryRows, TailTensors

if TYPE_CHECKING:
    from kvzip.ops.triton.decode_plan import Plan


def decode_plan(
    table: ContextTable, rows: QueryRows, *, query_heads: int, dtype: torch.dtype, pages: Pages | None
) -> "Plan | None":
    """Returns how the device splits `rows` over its SMs, for all layers: made once a step, by operations on the device.

    It depends on `rows`, on `table` and on `pages.table` as they are when those operations run. So in a CUDA graph each
    replay plans anew, and grid and addresses stay what they were. None where no kernel runs.
    """
    if not use_triton(rows.context):
        return None
    from kvzip.ops.triton.decode_plan import plan_triton

    return plan_triton(table, rows, query_heads=query_heads, dtype=dtype, pages=pages)


def decode_rows(
    q: Float[Tensor, "N Hq D"],
    table: ContextTable,
    layer: int,
    rows: QueryRows,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    pages: Pages | None = None,
    plan: "Plan | None" = None,
) -> tuple[Float[Tensor, "N Hq D"], Float[Tensor, "N Hq"]]:
    """Returns each row's attention over its context and its sequence's tail, and the log-sum-exp of its logits.

    Row n is what `decode` gives for one question of one token, with context rows.context[n] and a tail of
    rows.length[n] rows. A context is read once for up to 128 of its rows (x group), whichever sequences they are of.
    The host never waits for the device.

    Args:
        layer: of the table.
        window: sees only rows at distance 0 <= distance < window, as in `decode`: row i of a head of n rows is at
            distance rows.length - 1 + n - i.
        pages: tails of this layer; None: rows see their contexts only, and lengths only count distances.
        plan: of `decode_plan` for these rows; None makes one.

    Raises: ValueError if shapes, dtypes or devices do not fit together, and for a scale that is not above 0.
    """
    _check(q, table, layer, rows, scale, softcap, window, pages)
    options = {"scale": scale, "softcap": softcap, "window": window, "pages": pages}
    if use_triton(q):
        from kvzip.ops.triton.decode_rows import decode_rows_triton

        return decode_rows_triton(q, table, layer, rows, **options, plan=plan)
    run = decode_rows_reference if is_forced() else decode_rows_host
    return run(q, table, layer, rows, **options)


def decode_rows_reference(
    q: Float[Tensor, "N Hq D"],
    table: ContextTable,
    layer: int,
    rows: QueryRows,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    pages: Pages | None = None,
    plan: None = None,
) -> tuple[Float[Tensor, "N Hq D"], Float[Tensor, "N Hq"]]:
    """Plain PyTorch `decode_rows`: `decode_reference` for one row after the other."""
    found = [
        decode_reference(
            q[n][None, :, None], *_context(table, layer, place), scale=scale, softcap=softcap, window=window,
            bias=_bias(table, layer, place), tail=_tails(table, layer, pages, q, [(sequence, length)]),
        )
        for n, (place, sequence, length) in enumerate(_listed(rows))
    ]  # fmt: skip
    return _joined(q, [([n], out, lse) for n, (out, lse) in enumerate(found)])


def decode_rows_host(
    q: Float[Tensor, "N Hq D"],
    table: ContextTable,
    layer: int,
    rows: QueryRows,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    pages: Pages | None = None,
    plan: None = None,
) -> tuple[Float[Tensor, "N Hq D"], Float[Tensor, "N Hq"]]:
    """`decode_rows` by as few calls of `decode` as a CPU needs: one for the single rows of a context, and one for the
    rows of each sequence that has several."""
    listed = _listed(rows)
    groups: dict[tuple[int, int], list[int]] = {}
    for n, (place, sequence, _) in enumerate(listed):
        groups.setdefault((place, sequence), []).append(n)
    singles: dict[int, list[int]] = {}
    calls = []  # (context, rows, tokens of each question)
    for (place, _), members in groups.items():
        first, last = (listed[n][2] for n in (members[0], members[-1]))
        if len(members) > 1 and [listed[n][2] for n in members] == list(range(first, last + 1)):
            calls.append((place, members, len(members)))
        else:
            singles.setdefault(place, []).extend(members)
    calls += [(place, members, 1) for place, members in singles.items()]
    found = []
    for place, members, tokens in calls:
        query = q[members].unflatten(0, (-1, tokens)).transpose(1, 2)
        ends = [listed[n][1:] for n in members[tokens - 1 :: tokens]]
        out, lse = decode(
            query, *_context(table, layer, place), scale=scale, softcap=softcap, window=window,
            bias=_bias(table, layer, place), tail=_tails(table, layer, pages, q, ends),
        )  # fmt: skip
        found.append((members, out, lse))
    return _joined(q, found)


def _joined(
    q: Float[Tensor, "N Hq D"],
    found: list[tuple[list[int], Float[Tensor, "_ Hq _ D"], Float[Tensor, "_ Hq _"]]],
) -> tuple[Float[Tensor, "N Hq D"], Float[Tensor, "N Hq"]]:
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    for members, of_members, lse_of_members in found:
        out[members] = of_members.transpose(1, 2).flatten(0, 1)
        lse[members] = lse_of_members.transpose(1, 2).flatten(0, 1)
    return out, lse


def _listed(rows: QueryRows) -> list[tuple[int, int, int]]:
    return list(zip(rows.context.tolist(), rows.sequence.tolist(), rows.length.tolist(), strict=True))


def _context(
    table: ContextTable, layer: int, place: int
) -> tuple[Tensor | Quantized, Tensor | Quantized, Int32[Tensor, " H1"]]:
    context = _layer(table, layer, place)
    return context.k, context.v, context.offsets


def _bias(table: ContextTable, layer: int, place: int) -> Tensor | None:
    return _layer(table, layer, place).bias


def _layer(table: ContextTable, layer: int, place: int) -> Context:
    """A layer of the context at `place`; one without rows if there is none."""
    layers = table.layers[place] if 0 <= place < len(table.layers) else None
    return table.formats[layer] if layers is None else layers[layer]


def _tails(table: ContextTable, layer: int, pages: Pages | None, q: Tensor, ends: list[tuple[int, int]]) -> TailTensors:
    """Keys, values and lengths of the tails of (sequence, length) pairs, copied out of their pages."""
    heads, width, device = len(table.formats[layer].offsets) - 1, q.shape[2], q.device
    lengths = torch.tensor([length for _, length in ends], dtype=torch.int32, device=device)
    if pages is None:
        none = q.new_empty((len(ends), heads, 0, width))
        return none, none, lengths
    used = -(-max(length for _, length in ends) // pages.k.shape[2])
    names = pages.table[[sequence for sequence, _ in ends], :used].long()
    k, v = (rearrange(x[names], "s x h r d -> s h (x r) d") for x in (pages.k, pages.v))
    return k, v, lengths


def _check(
    q: Tensor,
    table: ContextTable,
    layer: int,
    rows: QueryRows,
    scale: float,
    softcap: float | None,
    window: int | None,
    pages: Pages | None,
) -> None:
    count, query_heads, width = q.shape
    if not 0 <= layer < len(table.formats):
        raise ValueError(f"expected a layer of the table's {len(table.formats)}, got {layer}")
    form = table.formats[layer]
    heads, device = len(form.offsets) - 1, form.offsets.device
    plain = [x for x in (form.k, form.v) if isinstance(x, Tensor)]
    if query_heads % heads or form.width != width or any(x.dtype != q.dtype for x in plain) or q.device != device:
        raise ValueError(
            f"expected q of width D={form.width}, in equal groups over {heads} KV heads, of the table's dtype and on "
            f"{device}, got {list(q.shape)}, {q.dtype} on {q.device}: table and model must fit"
        )
    for name, x in (("context", rows.context), ("sequence", rows.sequence), ("length", rows.length)):
        if x.shape != (count,) or x.dtype != torch.int32 or x.device != device:
            raise ValueError(
                f"expected {name} of shape [N={count}], int32 on {device}, got {list(x.shape)}, {x.dtype} on "
                f"{x.device}: one number for each row of q"
            )
    check_logits(scale, softcap, window)
    if pages is None:
        return
    for name, x in (("k", pages.k), ("v", pages.v)):
        if x.shape[1] != heads or x.shape[3] != width or x.dtype != q.dtype or x.device != device:
            raise ValueError(
                f"expected pages of {name} of shape [P, H={heads}, R, D={width}], {q.dtype} on {device}, got "
                f"{list(x.shape)}, {x.dtype} on {x.device}: they must fit q and the table"
            )
        if x.numel() >= 2**31:
            raise ValueError(f"expected pages of {name} of fewer than 2**31 numbers, got {x.numel()}: make fewer pages")
    if pages.k.shape != pages.v.shape:
        raise ValueError(f"expected as many pages of k as of v, got {list(pages.k.shape)}, {list(pages.v.shape)}")
