"""Methods under one interface: each gives every pair of a dense cache a score, without having seen a question.

A paper that shares its budget among heads or layers by a rule of its own is expressed by the order of its scores, so
that `compress` selects what the paper would at any ratio: wherever the kept sets of a rule are nested, the value of a
pair is minus the budget at which the rule takes it in.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from ..attention import causal_attention, window_attention
from ..cache import DenseCache, DenseKV, Scores, check_whole, global_layers
from ..models import Model, ModelConfig, run_attention
from ..models.rope import cos_sin
from ..scoring import check_fingerprint, score

_CHUNK = 2_048  # tokens of a forward pass
_ROWS = 64  # query rows whose weights are held in memory: [Hq 64 S]

See = Callable[[int, int, Tensor, Tensor, Tensor], None]
"""see(n, start, q [Hq T D], k [H S D], lse [Hq T]): the queries of tokens start:start+T in the n-th global layer,
all of its cached keys, and the log-sum-exp of each query's logits over the keys up to its own."""


@dataclass(frozen=True)
class Method:
    """A way to score pairs. `level` is where its budget is shared (see `compress`), `cite` where it comes from."""

    name: str
    score: Callable[[Model, DenseCache], DenseCache]
    level: str
    cite: str


def heads(model: Model, cache: DenseCache) -> DenseCache:
    """Returns the highest KVzip score of each head, given to all its pairs; level "head" keeps or drops whole heads.

    Source: KVzip, arXiv 2505.23416, section 4.2, which takes the maximum over another document once for all; here it
    is over the context at hand.
    """
    scores = score(model, cache).scores
    assert scores is not None
    values = scores.values.amax(-1, keepdim=True).expand_as(scores.values).contiguous()
    return replace(cache, scores=replace(scores, values=values, source="kvzip-heads"))


def snapkv(model: Model, cache: DenseCache) -> DenseCache:
    """Returns the mean attention that the last 32 context tokens pay to each pair before them; they come first.

        score[l, h, e] = mean over query heads of head h of
                         max over the 7 tokens around e of (mean over the last 32 rows of the softmax weight)

    The last 32 are above all others, the latest highest.

    Source: SnapKV, arXiv 2404.14469: window 32, max pooling of 7 tokens (its LongBench settings), equal heads. There
    the last tokens are those of the question; here no question is known, so they are the end of the context. Query
    heads that share a KV head, which the paper does not treat, are averaged after pooling.
    """
    return _attach(model, cache, snapkv_values(model, cache), "snapkv")


def h2o(model: Model, cache: DenseCache) -> DenseCache:
    """Returns an order that takes recent tokens and heavy hitters in turns: half of any budget each.

    A heavy hitter is a pair that receives much attention, summed over all queries and over the query heads of its head.
    A budget of n pairs a head holds the m most recent and the m heaviest, for the largest m at which both fit.

    Source: H2O, arXiv 2306.14048. It evicts at each step, so that later queries see the remaining pairs only; here, as
    when its authors compress a prompt, the whole context is read first. They fill up from the heavy hitters alone where
    a recent token is also heavy, we from both sides.
    """
    sums = accumulated_attention(model, cache, first=0)[..., cache.start :]
    values = reduce(sums, "l (h g) e -> l h e", "sum", h=model.config.num_kv_heads)
    return _attach(model, cache, recent_and_heavy(values), "h2o")


def recent_and_heavy(values: Float32[Tensor, "L H E"]) -> Float32[Tensor, "L H E"]:
    """Returns the order that takes the last and the highest of each head in turns, the last first."""
    age = torch.arange(values.shape[-1], device=values.device).flip(0)
    return -torch.minimum(2 * age, 2 * _rank(values) + 1).float()


