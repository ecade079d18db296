"""Compression: exact counts, real eviction, what is kept whatever its score, and pruned attention's law."""

import functools
import gc
import importlib
import inspect
import itertools
import pkgutil
import sys
import weakref
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvzip
import random_model
from accuracy import assert_as_accurate
from interruptions import interrupted
from kvzip import compression
from kvzip.attention import decode_attend
from kvzip.cache import RaggedKV, all_ragged, check_whole, empty_tail, rows
from kvzip.evals.tasks import Question
from kvzip.options import Budget, Refitting, Scoring
from unchecked import unchecked

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen."


@pytest.fixture(scope="module")
def plain():
    return random_model.make(random_model.config())


@pytest.fixture(scope="module")
def dense(plain):
    return scored(plain)


def scored(model, values=None):
    cache = kvzip.score(model, kvzip.prefill(model, TEXT))
    return cache if values is None else replace(cache, scores=replace(cache.scores, values=values))


def kept(small):
    """[L, H, S] mask of what a ragged cache holds."""
    layers = [kv for kv in small.context if isinstance(kv, RaggedKV)]
    mask = torch.zeros(len(layers), len(layers[0].offsets) - 1, small.context_length, dtype=torch.bool)
    for n, kv in enumerate(layers):
        for h, (a, b) in enumerate(zip(kv.offsets[:-1].tolist(), kv.offsets[1:].tolist(), strict=True)):
            assert (kv.positions[a:b].diff() > 0).all()
            mask[n, h, kv.positions[a:b].long()] = True
    return mask


@given(ratio=st.floats(0.001, 1.0), level=st.sampled_from(["pair", "layer", "uniform", "head"]), ties=st.booleans())
def test_counts_are_exact(dense, ratio, level, ties):
    cache = dense
    if ties:
        cache = replace(cache, scores=replace(cache.scores, values=(cache.scores.values * 4).round()))
    layers, heads, length = cache.scores.values.shape
    small = kvzip.compress(cache, ratio, level=level)
    mask = kept(small)
    assert mask[:, :, : cache.start].all()  # the system prefix
    mask = mask[:, :, cache.start :]
    want = {
        "pair": int(ratio * (layers * heads * length)),
        "layer": int(ratio * (heads * length)) * layers,
        "uniform": int(ratio * length) * layers * heads,
        "head": int(ratio * (layers * heads)) * length,
    }[level]
    assert small.kept == want == mask.sum() and small.total == mask.numel() == cache.total
    if level == "uniform":
        assert (mask.sum(-1) == int(ratio * length)).all()
    if level == "head":
        assert ((mask.sum(-1) == 0) | (mask.sum(-1) == length)).all()


@given(a=st.floats(0.01, 1.0), b=st.floats(0.01, 1.0))
def test_smaller_ratios_keep_a_subset(dense, a, b):
    cache = dense
    less, more = (kept(kvzip.compress(cache, r)) for r in sorted((a, b)))
    assert (less <= more).all()


def test_budget_is_tokens_per_head(dense):
    cache = dense
    layers, heads, length = cache.scores.values.shape
    assert kvzip.compress(cache, budget=7.3).kept == int(7.3 * layers * heads)
    assert kvzip.compress(cache, budget=10.0 * length).kept == cache.total
    assert (kept(kvzip.compress(cache, budget=5.0, level="uniform"))[:, :, cache.start :].sum(-1) == 5).all()


def test_threshold_keeps_scores_at_and_above_it(dense):
    cache = dense
    value = cache.scores.values.flatten().sort().values[40].item()
    mask = kept(kvzip.compress(cache, threshold=value))[:, :, cache.start :]
    assert torch.equal(mask, cache.scores.values >= value)


