"""Contexts that move between memories: what is said of them stays the same, budgets hold, and what is in use stays."""

import gc
import itertools
import random
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch

import kvzip
import random_model
from kvzip.answers import Stream
from kvzip.cache import as_ragged
from kvzip.serving import moves
from kvzip.serving.requests import Request
from unchecked import unchecked

TEXTS = [f"{word} was the best of times, {word} was the worst of times." for word in ("It", "This", "That", "What")]
OPTIONS = {"max_tokens": 4}


@pytest.fixture(scope="module")
def model():
    return replace(random_model.make(random_model.config(windows=(6, None))), stop_ids=())


@pytest.fixture(scope="module")
def caches(model):
    dense = [kvzip.score(model, kvzip.prefill(model, text)) for text in TEXTS]
    return [kvzip.compress(x, 0.5, bits=bits) for x, bits in zip(dense, (None, None, 8, 4), strict=True)]


@pytest.fixture(scope="module")
def expected(model, caches):
    return [kvzip.generate(model, cache, "Of what?", **OPTIONS) for cache in caches]


def same(a, b):
    pairs = zip(moves._moving(a), moves._moving(b), strict=True)
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs) and a.token_ids is b.token_ids


@pytest.mark.parametrize("kind", ["dense", "ragged", "quantized", "turn"])
def test_a_cache_is_the_same_after_its_moves(model, caches, kind):
    dense = kvzip.prefill(model, TEXTS[0])
    cache = {"dense": as_ragged(dense), "ragged": caches[0], "quantized": caches[3]}.get(kind)
    if cache is None:
        cache = kvzip.ask(model, caches[0], "Of what?", max_tokens=3)[1]
    cache = moves.bare(cache)
    host = moves.to_host(cache)
    assert same(host, cache)
    assert moves._block_of(host) is not None and moves._block_of(cache) is None
    assert same(moves.to_device(host, torch.device("cpu")), cache)
    assert same(moves.to_device(cache, torch.device("cpu")), cache)


def wandering(model, caches, expected, engine):
    """Asks contexts in random order, several at a time, and checks answers and budgets throughout."""
    contexts = [engine.add(cache) for cache in caches]
    while engine.facts["device_bytes"] > engine.limits.memory:  # what was added is sent away
        time.sleep(0.001)
    order = random.Random(1).choices(range(len(caches)), k=24)
    most = 0
    for first in range(0, len(order), 6):
        asked = [(n, engine.submit(contexts[n], "Of what?", **OPTIONS)) for n in order[first : first + 6]]
        while not all(handle.done() for _, handle in asked):
            most = max(most, engine.facts["device_bytes"])
            time.sleep(0.0005)
        for n, handle in asked:
            assert handle.result(60) == expected[n]
    assert most <= engine.limits.memory
    return contexts


@unchecked()
def test_contexts_beyond_memory_go_to_disk_and_come_back(model, caches, expected, tmp_path):
    sizes = sorted(map(kvzip.nbytes, caches))
    with kvzip.Engine(model, memory=sizes[-1] + sizes[-2], directory=tmp_path) as engine:
        contexts = wandering(model, caches, expected, engine)
        assert {context.where for context in contexts} >= {"device", "disk"}
        assert list(tmp_path.iterdir())
    assert list(tmp_path.iterdir()) == []


@unchecked()
def test_and_to_the_host_first(model, caches, expected, tmp_path):
    """With the host of a GPU played by the same memory."""
    sizes = sorted(map(kvzip.nbytes, caches))
    with kvzip.Engine(model, memory=sizes[-1], directory=tmp_path) as engine:
        engine._loop.store.limits = replace(engine.limits, host_memory=sizes[-1] + sizes[-2])
        contexts = wandering(model, caches, expected, engine)
        assert {context.where for context in contexts} >= {"host", "disk"}
        assert engine.facts["host_bytes"] <= sizes[-1] + sizes[-2]


