"""A step's padding changes nothing, and on a GPU its graphs give what the same pass gives without them."""

import random
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import kvzip
import random_model
from kvzip.cache import as_ragged
from kvzip.decoding import steps
from kvzip.decoding.paged import SIZES, Paged, sizes_of
from kvzip.decoding.pages import give_pages_, make_pool, row_numbers, take_pages_, write_rows_
from kvzip.decoding.sequences import Sequence, next_parts
from kvzip.decoding.steps import Runner
from kvzip.decoding.tables import enter_, leave_, make_tables
from kvzip.options import Sampling
from unchecked import unchecked

TEXT = "It was the best of times, it was the worst of times."


def parts(device="cpu", dtype=torch.float32):
    """A runner over two contexts of different formats and one of none."""
    model = random_model.make(random_model.config(windows=(6, None), head_dim=16), device=device, dtype=dtype)
    dense = kvzip.score(model, kvzip.prefill(model, TEXT))
    tables = make_tables(model)
    caches = [as_ragged(dense), kvzip.compress(dense, 0.4, bits=8)]
    places = [*[enter_(tables, cache) for cache in caches], (0, -1)]
    pool = make_pool(model, pages=12, slots=3)
    pages = [take_pages_(pool, slot, 4) for slot in range(3)]
    return Runner(model, Paged(model, pool, tables), slots=4), places, pages, dense.length


def sequences_of(places, pages, length, tokens, heat=0.0, penalty=1.0):
    """Three requests that ask `tokens`; the first one takes the likeliest token, the last one has a penalty."""
    chosen = [Sampling(), Sampling(temperature=heat, top_p=0.9), Sampling(repetition_penalty=penalty)]
    draws, starts = [0.4, 0.8, 0.1] * 10, [length if place[1] >= 0 else 0 for place in places]
    return [
        Sequence(
            ids=list(tokens), sampling=sampling, draws=draws, limit=30, past=0, start=starts[slot],
            slot=slot, pages=own, place=place,
        )
        for slot, (place, own, sampling) in enumerate(zip(places, pages, chosen, strict=True))
    ]  # fmt: skip


class Padded(Paged):
    """A reader that pads on the host too."""

    def pack(self, parts, *, padded):
        return super().pack(parts, padded=True)


@pytest.mark.parametrize("heat", [0.0, 1.0])
@unchecked()
def test_padding_changes_nothing(heat):
    found = []
    for kind in (Paged, Padded):
        runner, places, pages, length = parts()
        runner.reader = kind(*astuple_of(runner.reader))
        sequences = sequences_of(places, pages, length, [65, 66, 67], heat, penalty=1.5)
        found.append([runner.run(next_parts(sequences))() for _ in range(4)])
    assert found[0] == found[1]


def astuple_of(reader):
    return reader.model, reader.pool, reader.tables


@unchecked()
def test_what_a_step_leaves_on_the_device_is_what_the_next_one_reads():
    """The numbers of a step that goes on grow as the graph lets them grow, but where a page begins."""
    runner, places, pages, length = parts()
    sequences = sequences_of(places, [own[::-1] for own in pages], length, range(20))
    packs = [runner.reader.pack(next_parts(sequences), padded=True) for _ in range(16)]
    sent = 0
    for before, after in pairwise(packs[1:]):
        more, less = before.grows
        expected = before.numbers.copy()
        expected[more].reshape(-1, less.stop - less.start)[:] += expected[less]
        sent += not np.array_equal(expected, after.numbers)
        assert before.shape == after.shape and before.grows == after.grows
    assert sent == 1


def test_steps_have_few_sizes():
    """So that no load makes graphs without end: all that an engine may run fit in those that are kept."""
    most = SIZES[-1]
    sizes = {
        sizes_of(rows, parts, padded=True) for parts in range(1, 385, 7) for rows in (parts, *range(parts, most, 9))
    }
    for rows, parts in ((1, 1), (384, 384), (768, 384), (2, 1), (33, 30)):
        padded = sizes_of(rows, parts, padded=True)
        assert padded[0] >= rows and padded[1] >= parts and padded[0] >= padded[1]
    assert len(sizes) <= steps._GRAPHS
    assert sizes_of(7, 3, padded=False) == (7, 3)


