"""`kvzip heads`: scores of heads, made once and used for any document."""

import struct
from pathlib import Path
from typing import Any

import click

from ..display import visible_line
from ..files.header import open_file
from ..hub import SHIPPED, Loading
from . import documents
from .output import echo, put, put_json, stages
from .plumbing import FileName, Group, positive, resuming
from .sources import find_heads, find_model, load_model, model_options, short
from .targets import check_output, force_option, is_kvzip_file, say_replaced, unwritten


@click.group(
    "heads",
    cls=Group,
    epilog="""
    kvzip heads make book.txt -m DIR -o heads.safetensors
    kvzip heads show heads.safetensors
    kvzip compress document.txt -m DIR --heads heads.safetensors
    """,
)
def heads() -> None:
    """Make or show scores of heads.

    They hold for any document: `kvzip compress --heads FILE` then needs no scoring pass.
    """


@heads.command("make", epilog="kvzip heads make book.txt -m DIR -o heads.safetensors")
@click.argument("documents_", metavar="DOC...", nargs=-1, required=True)
@model_options(required=True)
@click.option("-o", "--output", type=FileName(), required=True, help="File to write.")
@click.option("--chunk", type=positive, default=2_000, show_default=True, help="Tokens of a repeat pass.")
@click.option("--plain", is_flag=True, help="No chat template: for base models.")
@force_option()
def make(
    documents_: tuple[str, ...], model: str, loading: Loading, output: Path, chunk: int, plain: bool, force: bool
) -> None:
    """Make head scores from documents.

    A head's score is the largest that it gets in any of them.
    """
    held = check_output(output, kind="file of kvzip", ours=is_kvzip_file, force=force)
    texts = [documents.read([source]) for source in documents_]
    directory = find_model(model)
    from .. import head_scores

    with resuming(lambda: unwritten(output)), stages() as stage:
        loaded = load_model(stage, model, directory=directory, loading=loading)
        made = head_scores.make(
            loaded,
            [text for text, _ in texts],
            names=[name for _, name in texts],
            template=not plain,
            chunk=chunk,
            progress=stage("reading and scoring"),
        )
        head_scores.save(made, output, note={"model": loaded.source}, overwrite=bool(held))
    say_replaced(output, held)
    name, (layers, each) = visible_line(str(output)), made.values.shape
    echo(f"{name}: {layers} layers x {each} heads of {visible_line(short(model))}")


@heads.command(
    "show",
    epilog="""
    kvzip heads show heads.safetensors
    kvzip heads show smollm2-135m-instruct --json
    """,
)
@click.argument("source", metavar="FILE|NAME")
@click.option("--json", "as_json", is_flag=True, help="Print facts as JSON.")
def show(source: str, as_json: bool) -> None:
    """Show head scores.

    Those of a file, or by the name of a model whose scores come with the library.
    """
    from rich.table import Table
    from rich.text import Text

    facts, values = read_scores(find_heads(source))
    if as_json:
        put_json({"values": values} | facts)
        return
    table = Table("layer", *(f"head {n}" for n in range(len(values[0]))), box=None, pad_edge=False)
    highest = max(map(max, values)) or 1.0
    for layer, row in zip(facts["layers"], values, strict=True):
        cells = [Text(f"{x:.3f}", style="bold" if x > highest / 2 else "dim" if x < highest / 10 else "") for x in row]
        table.add_row(str(layer), *cells)
    put(table)


def read_scores(path: Path) -> tuple[dict[str, Any], list[list[float]]]:
    """Returns facts of a file of head scores, and the scores of each layer's heads. Raises as `head_scores.load` does.

    Those that come with the library are read without torch, which takes seconds; any other file is checked whole.
    """
    if path.parent != SHIPPED:
        from ..head_scores import load

        scores = load(path)
        return {name: getattr(scores, name) for name in _FACTS}, scores.values.tolist()
    with open_file(path) as file:
        values, header = file.tensors["values"], file.header
    rows = struct.iter_unpack(f"<{values.shape[1]}f", path.read_bytes()[values.start : values.stop])
    return {name: header[name] for name in _FACTS}, [list(row) for row in rows]


_FACTS = ("layers", "family", "method", "sink", "recent")
