"""The `attend` functions that join the forward pass to a cache, one for each stage: prefill, score, segment, decode."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float32, Int32
from torch import Tensor

from .. import ops
from ..cache import DenseKV, RaggedKV, Tail, WindowKV
from ..models import Attend, ModelConfig
from .dense import causal_attention, open_attention, window_attention


def prefill_attend(config: ModelConfig, layers: list[DenseKV | WindowKV], length: int) -> Attend:
    """Returns the strategy that writes T new tokens to rows length:length+T of each dense layer, in place.

    Window layers are replaced in the list. The dense layers must have room; see `new_layers`.
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
    """Returns layers for `prefill_attend` with exactly `length` rows reserved; window layers are empty at first."""
    layers: list[DenseKV | WindowKV] = []
    for spec in config.layers:
        shape = (1, config.num_kv_heads, length if spec.window is None else 0, config.head_dim)
        k, v = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        layers.append(DenseKV(k, v) if spec.window is None else WindowKV(k, v, 0))
    return layers


@dataclass(frozen=True)
class Sight:
    """What the tokens of a repeat pass attend to, besides the earlier tokens of the same pass.

    local: True for the prefix, the chunk being repeated and `neighbors` tokens before it; False for the whole cache.
    gap: positions are missing between the cache and the repeat, so that window layers do not attend to the cache.
    past: the compressed layers of the tokens before the cache, prefix included, if the cache is a segment of a longer
        context. They are attended to unless `local`.
    """

    local: bool
    neighbors: int = 0
    gap: bool = False
    past: Sequence[RaggedKV | WindowKV] | None = None


@dataclass(frozen=True)
class Formula:
    """How attention becomes scores: with `softmax`, and weighted by `factors`, both as in `ops.score`."""

    softmax: bool = True
    factors: Callable[[int, Tensor], tuple[Tensor, Tensor]] | None = None
    """factors(layer, v [H C D]) -> row_weight [Hq T], key_weight [Hq C]."""


def score_attend(
    config: ModelConfig,
    layers: Sequence[DenseKV | WindowKV],
    values: Float[Tensor, "L H E"],
    *,
    start: int,
    first: int,
    stop: int,
    sight: Sight,
    formula: Formula,
    asked: Float32[Tensor, "L h D D"] | None = None,
) -> Attend:
    """Returns the strategy of a repeat pass over a dense cache, which fills a part of `values` and changes no pair.

    In each global layer the keys of tokens first:stop are scored into values[l, :, first-start:stop-start], where l
    counts global layers and the first `start` tokens are the prefix. If `asked` is given, the sum of q q^T over every
    fourth token's queries of each KV head is added to asked[l].
    """
    scored = {layer: n for n, layer in enumerate(i for i, s in enumerate(config.layers) if s.window is None)}

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window, kv, out, lse = config.layers[layer].window, layers[layer], q, None
        if window is not None:
            if not sight.gap:
                k, v = torch.cat([kv.k, k], dim=2), torch.cat([kv.v, v], dim=2)
            return window_attention(q, k, v, window, config)
        if asked is not None:
            own = q[0, :, ::4].unflatten(0, (asked.shape[1], -1)).flatten(1, 2)
            own = own if own.dtype == torch.bfloat16 else own.float()  # the range of sums
            asked[scored[layer]] += own.mT @ own
        near = max(start, first - sight.neighbors)
        if sight.local:
            past_k, past_v = ([x[:, :, :start], x[:, :, near:stop]] for x in (kv.k, kv.v))
            out, lse = causal_attention(q, past_k, past_v, k, v, config)
        elif layer == len(config.layers) - 1:
            pass  # the last layer's output is unused
        elif sight.past is None:
            out, _ = causal_attention(q, [kv.k], [kv.v], k, v, config)
        else:
            out, _ = _after_ragged(q, sight.past[layer], kv.k[:, :, start:], kv.v[:, :, start:], k, v, config)
        if near != first or not formula.softmax:
            lse = None  # not the formula's: the pass attended to more keys, or there is no softmax
        prefix, chunk = kv.k[0, :, :start], (kv.k[0, :, first:stop], kv.v[0, :, first:stop])
        scores = score_rows(config, formula, layer, q, k, prefix, chunk, lse=None if lse is None else lse[0])
        values[scored[layer], :, first - start : stop - start] = scores
        return out

    return attend


Look = Callable[[int, Tensor, Tensor, Tensor, Tensor, Tensor], None]
"""look(layer, q, out, lse, chunk_out, chunk_lse): queries [Hq T D], what they get from all that they attend to, and
what they would get from the chunk alone, each with its log-sum-exp [Hq T]."""