@given(span=st.tuples(st.integers(0, 20), st.integers(0, 20)).map(sorted), rows=st.integers(0, 9))
def test_protected_and_minimum_rows_come_first(dense, span, rows):
    cache = dense
    values = cache.scores.values
    small = kvzip.compress(cache, 0.5, protect=[tuple(span)], min_rows=rows)
    mask = kept(small)[:, :, cache.start :]
    assert mask[:, :, span[0] : span[1]].all()
    top = values.sort(dim=-1, descending=True, stable=True).indices[..., :rows]
    assert mask.gather(-1, top).all()
    assert small.kept == int(0.5 * cache.total)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"floor": 1.5}, "a floor from 0 to 1 of an equal share, got 1.5"),
        ({"floor": torch.nan}, "floor"),
        ({"floor": 0.2, "level": "head"}, "no floor with whole heads, got 0.2"),
        ({"floor": 0.2, "ratio": None, "threshold": 0.1}, "no floor with a threshold, got 0.2"),
        ({"floor": 1.0, "protect": [(0, 9)]}, "at most .* protected and minimum rows"),
    ],
)
def test_floors_out_of_place_are_refused(dense, options, message):
    with pytest.raises(ValueError, match=message):
        kvzip.compress(dense, **({"ratio": 0.3} | options))


SPANS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)).map(sorted).map(tuple), max_size=3)
BUDGETS = st.one_of(
    st.fixed_dictionaries({"ratio": st.floats(0.001, 1.0)}),
    st.fixed_dictionaries({"budget": st.one_of(st.floats(0.1, 90), st.just(torch.inf))}),
    st.fixed_dictionaries({"threshold": st.floats(-1, 6, width=32)}),
)


@given(
    how=BUDGETS,
    level=st.sampled_from(["pair", "layer", "uniform", "head"]),
    protect=SPANS,
    rows=st.integers(0, 9),
    floor=st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    ends=st.tuples(st.integers(0, 8), st.integers(0, 8)),
    seed=st.integers(0, 99),
)
def test_any_options_together_keep_what_a_plain_sort_keeps(dense, how, level, protect, rows, floor, ends, seed):
    values = torch.randint(0, 12, (2, 2, len(TEXT)), generator=torch.Generator().manual_seed(seed)).float() / 2
    cache = replace(dense, scores=replace(dense.scores, values=values))
    options = {**how, "protect": protect, "min_rows": rows}
    options |= {"level": "pair"} if "threshold" in how else {"level": level}
    options |= {"sink": ends[0], "recent": ends[1]} if options["level"] == "head" else {}
    options |= {"floor": floor} if options["level"] != "head" and "threshold" not in how else {}
    want = sorted_out(values.tolist(), **options)
    if isinstance(want, str):
        with pytest.raises(ValueError, match=want):
            kvzip.compress(cache, **options)
        return
    small = kvzip.compress(cache, **options)
    assert kept(small)[:, :, cache.start :].tolist() == want
    assert small.kept == sum(sum(map(sum, heads)) for heads in want)


