"""The attend strategies, which join the transformer to a cache: prefill, score, segment, decode."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .. import ops
from ..cache import DenseKV, RaggedKV, Tail, WindowKV
from ..models import Attend, ModelConfig
from .dense import causal_attention, window_attention


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


@dataclass(frozen=True)
class Sight:
    """What the rows of a repeat pass attend to, besides the repeat itself up to their own place.

    The whole cache or, if `local`, the prefix, the chunk that is repeated and the `neighbors` tokens before it. Window
    layers see the last tokens of the cache or, where there is a `gap` of positions between it and the repeat, nothing.
    Where the cache is a segment of a longer context, `past` is what is kept of the tokens before it, the prefix
    included; only a row that is not `local` attends to it.
    """

    local: bool
    neighbors: int = 0
    gap: bool = False
    past: Sequence[RaggedKV | WindowKV] | None = None


@dataclass(frozen=True)
class Formula:
    """How attention becomes scores: `softmax` and the factors of rows and keys are those of `ops.score`."""

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
) -> Attend:
    """Returns the strategy of a repeat pass over a dense cache: it writes nothing to the cache and fills `values`.

    Each global layer's keys of tokens first:stop are scored into values[l, :, first-start:stop-start], l counting
    global layers; the first `start` tokens are the prefix.
    """
    scored = {layer: n for n, layer in enumerate(i for i, s in enumerate(config.layers) if s.window is None)}

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window, kv, out, lse = config.layers[layer].window, layers[layer], q, None
        if window is not None:
            if not sight.gap:
                k, v = torch.cat([kv.k, k], dim=2), torch.cat([kv.v, v], dim=2)
            return window_attention(q, k, v, window, config)
        near = max(start, first - sight.neighbors)
        if sight.local:
            seen = (slice(start), slice(near, stop))
            past_k, past_v = ([x[:, :, part] for part in seen] for x in (kv.k, kv.v))
            out, lse = causal_attention(q, past_k, past_v, k, v, config)
        elif layer == len(config.layers) - 1:
            pass  # the last layer's output is unused
        elif sight.past is None:
            out, _ = causal_attention(q, [kv.k], [kv.v], k, v, config)
        else:
            out, _ = _after_ragged(q, sight.past[layer], kv.k[:, :, start:], kv.v[:, :, start:], k, v, config)
        exact = sight.local and near == first and formula.softmax  # the rows saw what the softmax is over
        values[scored[layer], :, first - start : stop - start] = score_rows(
            config, formula, layer, q, k, kv.k[0, :, :start], (kv.k[0, :, first:stop], kv.v[0, :, first:stop]),
            lse=lse[0] if exact and lse is not None else None,
        )  # fmt: skip
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
    """Returns the scores that one repeat pass gives the keys of a chunk; `k` are the keys of the repeat itself.

    Args:
        chunk: keys and values.
        lse: log-sum-exp of each row's logits over prefix, chunk and repeat, if it is known already.
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
    """Returns the strategy that prefills a segment of a context whose earlier tokens are compressed already.

    T new tokens attend to `past`, to the `done` tokens of the segment before them and causally to themselves. They
    become rows start+done:start+done+T of each dense layer. Its first `start` rows, the prefix, are not read: they are
    in `past`. A window layer, which holds the last of all earlier tokens, is replaced. `position` is that of the first
    new token.
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
        kv = context[layer]
        return ops.decode(
            q,
            kv.k,
            kv.v,
            kv.offsets,
            scale=config.attn_scale,
            softcap=config.attn_softcap,
            window=config.layers[layer].window,
            schedule=kv.schedule,
            tail=(tail.k[layer], tail.v[layer], seen),
        )[0]

    return attend


def _after_ragged(
    q: Tensor, past: RaggedKV | WindowKV, dense_k: Tensor, dense_v: Tensor, k: Tensor, v: Tensor, config: ModelConfig
) -> tuple[Tensor, Tensor]:
    """`causal_attention` with ragged heads in front of the dense past."""
    assert isinstance(past, RaggedKV)
    scale, softcap = config.attn_scale, config.attn_softcap
    out, lse = ops.decode(q, past.k, past.v, past.offsets, scale=scale, softcap=softcap, schedule=past.schedule)
    return ops.merge(out, lse, *causal_attention(q, [dense_k], [dense_v], k, v, config))
