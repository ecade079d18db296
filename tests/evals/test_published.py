"""The published evaluation: its plans, its processes, and that the results in the repository are what they say."""

import json
import multiprocessing
import queue
import shutil
import sys
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch

import kvzip
import random_model
from kvzip.evals.asking import agreement
from kvzip.evals.plan import check_names
from kvzip.evals.results import group, read

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import evaluation, quality, studies  # noqa: E402
from benchmarks.evaluation import Work, collect, work_of  # noqa: E402
from benchmarks.harness import between  # noqa: E402
from benchmarks.plans import PLANS, Asked, Plan  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
TASK = Asked("math_find@300", "chat", 1, 3, 4)


@pytest.mark.parametrize("kind", evaluation.ALL)
def test_plans_name_what_there_is_and_all_work_has_its_own_file(kind: str) -> None:
    for model, plans in evaluation.ALL[kind].items():
        for plan in plans:
            for asked in plan.tasks:
                known = evaluation.KNOWN[kind]
                assert check_names([asked.task], plan.methods, plan.ratios, asked.form, known) == [asked.task]
        names = [work.name for plan in plans for work in work_of(Path(model), plan, kind)]
        assert len(set(names)) == len(names) == sum(len(plan.tasks) * len(plan.methods) for plan in plans)


@pytest.mark.parametrize("name", PLANS)
def test_the_results_hold_every_answer_of_the_plan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # types of 59,000 lines take 20 s to check
    plan = PLANS[name]
    answers = group(read(RESULTS / f"eval-{name}.jsonl.gz"), "task", "method", "ratio")
    for asked in plan.tasks:
        questions = {answer.question["id"] for answer in answers[asked.task, "full", 1.0]}
        assert len(questions) >= (100 if "qwen" in name else 48)
        for method in plan.methods:
            for ratio in (1.0,) if method == "full" else plan.ratios:
                own = answers[asked.task, method, ratio]
                assert {answer.question["id"] for answer in own} == questions
                if method not in ("full", "kvzip-heads"):  # whole heads are kept
                    assert all(abs(answer.kept - ratio) < 2e-3 for answer in own)


def worker(waiting: list[Work], directory: Path, seconds: float = 600) -> list[tuple[str, str]]:
    """What a worker says of the work that it takes."""
    said: Any = queue.Queue()
    evaluation.worker((0, 1), waiting, multiprocessing.Value("i", 0), said, directory, None, seconds, "c0ffee")
    return [said.get() for _ in range(said.qsize())]


def test_a_worker_takes_one_work_after_the_other_and_says_which_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    model = random_model.make(random_model.config())
    monkeypatch.setattr(kvzip, "load", lambda source: loaded.append(source) or model)
    good, bad = Plan(("full", "random"), (0.3, 0.5), (TASK,)), Plan(("full",), (), (Asked("squad", "chat", 1, 1, 4),))
    planned = work_of(Path("m"), bad) + work_of(Path("m"), good)
    assert [outcome for _, outcome in worker(planned, tmp_path)] == ["failed", "done", "done"]
    assert loaded == [Path("m")]
    assert {path.name for path in tmp_path.glob("*.done")} == {f"{work.name}.done" for work in planned[1:]}
    assert len(read(*tmp_path.glob("*.jsonl"))) == 3 * (1 + 2)
    assert worker(planned[1:], tmp_path, seconds=0) == []

    out = tmp_path / "new" / "eval-m.jsonl"
    files = [tmp_path / f"{work.name}.jsonl" for work in planned[1:]]
    for _ in range(2):
        collect(files, out)
        lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        assert [sum(line["kind"] == kind for line in lines) for kind in ("run", "question", "answer")] == [2, 3, 9]


def test_tables_go_between_their_marks_and_nowhere_else() -> None:
    assert between("a <x> old </x> b", "<x>", "</x>", "new") == "a <x>\nnew\n</x> b"
    with pytest.raises(ValueError, match="expected <x> and </x>"):
        between("a <x> old", "<x>", "</x>", "new")


