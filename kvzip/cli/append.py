"""`kvzip append`: a document that grows, without reading what is there again."""

import time
from pathlib import Path

import click

from ..display import visible_line
from ..hub import Loading
from . import documents
from .compress import SUFFIX
from .output import echo, put_json, size, stages
from .plumbing import FileName, Ratio, command, resuming
from .sources import check_ours, model_options, open_cache
from .targets import check_output, force_option, is_kvzip_file, say_replaced, unwritten

PARAGRAPH = "\n\n"


@command(
    "append",
    epilog="""
    kvzip append contract.kvz amendment.txt
    kvzip append log.kvz - < today.txt
    kvzip append book.kvz chapter-2.txt -r 0.5 -o book-2.kvz
    """,
)
@click.argument("file", type=FileName())
@click.argument("documents_", metavar="MORE...", nargs=-1, required=True)
@click.option("-r", "--ratio", type=Ratio(), help="Fraction of the new pairs KEPT [default: that of the file].")
@click.option("-o", "--output", type=FileName(), help=f"File to write [default: FILE itself]. Ends in {SUFFIX}.")
@model_options(required=False)
@force_option()
@click.option("--json", "as_json", is_flag=True, help="Print facts as JSON.")
def append(
    file: Path,
    documents_: tuple[str, ...],
    ratio: float | None,
    output: Path | None,
    model: str | None,
    loading: Loading,
    force: bool,
    as_json: bool,
) -> None:
    """Add text to a compressed file.

    The new text is read after the compressed one, as a new paragraph, scored and packed; what is there already is not
    read again and does not change. FILE is replaced once the longer one is whole, or left as it is with -o.
    """
    target = output or file
    check_ours(file)
    held = check_output(target, kind="file of kvzip", ours=is_kvzip_file, force=force or output is None)
    text, title = documents.read(documents_)
    begun = time.monotonic()
    with resuming(lambda: unwritten(target)), stages() as stage:
        loaded, cache, header = open_cache(stage, file, model=model, loading=loading)
        from .. import conversation
        from ..cache import full_nbytes, nbytes, save
        from ..files import schema

        stage(f"reading {title}")
        grown = conversation.append(loaded, cache, PARAGRAPH + text, ratio)
        stage(f"writing {target.name}")
        note = dict(schema.entry(header, "note"))
        before = note.get("documents")
        note["documents"] = [*(before if isinstance(before, list) else []), *map(visible_line, documents_)]
        save(grown, target, note=note, model=loaded, score_bits=8, overwrite=True)
    if output is not None:
        say_replaced(target, held)
    facts = {
        "file": str(target),
        "new_tokens": grown.context_length - cache.context_length,
        "tokens": grown.context_length,
        "kept": grown.kept,
        "total": grown.total,
        "full_bytes": full_nbytes(grown),
        "cache_bytes": nbytes(grown),
        "file_bytes": target.stat().st_size,
        "seconds": time.monotonic() - begun,
    }
    if as_json:
        put_json(facts)
        return
    echo(
        f"{visible_line(str(target))}: {facts['new_tokens']:,} tokens more, {facts['tokens']:,} now, "
        f"{grown.kept / grown.total:.1%} of {grown.total:,} pairs kept, cache {size(facts['full_bytes'])} -> "
        f"{size(facts['cache_bytes'])} ({facts['seconds']:.1f} s)"
    )
