"""The evaluation whose results are published: each model's tasks by each method, several processes on one GPU.

    python benchmarks/evaluation.py MODEL_DIR [MODEL_DIR ...] --data DATA --work WORK [--workers 6] [--limit 560]
    python benchmarks/evaluation.py MODEL_DIR --study ...    # instead, other chunk lengths and an oracle: `studies.py`
    python benchmarks/evaluation.py MODEL_DIR --scoring ...  # instead, ways of scoring; --bits: bits and whole heads
    python benchmarks/evaluation.py --render      # plots and tables of docs/evals.md, scoring.md, concepts.md

A piece of work is one task by one method, answered into a file of its own under WORK; processes take the next piece
when they are done with one. What is there is not done again, so the same command goes on after a limit (exit code 75)
or a kill, also on another machine that WORK was carried to. Once a model's pieces are all there, their lines are added
to a file of `benchmarks/results/`, each once. One task and method alone: `kvzip eval run`.
"""

import argparse
import json
import logging
import multiprocessing
import queue
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import quality, studies
from benchmarks.harness import DOCS, RESULTS, write_between
from kvzip.cli.evaluate import UNFINISHED
from kvzip.evals.methods import METHODS
from kvzip.evals.plan import FULL
from kvzip.evals.results import append, content_of, group, mend, read
from kvzip.evals.run import run_eval

RATIOS = (0.1, 0.2, 0.3, 0.5, 0.7)


@dataclass(frozen=True)
class Asked:
    """A task and how it is asked: the form, contexts, questions about each, tokens of an answer."""

    task: str
    form: str
    count: int
    questions: int
    max_tokens: int


@dataclass(frozen=True)
class Plan:
    """What is asked of one model."""

    methods: tuple[str, ...]
    ratios: tuple[float, ...]
    tasks: tuple[Asked, ...]


@dataclass(frozen=True)
class Piece:
    """One task of one model by one method."""

    model: Path
    asked: Asked
    method: str
    ratios: tuple[float, ...]
    kind: str = "eval"

    @property
    def name(self) -> str:
        asked = self.asked
        sizes = f"{asked.count}x{asked.questions}x{asked.max_tokens}"
        ratios = f".{self.ratios[0]:g}" if self.kind == "bits" else ""  # one method at 0.6 is in a plan of its own
        return f"{self.model.name}.{asked.task}.{asked.form}.{sizes}.{self.method}{ratios}"


FEW = (FULL, "kvzip", "kvzip-chunk", "snapkv", "random")
TOPIC = Asked("topic", "chat", 20, 5, 32)
NEEDLES = Asked("needles", "cloze", 4, 11, 32)
UUIDS = (  # 128 tokens, as a Qwen repeats the UUID that it is asked for first
    Asked("kv@4096", "chat", 10, 10, 128),
    Asked("ruler_niah_multikey_3@4096", "chat", 10, 10, 128),
)
TEXTS = (Asked("ruler_qa_1@4096", "chat", 10, 10, 32), Asked("squad@2000", "chat", 10, 12, 48))
BASE_NEEDLES = Asked("needles@2000", "cloze", 6, 11, 32)
BASE_KEYS = Asked("ruler_niah_multikey_1@2000", "cloze", 12, 20, 64)
BASE_KV = Asked("kv@2000", "cloze", 12, 20, 64)
BASE_SQUAD = Asked("squad@1000", "cloze", 10, 12, 48)
BASE = (Asked("needles@700", "cloze", 6, 11, 32), BASE_NEEDLES, BASE_KEYS, BASE_SQUAD)

