"""The least squares problems of a fit: what the queries of a chunk's repeat ask of the rows that its heads keep."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor

from ..models import ModelConfig
from .planning import Block

_WEIGHTS_AT_ONCE = 1 << 25  # softmax weights that are held at a time, 192 MiB of them in bfloat16 and float32
_MORE = 8  # columns of targets beside those of y, three of them used: tensor cores want multiples of 8


@dataclass(frozen=True)
class Seen:
    """What the queries of one layer saw in a chunk's repeat, see `attention.Look`, and the kept keys of the chunk.

    `keys` has those of all heads, one head after the other.
    """

    q: Float[Tensor, "Hq T D"]
    out: Float[Tensor, "Hq T D"]
    lse: Float[Tensor, "Hq T"]
    chunk_out: Float[Tensor, "Hq T D"]
    chunk_lse: Float[Tensor, "Hq T"]
    keys: Float[Tensor, "N D"]


@dataclass(frozen=True)
class Systems:
    """The problems of B heads, each padded to t rows. Everything of a head is a sum over the same query rows i.

    With p[i, j] the softmax weight of row i on kept key j, m[i] its mass on all keys of the chunk, y[i] its output from
    all of them less m[i] * mean, and mean the mean of its whole output o[i]:

        gram = p'p    load = p'm    cross = p'y    reach = p'1    old = v - mean
        spread = mean over i of |o[i] - mean|^2    energy = spread |m|^2 + |y|^2

    Past counts[b] rows a head has zeros. rows[b, j] is what column j is about, a row among those of all layers; past
    the end it is the head's last row again. `slots` are those of `Block`.
    """

    slots: Int64[Tensor, " B"]
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

    @property
    def width(self) -> int:
        return self.rows.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in vars(self).values())


def concatenated(parts: Sequence[Systems]) -> Systems:
    """Returns systems of one width as one."""
    if len(parts) == 1:
        return parts[0]
    return Systems(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Systems)})


def masses(seen: Sequence[Seen], heads: int) -> Float[Tensor, "LH n"]:
    """Returns the part of each query's attention that falls on the chunk, in float32 or wider, by layer and head."""
    part = _joined([x.chunk_lse for x in seen], heads) - _joined([x.lse for x in seen], heads)
    return part.to(_wide(part)).exp_()


def build(
    config: ModelConfig, block: Block, seen: list[Seen], mass: Float[Tensor, "LH n"], values: Float[Tensor, "N D"]
) -> Iterator[Systems]:
    """Yields the systems of each group of a block. It empties `seen`, so that what is no longer needed is freed.

    Args:
        seen: of the block's layers; `mass` see `masses`.
        values: the old values of the rows of all layers.
    """
    if not block.groups:
        seen.clear()
        return
    heads, wide = config.num_kv_heads, mass.dtype
    keys, lses = torch.cat([x.keys for x in seen]), [x.lse for x in seen]
    q, out, chunk_out = ([getattr(x, name) for x in seen] for name in ("q", "out", "chunk_out"))
    seen.clear()
    queries, norm = _joined(q, heads)[block.heads], _joined(lses, heads)[block.heads].to(wide)
    q.clear()
    mass, whole = mass[block.heads], _joined(out, heads)[block.heads].to(wide)
    out.clear()
    mean = whole.mean(1)
    spread = whole.sub_(mean[:, None]).square_().sum((1, 2)) / whole.shape[1]
    del whole
    y = _joined(chunk_out, heads)[block.heads].to(wide).sub_(mean[:, None]).mul_(mass[..., None])
    chunk_out.clear()
    energy = spread * mass.square().sum(1) + torch.linalg.vector_norm(y, dim=(1, 2)).square()
    high = mass.to(queries.dtype).to(wide)  # in two parts, as the products are in the model's dtype
    width = y.shape[2]
    targets = torch.zeros(*mass.shape, width + _MORE, dtype=_narrow(queries), device=y.device)
    targets[..., :width] = y
    for n, x in enumerate((high, mass - high, 1), start=width):
        targets[..., n] = x
    del y

    column = torch.arange(block.groups[0][1], device=keys.device)
    own = torch.minimum(column, block.counts[:, None] - 1)
    used, local, rows = column < block.counts[:, None], own + block.local[:, None], own + block.first[:, None]
    at = 0
    for count, most in block.groups:
        mine, at = slice(at, at + count), at + count
        inside, place = used[mine, :most], rows[mine, :most]
        asked = keys[local[mine, :most]]
        gram, sums = products(queries[mine], asked, norm[mine], targets[mine], config)
        gram *= inside[:, :, None] & inside[:, None]
        sums *= inside[..., None]
        high_load, low_load, reach = sums[..., width : width + 3].unbind(-1)
        yield Systems(
            slots=block.slots[mine],
            rows=place,
            counts=block.counts[mine],
            gram=gram,
            load=high_load + low_load,
            cross=sums[..., :width],
            reach=reach,
            old=(values[place].to(wide) - mean[mine, None]) * inside[..., None],
            mean=mean[mine],
            spread=spread[mine],
            energy=energy[mine],
        )


def products(
    q: Float[Tensor, "B n D"],
    k: Float[Tensor, "B t D"],
    lse: Float[Tensor, "B n"],
    targets: Float[Tensor, "B n c"],
    config: ModelConfig,
) -> tuple[Float[Tensor, "B t t"], Float[Tensor, "B t c"]]:
    """Returns p'p and p' targets in float32 or wider, p the `weights` of queries on keys, some queries at a time."""
    size, found = max(1, _WEIGHTS_AT_ONCE // (k.shape[0] * k.shape[1])), None
    for begin in range(0, q.shape[1], size):
        part = slice(begin, begin + size)
        p = weights(q[:, part], k, lse[:, part], config).to(targets.dtype)
        more = product(p.mT, p), product(p.mT, targets[:, part])
        found = more if found is None else tuple(x.add_(y) for x, y in zip(found, more, strict=True))
    assert found is not None
    gram, sums = found
    return gram, sums


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
    wide = _wide(a)
    return torch.bmm(a.to(wide), b.to(wide))


def _joined(parts: Sequence[Tensor], heads: int) -> Tensor:
    """The queries of the same KV head together, of each layer and head."""
    return rearrange(torch.stack(list(parts)), "l (h g) t ... -> (l h) (g t) ...", h=heads)


def _narrow(q: Tensor) -> torch.dtype:
    """The dtype of the factors of the large products: a CPU has no product of 16-bit numbers that sums in float32."""
    return q.dtype if q.is_cuda else _wide(q)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