def test_pages_are_taken_and_given_back():
    runner, _, pages, _ = parts()
    pool = runner.reader.pool
    assert pool.free == [] and sorted(page for own in pages for page in own) == list(range(1, 13))
    give_pages_(pool, pages[1])
    assert take_pages_(pool, 1, 4) == pages[1]
    assert pool.table[1, :4].tolist() == pages[1] and pool.table[3].tolist() == [0] * pool.table.shape[1]


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_rows_are_written_where_they_belong(backend, monkeypatch):
    monkeypatch.setenv("KVZIP_BACKEND", backend)
    runner, _, pages, _ = parts()
    rows = row_numbers(pages[2], 30, 34)
    assert rows.tolist() == [pages[2][0] * 32 + 30, pages[2][0] * 32 + 31, pages[2][1] * 32, pages[2][1] * 32 + 1]
    new = torch.arange(4 * 2 * 16).view(4, 2, 16).float()
    pool = runner.reader.pool
    write_rows_(pool, 1, rows, new, -new)
    assert torch.equal(pool.k[1][pages[2][1], :2], new[2:])
    assert torch.equal(pool.v[1][pages[2][0], 30:], -new[:2])


def test_tables_grow_and_their_places_are_used_again():
    model = random_model.make(random_model.config())
    cache = as_ragged(kvzip.prefill(model, TEXT))
    tables = make_tables(model)
    assert [enter_(tables, cache) for _ in range(9)] == [(0, n) for n in range(9)]
    assert tables.versions == [1] and len(tables.tables[0].layers) == 16
    leave_(tables, 0, 4)
    assert enter_(tables, cache) == (0, 4)
    eight = kvzip.compress(kvzip.score(model, kvzip.prefill(model, TEXT)), 0.5, bits=8)
    assert enter_(tables, eight) == (1, 0) and tables.versions == [1, 0]


@pytest.fixture
def played(monkeypatch):
    """Returns a function that makes a runner on the host replay graphs, which are played by the pass itself."""
    sent = []

    def play(runner):
        runner._replays = True
        return runner, sent

    def pinned(shape, dtype):
        sent.append(dtype)
        return torch.full(shape, 99, dtype=dtype)

    stream = SimpleNamespace(wait_stream=lambda other: None)
    event = SimpleNamespace(record=lambda stream: None, synchronize=lambda: None)
    monkeypatch.setattr(steps, "_pinned", pinned)
    monkeypatch.setattr(steps, "capture", lambda run, device, memory: torch.no_grad()(run))
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    return play


@pytest.mark.parametrize("heat", [0.0, 1.0])
@unchecked()
def test_replays_go_on_from_what_they_left(played, heat):
    """Over page ends, for questions of two lengths, with one answer that ends; greedy steps that go on send nothing."""
    found = []
    for replays in (False, True):
        runner, places, pages, length = parts()
        if replays:
            runner, sent = played(runner)
            graph_copies = copies_of(runner)
        found.append([])
        for tokens in ([65, 66, 67, 68], range(20)):
            sequences = sequences_of(places, [own[::-1] for own in pages], length, tokens, heat, penalty=1.5)
            for slot, sequence in enumerate(sequences):
                runner.reader.pool.table[slot, :4] = torch.tensor(sequence.pages)
            for _ in range(14):
                found[-1].append(runner.run(next_parts(sequences))())
            sequences[1].over = True
            found[-1] += [runner.run(next_parts(sequences))() for _ in range(3)]
    assert found[0] == found[1]
    assert sent and len(graph_copies) == (2 * 3 + 1 if heat == 0 else 2 * (14 + 1))  # read, begun, ended; a page's end


def copies_of(runner):
    """A list that grows by one with each step that sends its numbers."""
    found, replay = [], runner._replay

    def counted(numbers, shape, grows):
        graph = runner._graphs.get(shape)
        if graph is None or not np.array_equal(graph.expected, numbers):
            found.append(shape)
        return replay(numbers, shape, grows)

    runner._replay = counted
    return found


@pytest.mark.parametrize("heat", [0.0, 1.0])
@unchecked()
def test_so_they_do_over_one_context(played, heat):
    model = random_model.make(random_model.config(windows=(6, None), head_dim=16))
    model = replace(model, stop_ids=tuple(range(0, 260, 9)))
    cache = kvzip.ask(model, kvzip.prefill(model, TEXT), "What?", max_tokens=3)[1]
    sampling = {"max_tokens": 30, "temperature": heat, "seed": 2, "repetition_penalty": 1.2}
    answers = []
    for replays in (False, True):
        decoder = kvzip.Decoder(model, cache, batch=3, tail=100)
        if replays:
            runner, _ = played(decoder._runner)
            copies = copies_of(runner)
        answers += [
            [kvzip.generate(model, cache, asked, decoder=decoder, **sampling) for asked in (["Of", "times"], ["x"] * 3)]
        ]
    lengths = [len(answer.token_ids) for answer in answers[0][0]]
    assert answers[0] == answers[1] and len(set(lengths)) > 1
    assert len(copies) < 10 or heat > 0