PLANS = {
    "qwen2.5-coder-1.5b-instruct": Plan(
        (FULL, *METHODS),
        RATIOS,
        (
            TOPIC,
            Asked("many_shot@9000", "chat", 6, 20, 64),
            NEEDLES,
            *UUIDS,
            Asked("ruler_niah_multikey_2@4096", "chat", 10, 10, 64),
            Asked("multihop@4096", "chat", 10, 10, 64),
            *TEXTS,
        ),
    ),
    "qwen2.5-coder-0.5b-instruct": Plan(
        FEW,
        (0.3,),
        (
            TOPIC,
            Asked("many_shot@9000", "chat", 5, 20, 64),
            NEEDLES,
            *UUIDS,
            Asked("ruler_niah_multikey_2@4096", "chat", 5, 20, 64),
            Asked("multihop@4096", "chat", 5, 20, 64),
            *TEXTS,
        ),
    ),
    "gemma-3-270m": Plan(
        FEW,
        (0.3,),
        (
            Asked("topic", "cloze", 20, 5, 32),
            Asked("many_shot@9000", "cloze", 6, 20, 32),
            BASE_KV,
            Asked("multihop@2000", "cloze", 12, 20, 64),
            *BASE,
        ),
    ),
    "smollm2-135m-instruct": Plan(
        FEW,
        (0.3,),
        (
            Asked("topic@5500", "cloze", 20, 5, 32),
            Asked("many_shot@5500", "cloze", 6, 20, 32),
            Asked("kv@1000", "cloze", 12, 20, 64),
            Asked("multihop@1000", "cloze", 12, 20, 64),
            *BASE,
        ),
    ),
}
"""By the name of a model's directory. The tasks with the longest contexts come first: they take longest."""
CHUNKS = ("chunk-500", "chunk-125", "context-125")
OTHERS = (FULL, "kvzip-chunk", "kvzip+", "snapkv", "adakv", "expected-attention", "random", *CHUNKS)
STUDIES = {
    "qwen2.5-coder-1.5b-instruct": (
        Plan(tuple(studies.STUDY), (0.1, 0.2, 0.3, 0.5), UUIDS),
        Plan(CHUNKS, (0.1, 0.2, 0.3, 0.5), (NEEDLES, *TEXTS)),
    ),
    "gemma-3-270m": (
        Plan((*OTHERS, "lookups"), (0.3, 0.5, 0.7, 0.9), (BASE_KV,)),
        Plan(OTHERS, (0.3, 0.5, 0.7, 0.9), (BASE_NEEDLES, BASE_SQUAD, BASE_KEYS)),
    ),
}
"""What is asked besides to find out why something is lost."""


def scoring_plans(form: str, tokens: int, count: int, questions: int = 100, methods: Sequence[str] = ()) -> list[Plan]:
    """Likelihoods at all ratios, of streams at a few, and answers at two."""
    gold, short = (Asked(f"{task}@{tokens}", form, count, questions, 16) for task in ("gold", "short"))
    methods, streams = tuple(methods or studies.SCORING), tuple(studies.STREAMS)
    tenths = tuple(n / 10 for n in range(1, 10))
    return [
        Plan((FULL, *methods), tenths, (gold,)),
        Plan(streams, (0.1, 0.2, 0.3, 0.5), (gold,)),
        Plan((FULL, *methods, *streams), (0.1, 0.3), (short,)),
    ]


def bits_plans(form: str, tokens: int, count: int) -> list[Plan]:
    """Likelihoods and answers of pairs in 16, 8 and 4 bits, and of whole heads."""
    asked = tuple(Asked(f"{task}@{tokens}", form, count, 50, 16) for task in ("gold", "short"))
    ratios = (1.0, 0.5, 0.3)
    bits = Plan((FULL, *studies.BITS), ratios, asked)
    return [bits, Plan(("16 bits", *studies.HEADS), (0.6,), asked)]


