"""The attend strategies, which join the transformer to a cache: prefill, score, segment, decode."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .. import ops
from ..cache import DenseKV, RaggedKV, Tail, WindowKV
from ..models import Attend, ModelConfig
from .dense import causal_attention, window_attention

Factors = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""factors(layer, v [H C D]) -> row_weight [Hq T], key_weight [Hq C] of `ops.score`."""


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
            out, lse = q, None  # the last layer's output is unused
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
            return q  # the last layer's output is unused
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
