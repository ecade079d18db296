"""The evaluation whose results are published: each model's tasks by each method, in several processes.

    python benchmarks/evaluation.py MODEL_DIR [MODEL_DIR ...] --data DATA --work WORK [--workers 6] [--limit 560]
    python benchmarks/evaluation.py MODEL_DIR --study ...    # instead, other chunk lengths and an oracle: `studies.py`
    python benchmarks/evaluation.py MODEL_DIR --scoring ...  # instead, ways of scoring; --bits: bits and whole heads
    python benchmarks/evaluation.py MODEL_DIR --refit ...    # instead, fitted pairs in the bytes of pairs that are not
    python benchmarks/evaluation.py MODEL_DIR --fewer ...    # instead, as many pairs in fewer bits
    python benchmarks/evaluation.py MODEL_DIR --bytes ...    # instead, parts of the full cache's bytes
    python benchmarks/evaluation.py --render      # plots and tables of docs/evals.md, scoring.md, concepts.md

`plans.py` says what is asked. Processes take the GPUs in turn: six for each. One work is one task by one method; its
answers go to a file of its own under WORK. A process that is done with one takes the next. Finished work is not
repeated: the same command goes on after a time limit (exit code 75) or a kill, also on another machine that WORK was
copied to. When all work of a model is done, its lines are added to a file of `benchmarks/results/`, each once. For one
task and method use `kvzip eval run`.
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

from benchmarks import quality
from benchmarks.harness import DOCS, RESULTS, take_place, write_between
from benchmarks.plans import ALL, FILES, KNOWN, PLANS, Asked, Plan, tells_apart
from kvzip.cli.evaluate import UNFINISHED
from kvzip.evals.plan import FULL
from kvzip.evals.results import append, content_of, group, mend, read
from kvzip.evals.run import run_eval

DRAWN = {
    "refit": {"base": "refit+fifth", "across": "fraction of the full cache's bytes (within 1%)"},
    "bytes": {
        "base": "refit, 4 bits",
        "shown": ("refit", "kvzip-chunk", "expected-attention", "snapkv, shared", "h2o"),
        "across": "fraction of the full cache's bytes",
    },
}  # if not as kvzip


@dataclass(frozen=True)
class Work:
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
        ratios = f".{self.ratios[0]:g}" if self.kind == "bits" else ""  # two plans share a method
        return f"{self.model.name}.{asked.task}.{asked.form}.{sizes}.{self.method}{ratios}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, help=f"directories named {', '.join(PLANS)}")
    parser.add_argument("--data", help="directory of JSONL files")
    parser.add_argument("--work", type=Path, default=Path(".eval"), help="directory of the answers until all are there")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the results")
    for kind in ("study", "scoring", "bits", "refit", "fewer", "bytes"):
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
    planned = [
        work
        for model in options.models
        for plan in ALL[kind][model.name]
        for work in work_of(model, plan, kind)
        if (not options.tasks or work.asked.task in options.tasks)
        and (not options.methods or work.method in options.methods)
    ]
    waiting = [work for work in planned if not (options.work / f"{work.name}.done").exists()]
    failed = work_off(waiting, options.work, options.workers, options.data, stop, options.commit)
    done = [work for work in planned if (options.work / f"{work.name}.done").exists()]
    print(f"{len(done)} of {len(planned)} are done", flush=True)
    for model in options.models:
        own = [work for work in planned if work.model == model]
        if set(own) <= set(done):
            collect(
                [options.work / f"{work.name}.jsonl" for work in own], options.results / FILES[kind].format(model.name)
            )
    return failed or (0 if len(done) == len(planned) else UNFINISHED)


def work_of(model: Path, plan: Plan, kind: str = "eval") -> list[Work]:
    """Every task by every method, the methods of a task one after the other."""
    return [
        Work(model, asked, method, (1.0,) if method == FULL else plan.ratios, kind)
        for asked in plan.tasks
        for method in plan.methods
    ]


def work_off(
    waiting: Sequence[Work], directory: Path, workers: int, data: str | None, stop: float, commit: str | None
) -> int:
    """Does the work in `workers` processes until all are done or it is time to stop; returns how many failed."""
    context = multiprocessing.get_context("spawn")
    taken, said = context.Value("i", 0), context.Queue()
    arguments = (list(waiting), taken, said, directory, data, stop - time.monotonic(), commit)
    workers = min(workers, len(waiting))
    processes = [context.Process(target=worker, args=((n, workers), *arguments)) for n in range(workers)]
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
        left = f"{passed / ended * (len(waiting) - ended) / 60:.1f} min left" if ended else ""
        print(f"{passed:5.0f} s  {name}: {outcome}, {ended} of {len(waiting)}, {left}", flush=True)
    return failed + sum(process.exitcode != 0 for process in processes)


def worker(
    place: tuple[int, int],
    waiting: list[Work],
    taken: Any,
    said: Any,
    directory: Path,
    data: str | None,
    seconds: float,
    commit: str | None,
) -> None:
    """Does one work after the other until none is left or time is up; loads a model only when it changes.

    Args:
        place: which worker it is, of how many.
        taken: a counter, shared by all workers, of the work that was begun.
        said: a queue for the name and the outcome of each work.
    """
    import kvzip

    take_place(*place)
    logging.getLogger("kvzip").setLevel(logging.WARNING)
    stop = time.monotonic() + seconds
    source, model = None, None
    while time.monotonic() < stop:
        with taken.get_lock():
            number = taken.value
            taken.value += 1
        if number >= len(waiting):
            return
        work = waiting[number]
        try:
            if source != work.model:
                model = None
                source, model = work.model, kvzip.load(work.model)
            assert model is not None
            asked = work.asked
            done = run_eval(
                model,
                tasks=[asked.task],
                out=directory / f"{work.name}.jsonl",
                methods=[work.method],
                ratios=work.ratios,
                form=asked.form,
                count=asked.count,
                questions=asked.questions,
                data=data,
                max_tokens=asked.max_tokens,
                available=KNOWN[work.kind],
                limit_s=stop - time.monotonic(),
                commit=commit,
            )
            if done:
                (directory / f"{work.name}.done").touch()
            said.put((work.name, "done" if done else "stopped"))
        except Exception:
            traceback.print_exc()
            said.put((work.name, "failed"))


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
    """Returns what two lines share if the second repeats the first, as two answers by a method at a ratio do."""
    if line["kind"] == "answer":
        return line["question"], line["method"], line["ratio"]
    return line["kind"], line["run"] if line["kind"] == "run" else line["id"]


def render(results: Path, docs: Path) -> None:
    """Writes plots of the models asked at several ratios, and tables: `docs/evals*`, of fits, bits, bytes likewise."""
    from kvzip.evals.plots import figures
    from kvzip.evals.report import means, overview

    written = {"eval": ("evals", "evals"), "study": ("evals", ""), "refit": ("refitting",) * 2}
    written |= {"fewer": ("bits", ""), "bytes": ("bytes", "bytes")}
    for kind, (page, stem) in written.items():
        tables = []
        answers = read(*sorted(results.glob(f"{kind}-*.jsonl.gz")))
        answers = [answer for answer in answers if tells_apart(answer.question["task"])]
        for (model,), own in group(answers, "model").items():
            title = f"{model}:" if kind == "study" else f"### {model}"
            across = "of the full cache's bytes" if kind == "bytes" else ""
            whole = f"{means(own, across='of the bytes')}\n\n" if kind == "bytes" else ""
            tables.append(f"{title}\n\n{whole}{deeper(overview(own, across=across))}")
            if stem and (kind == "bytes" or len(PLANS[model].ratios) > 1):
                for name, figure in figures(own, model, **DRAWN.get(kind, {})).items():
                    own_stem = f"{stem}-{model}" if kind == "bytes" else stem
                    (docs / f"{own_stem}-{name}.png").write_bytes(figure)
        if tables or kind in ("eval", "study"):
            write_between(docs / f"{page}.md", kind, "\n\n".join(tables))


def deeper(tables: str) -> str:
    return tables.replace("### ", "#### ")


if __name__ == "__main__":
    sys.exit(main())
