"""The methods of `score` in every family, against the plain implementation on Transformers."""

from dataclasses import replace

import pytest
import torch

import kvzip
import plain_kvzip
import random_model
import tiny_models
from accuracy import assert_as_accurate
from kvzip import prompts
from kvzip.models import Model

SIZES = {"vocab_size": 260, "max_position_embeddings": 512}
CONFIGS = {
    "llama": tiny_models.llama(**SIZES),
    "qwen2": tiny_models.qwen2(**SIZES),
    "qwen3": tiny_models.qwen3(**SIZES),
    "gemma2": tiny_models.gemma2(**SIZES),  # windows and softcap
    "gemma3": tiny_models.gemma3(**SIZES),  # windows
}
METHODS = ("kvzip", "kvzip+", "logit")
TEXT = "Happy families are all alike; every unhappy family is unhappy in its own way."
CHUNK = 30


@pytest.fixture(scope="module", params=CONFIGS)
def both(request, tmp_path_factory):
    """The same weights in Transformers and in kvzip, with the byte tokenizer and template of `random_model`."""
    reference = tiny_models.build(CONFIGS[request.param])
    path = tmp_path_factory.mktemp(request.param)
    reference.save_pretrained(path)
    model = kvzip.load(path, dtype=torch.float32, device="cpu")
    template = prompts.ChatTemplate(random_model.TEMPLATE)
    return reference, replace(model, tokenizer=random_model.tokenizer(), template=template)


@pytest.fixture(scope="module")
def wide(both):
    """The same model in float64."""
    model = kvzip.load(both[1].source, dtype=torch.float64, device="cpu")
    return replace(model, tokenizer=both[1].tokenizer, template=both[1].template)


def encode(model: Model, text: str) -> list[int]:
    return prompts.encode_text(model.tokenizer, text)


@pytest.mark.parametrize("method", METHODS)
def test_scores_are_those_of_the_plain_implementation(both, method):
    reference, model = both
    cache = kvzip.prefill(model, TEXT)
    scores = kvzip.score(model, cache, scope="context", method=method, chunk=CHUNK).scores
    ids = cache.token_ids.tolist()
    postfix = prompts.encode_control(model.tokenizer, prompts.render(model.template).postfix)
    arguments = (ids[: cache.start], ids[cache.start :], postfix, lambda text: encode(model, text))
    plain = plain_kvzip.score(reference, *arguments, chunk=CHUNK, method=method)
    assert list(scores.layers) == plain.layers and scores.source == f"{method}-context"
    # Not `assert_as_accurate`: Transformers rounds norms, rotations and softmax to float32, so gives no float64 truth.
    spread = plain.values.max() - plain.values.min()
    assert spread > 0.01 and (scores.values - plain.values).abs().max() <= 1e-4 * spread


def test_methods_differ(both):
    _, model = both
    cache = kvzip.prefill(model, TEXT)
    kept = [kvzip.ops.select(kvzip.score(model, cache, method=m).scores.values, ratio=0.3) for m in METHODS]
    assert not any(torch.equal(kept[i], kept[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("method", METHODS)
def test_scopes_agree_where_one_chunk_is_the_whole_context(both, wide, method):
    context, chunk, exact = (
        kvzip.score(m, kvzip.prefill(m, TEXT), method=method, scope=scope).scores.values
        for m, scope in ((both[1], "context"), (both[1], "chunk"), (wide, "context"))
    )
    assert_as_accurate(chunk, exact.double(), context)  # scores are kept in float32


@pytest.mark.parametrize("method", ["kvzip+", "logit"])
def test_streamed_segments_are_scored_by_the_same_method(both, wide, method):
    _, model = both
    options = {"method": method, "chunk": CHUNK, "scope": "context"}
    got = kvzip.prefill_compressed(model, TEXT, 0.4, segment=999, **options)
    want = kvzip.compress(kvzip.score(model, kvzip.prefill(model, TEXT), **options), 0.4)
    exact = kvzip.score(wide, kvzip.prefill(wide, TEXT), **options).scores.values
    assert_as_accurate(got.scores.values, exact.double(), want.scores.values)
    assert got.kept == want.kept and got.scores.source == f"{method}-context"


def test_an_unknown_method_is_named(both):
    with pytest.raises(ValueError, match=r"method 'kvzip', 'kvzip\+' or 'logit', got 'l2'"):
        kvzip.score(both[1], kvzip.prefill(both[1], TEXT), method="l2")
