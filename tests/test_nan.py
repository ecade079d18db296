"""A NaN in a query or a key comes out of attention on the host: torch's own passes over it where keys are few."""

import functools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvzip
import random_model
from kvzip.attention import causal_attention, decode_attend, window_attention
from kvzip.cache import Tail, all_ragged

CONFIG = random_model.config(head_dim=16, attn_scale=0.25)
HEADS, GROUP, WIDTH = CONFIG.num_kv_heads, CONFIG.num_heads // CONFIG.num_kv_heads, CONFIG.head_dim
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


def rows(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


@given(
    where=st.sampled_from("qk"),
    tokens=st.sampled_from([1, 3, 7, 40]),
    past=st.sampled_from([0, 1, 5, 60]),
    place=st.integers(0, 99),
    softcap=st.sampled_from([None, 5.0]),
    dtype=DTYPES,
)
def test_of_a_chunk_and_what_comes_before_it(where, tokens, past, place, softcap, dtype):
    q, k, v = (rows(n, 1, h, past + tokens, dtype=dtype) for n, h in enumerate((HEADS * GROUP, HEADS, HEADS)))
    broken = torch.zeros(HEADS * GROUP, tokens, dtype=torch.bool)
    if where == "q":
        at = place % tokens
        q[0, 1, past + at, 3] = math.nan
        broken[1, at] = True
    else:
        at = place % (past + tokens)
        k[0, 0, at, 3] = math.nan
        broken[:GROUP, max(0, at - past) :] = True
    out, lse = causal_attention(
        q[:, :, past:],
        [k[:, :, :past]],
        [v[:, :, :past]],
        k[:, :, past:],
        v[:, :, past:],
        replace(CONFIG, attn_softcap=softcap),
    )
    assert torch.equal(lse[0].isnan(), broken)
    assert torch.equal(out[0].isnan().all(-1), broken) and torch.equal(out[0].isnan().any(-1), broken)


@given(
    where=st.sampled_from("qk"),
    tokens=st.sampled_from([1, 2, 30]),
    before=st.sampled_from([0, 3]),
    window=st.sampled_from([1, 2, 5, 200]),
    dtype=DTYPES,
)
def test_of_a_window(where, tokens, before, window, dtype):
    q, k, v = (rows(n, 1, h, before + tokens, dtype=dtype) for n, h in enumerate((HEADS * GROUP, HEADS, HEADS)))
    q = q[:, :, before:].clone()
    (q if where == "q" else k)[0, 0, -1, 3] = math.nan
    out = window_attention(q, k, v, window, CONFIG)[0]
    assert out[: 1 if where == "q" else GROUP, -1].isnan().all()
    assert not out[GROUP:].isnan().any()


@functools.cache
def compressed(ratio, dtype):
    """A window layer and a global one, some of its heads empty at a low ratio."""
    config = replace(CONFIG, layers=random_model.config(windows=(4, None)).layers)
    model = random_model.make(config, dtype=dtype)
    dense = kvzip.prefill(model, "Call me Ishmael.", template=False)
    return config, kvzip.compress(kvzip.score(model, dense), ratio)


@given(
    where=st.sampled_from(["q", "k", "context"]),
    tokens=st.sampled_from([1, 3]),
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    ratio=st.sampled_from([0.05, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    window=st.booleans(),
)
def test_of_a_step_of_decoding(where, tokens, lengths, ratio, dtype, window):
    """Rows of a tail that are not set hold NaN too, and none of it comes out."""
    config, cache = compressed(ratio, dtype)
    context = list(all_ragged(cache.context))
    layer, batch = 0 if window else 1, len(lengths)
    q, k, v = (rows(n, batch, h, tokens, dtype=dtype) for n, h in enumerate((HEADS * GROUP, HEADS, HEADS)))
    past = [rows(n, batch, HEADS, 9, dtype=dtype) for n in range(2)]
    for x in past:
        x.masked_fill_((torch.arange(9) >= torch.tensor(lengths)[:, None])[:, None, :, None], math.nan)
    broken = torch.zeros(batch, HEADS * GROUP, tokens, dtype=torch.bool)
    if where == "q":
        q[-1, 1, -1, 3] = math.nan
        broken[-1, 1, -1] = True
    elif where == "k":
        k[-1, 1, 0, 3] = math.nan
        broken[-1, GROUP:] = True
    else:
        kv = context[layer]
        keys, own = kv.k.clone(), int(kv.offsets[1])
        keys[max(0, own - 1) : own] = math.nan  # the last of the first head, next to the tail
        context[layer] = replace(kv, k=keys)
        broken[:, :GROUP] = own > 0
        if window:  # four rows, this token's own among them
            seen = torch.tensor(lengths)[:, None] + torch.arange(tokens) < 3
            broken[:, :GROUP] = seen[:, None]
    tail = Tail(*(tuple(x.clone() for _ in range(2)) for x in past), torch.tensor(lengths).int())
    attend = decode_attend(config, context, tail)
    attend(0, q.nan_to_num(), k.nan_to_num(), v) if layer else None
    out = attend(layer, q, k, v)
    assert torch.equal(out.isnan().any(-1) & broken, broken)
    if tokens == 1:  # of several, one that comes before a NaN key may have it from the rows of its own pass
        assert torch.equal(out.isnan().any(-1), broken)


@pytest.mark.parametrize("method", ["kvzip", "kvzip+", "logit"])
@pytest.mark.parametrize("scope", ["chunk", "context"])
def test_of_a_model_that_overflows_no_score_is_a_number(method, scope):
    model = random_model.make(random_model.config())
    model.weights.layers[0].qkv[0] = math.nan
    cache = kvzip.score(model, kvzip.prefill(model, "Call me Ishmael."), method=method, scope=scope)
    with pytest.raises(ValueError, match="without NaN"):
        kvzip.compress(cache, 0.5)
