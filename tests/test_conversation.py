"""Conversations: what the tail holds after extend, ask, fork and fold, and that nothing kept is ever lost."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvzip
import plain_cache
import random_model
from accuracy import assert_as_accurate, same_fields
from kvzip.cache import WindowKV
from kvzip.cache.caches import tensors_of
from kvzip.cache.rows import kept_mask
from kvzip.scoring import repeats
from unchecked import unchecked

TEXT = "It was the best of times, it was the worst of times."
QUERIES = ["Of what?", "And of what else was it?", "Why"]
WINDOWS = {"global": (None, None), "window": (6, None, 6), "softcap": (None, 5)}


@pytest.fixture(scope="module", params=WINDOWS)
def model(request):
    softcap = 3.0 if request.param == "softcap" else None
    made = random_model.make(random_model.config(windows=WINDOWS[request.param], attn_softcap=softcap))
    return replace(made, stop_ids=())


@pytest.fixture(scope="module")
def wide(model):
    """The same model in float64."""
    return replace(random_model.make(model.config, dtype=torch.float64), stop_ids=())


def plain_caches(model):
    dense = kvzip.score(model, kvzip.prefill(model, TEXT))
    ragged = kvzip.compress(dense, 0.4)
    return {
        "dense": dense,
        "ragged": ragged,
        "turn": kvzip.ask(model, ragged, QUERIES[0], max_tokens=5)[1],
        "folded": kvzip.fold(model, kvzip.extend(model, ragged, "So far so good."), 0.5),
    }


@pytest.fixture(scope="module")
def caches(model):
    found = plain_caches(model)
    packed = {name: kvzip.compress(found["dense"], 0.4, bits=bits) for name, bits in (("mixed", (4, 2)), ("int4", 4))}
    return found | packed


@pytest.fixture(scope="module")
def wide_caches(wide):
    return plain_caches(wide)


KINDS = st.sampled_from(["dense", "ragged", "mixed", "int4", "turn", "folded"])
TEXTS = st.text(st.characters(codec="ascii", exclude_categories=["C"]), min_size=1, max_size=25)


def text_of(model, ids):
    return model.tokenizer.control.decode(ids.tolist(), skip_special_tokens=False)


def passed(model, held, ids, used):
    """Keys and values [2 L H T D] that a plain forward pass over the held pairs gives these tokens."""
    run = plain_cache.run(model, held, ids, used)
    return torch.stack([torch.stack(run.k), torch.stack(run.v)])


def answers(model, cache, count=6):
    return kvzip.generate(model, cache, QUERIES, max_tokens=count)


@settings(max_examples=10)
@given(kind=KINDS, text=TEXTS)
@unchecked()
def test_extend_adds_what_a_forward_pass_over_the_held_pairs_gives(model, wide, caches, kind, text):
    cache = caches[kind]
    before = plain_cache.read(cache)
    longer = kvzip.extend(model, cache, text, chunk=7)
    after = plain_cache.read(longer)
    ids = model.tokenizer.text.encode(text).ids
    used = len(cache.token_ids)
    assert torch.equal(longer.token_ids, torch.cat([cache.token_ids, torch.tensor(ids)]))
    new = list(range(used, used + len(ids)))
    assert all(list(rows)[-len(ids) :] == new for heads in after for rows in heads)
    added = torch.tensor([[[rows.pop(position) for position in new] for rows in heads] for heads in after])
    assert after == before, "what was held stays, bit for bit"
    exact, plain = (passed(m, before, ids, used) for m in (wide, model))
    assert_as_accurate(added.permute(3, 0, 1, 2, 4), exact, plain)  # from [L H T 2 D]
    assert plain_cache.read(cache) == before, "the old cache is left as it was"


@settings(max_examples=10)
@given(kind=st.sampled_from(["dense", "ragged", "turn", "folded"]), text=TEXTS, data=st.data())
@unchecked()
def test_extend_in_two_steps_is_one(wide, wide_caches, kind, text, data):
    """In float64, where it shows: of two ways to round a few values neither is the nearer one."""
    cut = data.draw(st.integers(1, len(text) + 1))
    text = text + "!!"
    once = kvzip.extend(wide, wide_caches[kind], text)
    twice = kvzip.extend(wide, kvzip.extend(wide, wide_caches[kind], text[:cut]), text[cut:])
    assert torch.equal(once.token_ids, twice.token_ids)
    stop = len(once.token_ids) - once.context_length
    for a, b in zip((*once.tail.k, *once.tail.v), (*twice.tail.k, *twice.tail.v), strict=True):
        torch.testing.assert_close(b[:, :, :stop], a[:, :, :stop], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", ["dense", "ragged", "int4"])
def test_a_question_after_extend_is_one_after_the_longer_text(model, caches, kind):
    cache = kvzip.extend(model, caches[kind], " It was")
    held, used = plain_cache.read(cache), len(cache.token_ids)
    for query, answer in zip(QUERIES, answers(model, cache), strict=True):
        asked = model.tokenizer.text.encode("\n\n" + query).ids
        asked += model.tokenizer.control.encode("<|end|><|assistant|>").ids
        assert answer.token_ids == plain_cache.greedy(model, held, asked, used, 6)


@settings(max_examples=10)
@given(kind=KINDS, text=TEXTS)
def test_a_fork_shares_the_context_and_goes_its_own_way(model, caches, kind, text):
    cache = caches[kind]
    held = plain_cache.read(cache)
    other = kvzip.fork(cache)
    assert plain_cache.read(other) == held
    longer = kvzip.extend(model, other, text)
    assert plain_cache.read(cache) == held and plain_cache.read(other) == held
    original = kvzip.fork(cache).context if kind == "dense" else cache.context
    for layer, ours in zip(original, longer.context, strict=True):
        for name in ("k", "v"):
            a, b = getattr(layer, name), getattr(ours, name)
            a, b = (x if isinstance(x, torch.Tensor) else x.codes for x in (a, b))
            assert a.data_ptr() == b.data_ptr()
    if kind == "turn":
        other.tail.k[0].fill_(7.0)
        assert plain_cache.read(cache) == held, "the tails are not one"


def test_turns_stay_with_the_separators_of_the_template(model, caches):
    pieces = []
    first, cache = kvzip.ask(model, caches["dense"], QUERIES[0], max_tokens=6, on_token=pieces.append)
    second, cache = kvzip.ask(model, cache, QUERIES[1], max_tokens=6)
    assert "".join(pieces) == first.text and len(first.token_ids) == 6
    say = model.tokenizer.control.encode("<|end|><|assistant|>").ids
    close = model.tokenizer.control.encode("<|end|><|user|>").ids
    texts = [model.tokenizer.text.encode(text).ids for text in ("\n\n" + QUERIES[0], QUERIES[1])]
    expected = [*texts[0], *say, *first.token_ids, *close, *texts[1], *say, *second.token_ids, *close]
    tail = cache.token_ids[cache.context_length :].tolist()
    assert tail == expected and cache.tail.lengths.tolist() == [len(expected)]
    assert first == kvzip.generate(model, caches["dense"], QUERIES[0], max_tokens=6)


@unchecked()
def test_the_second_answer_comes_after_the_first_turn(model, caches):
    _, cache = kvzip.ask(model, caches["ragged"], QUERIES[0], max_tokens=6)
    answer, _ = kvzip.ask(model, cache, QUERIES[1], max_tokens=9)
    asked = model.tokenizer.text.encode(QUERIES[1]).ids + model.tokenizer.control.encode("<|end|><|assistant|>").ids
    held, used = plain_cache.read(cache), len(cache.token_ids)
    assert answer.token_ids == plain_cache.greedy(model, held, asked, used, 9)
    assert answer == kvzip.generate(model, cache, QUERIES[1], max_tokens=9)
    assert answer != kvzip.generate(model, caches["ragged"], QUERIES[1], max_tokens=9)


@pytest.mark.parametrize("stop", ["token", "text", "length"])
def test_the_turn_ends_whatever_ended_the_answer(model, caches, stop):
    ids = kvzip.generate(model, caches["ragged"], QUERIES[0], max_tokens=8).token_ids
    stopping = replace(model, stop_ids=(ids[3],) if stop == "token" else ())
    stops = [model.tokenizer.control.decode(ids)[2:4]] if stop == "text" else []
    answer, cache = kvzip.ask(stopping, caches["ragged"], QUERIES[0], max_tokens=8, stop=stops)
    assert answer.stopped == ("length" if stop == "length" else "stop")
    close = model.tokenizer.control.encode("<|end|><|user|>").ids
    tail = cache.token_ids[cache.context_length :].tolist()
    assert tail[-len(answer.token_ids) - len(close) :] == [*answer.token_ids, *close]


def test_plain_turns_are_plain_text(model):
    cache = kvzip.prefill(model, TEXT, template=False)
    answer, longer = kvzip.ask(model, cache, " It", max_tokens=6, template=False)
    ids = [*cache.token_ids.tolist(), *model.tokenizer.text.encode(" It").ids, *answer.token_ids]
    assert longer.token_ids.tolist() == ids
    with pytest.raises(ValueError, match="chat prefix for a chat query"):
        kvzip.ask(model, cache, "Why?")


def windows_of(model):
    return [spec.window for spec in model.config.layers]


def held_before_is_held_after(before, after, windows):
    for old, new, window in zip(before, after, windows, strict=True):
        for rows, more in zip(old, new, strict=True):
            kept = rows if window is None else {p: rows[p] for p in list(more) if p in rows}
            assert kept.items() <= more.items()


@settings(max_examples=10)
@given(kind=KINDS, text=TEXTS, ratio=st.sampled_from([0.01, 0.3, 0.77, 1.0]))
def test_fold_keeps_the_context_bit_for_bit_and_counts_its_own(model, caches, kind, text, ratio):
    cache = kvzip.extend(model, caches[kind], text)
    before, held = plain_cache.read(replace(cache, tail=None)), plain_cache.read(cache)
    folded = kvzip.fold(model, cache, ratio)
    windows = windows_of(model)
    after = plain_cache.read(folded)
    held_before_is_held_after(before, after, windows)
    used, first = len(cache.token_ids), cache.context_length
    pairs = sum(window is None for window in windows) * model.config.num_kv_heads * (used - first)
    assert folded.kept - cache.kept == int(ratio * pairs) and folded.total - cache.total == pairs
    assert folded.tail is None and folded.context_length == used and torch.equal(folded.token_ids, cache.token_ids)
    for layer, (new, window) in enumerate(zip(after, windows, strict=True)):
        for head, rows in enumerate(new):
            added = rows if window is not None else {p: row for p, row in rows.items() if p >= first}
            if window is not None:
                assert list(rows) == list(range(max(0, used - window), used))
            if window is not None or kind not in ("mixed", "int4"):
                assert added.items() <= held[layer][head].items()
    assert plain_cache.read(cache) == held, "the old cache is left as it was"


@pytest.mark.parametrize("kind", ["dense", "folded"])
@unchecked()
def test_answers_after_fold_at_one_are_those_before(model, caches, kind):
    cache = caches[kind]
    for query in QUERIES[:2]:
        _, cache = kvzip.ask(model, cache, query, max_tokens=4)
        once = kvzip.fold(model, cache)
        assert answers(model, once) == answers(model, cache)
    assert answers(model, cache) != answers(model, caches[kind])
    _, later = kvzip.ask(model, once, QUERIES[2], max_tokens=4)
    twice = kvzip.fold(model, later)
    assert answers(model, twice) == answers(model, kvzip.ask(model, cache, QUERIES[2], max_tokens=4)[1])
    held_before_is_held_after(plain_cache.read(later), plain_cache.read(twice), windows_of(model))
    assert same_fields(kvzip.fold(model, twice), twice)


@pytest.mark.parametrize(("kind", "bits"), [("mixed", (4, 2)), ("int4", (4, 4))])
def test_a_quantized_context_folds_rows_quantized_alike(model, caches, kind, bits):
    cache = kvzip.extend(model, caches[kind], QUERIES[1])
    folded = kvzip.fold(model, cache)
    held, after = plain_cache.read(cache), plain_cache.read(folded)
    for layer, kv in enumerate(folded.context):
        if isinstance(kv, WindowKV):
            continue
        assert (kv.k.bits, kv.v.bits, kv.k.group) == (*bits, cache.context[layer].k.group)
        assert kv.k.channels is cache.context[layer].k.channels is not None
        for head, rows in enumerate(after[layer]):
            for position in range(cache.context_length, len(cache.token_ids)):
                assert plain_cache.within(kv, head, held[layer][head][position], rows[position])
    assert kvzip.nbytes(folded) < kvzip.nbytes(kvzip.fold(model, kvzip.extend(model, caches["ragged"], QUERIES[1])))


def test_a_half_precision_scale_is_widened_where_new_rows_need_it():
    """In bfloat16 a context's scales fit float16; rows folded in later may not."""
    model = random_model.make(random_model.config(), dtype=torch.bfloat16)
    dense = kvzip.score(model, kvzip.prefill(model, TEXT))
    small = kvzip.compress(dense, 0.5, bits=8)
    cache = kvzip.extend(model, small, "more")
    cache.tail.v[0][0, 0, 0, :] = torch.linspace(-1e30, 1e30, 8).bfloat16()
    folded = kvzip.fold(model, cache)
    assert (small.context[0].v.scale.dtype, folded.context[0].v.scale.dtype) == (torch.float16, torch.float32)
    before, after = plain_cache.read(small), plain_cache.read(folded)
    held_before_is_held_after(before, after, [None, None])


