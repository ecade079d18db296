"""A step's padding changes nothing, and on a GPU its graphs give what the same pass gives without them."""

from dataclasses import replace

import pytest
import torch

import kvzip
import random_model
from kvzip.cache import as_ragged
from kvzip.serving import steps
from kvzip.serving.pages import give_pages_, make_pool, row_numbers, take_pages_, write_rows_
from kvzip.serving.steps import Runner, Step, _Shape, packed
from kvzip.serving.tables import enter_, leave_, make_tables
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
    return Runner(model, pool, tables), places, pages, dense.length


def step_of(places, pages, length, counts, tokens, done=0, heat=0.0):
    """Rows of three requests: counts[n] tokens of a question, or the last one."""
    step = Step()
    for n, (count, (table, place)) in enumerate(zip(counts, places, strict=True)):
        start = length if place >= 0 else 0
        for at, number in enumerate(row_numbers(pages[n], done, done + count).tolist(), start=done):
            token = tokens[at % len(tokens)] if tokens else -1
            step.rows.append((token, n, at + 1, start + at, number, table, place))
        step.slots.append(n)
        step.last.append(len(step.rows) - 1)
        step.sampling.append((heat, 0.9, 0.4) if n else (0.0, 1.0, 0.0))
    return step


@pytest.mark.parametrize("heat", [0.0, 1.0])
@unchecked()
def test_padding_changes_nothing(heat):
    found = []
    for rows, sequences in ((12, 3), (16, 8)):
        runner, places, pages, length = parts()
        step = step_of(places, pages, length, (4, 4, 4), [65, 66, 67], heat=heat)
        shape = _Shape(rows, sequences, heat > 0, ((0, 0), (1, 0)))
        ints, floats = packed(step, shape, spare=3)
        found.append(runner._advance(torch.from_numpy(ints), torch.from_numpy(floats), shape)[:3].tolist())
        again = step_of(places, pages, length, (1, 1, 1), None, done=4, heat=heat)
        shape = _Shape(*((3, 3) if rows == 12 else (4, 4)), heat > 0, ((0, 0), (1, 0)))
        ints, floats = packed(again, shape, spare=3)
        found[-1] += runner._advance(torch.from_numpy(ints), torch.from_numpy(floats), shape)[:3].tolist()
    assert found[0] == found[1]


def test_pages_are_taken_and_given_back():
    runner, _, pages, _ = parts()
    pool = runner.pool
    assert pool.free == [] and sorted(page for own in pages for page in own) == list(range(1, 13))
    give_pages_(pool, pages[1])
    assert take_pages_(pool, 1, 4) == pages[1]
    assert pool.table[1, :4].tolist() == pages[1] and pool.table[3].tolist() == [0] * pool.table.shape[1]


def test_rows_are_written_where_they_belong():
    runner, _, pages, _ = parts()
    rows = row_numbers(pages[2], 30, 34)
    assert rows.tolist() == [pages[2][0] * 32 + 30, pages[2][0] * 32 + 31, pages[2][1] * 32, pages[2][1] * 32 + 1]
    new = torch.arange(4 * 2 * 16).view(4, 2, 16).float()
    write_rows_(runner.pool, 1, rows, new, -new)
    assert torch.equal(runner.pool.k[1][pages[2][1], :2], new[2:])
    assert torch.equal(runner.pool.v[1][pages[2][0], 30:], -new[:2])


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


@pytest.mark.gpu
@unchecked()
def test_graphs_give_what_the_pass_gives():
    runner, places, pages, length = parts("cuda", torch.bfloat16)
    eager, *_ = parts("cuda", torch.bfloat16)
    for counts, tokens, done in (
        ((4, 4, 4), [65, 66], 0),
        ((1, 1, 1), None, 4),
        ((1, 1, 1), None, 5),
        ((4, 4, 4), [70], 6),
    ):
        step = step_of(places, pages, length, counts, tokens, done, heat=1.0)
        got = runner.run(step)()
        shape = _Shape(len(step.rows), 3, True, ((0, 0), (1, 0)))
        ints, floats = (torch.from_numpy(x).cuda() for x in packed(step, shape, spare=3))
        with torch.no_grad():
            assert got == eager._advance(ints, floats, shape).tolist()


@pytest.mark.gpu
@unchecked()
def test_few_graphs_are_kept_and_memory_stays(monkeypatch):
    monkeypatch.setattr(steps, "_GRAPHS", 3)
    runner, places, pages, length = parts("cuda", torch.bfloat16)
    sizes = [(1, 1, 1), (4, 2, 3), (9, 9, 9), (20, 1, 1), (30, 30, 30)]
    reserved = []
    for _ in range(4):
        for counts in sizes:
            runner.run(step_of(places, pages, length, counts, [65]))()
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
