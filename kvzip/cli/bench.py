"""`kvzip bench`: how fast a model is on this machine, from its full cache and from compressed ones."""

import random
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..display import visible_line
from ..hub import Loading
from .output import Stage, echo, put, put_json, say, size, stages
from .plumbing import Ratio, command, positive
from .ranks import share_of
from .sources import find_model, load_model, model_options, short

if TYPE_CHECKING:
    from torch import Tensor

    from ..cache import DenseCache, RaggedCache
    from ..models import Model

CHECKOUT = Path(__file__).parents[2]
QUESTION = "What is the value of the first key?"


@command(
    "bench",
    shares=True,
    # options stand before the name of a benchmark; what follows it is handed on, --help too
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog="""
    kvzip bench -m DIR
    kvzip bench -m DIR --tokens 32000 -r 0.3 -r 0.1 --json
    kvzip bench
    kvzip bench ops --only decode
    """,
)
@click.argument("name", required=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@model_options(required=False, about="To time here. ")
@click.option("--tokens", type=positive, default=2_000, show_default=True, help="Of the document.")
@click.option(
    "-r",
    "--ratio",
    "ratios",
    multiple=True,
    type=Ratio(),
    default=(0.3,),
    show_default=True,
    help="Fraction of pairs KEPT; may be repeated.",
)
@click.option("-n", "--max-tokens", type=positive, default=32, show_default=True, help="Tokens of the timed answer.")
@click.option("--json", "as_json", is_flag=True, help="Print times as JSON.")
def bench(
    name: str | None,
    arguments: tuple[str, ...],
    model: str | None,
    loading: Loading,
    tokens: int,
    ratios: tuple[float, ...],
    max_tokens: int,
    as_json: bool,
) -> None:
    """Time a model on this machine.

    Reading, scoring and compressing a document of keys and values, and answering from what is left of it, once each
    after a warm-up. With NAME, a benchmark of the checkout, which gets the ARGUMENTS; with nothing, a list of those.
    """
    if model is None:
        if share_of() is not None:
            raise click.UsageError("expected -m MODEL under torchrun, got none: benchmarks are started by themselves")
        return _run_script(name, arguments)
    if name is not None:
        raise click.UsageError(f"expected a model or the name of a benchmark, got both: -m {model} and {name}")
    with stages() as stage:
        directory = find_model(model)
        load = partial(load_model, stage, model, directory=directory, loading=loading)
        facts = measure(stage, load, tokens, ratios, max_tokens)
    put_json(facts) if as_json else _show(facts)


def measure(
    stage: Stage, load: Callable[[], "Model"], tokens: int, ratios: tuple[float, ...], answer: int
) -> dict[str, Any]:
    """Returns the seconds of each step on this machine, and the bytes of the full cache and of each compressed one.

    The time of an answer's first token includes reading the question. That of each other token is the rest of the time
    of a longer answer, divided by their number.

    Raises: ValueError for more tokens than the model takes.
    """
    from dataclasses import replace

    import torch

    from .. import compression, prefilling, scoring
    from ..machine import device_name, timed, versions

    model, load_s = timed(torch.device("cpu"), load)
    endless = replace(model, stop_ids=())  # so that every answer has the same length
    chat = model.template is not None
    if tokens > model.config.max_length:
        raise ValueError(
            f"expected at most {model.config.max_length:,} tokens (the model's length), got {tokens:,}: "
            "lower --tokens, or pass RoPE scaling (--rope, and --max-length)"
        )
    ids = document_ids(model, tokens)
    scoring.score(model, prefilling.prefill(model, ids[:64], template=chat))  # warms up
    progress = stage("reading the document")
    dense, prefill_s = timed(model.device, lambda: prefilling.prefill(model, ids, template=chat, progress=progress))
    progress = stage("scoring pairs")
    scored, score_s = timed(model.device, lambda: scoring.score(model, dense, progress=progress))
    stage("answering from all pairs")
    rows = [{"ratio": 1.0, "compress_s": 0.0} | _answering(endless, dense, answer)]
    for ratio in ratios:
        stage(f"answering from {ratio:.0%}")
        small, compress_s = timed(model.device, lambda ratio=ratio: compression.compress(scored, ratio))
        rows.append({"ratio": ratio, "compress_s": compress_s} | _answering(endless, small, answer))
    on_gpu = model.device.type == "cuda"
    return {
        "model": model.source,
        "load_s": load_s,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device_name(model.device) if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "torch": versions()["torch"],
        "tokens": dense.length,
        "prefill_s": prefill_s,
        "score_s": score_s,
        "peak_bytes": torch.cuda.max_memory_allocated(model.device) if on_gpu else None,
        "answers": rows,
    }


def document_ids(model: "Model", tokens: int) -> "Tensor":
    """Returns the ids of a made-up document of so many tokens, the same on every machine: keys and their values."""
    from ..inputs import context_ids

    draw = random.Random(0)
    lines = (f'"{draw.getrandbits(128):032x}": "{draw.getrandbits(128):032x}"' for _ in range(tokens // 10 + 1))
    return context_ids(model, "{" + ",\n ".join(lines))[:tokens]


def _answering(model: "Model", cache: "DenseCache | RaggedCache", tokens: int) -> dict[str, int | float]:
    from ..cache import nbytes
    from ..decoding import Decoder
    from ..generation import generate, query_ids
    from ..machine import timed
    from ..parallel import everyone

    (asked,) = query_ids(model, cache, [QUESTION], template=cache.chat)
    decoder = Decoder(model, cache, tail=len(asked) + tokens + 1)

    def seconds(count: int) -> float:
        ask = partial(generate, model, cache, QUESTION, max_tokens=count, template=cache.chat, decoder=decoder)
        return timed(model.device, ask)[1]

    _, first, longer = map(seconds, (2, 1, tokens + 1))  # captures graphs and compiles kernels first
    held = sum(everyone(cache.share, nbytes(cache)))
    return {"cache_bytes": held, "first_token_s": first, "token_s": max(0.0, longer - first) / tokens}


def _show(facts: dict[str, Any]) -> None:
    from rich.table import Table

    tokens, prefill_s, score_s = facts["tokens"], facts["prefill_s"], facts["score_s"]
    echo(f"{visible_line(short(facts['model']))} in {facts['dtype']} on {facts['device']}, torch {facts['torch']}")
    echo(f"load     {facts['load_s']:.2f} s")
    echo(f"prefill  {prefill_s:.2f} s for {tokens:,} tokens, {tokens / prefill_s:,.0f} a second")
    echo(f"score    {score_s:.2f} s, {score_s / prefill_s:.1f} times the prefill")
    if facts["peak_bytes"] is not None:
        echo(f"peak     {size(facts['peak_bytes'])}")
    table = Table("kept", "cache", "packed in", "first token", "each other", "a second", box=None, pad_edge=False)
    for row in facts["answers"]:
        times = (f"{row['first_token_s']:.3f} s", f"{1000 * row['token_s']:.1f} ms")
        rate = f"{1 / row['token_s']:.1f}" if row["token_s"] else "-"
        packed = f"{row['compress_s']:.3f} s" if row["compress_s"] else ""
        table.add_row(f"{row['ratio']:.0%}", size(row["cache_bytes"]), packed, *times, rate)
    put("", table)


def _run_script(name: str | None, arguments: tuple[str, ...]) -> None:
    directory = CHECKOUT / "benchmarks"
    if not directory.is_dir():
        raise FileNotFoundError(
            f"expected -m MODEL to time, or a checkout of kvzip to run its benchmarks, got no {directory}"
        )
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(directory.glob("*.py"))}
    found = {stem: text for stem, text in texts.items() if "__main__" in text}
    if name is None:
        for stem, text in found.items():
            echo(f"{stem:18}" + text.lstrip().split("\n", 1)[0].strip('"'))
        return
    if name not in found:
        raise click.UsageError(f"expected a benchmark of {', '.join(found)}, got {name}")
    run = [sys.executable, str(directory / f"{name}.py"), *arguments]
    say(" ".join(run))
    raise click.exceptions.Exit(subprocess.run(run, check=False).returncode)
