"""Where answers came from: what rows pay to tokens against plain attention, and needles that are found again."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvzip
import random_model
from kvzip.cache import RaggedKV, as_ragged
from kvzip.cache.rows import kept_mask
from kvzip.inputs import query_ids
from kvzip.sources import PASSAGE, attention_paid, find_sources, passages, texts_of

TEXT = "The tower was built in 1871. Its keeper, Inès, counted 312 steps; nobody else did.\nThe light is red. Yes."


@pytest.fixture(scope="module", params=[None, 3.0], ids=["plain", "softcap"])
def model(request):
    return random_model.make(
        random_model.config(windows=(None, 6, None), attn_softcap=request.param), dtype=torch.float64
    )


def plain(model, cache, asked, answered):
    """The docstring's formula in float64, by a forward pass that masks what was dropped."""
    ids = [*cache.token_ids.tolist(), *asked, *answered[:-1]]
    used, rows = len(cache.token_ids), len(asked) + len(answered) - 1
    kept = kept_mask(cache)
    scored = {layer: n for n, layer in enumerate(cache.scored_layers)}
    paid = torch.zeros(used, dtype=torch.float64)

    def attend(layer, q, k, v):
        group = q.shape[1] // k.shape[1]
        keys, values = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        logits = q @ keys.mT * model.config.attn_scale
        if model.config.attn_softcap is not None:
            logits = model.config.attn_softcap * torch.tanh(logits / model.config.attn_softcap)
        distance = torch.arange(len(ids))[:, None] - torch.arange(len(ids))
        seen = ((distance >= 0) & (distance < (model.config.layers[layer].window or len(ids))))[None].clone()
        if layer in scored:
            mask = torch.ones(k.shape[1], len(ids), dtype=torch.bool)
            mask[:, cache.start : cache.context_length] = kept[scored[layer]]
            late = torch.arange(len(ids)) >= cache.context_length  # what comes before was read with all pairs
            seen = seen & (mask.repeat_interleave(group, 0)[:, None] | ~late[:, None])
            logits = (
                logits
                + dense_biases(cache.context[layer], len(ids)).repeat_interleave(group, 0)[:, None] * late[:, None]
            )
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        if layer in scored:
            own = weights[0, :, -rows:, :used]
            question, answer = own[:, : len(asked) - 1], own[:, len(asked) - 1 :]
            base = 3 * question.mean(1, keepdim=True) if question.shape[1] else 0
            paid.add_((answer - base).clamp(min=0).mean(1).sum(0))
        return weights @ values

    kvzip.models.forward(model, torch.tensor([ids]), torch.arange(len(ids)), attend)
    return paid / (len(scored) * model.config.num_heads)


def dense_biases(layer, width):
    """The bias of each token in each head, [H, width]; 0 where a row has none."""
    bias, bounds = torch.zeros(layer.heads, width, dtype=torch.float64), layer.offsets.tolist()
    for h in range(layer.heads if layer.bias is not None else 0):
        rows = slice(bounds[h], bounds[h + 1])
        bias[h, layer.positions[rows].long()] = layer.bias[rows].double()
    return bias


def with_biases(cache):
    torch.manual_seed(0)
    layers = (
        replace(each, bias=torch.randn(len(each.positions))) if isinstance(each, RaggedKV) else each
        for each in cache.context
    )
    return replace(cache, context=tuple(layers))


@pytest.mark.parametrize(("ratio", "biased"), [(None, False), (0.4, False), (0.4, True)])
@pytest.mark.parametrize("query", ["Who counted?", "x"])
def test_what_is_paid_is_plain_attention(model, ratio, biased, query):
    cache = kvzip.score(model, kvzip.prefill(model, TEXT, template=False))
    cache = as_ragged(cache if ratio is None else kvzip.compress(cache, ratio))
    cache = with_biases(cache) if biased else cache
    cache = kvzip.extend(model, cache, " And so on.") if query == "x" else cache
    asked = query_ids(model, cache, [query], template=False)[0]
    answered = model.tokenizer.text.encode("Ines did").ids
    found, expected = attention_paid(model, cache, asked, answered), plain(model, cache, asked, answered)
    assert expected.min() >= 0 and expected[: cache.context_length].max() > 0
    torch.testing.assert_close(found[: cache.context_length], expected[: cache.context_length])


def test_the_sources_of_an_answer_are_parts_of_the_text_in_order_of_weight(two_layers):
    model = two_layers
    full = kvzip.score(model, kvzip.prefill(model, TEXT))
    for cache in (full, kvzip.compress(full, 0.3), kvzip.compress(full, 0.3, bits=8)):
        (one, other), alone = (
            kvzip.generate(model, cache, q, max_tokens=4, sources=2) for q in (["Who?", "How many?"], "Who?")
        )
        assert one == alone and len(one.sources) == len(other.sources) == 2
        first, second = one.sources
        assert 1 >= first.weight >= second.weight > 0
        for source in (*one.sources, *other.sources):
            assert TEXT[source.begin : source.end] == source.text != ""
            ids = cache.token_ids[source.start : source.stop].tolist()
            assert "".join(texts_of(model.tokenizer, ids)) == source.text
        assert kvzip.generate(model, cache, "Who?", max_tokens=4) == replace(one, sources=())
    every = kvzip.generate(model, full, "Who?", max_tokens=4, sources=1_000).sources
    assert sum(source.weight for source in every) == pytest.approx(1)
    answer, _ = kvzip.ask(model, full, "Who?", max_tokens=4, sources=2)
    assert answer.sources == kvzip.generate(model, full, "Who?", max_tokens=4, sources=2).sources
    assert find_sources(model, full, [1], []) == ()
    with pytest.raises(ValueError, match="sources"):
        kvzip.generate(model, full, "Who?", sources=-1)


@given(st.lists(st.sampled_from(["a", " b", ".", "\n", "? ", "", '."']), max_size=200))
def test_passages_cover_a_text_and_end_with_sentences(pieces):
    spans = list(passages(pieces))
    assert [start for start, _ in spans] == [0, *(stop for _, stop in spans)][: len(spans)]
    assert (spans[-1][1] if spans else 0) == len(pieces)
    for start, stop in spans:
        assert stop - start <= PASSAGE[1]
        for n in range(start + PASSAGE[0], stop):
            assert pieces[n - 1] not in (".", "\n", "? ", '."'), "it ends with the first long enough"
