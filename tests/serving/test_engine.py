"""The engine against a plain loop, and its promises: joining, leaving, waiting, refusing, cancelling, seeds, text."""

import gc
import threading
import time
from concurrent.futures import CancelledError
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from plain_answers import answer, assert_as_likely_as_rounding_allows, assert_said

import kvzip
import random_model
from kvzip.inputs import lone_query_ids, query_ids
from kvzip.models import LayerSpec, RopeSpec
from unchecked import unchecked

TEXT = "It was the best of times, it was the worst of times."
OTHER = "Call me Ishmael. Some years ago, never mind how long precisely, I thought I would sail about a little."
QUERIES = ["Of what?", "And of what else was it, if one may ask, and how often?", "Why", "x"]
LONG, NEAR = RopeSpec(theta=5000.0, kind="linear", factor=8.0), RopeSpec(theta=50.0)
LLAMA3 = RopeSpec(theta=500.0, kind="llama3", factor=8.0, original_length=16)
FAMILIES = {
    "llama": {"layers": tuple(LayerSpec(None, LLAMA3) for _ in range(2))},
    "qwen2": {"qkv_bias": True, "tied": True},
    "qwen3": {"qk_norm": True, "head_dim": 16},
    "mistral": {"windows": (None, None), "num_kv_heads": 1},
    "gemma2": {
        "windows": (6, None),
        "attn_softcap": 2.0,
        "logit_softcap": 4.0,
        "post_norms": True,
        "norm_offset": 1,
        "activation": "gelu_tanh",
        "embed_scale": 32**0.5,
    },
    "gemma3": {
        "layers": (LayerSpec(6, NEAR), LayerSpec(None, LONG), LayerSpec(6, NEAR)),
        "qk_norm": True,
        "post_norms": True,
        "norm_offset": 1,
    },
}


def made(name="llama", **changes):
    model = random_model.make(random_model.config(**{**FAMILIES[name], **changes}))
    return replace(model, stop_ids=())


def caches_of(model):
    """A cache of every kind, by name."""
    dense, other = (kvzip.score(model, kvzip.prefill(model, text)) for text in (TEXT, OTHER))
    ragged = kvzip.compress(dense, 0.4)
    return {
        "dense": other,
        "ragged": ragged,
        "few": kvzip.compress(other, 0.1),
        "refit": kvzip.refit(model, dense, ragged, chunk=20),
        "int8": kvzip.compress(dense, 0.5, bits=8),
        "int4": kvzip.compress(other, 0.6, bits=4),
        "turn": kvzip.ask(model, ragged, QUERIES[0], max_tokens=5)[1],
        "folded": kvzip.fold(model, kvzip.extend(model, ragged, "So far so good."), 0.5),
    }


@pytest.fixture(scope="module")
def model():
    return made()


@pytest.fixture(scope="module")
def caches(model):
    return caches_of(model)


def slow_steps(engine, monkeypatch, seconds=0.005):
    """Makes each step take a while, so that there is time to do something meanwhile."""
    run = engine._loop.runner.run

    def slow(step):
        time.sleep(seconds)
        return run(step)

    monkeypatch.setattr(engine._loop.runner, "run", slow)


@pytest.mark.parametrize(("family", "ahead"), [(name, n % 2) for n, name in enumerate(FAMILIES)])
@unchecked()
def test_answers_are_those_of_a_plain_loop(family, ahead):
    """Contexts of every kind in one batch, questions read in portions, and one without a context.

    Every other time a step is launched before the one in front is looked at, as on a GPU.
    """
    model = made(family)
    caches = {**caches_of(model), "none": None}
    with kvzip.Engine(model, portion=24) as engine:
        engine._loop.batch.ahead = ahead
        contexts = {name: None if cache is None else engine.add(cache) for name, cache in caches.items()}
        pairs = [(name, query) for query in QUERIES[:3] for name in caches]
        asked = [(name, query, engine.submit(contexts[name], query, max_tokens=5)) for name, query in pairs]
        certain = 0
        for name, query, handle in asked:
            cache = caches[name]
            if cache is None:
                ids = lone_query_ids(model, query, template=True)
            else:
                (ids,) = query_ids(model, cache, [query], template=True)
            certain += assert_said(handle.result(60), answer(model, cache, ids, 5))
        assert certain > 4 * len(asked)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@unchecked()
