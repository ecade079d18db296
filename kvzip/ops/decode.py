"""Attention of new tokens over frozen ragged heads and a dense tail: contract, reference, schedule and merge."""

import itertools
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from kvzip.ops.backend import use_triton
from kvzip.ops.quantize import Quantized, dequantize, take_rows

Tail = tuple[Float[Tensor, "B H R D"], Float[Tensor, "B H R D"], Int32[Tensor, " B"]]

_TILE = 64  # rows that a kernel takes at a time; a piece that ends within a tile costs a whole one
_SHORTEST_PIECE = 2  # tiles; below this, merging partial results costs more than a longer loop


@dataclass(frozen=True)
class Pieces:
    """Ragged heads cut into pieces of nearly equal length, whole tiles but for the end of a head.

    bounds: (head, first row, row after the last) of each piece, head after head.
    first: pieces first[h]:first[h + 1] belong to head h.
    """

    bounds: Int32[Tensor, "P 3"]
    first: Int32[Tensor, " H1"]


@dataclass(frozen=True)
class DecodeSchedule:
    """Pieces at several lengths, shortest first.

    Few query rows need many short pieces to fill the device, many rows fill it with a few long ones, and every
    piece costs a partial result per row. Which level is used depends on shapes only, never on values.
    """

    levels: tuple[Pieces, ...]  # at most eight pieces per processor, four, two, one, a half, ..., whole heads
    processors: int


def decode(
    q: Float[Tensor, "B Hq T D"],
    k: Float[Tensor, "N D"] | Quantized,
    v: Float[Tensor, "N D"] | Quantized,
    offsets: Int32[Tensor, " H1"],
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    schedule: DecodeSchedule | None = None,
    tail: Tail | None = None,
) -> tuple[Float[Tensor, "B Hq T D"], Float[Tensor, "B Hq T"]]:
    """Returns attention over context and tail together, and the natural log-sum-exp of each row's logits.

    Query head h * G + g of question b, token t, attends to

        context rows offsets[h]:offsets[h + 1], shared by all questions and older than all tokens, and
        rows 0 <= j < lengths[b] - (T - 1 - t) of its own tail,

    with logits scale * q.k, or softcap * tanh(scale * q.k / softcap). A row that sees nothing gives 0 and -inf.

    Args:
        offsets: H + 1 of them, from 0 to N, never decreasing; on CUDA they are not read on the host.
        window: sees only rows at distance 0 <= distance < window. The rows of each head are then consecutive
            tokens that end right before the tail: with p = lengths[b] - 1 - (T - 1 - t) the query's own place,
            tail row j is at distance p - j and row i of a head of n rows at distance p + n - i. Without a tail
            the last query stands right after the context, p = -(T - 1 - t).
        schedule: from `decode_schedule`; None makes one, which waits for the device: meant for tests.
        tail: (k, v, lengths), k and v any view with a contiguous last axis. lengths[b] counts the rows that the
            last query of question b sees, its own included. Rows beyond may hold anything, NaN too.

    The log-sum-exp is float32, or float64 where the inputs are.

    Raises: ValueError if shapes, dtypes or devices do not fit together.
    """
    _check(q, k, v, offsets, softcap, window, tail)
    if use_triton(q):
        from kvzip.ops.triton.decode import decode_triton as run
    else:
        run = decode_reference
    return run(q, k, v, offsets, scale=scale, softcap=softcap, window=window, schedule=schedule, tail=tail)


