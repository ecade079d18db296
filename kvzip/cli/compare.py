"""`kvzip compare`: what compression changes in the answers to a few questions."""

from dataclasses import asdict, replace

import click

from ..hub import Loading
from ..ratios import FLOOR
from . import documents
from .ask import follow
from .output import put, put_json, stages
from .plumbing import Ratio, check_utf8, command, positive
from .sources import find_model, load_model, model_options


@command(
    "compare",
    epilog="""
    kvzip compare contract.txt "Who signed it?" -m DIR -r 0.3
    kvzip compare contract.txt "Who signed it?" "When?" -m DIR -r 0.1 --method snapkv --json
    """,
)
@click.argument("document", metavar="DOC")
@click.argument("questions", metavar="QUESTION...", nargs=-1, required=True)
@model_options(required=True)
@click.option(
    "-r",
    "--ratio",
    type=Ratio(),
    default=0.3,
    show_default=True,
    help="Fraction of pairs KEPT.",
)
@click.option("--method", default="kvzip", show_default=True, help="See `kvzip eval tasks`.")
@click.option("--refit", is_flag=True, help="Fit what is kept, as `kvzip compress --refit` does.")
@click.option("--plain", is_flag=True, help="Questions continue the document, no chat template.")
@click.option("-n", "--max-tokens", type=positive, default=256, show_default=True, help="Tokens of an answer, at most.")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
def compare(
    document: str,
    questions: tuple[str, ...],
    model: str,
    loading: Loading,
    ratio: float,
    method: str,
    refit: bool,
    plain: bool,
    max_tokens: int,
    as_json: bool,
) -> None:
    """Show what compression changes in answers.

    Questions are asked of the document's full cache and of the compressed one. First how many answers are the same and
    what is saved; then memory and times, and for each question the answers, how far probabilities moved, and the tokens
    that changed.
    """
    asked = [check_utf8(question.strip()) for question in questions]
    if not all(asked):
        raise click.UsageError("expected questions with text in them, got an empty one")
    text, _ = documents.read([document])
    directory = find_model(model)
    from ..evals.comparison import compare as compared
    from ..evals.comparison import render, unchanged

    with stages() as stage:
        loaded = load_model(stage, model, directory=directory, loading=loading)
        found = compared(
            loaded,
            text,
            [follow(question, chat=not plain) for question in asked],
            ratio,
            method=method,
            refit=refit,
            floor=FLOOR if refit else 0.0,
            template=not plain,
            max_tokens=max_tokens,
            on_step=stage,
        )
    named = [replace(pair, query=query) for query, pair in zip(asked, found.answers, strict=True)]
    found = replace(found, answers=tuple(named))
    if as_json:
        put_json({"unchanged": unchanged(found)} | asdict(found))
    else:
        put(render(found))
