"""What a cache holds, as plain Python: for each layer and head a dict from position to a key row and a value row.

`read` looks into a cache of ours; `run` attends to such dicts, a head at a time, with nothing of ours but the weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

import kvzip
from kvzip.cache import RaggedKV, WindowKV

Rows = dict[int, tuple[tuple[float, ...], tuple[float, ...]]]
"""position -> (key, value) of one head of one layer."""

Held = list[list[Rows]]
"""Rows of every layer and head."""


@dataclass(frozen=True)
class Pass:
    """One forward pass: final hidden states [T M], and q [Hq T D], k, v [H T D] of each layer."""

    hidden: Tensor
    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]


def read(cache: kvzip.DenseCache | kvzip.RaggedCache) -> Held:
    """Returns every pair that the cache holds, tail included. A position held twice by one head is an error."""
    tail = None if isinstance(cache, kvzip.DenseCache) else cache.tail
    held = []
    for index, layer in enumerate(cache.layers if isinstance(cache, kvzip.DenseCache) else cache.context):
        heads = _context_rows(layer)
        if tail is not None:
            length = len(cache.token_ids) - cache.context_length
            assert tail.lengths.tolist() == [length]
            positions = range(cache.context_length, cache.context_length + length)
            for rows, k, v in zip(heads, tail.k[index][0, :, :length], tail.v[index][0, :, :length], strict=True):
                add(rows, positions, k, v)
        held.append(heads)
    return held


def add(rows: Rows, positions: Sequence[int], k: Tensor, v: Tensor) -> None:
    """Puts k, v [n D] at the given positions, all of them new."""
    for position, key, value in zip(positions, k.tolist(), v.tolist(), strict=True):
        assert position not in rows, f"position {position} is held twice"
        rows[position] = (tuple(key), tuple(value))


def _context_rows(layer) -> list[Rows]:
    heads: list[Rows] = []
    if isinstance(layer, RaggedKV):
        k, v = (
            x if isinstance(x, Tensor) else kvzip.ops.dequantize(x, offsets=layer.offsets) for x in (layer.k, layer.v)
        )
        for start, stop in zip(layer.offsets[:-1].tolist(), layer.offsets[1:].tolist(), strict=True):
            positions = layer.positions[start:stop].tolist()
            assert positions == sorted(positions)
            add_to: Rows = {}
            add(add_to, positions, k[start:stop], v[start:stop])
            heads.append(add_to)
        return heads
    first = layer.start if isinstance(layer, WindowKV) else 0
    for k, v in zip(layer.k[0], layer.v[0], strict=True):
        heads.append({})
        add(heads[-1], range(first, first + len(k)), k, v)
    return heads


def within(layer: RaggedKV, head: int, old: Sequence[Sequence[float]], new: Sequence[Sequence[float]]) -> bool:
    """Whether a packed key and value of a head are within half a step of what they were.

    Where rows are turned, that is said of what is turned: the rest of the values.
    """
    for name, row, got in zip("kv", old, new, strict=True):
        rest, back = (_packed(layer, head, name, x) for x in (row, got))
        step = (max(rest) - min(rest)) / (2 ** getattr(layer, name).bits - 1)
        if any(abs(a - b) > 0.501 * step for a, b in zip(rest, back, strict=True)):
            return False
    return True


def _packed(layer: RaggedKV, head: int, name: str, row: Sequence[float]) -> list[float]:
    """What the layer packs of a row."""
    x = getattr(layer, name)
    if x.channels is None:
        center, spread = [0.0] * len(row), [1.0] * len(row)
    else:
        center, spread = x.channels.center[head].tolist(), x.channels.spread[head].tolist()
    rest = [(value - c) / s for value, c, s in zip(row, center, spread, strict=True)]
    if not x.turned:
        return rest
    size = len(rest) & -len(rest)
    signs = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    blocks = [rest[at : at + size] for at in range(0, len(rest), size)]
    return [sum(s * y for s, y in zip(line, block, strict=True)) / size**0.5 for block in blocks for line in signs]


def biases(cache: kvzip.RaggedCache) -> list[list[list[float]]]:
    """Returns the bias of each row of every layer and head of a cache without a tail, in the order of `read`."""
    found = []
    for layer, heads in zip(cache.context, read(cache), strict=True):
        if not isinstance(layer, RaggedKV) or layer.bias is None:
            found.append([[0.0] * len(rows) for rows in heads])
        else:
            bounds = layer.offsets.tolist()
            found.append([layer.bias[a:b].tolist() for a, b in pairwise(bounds)])
    return found


@torch.no_grad()
def run(
    model: kvzip.Model,
    held: Held,
    token_ids: Sequence[int],
    start: int,
    bias: Sequence[Sequence[Sequence[float]]] | None = None,
) -> Pass:
    """Returns a forward pass of tokens at positions `start` and on, which attend to what is held and to themselves.

    Args:
        bias: what is added to the logit of each row that is held.
    """
    config, new = model.config, Pass(torch.empty(0), [], [], [])
    places = torch.arange(start, start + len(token_ids))

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for found, x in zip((new.q, new.k, new.v), (q, k, v), strict=True):
            found.append(x[0])
        group, window, outs = q.shape[1] // k.shape[1], config.layers[layer].window, []
        for head, rows in enumerate(held[layer]):
            positions = torch.tensor([*rows, *places.tolist()])
            old_k, old_v = (
                torch.tensor([row[part] for row in rows.values()], dtype=q.dtype).reshape(-1, q.shape[-1])
                for part in (0, 1)
            )
            keys, values = torch.cat([old_k, k[0, head]]), torch.cat([old_v, v[0, head]])
            distance = places[:, None] - positions
            seen = (distance >= 0) & (distance < (window or len(positions) + start + 1))
            logits = q[0, head * group : (head + 1) * group] @ keys.mT * config.attn_scale
            if config.attn_softcap is not None:
                logits = config.attn_softcap * torch.tanh(logits / config.attn_softcap)
            if bias is not None:
                logits[..., : len(old_k)] += torch.tensor(bias[layer][head], dtype=q.dtype)
            logits = logits.masked_fill(~seen, -torch.inf)
            outs.append(torch.exp(logits - logits.logsumexp(-1, keepdim=True)) @ values)  # rounds as `ops.decode` does
        return torch.cat(outs)[None]

    hidden = kvzip.models.forward(model, torch.tensor([list(token_ids)]), places, attend)[0]
    return Pass(hidden, new.q, new.k, new.v)


def greedy(model: kvzip.Model, held: Held, token_ids: Sequence[int], start: int, count: int) -> list[int]:
    """Returns the `count` tokens that follow, each the most likely one after a forward pass over all before it."""
    ids = list(token_ids)
    for _ in range(count):
        ids.append(int(kvzip.models.logits(model, run(model, held, ids, start).hidden[-1]).argmax()))
    return ids[-count:]