@unchecked()
def test_an_engine_that_replays_answers_as_generate_does(played):
    """Requests of all kinds join and leave while others go on, with a step launched ahead, as on a GPU."""
    model = random_model.make(random_model.config(windows=(6, None), head_dim=16))
    model = replace(model, stop_ids=tuple(range(0, 260, 20)))
    dense = kvzip.score(model, kvzip.prefill(model, TEXT))
    caches = [kvzip.compress(dense, 0.4), kvzip.ask(model, dense, "So?", max_tokens=3)[1]]
    caches.append(kvzip.compress(dense, 0.5, bits=8))
    draw = random.Random(3)
    asked = [
        (draw.randrange(3), "times " * draw.randint(1, 9), draw.choice([0.0, 0.0, 1.0]), draw.choice([1.0, 1.5]))
        for _ in range(20)
    ]

    def options(heat, penalty):
        return {"max_tokens": 24, "temperature": heat, "seed": 7, "repetition_penalty": penalty}

    with kvzip.Engine(model, requests=6, portion=32) as engine:
        runner, _ = played(engine._loop.runner)
        engine._loop.batch.ahead = 1
        copies, contexts = copies_of(runner), [engine.add(cache) for cache in caches]
        handles = []
        for n, query, *how in asked:
            engine.submit(contexts[n], query, max_tokens=50).cancel()
            handles.append(engine.submit(contexts[n], query, **options(*how)))
        answers = [handle.result(60) for handle in handles]
        assert len(copies) < runner.steps
    plain = [kvzip.generate(model, caches[n], query, **options(*how)) for n, query, *how in asked]
    assert answers == plain and len({len(answer.token_ids) for answer in plain}) > 4


@pytest.mark.gpu
@unchecked()
def test_graphs_give_what_the_pass_gives():
    found = []
    for replays in (True, False):
        runner, places, pages, length = parts("cuda", torch.bfloat16)
        run = replayed(runner) if replays else eager(runner)
        found.append([])
        for tokens in ([65, 66, 67, 68], [70], range(40)):
            sequences = sequences_of(places, pages, length, tokens, heat=1.0, penalty=1.5)
            found[-1] += [run(next_parts(sequences)) for _ in range(14)]
    assert found[0] == found[1]


def replayed(runner):
    return lambda parts: runner.run(parts)()


def eager(runner):
    """Runs steps with the padding of graphs, but without them."""
    runner._captured = lambda size, shape, grows: Pass(runner, size, shape)
    return lambda parts: runner.run(parts)()


class Pass:
    """In place of a graph."""

    def __init__(self, runner, size, shape):
        self.runner, self.shape, self.expected = runner, shape, None
        self.numbers = torch.zeros(size, dtype=torch.int32, device="cuda")

    def replay(self):
        self.expected = None
        return self.runner.advance(self.numbers, self.shape)

    def __setattr__(self, name, value):
        super().__setattr__(name, None if name == "expected" else value)  # every step is sent


@pytest.mark.gpu
@unchecked()
def test_few_graphs_are_kept_and_memory_stays(monkeypatch):
    monkeypatch.setattr(steps, "_GRAPHS", 3)
    runner, places, pages, length = parts("cuda", torch.bfloat16)
    reserved = []
    for _ in range(4):
        for count in (1, 3, 8, 20, 60):
            runner.run(next_parts(sequences_of(places, pages, length, [65] * count)))()
        torch.cuda.synchronize()
        reserved.append(torch.cuda.memory_reserved())
    assert len(runner._graphs) == 3
    assert reserved[3] == reserved[1]


@pytest.mark.gpu
@unchecked()
def test_an_engine_on_the_gpu_answers_as_generate_does_there(tmp_path):
    """With contexts that move between the GPU, the host and the disk, in many small batches."""
    model = replace(random_model.make(random_model.config(windows=(6, None), head_dim=16), device="cuda"), stop_ids=())
    dense = [kvzip.score(model, kvzip.prefill(model, TEXT * n)) for n in (1, 2, 3, 4)]
    caches = [kvzip.compress(x, 0.5, bits=bits) for x, bits in zip(dense, (None, 8, 4, None), strict=True)]
    expected = [kvzip.generate(model, cache, "Of what?", max_tokens=12) for cache in caches]
    sizes = sorted(map(kvzip.nbytes, caches))
    limits = {"memory": sizes[-1] + sizes[0], "host_memory": sizes[-1] + sizes[0], "directory": tmp_path}
    with kvzip.Engine(model, **limits) as engine:
        contexts = [engine.add(cache) for cache in caches]
        for _ in range(3):
            handles = [engine.submit(context, "Of what?", max_tokens=12) for context in contexts * 3]
            assert [handle.result(120) for handle in handles] == expected * 3
        assert {context.where for context in contexts} > {"device"}
