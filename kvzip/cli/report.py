"""`kvzip report`: a page that shows what a file keeps of its document."""

from pathlib import Path

import click

from ..display import visible_line
from ..hub import Loading
from .ask import Answering, answer_options, follow
from .output import echo, size, stages
from .plumbing import FileName, check_utf8, command, resuming
from .sources import check_ours, model_options, open_cache
from .targets import check_output, force_option, is_page, say_replaced, unwritten


@command(
    "report",
    epilog="""
    kvzip report contract.kvz
    kvzip report contract.kvz --ask "Who signed it?" --ask "When?"
    kvzip report contract.kvz -o pages/contract.html
    """,
)
@click.argument("file", type=FileName())
@click.option("-o", "--output", type=FileName(), help="Page to write [default: the file's name, .html].")
@click.option(
    "--ask",
    "questions",
    multiple=True,
    metavar="QUESTION",
    help="Show its answers, from the full cache and the compressed one, beside the text; may be repeated. The document "
    "is read again for that.",
)
@answer_options
@model_options(required=False)
@force_option("page")
def report(
    file: Path,
    output: Path | None,
    questions: tuple[str, ...],
    answering: Answering,
    model: str | None,
    loading: Loading,
    force: bool,
) -> None:
    """Write a page that shows what is kept.

    One HTML file that needs nothing else: the document shaded by what is kept of it, the passages kept most and least,
    heads, scores, sizes and times. No model is needed, except to --ask.
    """
    output = output or file.with_suffix(".html")
    asked = [check_utf8(question.strip()) for question in questions]
    if not all(asked):
        raise click.UsageError("expected questions with text in them, got an empty one")
    with resuming(lambda: unwritten(output)):
        check_ours(file)
        from ..report import answered, write_report

        held = check_output(output, kind="page of kvzip", ours=is_page, force=force)
        answers = []
        if asked:
            with stages() as stage:
                loaded, cache, _ = open_cache(stage, file, model=model, loading=loading)
                stage("reading the document again, and answering")
                answers = answered(loaded, cache, [follow(q, chat=cache.chat) for q in asked], **vars(answering))
        write_report(file, output, answers=answers)
    say_replaced(output, held)
    echo(f"{visible_line(str(output))}, {size(output.stat().st_size)}")
