"""Methods: each against a case worked by hand or a dense computation of its own, and what they hold in memory."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import kvzip
import random_model
from kvzip.cache import DenseKV
from kvzip.evals.methods import (
    METHODS,
    accumulated_attention,
    expected_attention,
    pyramid,
    recent_and_heavy,
    safeguarded,
    snapkv_values,
)
from kvzip.models import run_attention

TEXT = "The quick brown fox jumps over the lazy dog, and then the dog jumps over the fox, twice."
OTHERS = [name for name in METHODS if not name.startswith("kvzip")]
CONFIGS = [
    {"windows": (None, None)},
    {"windows": (6, None, 9, None)},
    {"windows": (None, 6), "attn_softcap": 2.0, "attn_scale": 0.5},
]


@pytest.fixture(scope="module")
def model():
    return random_model.make(random_model.config())


def dense(model, token_ids):
    """Queries [Hq S D], keys [H S D] and weights [Hq S S] of every layer, with masks and all, in float64."""
    config, found = model.config, []

    def attend(layer, q, k, v):
        group, tokens = config.num_heads // config.num_kv_heads, q.shape[2]
        keys, values = (x[0].double().repeat_interleave(group, 0) for x in (k, v))
        logits = torch.einsum("htd,hsd->hts", q[0].double(), keys) * config.attn_scale
        if config.attn_softcap is not None:
            logits = config.attn_softcap * torch.tanh(logits / config.attn_softcap)
        distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
        window = config.layers[layer].window
        seen = (distance >= 0) & (distance < (window or tokens))
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        found.append((q[0].double(), k[0].double(), v[0].double(), weights, window))
        return (weights @ values)[None].to(q.dtype)

    with torch.no_grad():
        run_attention(model, token_ids[None], torch.arange(len(token_ids)), attend)
    return [parts[:4] for parts in found if parts[4] is None]


def kept(cache, ratio, name):
    """The kept context tokens of each scored layer and head, from the positions that compression leaves."""
    small = kvzip.compress(cache, ratio, level=METHODS[name].level)
    found = []
    for layer in cache.scores.layers:
        packed = small.context[layer]
        bounds = packed.offsets.tolist()
        heads = [packed.positions[a:b].tolist() for a, b in pairwise(bounds)]
        found.append([[p - cache.start for p in head if p >= cache.start] for head in heads])
    return found


@pytest.mark.parametrize("changes", CONFIGS)
@pytest.mark.parametrize("first", [0, 70])
def test_accumulated_attention_is_the_sum_of_dense_weights(changes, first):
    model = random_model.make(random_model.config(**changes))
    cache = kvzip.prefill(model, TEXT)
    expected = torch.stack([weights[:, first:].sum(1) for *_, weights in dense(model, cache.token_ids)])
    found = accumulated_attention(model, cache, first=first)
    torch.testing.assert_close(found, expected.float())


def test_passes_over_pieces_add_up(model, monkeypatch):
    cache = kvzip.prefill(model, TEXT)
    whole = accumulated_attention(model, cache, first=10)
    monkeypatch.setattr("kvzip.evals.methods._CHUNK", 17)
    monkeypatch.setattr("kvzip.evals.methods._ROWS", 5)
    torch.testing.assert_close(accumulated_attention(model, cache, first=10), whole)


def test_snapkv_pools_the_mean_of_the_last_rows(model):
    cache = kvzip.prefill(model, TEXT)
    found = snapkv_values(model, cache, window=32, kernel=7)
    last = cache.length - 32
    for n, (*_, weights) in enumerate(dense(model, cache.token_ids)):
        means = weights[:, last:, :last].mean(1)
        for head, token in [(0, 0), (0, 20), (1, 41), (1, last - cache.start - 1)]:
            at = cache.start + token
            pooled = [means[2 * head + g, max(0, at - 3) : at + 4].max() for g in range(2)]
            assert found[n, head, token].item() == pytest.approx(float(sum(pooled) / 2), rel=1e-4)
    assert (found[..., :-32] <= 1).all() and torch.equal(found[0, 0, -32:], 1 + torch.arange(1, 33) / 32)


def test_snapkv_of_a_context_shorter_than_its_window_keeps_the_latest(model):
    cache = METHODS["snapkv"].score(model, kvzip.prefill(model, "short text"))
    assert kept(cache, 0.3, "snapkv") == [[[7, 8, 9]] * 2] * 2


def test_h2o_takes_recent_and_heavy_in_turns():
    # heaviest first: 0 4 2 5 1 3; latest first: 5 4 3 2 1 0; in turns: 5, 0, 4, (4), 3, 2, (2), (5), 1
    order = recent_and_heavy(torch.tensor([[[9.0, 1.0, 5.0, 0.0, 7.0, 2.0]]]))
    assert order.argsort(descending=True)[0, 0].tolist() == [5, 0, 4, 3, 2, 1]


def test_h2o_sums_the_query_heads_of_a_head(model):
    cache = kvzip.prefill(model, TEXT)
    sums = torch.stack([w.sum(1)[:, cache.start :].reshape(2, 2, -1).sum(1) for *_, w in dense(model, cache.token_ids)])
    assert torch.equal(METHODS["h2o"].score(model, cache).scores.values, recent_and_heavy(sums.float()))


def test_pyramid_worked_by_hand():
    assert [pyramid(0.2, n, 3) for n in range(3)] == pytest.approx([0.39, 0.2, 0.01])
    assert [pyramid(0.8, n, 3) for n in range(3)] == pytest.approx([1.0, 0.8, 0.6])
    assert [pyramid(1.0, n, 3) for n in range(3)] == pytest.approx([1.0, 1.0, 1.0])


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.5, 0.52, 0.8, 1.0])
def test_pyramidkv_keeps_the_papers_share_of_each_layer(ratio):
    model = random_model.make(random_model.config(windows=(None, None, 6, None)))
    cache = METHODS["pyramidkv"].score(model, kvzip.prefill(model, TEXT))
    best = snapkv_values(model, cache)
    for n, layer in enumerate(kept(cache, ratio, "pyramidkv")):
        for head, tokens in enumerate(layer):
            assert abs(len(tokens) - pyramid(ratio, n, 3) * len(TEXT)) <= 1
            highest = best[n, head].sort(descending=True, stable=True).indices[: len(tokens)]
            assert tokens == sorted(highest.tolist())


def test_adakv_worked_by_hand():
    # head 1 is below head 0 everywhere; at 2 a head on average it holds half of 2, at 3 the budget takes it to 2
    values = torch.tensor([[8.0, 7.0, 6.0, 5.0], [4.0, 3.0, 2.0, 1.0]])
    order = safeguarded(values, share=0.5).flatten().argsort(descending=True)
    assert set(order[:4].tolist()) == {0, 1, 2, 4}
    assert set(order[:6].tolist()) == {0, 1, 2, 3, 4, 5}
    assert safeguarded(values, share=0.0).flatten().argsort(descending=True).tolist() == list(range(8))


@given(
    heads=st.integers(1, 5), evictable=st.integers(1, 24), share=st.sampled_from([0.0, 0.2, 0.5, 1.0]), data=st.data()
)
def test_adakv_is_the_papers_algorithm_wherever_its_share_is_whole(heads, evictable, share, data):
    seed = data.draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(heads, 1, generator=generator) ** 3
    values = torch.rand(heads, evictable, generator=generator) * scale
    order = safeguarded(values, share=share).flatten().argsort(descending=True)
    for n in range(1, evictable + 1):
        floor = round(share * n, 9)
        if floor % 1:
            continue
        safe = values.sort(dim=-1, descending=True).indices[:, : int(floor)]
        raised = values.scatter(1, safe, 2.0)
        expected = raised.flatten().sort(descending=True).indices[: heads * n]
        assert set(order[: heads * n].tolist()) == set(expected.tolist())


def test_streaming_llm_keeps_what_the_prefix_lacks_of_the_sink_and_the_latest():
    model = random_model.make(random_model.config(), template=False)
    cache = METHODS["streaming-llm"].score(model, kvzip.prefill(model, "x" * 20, template=False))
    assert kept(cache, 0.5, "streaming-llm") == [[[0, 1, 2, 3, 14, 15, 16, 17, 18, 19]] * 2] * 2
    chat = random_model.make(random_model.config())
    cache = METHODS["streaming-llm"].score(chat, kvzip.prefill(chat, "x" * 20))
    assert cache.start == 1 and kept(cache, 0.5, "streaming-llm")[0][0] == [0, 1, 2, 13, 14, 15, 16, 17, 18, 19]


def test_key_norm_keeps_small_keys(model):
    cache = kvzip.prefill(model, "abcd")
    for layer in cache.layers:
        layer.k[0, :, cache.start :] = 0
        layer.k[0, :, cache.start :, 0] = torch.tensor([3.0, -1.0, 4.0, 2.0])
        layer.k[0, :, cache.start :, 5] = torch.tensor([4.0, 0.0, 0.0, 2.0])
    scored = METHODS["key-norm"].score(model, cache)
    expected = -torch.tensor([5.0, 1.0, 4.0, 8.0**0.5])
    torch.testing.assert_close(scored.scores.values, expected.expand(2, 2, 4))
    assert kept(scored, 0.5, "key-norm") == [[[1, 3]] * 2] * 2


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_expected_attention_is_the_dense_formula(factor):
    rope = kvzip.models.RopeSpec(theta=1000.0, attention_factor=factor)
    layers = tuple(kvzip.models.LayerSpec(window=None, rope=rope) for _ in range(2))
    model = random_model.make(random_model.config(layers=layers))
    cache = kvzip.prefill(model, TEXT)
    found = expected_attention(model, cache, future=50).scores.values
    sink, scale = 4, model.config.attn_scale
    theta = 1000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)  # a pair (x[i], x[i + 4]) is a complex number
    angle = torch.arange(cache.length, dtype=torch.float64)[:, None] * theta
    ahead = torch.arange(cache.length, cache.length + 50, dtype=torch.float64)[:, None] * theta
    average = factor * torch.polar(torch.ones_like(ahead), ahead).mean(0)
    for n, (q, k, v, _) in enumerate(dense(model, cache.token_ids)):
        turned = torch.complex(q[..., :4], q[..., 4:]) * torch.polar(torch.ones_like(angle), -angle) / factor * average
        moved = torch.cat([turned.real, turned.imag], dim=-1)[:, sink:]
        for h in range(2):
            keys, norms = k[h, sink:], v[h, sink:].norm(dim=-1)
            logits = [
                scale * keys @ moved[hq].mean(0)
                + scale**2 / 2 * torch.einsum("si,ij,sj->s", keys, torch.cov(moved[hq].T, correction=0), keys)
                for hq in (2 * h, 2 * h + 1)
            ]
            expected = norms * (logits[0].softmax(-1) + logits[1].softmax(-1)) / 2
            own = sink - cache.start
            torch.testing.assert_close(found[n, h, own:], expected.float())
            assert (found[n, h, :own] > found[n, :, own:].max()).all()


def test_kvzip_heads_gives_each_head_its_highest_score(model):
    cache = kvzip.prefill(model, TEXT)
    highest = kvzip.score(model, cache).scores.values.amax(-1)
    scored = METHODS["kvzip-heads"].score(model, cache)
    assert torch.equal(scored.scores.values, highest[..., None].expand(-1, -1, len(TEXT)))
    best = highest.flatten().argmax().item()
    assert [len(head) for layer in kept(scored, 0.25, "kvzip-heads") for head in layer] == [
        len(TEXT) if n == best else 0 for n in range(4)
    ]


def test_random_depends_on_the_context_alone(model):
    first, again = (METHODS["random"].score(model, kvzip.prefill(model, TEXT)).scores.values for _ in range(2))
    other = METHODS["random"].score(model, kvzip.prefill(model, TEXT.replace("dog", "cow"))).scores.values
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", CONFIGS)
def test_every_method_scores_global_layers_and_keeps_the_budget(name, dtype, changes):
    model = random_model.make(random_model.config(**changes), dtype=dtype)
    cache = kvzip.prefill(model, TEXT)
    before = [(kv.k.clone(), kv.v.clone()) for kv in cache.layers]
    scores = METHODS[name].score(model, cache).scores
    assert all(torch.equal(kv.k, k) and torch.equal(kv.v, v) for kv, (k, v) in zip(cache.layers, before, strict=True))
    assert scores.layers == tuple(n for n, kv in enumerate(cache.layers) if isinstance(kv, DenseKV))
    assert scores.values.dtype == torch.float32 and scores.values.isfinite().all()
    assert scores.source == {"kvzip": "kvzip-context", "kvzip+": "kvzip+-context"}.get(name, name)
    assert METHODS[name].name == name
    scored = METHODS[name].score(model, cache)
    total, sharing = scores.values.numel(), {"uniform": len(TEXT), "layer": 2 * len(TEXT)}
    unit = sharing.get(METHODS[name].level, total)
    if METHODS[name].level != "head":
        for ratio in (0.1, 0.3, 0.9):
            assert kvzip.compress(scored, ratio, level=METHODS[name].level).kept == int(ratio * unit) * (total // unit)


@pytest.mark.parametrize("name", METHODS)
def test_another_models_cache_is_refused(name, model):
    other = random_model.make(random_model.config(), seed=1)
    with pytest.raises(ValueError, match="cache of this model"):
        METHODS[name].score(other, kvzip.prefill(model, "abc"))


class Largest(TorchDispatchMode):
    """Remembers the most values that any tensor made inside it had."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("name", OTHERS)
def test_nothing_as_large_as_tokens_squared_is_made(name):
    tokens = 4000
    model = random_model.make(random_model.config(num_heads=2, num_kv_heads=1))
    cache = kvzip.prefill(model, torch.arange(tokens) % 250)
    with Largest() as largest:
        METHODS[name].score(model, cache)
    assert tokens <= largest.numel < tokens**2 // 16
