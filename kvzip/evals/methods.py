"""Methods under one interface: each gives every pair of a dense cache a score, without having seen a question."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..cache import DenseCache, DenseKV, Scores, global_layers
from ..models import Model
from ..scoring import score


@dataclass(frozen=True)
class Method:
    """A way to score pairs. `level` is where its budget is shared (see `compress`), `cite` where it comes from."""

    name: str
    score: Callable[[Model, DenseCache], DenseCache]
    level: str
    cite: str


def random_scores(model: Model, cache: DenseCache) -> DenseCache:
    """Returns the cache with scores drawn from the context's tokens: the floor that any method must beat."""
    heads = next(layer.k.shape[1] for layer in cache.layers if isinstance(layer, DenseKV))
    layers = global_layers(cache)
    seed = int(cache.token_ids.sum()) + len(cache.token_ids)
    shape = (len(layers), heads, cache.length - cache.start)
    values = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(model.device)
    return replace(cache, scores=Scores(values, layers, cache.start, cache.length, "random"))


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("kvzip", lambda model, cache: score(model, cache), "pair", "KVzip, arXiv 2505.23416"),
        Method("kvzip-chunk", lambda model, cache: score(model, cache, scope="chunk"), "pair", "KVzip, scope chunk"),
        Method("random", random_scores, "pair", "none"),
    )
}
