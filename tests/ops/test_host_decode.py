"""Decoding on a CPU: it obeys the accuracy rule wherever it stands in for the reference, and gives way when forced."""

import importlib
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decode import SHAPES, make, split, widen

import kvzip
import random_model
from accuracy import assert_as_accurate
from kvzip.ops import decode
from kvzip.ops.decode import decode_reference
from kvzip.ops.host_decode import decode_host, host_takes

DECODE = importlib.import_module("kvzip.ops.decode")  # `kvzip.ops.decode` is the function
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPS = ("decode_{}", "linear_{}", "rms_norm_{}", "project_{}")  # functions, {} being the backend
HOST = SHAPES | {"softcap": st.none()}


@settings(max_examples=120)
@given(D=st.sampled_from([16, 64, 80]), dtype=st.sampled_from(DTYPES), bits=st.sampled_from([None, 8, 4]), **HOST)
def test_it_is_as_accurate_as_the_reference(seed, B, G, T, lengths, R, softcap, window, bias, D, dtype, bits):
    B, T = (B, T) if window is None else (1, 1)
    channels = seed % 2 == 0
    inputs = make(seed, B, len(lengths), G, T, D, lengths, R, dtype, bits, channels, device="cpu", bias=bias)
    options = {"scale": D**-0.5, "softcap": softcap, "window": window}
    assert host_takes(inputs["q"], softcap=softcap, window=window)
    head, rest = split(inputs)
    got, plain = (run(*head, **rest, **options) for run in (decode_host, decode_reference))
    head, rest = split({name: widen(x, inputs["offsets"]) for name, x in inputs.items()})
    exact = decode_reference(*head, **rest, **options)
    assert_as_accurate(got[0], exact[0], plain[0])
    # Of 16-bit rows torch's own exponentials are good to about 20 bits; their log-sum-exp weighs 16-bit outputs only.
    assert_as_accurate(got[1].to(dtype), exact[1], plain[1].to(dtype))


@given(where=st.sampled_from(["q", "k", "tail k", "tail v"]), T=st.sampled_from([1, 3]), dtype=st.sampled_from(DTYPES))
def test_a_nan_comes_out_and_stays_in_its_question(where, T, dtype):
    inputs = make(0, 2, 2, 2, T, 16, [9, 40], 5, dtype, device="cpu")
    inputs["tail"] = (*(x.nan_to_num(0.5) for x in inputs["tail"][:2]), torch.full_like(inputs["tail"][2], 5))
    rows = inputs["tail"]["kv".index(where[-1])] if where.startswith("tail") else inputs[where]
    broken = torch.zeros(2, 4, T, dtype=torch.bool)
    if where == "q":
        rows[0, 0, 0, 3] = math.nan
        broken[0, 0, 0] = True
    elif where == "k":
        rows[3, 3] = math.nan
        broken[:, :2] = True
    else:
        rows[0, 0, 1, 3] = math.nan
        broken[0, :2] = True
    head, rest = split(inputs)
    out, lse = decode_host(*head, **rest, scale=0.3)
    assert torch.equal(out.isnan().any(-1), broken)
    assert torch.equal(lse.isnan(), broken & (where[-1] != "v"))


@pytest.mark.parametrize("tail", [0, 700])
def test_many_tokens_go_through_the_reference_in_blocks(tail, monkeypatch):
    inputs = make(2, 1, 2, 1, 1100, 8, [5, 9], tail, torch.float32, device="cpu")
    if tail:
        inputs["tail"] = (*(x.nan_to_num(0.0) for x in inputs["tail"][:2]), torch.full_like(inputs["tail"][2], tail))
    head, rest = split(inputs)
    sizes, run = [], decode_reference
    monkeypatch.setattr(DECODE, "decode_reference", lambda q, *a, **o: sizes.append(q.shape[2]) or run(q, *a, **o))
    got = decode(*head, **rest, scale=0.4, softcap=2.0)
    assert sizes == [512, 512, 76]
    plain = run(*head, **rest, scale=0.4, softcap=2.0)
    head, rest = split({name: widen(x, inputs["offsets"]) for name, x in inputs.items()})
    exact = run(*head, **rest, scale=0.4, softcap=2.0)
    for actual, truth, baseline in zip(got, exact, plain, strict=True):
        assert_as_accurate(actual, truth, baseline)


def counting(calls: Counter[str], op: str, run):
    def counted(*args, **options):
        calls[op] += 1
        return run(*args, **options)

    return counted


def forced(monkeypatch, backend: str) -> Counter[str]:
    """Forces a backend, and returns the calls of its functions, which are counted from now on by op."""
    calls: Counter[str] = Counter()
    folder = "kvzip.ops" if backend == "reference" else "kvzip.ops.triton"
    for op in OPS:
        file = "norm" if op.startswith("rms") else op.split("_")[0]
        module, name = importlib.import_module(f"{folder}.{file}"), op.format(backend)
        monkeypatch.setattr(module, name, counting(calls, op, getattr(module, name)))
    monkeypatch.setattr(DECODE, "decode_host", lambda *a, **o: pytest.fail("the host's decoding was not forced"))
    monkeypatch.setenv("KVZIP_BACKEND", backend)
    return calls


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_forced_backend_runs_every_op_of_every_layer_and_token(backend, monkeypatch):
    if backend == "triton":
        pytest.importorskip("triton")
    config = random_model.config(head_dim=16, windows=(6, None))
    model = random_model.make(config)
    cache = kvzip.compress(kvzip.score(model, kvzip.prefill(model, "Call me Ishmael. Some years ago")), 0.5)
    free = kvzip.generate(model, cache, "Who?", max_tokens=2, template=False)
    calls = forced(monkeypatch, backend)
    answer = kvzip.generate(model, cache, "Who?", max_tokens=2, template=False)
    assert answer.token_ids == free.token_ids
    passes = len(free.token_ids)  # at least: one a token
    least = {"decode_{}": 1, "project_{}": 1, "linear_{}": 3}  # of each layer and pass
    assert all(calls[name] >= times * len(config.layers) * passes for name, times in least.items()), calls
    assert calls["rms_norm_{}"] >= passes


def test_a_forced_reference_decodes_what_is_folded_and_streamed(monkeypatch):
    model = random_model.make(random_model.config())
    document = "Call me Ishmael. Some years ago, never mind how long precisely. " * 4
    free = kvzip.prefill_compressed(model, document, ratio=0.5, segment=80)
    calls = forced(monkeypatch, "reference")
    cache = kvzip.prefill_compressed(model, document, ratio=0.5, segment=80)
    assert calls["decode_{}"]
    assert [kv.offsets.tolist() for kv in cache.context] == [kv.offsets.tolist() for kv in free.context]
    for step in (
        lambda: kvzip.extend(model, cache, "More of it."),
        lambda: kvzip.ask(model, cache, "Who?", max_tokens=2),
        lambda: kvzip.fold(model, kvzip.ask(model, cache, "Who?", max_tokens=2)[1], ratio=0.5),
    ):
        calls.clear()
        step()
        assert calls["decode_{}"]
