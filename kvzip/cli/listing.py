"""`kvzip ls`: the files of kvzip in a directory. Without torch."""

from pathlib import Path
from typing import Any

import click

from ..display import shown_bits, visible_line
from ..files import schema
from ..files.header import peek
from .output import echo, put, put_json, say, size
from .plumbing import FileName, command
from .targets import is_kvzip_file

SUFFIX = ".kvz"


@command(
    "ls",
    epilog="""
    kvzip ls
    kvzip ls notes/ contract.kvz --json
    """,
)
@click.argument("places", metavar="[DIR|FILE]...", nargs=-1, type=FileName())
@click.option("--json", "as_json", is_flag=True, help="Print them as JSON.")
def ls(places: tuple[Path, ...], as_json: bool) -> None:
    """List compressed files.

    With each its document, the model that made it, tokens, the fraction of pairs kept and its size. Only headers are
    read. In a directory [default: the current one] these are the files whose names end in .kvz.
    """
    found = []
    for place in places or (Path(),):
        for path in _files(place):
            try:
                found.append(facts_of(path))
            except ValueError as error:
                if not place.is_dir():
                    raise
                say(f"left out: {error}")
    if as_json:
        put_json(found)
    elif not found:
        echo(f"no {SUFFIX} files in {', '.join(visible_line(str(place)) for place in places) or 'this directory'}")
    else:
        from rich.table import Table
        from rich.text import Text

        table = Table("file", "document", "model", box=None, pad_edge=False)
        for name in ("tokens", "kept", "size"):
            table.add_column(name, justify="right")
        for each in found:
            shown = [visible_line(str(each[key]), limit=60) for key in ("file", "document", "model")]
            kept = f"{each['ratio']:.1%}" + (f", {shown_bits(each['bits'])}" if each["bits"] else "")
            table.add_row(*map(Text, shown), f"{each['tokens']:,}", kept, size(each["file_bytes"]))
        put(table)


def facts_of(path: Path) -> dict[str, Any]:
    """Returns what the header of a file says: document, model, tokens, ratio and bits, and the size of the file.

    Raises: ValueError for a file that kvzip did not write; FileNotFoundError.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected a file that kvzip wrote, or a directory, got no such thing: {path}")
    header = peek(path) if is_kvzip_file(path) else {}
    kept, total, tokens, layers = (header.get(name) for name in ("kept", "total", "length", "layers"))
    whole = isinstance(layers, list) and all(isinstance(each, dict) for each in layers)
    if not whole or not all(isinstance(x, int) for x in (kept, total, tokens)):
        raise ValueError(f"expected a file that kvzip wrote, got {path} that is none, or a damaged one")
    assert isinstance(kept, int) and isinstance(total, int)
    note, source = schema.entry(header, "note"), str(schema.entry(header, "model").get("source") or "")
    return {
        "file": str(path),
        "document": str(note.get("title") or note.get("document") or ""),
        "model": Path(source).name if Path(source).is_absolute() else source,
        "tokens": tokens,
        "ratio": schema.ratio_of(kept, total),
        "bits": schema.bits_of(header),
        "file_bytes": path.stat().st_size,
    }


def _files(place: Path) -> list[Path]:
    if not place.is_dir():
        return [place]
    return [path for path in sorted(place.glob(f"*{SUFFIX}")) if path.is_file() and is_kvzip_file(path)]
