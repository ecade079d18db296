"""Attention of new tokens over frozen ragged heads and a dense tail: contract and reference."""

import math
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from kvzip.ops.backend import is_forced, use_triton
from kvzip.ops.host_decode import decode_host, host_takes
from kvzip.ops.quantize import dequantize, take_rows
from kvzip.ops.types import DecodeSchedule, Quantized, TailTensors

_TOKENS_AT_ONCE = 512  # of the reference
_BIAS_DTYPES = (torch.float16, torch.float32, torch.float64)


def decode(
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
    """Returns attention over context and tail together, and the natural log-sum-exp of each row's logits.

    Query head h * G + g of question b, token t, attends to

        context rows offsets[h]:offsets[h + 1], shared by all questions and older than all tokens, and
        rows 0 <= j < lengths[b] - (T - 1 - t) of its own tail,

    with logits scale * q.k, or softcap * tanh(scale * q.k / softcap), plus the context row's bias. A row that sees
    nothing gives 0 and -inf. The log-sum-exp is float32, or float64 where the inputs are.

    Args:
        offsets: H + 1 of them, from 0 to N, never decreasing; on CUDA they are not read on the host.
        window: sees only rows at distance 0 <= distance < window. The rows of each head are then consecutive
            tokens that end right before the tail: with p = lengths[b] - 1 - (T - 1 - t) the query's own place,
            tail row j is at distance p - j and row i of a head of n rows at distance p + n - i. Without a tail
            the last query is right after the context, p = -(T - 1 - t).
        bias: one finite number a context row, natural log, float16 or float32: log(2) counts the row twice.
        schedule: from `decode_schedule`; None makes one, which waits for the device: meant for tests.
        tail: (k, v, lengths), k and v any view with a contiguous last axis. lengths[b] counts the rows that the
            last query of question b sees, its own included. Rows beyond may hold anything, NaN too.

    Raises: ValueError if shapes, dtypes or devices do not fit together, and for a scale that is not above 0.
    """
    _check(q, k, v, offsets, scale, softcap, window, bias, tail)
    if host_takes(q, softcap=softcap, window=window) and not is_forced():
        run = decode_host
    elif use_triton(q):
        from kvzip.ops.triton.decode import decode_triton as run
    else:
        run = _reference_in_blocks
    options = {"scale": scale, "softcap": softcap, "window": window, "bias": bias}
    return run(q, k, v, offsets, **options, schedule=schedule, tail=tail)


def _reference_in_blocks(
    q: Float[Tensor, "B Hq T D"], *context: Any, tail: TailTensors | None, **options: Any
) -> tuple[Float[Tensor, "B Hq T D"], Float[Tensor, "B Hq T"]]:
    """`decode_reference` over blocks of tokens, because it holds the logits of all its tokens."""
    if tail is None and options["window"] is not None:  # positions are counted back from the last token: no blocks
        return decode_reference(q, *context, tail=None, **options)
    parts, after = [], q.shape[2]
    for rows in q.split(_TOKENS_AT_ONCE, dim=2):
        after -= rows.shape[2]
        own = None if tail is None else (*tail[:2], tail[2] - after)
        parts.append(decode_reference(rows, *context, tail=own, **options))
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def decode_reference(
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
    """Plain PyTorch `decode`, a head at a time; `schedule` changes nothing here."""
    bounds = offsets.tolist()
    queries, tokens = q.shape[0], q.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    heads = q.to(dtype).unflatten(1, (len(bounds) - 1, -1)).unbind(1)  # H of [B G T D]
    ago = torch.arange(tokens - 1, -1, -1, device=q.device)  # T - 1 - t
    lengths = torch.ones(queries, dtype=torch.int32, device=q.device) if tail is None else tail[2]
    place = (lengths[:, None] - 1 - ago)[:, None, :, None]  # [B 1 T 1]
    rows = 0 if tail is None else min(max(lengths.tolist(), default=0), tail[0].shape[2])
    v_t, outs, lses = None, [], []
    for h, q_h in enumerate(heads):
        n = bounds[h + 1] - bounds[h]
        k_h, v_h = (_rows(x, bounds[h], bounds[h + 1], h, dtype) for x in (k, v))
        logits = _logits((q_h.flatten(0, 2) @ k_h.T).unflatten(0, q_h.shape[:3]), scale, softcap)  # [B G T n]
        if bias is not None:
            logits = logits + bias[bounds[h] : bounds[h + 1]].to(dtype)
        distance = place + n - torch.arange(n, device=q.device)
        seen = (distance >= 0) | (window is None)
        if tail is not None:
            column = torch.arange(rows, device=q.device)
            written = (column < lengths[:, None])[:, None, :, None]  # [B 1 rows 1]
            k_t, v_t = (x[:, h, None, :rows].to(dtype).masked_fill(~written, 0) for x in tail[:2])
            logits = torch.cat([logits, _logits(q_h @ k_t.mT, scale, softcap)], dim=-1)
            seen = torch.cat([seen, column <= place], dim=-1)
            distance = torch.cat([distance, place - column], dim=-1)
        if window is not None:
            seen = seen & (distance < window)
        logits = logits.masked_fill(~seen, -torch.inf)
        lse = torch.logsumexp(logits, dim=-1)
        weights = torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0)[..., None])
        out = (weights[..., :n].flatten(0, 2) @ v_h).unflatten(0, q_h.shape[:3])
        outs.append(out if v_t is None else out + weights[..., n:] @ v_t)
        lses.append(lse)
    return torch.stack(outs, 1).flatten(1, 2).to(q.dtype), torch.stack(lses, 1).flatten(1, 2)


