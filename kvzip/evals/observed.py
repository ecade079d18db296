"""Attention weights and queries of a context's tokens. A cache holds neither: another forward pass computes them."""

from collections.abc import Callable

import torch
from einops import rearrange
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from ..attention import causal_attention, window_attention
from ..cache import DenseCache, check_whole, global_layers
from ..inputs import check_belongs, check_whole_model
from ..models import Model, ModelConfig, run_attention
from ..models.rope import cos_sin

_CHUNK = 2_048  # tokens of a forward pass
_ROWS = 64  # query rows whose weights are held in memory: [Hq 64 S]

See = Callable[[int, int, Tensor, Tensor, Tensor], None]
"""see(n, start, q [Hq T D], k [H S D], lse [Hq T]): the queries of tokens start:start+T in the n-th global layer,
all of its cached keys, and the log-sum-exp of each query's logits over the keys up to its own."""


def shape_of(model: Model, cache: DenseCache) -> tuple[int, int, int]:
    """L, H, E of the scores. Raises ValueError for a cache of another model, or one with nothing to score."""
    check_belongs(model, cache)
    check_whole_model(model, "the baselines of evals")
    check_whole(cache)
    layers = len(global_layers(cache))
    if not layers:
        raise ValueError(
            "expected a model with global layers, got sliding windows in all: there is nothing to compress"
        )
    return layers, model.config.num_kv_heads, cache.length - cache.start


def accumulated_attention(model: Model, cache: DenseCache, *, first: int) -> Float32[Tensor, "L Hq S"]:
    """Returns the softmax weights that each token receives from the queries of tokens first: on, summed over them."""
    config = model.config
    layers = shape_of(model, cache)[0]
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
        tables = cos_sin(rope, positions, model.frequencies[rope], torch.float64)
        cos, sin = (x / rope.attention_factor**2 for x in tables)
        plain = rotate(q.double(), cos, -sin)[:, max(0, first - start) :]
        sums[n] += plain.sum(1)
        squares[n] += plain.mT @ plain

    _replay(model, cache, first, see)
    mean = sums / (cache.length - first)
    return mean, squares / (cache.length - first) - mean[..., :, None] * mean[..., None, :]


def _replay(model: Model, cache: DenseCache, first: int, see: See) -> None:
    """Computes the queries of tokens first: on, which a cache does not hold, and calls `see` with them.

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


def rotate(
    x: Float64[Tensor, "*b D"], cos: Float64[Tensor, "*c D"], sin: Float64[Tensor, "*c D"]
) -> Float64[Tensor, "*b D"]:
    """RoPE's rotation of x, its inverse with -sin. cos and sin may be means over positions, which do not rotate."""
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
