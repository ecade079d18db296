"""The least squares problems of a fit: what the queries of a chunk's repeat ask of the rows that its heads keep."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor

from ..cache import DenseKV, RaggedKV
from ..cache.rows import keys_at
from ..models import ModelConfig
from ..ops.types import owners

_WEIGHTS_AT_ONCE = 1 << 25  # softmax weights that are held at a time, 192 MiB of them in bfloat16 and float32
_FULL = 0.6  # a head joins others that are padded to a width if it fills at least this much of it


Seen = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""q, out, lse, chunk_out, chunk_lse of one layer, see `attention.Look`."""


@dataclass(frozen=True)
class Systems:
    """The problems of B heads of one chunk, each padded to t rows. Everything is a sum over the same query rows i.

    With p[i, j] the softmax weight of row i on kept key j, m[i] its mass on all keys of the chunk, y[i] its output from
    all of them less m[i] * mean, and mean the mean of its whole output o[i]:

        gram = p'p    load = p'm    cross = p'y    reach = p'1    old = v - mean
        spread = mean over i of |o[i] - mean|^2    energy = spread |m|^2 + |y|^2

    Past counts[b] rows a head has zeros. rows[b, j] is the row of the layer that column j is about; past the end it is
    the head's last row again.
    """

    layer: int
    heads: Int64[Tensor, " B"]
    rows: Int64[Tensor, "B t"]
    counts: Int64[Tensor, " B"]
    gram: Float[Tensor, "B t t"]
    load: Float[Tensor, "B t"]
    cross: Float[Tensor, "B t D"]
    reach: Float[Tensor, "B t"]
    old: Float[Tensor, "B t D"]
    mean: Float[Tensor, "B D"]
    spread: Float[Tensor, " B"]
    energy: Float[Tensor, " B"]


def bounds_of(layers: Sequence[RaggedKV], length: int, cuts: Sequence[int]) -> Int64[Tensor, "L H c"]:
    """Returns the first row of each head at or after each of some tokens, ascending."""
    found = []
    for layer in layers:
        heads = torch.arange(layer.heads, device=layer.offsets.device)
        places = owners(layer.offsets, len(layer.positions)) * (length + 1) + layer.positions
        wanted = heads[:, None] * (length + 1) + torch.tensor(cuts, device=heads.device)
        found.append(torch.searchsorted(places, wanted))
    return torch.stack(found)


@dataclass(frozen=True)
class Group:
    """Heads of one layer and chunk that are padded to `width` rows, and the first row and number of rows of each."""

    heads: Int64[Tensor, " B"]
    first: Int64[Tensor, " B"]
    counts: Int64[Tensor, " B"]
    width: int


def plan(bounds: Int64[Tensor, "L H c"], whole: Sequence[Sequence[int]]) -> list[list[list[Group]]]:
    """Returns the groups of each chunk of each layer. It waits for the device, so that nothing after it does.

    Args:
        bounds: see `bounds_of`.
        whole: tokens of each chunk by layer; a head that keeps as many has nothing to fit.
    """
    counts = bounds.diff(dim=2).movedim(2, 1).tolist()  # [L chunks H]
    found = [
        [groups_of([0 if n == most else n for n in heads]) for heads, most in zip(chunks, tokens, strict=True)]
        for chunks, tokens in zip(counts, whole, strict=True)
    ]
    sizes = [len(heads) for layer in found for chunk in layer for heads, _ in chunk]
    heads = [head for layer in found for chunk in layer for group, _ in chunk for head in group]
    order = iter(torch.tensor(heads, device=bounds.device).split(sizes))
    planned: list[list[list[Group]]] = []
    for n, layer in enumerate(found):
        planned.append([])
        for c, chunk in enumerate(layer):
            planned[n].append([])
            for _, width in chunk:
                own = next(order)
                first, stop = bounds[n, own, c], bounds[n, own, c + 1]
                planned[n][c].append(Group(own, first, stop - first, width))
    return planned


