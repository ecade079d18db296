"""The decoder: used again, smaller than its questions, out of memory; and the host's attention against the op."""

import functools
import gc
from contextlib import nullcontext
from dataclasses import astuple, replace
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvzip
import kvzip.cache.memory
import random_model
from accuracy import assert_as_accurate
from kvzip import decoding, generation, ops, options
from kvzip.attention import decode_attend
from kvzip.cache import Tail, all_ragged, explain_out_of_memory, free_bytes
from kvzip.decoding import sample
from unchecked import unchecked

TEXT = "Call me Ishmael. Some years ago, never mind how long precisely."
QUERIES = ["Who?", "How long ago was it, precisely?", "x", "Why is that so?", "And then?"]
OPTIONS = {"max_tokens": 9}


@pytest.fixture(scope="module")
def model(two_layers):
    return replace(two_layers, stop_ids=())


@pytest.fixture(scope="module")
def small(model):
    return kvzip.compress(kvzip.score(model, kvzip.prefill(model, TEXT)), 0.4)


@pytest.fixture(scope="module")
@unchecked()
def alone(model, small):
    return [kvzip.generate(model, small, query, **OPTIONS) for query in QUERIES]


@unchecked()
def test_a_decoder_used_again_answers_the_same(model, small, alone):
    decoder = kvzip.Decoder(model, small, tail=80)
    for _ in range(2):
        assert [kvzip.generate(model, small, q, decoder=decoder, **OPTIONS) for q in QUERIES] == alone
    options = {"temperature": 2.0, "seed": 3, **OPTIONS}
    sampled = [kvzip.generate(model, small, QUERIES[0], decoder=d, **options) for d in (decoder, None)]
    assert sampled[0] == sampled[1] != alone[0]
    assert kvzip.generate(model, small, QUERIES[1], decoder=decoder, **OPTIONS) == alone[1]


@pytest.mark.parametrize("batch", [1, 2, 5, 7])
@unchecked()
def test_more_questions_than_rows_are_answered_in_several_batches(model, small, alone, batch):
    decoder = kvzip.Decoder(model, small, batch=batch, tail=80)
    pieces = [""] * len(QUERIES)

    def on_token(piece, index):
        pieces[index] += piece

    assert kvzip.generate(model, small, QUERIES, decoder=decoder, on_token=on_token, **OPTIONS) == alone
    assert pieces == [answer.text for answer in alone]


def test_a_list_larger_than_memory_is_split(model, small, alone, monkeypatch):
    made = []

    class Counted(kvzip.Decoder):
        def __init__(self, *args, batch, tail):
            made.append(batch)
            super().__init__(*args, batch=batch, tail=tail)

    monkeypatch.setattr(generation, "Decoder", Counted)
    for free in (0, 10**12):
        monkeypatch.setattr(generation, "free_bytes", lambda device, free=free: free)
        assert kvzip.generate(model, small, QUERIES, **OPTIONS) == alone
    assert made == [1, len(QUERIES)]


def test_a_decoder_must_fit(model, small):
    decoder = kvzip.Decoder(model, small, tail=20)
    with pytest.raises(ValueError, match=r"room for .* pass tail="):
        kvzip.generate(model, small, QUERIES[1], decoder=decoder, max_tokens=30)
    other = replace(small, token_ids=small.token_ids.clone())
    with pytest.raises(ValueError, match="this model and cache"):
        kvzip.generate(model, other, "x", decoder=decoder, max_tokens=2)
    with pytest.raises(ValueError, match="batch to be at least 1, got 0: pass"):
        kvzip.Decoder(model, small, batch=0)
    with pytest.raises(ValueError, match="questions of 1 to 20 tokens"):
        decoder.read([[1] * 21])
    with pytest.raises(ValueError, match="1 to 1 questions"):
        decoder.read([[1], [2]])
    with pytest.raises(ValueError, match=r"questions that were read, .*: read questions first"):
        decoder.step()
    decoder.read([[1] * 18])
    for _ in range(2):
        decoder.step()
    with pytest.raises(ValueError, match=r"room for another token in 20, .* larger tail"):
        decoder.step()


@functools.cache
def compressed(ratio, bits):
    """A cache of a window layer and a global one, with its config."""
    model = random_model.make(random_model.config(windows=(4, None), head_dim=16, attn_scale=0.25))
    return model.config, kvzip.compress(kvzip.score(model, kvzip.prefill(model, TEXT)), ratio, bits=bits)


