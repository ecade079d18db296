"""What readers wait for, from the times of their tokens."""

import time

import pytest

import kvzip
import random_model
from kvzip.serving.timing import pace, pace_of
from unchecked import unchecked


def test_the_pace_of_answers_whose_times_are_known():
    found = pace([0.0, 1.0], [[2.0, 2.5, 3.0, 3.5], [2.0, 4.0]])
    assert (found.answers, found.first_s, found.slowest_first_s) == (2, 1.5, 2.0)
    assert (found.token_s, found.p99_s) == (0.5, 2.0)
    assert found.tokens_per_s == 3 / 1.5 + 1 / 2.0
    assert pace([0.0], [[1.0, 2.0]], tokens=[9]).tokens_per_s == 8.0
    for times in ([], [[]], [[1.0, 2.0], []]):
        with pytest.raises(ValueError, match="of which something came"):
            pace([0.0] * len(times), times)


def test_an_answer_that_came_in_one_part_counts_from_when_it_was_asked_for():
    """As a reader sees it that was busy while the answer came: of fewer tokens a second, never of more."""
    found = pace([1.0, 0.0], [[3.0], [1.0, 1.5]], tokens=[6, 2])
    assert (found.first_s, found.slowest_first_s, found.p99_s) == (1.5, 2.0, 2.0)
    assert found.tokens_per_s == 6 / 2.0 + 1 / 0.5
    assert pace([0.0], [[2.0]]).tokens_per_s == 0.5


@unchecked()
def test_handles_say_when_their_tokens_came():
    model = random_model.make(random_model.config())
    with kvzip.Engine(model) as engine:
        before = time.monotonic()
        handle = engine.submit(None, "Why?", max_tokens=5, temperature=1.0, seed=1)
        said = handle.result(60)
        ends = said.stopped == "stop"  # the stop token came too, though it is none of the answer's
        assert len(handle.times) == len(said.token_ids) + ends and handle.times == sorted(handle.times)
        assert before <= handle.begun <= handle.times[0] and handle.times[-1] <= time.monotonic()
        assert pace_of([handle]).first_s == handle.times[0] - handle.begun
