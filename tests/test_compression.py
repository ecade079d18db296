"""Compression: exact counts, real eviction, what is kept whatever its score, and pruned attention's law."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvzip
import random_model
from accuracy import assert_as_accurate
from kvzip.attention import decode_attend
from kvzip.cache import RaggedKV, all_ragged, empty_tail

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen."


@pytest.fixture(scope="module")
def model():
    return random_model.make(random_model.config(windows=(None, 6)))


@pytest.fixture(scope="module")
def plain():
    return random_model.make(random_model.config())


def scored(model, values=None):
    cache = kvzip.score(model, kvzip.prefill(model, TEXT))
    return cache if values is None else replace(cache, scores=replace(cache.scores, values=values))


def kept(small):
    """[L, H, S] mask of what a ragged cache holds."""
    layers = [kv for kv in small.context if isinstance(kv, RaggedKV)]
    mask = torch.zeros(len(layers), len(layers[0].offsets) - 1, small.context_length, dtype=torch.bool)
    for n, kv in enumerate(layers):
        for h, (a, b) in enumerate(zip(kv.offsets[:-1].tolist(), kv.offsets[1:].tolist(), strict=True)):
            assert (kv.positions[a:b].diff() > 0).all()
            mask[n, h, kv.positions[a:b].long()] = True
    return mask


@given(ratio=st.floats(0.001, 1.0), level=st.sampled_from(["pair", "layer", "uniform", "head"]), ties=st.booleans())
def test_counts_are_exact(plain, ratio, level, ties):
    cache = scored(plain)
    if ties:
        cache = replace(cache, scores=replace(cache.scores, values=(cache.scores.values * 4).round()))
    layers, heads, length = cache.scores.values.shape
    small = kvzip.compress(cache, ratio, level=level)
    mask = kept(small)
    assert mask[:, :, : cache.start].all()  # the system prefix
    mask = mask[:, :, cache.start :]
    want = {
        "pair": int(ratio * (layers * heads * length)),
        "layer": int(ratio * (heads * length)) * layers,
        "uniform": int(ratio * length) * layers * heads,
        "head": int(ratio * (layers * heads)) * length,
    }[level]
    assert small.kept == want == mask.sum() and small.total == mask.numel() == cache.total
    if level == "uniform":
        assert (mask.sum(-1) == int(ratio * length)).all()
    if level == "head":
        assert ((mask.sum(-1) == 0) | (mask.sum(-1) == length)).all()


@given(a=st.floats(0.01, 1.0), b=st.floats(0.01, 1.0))
def test_smaller_ratios_keep_a_subset(plain, a, b):
    cache = scored(plain)
    less, more = (kept(kvzip.compress(cache, r)) for r in sorted((a, b)))
    assert (less <= more).all()


def test_budget_is_tokens_per_head(plain):
    cache = scored(plain)
    layers, heads, length = cache.scores.values.shape
    assert kvzip.compress(cache, budget=7.3).kept == int(7.3 * layers * heads)
    assert kvzip.compress(cache, budget=10.0 * length).kept == cache.total
    assert (kept(kvzip.compress(cache, budget=5.0, level="uniform"))[:, :, cache.start :].sum(-1) == 5).all()


def test_threshold_keeps_scores_at_and_above_it(plain):
    cache = scored(plain)
    value = cache.scores.values.flatten().sort().values[40].item()
    mask = kept(kvzip.compress(cache, threshold=value))[:, :, cache.start :]
    assert torch.equal(mask, cache.scores.values >= value)


@given(span=st.tuples(st.integers(0, 20), st.integers(0, 20)).map(sorted), rows=st.integers(0, 9))
def test_protected_and_minimum_rows_come_first(plain, span, rows):
    cache = scored(plain)
    values = cache.scores.values
    small = kvzip.compress(cache, 0.5, protect=[tuple(span)], min_rows=rows)
    mask = kept(small)[:, :, cache.start :]
    assert mask[:, :, span[0] : span[1]].all()
    top = values.sort(dim=-1, descending=True, stable=True).indices[..., :rows]
    assert mask.gather(-1, top).all()
    assert small.kept == int(0.5 * cache.total)


@given(ratio=st.floats(0.01, 1.0), tokens=st.integers(1, 4), softcap=st.sampled_from([None, 2.0]))
def test_pruned_attention_equals_dense_attention_with_the_rest_masked(ratio, tokens, softcap):
    config = random_model.config(windows=(None, 6), attn_softcap=softcap)
    model = random_model.make(config, dtype=torch.bfloat16)
    cache = scored(model)
    small = kvzip.compress(cache, ratio)
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(2, n, tokens, 8, generator=generator).bfloat16() for n in (4, 2, 2))
    tail = empty_tail(small.context, 2, tokens + 3, dtype=torch.bfloat16)
    for x in (*tail.k, *tail.v):
        x.fill_(torch.nan)
    got = decode_attend(config, all_ragged(small.context), tail)(0, q, k, v)

    def dense(dtype):
        kv = cache.layers[0]
        keys, values = (
            torch.cat([a.expand(2, -1, -1, -1), b], dim=2).to(dtype).repeat_interleave(2, 1)
            for a, b in ((kv.k, k), (kv.v, v))
        )
        logits = q.to(dtype) @ keys.mT * config.attn_scale
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        seen = torch.cat([kept(small)[0][:, None].expand(2, tokens, -1), causal.expand(2, -1, -1)], dim=-1)
        logits = logits.masked_fill(~seen.repeat_interleave(2, 0), -torch.inf)
        return logits.softmax(-1) @ values

    assert_as_accurate(got, dense(torch.float64), dense(torch.bfloat16))


def test_eviction_is_real(model):
    cache = scored(model)
    row = 2 * 8 * 4  # K and V of one token of one head: D=8, float32
    window = 2 * 6 * row
    ids = cache.token_ids.nbytes
    assert kvzip.nbytes(cache) == cache.length * 2 * row + window + ids
    small = kvzip.compress(cache, 0.3)
    rows = small.kept + 2 * cache.start
    metadata = rows * 4 + 3 * 4 + small.context[0].schedule.levels[0].bounds.untyped_storage().nbytes()
    assert kvzip.nbytes(small) == rows * row + window + ids + metadata

    dense = [weakref.ref(t) for kv in cache.layers[:1] for t in (kv.k.untyped_storage(), kv.v.untyped_storage())]
    kvzip.compress(cache, 0.9)  # the dense cache is still valid
    del cache
    gc.collect()
    assert all(ref() is None for ref in dense)
    assert kvzip.generate(model, small, "Who?", max_tokens=3).token_ids


def test_consume_frees_layers_and_says_so_afterwards(model):
    cache = scored(model)
    want = kvzip.compress(cache, 0.4)
    dense = weakref.ref(cache.layers[0].k.untyped_storage())
    small = kvzip.compress(cache, 0.4, consume=True)
    gc.collect()
    assert dense() is None
    assert torch.equal(small.context[0].k, want.context[0].k)
    for call in (
        lambda: kvzip.compress(cache, 0.4),
        lambda: kvzip.score(model, cache),
        lambda: kvzip.generate(model, cache, "a"),
    ):
        with pytest.raises(ValueError, match=r"freed by compress\(consume=True\)"):
            call()


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_contexts_are_smaller_and_within_half_a_step(model, bits):
    cache = scored(model)
    wide, packed = kvzip.compress(cache, 0.5), kvzip.compress(cache, 0.5, bits=bits)
    assert torch.equal(kept(wide), kept(packed)) and wide.kept == packed.kept
    for name in ("k", "v"):
        want, got = getattr(wide.context[0], name), getattr(packed.context[0], name)
        assert got.codes.nbytes == want.numel() * bits // 8
        error = (kvzip.ops.dequantize(got) - want).abs()
        assert (error <= got.scale.float() / 2 * (1 + 1e-3) + 1e-6).all()
    assert kvzip.generate(model, packed, ["Who?", "x"], max_tokens=4)
    with pytest.raises(ValueError, match="bits of 8 or 4"):
        kvzip.compress(cache, 0.5, bits=3)


def test_bad_input_is_named(plain):
    cache = scored(plain)
    for ratio in (0.0, -0.1, 1.01, float("nan")):
        with pytest.raises(ValueError, match="0 < ratio <= 1"):
            kvzip.compress(cache, ratio)
    with pytest.raises(ValueError, match=r"exactly one of ratio, budget and threshold.*ratio=0.3"):
        kvzip.compress(cache)
    with pytest.raises(ValueError, match="exactly one"):
        kvzip.compress(cache, 0.3, budget=4.0)
    with pytest.raises(ValueError, match=r"call kvzip.score"):
        kvzip.compress(kvzip.prefill(plain, TEXT), 0.3)
    values = cache.scores.values.clone()
    values[0, 1, 3] = torch.nan
    for options in ({"ratio": 0.3}, {"threshold": 0.1}, {"ratio": 0.3, "min_rows": 2}, {"ratio": 0.3, "level": "head"}):
        with pytest.raises(ValueError, match="without NaN"):
            kvzip.compress(scored(plain, values), **options)
    with pytest.raises(ValueError, match="level 'pair', 'layer', 'uniform' or 'head', got 'token'"):
        kvzip.compress(cache, 0.3, level="token")
    with pytest.raises(ValueError, match=r"at most 29 protected and minimum rows.*got 80"):
        kvzip.compress(cache, 0.1, protect=[(0, 20)])
    with pytest.raises(ValueError, match=r"protected spans within \[0, 73\]"):
        kvzip.compress(cache, 0.5, protect=[(3, 90)])