def groups_of(counts: list[int]) -> list[tuple[list[int], int]]:
    """Returns heads of similar lengths together, the longest first, and the width that each group is padded to.

    Widths are eight steps an octave, so that groups of several layers have the same. Heads without rows are left out.
    """
    groups: list[tuple[list[int], int]] = []
    for head in sorted((h for h, count in enumerate(counts) if count), key=lambda h: (-counts[h], h)):
        if not groups or counts[head] < _FULL * groups[-1][1]:
            step = 8 << max(0, counts[head].bit_length() - 7)  # at least 8 rows
            groups.append(([], -(-counts[head] // step) * step))
        groups[-1][0].append(head)
    return groups


def build(
    config: ModelConfig,
    number: int,
    layer: RaggedKV,
    dense: DenseKV,
    group: Group,
    seen: Seen,
) -> Systems:
    """Returns the systems of a group of heads of one layer and chunk.

    Args:
        layer: the kept rows, whose keys are asked; `dense` has the values of all.
    """
    q, out, lse, chunk_out, chunk_lse = seen
    heads, first, counts, width = group.heads, group.first, group.counts, group.width
    device, wide = q.device, torch.promote_types(q.dtype, torch.float32)
    column = torch.arange(width, device=device)
    rows = first[:, None] + torch.minimum(column, counts[:, None] - 1)
    used = column < counts[:, None]
    keys = keys_at(layer, rows, heads, q.dtype)
    values = dense.v[0][heads[:, None], layer.positions[rows].long()].to(wide)

    def of(x: Tensor) -> Tensor:
        return rearrange(x, "(h g) t ... -> h (g t) ...", h=layer.heads)[heads]

    queries, norm, mass = of(q), of(lse).to(wide), of((chunk_lse - lse).exp()).to(wide)
    whole = of(out).to(wide)
    mean = whole.mean(1)
    spread = (whole - mean[:, None]).square().sum(-1).mean(1)
    y = (of(chunk_out).to(wide) - mean[:, None]) * mass[..., None]
    energy = spread * mass.square().sum(1) + y.square().sum((1, 2))
    high = mass.to(q.dtype).to(wide)  # in two parts, as the products are in the model's dtype
    targets = torch.cat([y, high[..., None], (mass - high)[..., None], torch.ones_like(mass)[..., None]], -1)
    targets = targets.to(_narrow(q))
    gram = torch.zeros(len(heads), width, width, dtype=wide, device=device)
    sums = torch.zeros(len(heads), width, targets.shape[2], dtype=wide, device=device)
    size = max(1, _WEIGHTS_AT_ONCE // (len(heads) * width))
    for begin in range(0, queries.shape[1], size):
        part = slice(begin, begin + size)
        p = weights(queries[:, part], keys, norm[:, part], config).to(targets.dtype)
        gram += product(p.mT, p)
        sums += product(p.mT, targets[:, part])
    gram *= used[:, :, None] & used[:, None]
    sums *= used[..., None]
    cross, load, low, reach = sums.split([y.shape[2], 1, 1, 1], dim=2)
    return Systems(
        layer=number,
        heads=heads,
        rows=rows,
        counts=counts,
        gram=gram,
        load=(load + low)[..., 0],
        cross=cross,
        reach=reach[..., 0],
        old=(values - mean[:, None]) * used[..., None],
        mean=mean,
        spread=spread,
        energy=energy,
    )


def weights(
    q: Float[Tensor, "B n D"], k: Float[Tensor, "B t D"], lse: Float[Tensor, "B n"], config: ModelConfig
) -> Float[Tensor, "B n t"]:
    """Returns exp(logit - lse) in float32 or wider: softmax weights, if lse is over all that the queries attend to."""
    logits = product(q, k.mT)
    if config.attn_softcap is not None:
        cap = config.attn_softcap
        return logits.mul_(config.attn_scale / cap).tanh_().mul_(cap).sub_(lse[..., None]).exp_()
    return torch.add(-lse[..., None], logits, alpha=config.attn_scale, out=logits).exp_()


def product(a: Float[Tensor, "B n m"], b: Float[Tensor, "B m k"]) -> Float[Tensor, "B n k"]:
    """Returns a @ b in float32 or wider. On a GPU 16-bit inputs are multiplied as they are, and summed in float32."""
    if a.is_cuda and a.element_size() == 2 and hasattr(torch.ops.aten.bmm, "dtype"):
        return torch.ops.aten.bmm.dtype(a, b, torch.float32)
    wide = torch.promote_types(a.dtype, torch.float32)
    return torch.bmm(a.to(wide), b.to(wide))


def _narrow(q: Tensor) -> torch.dtype:
    """The dtype of the factors of the large products: a CPU has no product of 16-bit numbers that sums in float32."""
    return q.dtype if q.is_cuda else torch.promote_types(q.dtype, torch.float32)
