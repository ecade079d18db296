"""Results as a file of JSON lines, which stays usable after a run was killed, and their summary.

There are three kinds of lines: a "run" says what made the lines that name it, a "question" what was asked, an "answer"
is one answer to it. Lines are only ever added. The id of a question is a digest of everything that makes it. Files
whose names end with .gz are read too; adding to one writes it anew.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..files.writing import whole_file
from .plan import FULL

RESAMPLES = 2000


@dataclass(frozen=True)
class Answered:
    """One answer, with what its run and its question say about it."""

    run: Mapping[str, Any]
    question: Mapping[str, Any]
    method: str
    ratio: float
    kept: float
    score: float
    prediction: str
    measured: Mapping[str, float] = field(default_factory=dict)
    """Of reference answers: "loglik", "bytes" of the cache and its "agreement", see `run.answer_lines`."""

    @property
    def key(self) -> tuple[Any, ...]:
        """Identifies the answer: no two answers of a file have the same key."""
        return (self.run["fingerprint"], self.run["form"], self.question["id"], self.method, self.ratio)


@dataclass(frozen=True)
class Summary:
    """The mean score of a group of answers, with its 95% bootstrap interval, and what the group is made of."""

    group: tuple[Any, ...]
    mean: float
    low: float
    high: float
    questions: int
    contexts: int


def append(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Adds lines to a file in one write; a .gz file is written again whole, the same bytes for the same lines."""
    text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
    if path.suffix != ".gz":
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
        return
    before = content_of(path) if path.exists() else b""
    with whole_file(path) as scratch:
        scratch.write_bytes(gzip.compress(before + text.encode(), mtime=0))


def content_of(path: Path) -> bytes:
    """Returns what a file holds, decompressed if its name ends with .gz. Raises ValueError for one that is damaged."""
    content = path.read_bytes()
    if path.suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(
            f"expected a gzip file, got {path} ({error}): restore it, or drop .gz from its name"
        ) from error


def check_growing(path: Path) -> None:
    """Raises ValueError for a file to which a run cannot add line after line."""
    if path.suffix == ".gz":
        raise ValueError(
            f"expected a file that answers can be added to, got {path}: name it {path.stem}, gzip it later"
        )


def mend(path: Path) -> int:
    """Cuts off what follows the last whole line, which a killed run leaves; returns the number of bytes cut."""
    if not path.exists() or path.suffix == ".gz":
        return 0
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return len(content) - len(whole)


def places(path: Path) -> dict[tuple[Any, ...], str]:
    """Returns the ids of the questions in a file by their places, empty where there is none."""
    return _read(path)[0] if path.exists() else {}


def check_place(known: dict[tuple[Any, ...], str], run: Mapping[str, Any], question: Mapping[str, Any]) -> None:
    """Adds a question's place to the known ones.

    A place is a question's number within an example of a task, for a model and the settings of its run.

    Raises: ValueError if another question is known in that place.
    """
    made = [run[key] for key in ("fingerprint", "seed", "count", "questions", "max_tokens")]
    place = (*made, question["task"], question["example"], question["number"])
    if known.setdefault(place, question["id"]) != question["id"]:
        raise ValueError(
            f"expected question {question['number']} of example {question['example']} of {question['task']} to be "
            f"{known[place]} as before, got {question['id']}: the task or its data has changed, start a new file"
        )


def read(*paths: Path) -> list[Answered]:
    """Returns the answers in files, in order; a torn last line is ignored.

    Raises: ValueError for a line that is no JSON object of a known kind, that names a run or question which is not
    there, or an answer that is there twice.
    """
    found: dict[tuple[Any, ...], Answered] = {}
    for answer in (answer for path in paths for answer in _read(path)[1]):
        if found.setdefault(answer.key, answer) is not answer:
            raise ValueError(
                f"expected one answer of {answer.method} at {answer.ratio} to question {answer.question['id']}, got "
                "two: the same results are given twice"
            )
    return list(found.values())