def sorted_out(
    values, *, ratio=None, budget=None, threshold=None, level, protect, min_rows, floor=0.0, sink=0, recent=0
):
    """The mask that `compress` should keep, as lists, or the error that it should raise, by sorting plain lists."""
    layers, heads, length = len(values), len(values[0]), len(values[0][0])
    score = {(n, h, e): x for n, rows in enumerate(values) for h, row in enumerate(rows) for e, x in enumerate(row)}
    pairs = list(score)

    def rank(pair):
        return (-score[pair], pair)

    def count(whole):
        n = int(ratio * (whole * length)) if ratio is not None else min(budget * whole, whole * length)
        return int(n)

    forced = {pair for pair in pairs if any(a <= pair[2] < b for a, b in protect)}
    if floor:
        min_rows = max(min_rows, int(floor * count(layers * heads) / (layers * heads)))
    for n in range(layers):
        for h in range(heads):
            forced |= set(sorted((pair for pair in pairs if pair[:2] == (n, h)), key=rank)[:min_rows])
    if threshold is not None:
        keep = forced | {pair for pair in pairs if score[pair] >= threshold}
    elif level == "head":
        whole = int(ratio * (layers * heads)) if ratio is not None else count(layers * heads) // length
        order = sorted({pair[:2] for pair in pairs}, key=lambda head: (-max(values[head[0]][head[1]]), head))[:whole]
        ends = {pair for pair in pairs if pair[2] < sink or pair[2] >= length - recent}
        keep = forced | ends | {pair for pair in pairs if pair[:2] in order}
    else:
        shared, keep = {"pair": 0, "layer": 1, "uniform": 2}[level], set()
        groups = [[pair for pair in pairs if pair[:shared] == group] for group in {pair[:shared] for pair in pairs}]
        allowed, needed = count(len(groups[0]) // length), max(len(forced & set(group)) for group in groups)
        if needed > allowed:
            return rf"at most {allowed} protected and minimum rows \(the budget of level '{level}'\), got {needed}"
        for group in groups:
            keep |= set(sorted(group, key=lambda pair: (pair not in forced, rank(pair)))[:allowed])
    return [[[(n, h, e) in keep for e in range(length)] for h in range(heads)] for n in range(layers)]


@functools.cache
def softcapped(softcap):
    config = random_model.config(windows=(None, 6), attn_softcap=softcap)
    return config, scored(random_model.make(config, dtype=torch.bfloat16))


@given(ratio=st.floats(0.01, 1.0), tokens=st.integers(1, 4), softcap=st.sampled_from([None, 2.0]))
def test_pruned_attention_equals_dense_attention_with_the_rest_masked(ratio, tokens, softcap):
    config, cache = softcapped(softcap)
    small = kvzip.compress(cache, ratio)
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(2, n, tokens, 8, generator=generator).bfloat16() for n in (4, 2, 2))
    tail = empty_tail(small.context, 2, tokens + 3, dtype=torch.bfloat16)
    for x in (*tail.k, *tail.v):
        x.fill_(torch.nan)
    got = decode_attend(config, all_ragged(small.context), tail)(0, q, k, v)

    def dense(dtype):
        kv = cache.layers[0]
        keys, values = (
            torch.cat([a.expand(2, -1, -1, -1), b], dim=2).to(dtype).repeat_interleave(2, 1)
            for a, b in ((kv.k, k), (kv.v, v))
        )
        logits = q.to(dtype) @ keys.mT * config.attn_scale
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        seen = torch.cat([kept(small)[0][:, None].expand(2, tokens, -1), causal.expand(2, -1, -1)], dim=-1)
        logits = logits.masked_fill(~seen.repeat_interleave(2, 0), -torch.inf)
        return logits.softmax(-1) @ values

    assert_as_accurate(got, dense(torch.float64), dense(torch.bfloat16))


def test_eviction_is_real(model):
    cache = scored(model)
    row = 2 * 8 * 4  # K and V of one token of one head: D=8, float32
    window = 2 * 6 * row
    ids = cache.token_ids.nbytes
    assert kvzip.nbytes(cache) == cache.length * 4 * row + window + ids
    small = kvzip.compress(cache, 0.3)
    rows = small.kept + 4 * cache.start  # of two heads in two layers
    bounds = [small.context[n].schedule.cuts[0].bounds.untyped_storage().nbytes() for n in (0, 2)]
    metadata = rows * 4 + 2 * 3 * 4 + sum(bounds)
    assert kvzip.nbytes(small) == rows * row + window + ids + metadata

    dense = [weakref.ref(t) for kv in cache.layers[:1] for t in (kv.k.untyped_storage(), kv.v.untyped_storage())]
    kvzip.compress(cache, 0.9)  # the dense cache is still valid
    del cache
    gc.collect()
    assert all(ref() is None for ref in dense)
    assert kvzip.generate(model, small, "Who?", max_tokens=3).token_ids


def test_consume_frees_layers_one_after_the_other(model):
    cache = scored(model)
    want = kvzip.compress(cache, 0.4)
    dense = weakref.ref(cache.layers[0].k.untyped_storage())
    small = kvzip.compress(cache, 0.4, consume=True)
    gc.collect()
    assert dense() is None
    assert torch.equal(small.context[0].k, want.context[0].k)


def used_up(cache):
    """A cache that was consumed."""
    kvzip.compress(cache, 0.4, consume=True)


