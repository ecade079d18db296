"""Full cache against compressed: probabilities that decoding itself gives, and what changed between the two."""

import io
import re
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from rich.console import Console

import kvzip
import random_model
from kvzip import Answer
from kvzip.evals.comparison import (
    AnswerPair,
    Change,
    Comparison,
    Spread,
    answer_probabilities,
    compare,
    render,
    unchanged,
)

TEXT = "jade acid beach hide fig " * 10
QUERIES = ["who?", "what is it?", "bk"]


@pytest.fixture(scope="module")
def model(two_layers: kvzip.Model) -> kvzip.Model:
    return two_layers


@pytest.fixture(scope="module")
def comparison(model: kvzip.Model) -> Comparison:
    return compare(model, TEXT, QUERIES, 0.2, max_tokens=6)


def test_answers_and_sizes_are_those_of_the_stages(model: kvzip.Model, comparison: Comparison) -> None:
    full = kvzip.score(model, kvzip.prefill(model, TEXT))
    small = kvzip.compress(full, 0.2)
    for pair, a, b in zip(
        comparison.answers,
        kvzip.generate(model, full, QUERIES, max_tokens=6),
        kvzip.generate(model, small, QUERIES, max_tokens=6),
        strict=True,
    ):
        assert (pair.full.token_ids, pair.small.token_ids) == (a.token_ids, b.token_ids)
    assert (comparison.kept, comparison.total) == (small.kept, small.total)
    assert (comparison.full_bytes, comparison.small_bytes) == (kvzip.nbytes(full), kvzip.nbytes(small))
    assert comparison.full_bytes > comparison.small_bytes
    assert min(comparison.prefill_s, comparison.score_s, comparison.compress_s) > 0


def test_a_fit_is_compared_with_its_mass(model: kvzip.Model, comparison: Comparison) -> None:
    fitted = compare(model, TEXT, QUERIES[:1], 0.2, refit=True, max_tokens=4)
    full = kvzip.score(model, kvzip.prefill(model, TEXT))
    small = kvzip.refit(model, full, kvzip.compress(full, 0.2))
    said = kvzip.generate(model, small, QUERIES[0], max_tokens=4)
    assert fitted.answers[0].small.token_ids == said.token_ids
    assert fitted.small_bytes == kvzip.nbytes(small) > comparison.small_bytes
    assert comparison.fit is None and fitted.fit is not None
    before, after = torch.tensor(fitted.fit.before), torch.tensor(fitted.fit.after)
    assert before.shape == full.scores.values.shape[:2] and (before < 1).all() and after.mean() > before.mean()
    console = Console(file=io.StringIO(), width=160)
    console.print(render(fitted))
    shown = console.file.getvalue()
    layer, row = fitted.fit.layers[-1], (fitted.fit.before[-1], fitted.fit.after[-1])
    words = [" ".join(f"{100 * x:.0f}" for x in part) for part in row]
    assert re.search(rf"\n{layer} +{words[0]} +{words[1]}", shown) and "fitting, s" in shown


def test_a_ratio_of_any_type_is_compared_at(model: kvzip.Model, comparison: Comparison) -> None:
    again = compare(model, TEXT, QUERIES[:1], Fraction(1, 5), max_tokens=6)
    assert (again.ratio, again.kept) == (comparison.ratio, comparison.kept) == (0.2, int(0.2 * comparison.total))
    step: list[str] = []
    with pytest.raises(ValueError, match=r"got 30: 0\.3 keeps 30%"):
        compare(model, TEXT, QUERIES, 30, on_step=step.append)
    assert not step, "it is refused before the document is read"


def test_one_text_is_one_question_and_one_end(model: kvzip.Model, comparison: Comparison) -> None:
    (first, *_) = comparison.answers
    end = "".join(reversed(first.full.text))
    assert end not in first.full.text
    (pair,) = compare(model, TEXT, QUERIES[0], 0.2, max_tokens=6, stop=end).answers
    assert (pair.query, pair.full, pair.small) == (first.query, first.full, first.small)