def pyramidkv(model: Model, cache: DenseCache, *, beta: float = 20.0) -> DenseCache:
    """Returns SnapKV's order in each head, moved so that level "pair" keeps a pyramid: many pairs below, few above.

    At ratio r, layer l of L holds the fraction `pyramid(r, l, L)` of its pairs: from (2 - 1/beta) r in the first down
    to r / beta in the last in equal steps or, where the first would exceed 1, from 1 to 2r - 1. A pair of rank j in its
    head has the value -r at which its layer's fraction reaches (j + 1/2) / E.

    Source: PyramidKV, arXiv 2406.02069, section 4, with beta = 20. The observation window counts in the budget, and is
    SnapKV's 32 so that the two differ in nothing else; the paper has 8. L counts global layers.
    """
    ranks = _rank(snapkv_values(model, cache))
    layers, _, evictable = ranks.shape
    fraction = (ranks.double() + 0.5) / evictable
    depth = torch.linspace(0, 1, layers, dtype=torch.float64, device=ranks.device)[:, None, None]
    if layers == 1:
        depth += 0.5
    slope = (2 - 1 / beta) - depth * (2 - 2 / beta)
    turn = 1 / (2 - 1 / beta)  # the ratio at which the first layer is full
    needed = torch.where(fraction <= turn * slope, fraction / slope, 1 - (1 - fraction) / (2 * depth).clamp(min=1e-9))
    return _attach(model, cache, -needed.float(), "pyramidkv")


def pyramid(ratio: float, layer: int, layers: int, *, beta: float = 20.0) -> float:
    """Returns the fraction of the pairs of `layer` that PyramidKV keeps where it keeps `ratio` of all."""
    depth = layer / (layers - 1) if layers > 1 else 0.5
    first, last = ratio * (2 - 1 / beta), ratio / beta
    if first > 1:
        first, last = 1.0, 2 * ratio - 1
    return first + depth * (last - first)


def adakv(model: Model, cache: DenseCache, *, safeguard: float = 0.2) -> DenseCache:
    """Returns SnapKV's scores in the order in which AdaKV takes pairs of a layer.

    At n pairs a head on average, each head holds its `safeguard` * n highest and the rest go to the highest scores of
    all heads of the layer. See `safeguarded`.

    Source: AdaKV, arXiv 2407.11550, algorithm 1, on SnapKV's scores (Ada-SnapKV) with alpha = 0.2.
    """
    values = snapkv_values(model, cache)
    ordered = torch.stack([safeguarded(layer, share=safeguard) for layer in values])
    return _attach(model, cache, ordered, "adakv")


def safeguarded(values: Float32[Tensor, "H E"], *, share: float) -> Float32[Tensor, "H E"]:
    """Returns the order of one layer's pairs in which every head always holds `share` of the average head's pairs.

    Let n be the pairs a head on average, and c_h the pairs of head h among the highest of the layer down to a pair x.
    With that many by score, and every head filled up to share * n, the layer holds sum_h max(c_h, share * n) = H n.
    The left side is linear where it is known which k heads are filled up (those with the smallest c_h), and any other
    guess gives a smaller n, so that

        n(x) = max over k < H of (sum of the H - k largest c_h) / (H - k * share)

    x is taken in at n(x), or at (its rank in its head + 1) / share if that is earlier.
    """
    heads, evictable = values.shape
    order = values.flatten().argsort(descending=True, stable=True)
    owner = order // evictable
    counts = F.one_hot(owner, heads).cumsum(0)  # [H*E H]
    largest = counts.sort(dim=-1, descending=True).values.cumsum(-1).double()  # sums of the 1, 2 ... H largest
    filled = torch.arange(heads - 1, -1, -1, device=values.device)  # H - 1 ... 0 heads filled up
    by_score = (largest / (heads - filled * share)).amax(-1)
    by_share = counts.gather(1, owner[:, None])[:, 0].double() / share if share else torch.inf
    taken = torch.empty_like(by_score).scatter_(0, order, by_score.clamp(max=by_share))
    return -_rank(-taken[None]).view(heads, evictable).float()


