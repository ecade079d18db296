"""The three attend strategies, which join the transformer to a cache: prefill, score, decode."""

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from . import ops
from .cache import DenseKV, RaggedKV, Tail, WindowKV
from .models import Attend, ModelConfig

_WORTH_PLANNING = 2048 * 16384  # rows x keys
Factors = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""factors(layer, v [H C D]) -> row_weight [Hq T], key_weight [Hq C] of `ops.score`."""

_ROWS_PER_BLOCK = 512  # query rows of a block where logits are held in memory
_FEW_KEYS = 64  # more than a vector register of any CPU holds; only with fewer `_with_nan` is needed


def prefill_attend(config: ModelConfig, layers: list[DenseKV | WindowKV], length: int) -> Attend:
    """Returns the strategy that appends: rows length:length+T of each dense layer are written, window layers replaced.

    `layers` must have room for them; see `new_layers`.
    """

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window, kv, tokens = config.layers[layer].window, layers[layer], k.shape[2]
        if isinstance(kv, WindowKV):
            assert window is not None
            k, v = torch.cat([kv.k, k], dim=2), torch.cat([kv.v, v], dim=2)
            last_k, last_v = (x[:, :, -window:].clone() for x in (k, v))
            layers[layer] = WindowKV(last_k, last_v, length + tokens - last_k.shape[2])
            return window_attention(q, k, v, window, config)
        kv.k[:, :, length : length + tokens] = k
        kv.v[:, :, length : length + tokens] = v
        return causal_attention(q, [kv.k[:, :, :length]], [kv.v[:, :, :length]], k, v, config)[0]

    return attend


def new_layers(
    config: ModelConfig, length: int, *, dtype: torch.dtype, device: torch.device
) -> list[DenseKV | WindowKV]:
    """Returns layers for `prefill_attend` with exactly `length` rows reserved; window layers start empty."""
    layers: list[DenseKV | WindowKV] = []
    for spec in config.layers:
        shape = (1, config.num_kv_heads, length if spec.window is None else 0, config.head_dim)
        k, v = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        layers.append(DenseKV(k, v) if spec.window is None else WindowKV(k, v, 0))
    return layers


def score_attend(
    config: ModelConfig,
    layers: Sequence[DenseKV | WindowKV],
    values: Float[Tensor, "L H E"],
    *,
    sink: int,
    start: int,
    stop: int,
    local: bool,
    neighbors: int = 0,
    gap: bool = False,
    past: Sequence[RaggedKV | WindowKV] | None = None,
    softmax: bool = True,
    factors: Factors | None = None,
) -> Attend:
    """Returns the strategy of a repeat pass: it reads the cache, writes nothing to it, and fills `values`.

    Each global layer's keys of tokens start:stop are scored into values[l, :, start-sink:stop-sink], l counting
    global layers. A row attends to the whole cache and the repeat itself or, if `local`, to the first `sink` tokens,
    the `neighbors` tokens before start, start:stop and the repeat itself. Window layers see the last tokens of the
    cache and the repeat itself or, where there is a `gap` of positions between the two, the repeat alone. Where the
    cache is a segment of a longer context, `past` is what is kept of the tokens before it, the first `sink` included;
    only a row that is not `local` attends to it. `softmax` and what `factors` gives for the chunk's values are those of
    `ops.score`.
    """
    scored = {layer: n for n, layer in enumerate(i for i, s in enumerate(config.layers) if s.window is None)}

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window, kv = config.layers[layer].window, layers[layer]
        if window is not None:
            if not gap:
                k, v = torch.cat([kv.k, k], dim=2), torch.cat([kv.v, v], dim=2)
            return window_attention(q, k, v, window, config)
        chunk_k, sink_k = kv.k[0, :, start:stop], kv.k[0, :, :sink]
        first = max(sink, start - neighbors)
        if local:
            seen = (slice(sink), slice(first, stop))
            past_k, past_v = ([x[:, :, part] for part in seen] for x in (kv.k, kv.v))
            out, lse = causal_attention(q, past_k, past_v, k, v, config)
        elif layer == len(config.layers) - 1:
            out, lse = q, None  # nothing is made of what the last layer attends to
        elif past is None:
            out, lse = causal_attention(q, [kv.k], [kv.v], k, v, config)
        else:
            out, lse = _after_ragged(q, past[layer], kv.k[:, :, sink:], kv.v[:, :, sink:], k, v, config)
        row_weight, key_weight = (None, None) if factors is None else factors(layer, kv.v[0, :, start:stop])
        values[scored[layer], :, start - sink : stop - sink] = ops.score(
            q[0],
            chunk_k,
            sink_k,
            k[0],
            scale=config.attn_scale,
            softcap=config.attn_softcap,
            lse=lse[0] if local and first == start and softmax and lse is not None else None,
            row_weight=row_weight,
            key_weight=key_weight,
            softmax=softmax,
        )
        return out

    return attend


def segment_attend(
    config: ModelConfig,
    past: Sequence[RaggedKV | WindowKV],
    layers: list[DenseKV | WindowKV],
    *,
    sink: int,
    done: int,
    position: int,
) -> Attend:
    """Returns the strategy that prefills a segment of a context whose earlier tokens are compressed already.

    T new tokens attend to `past`, to the `done` tokens of the segment before them and causally to themselves. They
    become rows sink+done:sink+done+T of each dense layer, whose first `sink` rows are not read: they are in `past`. A
    window layer, which holds the last of all earlier tokens, is replaced. `position` is that of the first new token.
    """
    append = prefill_attend(config, layers, position)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kv, start, stop = layers[layer], sink + done, sink + done + k.shape[2]
        if isinstance(kv, WindowKV):
            return append(layer, q, k, v)
        kv.k[:, :, start:stop] = k
        kv.v[:, :, start:stop] = v
        if layer == len(config.layers) - 1:
            return q  # nothing is made of what the last layer attends to
        return _after_ragged(q, past[layer], kv.k[:, :, sink:start], kv.v[:, :, sink:start], k, v, config)[0]

    return attend


def decode_attend(config: ModelConfig, context: Sequence[RaggedKV], tail: Tail) -> Attend:
    """Returns the strategy that answers: T new tokens go to the tail, and attend to the context and to it.

    The B questions share the frozen context (see `cache.all_ragged`). `tail.lengths` is not advanced here. Nothing
    waits for the device.
    """

    seen = tail.lengths

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        nonlocal seen
        if layer == 0:
            seen = tail.lengths + k.shape[2]  # rows that the last new token sees: the same in every layer
        ops.append_(tail.k[layer], tail.v[layer], tail.lengths, k, v)
        kv, rows, window = context[layer], (tail.k[layer], tail.v[layer], seen), config.layers[layer].window
        if not q.is_cuda and config.attn_softcap is None and (window is None or q.shape[0] == q.shape[2] == 1):
            return _decode_on_host(q, kv, rows, config.attn_scale, window)
        return ops.decode(
            q,
            kv.k,
            kv.v,
            kv.offsets,
            scale=config.attn_scale,
            softcap=config.attn_softcap,
            window=window,
            schedule=kv.schedule,
            tail=rows,
        )[0]

    return attend


def causal_attention(
    q: Float[Tensor, "1 Hq T D"],
    past_k: Sequence[Float[Tensor, "1 H _ D"]],
    past_v: Sequence[Float[Tensor, "1 H _ D"]],
    k: Float[Tensor, "1 H T D"],
    v: Float[Tensor, "1 H T D"],
    config: ModelConfig,
) -> tuple[Float[Tensor, "1 Hq T D"], Float[Tensor, "1 Hq T"]]:
    """Returns attention of T new tokens to all parts of the past and causally to themselves, with its log-sum-exp.

    Past and self are computed apart and merged, so there is never a mask of T x S; a short past goes to one kernel with
    the new tokens.
    """
    tokens, past = q.shape[2], sum(part.shape[2] for part in past_k)
    few = 0 < past <= 4 * tokens and tokens * past < _WORTH_PLANNING
    if config.attn_softcap is None and few and _has_flash(q):
        return _flash(q, torch.cat([*past_k, k], dim=2), torch.cat([*past_v, v], dim=2), config.attn_scale)
    keys, values = (x[0] if len(x) == 1 else torch.cat(list(x), dim=2) for x in (past_k, past_v))
    if config.attn_softcap is not None:
        return _softcapped(q, keys, values, k, v, config)
    own = _sdpa(q, k, v, scale=config.attn_scale, causal=True)
    return own if past == 0 else ops.merge(*_sdpa(q, keys, values, scale=config.attn_scale), *own)


def _after_ragged(
    q: Tensor, past: RaggedKV | WindowKV, dense_k: Tensor, dense_v: Tensor, k: Tensor, v: Tensor, config: ModelConfig
) -> tuple[Tensor, Tensor]:
    """`causal_attention` with ragged heads in front of the dense past."""
    assert isinstance(past, RaggedKV)
    if q.is_cuda or config.attn_softcap is not None:
        options = {"scale": config.attn_scale, "softcap": config.attn_softcap, "schedule": past.schedule}
        size = q.shape[2] if q.is_cuda else _ROWS_PER_BLOCK  # the reference holds the logits of a block
        parts = [ops.decode(x, past.k, past.v, past.offsets, **options) for x in q.split(size, dim=2)]
        out, lse = (torch.cat(x, dim=2) for x in zip(*parts, strict=True)) if len(parts) > 1 else parts[0]
    else:
        out, lse = _ragged_on_host(q, past, config.attn_scale)
    return ops.merge(out, lse, *causal_attention(q, [dense_k], [dense_v], k, v, config))


def _ragged_on_host(q: Tensor, context: RaggedKV, scale: float, window: int | None = None) -> tuple[Tensor, Tensor]:
    """`ops.decode` without a tail by torch's fused attention, a head at a time or all at once: no logits are held.

    Of each head the last `window` rows are read.
    """
    bounds = context.offsets.tolist()
    heads, batch, tokens = len(bounds) - 1, q.shape[0], q.shape[2]
    rows = rearrange(q, "b (h g) t d -> 1 h (b g t) d", h=heads)
    k, v = _plain_rows(context, q.dtype)
    spans = _spans(bounds, window)
    if _uniform(bounds) and spans[0][0] < spans[0][1]:
        k, v = (rearrange(x, "(h n) d -> 1 h n d", h=heads)[:, :, spans[0][0] :] for x in (k, v))
        out, lse = _sdpa(rows, k, v, scale=scale)
    else:
        out = torch.zeros_like(rows)
        lse = torch.full(rows.shape[:3], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
        for h, (start, stop) in enumerate(spans):
            if start < stop:
                keys, values = (x[None, None, start:stop] for x in (k, v))
                out[:, h : h + 1], lse[:, h : h + 1] = _sdpa(rows[:, h : h + 1], keys, values, scale=scale)
    sizes = {"b": batch, "t": tokens}
    out = rearrange(out, "1 h (b g t) d -> b (h g) t d", **sizes)
    return out, rearrange(lse, "1 h (b g t) -> b (h g) t", **sizes)


def window_attention(
    q: Float[Tensor, "1 Hq T D"],
    k: Float[Tensor, "1 H S D"],
    v: Float[Tensor, "1 H S D"],
    window: int,
    config: ModelConfig,
) -> Float[Tensor, "1 Hq T D"]:
    """Returns attention of the last T of S tokens, each to the last `window` up to itself.

    The cost is T x window, whatever S is. Where no library kernel has the window, queries go in blocks that see one
    band of keys each.
    """
    if _has_flash(q) and config.attn_softcap is None:
        reach = q.shape[2] + window - 1
        return _flash(q, k[:, :, -reach:], v[:, :, -reach:], config.attn_scale, window)[0]
    tokens, reach = q.shape[2], window - 1
    block = min(tokens, max(window, 128))
    blocks = -(-tokens // block)
    k, v = (x[:, :, -(tokens + reach) :] for x in (k, v))
    missing = tokens + reach - k.shape[2]  # rows that the first queries would see before the first token
    padding = blocks * block - tokens
    k, v = (F.pad(x, (0, 0, missing, padding)) for x in (k, v))
    keys, values = (rearrange(x.unfold(2, block + reach, block), "1 h n d s -> n h s d") for x in (k, v))
    rows = rearrange(F.pad(q, (0, 0, 0, padding)), "1 h (n t) d -> n h t d", t=block)
    row = torch.arange(block, device=q.device)[:, None]
    column = torch.arange(block + reach, device=q.device)
    distance = row + reach - column
    first = torch.arange(blocks, device=q.device)[:, None, None, None] * block
    seen = (distance >= 0) & (distance < window) & (first + column >= missing)
    if config.attn_softcap is None:
        out = F.scaled_dot_product_attention(
            rows, keys, values, attn_mask=seen, scale=config.attn_scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    else:
        out = torch.cat([_plain(*part, config) for part in zip(rows, keys, values, seen, strict=True)])
    return rearrange(out, "n h t d -> 1 h (n t) d")[:, :, :tokens]


def _decode_on_host(
    q: Tensor, kv: RaggedKV, tail: tuple[Tensor, Tensor, Tensor], scale: float, window: int | None
) -> Tensor:
    """`ops.decode` by torch's fused attention, which on a CPU takes a few calls where the reference takes dozens.

    A window is for one token of one question.
    """
    tokens, lengths = q.shape[2], tail[2].tolist()
    longest = max(lengths)
    first = 0 if window is None else max(0, longest - window)
    left = None if window is None else max(0, window - longest)  # what the tail leaves of the window
    if q.shape[0] == tokens == 1 and q.dtype == torch.float32:
        own_k, own_v = (x[0, :, first:longest] for x in tail[:2])
        return _one_on_host(q[0, :, 0], kv, own_k, own_v, scale, left)
    seen = None
    if tokens > 1 or len(set(lengths)) > 1:
        place = tail[2][:, None] - tokens + torch.arange(tokens)
        seen = (torch.arange(longest) <= place[..., None])[:, None]  # [B 1 T rows]
    keys, values = (x[:, :, first:longest] for x in tail[:2])
    if len(set(lengths)) > 1:  # a masked key still has to be a number
        written = (torch.arange(longest) < tail[2][:, None])[:, None, :, None]
        keys, values = (x.masked_fill(~written, 0) for x in (keys, values))
    own = _sdpa(q, keys, values, scale=scale, mask=seen)
    return ops.merge(*_ragged_on_host(q, kv, scale, left), *own)[0]


def _one_on_host(
    q: Float[Tensor, "Hq D"],
    kv: RaggedKV,
    tail_k: Float[Tensor, "H t D"],
    tail_v: Float[Tensor, "H t D"],
    scale: float,
    window: int | None,
) -> Float[Tensor, "1 Hq 1 D"]:
    """`_decode_on_host` of one token of one question, by products: torch gives a head of fused attention one thread.

    Two threads, SmolLM2's 3 heads of 2,000 rows: 233 us instead of 451; 1,800 rows in unequal heads 224 instead of 470.
    """
    bounds = kv.offsets.tolist()
    heads = len(bounds) - 1
    rows = (q * scale).view(heads, -1, q.shape[1])
    k, v = _plain_rows(kv, q.dtype)
    own = torch.bmm(rows, tail_k.mT)
    spans = _spans(bounds, window)
    count = spans[0][1] - spans[0][0]
    if _uniform(bounds) and count > 0:
        k, v = (x.view(heads, -1, x.shape[1])[:, -count:] for x in (k, v))
        weights = torch.cat([torch.bmm(rows, k.mT), own], dim=2).softmax(2)
        out = torch.baddbmm(torch.bmm(weights[:, :, count:], tail_v), weights[:, :, :count], v)
    else:
        out = torch.empty_like(rows)
        for h, (start, stop) in enumerate(spans):
            weights = torch.cat([torch.mm(rows[h], k[start:stop].T), own[h]], dim=1).softmax(1)
            after = torch.mm(weights[:, stop - start :], tail_v[h])
            torch.addmm(after, weights[:, : stop - start], v[start:stop], out=out[h])
    return out.view(1, -1, 1, q.shape[1])


def _plain_rows(kv: RaggedKV, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values as numbers."""
    k, v = (x if isinstance(x, Tensor) else ops.dequantize(x, dtype=dtype, offsets=kv.offsets) for x in (kv.k, kv.v))
    return k, v