def test_lookups_are_the_largest_weights_of_each_lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model.make(random_model.config())
    keys = [f"{n:08x}-1111-2222-3333-{n:012x}" for n in range(6)]
    text = ",\n ".join(f'"{a}": "{b}"' for a, b in zip(keys[::2], keys[1::2], strict=True))
    cache = kvzip.prefill(model, "{" + text + "}")

    def scored() -> torch.Tensor:
        scores = studies.lookups(model, cache).scores
        assert scores is not None
        return scores.values

    whole, (_, how) = scored(), next(iter(studies.ASKED.items()))
    alone = []
    for key in keys[::2]:
        monkeypatch.setattr(studies, "ASKED", {f'"({key})": "({studies.UUID})"': how})
        alone.append(scored())
    assert torch.equal(torch.stack(alone).amax(0), whole)
    assert not torch.equal(alone[0], alone[1])
    with pytest.raises(ValueError, match="expected a context with pairs of UUIDs"):
        studies.lookups(model, kvzip.prefill(model, "nothing"))


@pytest.mark.slow
def test_tables_of_scopes_and_bits_are_made_of_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    monkeypatch.setattr(quality, "plot", lambda tables, path: None)
    for page in ("scoring.md", "concepts.md"):
        shutil.copy(ROOT / "docs" / page, tmp_path)
    quality.render(RESULTS, tmp_path)
    for page in ("scoring.md", "concepts.md"):
        assert (tmp_path / page).read_text(encoding="utf-8") == (ROOT / "docs" / page).read_text(encoding="utf-8")


def test_methods_of_studies_keep_what_they_are_asked_to() -> None:
    model = random_model.make(random_model.config())
    cache = kvzip.prefill(model, "jade acid beach hide fig " * 8)
    known = studies.SCORING | studies.STREAMS | studies.BITS
    kept = {}
    for name, method in known.items():
        small = method.compressed(model, method.score(model, cache), 0.5)
        assert small.kept == int(0.5 * small.total) and small.total == cache.total, name
        kept[name] = small
    scores = kvzip.score(model, cache, scope="context").scores
    assert scores is not None
    agreed = {name: agreement(small, scores.values, 0.5) for name, small in kept.items()}
    assert agreed["context"] == 1.0 > agreed["random"]
    assert kvzip.nbytes(kept["16 bits"]) > kvzip.nbytes(kept["8 bits"]) > kvzip.nbytes(kept["4 bits"])
    asked = kvzip.prefill(model, "jade acid beach", instruction="Read this.")
    with pytest.raises(ValueError, match="expected a task without an instruction"):
        studies.STREAMS["stream-running"].compressed(model, asked, 0.5)


def test_fits_take_no_more_bytes_than_the_pairs_beside_them() -> None:
    """And nearly as many; the floor gives each head its part."""
    model = random_model.make(random_model.config())
    dense = kvzip.prefill(model, "Happy families are all alike; every unhappy family is unhappy in its own way. " * 6)
    for ratio in (0.1, 0.3, 1.0):
        made = {name: how.compressed(model, how.score(model, dense), ratio) for name, how in studies.REFITS.items()}
        for name, cache in made.items():
            beside = kvzip.nbytes(made["select@kvzip+" if "@" in name else "select"])
            assert 0.98 * beside < kvzip.nbytes(cache) <= beside
            if name.startswith("refit+fifth"):
                least = int(studies.FLOORS["+fifth"] * cache.kept / cache.total * (dense.length - dense.start))
                assert min(int(layer.offsets.diff().min()) for layer in cache.context) >= dense.start + least


def test_methods_by_bytes_keep_what_fits() -> None:
    model = random_model.make(random_model.config())
    dense = kvzip.prefill(model, "Happy families are all alike; every unhappy family is unhappy in its own way. " * 6)
    for name, method in studies.BYTES.items():
        scored = method.score(model, dense)
        for ratio in (0.2, 0.5):
            made = method.compressed(model, scored, ratio)
            size = kvzip.nbytes(made) / kvzip.nbytes(dense)
            assert size <= ratio, name
            assert size > 0.9 * ratio or made.kept == made.total or name == "whole heads", (name, ratio, size)


@pytest.mark.slow
def test_the_page_is_made_of_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    pages = ("evals.md", "refitting.md", "bits.md", "bytes.md")
    for page in pages:
        shutil.copy(ROOT / "docs" / page, tmp_path)
    evaluation.render(RESULTS, tmp_path)
    for page in pages:
        assert (tmp_path / page).read_text(encoding="utf-8") == (ROOT / "docs" / page).read_text(encoding="utf-8")
