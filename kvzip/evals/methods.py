"""Methods with one interface: each scores every pair of a dense cache and sees no question."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Float32
from torch import Tensor

from ..cache import DenseCache, DenseKV, RaggedCache, Scores, global_layers
from ..compression import compress
from ..models import Model
from ..models.rope import cos_sin
from ..scoring import score
from .catalog import CATALOG
from .observed import accumulated_attention, query_statistics, rotate, shape_of
from .orders import adaptive, pyramidal, recent_and_heavy

SNAPKV_WINDOW = 32
"""The last tokens of a context, whose queries vote and which are kept."""


@dataclass(frozen=True)
class Method:
    """A way to score pairs. `level` is where its budget is shared (see `compress`), `cite` where it comes from.

    A method that does more than score, such as quantizing, makes the cache of a ratio by `pack(model, scored, ratio)`;
    others by `compress(scored, ratio, level=level)`.
    """

    name: str
    score: Callable[[Model, DenseCache], DenseCache]
    level: str
    cite: str
    pack: Callable[[Model, DenseCache, float], RaggedCache] | None = None

    def compressed(self, model: Model, scored: DenseCache, ratio: float, *, floor: float = 0.0) -> RaggedCache:
        """Returns the cache of a ratio; with a floor (see `compress`) if the method does no more than score."""
        if self.pack is not None:
            return self.pack(model, scored, ratio)
        return compress(scored, ratio, level=self.level, floor=floor if self.level != "head" else 0.0)


def heads(model: Model, cache: DenseCache) -> DenseCache:
    """Returns the highest KVzip score of each head, given to all its pairs; level "head" keeps or drops whole heads.

    Source: KVzip, arXiv 2505.23416, section 4.2, which takes the maximum over another document once for all; here it
    is over the context at hand.
    """
    scores = score(model, cache, scope="context").scores
    assert scores is not None
    values = scores.values.amax(-1, keepdim=True).expand_as(scores.values).contiguous()
    return replace(cache, scores=replace(scores, values=values, source="kvzip-heads"))


def snapkv(model: Model, cache: DenseCache) -> DenseCache:
    """Returns the mean attention from the last 32 context tokens to each earlier pair; those 32 are always first.

        score[l, h, e] = mean over query heads of head h of
                         max over the 7 tokens around e of (mean over the last 32 rows of the softmax weight)

    The last 32 are above all others, the latest highest.

    Source: SnapKV, arXiv 2404.14469: window 32, max pooling of 7 tokens (its LongBench settings), equal heads. There
    the last tokens are those of the question; here no question is known, so they are the end of the context. Query
    heads that share a KV head, which the paper does not treat, are averaged after pooling.
    """
    return _attach(model, cache, snapkv_values(model, cache), "snapkv")


def h2o(model: Model, cache: DenseCache) -> DenseCache:
    """Returns scores by which any budget keeps half recent tokens and half heavy hitters.

    A heavy hitter is a pair that receives much attention, summed over all queries and over the query heads of its head.
    A budget of n pairs a head holds its n/2 most recent tokens and the n/2 heaviest of the others.

    Source: H2O, arXiv 2306.14048, algorithm 1 with its equal halves. It evicts at each step, so that later queries see
    the remaining pairs only; here, as when its authors compress a prompt, the whole context is read first. Weights
    are summed in blocks of [Hq 64 S].
    """
    return _attach(model, cache, recent_and_heavy(received_attention(model, cache)), "h2o")


def received_attention(model: Model, cache: DenseCache) -> Float32[Tensor, "L H E"]:
    """Returns the weights that each pair receives in the context, summed over all queries and its query heads."""
    sums = accumulated_attention(model, cache, first=0)[..., cache.start :]
    return reduce(sums, "l (h g) e -> l h e", "sum", h=model.config.num_kv_heads)


def pyramidkv(model: Model, cache: DenseCache) -> DenseCache:
    """Returns SnapKV's order in each head, shifted by layer: level "pair" keeps many pairs in low layers, few in high.

    Each head keeps the last 32 tokens; what each layer keeps of the others is in `orders.pyramidal`.

    Source: PyramidKV, arXiv 2406.02069, section 4, with beta = 20 as in its authors' code. The observation window is
    SnapKV's 32 so that the two differ in nothing else; the paper has 8. L counts global layers. Above half of the pairs
    their code gives all layers the same; here the pyramid goes on.
    """
    return _attach(model, cache, pyramidal(snapkv_values(model, cache), window=SNAPKV_WINDOW), "pyramidkv")


def adakv(model: Model, cache: DenseCache) -> DenseCache:
    """Returns SnapKV's scores, reordered so that the heads of a layer keep AdaKV's budgets: `orders.adaptive`.

    Source: AdaKV, arXiv 2407.11550, on SnapKV's scores (Ada-SnapKV), with its safeguard alpha = 0.2.
    """
    return _attach(model, cache, adaptive(snapkv_values(model, cache)), "adakv")


def streaming_llm(model: Model, cache: DenseCache) -> DenseCache:
    """Returns scores that keep the first 4 tokens of the sequence and the latest.

    The system prefix is kept anyway; only what it lacks of 4 tokens is taken from the context.

    Source: StreamingLLM, arXiv 2309.17453, which also moves the kept tokens together; here positions stay.
    """
    layers, heads, evictable = shape_of(model, cache)
    values = torch.arange(evictable, dtype=torch.float32, device=model.device)
    return _attach(model, cache, _keep_sink(values, cache).expand(layers, heads, -1).contiguous(), "streaming-llm")


def key_norm(model: Model, cache: DenseCache) -> DenseCache:
    """Returns minus the L2 norm of each key: small keys are kept.

    Source: "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", arXiv 2406.11430, which leaves the
    first two layers whole in some experiments; here all are compressed alike.
    """
    shape_of(model, cache)
    keys = [layer.k[0] for layer in cache.layers if isinstance(layer, DenseKV)]
    norms = [torch.linalg.vector_norm(k[:, cache.start :], dim=-1, dtype=torch.float32) for k in keys]
    return _attach(model, cache, -torch.stack(norms), "key-norm")


def expected_attention(model: Model, cache: DenseCache, *, future: int = 512, epsilon: float = 0.01) -> DenseCache:
    """Returns the attention expected of queries like the context's at the next `future` positions, by AdaKV's budgets.

        score[l, h, e] = |v_e| * (epsilon + mean over query heads of head h of softmax over e of
                                            (scale * m . k_e + scale^2 / 2 * k_e' C k_e))

    m and C are the mean and covariance of the queries before rotation, rotated by the average rotation of the next
    positions: exp(scale * m.k + ...) is the mean of exp(scale * q.k) for a normal q. The first 4 tokens of the sequence
    are left out of all three and always kept. Each head of a layer keeps AdaKV's budget: `orders.adaptive`.

    Source: Expected Attention, arXiv 2510.00636, with the settings of its authors' evaluation in kvpress (512 next
    positions, epsilon 0.01, AdaKV). The paper weighs with |W_o v|, its code, as here, with |v|. The queries are
    measured, not projected from hidden states, so that models with a query norm work too. A softcap is not part of the
    expectation.
    """
    return _attach(model, cache, adaptive(expected_values(model, cache, future, epsilon)), "expected-attention")


def expected_values(model: Model, cache: DenseCache, future: int, epsilon: float) -> Float32[Tensor, "L H E"]:
    """Returns Expected Attention's scores, those of the first 4 tokens of the sequence above all others."""
    config, width = model.config, model.config.head_dim
    layers, heads, evictable = shape_of(model, cache)
    sink = min(4, cache.length - 1)
    mean, covariance = query_statistics(model, cache, first=sink)
    values = torch.empty(layers, heads, evictable, dtype=torch.float32, device=model.device)
    ahead = torch.arange(cache.length, cache.length + future, device=model.device)
    for n, layer in enumerate(global_layers(cache)):
        kv = cache.layers[layer]
        rope = config.layers[layer].rope
        tables = cos_sin(rope, ahead, model.frequencies[rope], torch.float64)
        turn = rotate(torch.eye(width, dtype=torch.float64, device=model.device), *(x.mean(0) for x in tables))
        m = rearrange((mean[n] @ turn).float(), "(h g) d -> h g d", h=heads)
        c = rearrange((turn.T @ covariance[n] @ turn).float(), "(h g) i j -> h g i j", h=heads)
        k = kv.k[0, :, sink:].float()
        logits = m @ k.mT * config.attn_scale  # [H G S]
        for g in range(c.shape[1]):
            logits[:, g] += ((k @ c[:, g]) * k).sum(-1) * (config.attn_scale**2 / 2)
        norms = torch.linalg.vector_norm(kv.v[0, :, sink:], dim=-1, dtype=torch.float32)
        scores = (logits.softmax(-1).mean(1) + epsilon) * norms
        values[n] = F.pad(scores, (sink, 0))[:, cache.start :]
    return _keep_sink(values, cache)


def random_scores(model: Model, cache: DenseCache) -> DenseCache:
    """Returns scores drawn from the context's tokens as the seed: the floor that any method must beat."""
    seed = int(cache.token_ids.sum()) + len(cache.token_ids)
    values = torch.rand(shape_of(model, cache), generator=torch.Generator().manual_seed(seed))
    return _attach(model, cache, values.to(model.device), "random")


SCORERS: dict[str, Callable[[Model, DenseCache], DenseCache]] = {
    "kvzip": lambda model, cache: score(model, cache, scope="context"),
    "kvzip-chunk": lambda model, cache: score(model, cache, scope="chunk"),
    "kvzip+": lambda model, cache: score(model, cache, scope="context", method="kvzip+"),
    "kvzip-heads": heads,
    "snapkv": snapkv,
    "h2o": h2o,
    "pyramidkv": pyramidkv,
    "adakv": adakv,
    "streaming-llm": streaming_llm,
    "key-norm": key_norm,
    "expected-attention": expected_attention,
    "random": random_scores,
}

METHODS = {name: Method(name, SCORERS[name], level, cite) for name, (level, cite) in CATALOG.items()}


def snapkv_values(
    model: Model, cache: DenseCache, *, window: int = SNAPKV_WINDOW, kernel: int = 7
) -> Float32[Tensor, "L H E"]:
    """Returns SnapKV's scores: pooled mean weights in [0, 1], and above 1 for the last `window` context tokens."""
    _, heads, evictable = shape_of(model, cache)
    window = min(window, evictable)
    first = cache.length - window
    means = accumulated_attention(model, cache, first=first)[..., :first] / window
    values = means.new_empty(means.shape[0], heads, evictable)
    if first > cache.start:
        pooled = F.max_pool1d(means, kernel, stride=1, padding=kernel // 2)
        grouped = reduce(pooled, "l (h g) s -> l h s", "mean", h=heads)
        values[..., : evictable - window] = grouped[..., cache.start :]
    values[..., evictable - window :] = 1 + torch.arange(1, window + 1, device=values.device) / window
    return values


def _keep_sink(values: Float32[Tensor, "*b E"], cache: DenseCache) -> Float32[Tensor, "*b E"]:
    """The values, the highest of all for those of the first 4 tokens of the sequence that are not in the prefix."""
    first = torch.arange(values.shape[-1], device=values.device) < 4 - cache.start
    return torch.where(first, values.amax() + 1, values)


def _attach(model: Model, cache: DenseCache, values: Float32[Tensor, "L H E"], source: str) -> DenseCache:
    assert values.shape == shape_of(model, cache)
    return replace(cache, scores=Scores(values, global_layers(cache), cache.start, cache.length, source))
