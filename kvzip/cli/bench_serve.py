"""`kvzip bench serve`: how fast many readers of many documents are answered on this machine."""

import contextlib
import random
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..display import visible_line
from ..hub import Loading
from .output import Stage, echo, put, put_json, size, stages
from .plumbing import Bits, Ratio, command, positive
from .sources import find_model, load_model, model_options, short

if TYPE_CHECKING:
    from torch import Tensor

    from ..models import Model
    from ..serving import Engine, Held

QUESTION = "What is the value of the first key?"


class _Load(click.ParamType):
    """Documents and readers of each: 8x4."""

    name = "DxR"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        found = value if isinstance(value, tuple) else re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", value)
        if not found:
            self.fail(f"expected documents and readers of each, as 8x4, got {value}", param, ctx)
        return found if isinstance(found, tuple) else (int(found[1]), int(found[2]))


@command(
    "bench serve",
    epilog="""
    kvzip bench serve -m DIR
    kvzip bench serve -m DIR --tokens 32000 -r 0.3 --bits 8 --at 8x4 --at 16x8 --http --json
    """,
)
@model_options(required=True)
@click.option("--tokens", type=positive, default=2_000, show_default=True, help="Of each document.")
@click.option("-r", "--ratio", type=Ratio(), default=0.3, show_default=True, help="Fraction of pairs KEPT.")
@click.option(
    "--bits", type=Bits(), metavar="[8|4|2|8,4|...]", help="Bits of what is kept [default: those of the model]."
)
@click.option(
    "--at",
    "loads",
    multiple=True,
    type=_Load(),
    default=((1, 1), (1, 8), (4, 2)),
    show_default="1x1 1x8 4x2",
    help="Documents x readers of each; may be repeated.",
)
@click.option("-n", "--max-tokens", type=click.IntRange(min=4), default=64, show_default=True, help="Of each answer.")
@click.option("--http", is_flag=True, help="Time the same over HTTP too. Needs the extra serve.")
@click.option("--json", "as_json", is_flag=True, help="Print times as JSON.")
def bench_serve(model: str, loading: Loading, as_json: bool, **asked: Any) -> None:
    """Time many readers of many documents on this machine.

    A made-up document is compressed and opened as often as there are documents, each copy in memory of its own. For
    each --at all readers ask at once; the second time counts.
    """
    with stages() as stage:
        loaded = load_model(stage, model, directory=find_model(model), loading=loading)
        rows = measure(stage, loaded, **asked)
    facts = {"model": loaded.source, "dtype": str(loaded.dtype).removeprefix("torch."), "rows": rows}
    put_json(facts) if as_json else _show(facts)


def measure(
    stage: Stage,
    model: "Model",
    *,
    tokens: int,
    ratio: float,
    bits: tuple[int, int] | None,
    loads: Sequence[tuple[int, int]],
    max_tokens: int,
    http: bool,
) -> list[dict[str, Any]]:
    """Returns a row for each load: documents, readers, bytes of a document, and the pace of the answers.

    Raises: ValueError for documents that do not fit in memory.
    """
    from .. import compression, prefilling, scoring
    from ..cache import save
    from ..serving import Engine
    from ..serving.timing import pace_of

    model = replace(model, stop_ids=())  # so that every answer has the same length
    ids = document_ids(model, tokens)
    dense = prefilling.prefill(model, ids, template=model.template is not None, progress=stage("reading the document"))
    dense = scoring.score(model, dense, progress=stage("scoring pairs"))
    small = compression.compress(dense, ratio, bits=bits, consume=True)
    most = max(readers * documents for documents, readers in loads)
    rows = []
    with tempfile.TemporaryDirectory(prefix="kvzip-bench-") as directory:
        path = Path(directory) / "document.kvz"
        save(small, path)
        del dense, small
        room = most * (max_tokens + 2 * len(QUESTION) + 64)
        with Engine(model, requests=min(most, 256), tail_tokens=room) as engine:
            stage("opening documents")
            contexts = [engine.add(path) for _ in range(max(documents for documents, _ in loads))]
            _check_room(engine, contexts)
            for documents, readers in loads:
                stage(f"asking {documents} x {readers}")
                asked = contexts[:documents] * readers
                paces = []
                for _ in range(2):  # the first captures graphs, and brings documents to the device
                    handles = [engine.submit(own, QUESTION, max_tokens=max_tokens, template=own.chat) for own in asked]
                    paces.append(pace_of(handles))
                row = {"documents": documents, "readers": readers, "document_bytes": contexts[0].nbytes}
                rows.append(row | asdict(paces[-1]))
        if http:
            for row, over_http in zip(rows, _over_http(stage, model, path, room, loads, max_tokens), strict=True):
                row["http"] = over_http
    return rows


