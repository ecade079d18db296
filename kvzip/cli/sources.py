"""Where a model comes from: by options, or by what a file says of the model that made it."""

import json
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .plumbing import Stage

if TYPE_CHECKING:
    from ..cache import DenseCache, RaggedCache
    from ..models import Model

DTYPES = ("bfloat16", "float16", "float32")


def model_options(*, required: bool, about: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds the options that say how a model is loaded.

    Args:
        required: False for commands to which a file says what made it; options then stand in place of what it says.
        about: what a model that is not required is for, where there is no file.
    """
    given = "" if required or about else " In place of the one that the file names."
    options = [
        click.option(
            "-m",
            "--model",
            required=required,
            help=about + "Directory in Hugging Face format, hub id or alias." + given,
        ),
        click.option(
            "--dtype",
            type=click.Choice(DTYPES),
            help="Of weights and cache [default: bfloat16 on a GPU, else float32]."
            if required or about
            else "In place of the file's.",
        ),
        click.option(
            "--device",
            metavar="DEVICE",
            callback=_device,
            help="cpu, cuda, cuda:1 [default: a GPU if there is one].",
        ),
        click.option("--max-length", type=click.IntRange(min=1), help="Positions, in place of the model's own limit."),
        click.option("--rope", metavar="JSON", callback=_json, help="RoPE scaling in place of the config's."),
    ]

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return add


def _device(ctx: click.Context, option: click.Parameter, value: str | None) -> str | None:
    if value is not None and not re.fullmatch(r"[a-z]+(:\d+)?", value):
        raise click.BadParameter(f"expected cpu, cuda or cuda:1, got {value}", ctx, option)
    return value


def _json(ctx: click.Context, option: click.Parameter, value: str | None) -> dict[str, Any] | None:
    if value is None:
        return None
    try:
        read = json.loads(value)
    except json.JSONDecodeError:
        read = None
    if not isinstance(read, dict):
        raise click.BadParameter('expected an object as {"rope_type": "yarn", "factor": 4.0}', ctx, option)
    return read


def load_model(
    stage: Stage,
    model: str,
    *,
    dtype: str | None,
    device: str | None,
    max_length: int | None,
    rope: dict[str, Any] | None,
) -> "Model":
    """Returns the model of a source, loaded with the options."""
    import torch

    from .. import models

    on_gpu = device.startswith("cuda") if device else torch.cuda.is_available()
    _check_device(device)
    dtype = dtype or ("bfloat16" if on_gpu else "float32")
    stage(f"loading {short(model)}")
    quiet_hub()
    return models.load(model, dtype=getattr(torch, dtype), device=device, max_length=max_length, rope=rope)


def _check_device(device: str | None) -> None:
    import torch

    if device in (None, "cpu"):
        return
    kind, _, number = str(device).partition(":")
    known = ["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
    if kind != "cuda" or f"cuda:{number or 0}" not in known:
        raise ValueError(f"expected a device of {', '.join(known)}, got {device}: torch finds no other here")


def header_of(path: Path) -> dict[str, Any]:
    """Returns what a file of ours says of itself. Raises as `read_header` does, in words for who names files."""
    from ..cache import read_header

    if path.is_dir():
        raise ValueError(f"expected a file that kvzip wrote, got the directory {path}")
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(9)
        if start and start[8:] not in (b"{", b""):  # where the header of every safetensors file begins
            raise ValueError(f"expected a file that kvzip wrote, got {path} that is none: kvzip compress makes one")
    return read_header(path)


def quiet_hub() -> None:
    """Lets the hub show its progress on a terminal only, as everything here does."""
    if sys.stderr.isatty():
        return
    with suppress(ImportError):
        from huggingface_hub.utils import disable_progress_bars  # pyright: ignore[reportMissingImports]

        disable_progress_bars()


def open_cache(
    stage: Stage,
    path: Path,
    *,
    model: str | None,
    dtype: str | None,
    device: str | None,
    max_length: int | None,
    rope: dict[str, Any] | None,
) -> "tuple[Model, DenseCache | RaggedCache, dict[str, Any]]":
    """Returns the model that made a cache file, the cache, and the file's header; see `kvzip.open`.

    Raises: FileNotFoundError, ValueError as `kvzip.open` does.
    """
    import torch

    from .. import opening

    header = header_of(path)
    _check_device(device)
    quiet_hub()
    stage(f"opening {path.name}")
    loaded, cache = opening.open(
        path,
        model=model,
        dtype=None if dtype is None else getattr(torch, dtype),
        device=device,
        max_length=max_length,
        rope=rope,
    )
    return loaded, cache, header


def short(source: str) -> str:
    """Returns a source as people call it: the last part of a path, a hub id whole."""
    path = Path(source)
    return path.resolve().name if path.is_dir() else source


def title_of(path: Path, header: dict[str, Any]) -> str:
    """Returns what a file's document is called."""
    return str(header.get("note", {}).get("title") or path.name)
