"""`kvzip report`: a page that shows what a file keeps of its document."""

from pathlib import Path

import click

from .plumbing import Stopped, check_target, command, size


@command("report", epilog="kvzip report contract.kvz -o contract.html")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Page to write [default: the file's name, .html]."
)
def report(file: Path, output: Path | None) -> None:
    """Write a page that shows what is kept.

    One HTML file that needs nothing else: the document shaded by what is kept of it, heads, scores, sizes and times.
    """
    output = output or file.with_suffix(".html")
    from ..report import write_report

    if not file.is_file():
        raise FileNotFoundError(f"expected a cache file, got no file {file}")
    check_target(output, kind=".html")
    try:
        write_report(file, output)
    except KeyboardInterrupt as error:
        raise Stopped(f"{output} was not written: run it again") from error
    click.echo(f"{output}, {size(output.stat().st_size)}")