def plain_scores(model, cache, *, chunk):
    """The tail's scores [L H n] by the formula, from one plain forward pass for each repeat."""
    held, used, first = plain_cache.read(cache), len(cache.token_ids), cache.context_length
    scored = [n for n, spec in enumerate(model.config.layers) if spec.window is None]
    values = torch.empty(len(scored), model.config.num_kv_heads, used - first, dtype=model.dtype)
    for start, stop, ids in repeats(model, cache, chunk=chunk, hint=8, begin=first):
        repeat = plain_cache.run(model, held, ids.tolist(), used)
        for n, layer in enumerate(scored):
            for head, rows in enumerate(held[layer]):
                seen = [*range(cache.start), *range(start, stop)]
                keys = torch.tensor([rows[position][0] for position in seen], dtype=model.dtype)
                q = repeat.q[layer].unflatten(0, (model.config.num_kv_heads, -1))[head]
                logits = q @ torch.cat([keys, repeat.k[layer][head]]).mT * model.config.attn_scale
                cap = model.config.attn_softcap
                logits = logits if cap is None else cap * torch.tanh(logits / cap)
                future = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
                logits[:, :, len(seen) :] = logits[:, :, len(seen) :].masked_fill(future, -torch.inf)
                logits = logits - logits.logsumexp(-1, keepdim=True)  # rounds as `ops.score` does
                largest = logits[:, :, cache.start : len(seen)].amax((0, 1))
                values[n, head, start - first : stop - first] = largest.exp()
    return values


