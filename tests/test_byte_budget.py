"""A budget of bytes: the finished cache has at most so many, and one more step of pairs would not fit."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvzip
import random_model
from kvzip import choosing
from kvzip.cache import RaggedKV
from kvzip.cache.sizes import ragged_nbytes
from kvzip.ops import decode_schedule
from kvzip.ops.schedule import schedule_nbytes

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 3
LEVELS = st.sampled_from(["pair", "layer", "uniform", "head"])
BITS = st.sampled_from([None, 8, 4, (8, 4), (4, 2)])


def made(windows, dtype):
    model = random_model.make(random_model.config(windows=windows, head_dim=16, attn_scale=0.25), dtype=dtype)
    return model, kvzip.score(model, kvzip.prefill(model, TEXT))


@pytest.fixture(scope="module")
def caches():
    return [made((None, 6, None), torch.float32)[1], made((None, None), torch.bfloat16)[1]]


def rows_of(small):
    return [kv.offsets.diff().tolist() for kv in small.context if isinstance(kv, RaggedKV)]


def next_step(cache, small, level, **options):
    """What `compress` keeps with one pair more (in each layer or head, or one head more); None if all are kept."""
    layers, heads, length = cache.scores.values.shape
    per = {"pair": layers * heads, "layer": heads, "uniform": 1, "head": layers * heads}[level]
    shared = small.kept // {"pair": 1, "layer": layers, "uniform": layers * heads, "head": length}[level]
    if small.kept == small.total:
        return None
    more = (shared + 1) * (length if level == "head" else 1)
    return kvzip.compress(cache, budget=(more + 1e-6) / per, level=level, **options)


@settings(max_examples=40)
@given(part=st.floats(0.05, 1.1), level=LEVELS, bits=BITS, which=st.integers(0, 1))
def test_as_many_pairs_as_fit(caches, part, level, bits, which):
    cache = caches[which]
    limit = int(part * kvzip.nbytes(cache))
    try:
        small = kvzip.compress(cache, budget_bytes=limit, level=level, bits=bits)
    except ValueError as error:
        least = int(str(error).split("at least ")[1].split(" bytes")[0].replace(",", ""))
        assert least > limit
        small = kvzip.compress(cache, budget_bytes=least, level=level, bits=bits)
        assert small.kept == 0
        assert kvzip.nbytes(small) == least
        return
    assert kvzip.nbytes(small) <= limit
    more = next_step(cache, small, level, bits=bits)
    assert more is None or kvzip.nbytes(more) > limit
    if more is not None:
        assert more.kept > small.kept


@given(ratio=st.floats(0.01, 1.0), bits=BITS, which=st.integers(0, 1))
def test_bytes_are_known_before_rows_are_packed(caches, ratio, bits, which):
    cache = caches[which]
    small = kvzip.compress(cache, ratio, bits=bits)
    scales = [(kv.k.scale.element_size(), kv.v.scale.element_size()) for kv in small.context if bits and kv_(kv)]
    pair = bits if bits is None or isinstance(bits, tuple) else (bits, bits)
    assert ragged_nbytes(cache, rows_of(small), bits=pair, scales=scales) == kvzip.nbytes(small)


def kv_(layer):
    return isinstance(layer, RaggedKV)


@given(lengths=st.lists(st.integers(0, 5000), min_size=1, max_size=9), processors=st.sampled_from([1, 8, 132]))
def test_bytes_of_a_schedule(lengths, processors):
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    schedule = decode_schedule(torch.tensor(bounds, dtype=torch.int32), processors=processors)
    assert schedule_nbytes(bounds, processors) == schedule.cuts[0].bounds.untyped_storage().nbytes()


def test_protected_rows_come_first_and_need_room(caches):
    cache = caches[0]
    small = kvzip.compress(cache, budget_bytes=kvzip.nbytes(cache) // 2, protect=[(5, 20)], min_rows=3)
    held = kvzip.cache.rows.kept_mask(small)
    assert held[:, :, 5:20].all()
    assert kvzip.nbytes(small) <= kvzip.nbytes(cache) // 2
    alone = kvzip.nbytes(kvzip.compress(cache, budget=15, protect=[(5, 20)]))
    with pytest.raises(ValueError, match=rf"at least {alone:,} bytes, got {alone - 1:,}.*protect less"):
        kvzip.compress(cache, budget_bytes=alone - 1, protect=[(5, 20)])
    assert kvzip.compress(cache, budget_bytes=alone, protect=[(5, 20)]).kept == 15 * 4


@settings(max_examples=30)
@given(
    part=st.floats(0.2, 0.99), floor=st.floats(0, 1), level=st.sampled_from(["pair", "layer", "uniform"]),
    first=st.integers(0, 150), count=st.integers(1, 40),
)  # fmt: skip
def test_what_is_kept_anyway_and_a_floor_go_with_any_budget_that_holds_them(caches, part, floor, level, first, count):
    cache, protect = caches[1], [(first, first + count)]
    limit, how = int(part * kvzip.nbytes(cache)), {"level": level, "floor": floor, "protect": protect}
    try:
        small = kvzip.compress(cache, budget_bytes=limit, **how)
    except ValueError as error:
        assert int(str(error).split("at least ")[1].split(" bytes")[0].replace(",", "")) > limit
        return
    assert kvzip.nbytes(small) <= limit
    held = kvzip.cache.rows.kept_mask(small)
    assert held[:, :, first : first + count].all()
    assert held.sum(-1).min() >= int(floor * small.kept / held.shape[0] / held.shape[1])
    # What a larger ratio can keep is larger than the budget.
    for more in (small.kept + step for step in (1, 2, 3, 5, 8, 40, 400)):
        try:
            larger = kvzip.compress(cache, min(1.0, (more + 0.5) / small.total), **how)
        except ValueError:  # the floor of so many is beyond them
            continue
        assert larger.kept <= small.kept or kvzip.nbytes(larger) > limit


def test_a_floor_that_leaves_no_room_for_protected_rows_is_found_in_few_steps(caches, monkeypatch):
    """Each protected row adds one that the floor of so many asks for, up to all of them."""
    cache, calls = caches[1], []
    values = cache.scores.values.clone()
    values[:, :, 0] = -1
    cache = replace(cache, scores=replace(cache.scores, values=values))
    real = choosing._forced
    monkeypatch.setattr(choosing, "_forced", lambda *given: calls.append(1) or real(*given))
    with pytest.raises(ValueError, match="protected rows with the floor beside them"):
        kvzip.compress(cache, budget_bytes=kvzip.nbytes(cache) // 2, floor=1.0, protect=[(0, 1)])
    assert len(calls) < 40


def with_small_values(rows, score):
    """A cache in bfloat16 with values that float16 cannot hold in these rows of its first heads, which have a score.

    The others' are random ones up to 1.
    """
    _, cache = made((None, None), torch.bfloat16)
    for layer in cache.layers:
        layer.v[0, 0, rows] *= 2.0**-30
    values = torch.rand(cache.scores.values.shape, generator=torch.Generator().manual_seed(0))
    values[:, 0, rows.start - cache.start : rows.stop - cache.start] = score
    return replace(cache, scores=replace(cache.scores, values=values))


def test_rows_that_need_float32_scales_take_no_room_if_they_are_not_kept():
    """Whatever the number of pairs from which they are kept, as many as fit are."""
    cache = with_small_values(slice(60, 64), 0.5)
    whole = kvzip.nbytes(kvzip.compress(cache, 1.0, bits=4))
    for limit in range(whole // 3, whole, whole // 40):
        small = kvzip.compress(cache, budget_bytes=limit, bits=4)
        assert kvzip.nbytes(small) <= limit < kvzip.nbytes(next_step(cache, small, "pair", bits=4))


def test_scales_that_need_float32_are_counted():
    """A value that float16 cannot hold makes its layer's scales float32, which is known only when rows are packed."""
    cache = with_small_values(slice(40, 60), 2.0)
    limit = kvzip.nbytes(cache) // 4
    small = kvzip.compress(cache, budget_bytes=limit, bits=4)
    assert {kv.v.scale.dtype for kv in small.context} == {torch.float32}
    assert kvzip.nbytes(small) <= limit < kvzip.nbytes(next_step(cache, small, "pair", bits=4))