def group(answers: Iterable[Answered], *keys: str) -> dict[tuple[Any, ...], list[Answered]]:
    """Returns the answers by their values of keys, which are fields of an answer, its question or its run.

    "label" is `label`. A key that is none of these is looked up in the facts of the question; if it is not there
    either, its value is None.
    """
    groups: dict[tuple[Any, ...], list[Answered]] = {}
    for answer in answers:
        known = {**answer.question["facts"], **answer.run, **answer.question, "label": label(answer)}
        known |= {"method": answer.method, "ratio": answer.ratio, "kept": answer.kept}
        groups.setdefault(tuple(known.get(key) for key in keys), []).append(answer)
    return groups


def label(answer: Answered) -> str:
    """Returns the name of the task, with the kind of the question if the task mixes several kinds."""
    part = answer.question["facts"].get("subtask")
    return answer.question["task"] + (f" ({part})" if part else "")


def by_measure(answers: Iterable[Answered], name: str) -> list[Answered]:
    """Returns the answers of which `name` was measured, that number in place of their scores."""
    return [replace(answer, score=answer.measured[name]) for answer in answers if name in answer.measured]


def summarize(answers: Iterable[Answered], *keys: str, seed: int = 0, contexts: bool = True) -> list[Summary]:
    """Returns the mean over contexts of their mean scores, for each group of answers by `keys`, with a 95% interval.

    The interval is a percentile bootstrap over contexts, as answers about one context are not independent. With
    `contexts` False, or where there is one context only, mean and bootstrap are over questions, which says nothing
    about other contexts. Sources: Efron and Tibshirani 1993, chapter 13; the authors of KVzip, arXiv 2505.23416,
    average over contexts too.
    """
    found = []
    for own, members in group(answers, *keys).items():
        by_context: dict[tuple[str, str], list[float]] = {}
        for answer in members:
            by_context.setdefault(_place(answer), []).append(answer.score)
        if contexts and len(by_context) > 1:
            units = np.array([sum(scores) / len(scores) for scores in by_context.values()])
        else:
            units = np.array([answer.score for answer in members])
        picks = np.random.default_rng(seed).integers(len(units), size=(RESAMPLES, len(units)))
        low, high = np.quantile(units[picks].mean(1), [0.025, 0.975])
        found.append(Summary(own, float(units.mean()), float(low), float(high), len(members), len(by_context)))
    return found


def relative(answers: Sequence[Answered]) -> dict[tuple[str, float], float]:
    """Returns each method's mean over tasks of its score divided by the full cache's, by (method, ratio).

    Tasks that the full cache scores 0 in, and methods and ratios that were not run on all the others, are left out.
    """
    means = {row.group: row.mean for row in summarize(answers, "label", "method", "ratio")}
    full = {task: mean for (task, method, _), mean in means.items() if method == FULL and mean > 0}
    found: dict[tuple[str, float], list[float]] = {}
    for (task, method, ratio), mean in means.items():
        if task in full:
            found.setdefault((method, ratio), []).append(mean / full[task])
    return {key: sum(values) / len(values) for key, values in found.items() if len(values) == len(full)}


