"""refit: what it promises of each head and chunk, against plain float64; what carries a bias; what is refused."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvzip
import plain_cache
import random_model
from accuracy import assert_as_accurate
from kvzip import options, refitting, scores
from kvzip.cache import RaggedKV, WindowKV
from kvzip.cache.caches import tensors_of
from kvzip.cache.rows import join, take
from kvzip.refitting import solving
from plain_refit import Problem, problems
from unchecked import unchecked

TEXT = "Happy families are all alike; every unhappy family is unhappy in its own way. Everything was in confusion."
FAMILIES = {
    "plain": {},
    "window": {"windows": (None, 9, None)},
    "softcap": {"attn_softcap": 2.0},
    "own heads": {"num_kv_heads": 4},
}
CHUNK = 40
HOW = options.Refitting(chunk=CHUNK)


def model_of(family, dtype=torch.float64):
    return random_model.make(random_model.config(**FAMILIES[family]), dtype=dtype)


@pytest.fixture(scope="module", params=FAMILIES)
def scored(request):
    model = model_of(request.param)
    return model, kvzip.score(model, kvzip.prefill(model, TEXT), chunk=CHUNK)


@pytest.fixture(scope="module")
def plain():
    """A float32 model and a scored cache."""
    model = model_of("window", torch.float32)
    return model, kvzip.score(model, kvzip.prefill(model, TEXT), chunk=CHUNK)


def fitted(model, dense, small, how=HOW, dtype=torch.float64):
    """The rows that are stored, before they are rounded."""
    return refitting.fit_rows(model, dense, small.context, how, dtype=dtype)


def rows_of(small, rows, problem: Problem):
    """The kept tokens of a problem, counted in its chunk, and their weights and values."""
    layer, own = small.context[problem.layer], rows[problem.layer]
    first, stop = layer.offsets[problem.head : problem.head + 2].tolist()
    tokens = layer.positions[first:stop].long() - problem.first
    inside = (tokens >= 0) & (tokens < problem.p.shape[1])
    return tokens[inside], own.bias[first:stop][inside].exp(), own.values[first:stop][inside]


def same(a, b):
    ours, theirs = tensors_of(a), tensors_of(b)
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize(("ratio", "steps", "near"), [(0.04, None, 0.05), (0.3, 20, 1e-3), (0.8, None, 0.05)])
def test_the_objective_never_rises_and_nears_its_least(scored, ratio, steps, near, monkeypatch):
    """In each head and chunk, in float64, F of the docstring; weights and values are near the exact solutions.

    With `steps` times as many steps they are much nearer: the fixed numbers are a choice of time, not of another aim.
    """
    if steps:
        monkeypatch.setattr(solving, "WEIGHT_STEPS", steps * solving.WEIGHT_STEPS)
        monkeypatch.setattr(solving, "VALUE_STEPS", steps * solving.VALUE_STEPS)
    model, dense = scored
    small = kvzip.compress(dense, ratio)
    rows, mass = fitted(model, dense, small)
    gains, kept_mass = [], torch.zeros(3, *mass.before.shape)
    place = {n: i for i, n in enumerate(dense.scored_layers)}
    for problem in problems(model, dense, chunk=CHUNK):
        kept, w, values = rows_of(small, rows, problem)
        one, old = torch.ones(len(kept), dtype=torch.float64), problem.v[kept]
        before, after = problem.objective(kept, one, old), problem.objective(kept, w, values)
        assert after <= before
        at = (place[problem.layer], problem.head)
        kept_mass[0][at] += problem.p[:, kept].sum()
        kept_mass[1][at] += (problem.p[:, kept] @ w).sum()
        kept_mass[2][at] += problem.p.sum()
        gains.append(after < before)
        if not len(kept) or len(kept) == problem.p.shape[1]:
            assert torch.equal(w, one) and torch.equal(values, old)
            gains.pop()
        if not gains or len(gains) % 4:
            continue
        best = problem.best_weights(kept, HOW.ridge, HOW.bound)
        lam = HOW.ridge * problem.p[:, kept].square().sum(0).mean()

        def cost(w, problem=problem, kept=kept, lam=lam):
            return problem.mass_error(kept, w) + lam * (w - 1).square().sum()

        if not torch.equal(w, one):
            assert cost(w) - cost(best) <= near * (cost(one) - cost(best)) + 1e-12
            if not torch.equal(values, old):
                exact = problem.best_values(kept, w, HOW.pull)
                least, start, got = (problem.value_cost(kept, w, x, HOW.pull) for x in (exact, old, values))
                assert got - least <= near * (start - least) + 1e-12
    assert sum(gains) >= 0.7 * len(gains)
    torch.testing.assert_close(mass.before, kept_mass[0] / kept_mass[2])
    torch.testing.assert_close(mass.after, kept_mass[1] / kept_mass[2])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_answer_attends_to_exp_of_the_bias(dtype, device):
    """Keys of tokens after a refitted cache are those of plain attention whose logits have the biases added."""
    model = model_of("window", dtype)
    dense = kvzip.score(model, kvzip.prefill(model, TEXT), chunk=CHUNK)
    small = kvzip.refit(model, dense, kvzip.compress(dense, 0.3), chunk=CHUNK)
    assert any(x.bias.abs().max() > 0.1 for x in small.context if isinstance(x, RaggedKV))
    ids, held, biased = [70, 80, 90], plain_cache.read(small), plain_cache.biases(small)

    def plainly(dtype, bias=biased):
        return torch.stack(plain_cache.run(model_of("window", dtype), held, ids, small.context_length, bias).k)

    answering = random_model.make(model.config, dtype=dtype, device=device)
    got = kvzip.extend(answering, kvzip.to(small, device), torch.tensor(ids)).tail.k
    got, exact = torch.stack([x[0, :, : len(ids)] for x in got]), plainly(torch.float64)
    assert_as_accurate(got, exact, plainly(dtype))
    if dtype == torch.float32:
        with pytest.raises(AssertionError, match="worst error"):  # without biases it is another result
            assert_as_accurate(got, plainly(torch.float64, None), plainly(dtype, None))


def test_arguments_stay_as_they_are_and_the_fit_is_the_same_again(plain):
    """Also of what is fitted already: its values and biases are not read."""
    model, dense = plain
    small = kvzip.compress(dense, 0.3)
    held = [[x.clone() for x in tensors_of(each)] for each in (dense, small)]
    first = kvzip.refit(model, dense, small, chunk=CHUNK)
    assert all(
        torch.equal(x, y)
        for each, old in zip((dense, small), held, strict=True)
        for x, y in zip(tensors_of(each), old, strict=True)
    )
    assert not same(first, small) and first.method == "kvzip-chunk/pair+refit"
    assert (first.kept, first.total, first.scores) == (small.kept, small.total, small.scores)
    again = kvzip.refit(model, dense, first, chunk=CHUNK)
    assert same(again, first) and again.method == first.method
    for x, y in zip(first.context, small.context, strict=True):
        assert x is y if isinstance(x, WindowKV) else (x.k is y.k and x.bias.dtype == torch.float16)
    assert kvzip.nbytes(first) == kvzip.nbytes(small) + sum(
        2 * len(x.positions) for x in first.context if isinstance(x, RaggedKV)
    )


def test_keeping_all_changes_nothing(plain):
    model, dense = plain
    for bits in (None, 8, 4):
        small = kvzip.compress(dense, 1.0, bits=bits)
        assert kvzip.refit(model, dense, small, chunk=CHUNK) is small
    few = kvzip.refit(model, dense, kvzip.compress(dense, 0.5, protect=[(0, CHUNK)]), chunk=CHUNK)
    for layer, own in zip(few.context, dense.layers, strict=True):
        if isinstance(layer, RaggedKV):
            first = layer.positions < dense.start + CHUNK  # a chunk that is kept whole
            assert torch.equal(layer.bias[first], torch.zeros_like(layer.bias[first]))
            heads = kvzip.ops.types.owners(layer.offsets, len(first))[first]
            assert torch.equal(layer.v[first], own.v[0][heads, layer.positions[first].long()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [None, 8, (8, 4)], ids=str)
@pytest.mark.parametrize(
    "budget", [{"ratio": 0.3, "level": "head"}, {"budget": 1, "level": "uniform"}, {"threshold": 0.2}]
)
def test_any_budget_dtype_and_bits_give_a_finite_fit(dtype, bits, budget):
    """Heads that keep nothing, one pair of a chunk, or all of them, in every form that rows have."""
    model = model_of("window", dtype)
    dense = kvzip.score(model, kvzip.prefill(model, TEXT), chunk=CHUNK)
    small = kvzip.compress(dense, **budget, bits=bits)
    fitted = kvzip.refit(model, dense, small, chunk=CHUNK)
    for x, y in zip(fitted.context, small.context, strict=True):
        if isinstance(x, RaggedKV):
            assert x.bias.isfinite().all() and x.bias.abs().max() <= 3.01
            assert torch.equal(x.positions, y.positions) and x.k is y.k
            if bits is None:
                assert x.v.isfinite().all() and x.v.dtype == dtype
            else:
                assert (x.v.bits, x.v.group, x.v.codes.shape) == (y.v.bits, y.v.group, y.v.codes.shape)
    assert kvzip.generate(model, fitted, "Who?", max_tokens=2, template=False).token_ids


def test_the_fit_is_for_quantized_keys_as_they_are():
    """So that weights and values make up for the rounding of keys in 4 bits too."""
    model = model_of("plain")
    single = model_of("plain", torch.float32)
    dense = kvzip.prefill(model, TEXT)
    narrow = kvzip.score(single, kvzip.prefill(single, TEXT), chunk=CHUNK)
    small = kvzip.compress(narrow, 0.9, bits=4, level="uniform")
    rows, _ = refitting.fit_rows(single, narrow, small.context, HOW, dtype=torch.float32)
    gains = []
    for problem in problems(model, dense, chunk=CHUNK):
        kept, w, values = rows_of(small, rows, problem)
        layer = small.context[problem.layer]
        first, stop = layer.offsets[problem.head : problem.head + 2].tolist()
        keys = kvzip.ops.dequantize(layer.k, offsets=layer.offsets)[first:stop]
        inside = torch.isin(layer.positions[first:stop], kept + problem.first)
        p = problem.moved(keys[inside].double())
        one = torch.ones(len(kept), dtype=torch.float64)
        old = narrow.layers[problem.layer].v[0, problem.head, kept + problem.first].double()
        before, after = (problem.objective(kept, x.double(), y, p) for x, y in ((one, old), (w, values.double())))
        assert after <= before
        gains.append(after < 0.9 * before)
    assert sum(gains) > 0.5 * len(gains)


def test_a_text_of_one_character_gives_a_finite_fit(plain):
    """Its keys differ by rotation alone."""
    model, _ = plain
    dense = kvzip.score(model, kvzip.prefill(model, "a" * 90), chunk=CHUNK)
    fitted = kvzip.refit(model, dense, kvzip.compress(dense, 0.2, min_rows=4), chunk=CHUNK)
    for layer in fitted.context:
        if isinstance(layer, RaggedKV):
            assert layer.bias.isfinite().all() and layer.v.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fit_on_the_gpu_is_as_accurate_as_plain_pytorch_there(family, monkeypatch):
    """In float32, with kernels and without, against float64; the pairs are those of one cache."""
    wide = model_of(family)
    chosen = kvzip.score(wide, kvzip.prefill(wide, TEXT), chunk=CHUNK).scores

    def fit(dtype, device="cpu"):
        model = random_model.make(wide.config, dtype=dtype, device=device)
        dense = kvzip.prefill(model, TEXT)
        small = kvzip.compress(scores.attach(dense, chosen), 0.3)
        rows, mass = refitting.fit_rows(model, dense, small.context, HOW, dtype=torch.float32)
        found = [x for x in rows if x is not None]
        bias, values = torch.cat([x.bias for x in found]), torch.cat([x.values for x in found])
        return bias.cpu(), values.cpu(), torch.stack([mass.before, mass.after])

    got = fit(torch.float32, "cuda")
    monkeypatch.setenv("KVZIP_BACKEND", "reference")
    for ours, exact, plain in zip(got, fit(torch.float64), fit(torch.float32, "cuda"), strict=True):
        assert_as_accurate(ours, exact.double(), plain)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_fit_on_the_gpu_keeps_more_of_the_mass_in_every_form(bits):
    config = random_model.config(windows=(None, 9, None), head_dim=16, hidden_size=64, attn_scale=0.25)
    model = random_model.make(config, dtype=torch.bfloat16, device="cuda")
    dense = kvzip.score(model, kvzip.prefill(model, TEXT), chunk=CHUNK)
    small = kvzip.compress(dense, 0.3, bits=bits)
    fitted, mass = refitting.refit_and_measure(model, dense, small, HOW)
    assert mass.after.mean() > mass.before.mean() and (mass.after - 1).abs().mean() < (mass.before - 1).abs().mean()
    again = kvzip.refit(model, dense, small, chunk=CHUNK)
    assert same(again, fitted)
    assert kvzip.generate(model, fitted, "Who?", max_tokens=2, template=False).token_ids


def test_nan_leaves_a_head_as_it_is(plain):
    model, dense = plain
    small = kvzip.compress(dense, 0.3)
    rows = [x.clone() for x in (dense.layers[0].v, dense.layers[0].k)]
    broken = replace(dense, layers=[replace(dense.layers[0], v=rows[0].fill_(torch.nan)), *dense.layers[1:]])
    fitted = kvzip.refit(model, broken, small, chunk=CHUNK)
    assert torch.equal(fitted.context[0].bias, torch.zeros_like(fitted.context[0].bias))


@settings(max_examples=8)
@given(ratio=st.floats(0.05, 0.9), part=st.floats(0.2, 1.0))
def test_shrinking_leaves_bias_and_value_of_each_row_that_stays(plain, ratio, part):
    model, dense = plain
    fitted = kvzip.refit(model, dense, kvzip.compress(dense, ratio), chunk=CHUNK)
    small = scores.shrink(fitted, ratio * part)
    assert small.method == fitted.method
    for x, y in zip(small.context, fitted.context, strict=True):
        if isinstance(x, RaggedKV):
            keep = torch.zeros(len(y.positions), dtype=torch.bool)
            for h, (a, b) in enumerate(zip(y.offsets[:-1].tolist(), y.offsets[1:].tolist(), strict=True)):
                own = x.positions[x.offsets[h] : x.offsets[h + 1]]
                keep[a:b] = torch.isin(y.positions[a:b], own)
            assert torch.equal(x.bias, y.bias[keep]) and torch.equal(x.v, y.v[keep])


def test_folded_turns_have_bias_0_and_their_own_values():
    model = model_of("window")  # float64, as both sides of the last comparison are passes of ours
    dense = kvzip.score(model, kvzip.prefill(model, TEXT), chunk=CHUNK)
    fitted = kvzip.refit(model, dense, kvzip.compress(dense, 0.3), chunk=CHUNK)
    turn = kvzip.extend(model, fitted, "And who paid for it?")
    assert turn.context is fitted.context
    folded = kvzip.fold(model, turn)
    length = fitted.context_length
    for n, (x, y) in enumerate(zip(folded.context, fitted.context, strict=True)):
        if isinstance(x, RaggedKV):
            old = x.positions < length
            assert torch.equal(x.bias[old], y.bias) and torch.equal(x.v[old], y.v)
            assert torch.equal(x.bias[~old], torch.zeros_like(x.bias[~old])) and x.bias.dtype == y.bias.dtype
            assert torch.equal(x.v[~old], turn.tail.v[n][0, :, : len(turn.token_ids) - length].flatten(0, 1))
    ids = torch.tensor([70, 80])
    ours, theirs = (kvzip.extend(model, each, ids).tail for each in (folded, turn))
    n = len(turn.token_ids) - length
    for k, own in zip(ours.k, theirs.k, strict=True):
        torch.testing.assert_close(k[:, :, :2], own[:, :, n : n + 2])


def test_rows_of_layers_with_and_without_biases_join(plain):
    small = kvzip.compress(plain[1], 0.3)
    layer, own = small.context[0], torch.arange(len(small.context[0].positions)).float()
    biased = replace(layer, bias=own)
    both, before, after = join(biased, biased), join(layer, biased), join(biased, layer)
    zeros = torch.zeros_like(own)
    for joined, (x, y) in ((both, (own, own)), (before, (zeros, own)), (after, (own, zeros))):
        parts = [
            part for h in zip(*(z.split(layer.offsets.diff().tolist()) for z in (x, y)), strict=True) for part in h
        ]
        assert torch.equal(joined.bias, torch.cat(parts)) and joined.bias.dtype == torch.float32
    assert join(layer, layer).bias is None
    keep = own.long() % 3 == 0
    assert torch.equal(take(biased, keep).bias, own[keep]) and take(layer, keep).bias is None


def test_a_refitted_cache_does_not_go_to_transformers(plain):
    model, dense = plain
    fitted = kvzip.refit(model, dense, kvzip.compress(dense, 0.3, level="uniform"), chunk=CHUNK)
    with pytest.raises(ValueError, match=r"expected a cache without biases, got a refitted one: .* convert the cache"):
        kvzip.to_transformers(model, fitted)


def test_what_is_not_of_one_document_is_refused(plain):
    model, dense = plain
    small = kvzip.compress(dense, 0.3)
    other = kvzip.score(model, kvzip.prefill(model, TEXT[::-1]), chunk=CHUNK)
    turn = kvzip.extend(model, small, "Who?")
    streamed = kvzip.prefill_compressed(model, TEXT, 0.3, segment=60)
    consumed = kvzip.score(model, kvzip.prefill(model, TEXT))
    kvzip.compress(consumed, 0.3, consume=True)
    for big, kept, error in (
        (
            dense,
            kvzip.compress(other, 0.3),
            "compressed from this dense one of 107 tokens, got one of 107 with other tokens",
        ),
        (dense, turn, "without turns after its context"),
        (dense, streamed, "expected the keys of this dense cache, got others in layer"),
        (consumed, small, "freed by compress"),
        (replace(dense, fingerprint="ab-float32"), small, "fingerprint"),
    ):
        with pytest.raises(ValueError, match=error):
            kvzip.refit(model, big, kept)
    with unchecked(), pytest.raises(TypeError, match="RaggedCache"):
        kvzip.refit(model, dense, dense)
    for bad, error in (
        ({"ridge": 0}, "ridge above 0"),
        ({"pull": -1}, "pull above 0"),
        ({"bound": 11}, "bound from 0 to 10"),
        ({"chunk": 0}, "chunk"),
    ):
        with pytest.raises(ValueError, match=error):
            kvzip.refit(model, dense, small, **bad)


@pytest.mark.parametrize("family", ["plain", "window", "softcap"])
def test_a_stream_of_one_segment_is_fitted_as_the_whole(family):
    model = model_of(family)
    dense = kvzip.score(model, kvzip.prefill(model, TEXT), chunk=CHUNK)
    whole = kvzip.refit(model, dense, kvzip.compress(dense, 0.3), chunk=CHUNK)
    how = {"share": "segment", "chunk": CHUNK, "refit": True}
    streamed = kvzip.prefill_compressed(model, TEXT, 0.3, **how)
    assert streamed.method == "kvzip-chunk/stream-segment+refit"
    for x, y in zip(streamed.context, whole.context, strict=True):
        if isinstance(x, RaggedKV):
            assert torch.equal(x.positions, y.positions)
            assert (x.bias != 0).any()
            torch.testing.assert_close(x.bias, y.bias)
            torch.testing.assert_close(x.v, y.v)


def test_segments_are_fitted_as_they_are_read_and_an_interruption_changes_no_bit(tmp_path):
    model, how = model_of("window"), {"share": "segment", "chunk": 20, "refit": True, "segment": 40}
    whole, place = kvzip.prefill_compressed(model, TEXT, 0.3, **how), tmp_path / "partial"
    for x in whole.context:
        if isinstance(x, RaggedKV):
            later = x.positions >= 40 + whole.start
            assert (x.bias[later] != 0).any() and (x.bias[~later] != 0).any()

    def interrupt(done, total):
        if done == 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kvzip.prefill_compressed(model, TEXT, 0.3, **how, checkpoint=place, progress=interrupt)
    with pytest.raises(ValueError, match="with refitting=None"):
        kvzip.prefill_compressed(model, TEXT, 0.3, **how | {"refit": False}, checkpoint=place)
    assert same(kvzip.prefill_compressed(model, TEXT, 0.3, **how, checkpoint=place), whole)


def test_a_stream_that_keeps_all_is_not_fitted():
    model, how = model_of("plain"), {"share": "segment", "chunk": CHUNK, "segment": 60}
    fitted, whole = (kvzip.prefill_compressed(model, TEXT, 1.0, **how, refit=refit) for refit in (True, False))
    assert same(fitted, whole) and fitted.method == whole.method


@pytest.mark.parametrize("share", ["running", "final"])
def test_shares_that_drop_rows_later_are_refused(share):
    with pytest.raises(ValueError, match=f"expected share 'segment' with refit=True, got '{share}'"):
        kvzip.prefill_compressed(model_of("plain"), TEXT, 0.3, share=share, refit=True)