@pytest.mark.parametrize("template", [True, False])
def test_probabilities_of_an_answer_lead_decoding_to_it(model: kvzip.Model, template: bool) -> None:
    cache = kvzip.prefill(model, TEXT, template=template)
    for query in QUERIES:
        ids = kvzip.generate(model, cache, query, max_tokens=6, template=template).token_ids
        p = answer_probabilities(model, cache, query, ids, template=template)
        assert p.shape == (len(ids), model.config.vocab_size)
        assert p.argmax(-1).tolist() == ids
        assert torch.allclose(p.sum(-1), torch.ones(len(ids)))


@pytest.mark.parametrize("kind", ["extended", "asked"])
def test_probabilities_count_the_tail(model: kvzip.Model, kind: str) -> None:
    cache = kvzip.compress(kvzip.score(model, kvzip.prefill(model, TEXT)), 0.6)
    longer = kvzip.extend(model, cache, " and more") if kind == "extended" else kvzip.ask(model, cache, "how?")[1]
    before, moved = [x.clone() for x in longer.tail.k], []
    for query in QUERIES:
        ids = kvzip.generate(model, longer, query, max_tokens=6).token_ids
        p = answer_probabilities(model, longer, query, ids)
        assert p.argmax(-1).tolist() == ids
        moved.append(answer_probabilities(model, cache, query, ids).argmax(-1).tolist() != ids)
    assert any(moved), "without its tail a cache says something else"
    assert all(torch.equal(a, b) for a, b in zip(longer.tail.k, before, strict=True))
    with pytest.raises(ValueError, match="token ids in"):
        answer_probabilities(model, cache, QUERIES[0], [model.config.vocab_size])


def test_changes_are_where_the_first_choice_differs(model: kvzip.Model, comparison: Comparison) -> None:
    full = kvzip.score(model, kvzip.prefill(model, TEXT))
    small = kvzip.compress(full, 0.2)
    assert any(pair.changes for pair in comparison.answers)
    for pair in comparison.answers:
        ids = pair.full.token_ids
        p_full, p_small = (answer_probabilities(model, cache, pair.query, ids) for cache in (full, small))
        differing = [n for n in range(len(ids)) if p_small[n].argmax() != ids[n]]
        assert [change.position for change in pair.changes] == differing
        for change in pair.changes:
            own, other = ids[change.position], int(p_small[change.position].argmax())
            assert change.full_p == (float(p_full[change.position, own]), float(p_full[change.position, other]))
            assert change.small_p == (float(p_small[change.position, own]), float(p_small[change.position, other]))
            assert change.full_p[0] >= change.full_p[1] and change.small_p[0] <= change.small_p[1]
        apart = torch.tensor([float(p_small[n, i] - p_full[n, i]) for n, i in enumerate(ids)])
        assert pair.p_answer is not None and pair.margin is not None and pair.p is not None
        assert pair.p_answer.low == pytest.approx(float(apart.min()))
        assert pair.p_answer.mean_abs == pytest.approx(float(apart.abs().mean()))
        assert pair.p_answer.high == pytest.approx(float(apart.max()))
        leads = []
        for p in (p_small, p_full):
            rest = p.clone()
            rest[range(len(ids)), ids] = 0
            leads.append(p[range(len(ids)), ids] - rest.max(-1).values)
        margin = leads[0] - leads[1]
        assert pair.margin.low == pytest.approx(float(margin.min()), abs=1e-6)
        assert pair.margin.high == pytest.approx(float(margin.max()), abs=1e-6)
        assert pair.p.high == pytest.approx(float((p_small - p_full).max()))


def test_ratio_one_changes_nothing(model: kvzip.Model) -> None:
    for pair in compare(model, TEXT, QUERIES, 1.0, max_tokens=6).answers:
        assert pair.full == pair.small
        assert pair.changes == ()
        for spread in (pair.p_answer, pair.margin, pair.p):
            assert spread is not None and (spread.low, spread.mean_abs, spread.high) == (0.0, 0.0, 0.0)


