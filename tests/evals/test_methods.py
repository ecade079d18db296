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
from kvzip.evals.methods import METHODS, SNAPKV_WINDOW, expected_values, snapkv_values
from kvzip.evals.observed import accumulated_attention
from kvzip.evals.orders import adaptive, recent_and_heavy
from kvzip.models import run_attention

TEXT = "The quick brown fox jumps over the lazy dog, and then the dog jumps over the fox, twice."
OTHERS = [name for name in METHODS if not name.startswith("kvzip")]
CONFIGS = [
    {"windows": (None, None)},
    {"windows": (6, None, 9, None)},
    {"windows": (None, 6), "attn_softcap": 2.0, "attn_scale": 0.5},
]


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
    monkeypatch.setattr("kvzip.evals.observed._CHUNK", 17)
    monkeypatch.setattr("kvzip.evals.observed._ROWS", 5)
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
    assert torch.equal(METHODS["snapkv"].score(model, cache).scores.values, found)  # the paper's window and kernel


def test_snapkv_of_a_context_shorter_than_its_window_keeps_the_latest(model):
    cache = METHODS["snapkv"].score(model, kvzip.prefill(model, "short text"))
    assert kept(cache, 0.3, "snapkv") == [[[7, 8, 9]] * 2] * 2


def test_h2o_worked_by_hand():
    # heaviest first: 5 0 4 2 1 3. Recent 5, heavy 0; recent 4 is new, heavy 2 (5 and 4 are recent); then 3, 1
    order = recent_and_heavy(torch.tensor([[[9.0, 1.0, 5.0, 0.0, 7.0, 10.0]]]))
    assert order.argsort(descending=True)[0, 0].tolist() == [5, 0, 4, 2, 3, 1]
    # heaviest first: 4 3 0 1 2 5. Recent 5, heavy 4; 4 becomes recent, so heavy 3 and 0; 3 becomes recent
    order = recent_and_heavy(torch.tensor([[[3.0, 2.0, 1.0, 4.0, 5.0, 0.0]]]))
    assert order.argsort(descending=True)[0, 0].tolist() == [5, 4, 3, 0, 1, 2]


