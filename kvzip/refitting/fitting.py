"""The passes of a fit: the repeats of a dense cache, the systems that they give, and the rows that are solved for."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor

from .. import ops
from ..attention import repeat_attend
from ..cache import DenseCache, DenseKV, RaggedKV, WindowKV, check_pairs
from ..models import Attend, Model
from ..ops.types import Quantized, owners
from ..options import Refitting
from ..parallel import Share, whole_scores
from ..prefilling import Progress
from ..scoring import repeats, run_repeats
from .planning import plan
from .solving import Fit, solve
from .systems import Seen, Systems, build, concatenated, masses

HELD = 1 << 29  # bytes of systems that wait to be solved together
_SOLVED = 1 << 27  # bytes of systems of one width, which are then solved
_SEEN = 3 << 25  # bytes of the queries of layers whose systems are made together


@dataclass(frozen=True)
class Mass:
    """The part of the attention of the repeat on the context's chunks that falls on kept pairs, of each layer and head.

    `before` counts each kept pair once, `after` with its bias; both are about 1 if nothing is missing.
    """

    before: Float32[Tensor, "L H"]
    after: Float32[Tensor, "L H"]


@dataclass(frozen=True)
class Rows:
    """The values and biases of a layer's rows, in place of those that it has."""

    values: Float[Tensor, "N D"]
    bias: Float[Tensor, " N"]


