"""Decoding on a CPU: torch's fused attention, a head at a time, or products where they are faster."""

import itertools

import torch
from einops import rearrange
from jaxtyping import Float, Int32
from torch import Tensor

from kvzip.ops.fused import sdpa
from kvzip.ops.merge import merge_reference
from kvzip.ops.quantize import dequantize
from kvzip.ops.types import DecodeSchedule, Quantized, TailTensors


def host_takes(q: Float[Tensor, "B Hq T D"], *, softcap: float | None, window: int | None) -> bool:
    """Whether `decode_host` can do it: on a CPU, without a softcap, and with a window for one token of one question."""
    one = q.shape[0] == q.shape[2] == 1
    return q.device.type == "cpu" and q.numel() > 0 and softcap is None and (window is None or one)


def decode_host(
    q: Float[Tensor, "B Hq T D"],
    k: Float[Tensor, "N D"] | Quantized,
    v: Float[Tensor, "N D"] | Quantized,
    offsets: Int32[Tensor, " H1"],
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    schedule: DecodeSchedule | None = None,
    tail: TailTensors | None = None,
) -> tuple[Float[Tensor, "B Hq T D"], Float[Tensor, "B Hq T"]]:
    """`decode` of what `host_takes`, in a few calls where the reference takes dozens; no logits of many rows are held.

    Context and tail are computed apart and merged. Quantized rows are restored first.
    """
    bounds = offsets.tolist()
    k, v = (x if isinstance(x, Tensor) else dequantize(x, dtype=q.dtype, offsets=offsets) for x in (k, v))
    if tail is None:
        return _context(q, k, v, _spans(bounds, None if window is None else max(0, window - 1)), scale)
    tokens, lengths = q.shape[2], tail[2].tolist()
    longest = min(max(lengths), tail[0].shape[2])
    first = 0 if window is None else min(max(0, lengths[0] - window), longest)
    spans = _spans(
        bounds, None if window is None else max(0, window - lengths[0])
    )  # what the tail leaves of the window
    if first == longest:
        return _context(q, k, v, spans, scale)
    keys, values = (x[:, :, first:longest] for x in tail[:2])
    if q.shape[0] == tokens == 1 and q.dtype == torch.float32:
        return _one(q[0, :, 0], k, v, spans, keys[0], values[0], scale)
    seen, last = None, tail[2][:, None] - tokens + torch.arange(tokens)  # [B T], the last row that a token sees
    if tokens > 1 or len(set(lengths)) > 1:
        seen = (torch.arange(longest) <= last[..., None])[:, None]  # [B 1 T rows]
    if len(set(lengths)) > 1:  # unset rows are zeroed: NaN survives masking
        written = (torch.arange(longest) < tail[2][:, None])[:, None, :, None]
        keys, values = (x.masked_fill(~written, 0) for x in (keys, values))
    out, lse = sdpa(q, keys, values, scale=scale, mask=seen)
    if min(lengths) < tokens:
        nothing = (last < 0)[:, None]
        out, lse = out.masked_fill(nothing[..., None], 0), lse.masked_fill(nothing, -torch.inf)
    return merge_reference(*_context(q, k, v, spans, scale), out, lse)


def _context(
    q: Float[Tensor, "B Hq T D"],
    k: Float[Tensor, "N D"],
    v: Float[Tensor, "N D"],
    spans: list[tuple[int, int]],
    scale: float,
) -> tuple[Float[Tensor, "B Hq T D"], Float[Tensor, "B Hq T"]]:
    """Attention to the rows of each head alone, all heads at once where they are equally long."""
    heads, sizes = len(spans), {"b": q.shape[0], "t": q.shape[2]}
    rows = rearrange(q, "b (h g) t d -> 1 h (b g t) d", h=heads)
    count = _uniform(spans, len(k))
    if count:
        k, v = (rearrange(x, "(h n) d -> 1 h n d", h=heads)[:, :, -count:] for x in (k, v))
        out, lse = sdpa(rows, k, v, scale=scale)
    else:
        out = torch.zeros_like(rows)
        lse = torch.full(rows.shape[:3], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
        for h, (start, stop) in enumerate(spans):
            if start < stop:
                keys, values = (x[None, None, start:stop] for x in (k, v))
                out[:, h : h + 1], lse[:, h : h + 1] = sdpa(rows[:, h : h + 1], keys, values, scale=scale)
    out = rearrange(out, "1 h (b g t) d -> b (h g) t d", **sizes)
    return out, rearrange(lse, "1 h (b g t) -> b (h g) t", **sizes)


def _one(
    q: Float[Tensor, "Hq D"],
    k: Float[Tensor, "N D"],
    v: Float[Tensor, "N D"],
    spans: list[tuple[int, int]],
    tail_k: Float[Tensor, "H t D"],
    tail_v: Float[Tensor, "H t D"],
    scale: float,
) -> tuple[Float[Tensor, "1 Hq 1 D"], Float[Tensor, "1 Hq 1"]]:
    """One token of one question, by products: torch gives each head of fused attention one thread only.

    The largest weight is exp(largest logit - lse), which gives the log-sum-exp without another pass of exponentials.
    """
    heads = len(spans)
    rows = (q * scale).view(heads, -1, q.shape[1])
    own = torch.bmm(rows, tail_k.mT)
    count = _uniform(spans, len(k))
    if count:
        k, v = (x.view(heads, -1, x.shape[1])[:, -count:] for x in (k, v))
        logits = torch.cat([torch.bmm(rows, k.mT), own], dim=2)
        weights = logits.softmax(2)
        out = torch.baddbmm(torch.bmm(weights[:, :, count:], tail_v), weights[:, :, :count], v)
        peak, top = logits.amax(2), weights.amax(2)
    else:
        out = torch.empty_like(rows)
        peak, top = torch.empty_like(rows[:, :, 0]), torch.empty_like(rows[:, :, 0])
        parts = zip(spans, rows, own, tail_v, out, peak, top, strict=True)
        for (start, stop), rows_h, own_h, tail_h, out_h, peak_h, top_h in parts:
            logits = torch.cat([torch.mm(rows_h, k[start:stop].T), own_h], dim=1)
            weights = logits.softmax(1)
            before, after = weights.split([stop - start, own_h.shape[1]], dim=1)
            torch.addmm(torch.mm(after, tail_h), before, v[start:stop], out=out_h)
            torch.amax(logits, 1, out=peak_h)
            torch.amax(weights, 1, out=top_h)
    return out.view(1, -1, 1, q.shape[1]), peak.sub_(top.log_()).view(1, -1, 1)


def _spans(bounds: list[int], window: int | None) -> list[tuple[int, int]]:
    """First row and row after the last of what is seen of each head: its last `window` rows."""
    return [
        (start if window is None else max(start, stop - window), stop) for start, stop in itertools.pairwise(bounds)
    ]


def _uniform(spans: list[tuple[int, int]], rows: int) -> int:
    """How many rows of each head are seen if all heads are equally long, else 0."""
    each = rows // len(spans)
    even = all(stop == (h + 1) * each for h, (_, stop) in enumerate(spans))
    return spans[0][1] - spans[0][0] if even else 0
