"""The passes of a fit: the repeats of a dense cache, the systems that they give, and the rows that are solved for."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from ..attention import repeat_attend
from ..cache import DenseCache, DenseKV, RaggedKV, WindowKV
from ..models import Attend, Model
from ..ops.types import owners
from ..options import Refitting
from ..prefilling import Progress
from ..scoring import repeats, run_repeats
from .solving import Fit, solve
from .systems import Systems, bounds_of, build, plan

HELD = 3 << 27  # bytes of systems that wait to be solved together
_SOLVED = 1 << 27  # bytes of matrices that are solved at a time

Take = Callable[[Systems, Fit], None]


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
    progress: Progress | None = None,
) -> tuple[list[Rows | None], Mass]:
    """Returns fitted rows of each layer of `layers` without a window, which are kept of the dense cache, and the mass.

    Args:
        layers: what is kept, prefix included; its keys are used as they are, its values are not read.
        before, end: as in `scoring.score_chunks`, for a segment of a longer context.
        dtype: of the biases.
    """
    found: list[Rows | None] = []
    for layer, own in zip(layers, cache.layers, strict=True):
        if isinstance(layer, WindowKV):
            found.append(None)
            continue
        assert isinstance(layer, RaggedKV) and isinstance(own, DenseKV)
        values = own.v[0][owners(layer.offsets, len(layer.positions)), layer.positions.long()]
        found.append(Rows(values, torch.zeros(len(values), dtype=dtype, device=values.device)))
    place = {n: i for i, n in enumerate(cache.scored_layers)}
    sums = torch.zeros(3, len(place), cache.heads, dtype=torch.float32, device=model.device)

    def take(systems: Systems, fit: Fit) -> None:
        rows = found[systems.layer]
        assert rows is not None
        column = torch.arange(systems.rows.shape[1], device=systems.rows.device)
        column = torch.minimum(column, systems.counts[:, None] - 1)  # padding writes the last row once more
        values = fit.values.gather(1, column[..., None].expand_as(fit.values))
        rows.values[systems.rows] = values.to(rows.values.dtype)
        rows.bias[systems.rows] = fit.bias.gather(1, column).to(dtype)
        for total, part in zip(sums, fit.mass, strict=False):
            total[place[systems.layer], systems.heads] += part.float()

    ragged = [layer for layer in layers if isinstance(layer, RaggedKV)]
    passes = list(repeats(model, cache, chunk=options.chunk, hint=options.hint, before=before))
    cuts = [first for first, _, _ in passes] + [cache.length]
    exact = [isinstance(layer.k, Tensor) for layer in ragged]
    sizes = [stop - first for first, stop in pairwise(cuts)]
    bounds = bounds_of(ragged, cache.length, cuts)
    planned = plan(bounds, [sizes if own else [-1] * len(sizes) for own in exact])
    here = cache.length + (0 if before is None else len(before))
    held: list[Systems] = []

    def look(chunk: int, layer: int, q: Tensor, out: Tensor, lse: Tensor, chunk_out: Tensor, chunk_lse: Tensor) -> None:
        kept, own = layers[layer], cache.layers[layer]
        assert isinstance(kept, RaggedKV) and isinstance(own, DenseKV)
        n = place[layer]
        mass = (chunk_lse - lse).float().exp().unflatten(0, (cache.heads, -1)).sum((1, 2))
        sums[2, n] += mass
        if exact[n]:
            sums[:2, n] += mass * (bounds[n, :, chunk + 1] - bounds[n, :, chunk] == sizes[chunk])
        for group in planned[n][chunk]:
            held.append(build(model.config, layer, kept, own, group, (q, out, lse, chunk_out, chunk_lse)))
        if sum(systems.gram.nbytes for systems in held) > HELD:
            finish()

    def finish() -> None:
        for batch in batches(held):
            solved(batch, options, model.dtype, take)
        held.clear()

    def strategy(first: int, stop: int) -> Attend:
        shown = partial(look, cuts.index(first))
        how = {"start": cache.start, "first": first, "stop": stop, "gap": end > here}
        return repeat_attend(model.config, cache.layers, shown, **how)

    told = None if progress is None else lambda stop: progress(stop - cache.start, cache.length - cache.start)
    run_repeats(model, passes, max(here, end), strategy, progress=told, needed=f"beside {HELD:,} bytes of its products")
    finish()
    return found, mass_of(sums)


def batches(held: list[Systems]) -> Iterator[list[Systems]]:
    """Yields systems of one width, as many together as may be solved at a time."""
    batch: list[Systems] = []
    for systems in sorted(held, key=lambda each: each.rows.shape[1]):
        same = batch and batch[0].rows.shape[1] == systems.rows.shape[1]
        if batch and not (same and sum(x.gram.nbytes for x in (*batch, systems)) <= _SOLVED):
            yield batch
            batch = []
        batch.append(systems)
    if batch:
        yield batch


def solved(batch: list[Systems], options: Refitting, dtype: torch.dtype, take: Take) -> None:
    """Solves the systems of a batch together, and gives each its part."""
    names = [f.name for f in fields(Systems) if f.name != "layer"]
    whole = batch[0]
    if len(batch) > 1:
        whole = Systems(layer=-1, **{name: torch.cat([getattr(x, name) for x in batch]) for name in names})
    fit, sizes = solve(whole, options, dtype), [len(systems.heads) for systems in batch]
    parts = zip(*(x.split(sizes) for x in (fit.bias, fit.values, *fit.mass)), strict=True)
    for systems, (bias, values, before, after) in zip(batch, parts, strict=True):
        take(systems, Fit(bias, values, (before, after)))


def mass_of(sums: Float32[Tensor, "3 L H"]) -> Mass:
    """Returns the mass of sums before, after, and over all keys of the chunks; 1 where nothing was attended to."""
    before, after = (torch.where(sums[2] > 0, part / sums[2], 1.0).cpu() for part in sums[:2])
    return Mass(before, after)


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
