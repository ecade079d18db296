"""What a fit is asked to do, a second time: plain float64 PyTorch, a head at a time, over `plain_cache`'s forward pass.

An oracle of `kvzip.refit`: it shares the weights, the repeats and the kept positions, nothing else.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import kvzip
import plain_cache
from kvzip.scoring import repeats


@dataclass(frozen=True)
class Problem:
    """One head of one layer and chunk: weights p [n C] of its queries on the chunk, values v [C D], outputs o [n D].

    The chunk begins at token `first`.
    """

    layer: int
    head: int
    first: int
    p: Tensor
    v: Tensor
    o: Tensor
    moved: Callable[[Tensor], Tensor]
    """moved(keys [t D]) -> weights [n t] that the same queries have on other keys, with the same log-sum-exp."""

    @property
    def mean(self) -> Tensor:
        return self.o.mean(0)

    def mass_error(self, kept: Tensor, w: Tensor) -> Tensor:
        return (self.p[:, kept] @ w - self.p.sum(1)).square().sum()

    def objective(self, kept: Tensor, w: Tensor, values: Tensor, keys: Tensor | None = None) -> float:
        """F(w, C) of `kvzip.refit`. `keys`: weights on kept keys that differ from the dense ones, [n t]."""
        p = self.p[:, kept] if keys is None else keys
        spread = (self.o - self.mean).square().sum(1).mean()
        mass = (p @ w - self.p.sum(1)).square().sum()
        output = ((p * w) @ (values - self.mean) - self.p @ (self.v - self.mean)).square().sum()
        return float(spread * mass + output)

    def best_weights(self, kept: Tensor, ridge: float, bound: float) -> Tensor:
        """The weights, by accelerated projected steps, begun anew whenever they overshoot."""
        p = self.p[:, kept]
        gram, load = p.T @ p, p.T @ self.p.sum(1)
        lam = ridge * gram.diagonal().mean()
        step = 1 / (torch.linalg.matrix_norm(gram, 2) + lam).clamp_min(1e-300)
        w = ahead = torch.ones(p.shape[1], dtype=p.dtype)
        low, high = torch.tensor([-bound, bound]).exp().tolist()
        t = 1.0
        for _ in range(600):
            new = (ahead - step * (gram @ ahead - load + lam * (ahead - 1))).clamp(low, high)
            t, last = ((1 + (1 + 4 * t * t) ** 0.5) / 2, t) if (ahead - new) @ (new - w) <= 0 else (1.0, 1.0)
            w, ahead = new, new + (last - 1) / t * (new - w)
        return w

    def value_cost(self, kept: Tensor, w: Tensor, values: Tensor, pull: float) -> Tensor:
        """What new values are to minimize for these weights."""
        x, old = self.p[:, kept] * w, self.v[kept]
        gram = x.T @ x
        rest = x @ (values - self.mean) - self.p @ (self.v - self.mean)
        return rest.square().sum() + pull * gram.square().sum() / gram.trace() * (values - old).square().sum()

    def best_values(self, kept: Tensor, w: Tensor, pull: float) -> Tensor:
        """The values for these weights, solved exactly."""
        x, old = self.p[:, kept] * w, self.v[kept]
        gram = x.T @ x
        lam = pull * gram.square().sum() / gram.trace()
        rest = self.p @ (self.v - self.mean) - x @ (old - self.mean)
        return old + torch.linalg.solve(gram + lam * torch.eye(len(gram), dtype=gram.dtype), x.T @ rest)


@torch.no_grad()
def problems(model: kvzip.Model, cache: kvzip.DenseCache, *, chunk: int, hint: int = 8) -> Iterator[Problem]:
    """Yields the problem of each head of each layer without a window and each chunk, of a float64 model."""
    config, held = model.config, plain_cache.read(cache)
    for first, stop, ids in repeats(model, cache, chunk=chunk, hint=hint):
        seen = [*range(cache.start), *range(first, stop)]
        part = [
            [{n: rows[n] for n in (seen if spec.window is None else rows)} for rows in heads]
            for heads, spec in zip(held, config.layers, strict=True)
        ]
        done = plain_cache.run(model, part, ids.tolist(), cache.length)
        for layer, spec in enumerate(config.layers):
            if spec.window is not None:
                continue
            q, own_k, own_v = done.q[layer], done.k[layer], done.v[layer]
            group, tokens = q.shape[0] // own_k.shape[0], q.shape[1]
            for head, rows in enumerate(part[layer]):
                k, v = (torch.tensor([row[i] for row in rows.values()], dtype=q.dtype) for i in (0, 1))
                logits = logits_of(config, q[head * group : (head + 1) * group], torch.cat([k, own_k[head]]))
                future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
                logits[:, :, len(k) :] = logits[:, :, len(k) :].masked_fill(future, -torch.inf)
                whole = logits.softmax(-1).flatten(0, 1)
                o = whole @ torch.cat([v, own_v[head]])
                lse, own_q = logits.logsumexp(-1, keepdim=True), q[head * group : (head + 1) * group]

                def moved(keys: Tensor, lse: Tensor = lse, own_q: Tensor = own_q) -> Tensor:
                    return (logits_of(config, own_q, keys) - lse).exp().flatten(0, 1)

                yield Problem(layer, head, first, whole[:, cache.start : len(k)], v[cache.start :], o, moved)


def logits_of(config: kvzip.ModelConfig, q: Tensor, k: Tensor) -> Tensor:
    logits = q @ k.mT * config.attn_scale
    cap = config.attn_softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)