def test_answers_in_bfloat16_are_as_right_as_rounding_allows(family, device, monkeypatch):
    config = random_model.config(**{"head_dim": 16, **FAMILIES[family]})
    model = replace(random_model.make(config, dtype=torch.bfloat16, device=device), stop_ids=())
    dense = kvzip.score(model, kvzip.prefill(model, TEXT))
    caches = [None, dense, kvzip.compress(dense, 0.4)]
    with kvzip.Engine(model) as engine:
        contexts = [None if cache is None else engine.add(cache) for cache in caches]
        handles = [engine.submit(context, QUERIES[0], max_tokens=6) for context in contexts]
        answers = [handle.result(60).token_ids for handle in handles]
    monkeypatch.setenv("KVZIP_BACKEND", "reference")
    for cache, said in zip(caches, answers, strict=True):
        if cache is None:
            asked = lone_query_ids(model, QUERIES[0], template=True)
        else:
            (asked,) = query_ids(model, cache, QUERIES[:1], template=True)
        assert_as_likely_as_rounding_allows(model, cache, asked, said)


def test_an_answer_checked_for_types(model, caches):
    with kvzip.Engine(model) as engine:
        context = engine.add(caches["int8"])
        got = engine.submit(context, QUERIES[0], max_tokens=3, temperature=1.0, seed=1).result(60.0)
    assert got == kvzip.generate(model, caches["int8"], QUERIES[0], max_tokens=3, temperature=1.0, seed=1)


@unchecked()
def test_requests_join_and_leave_between_steps(model, caches, monkeypatch):
    """8 requests of 20 tokens over 2 contexts take about 20 steps, and a ninth that comes later none more."""
    gate = threading.Semaphore(0)  # of steps
    with kvzip.Engine(model) as engine:
        run = engine._loop.runner.run
        monkeypatch.setattr(engine._loop.runner, "run", lambda step: (gate.acquire(), run(step))[1])
        contexts = [engine.add(caches[name]) for name in ("ragged", "dense")]
        with engine._loop.changed:
            handles = [engine.submit(contexts[n % 2], "Why?", max_tokens=20) for n in range(8)]
        gate.release(5)
        next(iter(handles[0]))
        late = engine.submit(contexts[0], "Why?", max_tokens=3)
        gate.release(8)
        assert late.result(60) is not None
        assert not any(handle.done() for handle in handles)
        gate.release(1000)
        for handle in handles:
            assert len(handle.result(60).token_ids) == 20
        assert 20 <= engine.facts["steps"] <= 23
        assert engine.facts["running"] == engine.facts["waiting"] == 0


@unchecked()
def test_a_question_is_read_in_portions_beside_answers(model, caches):
    """No step has more question tokens than a portion, and answers go on meanwhile."""
    sizes = []
    with kvzip.Engine(model, portion=16) as engine:
        run = engine._loop.runner.run

        def counted(step):
            sizes.append((sum(len(part.tokens) for part in step), len(step)))
            return run(step)

        engine._loop.runner.run = counted
        context = engine.add(caches["ragged"])
        first = engine.submit(context, "Why?", max_tokens=40)
        next(iter(first))
        long = engine.submit(context, "x" * 200, max_tokens=2)
        assert len(long.result(60).token_ids) == 2 and len(first.result(60).token_ids) == 40
    assert max(rows for rows, _ in sizes) == 17
    assert sum(rows == 17 for rows, _ in sizes) >= 12  # 16 of the question beside one of the answer