LONG = ("context", "chunk", "chunk:512", "chunk:8192")
SCORINGS = {
    **{
        f"qwen2.5-coder-{size}-instruct": (
            *scoring_plans("chat", 5_000, count),
            *scoring_plans("chat", 20_000, 1, 200, LONG),
        )
        for size, count in (("1.5b", 2), ("0.5b", 1))
    },
    "gemma-3-270m": scoring_plans("cloze", 5_000, 2),
    "smollm2-135m-instruct": scoring_plans("cloze", 5_000, 3),
}
BITS = {
    **{f"qwen2.5-coder-{size}-instruct": bits_plans("chat", 4_000, 3) for size in ("1.5b", "0.5b")},
    "gemma-3-270m": bits_plans("cloze", 2_000, 4),
    "smollm2-135m-instruct": bits_plans("cloze", 1_500, 4),
}
ALL = {"eval": {name: (plan,) for name, plan in PLANS.items()}, "study": STUDIES, "scoring": SCORINGS, "bits": BITS}
"""Plans by what is asked."""
KNOWN = {
    "eval": METHODS,
    "study": METHODS | studies.STUDY,
    "scoring": studies.SCORING | studies.STREAMS,
    "bits": studies.BITS | studies.HEADS,
}
"""And the methods that their names stand for."""
FILES = {
    "eval": "eval-{}.jsonl.gz",
    "study": "study-{}.jsonl.gz",
    "scoring": "scoring-quality.jsonl.gz",
    "bits": "quality-bits.jsonl.gz",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, help=f"directories named {', '.join(PLANS)}")
    parser.add_argument("--data", help="directory of JSONL files")
    parser.add_argument("--work", type=Path, default=Path(".eval"), help="directory of the pieces")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the results")
    for kind in ("study", "scoring", "bits"):
        parser.add_argument(f"--{kind}", dest="kind", action="store_const", const=kind, help="these methods instead")
    parser.add_argument("--tasks", nargs="+", help="only these, as named in the plan")
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--workers", type=int, default=1, help="processes, each with the model")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which nothing new is begun")
    parser.add_argument("--commit", help="commit to write down, where git cannot be asked")
    parser.add_argument("--render", action="store_true", help="write tables and plots of docs/ and stop")
    options = parser.parse_args()
    if options.render:
        render(options.results, DOCS)
        quality.render(options.results, DOCS)
        return 0
    kind = options.kind or "eval"
    for model in options.models:
        if model.name not in ALL[kind]:
            parser.error(f"expected directories named {', '.join(ALL[kind])}, got {model}")
    stop = time.monotonic() + options.limit
    options.work.mkdir(parents=True, exist_ok=True)
    pieces = [
        piece
        for model in options.models
        for plan in ALL[kind][model.name]
        for piece in pieces_of(model, plan, kind)
        if (not options.tasks or piece.asked.task in options.tasks)
        and (not options.methods or piece.method in options.methods)
    ]
    waiting = [piece for piece in pieces if not (options.work / f"{piece.name}.done").exists()]
    failed = work_off(waiting, options.work, options.workers, options.data, stop, options.commit)
    done = [piece for piece in pieces if (options.work / f"{piece.name}.done").exists()]
    print(f"{len(done)} of {len(pieces)} pieces are done", flush=True)
    for model in options.models:
        own = [piece for piece in pieces if piece.model == model]
        if set(own) <= set(done):
            collect([options.work / f"{p.name}.jsonl" for p in own], options.results / FILES[kind].format(model.name))
    return failed or (0 if len(done) == len(pieces) else UNFINISHED)


def pieces_of(model: Path, plan: Plan, kind: str = "eval") -> list[Piece]:
    """Every task by every method, the methods of a task one after the other."""
    return [
        Piece(model, asked, method, (1.0,) if method == FULL else plan.ratios, kind)
        for asked in plan.tasks
        for method in plan.methods
    ]


def work_off(
    pieces: Sequence[Piece], work: Path, workers: int, data: str | None, stop: float, commit: str | None
) -> int:
    """Answers pieces in `workers` processes until all are done or it is time to stop; returns how many failed."""
    context = multiprocessing.get_context("spawn")
    taken, said = context.Value("i", 0), context.Queue()
    arguments = (list(pieces), taken, said, work, data, stop - time.monotonic(), commit, 0.95 / workers)
    processes = [context.Process(target=worker, args=arguments) for _ in range(min(workers, len(pieces)))]
    for process in processes:
        process.start()
    begun, ended, failed = time.monotonic(), 0, 0
    while any(process.is_alive() for process in processes) or not said.empty():
        try:
            name, outcome = said.get(timeout=1)
        except queue.Empty:
            continue
        ended, failed = ended + (outcome == "done"), failed + (outcome == "failed")
        passed = time.monotonic() - begun
        left = f"{passed / ended * (len(pieces) - ended) / 60:.1f} min left" if ended else ""
        print(f"{passed:5.0f} s  {name}: {outcome}, {ended} of {len(pieces)}, {left}", flush=True)
    return failed + sum(process.exitcode != 0 for process in processes)


