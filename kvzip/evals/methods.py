"""Methods under one interface: each gives every pair of a dense cache a score, without having seen a question.

A paper that shares its budget among heads or layers by a rule of its own is expressed by the order of its scores, so
that `compress` selects what the paper would at any ratio: wherever the kept sets of a rule are nested, the value of a
pair is minus the budget at which the rule takes it in.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from ..attention import causal_attention, window_attention
from ..cache import DenseCache, DenseKV, Scores, check_whole, global_layers
from ..inputs import check_fingerprint
from ..models import Model, ModelConfig, run_attention
from ..models.rope import cos_sin
from ..scoring import score
from .catalog import CATALOG

SNAPKV_WINDOW = 32
"""The last tokens of a context, whose queries vote and which are kept."""

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
    scores = score(model, cache, scope="context").scores
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
    """Returns an order in which any budget holds half recent tokens and half heavy hitters.

    A heavy hitter is a pair that receives much attention, summed over all queries and over the query heads of its head.
    A budget of n pairs a head holds its n/2 most recent tokens and the n/2 heaviest of the others.

    Source: H2O, arXiv 2306.14048, algorithm 1 with its equal halves. It evicts at each step, so that later queries see
    the remaining pairs only; here, as when its authors compress a prompt, the whole context is read first. The weights
    are summed as they are made, [Hq 64 S] at a time.
    """
    sums = accumulated_attention(model, cache, first=0)[..., cache.start :]
    values = reduce(sums, "l (h g) e -> l h e", "sum", h=model.config.num_kv_heads)
    return _attach(model, cache, recent_and_heavy(values), "h2o")


def recent_and_heavy(values: Float32[Tensor, "L H E"]) -> Float32[Tensor, "L H E"]:
    """Returns the order in which each head's set grows that holds as many of its last as of the highest others.

    The sets are nested: a token that becomes a recent one makes room for the next heaviest.
    """
    heaviest = values.argsort(dim=-1, descending=True, stable=True).flatten(0, 1).tolist()
    orders = torch.tensor([_taken_in(row) for row in heaviest], device=values.device).view(values.shape)
    return -orders.argsort(dim=-1).float()


def _taken_in(heaviest: list[int]) -> list[int]:
    """Token indices in the order in which one head takes them in, from those with the heaviest first."""
    order: list[int] = []
    taken = [False] * len(heaviest)
    heavy = iter(heaviest)
    for recent in reversed(range(len(heaviest))):
        was_heavy = taken[recent]
        if not was_heavy:
            taken[recent] = True
            order.append(recent)
        for token in islice((own for own in heavy if not taken[own]), 1 + was_heavy):
            taken[token] = True
            order.append(token)
    return order


def pyramidkv(model: Model, cache: DenseCache, *, beta: float = 20.0) -> DenseCache:
    """Returns SnapKV's order in each head, moved so that level "pair" keeps a pyramid: many pairs below, few above.

    Each head keeps the last 32 tokens. Of the E others, where a fraction r of all is kept, layer l of L holds the
    fraction `pyramid(r, l, L)`: from (2 - 1/beta) r in the first down to r / beta in the last in equal steps or, where
    the first would exceed 1, from 1 to 2r - 1. A pair of rank j among the E of its head has the value -r at which its
    layer's fraction reaches (j + 1/2) / E.

    Source: PyramidKV, arXiv 2406.02069, section 4, with beta = 20 as in its authors' code. The observation window is
    SnapKV's 32 so that the two differ in nothing else; the paper has 8. L counts global layers. Above half of the pairs
    their code gives all layers the same; here the pyramid goes on.
    """
    values = snapkv_values(model, cache)
    layers, _, evictable = values.shape
    others = evictable - min(SNAPKV_WINDOW, evictable)
    fraction = (_rank(values[..., :others]).double() + 0.5) / max(1, others)
    depth = torch.linspace(0, 1, layers, dtype=torch.float64, device=values.device)[:, None, None]
    if layers == 1:
        depth += 0.5
    slope = (2 - 1 / beta) - depth * (2 - 2 / beta)
    turn = 1 / (2 - 1 / beta)  # the ratio at which the first layer is full
    needed = torch.where(fraction <= turn * slope, fraction / slope, 1 - (1 - fraction) / (2 * depth).clamp(min=1e-9))
    values[..., :others] = -needed.float()  # the window has values above 1
    return _attach(model, cache, values, "pyramidkv")


def pyramid(ratio: float, layer: int, layers: int, *, beta: float = 20.0) -> float:
    """Returns the fraction of the pairs of `layer` that PyramidKV keeps where it keeps `ratio` of all.

    Both count pairs outside the window, which is kept.
    """
    depth = layer / (layers - 1) if layers > 1 else 0.5
    first, last = ratio * (2 - 1 / beta), ratio / beta
    if first > 1:
        first, last = 1.0, 2 * ratio - 1
    return first + depth * (last - first)


def adakv(model: Model, cache: DenseCache) -> DenseCache:
    """Returns SnapKV's scores in the order in which AdaKV takes pairs of a layer, see `adaptive`.

    Source: AdaKV, arXiv 2407.11550, on SnapKV's scores (Ada-SnapKV), with its safeguard alpha = 0.2.
    """
    return _attach(model, cache, adaptive(snapkv_values(model, cache)), "adakv")


def adaptive(values: Float32[Tensor, "L H E"], *, alpha: float = 0.2) -> Float32[Tensor, "L H E"]:
    """Returns the order of each layer's pairs in which its heads hold what AdaKV gives them at any budget.

    At m pairs in a layer of H heads, of which c_h(m) of the m highest belong to head h, that head holds its

        b_h(m) = (1 - alpha) c_h(m) + alpha m / H

    highest, rounded: a share alpha is divided equally, the rest goes where the scores are. The sum over heads is m, and
    b_h only grows, so a pair of rank j in its head has the value -m at which b_h(m) reaches j + 1/2; between whole m,
    b_h is taken to be linear.

    Source: AdaKV, arXiv 2407.11550: its allocation with the safeguard, as in its authors' code. In kvpress a head holds
    the larger of both parts instead of their sum.
    """
    return torch.stack([_adaptive_layer(layer, alpha) for layer in values])


def _adaptive_layer(values: Float32[Tensor, "H E"], alpha: float) -> Float32[Tensor, "H E"]:
    heads, evictable = values.shape
    owner = values.flatten().argsort(descending=True, stable=True) // evictable
    taken = F.one_hot(owner, heads).T.double().cumsum(-1)  # [H H*E], c_h(1), c_h(2) ...
    budget = (1 - alpha) * taken + alpha / heads * torch.arange(1, heads * evictable + 1, device=values.device)
    budget = F.pad(budget, (1, 0))
    wanted = (torch.arange(evictable, device=values.device, dtype=torch.float64) + 0.5).expand(heads, -1).contiguous()
    after = torch.searchsorted(budget, wanted).clamp(max=heads * evictable)
    low, high = budget.gather(1, after - 1), budget.gather(1, after)
    reached = after - 1 + (wanted - low) / (high - low).clamp(min=1e-12)
    return -_rank(-reached.gather(1, _rank(values)).flatten()).view_as(values).float()  # ranks are exact in float32


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


def expected_attention(model: Model, cache: DenseCache, *, future: int = 512, epsilon: float = 0.01) -> DenseCache:
    """Returns AdaKV's order of the attention that queries like the context's pay from the `future` next positions.

        score[l, h, e] = |v_e| * (epsilon + mean over query heads of head h of softmax over e of
                                            (scale * m . k_e + scale^2 / 2 * k_e' C k_e))

    m and C are the mean and covariance of the queries before rotation, rotated by the average rotation of the next
    positions: exp(scale * m.k + ...) is the mean of exp(scale * q.k) for a normal q. The first 4 tokens of the sequence
    are left out of all three and always kept. What each head of a layer holds is AdaKV's, see `adaptive`.

    Source: Expected Attention, arXiv 2510.00636, with the settings of its authors' evaluation in kvpress (512 next
    positions, epsilon 0.01, AdaKV). The paper weighs with |W_o v|, its code, as here, with |v|. The queries are
    measured, not projected from hidden states, so that models with a query norm work too. A softcap is not part of the
    expectation.
    """
    return _attach(model, cache, adaptive(expected_values(model, cache, future, epsilon)), "expected-attention")


def expected_values(model: Model, cache: DenseCache, future: int, epsilon: float) -> Float32[Tensor, "L H E"]:
    """Returns Expected Attention's scores, those of the first 4 tokens of the sequence above all others."""
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
        norms = torch.linalg.vector_norm(kv.v[0, :, sink:], dim=-1, dtype=torch.float32)
        scores = (logits.softmax(-1).mean(1) + epsilon) * norms
        values[n] = F.pad(scores, (sink, 0))[:, cache.start :]
    return _keep_sink(values, cache)


def random_scores(model: Model, cache: DenseCache) -> DenseCache:
    """Returns scores drawn from the context's tokens as the seed: the floor that any method must beat."""
    seed = int(cache.token_ids.sum()) + len(cache.token_ids)
    values = torch.rand(_shape(model, cache), generator=torch.Generator().manual_seed(seed))
    return _attach(model, cache, values.to(model.device), "random")


_SCORERS: dict[str, Callable[[Model, DenseCache], DenseCache]] = {
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

METHODS: dict[str, Method] = {
    name: Method(name, _SCORERS[name], level, cite) for name, (level, cite) in CATALOG.items()
}


def snapkv_values(
    model: Model, cache: DenseCache, *, window: int = SNAPKV_WINDOW, kernel: int = 7
) -> Float32[Tensor, "L H E"]:
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