@pytest.mark.parametrize("kind", ["ragged", "int4", "folded"])
def test_a_tail_is_scored_as_score_does_a_context(model, wide, caches, kind, monkeypatch):
    cache = kvzip.ask(model, caches[kind], QUERIES[1], max_tokens=10)[1]
    found = []
    select = kvzip.ops.select

    def spy(values, *, ratio):
        found.append(values)
        return select(values, ratio=ratio)

    monkeypatch.setattr(kvzip.ops, "select", spy)
    kvzip.fold(model, cache, 0.5, chunk=17)
    exact, plain = (plain_scores(m, cache, chunk=17) for m in (wide, model))
    assert_as_accurate(found[0], exact, plain)


@pytest.mark.parametrize("method", ["kvzip", "kvzip+", "logit"])
def test_a_tail_has_the_scores_of_the_end_of_a_context(model, method, monkeypatch):
    """Every method of `score`: the tail is its second chunk, after a context of which all is kept."""
    more = " It was the age of wisdom."
    dense = kvzip.prefill(model, TEXT + more)
    whole = kvzip.score(model, dense, scope="context", method=method, chunk=len(TEXT)).scores.values
    found = []
    monkeypatch.setattr(kvzip.ops, "select", lambda values, *, ratio: found.append(values) or values > 0)
    kvzip.fold(model, kvzip.extend(model, kvzip.prefill(model, TEXT), more), 0.5, method=method, chunk=len(TEXT))
    # Not `assert_as_accurate`: both are passes of ours in float32; one's error was 2.3 times the other's.
    torch.testing.assert_close(found[0], whole[:, :, len(TEXT) :], rtol=1e-4, atol=1e-5)