@given(
    tokens=st.sampled_from([1, 3]),
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    ratio=st.sampled_from([0.05, 0.5, 1.0]),
    bits=st.sampled_from([None, 8]),
)
def test_attention_on_the_host_is_as_accurate_as_the_op(tokens, lengths, ratio, bits):
    """Ragged, full and empty heads, windows, tails of different lengths whose unset rows are NaN."""
    config, cache = compressed(ratio, bits)
    context, shape = all_ragged(cache.context), (len(lengths), 2, 12, 16)
    generator = torch.Generator().manual_seed(len(lengths))
    rows = [torch.randn(shape, generator=generator) for _ in range(4)]
    written = torch.arange(12) < torch.tensor(lengths)[:, None]
    rows = [x.masked_fill(~written[:, None, :, None], torch.nan) for x in rows]
    new = [torch.randn(len(lengths), h, tokens, 16, generator=generator) for h in (4, 2, 2)]

    def attend(dtype, softcap=None):
        """A softcap of nearly infinity takes the op."""
        tail = Tail(*(tuple(x.to(dtype) for x in rows[i : i + 2]) for i in (0, 2)), torch.tensor(lengths).int())
        kv = [
            replace(kv, k=kv.k.to(dtype), v=kv.v.to(dtype)) if isinstance(kv.k, torch.Tensor) else kv for kv in context
        ]
        run = decode_attend(replace(config, attn_softcap=softcap), kv, tail)
        return [run(layer, *(x.to(dtype) for x in new)) for layer in (0, 1)]

    exact, plain = attend(torch.float64, softcap=1e9), attend(torch.float32, softcap=1e9)
    plain[1] = merged_parts(context[1], rows, new, lengths, config.attn_scale)
    for got in zip(attend(torch.float32), exact, plain, strict=True):
        assert_as_accurate(*got)


def merged_parts(kv, rows, new, lengths, scale):
    """Context and tail by the reference, merged: what plain PyTorch gives where the two are computed apart."""
    q, tail = new[0], [rows[1].clone(), rows[3].clone()]
    lengths = torch.tensor(lengths).int()
    for x, y in zip(tail, new[1:], strict=True):
        for b, length in enumerate(lengths.tolist()):
            x[b, :, length : length + q.shape[2]] = y[b]
    none = torch.zeros(3, dtype=torch.int32)
    own = ops.decode(q, q.new_empty(0, 16), q.new_empty(0, 16), none, scale=scale, tail=(*tail, lengths + q.shape[2]))
    return ops.merge(*ops.decode(q, kv.k, kv.v, kv.offsets, scale=scale), *own)[0]


@given(temperature=st.sampled_from([0.5, 1.0, 3.0]), top_p=st.sampled_from([0.3, 0.9, 1.0]))
def test_sampling_inverts_the_cumulative_probabilities(temperature, top_p):
    scores = torch.randn(1, 9, generator=torch.Generator().manual_seed(1)) * 2
    probabilities = (scores[0] / temperature).softmax(-1)
    order = probabilities.argsort(descending=True)
    kept, mass = [], 0.0
    for token in order.tolist():
        if mass < top_p or not kept:
            kept.append(token)
            mass += float(probabilities[token])
    share = probabilities[kept] / probabilities[kept].sum()
    draws = (torch.arange(2000) + 0.5) / 2000
    options = {"temperature": torch.tensor(temperature), "top_p": torch.tensor(top_p)}
    tokens = torch.vmap(lambda draw: sample(scores, draw[None], **options)[0])(draws)
    for token, expected in zip(kept, share.tolist(), strict=True):
        assert abs(float((tokens == token).float().mean()) - expected) <= 1 / 2000
    assert set(tokens.tolist()) <= set(kept)


LOGITS = st.one_of(
    st.floats(width=32, allow_nan=False),
    st.floats(-30, 30, width=32),
    st.sampled_from([0.0, 1.0, 1.0000001, -torch.inf]),
)
EDGES = st.sampled_from([5e-324, 1e-45, 1e-38, 1e-30, 1e-3, 0.7, 1.0, 1e30, 3.4e38, 1e38, 1.7e308])
SHARES = st.sampled_from([5e-324, 1e-45, 1e-8, 0.3, 0.5, 0.9, 1 - 2**-24, 1 - 2**-53, 1.0])
DRAWS = st.sampled_from([0.0, 1e-45, 0.25, 0.5, 0.999, 1 - 2**-24])