def test_the_table_shows_answers_and_changes_as_text(comparison: Comparison) -> None:
    out = io.StringIO()
    Console(file=out, width=200).print(render(comparison))
    text = out.getvalue()
    assert f"keeps {comparison.kept:,} of {comparison.total:,} pairs" in text
    c = comparison
    for row, *numbers in [
        ("cache, MB", c.full_bytes / 1e6, c.small_bytes / 1e6),
        ("reading the document, s", c.prefill_s),
        ("scoring and packing, s", c.score_s, c.compress_s),
        ("answering, s", sum(pair.full_s for pair in c.answers), sum(pair.small_s for pair in c.answers)),
    ]:
        (line,) = [line for line in text.splitlines() if line.startswith(row)]
        assert re.findall(r"\d+\.\d+", line) == [f"{number:.2f}" for number in numbers]
    for pair in comparison.answers:
        assert pair.query in text
    same = sum(pair.full.text == pair.small.text for pair in c.answers)
    assert same == unchanged(c) < len(c.answers)
    verdict = f"{same} of {len(c.answers)} answers unchanged; {c.full_bytes / 1e6:.3g} -> {c.small_bytes / 1e6:.3g} MB"
    assert text.splitlines()[0] == verdict


def test_numbers_of_a_question_are_points_and_percentages() -> None:
    change = Change(3, " a\x1b", "[red]b", (0.5, 0.25), (0.125, 0.75))
    answers = (Answer("it is [b]\x1b[31m a\n", [1, 2], "stop"), Answer("it is b\u202e", [1, 3], "stop"))
    spreads = (Spread(-0.4475, 0.084, 0.2238), None, Spread(0.0, 1e-6, 0.02))
    pair = AnswerPair("which\x9b?", *answers, 1.0, 2.0, (change,), *spreads)
    comparison = Comparison("m\x1b[0m", "kvzip", 0.3, 10, 3, 10, 1.0, 1.0, 1.0, 84_000_000, 27_000_000, (pair, pair))
    out = io.StringIO()
    Console(file=out, width=120).print(render(comparison))
    lines = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    assert out.getvalue().startswith("0 of 2 answers unchanged; 84 -> 27 MB\nm\\x1b[0m: 10 tokens")
    assert "moved lowest, points highest, points mean size, points" in lines
    assert "p of its tokens -44.8 +22.4 8.4" in lines and "p of any token 0 +2.0 <0.1" in lines
    assert "3 ' a\\x1b' 50.0 12.5 '[red]b' 25.0 75.0" in lines
    assert (
        "it is [b]\\x1b[31m a" in out.getvalue()
        and "it is b\\u202e" in out.getvalue()
        and "which\\x9b?" in out.getvalue()
    )
    assert not re.search("[\x1b\x9b\u202e]", out.getvalue())


def test_steps_are_told_as_they_begin(model: kvzip.Model) -> None:
    told: list[str] = []
    compare(model, TEXT, QUERIES[:2], 0.5, max_tokens=2, on_step=told.append)
    assert told == ["reading the document", "scoring pairs", "answering 1 of 2", "answering 2 of 2"]


def test_an_unknown_method_is_an_error_that_lists_the_known(model: kvzip.Model) -> None:
    with pytest.raises(ValueError, match=r"expected a method among \[.*'kvzip'.*\], got 'snap'"):
        compare(model, TEXT, QUERIES, 0.5, method="snap")


def test_an_answer_that_does_not_fit_or_another_models_cache_is_refused(model: kvzip.Model) -> None:
    cache = kvzip.prefill(model, TEXT)
    with pytest.raises(ValueError, match=r"expected at most 70 positions"):
        answer_probabilities(replace(model, config=replace(model.config, max_length=70)), cache, "q", [1] * 100)
    with pytest.raises(ValueError, match="expected a cache of this model"):
        answer_probabilities(random_model.make(model.config, seed=3), cache, "q", [1])
