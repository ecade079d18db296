"""Decoding on a CPU: torch's fused attention, one head at a time, or matrix products where they are faster."""

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
    """Whether `decode_host` can run: q on a CPU and not empty, no softcap, and a window only where B = T = 1."""
    one = q.shape[0] == q.shape[2] == 1
    return q.is_cpu and softcap is None and (window is None or one) and q.numel() > 0


def decode_host(
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
    """`decode` for what `host_takes` accepts, by far fewer torch calls than the reference; it stores no large logits.

    Attention to context and tail is computed separately and merged. Quantized rows are dequantized first.
    """
    bounds = offsets.tolist()
    k, v = (dequantize(x, dtype=q.dtype, offsets=offsets) if isinstance(x, Quantized) else x for x in (k, v))
    rows = (k, v, None if bias is None else bias.to(torch.promote_types(q.dtype, torch.float32)))
    if tail is None:
        return _context(q, rows, *_spans(bounds, None if window is None else max(0, window - 1)), scale)
    tail_k, tail_v, ends = tail
    tokens, lengths = q.shape[2], ends.tolist()
    longest = min(max(lengths), tail_k.shape[2])
    if window is None:
        first, left = 0, None
    else:  # the window covers the tail from row `first` on, and the last `left` rows of each head
        first, left = min(max(0, lengths[0] - window), longest), max(0, window - lengths[0])
    spans, count = _spans(bounds, left)
    if first == longest:
        return _context(q, rows, spans, count, scale)
    if q.shape[0] == tokens == 1 and q.dtype == torch.float32:
        return _one(q, rows, spans, count, tail_k[0, :, first:longest], tail_v[0, :, first:longest], scale)
    keys, values = tail_k[:, :, first:longest], tail_v[:, :, first:longest]
    seen, last = None, ends[:, None] - tokens + torch.arange(tokens)  # [B T], the last row that a token sees
    if tokens > 1 or len(set(lengths)) > 1:
        seen = (torch.arange(longest) <= last[..., None])[:, None]  # [B 1 T rows]
    if len(set(lengths)) > 1:  # unset rows are zeroed: NaN survives masking
        written = (torch.arange(longest) < ends[:, None])[:, None, :, None]
        keys, values = (x.masked_fill(~written, 0) for x in (keys, values))
    out, lse = sdpa(q, keys, values, scale=scale, mask=seen)
    if min(lengths) < tokens:
        nothing = (last < 0)[:, None]
        out, lse = out.masked_fill(nothing[..., None], 0), lse.masked_fill(nothing, -torch.inf)
    return merge_reference(*_context(q, rows, spans, count, scale), out, lse)


def _spans(bounds: list[int], window: int | None) -> tuple[list[tuple[int, int]], int]:
    """Returns (first row, row after the last) of each head's last `window` rows, and how many they are.

    The number is that of every head; it is 0 where heads differ in length.
    """
    spans = list(itertools.pairwise(bounds))
    even = len({stop - begin for begin, stop in spans}) == 1
    if window is not None:
        spans = [(max(begin, stop - window), stop) for begin, stop in spans]
    return spans, spans[0][1] - spans[0][0] if even else 0


def _context(
    q: Float[Tensor, "B Hq T D"],
    context: tuple[Float[Tensor, "N D"], Float[Tensor, "N D"], Float[Tensor, " N"] | None],
    spans: list[tuple[int, int]],
    count: int,
    scale: float,
) -> tuple[Float[Tensor, "B Hq T D"], Float[Tensor, "B Hq T"]]:
    """Attention to the context alone, without the tail; one call for all heads where they are equally long."""
    (k, v, bias), (queries, _, tokens, _), heads = context, q.shape, len(spans)
    rows = rearrange(q, "b (h g) t d -> 1 h (b g t) d", h=heads)
    if count:
        k, v = (rearrange(x, "(h n) d -> 1 h n d", h=heads)[:, :, -count:] for x in (k, v))
        mask = None if bias is None else rearrange(bias, "(h n) -> 1 h 1 n", h=heads)[..., -count:]
        out, lse = sdpa(rows, k, v, scale=scale, mask=mask)
    else:
        out = torch.zeros_like(rows)
        lse = torch.full(rows.shape[:3], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
        for h, (begin, stop) in enumerate(spans):
            if begin < stop:
                keys, values = (x[None, None, begin:stop] for x in (k, v))
                mask = None if bias is None else bias[None, None, None, begin:stop]
                out[:, h : h + 1], lse[:, h : h + 1] = sdpa(rows[:, h : h + 1], keys, values, scale=scale, mask=mask)
    out = rearrange(out, "1 h (b g t) d -> b (h g) t d", b=queries, t=tokens)
    return out, rearrange(lse, "1 h (b g t) -> b (h g) t", b=queries, t=tokens)


def _one(
    q: Float[Tensor, "1 Hq 1 D"],
    context: tuple[Float[Tensor, "N D"], Float[Tensor, "N D"], Float[Tensor, " N"] | None],
    spans: list[tuple[int, int]],
    count: int,
    tail_k: Float[Tensor, "H t D"],
    tail_v: Float[Tensor, "H t D"],
    scale: float,
) -> tuple[Float[Tensor, "1 Hq 1 D"], Float[Tensor, "1 Hq 1"]]:
    """One token of one question by matrix products: torch's fused attention uses only one thread a head.

    All heads share one softmax over [tail, context], with -inf after the rows of a shorter head. As the largest weight
    is exp(largest logit - lse), the log-sum-exp is the largest logit minus the logarithm of the largest weight.
    """
    (k, v, bias), (heads, reach, width) = context, tail_k.shape
    rows = (q * scale).reshape(heads, -1, width)
    logits = torch.bmm(rows, tail_k.mT)
    if count:
        k, v = k.view(heads, -1, width), v.view(heads, -1, width)
        if count < k.shape[1]:
            k, v = k[:, -count:], v[:, -count:]
        kept = torch.bmm(rows, k.mT)
        if bias is not None:
            kept += bias.view(heads, 1, -1)[..., -count:]
        logits = torch.cat([logits, kept], dim=2)
    else:
        longest = max(stop - begin for begin, stop in spans)
        own, logits = logits, rows.new_full((*rows.shape[:2], reach + longest), -torch.inf)
        logits[:, :, :reach] = own
        for rows_h, logits_h, (begin, stop) in zip(rows.unbind(), logits.unbind(), spans, strict=True):
            torch.mm(rows_h, k[begin:stop].T, out=logits_h[:, reach : reach + stop - begin])
            if bias is not None:
                logits_h[:, reach : reach + stop - begin] += bias[begin:stop]
    weights = logits.softmax(2)
    lse = logits.amax(2).sub_(weights.amax(2).log_())
    own, weights = weights.tensor_split((reach,), dim=2)
    out = torch.bmm(own, tail_v)
    if count:
        out.baddbmm_(weights, v)
    else:
        for out_h, weights_h, (begin, stop) in zip(out.unbind(), weights.unbind(), spans, strict=True):
            out_h.addmm_(weights_h[:, : stop - begin], v[begin:stop])
    return out.view(1, -1, 1, width), lse.view(1, -1, 1)