def test_room_for_biases():
    model, cache = made((None, None), torch.bfloat16)
    limit = kvzip.nbytes(cache) // 3
    small = kvzip.compress(cache, budget_bytes=limit, biases=True)
    fitted = kvzip.refit(model, cache, small)
    assert kvzip.nbytes(fitted) <= limit < kvzip.nbytes(kvzip.refit(model, cache, next_step(cache, small, "pair")))


def test_consuming_gives_the_same(caches):
    cache = caches[1]
    limit = kvzip.nbytes(cache) // 5
    small = kvzip.compress(cache, budget_bytes=limit, bits=(8, 4))
    again = kvzip.compress(replace(cache, layers=list(cache.layers)), budget_bytes=limit, bits=(8, 4), consume=True)
    assert again.kept == small.kept and kvzip.nbytes(again) == kvzip.nbytes(small)


def test_a_budget_that_is_none_is_named(caches):
    cache = caches[0]
    with pytest.raises(ValueError, match="exactly one of ratio, budget, budget_bytes and threshold"):
        kvzip.compress(cache, 0.3, budget_bytes=10_000)
    with pytest.raises(ValueError, match="budget_bytes to be at least 1"):
        kvzip.compress(cache, budget_bytes=0)
    with pytest.raises(TypeError, match="budget_bytes to be a whole number"):
        kvzip.options.budget(None, budget_bytes=1.5)
    with pytest.raises(ValueError, match=r"at least .* bytes, got 7: .*raise budget_bytes"):
        kvzip.compress(cache, budget_bytes=7)
    with pytest.raises(ValueError, match="expected budget_bytes with biases=True"):
        kvzip.compress(cache, 0.3, biases=True)