def streaming_llm(model: Model, cache: DenseCache) -> DenseCache:
    """Returns scores that keep the first 4 tokens of the sequence and the latest.

    The system prefix is kept anyway; only what it lacks of 4 tokens is taken from the context.

    Source: StreamingLLM, arXiv 2309.17453, which also moves the kept tokens together; here positions stay.
    """
    layers, heads, evictable = _shape(model, cache)
    values = torch.arange(evictable, dtype=torch.float32, device=model.device)
    return _attach(model, cache, _keep_sink(values, cache).expand(layers, heads, -1).contiguous(), "streaming-llm")


def key_norm(model: Model, cache: DenseCache) -> DenseCache:
    """Returns minus the L2 norm of each key: small keys are kept.

    Source: "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", arXiv 2406.11430, which leaves the
    first two layers whole in some experiments; here all are compressed alike.
    """
    _shape(model, cache)
    keys = [layer.k[0] for layer in cache.layers if isinstance(layer, DenseKV)]
    norms = [torch.linalg.vector_norm(k[:, cache.start :], dim=-1, dtype=torch.float32) for k in keys]
    return _attach(model, cache, -torch.stack(norms), "key-norm")


def expected_attention(model: Model, cache: DenseCache, *, future: int = 512) -> DenseCache:
    """Returns the attention that queries like the context's would pay from the `future` next positions, times |v|.

        score[l, h, e] = |v_e| * mean over query heads of head h of softmax over e of
                         (scale * m . k_e + scale^2 / 2 * k_e' C k_e)

    m and C are the mean and covariance of the queries before rotation, rotated by the average rotation of the next
    positions: exp(scale * m.k + ...) is the mean of exp(scale * q.k) for a normal q. The first 4 tokens of the sequence
    are left out of all three and always kept.

    Source: Expected Attention, arXiv 2510.00636, as in kvpress (epsilon 0, equal heads). The queries are measured, not
    projected from hidden states, so that models with a query norm work too. A softcap is not part of the expectation.
    """
    config, width = model.config, model.config.head_dim
    layers, heads, evictable = _shape(model, cache)
    sink = min(4, cache.length - 1)
    mean, covariance = query_statistics(model, cache, first=sink)
    values = torch.empty(layers, heads, evictable, dtype=torch.float32, device=model.device)
    ahead = torch.arange(cache.length, cache.length + future, device=model.device)
    for n, layer in enumerate(global_layers(cache)):
        kv = cache.layers[layer]
        tables = cos_sin(config.layers[layer].rope, ahead, width, torch.float64)
        turn = _rotate(torch.eye(width, dtype=torch.float64, device=model.device), *(x.mean(0) for x in tables))
        m = rearrange((mean[n] @ turn).float(), "(h g) d -> h g d", h=heads)
        c = rearrange((turn.T @ covariance[n] @ turn).float(), "(h g) i j -> h g i j", h=heads)
        k = kv.k[0, :, sink:].float()
        logits = m @ k.mT * config.attn_scale  # [H G S]
        for g in range(c.shape[1]):
            logits[:, g] += ((k @ c[:, g]) * k).sum(-1) * (config.attn_scale**2 / 2)
        scores = logits.softmax(-1).mean(1) * torch.linalg.vector_norm(kv.v[0, :, sink:], dim=-1, dtype=torch.float32)
        values[n] = F.pad(scores, (sink, 0))[:, cache.start :]
    return _attach(model, cache, _keep_sink(values, cache), "expected-attention")


