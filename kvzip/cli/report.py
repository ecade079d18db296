"""`kvzip report`: a page that shows what a file keeps of its document."""

from pathlib import Path

import click

from ..display import visible_line
from .output import echo, size
from .plumbing import FileName, command, resuming
from .sources import check_ours
from .targets import check_output, force_option, is_page, say_replaced, unwritten


@command(
    "report",
    epilog="""
    kvzip report contract.kvz
    kvzip report contract.kvz -o pages/contract.html
    """,
)
@click.argument("file", type=FileName())
@click.option("-o", "--output", type=FileName(), help="Page to write [default: the file's name, .html].")
@force_option("page")
def report(file: Path, output: Path | None, force: bool) -> None:
    """Write a page that shows what is kept.

    One HTML file that needs nothing else: the document shaded by what is kept of it, heads, scores, sizes and times.
    """
    output = output or file.with_suffix(".html")
    with resuming(lambda: unwritten(output)):
        check_ours(file)
        from ..report import write_report

        held = check_output(output, kind="page of kvzip", ours=is_page, force=force)
        write_report(file, output)
    say_replaced(output, held)
    echo(f"{visible_line(str(output))}, {size(output.stat().st_size)}")