def _logits(products: Tensor, scale: float, softcap: float | None) -> Tensor:
    return products * scale if softcap is None else softcap * torch.tanh(products * scale / softcap)


def _rows(
    x: Float[Tensor, "N D"] | Quantized, begin: int, stop: int, head: int, dtype: torch.dtype
) -> Float[Tensor, "n D"]:
    if isinstance(x, Tensor):
        return x[begin:stop].to(dtype)
    rows = dequantize(replace(take_rows(x, slice(begin, stop)), channels=None), dtype=dtype)
    return rows if x.channels is None else rows * x.channels.spread[head] + x.channels.center[head]


def check_logits(scale: float, softcap: float | None, window: int | None = None) -> None:
    """Raises: ValueError for what no logits are made, changed or hidden by."""
    if not 0 < scale < math.inf:
        raise ValueError(f"expected a finite scale above 0, got {scale}: pass 1 / sqrt(D), or what the model says")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"expected a softcap above 0 or None, got {softcap}: None leaves logits as they are")
    if window is not None and window < 0:
        raise ValueError(f"expected a window of 0 or more or None, got {window}: None sees everything")


def _check(
    q: Tensor,
    k: Tensor | Quantized,
    v: Tensor | Quantized,
    offsets: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
    bias: Tensor | None,
    tail: TailTensors | None,
) -> None:
    queries, query_heads, _, width = q.shape
    dtype, device, heads = q.dtype, q.device, offsets.shape[0] - 1
    if heads < 1 or query_heads % heads:
        raise ValueError(
            f"expected query heads in equal groups over {heads} KV heads, got q of shape {list(q.shape)} and "
            f"{heads + 1} offsets: offsets has one entry more than there are KV heads"
        )
    for name, x in (("k", k), ("v", v)):
        if isinstance(x, Quantized):
            got, devices = x.width, {x.codes.device, x.scale.device, x.zero.device}
            if x.channels is not None:
                shape = list(x.channels.center.shape)
                if name == "v" or shape != [heads, width] or x.channels.spread.device not in devices:
                    raise ValueError(f"expected channels of keys alone, [H={heads}, D={width}], got {shape} of {name}")
        else:
            got, devices = x.shape[1], {x.device}
            if x.dtype != dtype:
                raise ValueError(f"expected {name} of q's dtype {dtype}, got {x.dtype}: convert one of them")
        if got != width:
            raise ValueError(f"expected {name} of width D={width} like q, got {got}: they are from different models")
        if devices != {device} or offsets.device != device:
            raise ValueError(f"expected {name} and offsets on {device} like q, got {devices}, {offsets.device}")
        rows = len(x.codes if isinstance(x, Quantized) else x)
        if bias is not None and (bias.shape != (rows,) or bias.device != device or bias.dtype not in _BIAS_DTYPES):
            raise ValueError(
                f"expected a bias of shape [N={rows}], float16 or float32 on {device}, got {list(bias.shape)}, "
                f"{bias.dtype} on {bias.device}: one number for each row of k and v"
            )
    check_logits(scale, softcap, window)
    if tail is None:
        return
    tail_k, tail_v, lengths = tail
    shape = (queries, heads, tail_k.shape[2], width)
    for name, x in (("k", tail_k), ("v", tail_v)):
        if x.shape != shape or x.dtype != dtype or x.device != device:
            raise ValueError(
                f"expected the tail's {name} of shape [B={queries}, H={heads}, R, D={width}], {dtype} on {device}, "
                f"got {list(x.shape)}, {x.dtype} on {x.device}: it must fit q and offsets"
            )
    if lengths.shape != (queries,):
        raise ValueError(f"expected {queries} tail lengths, one per question, got {list(lengths.shape)}")