def random_scores(model: Model, cache: DenseCache) -> DenseCache:
    """Returns scores drawn from the context's tokens as the seed: the floor that any method must beat."""
    seed = int(cache.token_ids.sum()) + len(cache.token_ids)
    values = torch.rand(_shape(model, cache), generator=torch.Generator().manual_seed(seed))
    return _attach(model, cache, values.to(model.device), "random")


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("kvzip", lambda model, cache: score(model, cache), "pair", "KVzip, arXiv 2505.23416"),
        Method("kvzip-chunk", lambda model, cache: score(model, cache, scope="chunk"), "pair", "KVzip, scope chunk"),
        Method(
            "kvzip+",
            lambda model, cache: score(model, cache, method="kvzip+"),
            "pair",
            "KVzip+ of KVzap, arXiv 2601.07891, equation 3",
        ),
        Method("kvzip-heads", heads, "head", "KVzip, arXiv 2505.23416, section 4.2"),
        Method("snapkv", snapkv, "uniform", "SnapKV, arXiv 2404.14469"),
        Method("h2o", h2o, "uniform", "H2O, arXiv 2306.14048"),
        Method("pyramidkv", pyramidkv, "pair", "PyramidKV, arXiv 2406.02069"),
        Method("adakv", adakv, "layer", "AdaKV, arXiv 2407.11550"),
        Method("streaming-llm", streaming_llm, "uniform", "StreamingLLM, arXiv 2309.17453"),
        Method("key-norm", key_norm, "uniform", "L2 norm of keys, arXiv 2406.11430"),
        Method("expected-attention", expected_attention, "uniform", "Expected Attention, arXiv 2510.00636"),
        Method("random", random_scores, "pair", "none"),
    )
}


def snapkv_values(model: Model, cache: DenseCache, *, window: int = 32, kernel: int = 7) -> Float32[Tensor, "L H E"]:
    """Returns SnapKV's scores: pooled mean weights in [0, 1], and above 1 for the last `window` context tokens."""
    _, heads, evictable = _shape(model, cache)
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


def accumulated_attention(model: Model, cache: DenseCache, *, first: int) -> Float32[Tensor, "L Hq S"]:
    """Returns the softmax weights that each token receives from the queries of tokens first: on, summed over them."""
    config = model.config
    layers = _shape(model, cache)[0]
    sums = torch.zeros(layers, config.num_heads, cache.length, dtype=torch.float32, device=model.device)

    def see(n: int, start: int, q: Tensor, k: Tensor, lse: Tensor) -> None:
        keys = k[:, : start + q.shape[1]].float()
        for row in range(max(0, first - start), q.shape[1], _ROWS):
            seen = start + min(row + _ROWS, q.shape[1])
            rows = slice(row, row + _ROWS)
            sums[n, :, :seen] += _weights(q[:, rows], keys[:, :seen], lse[:, rows], config).sum(1)

    _replay(model, cache, first, see)
    return sums


def query_statistics(
    model: Model, cache: DenseCache, *, first: int
) -> tuple[Float64[Tensor, "L Hq D"], Float64[Tensor, "L Hq D D"]]:
    """Returns the mean and covariance of the queries of tokens first: on, as they are before rotation."""
    config = model.config
    scored = global_layers(cache)
    shape = (len(scored), config.num_heads, config.head_dim)
    sums = torch.zeros(shape, dtype=torch.float64, device=model.device)
    squares = torch.zeros((*shape, config.head_dim), dtype=torch.float64, device=model.device)

    def see(n: int, start: int, q: Tensor, k: Tensor, lse: Tensor) -> None:
        rope = config.layers[scored[n]].rope
        positions = torch.arange(start, start + q.shape[1], device=model.device)
        cos, sin = (x / rope.attention_factor**2 for x in cos_sin(rope, positions, config.head_dim, torch.float64))
        plain = _rotate(q.double(), cos, -sin)[:, max(0, first - start) :]
        sums[n] += plain.sum(1)
        squares[n] += plain.mT @ plain

    _replay(model, cache, first, see)
    mean = sums / (cache.length - first)
    return mean, squares / (cache.length - first) - mean[..., :, None] * mean[..., None, :]