def test_folding_nothing_changes_nothing(model, caches):
    dense, ragged = caches["dense"], caches["ragged"]
    assert plain_cache.read(kvzip.fold(model, dense, 0.5)) == plain_cache.read(dense)
    assert kvzip.fold(model, ragged, 0.5) == ragged


def test_the_repeat_of_a_tail_continues_the_context(model, caches):
    cache = kvzip.extend(model, caches["ragged"], "Then a tail of some length.")
    found = [text_of(model, ids) for *_, ids in repeats(model, cache, chunk=20, hint=8, begin=cache.context_length)]
    more = "\n\nRepeat the part of the previous context exactly, starting with "
    close = "<|end|><|assistant|>"
    assert found == [f"{more}f times.{close}Then a tail of some ", f"{more}of some {close}length."]


def test_bad_input_is_named(model, caches):
    other = random_model.make(model.config, seed=3)
    with pytest.raises(ValueError, match="got one of another"):
        kvzip.extend(other, caches["ragged"], "x")
    with pytest.raises(ValueError, match="got one of another"):
        kvzip.fold(other, caches["turn"])
    with pytest.raises(ValueError, match="at least one token to extend"):
        kvzip.extend(model, caches["ragged"], "")
    with pytest.raises(ValueError, match="expected token ids in"):
        kvzip.extend(model, caches["ragged"], torch.tensor([1000]))
    with pytest.raises(ValueError, match=r"expected method 'kvzip', 'kvzip\+' or 'logit', got 'snapkv'"):
        kvzip.fold(model, caches["turn"], method="snapkv")
    strange = replace(caches["turn"], token_ids=caches["turn"].token_ids.clone().fill_(1000))
    with pytest.raises(ValueError, match=r"expected token ids in \[0, 260\), got 1000"):
        kvzip.fold(model, strange, 0.5)
    with pytest.raises(ValueError, match="fraction of the tail that is KEPT, got 0"):
        kvzip.fold(model, caches["turn"], 0.0)
    used = len(caches["ragged"].token_ids)
    tight = replace(model, config=replace(model.config, max_length=used + 14))
    with pytest.raises(ValueError, match="and 15 new tokens"):
        kvzip.extend(tight, caches["ragged"], "x" * 15)
    with pytest.raises(ValueError, match="the end of the turn"):
        kvzip.ask(tight, caches["ragged"], "A long question?")
    with pytest.raises(ValueError, match="a repeat pass of"):
        kvzip.fold(tight, kvzip.extend(tight, caches["ragged"], "x" * 14), 0.5)
    answer, full = kvzip.ask(tight, caches["ragged"], "Why?")
    assert len(full.token_ids) == used + 14 and len(answer.token_ids) == 4 and answer.stopped == "length"


