"""`python -m kvzip.evals run | report | compare | tasks`: the evaluation from a command line, with the time left."""

import argparse
import logging
from pathlib import Path

import torch
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..models import load
from .compare import compare, render
from .methods import METHODS
from .report import write_report
from .run import FORMS, FULL, run_eval
from .tasks import GROUPS, TASKS


def main() -> int:
    """Runs the command; returns 0, or 75 if a time limit left work for the next run."""
    parser = argparse.ArgumentParser(prog="python -m kvzip.evals", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="answer the questions of tasks, by methods, at ratios")
    run.add_argument("--model", required=True, help="local Hugging Face directory, hub id or alias")
    run.add_argument("--task", nargs="+", required=True, metavar="NAME[@LENGTH]", help="see `tasks`")
    run.add_argument("--method", nargs="+", default=[FULL, "kvzip"], choices=[FULL, *METHODS])
    run.add_argument("--ratio", nargs="+", type=float, default=[0.1, 0.2, 0.3, 0.5, 0.7], help="fractions kept")
    run.add_argument("--out", type=Path, required=True, help="file of JSON lines; a run goes on where it stopped")
    run.add_argument("--form", choices=FORMS, help="default: chat where the model has a template, else cloze")
    run.add_argument("--count", type=int, default=10, help="contexts of a task (default 10)")
    run.add_argument("--questions", type=int, default=10, help="questions about a context (default 10)")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--data", help='directory of JSONL files, or "hub"')
    run.add_argument("--batch", type=int, default=32, help="questions answered at once (default 32)")
    run.add_argument("--max-tokens", type=int, help="tokens of an answer, if fewer than its task says")
    run.add_argument("--limit", type=float, metavar="SECONDS", help="begin no further batch after so long")
    run.add_argument("--commit", help="commit to write down, where git cannot be asked")
    run.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    run.add_argument("--max-length", type=int, help="overrides the model's own length")
    report = commands.add_parser("report", help="table, plots and a page from results")
    report.add_argument("results", nargs="+", type=Path)
    report.add_argument("--out", type=Path, required=True, help="directory for the report")
    one = commands.add_parser("compare", help="one document, full cache against compressed")
    one.add_argument("--model", required=True)
    one.add_argument("--document", type=Path, required=True, help="text file")
    one.add_argument("--question", nargs="+", required=True)
    one.add_argument("--ratio", type=float, default=0.3)
    one.add_argument("--method", default="kvzip", choices=list(METHODS))
    one.add_argument("--plain", action="store_true", help="questions continue the document, no chat template")
    one.add_argument("--max-tokens", type=int, default=256)
    one.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    commands.add_parser("tasks", help="list tasks, groups and methods")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.command == "run":
        return _run(options)
    if options.command == "report":
        for path in write_report(options.results, options.out):
            print(path)
    elif options.command == "compare":
        Console().print(_compare(options))
    else:
        Console().print(_list())
    return 0


def _run(options: argparse.Namespace) -> int:
    model = load(options.model, dtype=getattr(torch, options.dtype), max_length=options.max_length)
    columns = (TextColumn("{task.description:44}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bars:
        bar = bars.add_task("making contexts", total=None)
        done = run_eval(
            model,
            tasks=options.task,
            out=options.out,
            methods=options.method,
            ratios=options.ratio,
            form=options.form,
            count=options.count,
            questions=options.questions,
            seed=options.seed,
            data=options.data,
            batch=options.batch,
            max_tokens=options.max_tokens,
            limit_s=options.limit,
            commit=options.commit,
            progress=lambda finished, total, what: bars.update(bar, completed=finished, total=total, description=what),
        )
    return 0 if done else 75


def _compare(options: argparse.Namespace) -> RenderableType:
    model = load(options.model, dtype=getattr(torch, options.dtype))
    comparison = compare(
        model,
        options.document.read_text(encoding="utf-8"),
        options.question,
        options.ratio,
        method=options.method,
        template=not options.plain,
        max_tokens=options.max_tokens,
    )
    return render(comparison)


def _list() -> Table:
    table = Table("task or group", "length", "what")
    for task in TASKS.values():
        table.add_row(task.name, str(task.length or "own"), task.about)
    for name, members in GROUPS.items():
        table.add_row(name, "", ", ".join(members))
    for method in METHODS.values():
        table.add_row(f"--method {method.name}", "", f"{method.cite}; level {method.level}")
    return table


if __name__ == "__main__":
    raise SystemExit(main())
