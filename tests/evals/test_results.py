"""Results: files that survive a kill, and summaries worked by hand."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvzip.evals.results import (
    Answered,
    append,
    by_measure,
    check_growing,
    check_place,
    differences,
    group,
    label,
    mend,
    read,
    summarize,
)

RUN: dict[str, Any] = {
    "kind": "run",
    "run": "r",
    "fingerprint": "f",
    "form": "chat",
    "seed": 0,
    "count": 1,
    "questions": 9,
    "max_tokens": None,
}


def question(number: int, context: str = "c", **facts: Any) -> dict[str, Any]:
    line = {"kind": "question", "id": f"{context}{number}", "run": "r", "task": "t", "example": int(context == "c")}
    return {**line, "number": number, "context": context, "facts": facts}


def answer(number: int, context: str = "c", **changes: Any) -> dict[str, Any]:
    line = {"kind": "answer", "run": "r", "question": f"{context}{number}", "method": "m", "ratio": 0.5, "kept": 0.5}
    return {**line, "score": 1.0, "prediction": "a \u2028 b", **changes}


def answered(score: float, context: str = "c", number: int = 0, **changes: Any) -> Answered:
    fields: dict[str, Any] = {"method": "m", "ratio": 0.5, "kept": 0.5, "prediction": ""}
    return Answered(run=RUN, question=question(number, context), score=score, **{**fields, **changes})


def test_lines_come_back_as_answers_with_their_run_and_question(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    append(path, [RUN, question(0), answer(0)])
    append(path, [question(1), answer(1, score=0.25)])
    found = read(path)
    assert [(a.run["seed"], a.question["id"], a.score) for a in found] == [(0, "c0", 1.0), (0, "c1", 0.25)]
    assert found[0].prediction == "a \u2028 b"


@given(cut=st.integers(1, 400))
def test_a_torn_last_line_is_cut_off_and_what_follows_is_whole(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tmp_path_factory.mktemp("torn") / "x.jsonl"
    append(path, [RUN, question(0), answer(0)])
    whole = path.read_bytes()
    path.write_bytes(whole + json.dumps(answer(1, prediction="\u00e9" * 300), ensure_ascii=False).encode()[:cut])
    assert len(read(path)) == 1
    assert mend(path) > 0
    assert path.read_bytes() == whole
    assert mend(path) == 0
    assert mend(path.parent / "none.jsonl") == 0


@pytest.mark.parametrize(
    "line",
    ["{", '"x"', json.dumps({"kind": "note"}), json.dumps(answer(5)), json.dumps({**answer(0), "run": "other"})],
)
def test_a_broken_line_is_an_error_that_names_it(tmp_path: Path, line: str) -> None:
    path = tmp_path / "x.jsonl"
    append(path, [RUN, question(0)])
    path.write_text(path.read_text() + line + "\n")
    append(path, [answer(0)])
    with pytest.raises(ValueError, match="expected a run, question or answer in line 3"):
        read(path)


def test_the_same_answer_twice_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    append(path, [RUN, question(0), answer(0)])
    with pytest.raises(ValueError, match=r"expected one answer of m at 0\.5 to question c0, got two"):
        read(path, path)


def test_no_two_questions_share_a_place() -> None:
    known: dict[tuple[Any, ...], str] = {}
    for _ in range(2):
        check_place(known, RUN, question(0))
    check_place(known, RUN, question(1))
    check_place(known, {**RUN, "seed": 1}, {**question(0), "id": "other"})
    with pytest.raises(ValueError, match="expected question 0 of example 1 of t to be c0 as before, got other"):
        check_place(known, RUN, {**question(0), "id": "other"})


def test_answers_are_grouped_by_their_own_fields_and_by_facts() -> None:
    deep, plain = answered(1.0), answered(1.0, method="n")
    deep = Answered(RUN, question(0, depth=30, subtask="kv"), "m", 0.5, 0.5, 1.0, "")
    assert list(group([deep, plain], "method", "depth", "seed")) == [("m", 30, 0), ("n", None, 0)]
    assert (label(deep), label(plain)) == ("t (kv)", "t")


def test_mean_and_interval_are_over_contexts() -> None:
    # context a: 1, 1, 1; context b: 0. A resample is aa (1), ab (0.5) or bb (0), the outer two a quarter each
    scores = [answered(1.0, "a", n) for n in range(3)] + [answered(0.0, "b")]
    (row,) = summarize(scores, "task", "method", "ratio")
    assert row.group == ("t", "m", 0.5)
    assert (row.mean, row.questions, row.contexts) == (0.5, 4, 2)
    assert (row.low, row.high) == (0.0, 1.0)
    # ten contexts, half of them right with all of their ten questions: the mean of ten coins, not of a hundred
    (row,) = summarize([answered(float(c % 2), "abcdefghij"[c], n) for c in range(10) for n in range(10)], "task")
    assert (row.mean, row.low, row.high) == (0.5, pytest.approx(0.2, abs=0.01), pytest.approx(0.8, abs=0.01))
    # of one context, over its questions: the mean of 100 halves lies within 0.4 to 0.6 in 95%
    (row,) = summarize([answered(float(n % 2), number=n) for n in range(100)], "task")
    assert row.contexts == 1
    assert row.low == pytest.approx(0.40, abs=0.02)
    assert row.high == pytest.approx(0.60, abs=0.02)
    (row,) = summarize([answered(0.5, "abcdef"[n], n) for n in range(6)], "task")
    assert (row.low, row.mean, row.high) == (0.5, 0.5, 0.5)


def test_differences_are_between_answers_to_the_same_question_at_the_same_ratio() -> None:
    ours = [answered(1.0, "a", 0), answered(0.5, "b", 0), answered(1.0, "a", 1), answered(0.0, "a", 0, ratio=0.1)]
    theirs = [answered(0.0, "a", 0, method="n"), answered(0.5, "b", 0, method="n")]
    full = [answered(1.0, context, 0, method="full", ratio=1.0) for context in "ab"]
    (row,) = differences([*ours, *theirs, *full], method="m", base="n")
    assert (row.group, row.mean, row.questions) == (("t", 0.5), 0.5, 2)
    rows = {row.group[1]: row.mean for row in differences([*ours, *full], method="m", base="full")}
    assert rows == {0.5: -0.25, 0.1: -1.0}


def test_a_compressed_file_is_read_as_the_plain_one_and_the_same_lines_make_the_same_bytes(tmp_path: Path) -> None:
    plain, one, two = tmp_path / "x.jsonl", tmp_path / "x.jsonl.gz", tmp_path / "y.jsonl.gz"
    lines = [RUN, question(0), answer(0)]
    append(plain, lines)
    append(one, lines)
    append(two, lines[:2])
    append(two, lines[2:])
    assert read(one) == read(two) == read(plain) and one.read_bytes() == two.read_bytes()
    assert mend(one) == 0 and gzip.decompress(one.read_bytes()) == plain.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.jsonl", "x.jsonl.gz", "y.jsonl.gz"]
    one.write_bytes(one.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"expected a gzip file, got .*x\.jsonl\.gz"):
        read(one)
    with pytest.raises(ValueError, match=r"expected a file that answers can be added to, got .*: name it y\.jsonl"):
        check_growing(two)


def test_what_was_measured_besides_takes_the_place_of_scores(tmp_path: Path) -> None:
    append(tmp_path / "x.jsonl", [RUN, question(0), question(1), {**answer(0), "loglik": -2.5}, answer(1)])
    (found,) = by_measure(read(tmp_path / "x.jsonl"), "loglik")
    assert (found.question["id"], found.score) == (question(0)["id"], -2.5)