def decode_reference(
    q: Float[Tensor, "B Hq T D"],
    k: Float[Tensor, "N D"] | Quantized,
    v: Float[Tensor, "N D"] | Quantized,
    offsets: Int32[Tensor, " H1"],
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    schedule: DecodeSchedule | None = None,
    tail: Tail | None = None,
) -> tuple[Float[Tensor, "B Hq T D"], Float[Tensor, "B Hq T"]]:
    """Plain PyTorch `decode`, a head at a time; `schedule` changes nothing here."""
    bounds = offsets.tolist()
    queries, tokens = q.shape[0], q.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    heads = q.to(dtype).unflatten(1, (len(bounds) - 1, -1)).unbind(1)  # H of [B G T D]
    ago = torch.arange(tokens - 1, -1, -1, device=q.device)  # T - 1 - t
    lengths = torch.ones(queries, dtype=torch.int32, device=q.device) if tail is None else tail[2]
    place = (lengths[:, None] - 1 - ago)[:, None, :, None]  # [B 1 T 1]
    v_t = None
    rows = 0 if tail is None else min(max(lengths.tolist(), default=0), tail[0].shape[2])
    outs, lses = [], []
    for h, q_h in enumerate(heads):
        n = bounds[h + 1] - bounds[h]
        k_h, v_h = (_rows(x, bounds[h], bounds[h + 1], h, dtype) for x in (k, v))
        logits = q_h.flatten(0, 2) @ k_h.T
        logits = logits.unflatten(0, q_h.shape[:3])  # [B G T n]
        distance = place + n - torch.arange(n, device=q.device)
        seen = (distance >= 0) | (window is None)
        if tail is not None:
            column = torch.arange(rows, device=q.device)
            written = (column < lengths[:, None])[:, None, :, None]  # [B 1 rows 1]
            k_t, v_t = (x[:, h, None, :rows].to(dtype).masked_fill(~written, 0) for x in tail[:2])
            logits = torch.cat([logits, q_h @ k_t.mT], dim=-1)
            seen = torch.cat([seen, column <= place], dim=-1)
            distance = torch.cat([distance, place - column], dim=-1)
        if window is not None:
            seen = seen & (distance < window)
        logits = (logits * scale if softcap is None else softcap * torch.tanh(logits * scale / softcap)).masked_fill(
            ~seen, -torch.inf
        )
        lse = torch.logsumexp(logits, dim=-1)
        weights = torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0)[..., None])
        out = (weights[..., :n].flatten(0, 2) @ v_h).unflatten(0, q_h.shape[:3])
        outs.append(out if v_t is None else out + weights[..., n:] @ v_t)
        lses.append(lse)
    return torch.stack(outs, 1).flatten(1, 2).to(q.dtype), torch.stack(lses, 1).flatten(1, 2)