def fit_rows(
    model: Model,
    cache: DenseCache,
    layers: Sequence[RaggedKV | WindowKV],
    options: Refitting,
    *,
    before: Int64[Tensor, " S"] | None = None,
    end: int = 0,
    dtype: torch.dtype = torch.float16,
    rounded: Callable[[Systems, Fit], Fit] | None = None,
    progress: Progress | None = None,
) -> tuple[list[Rows | None], Mass]:
    """Returns fitted rows of each layer of `layers` without a window, which are kept of the dense cache, and the mass.

    Args:
        layers: what is kept, prefix included; its keys are used as they are, its values are not read.
        before, end: as in `scoring.score_chunks`, for a segment of a longer context.
        dtype: of the biases.
        rounded: what is to be stored in place of a fit.

    Raises: ValueError for a cache whose pairs are gone.
    """
    check_pairs(cache)
    ragged = [layer for layer in layers if isinstance(layer, RaggedKV)]
    values = values_of(ragged, [own for own in cache.layers if isinstance(own, DenseKV)])
    bias = torch.zeros(len(values), dtype=dtype, device=values.device)
    passes = list(repeats(model, cache, chunk=options.chunk, hint=options.hint, before=before))
    firsts = [first for first, _, _ in passes]
    one = max(len(ids) for _, _, ids in passes) * model.config.num_heads * model.config.head_dim * values.element_size()
    planned = plan(ragged, [*firsts, cache.length], max(1, _SEEN // one))
    total = torch.zeros(planned.whole.shape, dtype=torch.float32, device=values.device)
    parts = total.new_zeros(2, total.numel())  # the mass of kept rows before and after
    place = {n: i for i, n in enumerate(cache.scored_layers)}
    waiting: dict[int, list[Systems]] = {}  # by width
    sizes: dict[int, int] = {}
    seen: list[Seen] = []

    def look(chunk: int, layer: int, *shown: Tensor) -> None:
        n = place[layer]
        rows = planned.rows[n][planned.cuts[n][chunk] : planned.cuts[n][chunk + 1]]
        keys = taken(ragged[n].k, rows, planned.offsets[n, chunk], model.dtype)
        q, out, lse, chunk_out, chunk_lse = (x[:, :: options.every] for x in shown)
        seen.append(Seen(q, out, lse, chunk_out, chunk_lse, keys))
        block = planned.blocks[chunk][n // planned.depth]
        if len(seen) < len(block.layers):
            return
        mass = masses(seen, cache.heads)
        total[chunk, block.layers.start : block.layers.stop] = mass.sum(1).unflatten(0, (-1, cache.heads))
        for systems in build(model.config, block, seen, mass, values):
            waiting.setdefault(systems.width, []).append(systems)
            sizes[systems.width] = sizes.get(systems.width, 0) + systems.nbytes
            if sizes[systems.width] > _SOLVED:
                finish(systems.width)
            elif sum(sizes.values()) > HELD:
                finish(max(sizes, key=lambda width: sizes[width]))

    def finish(width: int) -> None:
        systems = concatenated(waiting.pop(width))
        del sizes[width]
        fit, rows = solve(systems, options, model.dtype), systems.rows
        fit = fit if rounded is None else rounded(systems, fit)
        column = torch.arange(systems.width, device=values.device)
        column = torch.minimum(column, systems.counts[:, None] - 1)  # padding writes the last row once more
        change = fit.change.gather(1, column[..., None].expand_as(fit.change))
        values[rows] = (values[rows] + change).to(values.dtype)  # the same bits where nothing changes
        bias[rows] = fit.bias.gather(1, column).to(dtype)
        parts[:, systems.slots] = torch.stack(fit.mass).float()

    def strategy(first: int, stop: int) -> Attend:
        shown = partial(look, firsts.index(first))
        how = {"start": cache.start, "first": first, "stop": stop, "gap": end > here}
        return repeat_attend(model.config, cache.layers, shown, **how)

    here = cache.length + (0 if before is None else len(before))
    told = None if progress is None else lambda stop: progress(stop - cache.start, cache.length - cache.start)
    run_repeats(model, passes, max(here, end), strategy, progress=told, needed=f"beside {HELD:,} bytes of its products")
    for width in sorted(waiting):
        finish(width)
    kept, weighted = (torch.where(planned.whole, total, part.view(total.shape)) for part in parts)
    counts = [len(layer.positions) for layer in ragged]
    fitted = iter(map(Rows, values.split(counts), bias.split(counts)))
    return [next(fitted) if isinstance(layer, RaggedKV) else None for layer in layers], mass_of(
        kept, weighted, total, cache.share
    )


def values_of(layers: Sequence[RaggedKV], dense: Sequence[DenseKV]) -> Float[Tensor, "N D"]:
    """Returns the dense values of the rows of all layers."""
    counts, v = [len(layer.positions) for layer in layers], dense[0].v
    values = torch.empty(sum(counts), v.shape[3], dtype=v.dtype, device=v.device)
    for part, layer, own in zip(values.split(counts), layers, dense, strict=True):
        part.copy_(own.v[0][owners(layer.offsets, len(part)), layer.positions.long()])
    return values


def taken(
    k: Tensor | Quantized, rows: Int32[Tensor, " n"], offsets: Int32[Tensor, " H1"], dtype: torch.dtype
) -> Float[Tensor, "n D"]:
    """Returns some keys of a layer, head h has those from offsets[h] on; quantized ones are dequantized to `dtype`."""
    if isinstance(k, Tensor):
        return k.index_select(0, rows)
    return ops.dequantize(ops.take_rows(k, rows.long()), dtype=dtype, offsets=offsets)


def mass_of(
    before: Float32[Tensor, "c L h"],
    after: Float32[Tensor, "c L h"],
    total: Float32[Tensor, "c L h"],
    share: Share | None,
) -> Mass:
    """Returns the mass of all heads, of that of kept rows and of all pairs of each chunk; 1 where nothing was attended
    to."""
    kept, fitted, whole = whole_scores(share, torch.stack([x.sum(0) for x in (before, after, total)], -1)).unbind(-1)
    return Mass(*(torch.where(whole > 0, part / whole, 1.0).cpu() for part in (kept, fitted)))


def note_of(mass: Mass) -> dict[str, list[list[float]]]:
    """Returns the mass as the note of a file holds it, under "mass_kept"."""
    return {name: [[round(x, 4) for x in row] for row in part.tolist()] for name, part in vars(mass).items()}


def mass_of_note(note: Mapping[str, Any]) -> Mass | None:
    """Returns the mass that a note holds; None if there is none. It is checked here, as anyone may write a note."""
    held: Any = note.get("mass_kept")
    try:
        before, after = (torch.tensor(held[name], dtype=torch.float32) for name in ("before", "after"))
    except (TypeError, ValueError, KeyError, IndexError, RuntimeError, OverflowError):
        return None
    whole = before.ndim == 2 and before.shape == after.shape and before.numel() > 0
    return Mass(before, after) if whole and bool(before.isfinite().all() and after.isfinite().all()) else None