def half_way(cache):
    """A cache that was being consumed when Ctrl-C came in its second layer."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(kvzip.ops, "prune", failing(kvzip.ops.prune, [], 2, KeyboardInterrupt))
        kvzip.compress(cache, 0.4, consume=True)


def shortened(cache):
    """A cache that lacks its first layer, whoever took it."""
    del cache.layers[0]


@pytest.fixture(scope="module", params=[used_up, half_way, shortened], ids=lambda state: state.__name__)
def consumed(request, dense):
    cache = replace(dense, layers=list(dense.layers))
    request.param(cache)
    return cache


# what a cache says without its pairs
NO_PAIRS = {
    *("inputs.query_ids", "inputs.following_ids", "scoring.repeats", "evals.run.answer_lines"),
    *("cache.caches.ragged_of", "inputs.check_belongs"),
}
FOUND = {
    f"{module.removeprefix('kvzip.')}.{name}": (module, name)
    for module in (info.name for info in pkgutil.walk_packages(kvzip.__path__, "kvzip."))
    if not module.startswith(("kvzip.cli", "kvzip.ops.triton", "kvzip.server", "kvzip.vllm"))  # some need an extra
    for name, found in vars(importlib.import_module(module)).items()
    if getattr(found, "__module__", None) == module and (inspect.isfunction(found) or name == "Decoder")
    if not name.startswith("_") and any("DenseCache" in str(p) for p in inspect.signature(found).parameters.values())
}


def arguments_of(function, model, cache, path):
    """What a function that takes a cache could be called with."""
    made = kvzip.head_scores.HeadScores(torch.ones(2, 2), (0, 1), "", "", "", ())
    known = {
        "model": model,
        "cache": cache,
        "scores": made if "head_scores" in function.__module__ else cache.scores,
        "query": "Why?",
        "text": "Because.",
        "path": path,
        "ratio": 0.4,
        "device": "cpu",
        "header": {},
        "pieces": {},
        "token_texts": {},
        "scope": "chunk",
        "method": "kvzip",
        "chunk": 9,
        "hint": 2,
        "first": 3,
        "future": 4,
        "epsilon": 0.01,
        "answer_ids": [1, 2],
        "asked": [[1]],
        "answers": [[1, 2]],
        "questions": [Question(query="Why?", cloze="Why?", answers=("x",), metric="f1")],
        "form": "chat",
        "values": cache.scores.values,
        "scoring": Scoring(chunk=9, hint=2),
        "rows": [[4, 5], [6, 7]],
        "budget": Budget(budget_bytes=9),
        "answered": [2],
    }
    if "refitting" in function.__module__:
        dense = kvzip.score(model, kvzip.prefill(model, TEXT), chunk=9)
        known |= {"small": kvzip.compress(dense, 0.4), "options": Refitting(chunk=9)}
        known |= {"layers": known["small"].context}
    if function.__module__ in ("kvzip.sources", "kvzip.report"):  # one question's ids; questions as texts
        known |= {"asked": [1], "questions": ["Why?"]}
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    return {p.name: known[p.name] for p in parameters if p.default is p.empty or p.name == "ratio"}


@pytest.mark.parametrize("taker", sorted({*FOUND} - NO_PAIRS))
def test_a_consumed_cache_is_refused_by_name_by_all_that_take_one(plain, consumed, taker, tmp_path):
    module, name = FOUND[taker]
    function = getattr(sys.modules[module], name)
    arguments = arguments_of(function, plain, consumed, tmp_path / "file")
    with pytest.raises(
        ValueError, match=r"freed by compress\(consume=True\), [12] of 2 layers are gone: prefill again"
    ):
        function(**arguments)
    assert not [*tmp_path.iterdir()]


def test_all_that_take_a_cache_are_found():
    named = {"compression.compress", "scoring.score", "generation.generate", "conversation.fold", "cache.io.save"}
    assert {*FOUND} > NO_PAIRS | named | {"cache.caches.nbytes", "interop.to_transformers", "decoding.decoder.Decoder"}


def test_a_consumed_cache_stays_refused_whatever_is_replaced(consumed):
    with pytest.raises(ValueError, match="layers are gone"):
        kvzip.compress(replace(consumed, scores=None), 0.4)


FAILURES = [(KeyboardInterrupt, KeyboardInterrupt), (torch.OutOfMemoryError, torch.OutOfMemoryError)]
FAILURES += [(lambda said: RuntimeError(f"can't allocate memory: {said}"), torch.OutOfMemoryError)]


def failing(function, calls, at, raised):
    def call(*arguments, **options):
        calls.append(function.__name__)
        if len(calls) == at:
            raise raised(function.__name__)
        return function(*arguments, **options)

    return call


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize(("raised", "seen"), FAILURES, ids=["Ctrl-C", "GPU", "host"])
def test_consuming_that_fails_anywhere_leaves_a_cache_that_is_whole_or_says_it_is_not(raised, seen, bits):
    """At every call that packs: intact until a layer is freed, refused by name after."""
    made = scored(random_model.make(random_model.config(windows=(6, None, None, None))))
    whole = gone = 0
    for at in itertools.count(1):
        cache, calls = replace(made, layers=list(made.layers)), []
        shared = replace(cache, scores=None)
        before = list(cache.layers)
        with pytest.MonkeyPatch.context() as patch:
            for name in ("prune", "quantize", "decode_schedule"):
                patch.setattr(kvzip.ops, name, failing(getattr(kvzip.ops, name), calls, at, raised))
            try:
                kvzip.compress(cache, 0.4, bits=bits, consume=True)
                break
            except seen as error:
                said = str(error)
        if cache.layers:
            assert all(a is b for a, b in zip(cache.layers, before, strict=True)) and calls.count("prune") == 1
            check_whole(cache), check_whole(shared)
            assert kvzip.compress(cache, 0.4).kept == int(0.4 * cache.total)
            assert seen is KeyboardInterrupt or "the cache is intact" in said
            whole += 1
        else:
            for one in (cache, shared):
                with pytest.raises(ValueError, match="4 of 4 layers are gone"):
                    check_whole(one)
            assert seen is KeyboardInterrupt or "the cache's pairs are gone, prefill again" in said
            gone += 1
    if bits == 4:  # rows of all three layers are taken first, then their values are packed
        assert (whole, gone, at) == (2, 2 + 2 + 3, 10)
    else:
        steps = 2 if bits is None else 4
        assert (whole, gone, at) == (steps, 2 * steps, 3 * steps + 1)


def test_consuming_may_be_interrupted_at_any_line(dense):
    found = {"whole": 0, "gone": 0}
    for line in itertools.count(1, step=3):
        cache = replace(dense, layers=list(dense.layers))
        before = list(cache.layers)
        if not interrupted(
            (compression, rows), line, lambda cache=cache: kvzip.compress(cache, 0.4, bits=8, consume=True)
        ):
            break
        if cache.layers:
            assert all(a is b for a, b in zip(cache.layers, before, strict=True)), f"line {line}"
        found["whole" if cache.layers else "gone"] += 1
    assert min(found.values()) > 5


def test_the_largest_layer_is_packed_first(dense):
    """What does not fit is then found while nothing is freed: a freed layer has room for its own pairs."""
    values = dense.scores.values.clone()
    values[1] += 9
    cache, sizes = replace(dense, layers=list(dense.layers), scores=replace(dense.scores, values=values)), []
    with pytest.MonkeyPatch.context() as patch:
        real = kvzip.ops.prune
        patch.setattr(kvzip.ops, "prune", lambda *a, total: sizes.append(total) or real(*a, total=total))
        small = kvzip.compress(cache, 0.6, consume=True)
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[1]
    assert [len(kv.positions) for kv in small.context] == sizes[::-1], "layers stay in their order"


@pytest.mark.parametrize(("consume", "at_once"), [(True, 1), (False, 1), (False, 8)])
def test_what_queries_ask_is_computed_for_several_layers_at_once(consume, at_once, monkeypatch):
    """With `consume` for all. What comes out is what each layer gives alone."""
    dense = scored(random_model.make(random_model.config(head_dim=32)))  # four blocks that are rounded at a time
    asked, calls, shape = dense.scores.asked, [], kvzip.ops.shape_feedback
    values = dense.scores.values + torch.tensor([0.0, 9.0])[:, None, None]  # the second layer is larger and comes first
    dense = replace(dense, scores=replace(dense.scores, values=values))
    cache = replace(dense, layers=list(dense.layers))
    monkeypatch.setattr(kvzip.ops, "shape_feedback", lambda *both: calls.append(len(both[0])) or shape(*both))
    monkeypatch.setattr(compression, "LAYERS_AT_ONCE", at_once)
    small = kvzip.compress(cache, 0.4, bits=(4, 2), consume=consume)
    assert calls == ([2] if consume or at_once > 1 else [1, 1])
    for own, packed, plain in zip(asked, small.context, kvzip.compress(dense, 0.4).context, strict=True):
        channels = kvzip.ops.measure_channels_turned(plain.k, plain.offsets, bits=4)
        how = {"offsets": plain.offsets, "channels": channels, "feedback": shape(own, channels.spread)}
        assert how["feedback"].any()
        assert torch.equal(packed.k.codes, kvzip.ops.quantize_turned(plain.k, bits=4, **how).codes)
        assert torch.equal(packed.v.codes, kvzip.ops.quantize_turned(plain.v, bits=2).codes)
        assert torch.equal(packed.positions, plain.positions)
    assert len(small.context[1].positions) > len(small.context[0].positions)


@pytest.mark.parametrize(("width", "bits"), [(160, 4), (192, (8, 4)), (160, (4, 2)), (36, 2)])
def test_heads_of_any_width_that_is_whole_bytes_are_packed(width, bits):
    """Above 128 too where that does not divide it: all values of a row then share a scale."""
    model = random_model.make(random_model.config(head_dim=width, attn_scale=width**-0.5))
    cache = scored(model)
    limit = kvzip.nbytes(kvzip.compress(cache, 1.0, bits=bits)) // 2
    small = kvzip.compress(cache, budget_bytes=limit, bits=bits, consume=True)
    assert small.context[0].k.group == small.context[0].v.group == width
    assert 0.9 * limit < kvzip.nbytes(small) <= limit
    assert kvzip.generate(model, small, "Why?", max_tokens=2, template=False).token_ids


def test_heads_of_no_whole_bytes_are_refused_before_anything_is_freed():
    cache = scored(random_model.make(random_model.config(head_dim=6)))
    for bits in (2, (8, 2)):
        with pytest.raises(ValueError, match="a head width of 6: take 4 bits"):
            kvzip.compress(cache, 0.5, bits=bits, consume=True)
    assert cache.layers and kvzip.compress(cache, 0.5, bits=4, consume=True).kept


@pytest.mark.parametrize("room", [2**40, 0], ids=["room", "none"])
def test_consumed_rows_that_need_wide_scales_get_them(dense, room, monkeypatch):
    """With room for all rows this is known when all layers are packed, else layer by layer."""
    layers = list(dense.layers)
    layers[1] = replace(layers[1], v=layers[1].v * 1e-9)
    cache = replace(dense, layers=layers)
    want = kvzip.compress(cache, 0.4, bits=(4, 2))
    free = iter([2**40, room])
    monkeypatch.setattr(compression, "free_bytes", lambda device: next(free))
    waits, wait = [], kvzip.ops.quantize_turned
    monkeypatch.setattr(kvzip.ops, "quantize_turned", lambda *a, **b: waits.append(1) or wait(*a, **b))
    small = kvzip.compress(replace(cache, layers=list(layers)), 0.4, bits=(4, 2), consume=True)
    assert len(waits) == (2 if room else 4)  # the keys and values of one layer, or of both
    for one, two in zip(small.context, want.context, strict=True):
        for name in ("k", "v"):
            got, same = getattr(one, name), getattr(two, name)
            assert torch.equal(got.codes, same.codes) and torch.equal(got.scale, same.scale)
            assert got.scale.dtype == same.scale.dtype
    assert [kv.v.scale.dtype for kv in small.context] == [torch.float16, torch.float32]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["k", "v"])
def test_what_cannot_be_packed_into_bits_is_found_before_anything_is_freed(plain, name, value):
    cache = scored(plain)
    lowest = int(cache.scores.values[1, 0].argmin()) + cache.start
    rows = getattr(cache.layers[1], name)
    for row, fits in ((lowest, True), (0, False), (int(cache.scores.values[1, 0].argmax()) + cache.start, False)):
        was = rows[0, 0, row, 3].clone()
        rows[0, 0, row, 3] = value
        cache = replace(cache, scores=replace(cache.scores, layers=(4, 7)))  # as if there were windows between
        if fits:
            assert kvzip.compress(replace(cache, layers=list(cache.layers)), 0.4, bits=8, consume=True).kept
        else:
            with pytest.raises(ValueError, match=r"expected finite keys and values.*in layer 7:.*the cache is intact"):
                kvzip.compress(cache, 0.4, bits=8, consume=True)
            check_whole(cache)
        rows[0, 0, row, 3] = was


def test_another_cache_is_named(plain):
    small = kvzip.compress(scored(plain), 0.5)
    for call in (lambda: kvzip.compress(small, 0.1), lambda: kvzip.score(plain, small)):
        with unchecked(), pytest.raises(TypeError, match=r"expected a DenseCache.*got RaggedCache.*scores.shrink"):
            call()
    with (
        unchecked(),
        pytest.raises(TypeError, match=r"expected a RaggedCache, got DenseCache: kvzip\.compress"),
    ):
        kvzip.scores.shrink(scored(plain), 0.1)


def fifth(kind):
    """0.2, or 1/5 of another type."""
    return {
        "numpy": np.float64(0.2),
        "fraction": Fraction(1, 5),
        "decimal": Decimal("0.2"),
        "tensor": torch.tensor(0.2),
    }[kind]


@pytest.mark.parametrize("kind", ["numpy", "fraction", "decimal", "tensor"])
def test_numbers_may_be_of_any_type(dense, plain, kind):
    value, tokens = fifth(kind), np.int64(3)
    want = float(value)
    for level in ("pair", "layer", "uniform", "head"):
        more = {"sink": tokens, "recent": torch.tensor(2)} if level == "head" else {"min_rows": tokens}
        plain_more = {name: int(number) for name, number in more.items()}
        got, expected = (
            kvzip.keep_mask(dense.scores, ratio, level=level, **options)
            for ratio, options in ((value, more), (want, plain_more))
        )
        assert torch.equal(got, expected)
    small = kvzip.compress(dense, value, bits=np.int8(8))
    assert small.kept == int(want * dense.total) and type(small.kept) is int and small.context[0].k.bits == 8
    assert kvzip.compress(dense, budget=value * 10).kept == int(float(value * 10) * 4)
    assert kvzip.compress(dense, threshold=value).kept == kvzip.compress(dense, threshold=want).kept
    half = kvzip.compress(dense, 0.5)
    assert kvzip.scores.shrink(half, value).kept == int(want * dense.total)
    assert kvzip.scores.shrink(half, budget=value * 10).kept == int(float(value * 10) * 4)
    longer = kvzip.extend(plain, half, "And so on.")
    assert kvzip.fold(plain, longer, value).kept == half.kept + int(want * 40)


@pytest.mark.parametrize("bad", ["0.2", True, np.True_, torch.tensor([0.2]), 1j, torch.tensor(True)], ids=repr)
@pytest.mark.parametrize("name", ["ratio", "budget", "threshold", "min_rows", "sink", "recent", "bits"])
def test_what_is_no_number_is_refused(dense, plain, name, bad):
    more = {} if name in ("ratio", "budget", "threshold") else {"ratio": 0.5, "level": "head"}
    with unchecked(), pytest.raises(TypeError, match=f"expected {name} to be a (whole )?number, got .+: pass"):
        kvzip.compress(dense, **more, **{name: bad})
    if name in ("ratio", "budget", "threshold"):
        with unchecked(), pytest.raises(TypeError, match=f"expected {name} to be a number, got .+: pass"):
            kvzip.scores.shrink(kvzip.compress(dense, 0.5), **{name: bad})
    if name == "ratio":
        with unchecked(), pytest.raises(TypeError, match=r"expected ratio to be a number, got .+: pass"):
            kvzip.fold(plain, kvzip.compress(dense, 0.5), bad)


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_contexts_are_smaller_and_within_half_a_step(model, bits):
    cache = scored(model)
    cache = replace(cache, scores=replace(cache.scores, asked=None))  # else keys are rounded by what queries ask
    wide, packed = kvzip.compress(cache, 0.5), kvzip.compress(cache, 0.5, bits=bits)
    assert torch.equal(kept(wide), kept(packed)) and wide.kept == packed.kept
    offsets = packed.context[0].offsets
    for name in ("k", "v"):
        want, got = getattr(wide.context[0], name), getattr(packed.context[0], name)
        assert got.codes.nbytes == want.numel() * bits // 8
        error = kvzip.ops.dequantize(got, offsets=offsets) - want
        if name == "k":
            error /= got.channels.spread.repeat_interleave(offsets.diff(), 0)
            centers = torch.stack([want[a:b].mean(0) for a, b in itertools.pairwise(offsets.tolist())])
            apart = (got.channels.center - centers).abs()  # in few bits it is moved by what the first row loses
            assert (apart <= 0.2 + (bits < 8) * got.channels.spread * got.scale.amax()).all()
        assert got.turned == (bits < 8 if name == "k" else bits < 4)
        error = kvzip.ops.turn(error) if got.turned else error
        assert (error.abs() <= got.scale.float() / 2 * (1 + 1e-2) + 1e-5).all()
    assert kvzip.generate(model, packed, ["Who?", "x"], max_tokens=4)
    with pytest.raises(ValueError, match="bits of 8, 4 or 2"):
        kvzip.compress(cache, 0.5, bits=3)


def test_bad_input_is_named(plain):
    cache = scored(plain)
    for ratio in (0.0, -0.1, 1.01, float("nan")):
        with pytest.raises(ValueError, match="0 < ratio <= 1"):
            kvzip.compress(cache, ratio)
    with pytest.raises(ValueError, match=r"exactly one of ratio, budget, budget_bytes and threshold.*ratio=0.3"):
        kvzip.compress(cache)
    with pytest.raises(ValueError, match="exactly one"):
        kvzip.compress(cache, 0.3, budget=4.0)
    with pytest.raises(ValueError, match=r"call kvzip.score"):
        kvzip.compress(kvzip.prefill(plain, TEXT), 0.3)
    values = cache.scores.values.clone()
    values[0, 1, 3] = torch.nan
    for options in ({"ratio": 0.3}, {"threshold": 0.1}, {"ratio": 0.3, "min_rows": 2}, {"ratio": 0.3, "level": "head"}):
        with pytest.raises(ValueError, match="without NaN"):
            kvzip.compress(scored(plain, values), **options)
    with pytest.raises(ValueError, match="level 'pair', 'layer', 'uniform' or 'head', got 'token'"):
        kvzip.compress(cache, 0.3, level="token")
    with pytest.raises(ValueError, match=r"at most 29 protected and minimum rows.*got 80"):
        kvzip.compress(cache, 0.1, protect=[(0, 20)])
    with pytest.raises(ValueError, match=r"protected spans within \[0, 73\]"):
        kvzip.compress(cache, 0.5, protect=[(3, 90)])
    with pytest.raises(ValueError, match="a threshold that is a number, got NaN"):
        kvzip.compress(cache, threshold=float("nan"))


@pytest.mark.parametrize("spans", [(3, 9), [3, 9], [(3,)], [(3, 9, 12)], [(0.5, 2)]], ids=str)
@unchecked()
def test_spans_that_are_none_are_named(dense, spans):
    with pytest.raises(ValueError, match=r"\(start, stop\) pairs of context tokens, got .*protect=\[\(0, 9\)\]"):
        kvzip.compress(dense, 0.5, protect=spans)


def test_a_third_of_the_pairs_in_4_bits_is_a_twelfth_of_the_bytes():
    """Heads of 128 values in bfloat16, as large models have, all metadata of 3,300 tokens included."""
    model = random_model.make(random_model.config(head_dim=128, attn_scale=128**-0.5), dtype=torch.bfloat16)
    cache = kvzip.score(model, kvzip.prefill(model, TEXT * 45), scope="chunk", chunk=400)
    small = kvzip.compress(cache, 0.3, bits=4)
    assert 11.5 < kvzip.nbytes(cache) / kvzip.nbytes(small) < 12.5