def nucleus(scores, temperature, top_p):
    """The exact probabilities in float64, and the tokens of which some are needed for top_p, with ties."""
    wide = scores.double()
    apart = torch.where(wide == wide.max(), 0.0, wide - wide.max())
    weights = (apart / temperature).exp()
    share = weights / weights.sum()
    above = (torch.where(wide[None] > wide[:, None], share, 0)).sum(-1)  # what is likelier than each
    return share, above <= top_p * (1 - 1e-12) if top_p < 1 else share > 0


@settings(max_examples=200)
@given(
    rows=st.lists(st.lists(LOGITS, min_size=7, max_size=7), min_size=1, max_size=2),
    temperature=EDGES,
    top_p=SHARES,
    draw=DRAWS,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_no_option_selects_what_the_exact_distribution_does_not(rows, temperature, top_p, draw, dtype):
    scores = torch.tensor(rows).to(dtype)
    options = {"temperature": temperature, "top_p": top_p}
    options = {name: torch.tensor(x, dtype=torch.float64) for name, x in options.items()}
    tokens = sample(scores, torch.tensor([draw]), **options)
    for row, token in zip(scores, tokens.tolist(), strict=True):
        assert 0 <= token < len(row)
        if row.max() > -torch.inf:
            share, inside = nucleus(row, temperature, top_p)
            assert share[token] > 0 and inside[token], (share, token)


@pytest.mark.parametrize("top_p, kept", [(0.25, 1), (0.5, 2), (0.5 + 1e-12, 3), (0.75, 3), (1.0, 4)])
def test_top_p_takes_the_fewest_tokens_that_sum_to_it(top_p, kept):
    """Four tokens of a quarter each, exactly: one more is taken only where the sum is below top_p."""
    options = {"temperature": torch.tensor(1.0), "top_p": torch.tensor(top_p, dtype=torch.float64)}
    draws = (torch.arange(64) + 0.5) / 64
    tokens = {int(sample(torch.zeros(1, 4), draw[None], **options)) for draw in draws}
    assert tokens == set(range(kept))


def test_all_tokens_can_be_drawn_from_many():
    """At top_p 1 none of 150,000 tokens is lost to rounding sums."""
    options = {"temperature": torch.tensor(1.0), "top_p": torch.tensor(1.0)}
    last = sample(torch.zeros(1, 150_000), torch.tensor([1 - 2**-24]), **options)
    assert int(last) == 149_999


@unchecked()
def test_a_temperature_of_nearly_nothing_is_greedy(model, small, alone):
    for temperature in (5e-324, 1e-45, 1e-30):
        assert kvzip.generate(model, small, QUERIES, temperature=temperature, seed=1, **OPTIONS) == alone
    hot = kvzip.generate(model, small, QUERIES[0], temperature=1.7e308, top_p=1 - 2**-53, seed=1, max_tokens=40)
    assert len(set(hot.token_ids)) > 20


def test_numbers_of_other_libraries_are_taken_or_refused(model, small):
    plain = kvzip.generate(model, small, "x", max_tokens=4, temperature=0.5, top_p=0.5, seed=3)
    take = options.sampling
    expected = (4, 0.5, 0.5, 3)
    for whole in (np.int64, np.uint8, torch.tensor):
        for real in (np.float32, np.float64, torch.tensor, Fraction):
            found = astuple(take(whole(4), real(0.5), real(0.5), whole(3)))[:4]
            assert found == expected and list(map(type, found)) == [int, float, float, int]
    assert kvzip.generate(model, small, "x", max_tokens=4, temperature=0.5, top_p=0.5, seed=-(2**63)) is not None
    assert plain == kvzip.generate(model, small, "x", max_tokens=4, temperature=0.5, top_p=0.5, seed=3)
    for place, values in enumerate(
        ([True, 5.0, "5", None], [True, "1", None, 1j], [True, "1", None], [True, 1.0, "1"])
    ):
        for value in values:
            arguments = list(expected)
            arguments[place] = value
            with pytest.raises(TypeError, match=r"expected .* number, got .*: pass"):
                take(*arguments)


def test_a_step_after_no_token_reads_another(model, small):
    """A GPU is a step ahead of the host: what it feeds must be in the vocabulary."""
    broken = random_model.make(model.config)
    cache = replace(small, fingerprint=broken.fingerprint)
    broken.weights.unembed[7] = torch.nan
    decoder = kvzip.Decoder(broken, cache, batch=2)
    decoder.read([[1, 2], [3]])
    decoder.step()
    assert decoder.fetch()() == [decoding.NO_TOKEN] * 2


def test_ids_beyond_the_vocabulary_are_named(model, small):
    for ids in ([3, 260], [-1]):
        with pytest.raises(ValueError, match=r"token ids in \[0, 260\)"):
            kvzip.Decoder(model, small).read([ids])
        with pytest.raises(ValueError, match=r"token ids in \[0, 260\)"):
            kvzip.extend(model, small, torch.tensor(ids))


def test_out_of_memory_says_for_what_and_leaves_the_cache(model, monkeypatch):
    cache = kvzip.score(model, kvzip.prefill(model, TEXT))
    before = [(kv.k.clone(), kv.v.clone()) for kv in cache.layers]

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("kvzip.ops.prune", fail)
    with pytest.raises(torch.OutOfMemoryError, match=r"expected room for [\d,]+ bytes .*ratio, bits"):
        kvzip.compress(cache, 0.3)
    monkeypatch.undo()
    monkeypatch.setattr("kvzip.compression.free_bytes", lambda device: 7)
    with pytest.raises(torch.OutOfMemoryError, match=r"got 7 bytes free.* intact"):
        kvzip.compress(cache, 0.3, consume=True)
    monkeypatch.undo()
    monkeypatch.setattr("kvzip.scoring.run_attention", fail)
    with pytest.raises(torch.OutOfMemoryError, match="lower chunk"):
        kvzip.score(model, cache)
    monkeypatch.setattr("kvzip.prefilling.run_attention", fail)
    with pytest.raises(torch.OutOfMemoryError, match="prefill_compressed"):
        kvzip.prefill(model, TEXT)
    monkeypatch.setattr("kvzip.decoding.alone.roomy_tail", fail)
    with pytest.raises(torch.OutOfMemoryError, match="fewer questions"):
        kvzip.generate(model, cache, "x")
    for kv, (k, v) in zip(cache.layers, before, strict=True):
        assert torch.equal(kv.k, k) and torch.equal(kv.v, v)


def test_other_errors_pass_unchanged():
    with pytest.raises(RuntimeError, match=r"^shapes$"), explain_out_of_memory("1 byte", "none"):
        raise RuntimeError("shapes")
    text = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    with pytest.raises(torch.OutOfMemoryError, match="1 byte"), explain_out_of_memory("1 byte", "none"):
        raise RuntimeError(text)


def test_free_bytes_of_the_host(monkeypatch, tmp_path):
    device = torch.device("cpu")
    free = free_bytes(device)
    assert free is None or 0 < free < 2**50
    monkeypatch.setattr(kvzip.cache.memory, "Path", lambda path: tmp_path / "missing")
    assert free_bytes(device) is None


@pytest.mark.gpu
@pytest.mark.parametrize("sampled", [False, True])
def test_graphs_answer_as_the_host_does(sampled):
    """In float32, where the CPU's tokens are the GPU's: the first time captured, then replayed, then in batches."""
    options = {"max_tokens": 12, **({"temperature": 0.7, "seed": 5} if sampled else {})}
    answers = []
    for device in ("cpu", "cuda"):
        config = random_model.config(head_dim=64, hidden_size=128, attn_scale=0.125, windows=(7, None))
        model = replace(random_model.make(config, device=device), stop_ids=())
        small = kvzip.compress(kvzip.score(model, kvzip.prefill(model, TEXT)), 0.4)
        decoder = kvzip.Decoder(model, small, batch=2, tail=80)
        once = kvzip.generate(model, small, QUERIES, decoder=decoder, **options)
        assert once == kvzip.generate(model, small, QUERIES, decoder=decoder, **options)
        assert once == [kvzip.generate(model, small, q, **options) for q in QUERIES]
        answers.append(once)
    assert answers[0] == answers[1]


@pytest.mark.gpu
def test_steps_never_wait_for_the_device():
    model = random_model.make(random_model.config(head_dim=64, hidden_size=128, attn_scale=0.125), device="cuda")
    decoder = kvzip.Decoder(model, kvzip.prefill(model, TEXT), batch=3, tail=64)
    decoder.read([[1, 2, 3]] * 3)
    decoder.step()
    decoder.fetch()
    torch.cuda.set_sync_debug_mode("error")
    try:
        decoder.step()
        wait = decoder.fetch()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(wait()) == 3


happened: list[str] = []


class Graph:
    """In place of a CUDA graph; `capture_end` raises the first of `ends`, if there is one."""

    ends: list[str]
    pool: tuple[int, int] | None  # of the last one

    def replay(self):
        happened.append("replay")

    def capture_begin(self, pool=None, **options):
        Graph.pool = pool

    def capture_end(self):
        if self.ends:
            raise RuntimeError(self.ends.pop(0))


@pytest.fixture
def cuda(monkeypatch):
    """What a capture needs of a GPU; returns what happens."""
    happened.clear()
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(Graph, "ends", [], raising=False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(decoding.graphs, "_capture_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: happened.append("give back"))
    return happened


def run_of(happened, errors):
    """Something to capture, which raises one error after the other."""

    def run():
        happened.append("run")
        if errors:
            raise errors.pop(0)
        return "result"

    return run


@pytest.mark.parametrize("ends", [[], ["CUDA error: out of memory"], ["CUDA error: operation not permitted"]])
def test_a_capture_that_runs_out_of_memory_is_made_again_once_memory_was_given_back(cuda, ends):
    Graph.ends = ends
    run = run_of(cuda, [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")])
    assert decoding.capture(run, torch.device("cpu"))() == "result"
    assert cuda == ["run", "give back", "run", "replay"]


def test_so_is_one_whose_graph_the_driver_has_no_memory_for(cuda):
    Graph.ends = ["CUDA error: out of memory"]
    assert decoding.capture(run_of(cuda, []), torch.device("cpu"))() == "result"
    assert cuda == ["run", "give back", "run", "replay"]


def test_other_errors_of_a_capture_are_raised_as_they_are(cuda):
    Graph.ends = ["CUDA error: operation not permitted"]
    with pytest.raises(RuntimeError, match="not permitted"):
        decoding.capture(run_of(cuda, []), torch.device("cpu"))
    with pytest.raises(ValueError, match="too long"):
        decoding.capture(run_of(cuda, [ValueError("too long")]), torch.device("cpu"))
    assert cuda == ["run", "run"]


def test_graphs_share_a_pool_until_the_last_one_is_gone(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", iter([(0, 1), (0, 2), (0, 3)]).__next__)
    memory, device = decoding.graphs.GraphMemory(), torch.device("cpu")

    def pool_of(*errors):
        graph = decoding.capture(run_of(cuda, list(errors)), device, memory=memory)
        return graph, Graph.pool

    first, pool = pool_of()
    second, same = pool_of(torch.OutOfMemoryError("CUDA out of memory"))
    assert pool == same == (0, 1)
    del first
    assert pool_of()[1] == (0, 1)
    del second
    gc.collect()  # checks of types keep what they saw in cycles
    with pytest.raises(ValueError, match="too long"):
        pool_of(ValueError("too long"))
    assert pool_of()[1] == (0, 3)  # not that of the capture that failed


@pytest.mark.gpu
def test_graphs_of_decoders_that_are_gone_do_not_fill_the_memory():
    config = random_model.config(head_dim=64, hidden_size=128, attn_scale=0.125)
    model = replace(random_model.make(config, dtype=torch.bfloat16, device="cuda"), stop_ids=())
    cache = kvzip.score(model, kvzip.prefill(model, TEXT))
    first = kvzip.generate(model, cache, QUERIES, **OPTIONS)
    room = torch.cuda.memory_reserved() + 2 * 2**20
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
    try:
        for _ in range(20):
            assert kvzip.generate(model, cache, QUERIES, **OPTIONS) == first
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
def test_memory_of_a_gpu_that_is_nearly_full():
    config = random_model.config(head_dim=64, hidden_size=128, attn_scale=0.125)
    model = random_model.make(replace(config, max_length=10**9), dtype=torch.bfloat16, device="cuda")
    cache = kvzip.score(model, kvzip.prefill(model, TEXT))
    with pytest.raises(torch.OutOfMemoryError, match=r"bytes for the tails of 1 questions"):
        kvzip.Decoder(model, cache, tail=2**31)
    assert kvzip.generate(model, cache, "x", max_tokens=3).token_ids
