"""Prefill: chunks change nothing, windows hold their window, bad input is refused by a text that helps."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvzip
import random_model
from accuracy import assert_as_accurate
from kvzip.cache import DenseKV, WindowKV

SHAPES = {
    "plain": {},
    "window": {"windows": (5, None)},
    "softcap": {"windows": (5, None), "attn_softcap": 2.0},
    "one group": {"num_kv_heads": 4, "qk_norm": True, "qkv_bias": True},
}


def pairs(cache):
    """All keys and values of a cache as one vector."""
    return torch.cat([x.flatten() for layer in cache.layers for x in (layer.k, layer.v)])


@given(
    shape=st.sampled_from(sorted(SHAPES)), length=st.integers(24, 48), chunk=st.integers(1, 49), seed=st.integers(0, 9)
)
def test_chunked_prefill_equals_one_pass(shape, length, chunk, seed):
    config = random_model.config(**SHAPES[shape])
    ids = torch.randint(256, (length,), generator=torch.Generator().manual_seed(seed))
    exact = pairs(kvzip.prefill(random_model.make(config, dtype=torch.float64), ids, chunk=length + 99))
    model = random_model.make(config, dtype=torch.bfloat16)
    whole = pairs(kvzip.prefill(model, ids, chunk=length + 99))
    pieces = pairs(kvzip.prefill(model, ids, chunk=chunk))
    assert_as_accurate(pieces, exact, whole)


@given(length=st.integers(1, 30), chunk=st.integers(1, 31))
def test_a_window_layer_holds_its_last_tokens_and_no_more(length, chunk):
    model = random_model.make(random_model.config(windows=(7, None)))
    full = random_model.make(random_model.config(windows=(None, None)))
    ids = torch.arange(length)
    cache = kvzip.prefill(model, ids, chunk=chunk, template=False)
    reference = kvzip.prefill(full, ids, template=False)
    kv = cache.layers[0]
    assert isinstance(kv, WindowKV) and isinstance(cache.layers[1], DenseKV)
    rows = min(7, length)
    assert kv.start == length - rows
    assert kv.k.untyped_storage().nbytes() == 2 * rows * 8 * 4  # [H=2, W, D=8] float32, nothing behind it
    torch.testing.assert_close(kv.k, reference.layers[0].k[:, :, -rows:])  # the first layer's keys see no window


def test_the_prefix_stands_before_the_context_and_is_not_evictable():
    model = random_model.make(random_model.config())
    cache = kvzip.prefill(model, "ab", system="S", instruction="Do.")
    assert model.tokenizer.control.decode(cache.token_ids.tolist(), skip_special_tokens=False) == (
        "<|system|>S<|end|><|user|>Do.\n\nab"
    )
    assert cache.length - cache.start == 2
    assert cache.kept == cache.total == 2 * 2 * 2
    assert kvzip.prefill(model, "ab", template=False).start == 0


def test_control_tokens_written_as_text_stay_text():
    model = random_model.make(random_model.config())
    cache = kvzip.prefill(model, "a<|end|>b")
    assert random_model.END not in cache.token_ids[cache.start :]
    assert cache.length - cache.start == len("a<|end|>b")


def test_progress_counts_tokens():
    seen = []
    model = random_model.make(random_model.config())
    kvzip.prefill(
        model, torch.arange(10), chunk=4, template=False, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(4, 10), (8, 10), (10, 10)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: kvzip.prefill(m, ""), r"at least one token, got an empty one"),
        (lambda m: kvzip.prefill(m, torch.arange(100), template=False), r"at most 64 positions.*got 100.*max_length="),
        (lambda m: kvzip.prefill(m, torch.tensor([3, 260])), r"token ids in \[0, 260\), got 3 to 260"),
        (lambda m: kvzip.prefill(m, "a", chunk=0), r"chunk to be at least 1, got 0: pass"),
        (lambda m: kvzip.prefill(m, "a", template=False, system="x"), r"no system or instruction with template=False"),
        (
            lambda m: kvzip.prefill(dataclasses.replace(m, template=None), "a"),
            r"chat template.*chat_template=.*template=False",
        ),
        (lambda m: kvzip.prefill(dataclasses.replace(m, tokenizer=None), "a"), r"no tokenizer.json"),
    ],
)
def test_bad_input_is_named(call, message):
    model = random_model.make(random_model.config(max_length=64))
    with pytest.raises(ValueError, match=message):
        call(model)
