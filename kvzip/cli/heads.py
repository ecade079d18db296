"""`kvzip heads`: scores of heads, made once and used for any document."""

from pathlib import Path
from typing import Any

import click

from . import documents
from .plumbing import Group, check_target, is_kvzip_file, positive, put, put_json, resuming, stages, unwritten
from .sources import load_model, model_options, short


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
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="File to write.")
@click.option("--chunk", type=positive, default=2_000, show_default=True, help="Tokens of a repeat pass.")
@click.option("--plain", is_flag=True, help="No chat template: for base models.")
def make(
    documents_: tuple[str, ...],
    model: str,
    dtype: str | None,
    device: str | None,
    max_length: int | None,
    rope: dict[str, Any] | None,
    output: Path,
    chunk: int,
    plain: bool,
) -> None:
    """Make head scores from documents.

    A head's score is the largest that it gets in any of them.
    """
    from .. import head_scores

    check_target(output, kind="file of kvzip", ours=is_kvzip_file)
    texts = [documents.read([source]) for source in documents_]
    with resuming(lambda: unwritten(output)), stages() as stage:
        loaded = load_model(stage, model, dtype=dtype, device=device, max_length=max_length, rope=rope)
        made = head_scores.make(
            loaded,
            [text for text, _ in texts],
            names=[name for _, name in texts],
            template=not plain,
            chunk=chunk,
            progress=stage("reading and scoring"),
        )
        head_scores.save(made, output, note={"model": loaded.source})
    click.echo(f"{output}: {made.values.shape[0]} layers x {made.values.shape[1]} heads of {short(model)}")


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

    from .. import head_scores

    scores = head_scores.load(source) if Path(source).is_file() else head_scores.shipped(source)
    values = scores.values.tolist()
    if as_json:
        put_json({"layers": list(scores.layers), "values": values, "family": scores.family, "method": scores.method})
        return
    table = Table("layer", *(f"head {n}" for n in range(len(values[0]))), box=None, pad_edge=False)
    highest = max(map(max, values)) or 1.0
    for layer, row in zip(scores.layers, values, strict=True):
        cells = [Text(f"{x:.3f}", style="bold" if x > highest / 2 else "dim" if x < highest / 10 else "") for x in row]
        table.add_row(str(layer), *cells)
    put(table)
