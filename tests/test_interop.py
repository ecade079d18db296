"""Caches to and from Transformers: what the one prefilled, the other continues, greedily, with the same tokens."""

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, StaticCache

import kvzip
import random_model
import tiny_models
from accuracy import assert_as_accurate
from kvzip.inputs import prefix_ids, prompt_of
from kvzip.prompts import ChatTemplate
from plain_kvzip import cache_argument

TEXT = "Mr. and Mrs. Dursley were proud to say that they were perfectly normal, thank you very much."
QUERY = " Were they?"
STEPS = 10
CONFIGS = {
    "llama3": tiny_models.llama(vocab_size=260, rope_parameters=tiny_models.LLAMA3_SCALING),
    "qwen3": tiny_models.qwen3(vocab_size=260),
    "gemma2": tiny_models.gemma2(vocab_size=260),
    "gemma3": tiny_models.gemma3(vocab_size=260),
}


@pytest.fixture(scope="module", params=CONFIGS)
def models(request, tmp_path_factory):
    """Transformers' model and ours of the same weights, with a tokenizer of bytes."""
    path = tmp_path_factory.mktemp(request.param)
    config = CONFIGS[request.param]
    config.max_position_embeddings = 512
    theirs = tiny_models.build(config)
    theirs.save_pretrained(path)
    ours = kvzip.load(path, dtype=torch.float32, device="cpu")
    chat = ChatTemplate(random_model.TEMPLATE)
    return theirs, replace(ours, tokenizer=random_model.tokenizer(), template=chat, stop_ids=())


@pytest.fixture(scope="module")
def dense(models):
    return kvzip.score(models[1], kvzip.prefill(models[1], TEXT))


def prefilled(theirs, ids, **options):
    cache = DynamicCache(**options)
    with torch.no_grad():
        theirs(ids[None], use_cache=True, **{cache_argument(theirs): cache})
    return cache


def continued(theirs, converted, length, ids):
    """Greedy tokens of Transformers after `ids`, as the docstring of `to_transformers` says."""
    count = len(ids)
    positions = torch.arange(length, length + count)[None]
    seen = torch.ones(1, length + count, dtype=torch.long)
    out = theirs.generate(
        torch.tensor([ids]),
        **{cache_argument(theirs): converted},
        position_ids=positions,
        attention_mask=seen,
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        do_sample=False,
    )
    return out[0, count:].tolist()


def ours_continued(model, cache):
    return kvzip.generate(model, cache, QUERY, max_tokens=STEPS, template=False).token_ids


def query(model):
    return model.tokenizer.text.encode(QUERY).ids


@pytest.mark.parametrize("sliding", [True, False])
def test_a_context_that_transformers_prefilled_is_ours_bit_for_bit(models, dense, sliding):
    theirs, model = models
    cache = prefilled(theirs, dense.token_ids, **({"config": theirs.config} if sliding else {}))
    taken = kvzip.from_transformers(model, cache, dense.token_ids)
    assert (taken.start, taken.length, taken.chat) == (dense.start, dense.length, True)
    for layer, kv in zip(cache.layers, taken.layers, strict=True):
        rows = kv.k.shape[2]
        assert torch.equal(layer.keys[:, :, -rows:], kv.k) and torch.equal(layer.values[:, :, -rows:], kv.v)
    assert (
        ours_continued(model, taken)
        == ours_continued(model, dense)
        == continued(theirs, cache, dense.length, query(model))
    )
    scored = kvzip.score(model, taken)
    wide = replace(
        kvzip.load(model.source, dtype=torch.float64, device="cpu"), tokenizer=model.tokenizer, template=model.template
    )
    exact = kvzip.score(wide, kvzip.prefill(wide, TEXT)).scores.values
    assert_as_accurate(scored.scores.values, exact.double(), dense.scores.values)
    assert kvzip.compress(scored, 0.3).kept == kvzip.compress(dense, 0.3).kept