@unchecked()
def test_a_context_in_use_is_not_moved_and_others_wait_for_it(model, caches, expected, tmp_path, monkeypatch):
    with kvzip.Engine(model, memory=max(map(kvzip.nbytes, caches)), directory=tmp_path) as engine:
        first, second = engine.add(caches[0]), engine.add(caches[1])
        run = engine._loop.runner.run
        monkeypatch.setattr(engine._loop.runner, "run", lambda step: (time.sleep(0.002), run(step))[1])
        long = engine.submit(first, "Of what?", max_tokens=60)
        next(iter(long))
        other = engine.submit(second, "Of what?", **OPTIONS)
        while not long.done():
            assert first.where == "device" or long.done()
            assert not other.done() or long.done()
            time.sleep(0.001)
        assert other.result(60) == expected[1]
        assert second.where == "device" and first.where == "disk"


@unchecked()
def test_files_are_read_when_they_are_needed_and_left_where_they_are(model, caches, expected, tmp_path):
    paths = [tmp_path / f"{n}.kvz" for n in range(len(caches))]
    for cache, path in zip(caches, paths, strict=True):
        kvzip.save(cache, path)
    with kvzip.Engine(model, memory=max(map(kvzip.nbytes, caches))) as engine:
        contexts = wandering(model, paths, expected, engine)
        assert {context.where for context in contexts} == {"device", "disk"}
        engine.remove(contexts[0])
        gone = next(x for x in contexts[1:] if x.where == "disk")
        gone.path.unlink()
        with pytest.raises(FileNotFoundError):
            engine.submit(gone, "Of what?", **OPTIONS).result(60)
        stays = contexts.index(next(x for x in contexts[1:] if x is not gone))
        assert engine.submit(contexts[stays], "Of what?", **OPTIONS).result(60) == expected[stays]
    assert len(list(tmp_path.iterdir())) == 3


@unchecked()
def test_a_file_that_is_another_one_by_then_is_refused_and_the_old_one_taken_again(
    model, caches, expected, tmp_path, caplog
):
    """An answer from what the file held would be wrong without a word. Each failure is tried, and told, once."""
    path, old = tmp_path / "a.kvz", tmp_path / "old.kvz"
    kvzip.save(caches[0], path)
    with kvzip.Engine(model) as engine:
        context = engine.add(path)
        path.rename(old)
        longer = kvzip.score(model, kvzip.prefill(model, TEXTS[0] + TEXTS[1]))
        scores = replace(longer.scores, values=1 - longer.scores.values)
        for cache in (longer, replace(longer, scores=scores)):
            for other in (kvzip.compress(cache, 0.5), kvzip.compress(cache, 0.5, bits=8)):
                kvzip.save(other, path, overwrite=True)
                caplog.clear()
                with pytest.raises(ValueError, match=r"a\.kvz as it was when it was added"):
                    engine.submit(context, "Of what?", **OPTIONS).result(60)
                assert len(caplog.records) == 1
        path.unlink()
        with pytest.raises(FileNotFoundError):
            engine.submit(context, "Of what?", **OPTIONS).result(60)
        old.rename(path)
        assert engine.submit(context, "Of what?", **OPTIONS).result(60) == expected[0]


@pytest.mark.parametrize("early", [1, 4])
@unchecked()
def test_a_context_that_needs_room_has_its_turn_however_many_ask_for_others(model, caches, expected, tmp_path, early):
    """Requests for what is there do not overtake one for what is not, though they could begin at once."""
    kvzip.save(caches[1], tmp_path / "other.kvz")
    with kvzip.Engine(model, memory=max(map(kvzip.nbytes, caches[:2])), directory=tmp_path, requests=2) as engine:
        there, other = engine.add(caches[0]), engine.add(tmp_path / "other.kvz")
        with engine._loop.changed:  # all of them wait before any is looked at
            sooner = [engine.submit(there, "Of what?", **OPTIONS) for _ in range(early)]
            one = engine.submit(other, "Of what?", **OPTIONS)
            later = [engine.submit(there, "Of what?", **OPTIONS) for _ in range(8)]
        assert [handle.result(60) for handle in (*sooner, *later)] == [expected[0]] * (early + 8)
        assert one.result(60) == expected[1]
        assert one.times[0] < min(handle.times[0] for handle in later)
        assert max(handle.times[0] for handle in sooner) < one.times[0]


