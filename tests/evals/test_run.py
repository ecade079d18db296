"""The harness: real eviction, every answer once, killed runs go on, and it can fail."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import kvzip
import random_model
from kvzip.cache import RaggedCache
from kvzip.evals import asking, run
from kvzip.evals.asking import ask, prefill_example
from kvzip.evals.comparison import answer_probabilities
from kvzip.evals.methods import METHODS, Method
from kvzip.evals.metrics import METRICS
from kvzip.evals.plan import FULL, Plan, jobs
from kvzip.evals.report import table
from kvzip.evals.results import Answered, read, summarize
from kvzip.evals.run import caches, run_eval
from kvzip.evals.tasks import TASKS, Example, Question, Request, Task
from kvzip.small import packages as small_models

TASK = "math_find@300"
SEEN = ("full", "kvzip", "random")


def shuffled(model: kvzip.Model, cache: kvzip.DenseCache) -> kvzip.DenseCache:
    """KVzip's own scores, each given to some other pair."""
    scored = kvzip.score(model, cache)
    assert scored.scores is not None
    values = scored.scores.values
    order = torch.randperm(values.numel(), generator=torch.Generator().manual_seed(0))
    mixed = values.flatten()[order.to(values.device)].view_as(values)
    return replace(scored, scores=replace(scored.scores, values=mixed, source="shuffled"))


def with_counts(calls: list[str]) -> dict[str, Method]:
    """The methods, which say in `calls` when they score."""

    def counted(method: Method) -> Method:
        def score(model: kvzip.Model, cache: kvzip.DenseCache) -> kvzip.DenseCache:
            calls.append(method.name)
            return method.score(model, cache)

        return replace(method, score=score)

    return {name: counted(METHODS[name]) for name in ("kvzip", "random")}


def evaluate(model: kvzip.Model, out: Path, **changes: Any) -> list[Answered]:
    settings: dict[str, Any] = {"tasks": [TASK], "methods": SEEN, "ratios": (0.3, 1.0), "count": 2, "questions": 5}
    run_eval(model, out=out, **{**settings, "max_tokens": 3, **changes})
    return read(out)


def answers(found: list[Answered]) -> dict[tuple[Any, ...], tuple[float, float, str]]:
    return {answer.key: (answer.kept, answer.score, answer.prediction) for answer in found}


def test_every_question_is_answered_once_by_every_method_at_every_ratio(model: kvzip.Model, tmp_path: Path) -> None:
    calls: list[str] = []
    found = evaluate(model, tmp_path / "out.jsonl", available=with_counts(calls))
    steps = [(FULL, 1.0), ("kvzip", 0.3), ("kvzip", 1.0), ("random", 0.3), ("random", 1.0)]
    questions = [(example, number) for example in range(2) for number in range(5)]
    got = [(a.method, a.ratio, a.question["example"], a.question["number"]) for a in found]
    assert sorted(got) == sorted((*step, *question) for step in steps for question in questions)
    assert calls == ["kvzip", "random"] * 2  # once for each of two contexts


def test_a_method_or_ratio_that_is_named_twice_is_run_once(model: kvzip.Model, tmp_path: Path) -> None:
    twice = {"methods": ("full", "kvzip", "full", "kvzip"), "ratios": (0.3, 1.0, 0.3)}
    found = evaluate(model, tmp_path / "out.jsonl", tasks=[TASK, TASK], count=1, **twice)
    assert [(a.method, a.ratio) for a in found if a.question["number"] == 0] == [
        ("full", 1.0),
        ("kvzip", 0.3),
        ("kvzip", 1.0),
    ]


def test_ratio_one_equals_the_full_cache_exactly(model: kvzip.Model, tmp_path: Path) -> None:
    found = evaluate(model, tmp_path / "out.jsonl", ratios=(0.1, 1.0))
    full = {a.question["id"]: a.prediction for a in found if a.method == FULL}
    whole = [a for a in found if a.method != FULL and a.ratio == 1.0]
    assert len(set(full.values())) > 1
    assert [a.prediction for a in whole] == [full[a.question["id"]] for a in whole]
    assert [a.prediction for a in found if a.ratio == 0.1] != [full[a.question["id"]] for a in found if a.ratio == 0.1]