@pytest.mark.parametrize("bits", [None, (4, 2)])
def test_a_floor_is_a_part_of_what_fits(caches, bits):
    """Every head has a fifth of an equal share of as many pairs as fit, and one pair more would not."""
    cache = caches[1]
    values = cache.scores.values.clone()
    values[0, 0] *= 1e-6  # a head that no query looks at
    cache = replace(cache, scores=replace(cache.scores, values=values))
    limit = kvzip.nbytes(cache) // 5
    small = kvzip.compress(cache, budget_bytes=limit, floor=0.2, bits=bits)
    rows = [n - cache.start for heads in rows_of(small) for n in heads]
    assert min(rows) == int(0.2 * small.kept / len(rows)) > 0
    assert min(map(min, rows_of(kvzip.compress(cache, budget_bytes=limit, bits=bits)))) == cache.start
    assert kvzip.nbytes(small) <= limit < kvzip.nbytes(next_step(cache, small, "pair", bits=bits, floor=0.2))
    plain = kvzip.compress(cache, budget=small.kept / len(rows) + 1e-9, floor=0.2, bits=bits)
    assert torch.equal(kvzip.cache.rows.kept_mask(plain), kvzip.cache.rows.kept_mask(small))


def test_a_share_of_a_cache_has_no_budget_of_bytes(caches):
    share = replace(caches[0], share=object.__new__(kvzip.parallel.Share))
    with pytest.raises(ValueError, match=r"a whole cache with budget_bytes, got a share of one: .*pass a ratio"):
        kvzip.choosing.keep_bytes(share, kvzip.options.budget(None, budget_bytes=9_000))
