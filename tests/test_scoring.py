"""Scoring: what is read, what is written, how scopes relate, what is refused."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvzip
import random_model
from kvzip import scoring
from kvzip.options import Scoring
from kvzip.scoring import ROWS_AT_ONCE, batches, repeats, score_chunks

TEXT = "The quick brown fox jumps over the lazy dog, twice."


def test_scoring_writes_nothing_and_scores_the_context_only(model):
    cache = kvzip.prefill(model, TEXT)
    before = [(kv.k.clone(), kv.v.clone()) for kv in cache.layers]
    scored = kvzip.score(model, cache, chunk=13)
    assert cache.scores is None and scored.layers is cache.layers
    for kv, (k, v) in zip(cache.layers, before, strict=True):
        assert torch.equal(kv.k, k) and torch.equal(kv.v, v)
    scores = scored.scores
    assert scores.values.shape == (2, 2, len(TEXT)) and scores.layers == (0, 2)
    assert (scores.start, scores.stop) == (cache.start, cache.length)
    assert ((scores.values > 0) & (scores.values <= 1)).all()


def test_repeat_inputs_are_the_papers(model):
    cache = kvzip.prefill(model, TEXT)
    found = list(repeats(model, cache, chunk=20, hint=8))
    assert [(start - cache.start, stop - cache.start) for start, stop, _ in found] == [(0, 20), (20, 40), (40, 51)]
    texts = [model.tokenizer.control.decode(ids.tolist(), skip_special_tokens=False) for _, _, ids in found]
    close = "<|end|><|assistant|>"
    assert texts[0] == "\n\nRepeat the previous context exactly." + close + TEXT[:20]
    more = "\n\nRepeat the part of the previous context exactly, starting with "
    assert texts[1] == more + TEXT[12:20] + close + TEXT[20:40]
    assert texts[2] == more + TEXT[32:40] + close + TEXT[40:]


@given(windows=st.sampled_from([(None, None), (None, 6), (3, None)]), softcap=st.sampled_from([None, 3.0]))
def test_both_scopes_agree_where_one_chunk_is_the_whole_context(windows, softcap):
    model = random_model.make(random_model.config(windows=windows, attn_softcap=softcap))
    cache = kvzip.prefill(model, TEXT)
    context = kvzip.score(model, cache, chunk=100, scope="context").scores.values
    chunk = kvzip.score(model, cache, chunk=100, scope="chunk").scores.values
    torch.testing.assert_close(context, chunk)
    if windows == (None, None):  # in the first global layer queries have attended to nothing that the scope changes
        apart = kvzip.score(model, cache, chunk=17, scope="chunk").scores.values
        assert (apart - kvzip.score(model, cache, chunk=17, scope="context").scores.values).abs().max() > 1e-4


def test_neighbors_of_a_chunk_are_attended_to_and_not_scored():
    model = random_model.make(random_model.config())
    cache = kvzip.prefill(model, TEXT)
    context = kvzip.score(model, cache, chunk=17, scope="context").scores.values

    def local(neighbors):
        options = {"scope": "chunk", "method": "kvzip", "chunk": 17, "hint": 8}
        return score_chunks(model, cache, Scoring(**options), neighbors=neighbors)

    torch.testing.assert_close(local(99)[..., 34:], context[..., 34:])  # the last chunk then sees all
    torch.testing.assert_close(local(17)[..., 17:34], local(99)[..., 17:34])
    assert (local(16)[..., 17:34] - local(99)[..., 17:34]).abs().max() > 1e-5


@pytest.mark.parametrize("method", ["kvzip", "kvzip+", "logit"])
@pytest.mark.parametrize("scope", ["chunk", "context"])
def test_passes_side_by_side_score_as_one_after_the_other(scope, method, monkeypatch):
    model = random_model.make(random_model.config(windows=(None, 6, None)))
    cache = kvzip.prefill(model, TEXT)
    done = []

    def scored(at_once):
        monkeypatch.setattr(scoring, "batches", lambda sizes, most: batches(sizes, at_once))
        told = kvzip.score(model, cache, chunk=10, scope=scope, method=method, progress=lambda *x: done.append(x[0]))
        return told.scores.values

    alone, two = scored(1), scored(2)
    torch.testing.assert_close(two, alone, rtol=1e-5, atol=1e-6)
    # the first quotes no tokens and the last has one: they are alone
    assert done == [10, 20, 30, 40, 50, 51, 10, 30, 50, 51]


@given(sizes=st.lists(st.sampled_from([5, 40, 2090, 9000]), min_size=1, max_size=12), most=st.integers(1, 5))
def test_batches_are_all_passes_in_order_of_one_length_and_bounded(sizes, most):
    found = list(batches(sizes, most))
    assert [n for group in found for n in group] == list(range(len(sizes)))
    for group in found:
        assert len(group) <= most and len({sizes[n] for n in group}) == 1
        assert len(group) == 1 or len(group) * sizes[group[0]] <= ROWS_AT_ONCE
    for group, later in itertools.pairwise(found):  # none is smaller than it could be
        alike = sizes[group[0]] == sizes[later[0]]
        assert not alike or len(group) == most or (len(group) + 1) * sizes[group[0]] > ROWS_AT_ONCE


def test_the_scale_is_the_models_own():
    config = random_model.config()
    other = dataclasses.replace(config, attn_scale=config.attn_scale * 2)
    scores = [kvzip.score(m, kvzip.prefill(m, TEXT)).scores.values for m in map(random_model.make, (config, other))]
    assert (scores[0] - scores[1]).abs().max() > 1e-2


@pytest.mark.parametrize("seed", range(3))
def test_a_weight_is_never_above_one(seed):
    """Logits of hundreds: exp(logit - log-sum-exp) of a weight of 1 comes out at up to 1.0005 by itself."""
    model = random_model.make(random_model.config(attn_scale=100.0), seed=seed)
    cache = kvzip.prefill(model, TEXT)
    assert kvzip.score(model, cache, chunk=20).scores.values.max() == 1
    assert kvzip.score(model, cache, chunk=20, method="logit").scores.values.max() > 1


def test_progress_counts_context_tokens(model):
    seen = []
    kvzip.score(model, kvzip.prefill(model, TEXT), chunk=30, progress=lambda *step: seen.append(step))
    assert seen == [(30, 51), (51, 51)]


def test_bad_input_is_named(model):
    cache = kvzip.prefill(model, TEXT)
    other = random_model.make(model.config, seed=1)
    with pytest.raises(ValueError, match=r"cache of this model.*got one of another"):
        kvzip.score(other, cache)
    with pytest.raises(ValueError, match=r"scope 'context' or 'chunk', got 'all'"):
        kvzip.score(model, cache, scope="all")
    tight = random_model.make(dataclasses.replace(model.config, max_length=cache.length + 40))
    with pytest.raises(ValueError, match=rf"a cache of {cache.length} and a repeat pass of"):
        kvzip.score(tight, kvzip.prefill(tight, TEXT))
    windows_only = random_model.make(random_model.config(windows=(4, 6)))
    with pytest.raises(ValueError, match="sliding windows in all"):
        kvzip.score(windows_only, kvzip.prefill(windows_only, TEXT))