def test_pairs_are_really_evicted_in_the_numbers_written_down(model: kvzip.Model, tmp_path: Path) -> None:
    found = evaluate(model, tmp_path / "out.jsonl", methods=("kvzip",), ratios=(0.3, 0.77), count=1)
    request = Request(1, 5, 0, 0, None, lambda text: len(text.encode()))
    (job,) = jobs(model, TASK, request)
    steps = [("kvzip", 0.3), ("kvzip", 0.77)]
    plan = Plan((TASK,), ("kvzip",), (0.3, 0.77), "chat", request, METHODS)
    assert plan.steps == steps
    for step, cache, _ in caches(model, job.example, steps, plan):
        assert isinstance(cache, RaggedCache)
        assert cache.kept == int(step[1] * cache.total)
        rows = sum(layer.k.shape[0] - cache.start * 2 for layer in cache.context)
        assert rows == cache.kept
        assert {a.kept for a in found if a.ratio == step[1]} == {round(cache.kept / cache.total, 6)}


def test_a_killed_run_goes_on_where_it_stopped(model: kvzip.Model, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"methods": ("full", "kvzip"), "ratios": (0.3,), "batch": 2}
    whole = answers(evaluate(model, tmp_path / "whole.jsonl", **settings))
    out = tmp_path / "killed.jsonl"

    def kill(finished: int, total: int, what: str) -> None:
        assert total == len(whole) == 20
        if finished >= 14:  # in the second context
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, out, progress=kill, **settings)
    content = out.read_bytes()
    out.write_bytes(content[:-20])  # a torn last line
    assert len(read(out)) == 13
    calls: list[str] = []
    assert answers(evaluate(model, out, available=with_counts(calls), **settings)) == whole
    assert calls == ["kvzip"]  # the first context was done
    before = out.read_bytes()
    assert answers(evaluate(model, out, **settings)) == whole
    assert out.read_bytes() == before


KILLED = """
import os, signal, sys
from pathlib import Path
import random_model
from kvzip.evals import run

def append(path, lines, calls=[]):
    calls.append(None)
    if len(calls) < 5:
        return whole(path, lines)
    whole(Path(f"{path}.other"), lines)
    with path.open("ab", buffering=0) as file:
        file.write(Path(f"{path}.other").read_bytes()[:-70])
        os.kill(os.getpid(), signal.SIGKILL)

whole, run.append = run.append, append
model = random_model.make(random_model.config())
methods, task = ("full", "kvzip"), sys.argv[2]
run.run_eval(model, tasks=[task], out=Path(sys.argv[1]), methods=methods, ratios=(0.3,), count=2, questions=5,
             max_tokens=3, batch=2)
"""


def test_a_run_killed_with_sigkill_in_the_middle_of_a_line_goes_on(model: kvzip.Model, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"methods": ("full", "kvzip"), "ratios": (0.3,), "batch": 2}
    whole = answers(evaluate(model, tmp_path / "whole.jsonl", **settings))
    out = tmp_path / "killed.jsonl"
    command = [sys.executable, "-c", KILLED, str(out), TASK]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    assert out.read_bytes()[-1:] != b"\n" and 0 < len(read(out)) < len(whole)
    calls: list[str] = []
    assert answers(evaluate(model, out, available=with_counts(calls), **settings)) == whole
    assert calls == ["kvzip"] * 2
    assert all(json.loads(line) for line in out.read_text(encoding="utf-8").splitlines())


