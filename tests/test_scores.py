"""Scores as an object: kept again at any ratio, combined, saved and loaded, plotted."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvzip
import random_model
from accuracy import same_fields
from kvzip import scores as scores_of
from kvzip.cache import RaggedKV, read_header

TEXT = "Happy families are all alike; every unhappy family is unhappy in its own way. " * 2


@pytest.fixture(scope="module")
def cache(model):
    return kvzip.score(model, kvzip.prefill(model, TEXT))


def counts(small):
    return [
        [stop - start - small.start for start, stop in pairwise(layer.offsets.tolist())]
        for layer in small.context
        if isinstance(layer, RaggedKV)
    ]


def same_pairs(a, b):
    for x, y in zip(a.context, b.context, strict=True):
        assert torch.equal(x.k, y.k) and torch.equal(x.v, y.v)
        assert not isinstance(x, RaggedKV) or torch.equal(x.positions, y.positions)


WAYS = st.one_of(
    st.fixed_dictionaries(
        {"ratio": st.floats(0.05, 1.0), "level": st.sampled_from(["pair", "layer", "uniform", "head"])}
    ),
    st.fixed_dictionaries({"budget": st.floats(3, 200), "min_rows": st.integers(0, 3)}),
    st.fixed_dictionaries({"threshold": st.floats(0.001, 0.9), "protect": st.just([(3, 9)])}),
)


@settings(max_examples=9)
@given(way=WAYS)
def test_the_mask_is_what_compress_keeps(cache, way):
    mask, small = kvzip.keep_mask(cache.scores, **way), kvzip.compress(cache, **way)
    assert mask.sum(-1).tolist() == counts(small)
    kept = [layer.positions[layer.positions >= cache.start] for layer in small.context if isinstance(layer, RaggedKV)]
    assert torch.equal(torch.cat(kept), mask.flatten(0, 1).nonzero()[:, 1].int() + cache.start)


@settings(max_examples=4)
@given(ratio=st.floats(0.05, 1.0))
def test_saved_scores_compress_the_cache_as_before(model, cache, ratio, tmp_path_factory):
    path = tmp_path_factory.mktemp("scores") / "doc.scores"
    scores_of.save(cache, path, note={"chunk": 2_000})
    bare = replace(cache, scores=None)
    loaded = scores_of.load(path, bare)
    assert torch.equal(loaded.values, cache.scores.values)
    assert loaded.asked is None  # moments of queries are not saved
    assert same_fields(replace(loaded, values=cache.scores.values, asked=cache.scores.asked), cache.scores)
    same_pairs(kvzip.compress(scores_of.attach(bare, loaded), ratio), kvzip.compress(cache, ratio))
    small = kvzip.compress(cache, ratio)
    assert torch.equal(scores_of.load(path, small).values, cache.scores.values)
    assert read_header(path)["note"] == {"chunk": 2_000} and path.stat().st_size < 4 * cache.total + 2_000


@settings(max_examples=6)
@given(large=st.floats(0.3, 1.0), part=st.floats(0.05, 1.0), bits=st.sampled_from([None, 8]))
def test_a_compressed_cache_shrinks_to_what_a_smaller_ratio_keeps(model, cache, large, part, bits):
    held = kvzip.compress(cache, large, bits=bits)
    small, want = scores_of.shrink(held, large * part), kvzip.compress(cache, large * part, bits=bits)
    assert small.kept == want.kept == int(large * part * cache.total)
    for x, y in zip(small.context, want.context, strict=True):
        if isinstance(x, RaggedKV):
            assert torch.equal(x.positions, y.positions) and torch.equal(x.offsets, y.offsets)
    options = {"max_tokens": 5, "template": False}
    assert kvzip.generate(model, small, "Who?", **options) == kvzip.generate(model, want, "Who?", **options)
    streamed = kvzip.prefill_compressed(model, TEXT, large, segment=70, share="final")
    again = scores_of.shrink(streamed, large * part)
    mask = kvzip.keep_mask(streamed.scores, large * part)
    assert counts(again) == mask.sum(-1).tolist()
    assert again.context[1] is streamed.context[1]


@settings(max_examples=8)
@given(
    how=st.one_of(
        st.fixed_dictionaries({"ratio": st.floats(0.15, 0.5)}),
        st.fixed_dictionaries({"budget": st.floats(24, 70)}),
        st.fixed_dictionaries({"threshold": st.floats(0.25, 0.875, width=32)}),
    ),
    first=st.integers(0, 140),
    kind=st.sampled_from(["compressed", "streamed", "turn"]),
)
def test_shrinking_is_compressing_by_every_budget(model, cache, how, first, kind):
    span = (first, first + 12)
    if kind == "streamed":
        held = kvzip.prefill_compressed(model, TEXT, 0.6, segment=70, share="final", protect=[span])
    else:
        held = kvzip.compress(cache, 0.6, protect=[span])
        held = kvzip.ask(model, held, "Why?", max_tokens=2)[1] if kind == "turn" else held
    small = scores_of.shrink(held, **how, protect=[span])
    mask = kvzip.keep_mask(held.scores, **how, protect=[span])
    assert counts(small) == mask.sum(-1).tolist() and small.kept == mask.sum()
    positions = [kv.positions[kv.positions >= small.start] for kv in small.context if isinstance(kv, RaggedKV)]
    assert torch.equal(torch.cat(positions), mask.flatten(0, 1).nonzero()[:, 1].int() + small.start)
    assert small.tail is held.tail


def test_an_infinite_score_does_not_protect(cache):
    """It is the highest that a pair may have, and still competes: only what is protected stays whatever comes."""
    values = cache.scores.values.clone()
    values[:, :, ::3] = torch.inf
    held = replace(cache, scores=replace(cache.scores, values=values))
    small = kvzip.compress(held, 0.6)
    same_pairs(scores_of.shrink(small, 0.1), kvzip.compress(held, 0.1))
    spans = [(1, 3), (4, 6)]  # of finite scores
    packed = kvzip.compress(held, 0.6, protect=spans)
    same_pairs(scores_of.shrink(packed, 0.1, protect=spans), kvzip.compress(held, 0.1, protect=spans))


def test_what_is_gone_does_not_come_back(model, cache):
    small = kvzip.compress(cache, 0.4)
    for more in ({"ratio": 0.5}, {"budget": 80.0}):
        with pytest.raises(ValueError, match=r"expected to keep 0 \(protected\) to \d+ pairs .*gone do not come back"):
            scores_of.shrink(small, **more)
    with pytest.raises(ValueError, match=r"expected to keep 80 \(protected\) to \d+ pairs .*got 6:"):
        scores_of.shrink(kvzip.compress(cache, 0.4, protect=[(0, 20)]), 0.01, protect=[(0, 20)])
    with pytest.raises(ValueError, match="exactly one of ratio, budget, budget_bytes and threshold"):
        scores_of.shrink(small, 0.1, budget=3.0)
    with pytest.raises(ValueError, match="0 < ratio <= 1"):
        scores_of.shrink(small, 0.0)
    with pytest.raises(ValueError, match="a cache with scores, got none"):
        scores_of.shrink(replace(small, scores=None), 0.1)


def test_scores_are_tied_to_their_model_and_tokens(model, cache, tmp_path):
    path = tmp_path / "doc.scores"
    scores_of.save(cache, path)
    other = random_model.make(random_model.config(windows=(None, 6, None)), seed=1)
    with pytest.raises(ValueError, match=r"scores by the cache's model"):
        scores_of.load(path, kvzip.prefill(other, TEXT))
    with pytest.raises(ValueError, match=r"scores of this cache's tokens"):
        scores_of.load(path, kvzip.prefill(model, TEXT.replace("family", "famile")))
    longer = kvzip.prefill(model, TEXT + "!")
    with pytest.raises(ValueError, match=r"scores of this cache's tokens"):
        scores_of.load(path, longer)
    with pytest.raises(ValueError, match=r"attach them to the cache they are of"):
        scores_of.attach(longer, cache.scores)
    with pytest.raises(ValueError, match=r"a cache with scores, got none"):
        scores_of.save(longer, path)
    with pytest.raises(ValueError, match=r"use kvzip\.scores\.load"):
        kvzip.load_cache(path)
    kvzip.save(cache, tmp_path / "cache.kvz")
    with pytest.raises(ValueError, match=r"a file of scores, got one of 'DenseCache'"):
        scores_of.load(tmp_path / "cache.kvz", cache)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"got doc\.scores"):
        scores_of.load(path, cache)


@pytest.fixture(scope="module")
def several(model, cache):
    return [cache.scores, *(kvzip.score(model, cache, chunk=n, scope="context").scores for n in (40, 71))]


@given(st.permutations(range(3)))
def test_combined_scores_are_the_largest_in_any_order(cache, several, order):
    both = scores_of.combine(*(several[n] for n in order))
    assert torch.equal(both.values, torch.stack([one.values for one in several]).amax(0))
    assert torch.equal(scores_of.combine(both, both).values, both.values)
    assert same_fields(scores_of.combine(cache.scores), cache.scores)
    assert (both.layers, both.start, both.stop) == (cache.scores.layers, cache.scores.start, cache.scores.stop)
    assert "kvzip-context" in both.source and "kvzip-chunk" in both.source
    assert kvzip.compress(scores_of.attach(cache, both), 0.3).kept == int(0.3 * cache.total)


def test_scores_of_others_do_not_combine(model, cache):
    longer = kvzip.score(model, kvzip.prefill(model, TEXT + "!"))
    with pytest.raises(ValueError, match="combine scores of one cache"):
        scores_of.combine(cache.scores, longer.scores)
    with pytest.raises(ValueError, match="got none"):
        scores_of.combine()


@pytest.mark.parametrize("method", ["kvzip", "logit"])
def test_a_plot_shows_the_fractions_of_layers_and_heads(model, cache, method, tmp_path):
    pytest.importorskip("matplotlib")
    found = kvzip.score(model, cache, method=method).scores
    figure = scores_of.plot(found, 0.4, title="a document")
    heads, histogram = figure.axes[:2]
    expected = kvzip.keep_mask(found, 0.4).float().mean(-1)
    assert torch.equal(torch.as_tensor(heads.images[0].get_array().data), expected)
    assert [label.get_text() for label in heads.get_yticklabels()] == ["0", "2"]
    assert sum(bar.get_height() for bar in histogram.patches) == found.values.numel()
    figure.savefig(tmp_path / "scores.png")
    assert (tmp_path / "scores.png").stat().st_size > 5_000
