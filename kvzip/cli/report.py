"""`kvzip report`: a page that shows what a file keeps of its document."""

from pathlib import Path

import click

from .plumbing import check_target, command, resuming, size, unwritten
from .sources import header_of


@command(
    "report",
    epilog="""
    kvzip report contract.kvz
    kvzip report contract.kvz -o pages/contract.html
    """,
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Page to write [default: the file's name, .html]."
)
def report(file: Path, output: Path | None) -> None:
    """Write a page that shows what is kept.

    One HTML file that needs nothing else: the document shaded by what is kept of it, heads, scores, sizes and times.
    """
    output = output or file.with_suffix(".html")
    from ..report import is_page, write_report

    with resuming(lambda: unwritten(output)):
        header_of(file)
        check_target(output, kind="page of kvzip", ours=is_page)
        write_report(file, output)
    click.echo(f"{output}, {size(output.stat().st_size)}")
