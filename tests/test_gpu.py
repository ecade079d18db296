"""The stages on a GPU: as accurate as plain PyTorch in the same dtype on the CPU, and memory that really falls."""

import gc
from dataclasses import replace

import pytest
import torch

import kvzip
import random_model
from accuracy import assert_as_accurate
from kvzip.attention import decode_attend
from kvzip.cache import RaggedKV, all_ragged, as_ragged, empty_tail

pytestmark = pytest.mark.gpu

TEXT = "All happy families are alike; each unhappy family is unhappy in its own way. " * 6
SHAPES = {
    "plain": {},
    "window": {"windows": (37, None, None)},
    "softcap": {"windows": (37, None, None), "attn_softcap": 5.0},
}


def config(shape):
    sizes = {"head_dim": 64, "hidden_size": 128, "attn_scale": 0.125, "windows": (None, None, None)}
    return random_model.config(**{**sizes, **SHAPES[shape]})


def stages(model, scope):
    """Keys and values of the prefill, scores, and the hidden states of two questions over the whole ragged cache."""
    cache = kvzip.score(model, kvzip.prefill(model, TEXT, chunk=100), chunk=150, scope=scope)
    pairs = torch.cat([x.flatten() for kv in cache.layers for x in (kv.k, kv.v)])
    ragged = as_ragged(cache)
    tail = empty_tail(ragged.context, 2, 7, dtype=model.dtype)
    for x in (*tail.k, *tail.v):
        x.fill_(torch.nan)
    ids = torch.arange(10, device=model.device).reshape(2, 5)
    positions = torch.arange(cache.length, cache.length + 5, device=model.device)
    with torch.no_grad():
        hidden = kvzip.models.forward(
            model, ids, positions, decode_attend(model.config, all_ragged(ragged.context), tail)
        )
    return {"pairs": pairs.cpu(), "scores": cache.scores.values.cpu(), "hidden": hidden.cpu()}


@pytest.mark.parametrize("scope", ["context", "chunk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_stages_are_as_accurate_as_on_the_cpu(shape, dtype, scope):
    exact = stages(random_model.make(config(shape), dtype=torch.float64), scope)
    plain = stages(random_model.make(config(shape), dtype=dtype), scope)
    got = stages(random_model.make(config(shape), dtype=dtype, device="cuda"), scope)
    for name in exact:
        assert_as_accurate(got[name], exact[name].double(), plain[name])


@pytest.mark.parametrize("shape", SHAPES)
def test_answers_are_those_of_the_cpu(shape):
    answers = []
    for device in ("cpu", "cuda"):
        model = replace(random_model.make(config(shape), device=device), stop_ids=())
        cache = kvzip.score(model, kvzip.prefill(model, TEXT))
        queries = ["Who is unhappy?", "x"]
        options = {"max_tokens": 12, "template": False}
        full = kvzip.generate(model, cache, queries, **options)
        assert kvzip.generate(model, kvzip.compress(cache, 1.0), queries, **options) == full
        small = kvzip.compress(cache, 0.4)
        assert [kvzip.generate(model, small, q, **options) for q in queries] == kvzip.generate(
            model, small, queries, **options
        )
        answers.append((full, kvzip.generate(model, small, queries, **options)))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_conversation_is_that_of_the_cpu(shape, bits, tmp_path):
    """Turns, folds and a saved file; which half of a tail is kept may differ by a rounding, how many may not."""
    found = []
    for device in ("cpu", "cuda"):
        model = replace(random_model.make(config(shape), device=device), stop_ids=())
        cache = kvzip.compress(kvzip.score(model, kvzip.prefill(model, TEXT)), 0.5, bits=bits)
        first, cache = kvzip.ask(model, cache, "Who is unhappy?", max_tokens=8)
        folded = kvzip.fold(model, cache)
        second, cache = kvzip.ask(model, folded, "And how?", max_tokens=8)
        half = kvzip.fold(model, cache, 0.5, chunk=15)
        kvzip.save(half, tmp_path / "half.kvz", overwrite=True)
        back = kvzip.load_cache(tmp_path / "half.kvz", model=model)
        assert all(
            torch.equal(a.positions, b.positions)
            for a, b in zip(half.context, back.context, strict=True)
            if isinstance(a, RaggedKV)
        )
        assert kvzip.generate(model, back, "Why?", max_tokens=8) == kvzip.generate(model, half, "Why?", max_tokens=8)
        found.append((first, second, half.kept, half.total, half.token_ids.tolist()))
    assert found[0] == found[1]


def test_memory_falls_when_the_dense_cache_goes():
    model = random_model.make(replace(config("plain"), max_length=1 << 20), dtype=torch.bfloat16, device="cuda")
    ids = torch.randint(256, (60_000,), generator=torch.Generator().manual_seed(0))
    cache = kvzip.score(model, kvzip.prefill(model, ids, chunk=8192), scope="chunk")
    dense = sum(x.nbytes for kv in cache.layers for x in (kv.k, kv.v))
    with_dense = torch.cuda.memory_allocated()
    small = kvzip.compress(cache, 0.3)
    added = torch.cuda.memory_allocated() - with_dense
    assert abs(added - kvzip.nbytes(small)) < 1e6  # the allocator rounds
    del cache
    gc.collect()
    assert abs(with_dense + added - torch.cuda.memory_allocated() - dense) < 1e6
    assert kvzip.generate(model, small, "Why?", max_tokens=3).token_ids


def test_decoding_never_waits_for_the_device():
    model = random_model.make(config("window"), dtype=torch.bfloat16, device="cuda")
    small = kvzip.compress(kvzip.score(model, kvzip.prefill(model, TEXT)), 0.4)
    tail = empty_tail(small.context, 3, 8, dtype=model.dtype)
    ids = torch.ones(3, 1, dtype=torch.long, device="cuda")
    positions = torch.tensor([small.context_length], device="cuda")
    attend = decode_attend(model.config, all_ragged(small.context), tail)
    with torch.no_grad():
        kvzip.models.forward(model, ids, positions, attend)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            kvzip.models.forward(model, ids, positions, attend)
        finally:
            torch.cuda.set_sync_debug_mode("default")
