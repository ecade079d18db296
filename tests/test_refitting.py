"""refit: what it promises of each head and chunk, against plain float64; what carries a bias; what is refused."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvzip
import plain_cache
import random_model
from kvzip import options, refitting, scores
from kvzip.cache import RaggedKV, WindowKV
from kvzip.cache.caches import tensors_of
from kvzip.cache.rows import join, take
from plain_refit import Problem, problems

TEXT = "Happy families are all alike; every unhappy family is unhappy in its own way. Everything was in confusion."
FAMILIES = {
    "plain": {},
    "window": {"windows": (None, 9, None)},
    "softcap": {"attn_softcap": 2.0},
    "own heads": {"num_kv_heads": 4},
}
CHUNK = 40
HOW = options.Refitting(chunk=CHUNK)


def model_of(family, dtype=torch.float64):
    return random_model.make(random_model.config(**FAMILIES[family]), dtype=dtype)


@pytest.fixture(scope="module", params=FAMILIES)
def scored(request):
    model = model_of(request.param)
    return model, kvzip.score(model, kvzip.prefill(model, TEXT), chunk=CHUNK)


@pytest.fixture(scope="module")
def plain():
    """A float32 model and a scored cache."""
    model = model_of("window", torch.float32)
    return model, kvzip.score(model, kvzip.prefill(model, TEXT), chunk=CHUNK)


def fitted(model, dense, small, how=HOW, dtype=torch.float64):
    """The rows that are stored, before they are rounded."""
    return refitting.fit_rows(model, dense, small.context, how, dtype=dtype)


def rows_of(small, rows, problem: Problem):
    """The kept tokens of a problem, counted in its chunk, and their weights and values."""
    layer, own = small.context[problem.layer], rows[problem.layer]
    first, stop = layer.offsets[problem.head : problem.head + 2].tolist()
    tokens = layer.positions[first:stop].long() - problem.first
    inside = (tokens >= 0) & (tokens < problem.p.shape[1])
    return tokens[inside], own.bias[first:stop][inside].exp(), own.values[first:stop][inside]


def same(a, b):
    ours, theirs = tensors_of(a), tensors_of(b)
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("ratio", [0.04, 0.3, 0.8])
def test_the_objective_never_rises_and_nears_its_least(scored, ratio):
    """In each head and chunk, in float64, F of the docstring; where the fit is taken it is near the exact solutions."""
    model, dense = scored
    small = kvzip.compress(dense, ratio)
    rows, mass = fitted(model, dense, small)
    gains, kept_mass = [], torch.zeros(3, *mass.before.shape)
    place = {n: i for i, n in enumerate(dense.scored_layers)}
    for problem in problems(model, dense, chunk=CHUNK):
        kept, w, values = rows_of(small, rows, problem)
        one, old = torch.ones(len(kept), dtype=torch.float64), problem.v[kept]
        before, after = problem.objective(kept, one, old), problem.objective(kept, w, values)
        assert after <= before * (1 + 1e-12)
        at = (place[problem.layer], problem.head)
        kept_mass[0][at] += problem.p[:, kept].sum()
        kept_mass[1][at] += (problem.p[:, kept] @ w).sum()
        kept_mass[2][at] += problem.p.sum()
        gains.append(after < before)
        if not len(kept) or len(kept) == problem.p.shape[1]:
            assert torch.equal(w, one) and torch.equal(values, old)
            gains.pop()
        if not gains or len(gains) % 4:
            continue
        best = problem.best_weights(kept, HOW.ridge, HOW.bound)
        lam = HOW.ridge * problem.p[:, kept].square().sum(0).mean()

        def cost(w, problem=problem, kept=kept, lam=lam):
            return problem.mass_error(kept, w) + lam * (w - 1).square().sum()

        if not torch.equal(w, one):
            assert cost(w) - cost(best) <= 0.01 * (cost(one) - cost(best))
            if not torch.equal(values, old):
                exact = problem.best_values(kept, w, HOW.pull)
                moved = (values - exact).norm() / (exact - old).norm()
                assert moved < 0.02
    assert sum(gains) >= 0.7 * len(gains)
    torch.testing.assert_close(mass.before, kept_mass[0] / kept_mass[2])
    torch.testing.assert_close(mass.after, kept_mass[1] / kept_mass[2])


def test_the_answer_attends_to_exp_of_the_bias(plain):
    """Logits after a refitted cache are those of plain attention in which the bias is added to each row's logit."""
    model, dense = plain
    small = kvzip.refit(model, dense, kvzip.compress(dense, 0.3), chunk=CHUNK)
    assert any(x.bias.abs().max() > 0.1 for x in small.context if isinstance(x, RaggedKV))
    ids = [70, 80, 90]
    held, biased = plain_cache.read(small), plain_cache.biases(small)
    wanted = plain_cache.run(model, held, ids, small.context_length, biased)
    got = kvzip.extend(model, small, torch.tensor(ids))
    plainly = plain_cache.run(model, held, ids, small.context_length)
    for layer, (k, p) in enumerate(zip(wanted.k, plainly.k, strict=True)):
        torch.testing.assert_close(got.tail.k[layer][0], k, rtol=1e-4, atol=1e-4)
        assert layer == 0 or not torch.allclose(k, p, rtol=1e-3, atol=1e-3)
