"""Which ratio is enough: what is counted as kept, what is recommended, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kvzip
import random_model
from kvzip import tuning
from kvzip.cache import read_header
from kvzip.evals.comparison import answer_probabilities
from test_cli import call, write_model

TEXT = "The tower was built in 1871. Its keeper counted 312 steps; nobody else did. " * 3


@pytest.fixture(scope="module")
def model():
    return replace(random_model.make(random_model.config()), stop_ids=())


@pytest.fixture(scope="module")
def scored(model):
    return kvzip.score(model, kvzip.prefill(model, TEXT))


def kept(model, full, small, probe, template):
    """Whether an answer is kept, from the probabilities of whole vocabularies."""
    missing = 0
    p, q = (answer_probabilities(model, c, probe.question, list(probe.ids), template=template) for c in (full, small))
    for token, before, after in zip(probe.ids, p, q, strict=True):
        lost = int(after.argmax()) != token and float(after[token]) < float(before[token]) / 2
        missing += int(before.argmax()) == token and lost
    return missing <= (len(probe.ids) / 20 if probe.repeats else 0)


@pytest.mark.parametrize(("template", "keep"), [(True, 0.6), (False, 0.6), (True, 0.05)])
def test_answers_are_counted_and_the_smallest_enough_is_recommended(model, template, keep):
    full = kvzip.score(model, kvzip.prefill(model, TEXT, template=template))
    found = kvzip.tune(model, full, ratios=(0.9, 0.1, 0.5), bits=(8,), keep=keep, count=3, max_tokens=6)
    assert len([p for p in found.probes if p.repeats]) == (3 if template else 6)
    whole = tuning.Choice(1.0, None, len(found.probes), len(found.probes), kvzip.nbytes(full))
    for choice in found.choices:
        small = kvzip.compress(full, choice.ratio, bits=choice.bits, floor=0.2 * choice.fitted)
        small = kvzip.refit(model, full, small) if choice.fitted else small
        assert choice.answers == sum(kept(model, full, small, probe, template) for probe in found.probes)
        assert (choice.asked, choice.cache_bytes) == (len(found.probes), kvzip.nbytes(small))
    fitted = found.choices[-1] if found.choices[-1].fitted else None
    *wide, last = found.choices[: -1 if fitted else None]
    enough = [choice.answers >= keep * choice.asked for choice in wide]
    assert [(c.ratio, c.bits) for c in wide] == [(0.9, None), (0.5, None), (0.1, None)][: len(wide)]
    assert all(enough[:-1]) and (len(wide) == 3 or not enough[-1]), "up to the first that keeps too few"
    best = ([whole] + [choice for choice, good in zip(wide, enough, strict=True) if good])[-1]
    assert (last.ratio, last.bits) == (best.ratio, 8)
    best = last if last.answers >= keep * last.asked else best
    assert (fitted is None) == (best.ratio == 1)
    assert fitted is None or (fitted.ratio, fitted.bits) == (best.ratio, best.bits)
    assert found.recommended == (fitted if fitted and fitted.answers >= best.answers else best)
    assert any(x.bias is not None for x in found.cache.context) == found.recommended.fitted
    assert found.cache.kept == int(found.recommended.ratio * full.total)
    greedy = [p for p in found.probes if not p.repeats]
    for probe in greedy:
        assert kvzip.generate(model, full, probe.question, max_tokens=6).token_ids == list(probe.ids)
    for probe in found.probes:
        assert not probe.repeats or probe.answer.strip() in TEXT


def test_given_questions_are_the_only_ones_and_all_pairs_lose_nothing(model, scored):
    found = kvzip.tune(model, scored, ["Who?", "How many?"], ratios=[1.0], bits=(), keep=1, max_tokens=5)
    assert [p.question for p in found.probes] == ["Who?", "How many?"] and not any(p.repeats for p in found.probes)
    assert found.choices == (tuning.Choice(1.0, None, 2, 2, kvzip.nbytes(kvzip.compress(scored, 1.0))),)
    assert found.recommended.ratio == 1.0 and torch.equal(found.cache.token_ids, scored.token_ids)


def test_what_cannot_be_tuned_is_named(model, scored):
    for wrong, error in (
        ({"ratios": []}, "expected ratios to try"),
        ({"bits": [3]}, "bits of 8 or 4"),
        ({"keep": 0}, "0 < keep <= 1"),
        ({"questions": []}, "at least one question"),
        ({"questions": [" "]}, "a query with text in it"),
        ({"count": 0}, "count"),
    ):
        with pytest.raises(ValueError, match=error):
            kvzip.tune(model, scored, **wrong)
    with pytest.raises(ValueError, match="expected a cache with scores"):
        kvzip.tune(model, replace(scored, scores=None))
    short = kvzip.score(model, kvzip.prefill(model, "Too short."))
    with pytest.raises(ValueError, match="a document of at least 36 tokens"):
        kvzip.tune(model, short)


def test_the_command_recommends_and_writes_what_the_library_does(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "tiny")
    (tmp_path / "doc.txt").write_text(TEXT, encoding="utf-8")
    out = tmp_path / "doc.kvz"
    options = ("-m", directory, "--device", "cpu", "-q", "Who?", "-q", "When?", "-r", "0.3", "-r", "0.8", "-o", out)
    result = call("tune", tmp_path / "doc.txt", *options, "--json")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    model = kvzip.load(directory, device="cpu")
    full = kvzip.score(model, kvzip.prefill(model, TEXT))
    found = kvzip.tune(model, full, ["Who?", "When?"], ratios=(0.3, 0.8))
    assert facts["recommended"]["answers"] == found.recommended.answers
    assert [c["cache_bytes"] for c in facts["choices"]] == [c.cache_bytes for c in found.choices]
    assert read_header(out)["kept"] == found.cache.kept and read_header(out)["note"]["title"] == "doc.txt"
    shown = call("tune", tmp_path / "doc.txt", *options[:-2], "--bits", "none").stdout
    assert "was asked 2 questions." in shown and "80%" in shown and "in 8 bits" not in shown