def decode_schedule(
    offsets: Int32[Tensor, " H1"], *, processors: int | None = None, bounds: list[int] | None = None
) -> DecodeSchedule:
    """Returns how to cut heads that end at `offsets`; made once per layer of a cache.

    Args:
        processors: multiprocessors to fill; None asks the device of `offsets`, and takes 8 on a CPU.
        bounds: the values of `offsets` where the host knows them; None reads them, which waits for the device.
    """
    if processors is None:
        cuda = offsets.is_cuda
        processors = torch.cuda.get_device_properties(offsets.device).multi_processor_count if cuda else 8
    bounds = offsets.tolist() if bounds is None else bounds
    targets = [8 * processors, 4 * processors, 2 * processors, processors]
    while targets[-1] // 2 >= len(bounds):
        targets.append(targets[-1] // 2)
    targets.append(0)  # every head whole
    parts = [part for target in targets for part in _cut(bounds, target)]
    # one copy to the device for all; kernels want tables that start at multiples of 16 bytes
    flat = [x for part in parts for x in (*part, *[0] * (-len(part) % 4))]
    pieces = torch.tensor(flat, dtype=torch.int32).to(offsets.device).split([-(-len(part) // 4) * 4 for part in parts])
    tables = [piece[: len(part)] for piece, part in zip(pieces, parts, strict=True)]
    levels = zip(tables[::2], tables[1::2], strict=True)
    return DecodeSchedule(tuple(Pieces(cut.view(-1, 3), first) for cut, first in levels), processors)


def merge(
    a: Float[Tensor, "*rows D"],
    lse_a: Float[Tensor, "*rows"],
    b: Float[Tensor, "*rows D"],
    lse_b: Float[Tensor, "*rows"],
) -> tuple[Float[Tensor, "*rows D"], Float[Tensor, "*rows"]]:
    """Returns attention over two disjoint sets of keys from attention over each, with the log-sum-exp of both.

    out = (e^lse_a a + e^lse_b b) / (e^lse_a + e^lse_b), in the dtype of `a`. (0, -inf) is the identity, and two
    empty sets give it.
    """
    if use_triton(a):
        from kvzip.ops.triton.decode import merge_triton as run
    else:
        run = merge_reference
    return run(a, lse_a, b, lse_b)


def merge_reference(
    a: Float[Tensor, "*rows D"],
    lse_a: Float[Tensor, "*rows"],
    b: Float[Tensor, "*rows D"],
    lse_b: Float[Tensor, "*rows"],
) -> tuple[Float[Tensor, "*rows D"], Float[Tensor, "*rows"]]:
    """Plain PyTorch `merge`."""
    lse = torch.logaddexp(lse_a, lse_b)
    finite = lse.masked_fill(lse == -torch.inf, 0)
    weight_a, weight_b = torch.exp(lse_a - finite)[..., None], torch.exp(lse_b - finite)[..., None]
    return (weight_a * a + weight_b * b).to(a.dtype), lse


def _rows(
    x: Float[Tensor, "N D"] | Quantized, start: int, stop: int, head: int, dtype: torch.dtype
) -> Float[Tensor, "n D"]:
    if isinstance(x, Tensor):
        return x[start:stop].to(dtype)
    rows = dequantize(replace(take_rows(x, slice(start, stop)), channels=None), dtype=dtype)
    return rows if x.channels is None else rows * x.channels.spread[head] + x.channels.center[head]


def _cut(bounds: list[int], target: int) -> tuple[list[int], list[int]]:
    """Cuts heads into the shortest equal pieces of whole tiles of which there are at most `target`, or one per head.

    Returns (head, first row, row after the last) of one piece after the other, and each head's first piece.
    """
    tiles = [-(-(stop - start) // _TILE) for start, stop in itertools.pairwise(bounds)]
    target = max(target, sum(n > 0 for n in tiles))
    low, high = _SHORTEST_PIECE, max(_SHORTEST_PIECE, *tiles)
    while low < high:
        middle = (low + high) // 2
        if sum(-(-n // middle) for n in tiles) <= target:
            high = middle
        else:
            low = middle + 1
    pieces, first = [], [0]
    for h, n in enumerate(tiles):
        count = -(-n // low)
        for i in range(count):
            begin, end = bounds[h] + _TILE * (n * i // count), bounds[h] + _TILE * (n * (i + 1) // count)
            pieces += [h, begin, min(end, bounds[h + 1])]
        first.append(first[-1] + count)
    return pieces, first


def _check(
    q: Tensor,
    k: Tensor | Quantized,
    v: Tensor | Quantized,
    offsets: Tensor,
    softcap: float | None,
    window: int | None,
    tail: Tail | None,
) -> None:
    queries, query_heads, _, width = q.shape
    heads = len(offsets) - 1
    if heads < 1 or query_heads % heads:
        raise ValueError(
            f"expected query heads in equal groups over {heads} KV heads, got q of shape {list(q.shape)} and "
            f"{heads + 1} offsets: offsets has one entry more than there are KV heads"
        )
    for name, x in (("k", k), ("v", v)):
        if isinstance(x, Quantized):
            got = x.codes.shape[1] * 8 // x.bits
            devices = {x.codes.device, x.scale.device, x.zero.device}
            if x.channels is not None:
                shape = list(x.channels.center.shape)
                if name == "v" or shape != [heads, width] or x.channels.spread.device not in devices:
                    raise ValueError(f"expected channels of keys alone, [H={heads}, D={width}], got {shape} of {name}")
        else:
            got, devices = x.shape[1], {x.device}
            if x.dtype != q.dtype:
                raise ValueError(f"expected {name} of q's dtype {q.dtype}, got {x.dtype}: convert one of them")
        if got != width:
            raise ValueError(f"expected {name} of width D={width} like q, got {got}: they are from different models")
        if devices | {offsets.device} != {q.device}:
            raise ValueError(f"expected {name} and offsets on {q.device} like q, got {devices}, {offsets.device}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"expected a softcap above 0 or None, got {softcap}: None leaves logits as they are")
    if window is not None and window < 0:
        raise ValueError(f"expected a window of 0 or more or None, got {window}: None sees everything")
    if tail is None:
        return
    for name, x in (("k", tail[0]), ("v", tail[1])):
        shape = (queries, heads, tail[0].shape[2], width)
        if x.shape != shape or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"expected the tail's {name} of shape [B={queries}, H={heads}, R, D={width}], {q.dtype} on {q.device}, "
                f"got {list(x.shape)}, {x.dtype} on {x.device}: it must fit q and offsets"
            )
    if tail[2].shape != (queries,):
        raise ValueError(f"expected {queries} tail lengths, one per question, got {list(tail[2].shape)}")