def test_a_conversation_that_transformers_began_goes_on(models):
    """A prompt with a question, an answer of 6 tokens of which its cache holds 5, then a question of ours."""
    theirs, model = models
    say = model.tokenizer.control.encode("<|end|><|assistant|>").ids
    close = model.tokenizer.control.encode(prompt_of(model).separator).ids
    prompt = [*prefix_ids(model), *model.tokenizer.text.encode(TEXT + "\n\nWhy?").ids, *say]
    cache = DynamicCache(config=theirs.config)
    options = {cache_argument(theirs): cache, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    out = theirs.generate(torch.tensor([prompt]), **options)[0]
    taken = kvzip.from_transformers(model, cache, out[:-1])
    turn = kvzip.extend(model, taken, torch.cat([out[-1:], torch.tensor(close)]))
    asked = model.tokenizer.text.encode("Were they?").ids + say
    expected = theirs.generate(
        torch.cat([turn.token_ids, torch.tensor(asked)])[None],
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        do_sample=False,
    )[0, -STEPS:]
    assert kvzip.generate(model, turn, "Were they?", max_tokens=STEPS).token_ids == expected.tolist()
    small = kvzip.compress(kvzip.score(model, taken), 0.5)
    assert small.kept == int(0.5 * small.total) and small.context_length == len(out) - 1


@pytest.mark.parametrize("kind", ["dense", "uniform", "turn", "folded", "mixed"])
def test_transformers_continues_a_uniform_cache_with_the_same_tokens(models, dense, kind):
    theirs, model = models
    cache = dense
    if kind != "dense":
        cache = kvzip.compress(dense, 0.5, level="uniform", bits=(8, 4) if kind == "mixed" else None)
    if kind in ("turn", "folded"):
        _, cache = kvzip.ask(model, cache, "Why?", max_tokens=4)
    if kind == "folded":
        cache = kvzip.fold(model, cache)
    converted = kvzip.to_transformers(model, cache)
    expected = continued(theirs, converted, len(cache.token_ids), query(model))
    assert expected == ours_continued(model, cache)
    if kind == "uniform":
        rows = dense.start + int(0.5 * len(TEXT))
        assert {x.keys.shape[2] for x in kvzip.to_transformers(model, cache).layers if not x.is_sliding} == {rows}
        free = continued(theirs, kvzip.to_transformers(model, cache), rows, query(model))
        if not any(spec.window for spec in model.config.layers):  # there the windows say most of the answer
            assert free != expected, "rows taken for positions give another answer"


def test_there_and_back_is_the_same_cache(models, dense):
    _, model = models
    back = kvzip.from_transformers(model, kvzip.to_transformers(model, dense), dense.token_ids)
    for a, b in zip(dense.layers, back.layers, strict=True):
        rows = b.k.shape[2]
        assert torch.equal(a.k[:, :, -rows:], b.k) and torch.equal(a.v[:, :, -rows:], b.v)
    assert back.fingerprint == dense.fingerprint and torch.equal(back.token_ids, dense.token_ids)


def test_what_does_not_fit_is_named(models, dense):
    theirs, model = models
    with pytest.raises(ValueError, match=r"heads of one length in all layers, got \d+ to \d+ rows.*level='uniform'"):
        kvzip.to_transformers(model, kvzip.compress(dense, 0.3))
    with pytest.raises(ValueError, match="got one of another"):
        kvzip.to_transformers(replace(model, checkpoint="0" * 32), dense)
    cache = prefilled(theirs, dense.token_ids)
    with pytest.raises(ValueError, match=r"in layer \d, got \[1, 2, "):
        kvzip.from_transformers(model, cache, dense.token_ids[:-1])
    with pytest.raises(ValueError, match=r"in torch\.float32"):
        cache.layers[0].values = cache.layers[0].values.double()
        kvzip.from_transformers(model, cache, dense.token_ids)
    with pytest.raises(ValueError, match="expected tokens that begin with the chat prefix"):
        kvzip.from_transformers(model, cache, dense.token_ids[1:])
    with pytest.raises(TypeError, match=r"transformers\.DynamicCache, got StaticCache"):
        kvzip.from_transformers(model, StaticCache(theirs.config, 8), dense.token_ids)
    cache.layers.pop()
    with pytest.raises(ValueError, match=r"cache of \d layers, as the model has, got \d"):
        kvzip.from_transformers(model, cache, dense.token_ids)