def _spans(bounds: list[int], window: int | None) -> list[tuple[int, int]]:
    """First row and row after the last of what is seen of each head: its last `window` rows."""
    return [
        (start if window is None else max(start, stop - window), stop) for start, stop in itertools.pairwise(bounds)
    ]


def _uniform(bounds: list[int]) -> bool:
    return len({stop - start for start, stop in itertools.pairwise(bounds)}) == 1


def _plain(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, config: ModelConfig) -> Tensor:
    """One masked block with softcap, logits held in memory in float32: [Hq T D] against [H S D] -> [1 Hq T D]."""
    group = config.num_heads // config.num_kv_heads
    cap = config.attn_softcap
    assert cap is not None
    rows = rearrange(q, "(h g) t d -> h g t d", g=group).float()
    logits = torch.einsum("hgtd,hsd->hgts", rows, k.float()) * config.attn_scale
    weights = (torch.tanh(logits / cap) * cap).masked_fill(~seen, -torch.inf).softmax(-1)
    return rearrange(torch.einsum("hgts,hsd->hgtd", weights, v.float()), "h g t d -> 1 (h g) t d").to(q.dtype)


def _softcapped(
    q: Tensor, past_k: Tensor, past_v: Tensor, k: Tensor, v: Tensor, config: ModelConfig
) -> tuple[Tensor, Tensor]:
    """`causal_attention` with a softcap, which no library kernel has: the decode op, in blocks of rows."""
    heads, length = past_k.shape[1:3]
    keys, values = (rearrange(x, "1 h s d -> (h s) d") for x in (past_k, past_v))
    offsets = torch.arange(heads + 1, dtype=torch.int32, device=q.device) * length
    parts = []
    for start in range(0, q.shape[2], _ROWS_PER_BLOCK):
        rows = q[:, :, start : start + _ROWS_PER_BLOCK]
        seen = torch.tensor([start + rows.shape[2]], dtype=torch.int32, device=q.device)
        tail = (k[:, :, : start + rows.shape[2]], v[:, :, : start + rows.shape[2]], seen)
        parts.append(
            ops.decode(rows, keys, values, offsets, scale=config.attn_scale, softcap=config.attn_softcap, tail=tail)
        )
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Torch's fused attention with its log-sum-exp [B Hq T], which the public function does not return.

    A mask [B 1 T S] of what is seen is for the CPU.

    On an H100 cuDNN's kernels reach 580 to 720 TFLOP/s where flash's reach 320 to 370, but planning for a new shape
    takes them 50 ms of the host's time.
    """
    aten = torch.ops.aten
    if _has_flash(q):
        if torch.cuda.get_device_capability(q.device)[0] >= 9 and q.shape[2] * k.shape[2] >= _WORTH_PLANNING:
            out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, scale=scale)
            return out, lse.view(q.shape[:3])
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
        return out, lse
    group, tokens = q.shape[1] // k.shape[1], q.shape[2]
    if causal:
        k, v = (repeat(x, "b h t d -> b (h g) t d", g=group) for x in (k, v))
    else:  # where no key is hidden by place the rows of a group are just rows: keys need not be repeated
        q = rearrange(q, "b (h g) t d -> b h (g t) d", g=group)
        if mask is not None:
            bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
            mask = bias.repeat(1, 1, group, 1)
    if q.is_cuda:
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
        lse = lse[..., : q.shape[2]]
    else:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
        if mask is None and k.shape[2] < _FEW_KEYS and bool((lse == 0).any()):
            out, lse = _with_nan(out, lse, q, k, causal=causal)
    if causal:
        return out, lse
    out = rearrange(out, "b h (g t) d -> b (h g) t d", t=tokens)
    return out, rearrange(lse, "b h (g t) -> b (h g) t", t=tokens)


def _with_nan(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Puts NaN back where torch lost it.

    On a CPU it gives a query with a NaN logit an output and an lse of 0 if there are fewer keys than a vector register
    holds. For attention without a mask.
    """
    logits = q @ k.mT
    lost = (lse == 0) & (logits.tril() if causal else logits).isnan().any(-1)
    return out.masked_fill(lost[..., None], torch.nan), lse.masked_fill(lost, torch.nan)


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None) -> tuple[Tensor, Tensor]:
    """Attention of the last T of S tokens, each to those up to itself or the last `window` of them, and its lse."""
    rows, keys, values = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        rows, keys, values, None, None, rows.shape[1], keys.shape[1], 0.0, False, False,
        scale=scale, window_size_left=None if window is None else window - 1, window_size_right=0,
    )  # fmt: skip
    return out.transpose(1, 2), lse


def _has_flash(x: Tensor) -> bool:
    sixteen = x.dtype in (torch.float16, torch.bfloat16)
    return x.is_cuda and sixteen and torch.cuda.get_device_capability(x.device)[0] >= 8