@unchecked()
def test_what_cannot_be_held_waits_and_what_never_can_is_refused(model, caches):
    with kvzip.Engine(model, tail_tokens=128, requests=4) as engine:
        context = engine.add(caches["ragged"])
        handles = [engine.submit(context, "Why?", max_tokens=30) for _ in range(12)]  # two of them fit at a time
        seen = 0
        while not all(handle.done() for handle in handles):
            seen = max(seen, engine.facts["running"])
            time.sleep(0.001)
        assert {tuple(handle.result().token_ids) for handle in handles} == {tuple(handles[0].result().token_ids)}
        assert 1 <= seen <= 2
        with pytest.raises(ValueError, match=r"at most 128 tokens .* tail_tokens="):
            engine.submit(context, "Why?", max_tokens=200)
        with pytest.raises(ValueError, match="room for an answer within 4096 positions"):
            engine.submit(context, "x" * 5000)
        assert engine.facts["tail_tokens"] == 0


@unchecked()
def test_contexts_share_the_engine_fairly(model, caches):
    """A reader of another context does not wait for a hundred of the first."""
    with kvzip.Engine(model, requests=4) as engine:
        busy, quiet = engine.add(caches["ragged"]), engine.add(caches["few"])
        with engine._loop.changed:
            crowd = [engine.submit(busy, "Why?", max_tokens=10) for _ in range(30)]
            one = engine.submit(quiet, "Why?", max_tokens=10)
        for handle in (one, *crowd):
            handle.result(60)
        assert sum(handle.times[-1] <= one.times[-1] for handle in crowd) <= 8


@unchecked()
def test_a_seeded_answer_is_independent_of_its_batch(model, caches):
    options = {"max_tokens": 12, "temperature": 1.5, "top_p": 0.9, "seed": 7}
    alone = kvzip.generate(model, caches["ragged"], QUERIES[0], **options)
    with kvzip.Engine(model) as engine:
        contexts = [engine.add(caches[name]) for name in ("ragged", "int4", "dense")]
        handles = [engine.submit(contexts[0], QUERIES[0], **options)]
        handles += [engine.submit(c, q, max_tokens=9, temperature=0.7, seed=3) for c in contexts for q in QUERIES]
        handles += [engine.submit(c, QUERIES[0], max_tokens=9) for c in contexts]
        handles.append(engine.submit(contexts[0], QUERIES[0], **options))
        assert handles[0].result(60) == handles[-1].result(60) == alone
        plain = [kvzip.generate(model, caches[n], QUERIES[0], max_tokens=9) for n in ("ragged", "int4", "dense")]
        assert [handle.result(60) for handle in handles[-4:-1]] == plain


@pytest.mark.parametrize("ahead", [0, 1])
@unchecked()
def test_cancelled_requests_end_and_give_their_room_back(model, caches, monkeypatch, ahead):
    with kvzip.Engine(model, requests=1) as engine:
        engine._loop.batch.ahead = ahead
        slow_steps(engine, monkeypatch)
        context = engine.add(caches["ragged"])
        running, waiting, last = (engine.submit(context, "Why?", max_tokens=n) for n in (3000, 3000, 4))
        next(iter(running))
        waiting.cancel()
        running.cancel()
        for handle in (running, waiting):
            with pytest.raises(CancelledError):
                handle.result(10)
        assert len(last.result(60).token_ids) == 4
        last.cancel()
        assert last.result().stopped == "length"
        assert engine.facts["tail_tokens"] == 0


@unchecked()
def test_a_question_cancelled_while_it_is_read_gives_its_room_back(model, caches, monkeypatch):
    with kvzip.Engine(model, requests=2, portion=8) as engine:
        slow_steps(engine, monkeypatch)
        contexts = engine.add(caches["dense"]), engine.add(caches["ragged"])
        long, other = (engine.submit(c, q, max_tokens=9) for c, q in zip(contexts, ("x" * 800, "Why?"), strict=True))
        while not other.times:
            time.sleep(0.001)
        assert not long.done() and not long.times
        long.cancel()
        with pytest.raises(CancelledError):
            long.result(10)
        assert other.result(60) == kvzip.generate(model, caches["ragged"], "Why?", max_tokens=9)
        assert engine.facts["tail_tokens"] == 0


@unchecked()
def test_a_model_that_ranks_share_is_refused(model):
    shared = replace(model, share=SimpleNamespace(rank=1, size=2))
    with pytest.raises(ValueError, match="in one process for an engine, got rank 1 of 2"):
        kvzip.Engine(shared)


