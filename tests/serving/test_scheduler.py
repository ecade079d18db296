"""Laws of the scheduler: nobody is lost, nobody starves, pages and slots suffice, contexts take turns."""

from hypothesis import given
from hypothesis import strategies as st

from kvzip.decoding.steps import bucket
from kvzip.serving.scheduler import QUANTUM, Reading, Waiting, admit, portions

WAITING = st.lists(
    st.tuples(st.integers(0, 3), st.integers(1, 9), st.sampled_from([True, True, True, False])), max_size=12
).map(lambda found: [Waiting(n, *each) for n, each in enumerate(found)])
RUNNING = st.dictionaries(st.integers(0, 3), st.integers(1, 4), max_size=4)


@given(waiting=WAITING, running=RUNNING, pages=st.integers(0, 20), slots=st.integers(0, 6))
def test_who_begins_fits_and_comes_in_the_order_of_its_context(waiting, running, pages, slots):
    chosen = admit(waiting, running, pages=pages, slots=slots)
    by_number = {each.request: each for each in waiting}
    assert len(chosen) == len(set(chosen)) <= slots
    assert all(by_number[n].ready for n in chosen)
    assert sum(by_number[n].pages for n in chosen) <= pages
    for context in range(4):
        of_context = [each.request for each in waiting if each.context == context and each.ready]
        taken = [n for n in chosen if by_number[n].context == context]
        assert taken == of_context[: len(taken)]


@given(waiting=WAITING, running=RUNNING)
def test_with_room_everybody_whose_context_is_there_begins(waiting, running):
    assert sorted(admit(waiting, running, pages=1000, slots=100)) == [w.request for w in waiting if w.ready]


@given(waiting=WAITING, running=RUNNING, slots=st.integers(1, 6))
def test_no_context_gets_ahead_of_another_that_waits(waiting, running, slots):
    """Each that begins is of a context with the fewest running then, among those that have somebody waiting."""
    chosen = admit(waiting, running, pages=1000, slots=slots)
    counts, left = dict(running), {each.request: each for each in waiting if each.ready}
    for number in chosen:
        fewest = min(counts.get(each.context, 0) for each in left.values())
        context = left.pop(number).context
        assert counts.get(context, 0) == fewest
        counts[context] = fewest + 1


def test_a_large_request_is_not_overtaken_for_ever():
    """Small ones of another context keep coming, and it begins all the same as soon as running ones end."""
    large, free, running = Waiting(0, 0, 8), 3, {1: 5}
    small = [Waiting(n, 1, 1) for n in range(1, 9)]
    assert admit([large, *small], running, pages=free, slots=9) == []
    assert admit([large, *small], {1: 1}, pages=8, slots=9) == [0]


READING = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 300)), max_size=8).map(
    lambda found: [Reading(n, *each) for n, each in enumerate(found)]
)


@given(reading=READING, room=st.integers(0, 600), turn=st.integers(0, 9))
def test_portions_fill_the_room_and_no_more(reading, room, turn):
    found = portions(reading, room, turn=turn)
    assert sum(found.values()) == min(room, sum(each.left for each in reading))
    assert all(0 < found.get(each.request, each.left) <= each.left for each in reading)
    for context in range(4):  # the first of a context is read to its end before the next begins
        counts = [(found.get(r.request, 0), r.left) for r in reading if r.context == context]
        begun = [n for n, (count, _) in enumerate(counts) if count]
        assert all(counts[n][0] == counts[n][1] for n in begun[:-1])


def test_contexts_take_turns():
    reading = [Reading(0, 7, 1000), Reading(1, 7, 5), Reading(2, 8, 30), Reading(3, 9, 1000)]
    assert portions(reading, 2 * QUANTUM + 30) == {0: QUANTUM, 2: 30, 3: QUANTUM}


def test_no_context_is_always_left_out():
    reading = [Reading(n, n, 1000) for n in range(5)]
    found = [portions(reading, QUANTUM, turn=turn) for turn in range(3, 8)]
    assert [list(each) for each in found] == [[3], [4], [0], [1], [2]]


def test_buckets():
    assert [bucket(n, (1, 2, 8)) for n in (1, 2, 3, 8, 9)] == [1, 2, 8, 8, 9]