def relative_intervals(answers: Sequence[Answered], *, seed: int = 0) -> dict[tuple[str, float], tuple[float, float]]:
    """Returns a 95% interval of each mean that `relative` returns.

    A percentile bootstrap: the contexts of each task that both a method and the full cache have are drawn anew, or its
    questions where it has one context only. Tasks are fixed: how much others would differ is not in it.
    """
    kept, generator = relative(answers), np.random.default_rng(seed)
    drawn: dict[tuple[str, float], list[np.ndarray]] = {key: [] for key in kept}
    for own in group(answers, "label").values():
        lone = len({_place(answer) for answer in own}) == 1
        units: dict[tuple[str, float], dict[Any, list[float]]] = {}
        for answer in own:
            unit = answer.question["id"] if lone else _place(answer)
            units.setdefault((answer.method, answer.ratio), {}).setdefault(unit, []).append(answer.score)
        scores = {key: {unit: sum(x) / len(x) for unit, x in own.items()} for key, own in units.items() if key in kept}
        full = scores.get((FULL, 1.0), {})
        if not any(full.values()):
            continue
        picks = generator.integers(len(full), size=(RESAMPLES, len(full)))
        for key, by_unit in scores.items():
            shared = [unit for unit in full if unit in by_unit]  # fewer where a run was stopped
            own = (
                picks
                if len(shared) == len(full)
                else generator.integers(max(1, len(shared)), size=(RESAMPLES, len(shared)))
            )
            mean, whole = (np.array([given[unit] for unit in shared])[own].sum(1) for given in (by_unit, full))
            drawn[key].append(np.divide(mean, whole, out=np.full(RESAMPLES, np.nan), where=whole > 0))
    return {key: _interval(np.array(parts)) for key, parts in drawn.items()}


def _interval(drawn: np.ndarray) -> tuple[float, float]:
    """The 95% interval of the mean over tasks (rows); a draw in which the full cache has 0 in all says nothing."""
    known = ~np.isnan(drawn)
    means = np.where(known, drawn, 0).sum(0)[known.any(0)] / known.sum(0)[known.any(0)]
    low, high = np.quantile(means, [0.025, 0.975]) if len(means) else (np.nan, np.nan)
    return float(low), float(high)


def _place(answer: Answered) -> tuple[str, str]:
    """Names an answer's context."""
    return answer.run["fingerprint"], answer.question["context"]


def differences(
    answers: Sequence[Answered],
    *,
    method: str,
    base: str,
    keys: Sequence[str] = ("label", "ratio"),
    seed: int = 0,
    contexts: bool = True,
) -> list[Summary]:
    """Returns the mean of `method`'s score minus `base`'s to the same question at the same ratio, as `summarize` does.

    Answers of FULL, which has no ratio, are compared with every ratio.
    """

    def by_question(name: str) -> dict[tuple[Any, ...], Answered]:
        return {(*a.key[:3], a.ratio if name != FULL else None): a for a in answers if a.method == name}

    bases = by_question(base)
    paired = []
    for key, answer in by_question(method).items():
        other = bases.get((*key[:3], None if base == FULL else key[3]))
        if other is not None:
            paired.append(replace(answer, score=answer.score - other.score))
    return summarize(paired, *keys, seed=seed, contexts=contexts)


def _read(path: Path) -> tuple[dict[tuple[Any, ...], str], list[Answered]]:
    runs: dict[str, Any] = {}
    questions: dict[str, Any] = {}
    known: dict[tuple[Any, ...], str] = {}
    found: list[Answered] = []
    content = content_of(path)
    for number, text in enumerate(content[: content.rfind(b"\n") + 1].split(b"\n")[:-1], start=1):
        try:
            line = json.loads(text)
            if line["kind"] == "run":
                runs[line["run"]] = line
            elif line["kind"] == "question":
                questions[line["id"]] = line
                check_place(known, runs[line["run"]], line)
            elif line["kind"] == "answer":
                answer = Answered(
                    run=runs[line["run"]],
                    question=questions[line["question"]],
                    method=line["method"],
                    ratio=float(line["ratio"]),
                    kept=float(line["kept"]),
                    score=float(line["score"]),
                    prediction=line.get("prediction", ""),
                    measured={name: float(line[name]) for name in ("loglik", "bytes", "agreement") if name in line},
                )
                found.append(answer)
            else:
                raise KeyError(line["kind"])
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"expected a run, question or answer in line {number} of {path}, got {text[:80]!r} ({error!r}): "
                "restore the file, or start a new one"
            ) from error
    return known, found