@unchecked()
def test_an_engine_that_nobody_has_any_more_ends(model, caches):
    engine = kvzip.Engine(model)
    thread = engine._thread
    assert engine.submit(engine.add(caches["ragged"]), "Why?", max_tokens=3).result(60).token_ids
    del engine
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


@unchecked()
def test_an_error_of_one_request_ends_that_one_alone(model, caches, monkeypatch):
    with kvzip.Engine(model) as engine:
        slow_steps(engine, monkeypatch)
        context = engine.add(caches["ragged"])
        good, bad = (engine.submit(context, "Why?", max_tokens=20) for _ in range(2))
        stream = next(r for r in [*engine._loop.waiting, *engine._loop.running] if r.handle is bad).stream
        monkeypatch.setattr(stream, "add", lambda token, stop_ids: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            bad.result(60)
        assert len(good.result(60).token_ids) == 20
        run = engine._loop.runner.run
        monkeypatch.setattr(engine._loop.runner, "run", lambda step: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.submit(context, "Why?", max_tokens=3).result(60)
        monkeypatch.setattr(engine._loop.runner, "run", run)
        assert len(engine.submit(context, "Why?", max_tokens=3).result(60).token_ids) == 3
        assert engine.facts["tail_tokens"] == 0


@unchecked()
def test_logits_that_are_no_numbers_end_their_request_alone(model, caches):
    broken = caches["ragged"]
    layers = [replace(x, k=torch.full_like(x.k, torch.nan)) for x in broken.context]
    with kvzip.Engine(model) as engine:
        bad, good = engine.add(replace(broken, context=tuple(layers))), engine.add(broken)
        handles = [engine.submit(context, "Why?", max_tokens=5) for context in (bad, good)]
        with pytest.raises(ValueError, match="got NaN for token 1 of an answer"):
            handles[0].result(60)
        assert len(handles[1].result(60).token_ids) == 5


@pytest.mark.parametrize("ahead", [0, 1])
@unchecked()
def test_answers_end_where_generate_ends_them(caches, ahead):
    """Stop tokens, stop texts and pieces are those of `generate`; with a step ahead there is a token too many."""
    model = random_model.make(random_model.config(**FAMILIES["llama"]))
    cache = caches["ragged"]
    options = {"max_tokens": 40, "temperature": 1.0}
    with kvzip.Engine(model) as engine:
        engine._loop.batch.ahead = ahead
        context = engine.add(cache)
        for seed in range(2):
            plain = kvzip.generate(model, cache, QUERIES[0], seed=seed, **options)
            stop = plain.text[7:9] or "zz"
            for stops in ((), (stop,)):
                handle = engine.submit(context, QUERIES[0], seed=seed, stop=stops, **options)
                pieces = list(handle)
                assert handle.result() == kvzip.generate(model, cache, QUERIES[0], seed=seed, stop=stops, **options)
                assert "".join(pieces) == handle.result().text
                assert list(handle) == pieces


@unchecked()
def test_penalties_and_sources_are_those_of_generate(model, caches):
    """In a batch with answers that have none, over contexts with a tail and with codes."""
    asked = [("ragged", 1.0, 0), ("ragged", 1.6, 2), ("turn", 1.3, 3), ("int8", 1.6, 0)]
    with kvzip.Engine(model, requests=3) as engine:
        held = {name: engine.add(caches[name]) for name, *_ in asked}
        options = [{"max_tokens": 12, "repetition_penalty": p, "sources": n} for _, p, n in asked]
        handles = [
            engine.submit(held[name], "Why?", **o) for _ in "ab" for (name, *_), o in zip(asked, options, strict=True)
        ]
        answers = [handle.result(60) for handle in handles]
        with pytest.raises(ValueError, match="a context to name sources of"):
            engine.submit(None, "Why?", sources=1)
    plain = [kvzip.generate(model, caches[name], "Why?", **o) for (name, *_), o in zip(asked, options, strict=True)]
    assert answers == plain * 2
    assert [len(answer.sources) > 0 for answer in plain] == [False, True, True, False]
    assert plain[0].token_ids != plain[1].token_ids


@unchecked()
def test_no_piece_ends_within_a_character(model, monkeypatch):
    text = "zwölf Brücken 🌉 über die Späte"
    tokens = iter(model.tokenizer.control.encode(text).ids)
    with kvzip.Engine(model) as engine:
        monkeypatch.setattr(engine._loop.runner, "run", lambda step: lambda: [next(tokens)])
        pieces = list(engine.submit(None, "Why?", max_tokens=len(text.encode())))
    assert pieces == [*text]


@unchecked()
def test_many_threads_submit_at_once(model, caches):
    names = ["ragged", "dense", "int8"]
    expected = {n: kvzip.generate(model, caches[n], QUERIES[0], max_tokens=6) for n in names}
    with kvzip.Engine(model, requests=16) as engine:
        contexts = {name: engine.add(caches[name]) for name in names}
        wrong = []

        def ask(name):
            for _ in range(5):
                if engine.submit(contexts[name], QUERIES[0], max_tokens=6).result(60) != expected[name]:
                    wrong.append(name)

        threads = [threading.Thread(target=ask, args=(names[n % 3],)) for n in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


@unchecked()
def test_removing_a_context_waits_for_its_requests_or_cancels_them(model, caches, monkeypatch):
    with kvzip.Engine(model) as engine:
        slow_steps(engine, monkeypatch)
        for cancel in (False, True):
            context = engine.add(caches["ragged"])
            handle = engine.submit(context, "Why?", max_tokens=30)
            next(iter(handle))
            engine.remove(context, cancel=cancel)
            assert handle.done() and engine.contexts == []
            if cancel:
                with pytest.raises(CancelledError):
                    handle.result()
            else:
                assert len(handle.result().token_ids) == 30
            with pytest.raises(ValueError, match="context that this engine holds"):
                engine.submit(context, "Why?")


@unchecked()
def test_closing_answers_what_was_asked_or_cancels_it(model, caches):
    engine = kvzip.Engine(model)
    handle = engine.submit(engine.add(caches["ragged"]), "Why?", max_tokens=30)
    engine.close()
    engine.close()
    assert len(handle.result(0).token_ids) == 30
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(None, "Why?")
    with pytest.raises(KeyError), kvzip.Engine(model) as engine:
        handle = engine.submit(engine.add(caches["ragged"]), "Why?", max_tokens=4000)
        raise KeyError
    with pytest.raises(CancelledError):
        handle.result(0)


@unchecked()
def test_what_cannot_be_answered_is_refused_at_once(model, caches):
    other = random_model.make(random_model.config(), seed=1)
    with kvzip.Engine(model) as engine, kvzip.Engine(other) as another:
        context = engine.add(caches["ragged"])
        with pytest.raises(ValueError, match="cache of this model"):
            another.add(caches["ragged"])
        with pytest.raises(ValueError, match="context that this engine holds"):
            another.submit(context, "Why?")
        with pytest.raises(ValueError, match="query with text"):
            engine.submit(context, "  ")
        with pytest.raises(ValueError, match="at least one token"):
            engine.submit(context, torch.tensor([], dtype=torch.long))
        with pytest.raises(ValueError, match="temperature"):
            engine.submit(context, "Why?", temperature=-1)
        with pytest.raises(TimeoutError):
            engine.submit(context, "Why?", max_tokens=3000).result(0.001)
        engine.close(cancel=True)
    for wrong in ({"requests": 0}, {"portion": 0}, {"requests": 500}, {"memory": 0}, {"tail_tokens": 0}):
        with pytest.raises(ValueError):
            kvzip.Engine(model, **wrong)


@unchecked()
def test_long_work_and_steps_take_turns(model, caches):
    with kvzip.Engine(model) as engine:
        handle = engine.submit(engine.add(caches["ragged"]), "Why?", max_tokens=400)
        next(iter(handle))
        seen = []
        with engine.long_work() as pause:
            dense = kvzip.prefill(
                model, OTHER, chunk=10, progress=lambda done, total: (pause(), seen.append(engine.facts["steps"]))
            )
        assert dense.length > 90 and len(set(seen)) == len(seen) > 8  # at least one step between two parts
        assert len(handle.result(60).token_ids) == 400