def worker(
    pieces: list[Piece],
    taken: Any,
    said: Any,
    work: Path,
    data: str | None,
    seconds: float,
    commit: str | None,
    share: float,
) -> None:
    """Takes pieces, of which `taken` are, until there are none or time is up; keeps a model while pieces are of it.

    `share` of the GPU's memory is its own.
    """
    import torch

    import kvzip

    if torch.cuda.is_available():  # who reaches the limit gives back what graphs of earlier caches held
        torch.cuda.set_per_process_memory_fraction(share)
    logging.getLogger("kvzip").setLevel(logging.WARNING)
    stop = time.monotonic() + seconds
    source, model = None, None
    while time.monotonic() < stop:
        with taken.get_lock():
            number = taken.value
            taken.value += 1
        if number >= len(pieces):
            return
        piece = pieces[number]
        try:
            if source != piece.model:
                model = None
                source, model = piece.model, kvzip.load(piece.model)
            assert model is not None
            asked = piece.asked
            done = run_eval(
                model,
                tasks=[asked.task],
                out=work / f"{piece.name}.jsonl",
                methods=[piece.method],
                ratios=piece.ratios,
                form=asked.form,
                count=asked.count,
                questions=asked.questions,
                data=data,
                max_tokens=asked.max_tokens,
                available=KNOWN[piece.kind],
                limit_s=stop - time.monotonic(),
                commit=commit,
            )
            if done:
                (work / f"{piece.name}.done").touch()
            said.put((piece.name, "done" if done else "stopped"))
        except Exception:
            traceback.print_exc()
            said.put((piece.name, "failed"))


def collect(files: Iterable[Path], out: Path) -> None:
    """Adds the lines of files to `out`: a run, a question and an answer once each, whichever files have it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    mend(out)
    seen = {identity(line) for line in lines_of(out)} if out.exists() else set()
    new = []
    for file in files:
        for line in lines_of(file):
            if identity(line) not in seen:
                seen.add(identity(line))
                new.append(line)
    append(out, new)
    print(f"{out}: {len(new)} new lines, {len(read(out))} answers", flush=True)


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in content_of(file).split(b"\n") if text]


def identity(line: dict[str, Any]) -> tuple[Any, ...]:
    """What makes a line another one: a second answer to a question by the same method at the same ratio is not."""
    if line["kind"] == "answer":
        return line["question"], line["method"], line["ratio"]
    return line["kind"], line["run"] if line["kind"] == "run" else line["id"]


def render(results: Path, docs: Path) -> None:
    """Writes the plots `docs/evals*.png` of the model with all methods, and the tables in `docs/evals.md`."""
    from kvzip.evals.report import figures, overview

    tables = []
    for (model,), own in group(read(*sorted(results.glob("eval-*.jsonl.gz"))), "model").items():
        tables.append(f"### {model}\n\n{deeper(overview(own))}")
        if len(PLANS[model].ratios) > 1:
            for name, figure in figures(own, model).items():
                (docs / f"evals-{name}.png").write_bytes(figure)
    studied = [
        f"{model}:\n\n{deeper(overview(own))}"
        for (model,), own in group(read(*sorted(results.glob("study-*.jsonl.gz"))), "model").items()
    ]
    for name, parts in (("eval", tables), ("study", studied)):
        write_between(docs / "evals.md", name, "\n\n".join(parts))


def deeper(tables: str) -> str:
    return tables.replace("### ", "#### ")


if __name__ == "__main__":
    sys.exit(main())