@unchecked()
def test_several_contexts_that_cannot_come_are_told_so(model, caches, expected, tmp_path):
    """None is left waiting for another one's error."""
    for n in (1, 2):
        kvzip.save(caches[n], tmp_path / f"{n}.kvz")
    with kvzip.Engine(model, memory=max(map(kvzip.nbytes, caches[:3]))) as engine:
        here = engine.add(caches[0])
        contexts = [engine.add(tmp_path / f"{n}.kvz") for n in (1, 2, 1)]
        with engine._loop.changed:  # all of them wait before any is looked at
            handles = [engine.submit(context, "Of what?", **OPTIONS) for context in contexts]
        for handle in handles:
            with pytest.raises(MemoryError, match="nowhere to go"):
                handle.result(20)
        assert engine.submit(here, "Of what?", **OPTIONS).result(60) == expected[0]


@unchecked()
def test_what_there_is_no_place_for_is_refused(model, caches, tmp_path):
    size = kvzip.nbytes(caches[1])
    with kvzip.Engine(model, memory=size + 10) as engine:
        first = engine.add(caches[0])
        with pytest.raises(MemoryError, match=r"remove contexts, .* or a directory="):
            engine.add(caches[1])
        engine.remove(first)
        engine.add(caches[1])
    with (
        kvzip.Engine(model, memory=size - 1) as engine,
        pytest.raises(ValueError, match=r"context of at most .* keep less"),
    ):
        engine.add(caches[1])


@unchecked()
def test_a_disk_that_is_full_keeps_contexts_where_they_are(model, caches, expected, tmp_path, monkeypatch):
    """The request that needs the room ends with an error that says so; others go on."""

    def full(cache, path):
        raise OSError(28, "No space left on device")

    kvzip.save(caches[2], tmp_path / "third.kvz")
    monkeypatch.setattr(moves, "to_disk", full)
    with kvzip.Engine(model, memory=max(map(kvzip.nbytes, caches[:2])), directory=tmp_path) as engine:
        contexts = [engine.add(cache) for cache in (*caches[:2], tmp_path / "third.kvz")]
        with pytest.raises(MemoryError, match="nowhere to go"):
            engine.submit(contexts[2], "Of what?", **OPTIONS).result(60)
        for n in (0, 1):
            assert engine.submit(contexts[n], "Of what?", **OPTIONS).result(60) == expected[n]
        monkeypatch.undo()
        engine.remove(contexts[0])
        assert engine.submit(contexts[2], "Of what?", **OPTIONS).result(60) == expected[2]


@unchecked()
def test_a_long_life_takes_no_more_memory(model, caches):
    def alive():
        gc.collect()
        kinds = Counter(map(type, gc.get_objects()))
        return [kinds[kind] for kind in (torch.Tensor, Request, kvzip.Handle, Stream)]

    draw, counts = random.Random(2), []
    with kvzip.Engine(model, requests=16) as engine:
        contexts = [engine.add(cache) for cache in caches]
        for _ in range(3):
            handles = [
                engine.submit(draw.choice(contexts), "x" * draw.randint(1, 40), max_tokens=draw.randint(1, 5))
                for _ in range(100)
            ]
            for handle in handles:
                handle.result(60)
            del handles, handle
            counts.append(alive())
    for before, after in itertools.pairwise(counts):  # what other tests left may go meanwhile
        assert all(a <= b for a, b in zip(after, before, strict=True)), counts
    assert counts[2][1:] == [0, 0, 0]