def test_a_time_limit_leaves_the_rest_for_the_next_run(model: kvzip.Model, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert not run_eval(model, tasks=[TASK], out=out, count=1, questions=1, max_tokens=2, limit_s=0.0)
    assert read(out) == []
    assert run_eval(model, tasks=[TASK], out=out, count=1, questions=1, max_tokens=2, limit_s=600.0)
    assert len(read(out)) == 4


def test_other_questions_models_and_forms_share_a_file(model: kvzip.Model, tmp_path: Path) -> None:
    out, small = tmp_path / "out.jsonl", {"methods": ("full",), "count": 1, "questions": 1}
    other = random_model.make(random_model.config(), seed=1)
    for changes in ({}, {"seed": 1}, {"form": "cloze"}, {"max_tokens": 2}):
        evaluate(model, out, **{**small, **changes})
    assert len(evaluate(other, out, **small)) == 5


def test_a_question_that_is_asked_twice_is_answered_twice(model: kvzip.Model, tmp_path: Path) -> None:
    row = {"context": "Twice told.", "question": ["Who?", "Who?"], "answers": ["x", "x"]}
    (tmp_path / "squad_paragraph.jsonl").write_text(json.dumps(row), encoding="utf-8")
    out = tmp_path / "out.jsonl"
    found = evaluate(model, out, tasks=["squad"], data=str(tmp_path), methods=("full",))
    assert len(found) == 2
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line["stopped"] for line in lines if line["kind"] == "answer"] == ["length", "length"]


def test_a_task_that_has_changed_is_refused(
    model: kvzip.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, asked = tmp_path / "out.jsonl", [Question("Q: who?", "It was", ("x",), "include")]
    task = Task("own", lambda request: iter([Example("some text", tuple(asked))]), 0, "")
    monkeypatch.setitem(TASKS, "own", task)
    evaluate(model, out, tasks=["own"])
    before = out.read_bytes()
    asked[0] = replace(asked[0], answers=("y",))
    with pytest.raises(ValueError, match=r"expected question 0 of example 0 of own to be .* as before"):
        evaluate(model, out, tasks=["own"])
    assert out.read_bytes() == before


def test_a_run_says_what_made_it(model: kvzip.Model, tmp_path: Path) -> None:
    (answer, *_) = evaluate(model, tmp_path / "out.jsonl", seed=7, commit="abc", count=1)
    facts = {key: answer.run[key] for key in ("commit", "model", "fingerprint", "dtype", "form", "seed")}
    assert facts == {
        "commit": "abc",
        "model": "random",
        "fingerprint": model.fingerprint,
        "dtype": "float32",
        "form": "chat",
        "seed": 7,
    }
    assert answer.run["versions"]["torch"] == torch.__version__


def test_forms_ask_the_chat_or_continue_the_text(model: kvzip.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], dict[str, Any]]] = []

    def generate(model: object, cache: object, queries: list[str], **options: Any) -> list[kvzip.Answer]:
        asked.append((queries, options))
        return [kvzip.Answer(" an answer\n", [1], "stop") for _ in queries]

    monkeypatch.setattr(asking, "generate", generate)
    question = Question("Q: who?", "It was", ("x",), "include", 5, cloze_stop=("#",))
    example = Example("some text", (question,), instruction="Read this.")
    chat, cloze = (prefill_example(model, example, form=form) for form in ("chat", "cloze"))
    for form, cache in (("chat", chat), ("cloze", cloze)):
        assert [answer.text for answer in ask(model, cache, [question], form=form)] == [" an answer\n"]
    assert asked == [
        (["Q: who?"], {"max_tokens": 5}),
        (["\n\nIt was"], {"max_tokens": 5, "stop": ("#",), "template": False}),
        ([], {"max_tokens": 5, "stop": ("#",), "template": False}),
    ]
    texts = [kvzip.prompts.decode(model.tokenizer, cache.token_ids.tolist()) for cache in (chat, cloze)]
    assert texts == ["Read this.\n\nsome text"] * 2
    assert (chat.start, cloze.start) == (len("Read this.\n\n") + 1, 0)
    plain = prefill_example(model, replace(example, instruction=None), form="cloze")
    assert plain.length == len("some text")