def document_ids(model: "Model", tokens: int) -> "Tensor":
    """Returns the ids of a made-up document of so many tokens, the same on every machine: keys and their values."""
    from ..inputs import context_ids

    draw = random.Random(0)
    lines = (f'"{draw.getrandbits(128):032x}": "{draw.getrandbits(128):032x}"' for _ in range(tokens // 10 + 1))
    return context_ids(model, "{" + ",\n ".join(lines))[:tokens]


def _check_room(engine: "Engine", contexts: "list[Held]") -> None:
    needed = sum(own.nbytes for own in contexts)
    if needed > engine.limits.memory:
        raise ValueError(
            f"expected documents of at most {size(engine.limits.memory)} together (what is free), got {len(contexts)} "
            f"of {size(contexts[0].nbytes)}: ask for fewer (--at), shorter (--tokens) or smaller ones (--ratio, --bits)"
        )


def _over_http(
    stage: Stage, model: "Model", path: Path, room: int, loads: Sequence[tuple[int, int]], max_tokens: int
) -> Iterator[dict[str, Any]]:
    """The pace of each load as readers in another process see it."""
    from ..serving import Engine
    from .serve import _uvicorn

    _uvicorn()
    from ..server.app import create_app
    from ..server.chat import Service
    from ..server.library import Library
    from ..server.load import in_thread, pace_over_http
    from ..server.metrics import Metrics

    count = max(documents for documents, _ in loads)
    links = [path.with_name(f"d{n}.kvz") for n in range(count)]
    for link in links:
        link.symlink_to(path)
    most = max(readers * documents for documents, readers in loads)
    engine = Engine(model, requests=min(most, 256), tail_tokens=room)
    with contextlib.ExitStack() as stack:
        stack.callback(engine.close, cancel=True)
        service = Service(engine, Library(engine, path.parent / "posted", links), Metrics(), "model", max_tokens)
        url = stack.enter_context(in_thread(create_app(service)))
        for documents, readers in loads:
            stage(f"asking {documents} x {readers} over HTTP")
            names = [f"model:{link.stem}" for link in links[:documents]] * readers
            pace_over_http(url, names, QUESTION, tokens=max_tokens)
            yield asdict(pace_over_http(url, names, QUESTION, tokens=max_tokens))


def _show(facts: dict[str, Any]) -> None:
    from rich.table import Table

    rows = facts["rows"]
    echo(f"{visible_line(short(facts['model']))} in {facts['dtype']}, documents of {size(rows[0]['document_bytes'])}")
    http = "http" in rows[0]
    table = Table("documents", "readers", "first token", "each other", "99th", "a second", box=None, pad_edge=False)
    if http:
        table.add_column("over HTTP")
    for row in rows:
        times = (f"{row['first_s']:.3f} s", *(f"{1000 * row[name]:.1f} ms" for name in ("token_s", "p99_s")))
        last = (f"{row['http']['tokens_per_s']:,.0f}",) if http else ()
        per_second = f"{row['tokens_per_s']:,.0f}"
        table.add_row(str(row["documents"]), f"x {row['readers']}", *times, per_second, *last)
    put("", table)