def repeat_attend(
    config: ModelConfig,
    layers: Sequence[DenseKV | WindowKV],
    look: Look,
    *,
    start: int,
    first: int,
    stop: int,
    gap: bool = False,
) -> Attend:
    """Returns the strategy of a repeat pass in scope "chunk" that shows its attention to `look` in each global layer.

    It attends to the prefix (the first `start` tokens), to tokens first:stop of a dense cache, and causally to itself,
    as `score_attend` with `Sight(local=True, gap=gap)` does. It changes no pair.
    """

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window, kv = config.layers[layer].window, layers[layer]
        if window is not None:
            if not gap:
                k, v = torch.cat([kv.k, k], dim=2), torch.cat([kv.v, v], dim=2)
            return window_attention(q, k, v, window, config)
        own = causal_attention(q, [kv.k[:, :, :start]], [kv.v[:, :, :start]], k, v, config)
        chunk = open_attention(q, kv.k[:, :, first:stop], kv.v[:, :, first:stop], config)
        out, lse = ops.merge(*chunk, *own)
        look(layer, q[0], out[0], lse[0], chunk[0][0], chunk[1][0])
        return out

    return attend


def score_rows(
    config: ModelConfig,
    formula: Formula,
    layer: int,
    q: Float[Tensor, "1 Hq T D"],
    k: Float[Tensor, "1 H T D"],
    prefix_k: Float[Tensor, "H A D"],
    chunk: tuple[Float[Tensor, "H C D"], Float[Tensor, "H C D"]],
    *,
    lse: Float[Tensor, "Hq T"] | None = None,
) -> Float[Tensor, "H C"]:
    """Returns the scores that one repeat pass gives the keys of a chunk.

    Args:
        k: keys of the repeat itself.
        chunk: keys and values of the chunk.
        lse: log-sum-exp of each query's logits over prefix, chunk and repeat, if already known.
    """
    rows, keys = (None, None) if formula.factors is None else formula.factors(layer, chunk[1])
    return ops.score(
        q[0],
        chunk[0],
        prefix_k,
        k[0],
        scale=config.attn_scale,
        softcap=config.attn_softcap,
        lse=lse,
        row_weight=rows,
        key_weight=keys,
        softmax=formula.softmax,
    )


def segment_attend(
    config: ModelConfig,
    past: Sequence[RaggedKV | WindowKV],
    layers: list[DenseKV | WindowKV],
    *,
    start: int,
    done: int,
    position: int,
) -> Attend:
    """Returns the strategy that prefills a segment of a context whose earlier tokens are already compressed.

    T new tokens attend to `past`, to the first `done` tokens of the segment and causally to themselves. They are
    written to rows start+done:start+done+T of each dense layer. The first `start` rows, the prefix, are not read here:
    `past` has them. Window layers hold the last tokens of the whole context so far, and are replaced.

    Args:
        position: position of the first new token in the whole context.
    """
    append = prefill_attend(config, layers, position)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kv, first, stop = layers[layer], start + done, start + done + k.shape[2]
        if isinstance(kv, WindowKV):
            return append(layer, q, k, v)
        kv.k[:, :, first:stop] = k
        kv.v[:, :, first:stop] = v
        if layer == len(config.layers) - 1:
            return q  # the last layer's output is unused
        return _after_ragged(q, past[layer], kv.k[:, :, start:first], kv.v[:, :, start:first], k, v, config)[0]

    return attend


def decode_attend(
    config: ModelConfig, context: Sequence[RaggedKV], tail: Tail, *, appended: Int32[Tensor, " B"] | None = None
) -> Attend:
    """Returns the strategy of decoding: T new tokens are appended to the tail, and attend to the context and the tail.

    The B questions share the frozen context (see `cache.all_ragged`). The caller advances `tail.lengths`. The host does
    not wait for the device.

    Args:
        appended: how many rows each tail has with the new tokens, where `forward(tails=...)` has written them before;
            then nothing is appended here, and `tail.lengths` is not read.
    """
    scale, softcap = config.attn_scale, config.attn_softcap
    seen = tail.lengths if appended is None else appended

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        nonlocal seen
        if appended is None:
            if layer == 0:
                seen = tail.lengths + k.shape[2]  # rows that the last new token attends to, the same in every layer
            ops.append_(tail.k[layer], tail.v[layer], tail.lengths, k, v)
        kv, window, own = context[layer], config.layers[layer].window, (tail.k[layer], tail.v[layer], seen)
        how: Any = {"scale": scale, "softcap": softcap, "window": window}
        return ops.decode(q, kv.k, kv.v, kv.offsets, **how, schedule=kv.schedule, tail=own, bias=kv.bias)[0]

    return attend


def _after_ragged(
    q: Tensor, past: RaggedKV | WindowKV, dense_k: Tensor, dense_v: Tensor, k: Tensor, v: Tensor, config: ModelConfig
) -> tuple[Tensor, Tensor]:
    """`causal_attention` with a ragged layer in front of the dense past."""
    assert isinstance(past, RaggedKV)
    how: Any = {"scale": config.attn_scale, "softcap": config.attn_softcap, "schedule": past.schedule}
    out, lse = ops.decode(q, past.k, past.v, past.offsets, **how, bias=past.bias)
    return ops.merge(out, lse, *causal_attention(q, [dense_k], [dense_v], k, v, config))