MORE = " It was the age of wisdom, it was the age of foolishness."


@pytest.mark.parametrize("kind", ["dense", "ragged", "mixed"])
def test_a_document_that_grows_keeps_its_old_pairs_and_as_large_a_part_of_the_new(model, caches, kind):
    cache = caches[kind]
    grown = kvzip.append(model, cache, MORE)
    folded = kvzip.fold(model, kvzip.extend(model, cache, MORE), cache.kept / cache.total)
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(grown.context), tensors_of(folded.context), strict=True))
    assert (grown.kept, grown.total, grown.method) == (folded.kept, folded.total, folded.method)
    new = grown.context_length - cache.context_length
    heads = cache.heads * len(cache.scored_layers)
    assert grown.tail is None and grown.total - cache.total == heads * new
    assert grown.kept - cache.kept == int(cache.kept / cache.total * heads * new)
    if kind == "dense":
        assert grown.scores is None, "at ratio 1 nothing is scored"
    else:
        old = cache.total // heads
        assert (grown.scores.start, grown.scores.stop) == (cache.scores.start, grown.context_length)
        assert torch.equal(grown.scores.values[:, :, :old], cache.scores.values)
        fresh, kept = grown.scores.values[:, :, old:], kept_mask(grown)[:, :, old:]
        assert fresh[kept].min() >= fresh[~kept].max(), "the highest scored of the new text stay"
    least = kvzip.append(model, cache, MORE, 0.1)
    assert least.kept - cache.kept == int(0.1 * heads * new)


def test_a_document_with_turns_or_without_a_text_does_not_grow(model, caches):
    with pytest.raises(ValueError, match=r"got one with \d+ tokens of turns after it: fold them"):
        kvzip.append(model, caches["turn"], MORE)
    with pytest.raises(ValueError, match="at least one token"):
        kvzip.append(model, caches["ragged"], "")
    bare = kvzip.append(model, replace(caches["ragged"], scores=None), MORE)
    assert bare.scores is None