@given(evictable=st.integers(1, 30), seed=st.integers(0, 10_000))
def test_h2o_holds_half_recent_and_half_heavy_tokens_at_every_budget(evictable, seed):
    values = torch.rand(2, 3, evictable, generator=torch.Generator().manual_seed(seed))
    orders = recent_and_heavy(values).argsort(dim=-1, descending=True)
    for head, order in zip(values.flatten(0, 1), orders.flatten(0, 1), strict=True):
        for half in range(evictable // 2 + 1):
            recent = range(evictable - half, evictable)
            heavy = head[: evictable - half].argsort(descending=True)[:half].tolist()
            assert set(order[: 2 * half].tolist()) == {*recent, *heavy}


def test_h2o_sums_the_query_heads_of_a_head(model):
    cache = kvzip.prefill(model, TEXT)
    sums = torch.stack([w.sum(1)[:, cache.start :].reshape(2, 2, -1).sum(1) for *_, w in dense(model, cache.token_ids)])
    assert torch.equal(METHODS["h2o"].score(model, cache).scores.values, recent_and_heavy(sums.float()))


def pyramid(ratio: float, layer: int, layers: int, beta: float = 20.0) -> float:
    """The fraction of the pairs of `layer`, outside the window, that PyramidKV keeps where it keeps `ratio` of all."""
    depth = layer / (layers - 1) if layers > 1 else 0.5
    first, last = ratio * (2 - 1 / beta), ratio / beta
    if first > 1:
        first, last = 1.0, 2 * ratio - 1
    return first + depth * (last - first)


def test_pyramid_worked_by_hand():
    assert [pyramid(0.2, n, 3) for n in range(3)] == pytest.approx([0.39, 0.2, 0.01])
    assert [pyramid(0.8, n, 3) for n in range(3)] == pytest.approx([1.0, 0.8, 0.6])
    assert [pyramid(1.0, n, 3) for n in range(3)] == pytest.approx([1.0, 1.0, 1.0])


@pytest.mark.parametrize("ratio", [0.02, 0.38, 0.5, 0.7, 0.75, 1.0])
def test_pyramidkv_keeps_the_window_and_the_papers_share_of_each_layers_rest(ratio):
    model = random_model.make(random_model.config(windows=(None, None, 6, None)))
    cache = METHODS["pyramidkv"].score(model, kvzip.prefill(model, TEXT))
    best, window, others = snapkv_values(model, cache), SNAPKV_WINDOW, len(TEXT) - SNAPKV_WINDOW
    rest = (ratio * len(TEXT) - window) / others
    for n, layer in enumerate(kept(cache, ratio, "pyramidkv")):
        for head, tokens in enumerate(layer):
            expected = ratio * len(TEXT) if rest < 0 else window + pyramid(rest, n, 3) * others
            assert abs(len(tokens) - expected) <= 1
            highest = best[n, head].sort(descending=True, stable=True).indices[: len(tokens)]
            assert tokens == sorted(highest.tolist())
    assert len(TEXT) == 88 and 0.38 * 88 - 32 > 1  # so that ratio 0.38 has a pyramid above the window


def test_adakv_worked_by_hand():
    # The highest 8 of 16: 6 of head 0 (11..16) and 2 of head 1 (9, 10). Shared: half of 4 each, and half of 6 and 2.
    values = torch.tensor([[[16.0, 1.0, 15.0, 14.0, 13.0, 12.0, 11.0, 2.0], [10.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0]]])
    order = adaptive(values, alpha=0.5)[0].flatten().argsort(descending=True)
    assert set(order[:8].tolist()) == {0, 2, 3, 4, 5, 8, 9, 10}
    assert set(adaptive(values, alpha=0.0)[0].flatten().argsort(descending=True)[:8].tolist()) == {
        0,
        2,
        3,
        4,
        5,
        6,
        8,
        9,
    }
    equal = adaptive(values, alpha=1.0)[0].flatten().argsort(descending=True)
    assert set(equal[:8].tolist()) == {0, 2, 3, 4, 8, 9, 10, 11}


def test_adakv_is_on_snapkvs_scores_with_a_fifth_shared_equally(model):
    cache = METHODS["adakv"].score(model, kvzip.prefill(model, TEXT))
    assert torch.equal(cache.scores.values, adaptive(snapkv_values(model, cache), alpha=0.2))
    for layer in kept(cache, 0.6, "adakv"):
        assert sum(map(len, layer)) == int(0.6 * 2 * len(TEXT))
        for head in layer:
            assert set(range(len(TEXT) - SNAPKV_WINDOW, len(TEXT))) <= set(head)


@given(
    heads=st.integers(1, 5), evictable=st.integers(1, 24), alpha=st.sampled_from([0.0, 0.2, 0.5, 1.0]), data=st.data()
)
def test_adakv_gives_heads_their_mixed_budgets_at_every_size(heads, evictable, alpha, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10_000)))
    scale = torch.rand(1, heads, 1, generator=generator) ** 3
    values = torch.rand(2, heads, evictable, generator=generator) * scale
    for layer, order in zip(values, adaptive(values, alpha=alpha), strict=True):
        for n in range(1, evictable + 1):
            taken = order.flatten().sort(descending=True).indices[: heads * n]
            highest = layer.flatten().sort(descending=True).indices[: heads * n]
            counts, shares = (torch.bincount(x // evictable, minlength=heads).tolist() for x in (taken, highest))
            for head, count in enumerate(counts):
                budget = (1 - alpha) * shares[head] + alpha * n
                assert abs(count - budget) < (0.5 if alpha == 0 else 1.5)
                own = layer[head].sort(descending=True).indices[:count] + head * evictable
                assert set(own.tolist()) <= set(taken.tolist())


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
    found = expected_values(model, cache, 50, 0.03)
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
            expected = norms * (0.03 + (logits[0].softmax(-1) + logits[1].softmax(-1)) / 2)
            own = sink - cache.start
            torch.testing.assert_close(found[n, h, own:], expected.float())
            assert (found[n, h, :own] > found[n, :, own:].max()).all()


def test_expected_attention_shares_a_layers_budget_as_adakv(model):
    cache = kvzip.prefill(model, TEXT)
    scored = METHODS["expected-attention"].score(model, cache)
    values = expected_values(model, cache, 512, 0.01)
    assert torch.equal(scored.scores.values, adaptive(values, alpha=0.2))
    counts = [[len(head) for head in layer] for layer in kept(scored, 0.5, "expected-attention")]
    assert all(sum(own) == len(TEXT) and min(own) >= 0.2 * len(TEXT) // 2 for own in counts)
    assert counts[0] != counts[1]


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


@pytest.mark.parametrize("tokens", [1, 3, 33])  # fewer than a sink, than a window, and one outside it
@pytest.mark.parametrize("name", METHODS)
def test_short_contexts_are_scored_and_kept_whole_at_ratio_one(name, tokens, model):
    scored = METHODS[name].score(model, kvzip.prefill(model, "x" * tokens))
    assert scored.scores.values.isfinite().all()
    assert kept(scored, 1.0, name) == [[list(range(tokens))] * 2] * 2


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