def test_a_continuation_that_begins_with_its_stop_text_goes_on_once(
    model: kvzip.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {"\n\nOne": "a", "\n\nTwo": "\n", "\n\nTwo\n": "b", "\n\nThree": "", "\n\nFour": "\n", "\n\nFour\n": "\n"}

    def generate(model: object, cache: object, queries: list[str], **options: Any) -> list[kvzip.Answer]:
        texts = [said[query] for query in queries]
        return [kvzip.Answer(text.strip(), list(text.encode()), "stop") for text in texts]

    monkeypatch.setattr(asking, "generate", generate)
    monkeypatch.setattr(asking.prompts, "decode", lambda tokenizer, ids: bytes(ids).decode())
    questions = [Question("", text, ("x",), "include") for text in ("One", "Two", "Three", "Four")]
    cache = kvzip.prefill(model, "some text", template=False)
    assert [answer.text for answer in ask(model, cache, questions, form="cloze")] == ["a", "b", "", ""]


@pytest.mark.parametrize("form", ["chat", "cloze"])
def test_likelihoods_are_those_of_reading_each_question_by_itself(model: kvzip.Model, form: str) -> None:
    questions = tuple(Question(f"who {n}?", f"It {n} was", ("x" * (n + 1),), "gold") for n in range(3))
    cache = prefill_example(model, Example("some text", questions, instruction=""), form=form)
    small = kvzip.compress(kvzip.score(model, cache), 0.5)
    chat, found = form == "chat", asking.gold(model, small, questions, form=form)
    for question, own in zip(questions, found, strict=True):
        text, wanted = question.query if chat else "\n\n" + question.cloze, question.answers[0]
        ids = kvzip.prompts.encode_text(model.tokenizer, wanted if chat else " " + wanted)
        p = answer_probabilities(model, small, text, ids, template=chat)
        assert own.loglik == pytest.approx(float(p.log()[range(len(ids)), ids].sum()), rel=1e-4)
        assert own.exact == (p.argmax(-1).tolist() == ids)
    greedy = kvzip.generate(model, small, questions[0].query if chat else "\n\nIt 0 was", max_tokens=1, template=chat)
    said = kvzip.prompts.decode(model.tokenizer, greedy.token_ids)
    if chat and kvzip.prompts.encode_text(model.tokenizer, said) == greedy.token_ids:
        (own,) = asking.gold(model, small, [replace(questions[0], answers=(said,))], form=form)
        assert own.exact


def test_reference_answers_are_measured_and_written_down(model: kvzip.Model, tmp_path: Path) -> None:
    row = {"context": "Twice told tales.", "question": ["Who?", "Why?"], "answers": ["x", "me"]}
    (tmp_path / "squad_article.jsonl").write_text(json.dumps(row), encoding="utf-8")
    found = evaluate(model, tmp_path / "out.jsonl", tasks=["gold"], data=str(tmp_path), ratios=(0.5,))
    assert {(a.method, a.ratio): set(a.measured) for a in found} == {
        (method, ratio): {"loglik", "bytes", "agreement"}
        for method, ratio in (("full", 1.0), ("kvzip", 0.5), ("random", 0.5))
    }
    agreed = {a.method: a.measured["agreement"] for a in found}
    assert agreed["full"] == agreed["kvzip"] == 1.0 > agreed["random"]
    assert all(a.measured["loglik"] < 0 and a.score in (0.0, 1.0) for a in found)
    assert "| log-likelihood |" in table(found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["kw"]}, "expected tasks or groups among"),
        ({"methods": ["kvzap"]}, r"expected methods among \['full', .*'kvzip'.*\], got 'kvzap'"),
        ({"ratios": [0.0]}, r"expected ratios in \(0, 1\]"),
        ({"form": "plain"}, "expected form 'chat' or 'cloze', got 'plain'"),
        ({"tasks": []}, r"expected tasks, methods and ratios, got \[\], "),
        ({"methods": []}, "expected tasks, methods and ratios"),
        ({"ratios": []}, "expected tasks, methods and ratios"),
        ({"tasks": ["math_find@4000"]}, r"expected contexts of at most 1896 tokens .* in math_find@4000"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_answered(
    model: kvzip.Model, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(model, tmp_path / "out.jsonl", **changes)
    assert not (tmp_path / "out.jsonl").exists()


def test_no_answer_is_added_to_a_compressed_file(model: kvzip.Model, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a file that answers can be added to, got .*out\.jsonl\.gz"):
        evaluate(model, tmp_path / "out.jsonl.gz")
    assert not [*tmp_path.iterdir()]


def test_a_chat_without_a_template_is_refused_before_anything_is_answered(tmp_path: Path) -> None:
    plain = random_model.make(random_model.config(), template=False)
    with pytest.raises(ValueError, match="expected a model with a chat template for form 'chat'"):
        evaluate(plain, tmp_path / "out.jsonl", form="chat")
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("broken", [lambda p, r, c: 1.0, lambda p, r, c: 0.0])
def test_a_broken_metric_is_noticed_before_anything_is_answered(
    model: kvzip.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: Callable[..., float]
) -> None:
    monkeypatch.setitem(METRICS, "exact", broken)
    with pytest.raises(ValueError, match="the metric is broken"):
        evaluate(model, tmp_path / "out.jsonl")


@pytest.fixture
def echo(model: kvzip.Model, monkeypatch: pytest.MonkeyPatch) -> str:
    """A task that asks a random model for its own answers from the full cache: what it can be right in."""
    queries = [f"{a}{b}" for a in "abcdef" for b in "ghijk"]

    def examples(request: Request) -> Iterator[Example]:
        example = Example("jade acid beach hide fig " * 10, ())
        cache = prefill_example(model, example, form="chat")
        full = kvzip.generate(model, cache, queries, max_tokens=2)
        asked = [Question(q, q, (str(answer.token_ids),), "exact", 2) for q, answer in zip(queries, full, strict=True)]
        yield replace(example, questions=tuple(asked))

    def ids(model: kvzip.Model, cache: RaggedCache, questions: list[Question], *, form: str) -> list[kvzip.Answer]:
        # bytes of a random model are no text, so ids are compared
        found = kvzip.generate(model, cache, [q.query for q in questions], max_tokens=2)
        return [replace(answer, text=str(answer.token_ids)) for answer in found]

    monkeypatch.setitem(TASKS, "echo", Task("echo", examples, 0, "the model's own answers"))
    monkeypatch.setattr(run, "ask", ids)
    return "echo"


def test_shuffled_scores_score_worse(model: kvzip.Model, echo: str, tmp_path: Path) -> None:
    methods = {"kvzip": METHODS["kvzip"], "shuffled": Method("shuffled", shuffled, "pair", "none")}
    found = evaluate(
        model, tmp_path / "out.jsonl", tasks=[echo], methods=["full", *methods], ratios=(0.7,), available=methods
    )
    means = {row.group[0]: row.mean for row in summarize(found, "method")}
    assert means["full"] == 1.0
    assert means["kvzip"] > 0.8 > 0.5 > means["shuffled"]


@pytest.mark.slow
def test_shuffled_scores_score_worse_with_real_weights(tmp_path: Path) -> None:
    try:
        model = kvzip.load(small_models.model_dir("smollm2-135m-instruct"), dtype=torch.float32)
    except small_models.Unavailable as missing:
        pytest.skip(f"left out, the model cannot be had here: {missing}")
    essay = [{"name": "x", "context": " ".join(f"Remark {i} of the report is of no interest." for i in range(400))}]
    (tmp_path / "pg_essays.jsonl").write_text(json.dumps(essay[0]) + "\n", encoding="utf-8")
    methods = {"kvzip": METHODS["kvzip"], "shuffled": Method("shuffled", shuffled, "pair", "none")}
    found = evaluate(
        model,
        tmp_path / "out.jsonl",
        tasks=["needles@600"],
        methods=["full", *methods],
        ratios=(0.3,),
        available=methods,
        form="cloze",
        count=1,
        questions=11,
        max_tokens=12,
        data=str(tmp_path),
    )
    means = {row.group[0]: row.mean for row in summarize(found, "method")}
    assert means["full"] >= 3 / 11
    assert means["kvzip"] >= means["shuffled"] + 2 / 11