def _replay(model: Model, cache: DenseCache, first: int, see: See) -> None:
    """Computes the queries of tokens first: on, which a cache does not hold, and shows them.

    Where there are window layers, whose cache lacks what the first of these tokens saw, the context is read from its
    beginning; `see` is then called for earlier tokens too.
    """
    config = model.config
    number = {layer: n for n, layer in enumerate(global_layers(cache))}
    recent: dict[int, tuple[Tensor, Tensor]] = {}
    token_ids = cache.token_ids.to(model.device)
    for start in range(first if len(number) == len(config.layers) else 0, cache.length, _CHUNK):
        piece = token_ids[start : start + _CHUNK]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, start: int = start) -> Tensor:
            kv, window = cache.layers[layer], config.layers[layer].window
            if window is not None:
                if layer in recent:
                    k, v = (torch.cat([past, x], dim=2) for past, x in zip(recent[layer], (k, v), strict=True))
                recent[layer] = k[:, :, -window:].clone(), v[:, :, -window:].clone()
                return window_attention(q, k, v, window, config)
            stop = start + q.shape[2]
            out, lse = causal_attention(
                q, [kv.k[:, :, :start]], [kv.v[:, :, :start]], kv.k[:, :, start:stop], kv.v[:, :, start:stop], config
            )
            see(number[layer], start, q[0], kv.k[0], lse[0])
            return out

        with torch.no_grad():
            run_attention(model, piece[None], torch.arange(start, start + len(piece), device=model.device), attend)


def _rotate(
    x: Float64[Tensor, "*b D"], cos: Float64[Tensor, "*c D"], sin: Float64[Tensor, "*c D"]
) -> Float64[Tensor, "*b D"]:
    """x turned as RoPE does, and back with -sin; also by means over positions, which no longer are rotations."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _weights(
    q: Float[Tensor, "Hq T D"], k: Float32[Tensor, "H S D"], lse: Float[Tensor, "Hq T"], config: ModelConfig
) -> Float32[Tensor, "Hq T S"]:
    """Softmax weights of the last T of S tokens on all keys up to their own."""
    rows, seen = q.shape[1], k.shape[1]
    logits = rearrange(q.float(), "(h g) t d -> h (g t) d", h=k.shape[0]) @ k.mT * config.attn_scale
    if config.attn_softcap is not None:
        logits = torch.tanh(logits / config.attn_softcap) * config.attn_softcap
    logits = rearrange(logits, "h (g t) s -> (h g) t s", t=rows)
    future = torch.ones(rows, seen, dtype=torch.bool, device=q.device).triu(seen - rows + 1)
    return (logits - lse[..., None].float()).masked_fill_(future, -torch.inf).exp_()


def _rank(values: Float[Tensor, "*b E"]) -> Int64[Tensor, "*b E"]:
    """How many of the last axis come before each value, the highest first and equal ones in index order."""
    return values.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


def _keep_sink(values: Float32[Tensor, "*b E"], cache: DenseCache) -> Float32[Tensor, "*b E"]:
    """The values, the highest of all for those of the first 4 tokens of the sequence that are not in the prefix."""
    first = torch.arange(values.shape[-1], device=values.device) < 4 - cache.start
    return torch.where(first, values.amax() + 1, values)


def _shape(model: Model, cache: DenseCache) -> tuple[int, int, int]:
    """L, H, E of the scores. Raises ValueError for a cache of another model, or one with nothing to score."""
    check_fingerprint(model, cache.fingerprint)
    check_whole(cache)
    layers = len(global_layers(cache))
    if not layers:
        raise ValueError(
            "expected a model with global layers, got sliding windows in all: there is nothing to compress"
        )
    return layers, model.config.num_kv_heads, cache.length - cache.start


def _attach(model: Model, cache: DenseCache, values: Float32[Tensor, "L H E"], source: str) -> DenseCache:
    assert values.shape == _shape(model, cache)
    return replace(cache, scores=Scores(values, global_layers(cache), cache.start, cache.length, source))
