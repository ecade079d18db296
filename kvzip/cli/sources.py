"""Where a model comes from: by options, or by what a file says of the model that made it."""

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..files.header import is_something_else
from ..hub import Loading, config_of, resolve, shipped_name, shipped_scores
from .output import Stage, say
from .ranks import launch_of

if TYPE_CHECKING:
    from ..cache import DenseCache, RaggedCache
    from ..models import Model

WEIGHTS = ("fp8", "int8", "int4")
DTYPES = ("bfloat16", "float16", "float32")


def model_options(*, required: bool, about: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds --model, which a command takes as `model`, and the options that it takes together as `loading`.

    Args:
        required: False for a command that opens a file, which says what made it: the options replace what it says.
        about: what a model that is not required is for, where there is no file.
    """
    of_file = not (required or about)
    which = "Directory in Hugging Face format, hub id or alias."
    which += " In place of the one that the file names." if of_file else ""
    dtype = "In place of the file's." if of_file else "Of weights and cache [default: bfloat16]."
    device = "cpu, cuda, cuda:1 [default: a GPU if there is one]."
    weights = "Round the weights of a 16-bit checkpoint to 8 or 4 bits while loading it."
    head = "Round the head too, which is not by --weights, and the embedding where it is the same matrix."
    length = "Positions, in place of the model's own limit; more make sense only with --rope."
    options = [
        click.option("-m", "--model", required=required, help=about + which),
        click.option("--dtype", type=click.Choice(DTYPES), help=dtype),
        click.option("--weights", type=click.Choice(WEIGHTS), help=weights),
        click.option("--head-weights", type=click.Choice(WEIGHTS), help=head),
        click.option("--device", metavar="DEVICE", callback=_device, help=device),
        click.option("--max-length", type=click.IntRange(min=1), help=length),
        click.option("--rope", metavar="JSON", callback=_json, help="RoPE scaling in place of the config's."),
    ]

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def collected(
            dtype: str | None,
            weights: str | None,
            head_weights: str | None,
            device: str | None,
            max_length: int | None,
            rope: dict[str, Any] | None,
            **others: Any,
        ) -> Any:
            group = None
            if (launch := launch_of()) is not None:
                group, device = launch.share.group, launch.device
            loading = Loading(dtype, device, max_length, rope, weights, head_weights, group=group)
            return function(**others, loading=loading)

        for option in reversed(options):
            collected = option(collected)
        return collected

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
    except (ValueError, RecursionError):  # no JSON, a number of thousands of digits, or nested as deep
        read = None
    if not isinstance(read, dict):
        raise click.BadParameter('expected an object as {"rope_type": "yarn", "factor": 4.0}', ctx, option)
    return read


def load_model(stage: Stage, model: str, *, directory: Path, loading: Loading) -> "Model":
    """Returns the model of a source, loaded with the options; what they leave open is what `kvzip.load` does.

    Warns of a length that the model was not made for.

    Args:
        directory: where the model lies: what `find_model` returned, so that the hub is asked once.
    """
    if loading.max_length is not None:
        warn_of_length(directory, loading.max_length, rope=loading.rope)
    from .. import models

    loading = _checked(loading)
    stage(f"loading {short(model)}")
    options = {name: value for name, value in vars(loading).items() if value is not None}
    return replace(models.load(directory, **options), source=model)


def find_model(model: str, *, only: Sequence[str] | None = None) -> Path:
    """Returns the directory of a model, which may be fetched, or `only` some of its files. Without torch.

    Raises: as `load` does for a wrong name.
    """
    if not sys.stderr.isatty():  # the hub shows its progress on a terminal only, as everything here does
        with suppress(ImportError):
            from huggingface_hub.utils import disable_progress_bars  # pyright: ignore[reportMissingImports]

            disable_progress_bars()
    directory = resolve(model) if only is None else resolve(model, only=only)
    config_of(directory)
    return directory


def made_for(directory: Path, *, rope: Mapping[str, Any] | None) -> int | None:
    """Returns how many positions a model was made for, with RoPE scaling if it has any; None if its config is wrong."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config") or config
        scaling = rope or config.get("rope_scaling") or config.get("rope_parameters") or {}
        scaling = scaling.get("full_attention") or scaling
        own = config["max_position_embeddings"]
        original, factor = scaling.get("original_max_position_embeddings") or own, scaling.get("factor") or 1
        return int(max(own, original * factor))
    except (OSError, ArithmeticError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # load says what is wrong with it


def warn_of_length(directory: Path, positions: int, *, rope: Mapping[str, Any] | None) -> None:
    """Says, before the work, that positions are beyond what a model was made for."""
    limit = made_for(directory, rope=rope)
    if limit is not None and positions > limit:
        say(
            f"warning: {positions:,} positions are asked for (--max-length), the model was made for {limit:,}: "
            "what it says beyond those makes no sense without RoPE scaling (--rope)",
            bold=True,
        )


def _checked(loading: Loading) -> Loading:
    """The options with torch's dtype. Raises ValueError for a device that is not there."""
    import torch

    known = ["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
    if loading.device not in (None, *known, *(name.partition(":")[0] for name in known)):
        raise ValueError(f"expected a device of {', '.join(known)}, got {loading.device}: torch finds no other here")
    return replace(loading, dtype=getattr(torch, loading.dtype) if isinstance(loading.dtype, str) else loading.dtype)


def check_ours(path: Path, *, made_by: str = "kvzip compress") -> None:
    """Raises an error for a file that kvzip cannot have written, in the words of the command line. Without torch."""
    if path.is_dir():
        raise ValueError(f"expected a file that kvzip wrote, got the directory {path}")
    if not path.is_file():
        raise FileNotFoundError(f"expected a file that kvzip wrote, got no file {path}: {made_by} makes one")
    with path.open("rb") as file:
        if is_something_else(file):
            raise ValueError(f"expected a file that kvzip wrote, got {path} that is none: {made_by} makes one")


def open_cache(
    stage: Stage, path: Path, *, model: str | None, loading: Loading
) -> "tuple[Model, DenseCache | RaggedCache, dict[str, Any]]":
    """Returns the model that made a cache file, the cache, and the file's header; see `kvzip.open`.

    Only a model that is given may be fetched. Warns, before it is loaded, of a length that it was not made for.

    Raises: FileNotFoundError, ValueError as `kvzip.open` does.
    """
    given = None if model is None else find_model(model)
    check_ours(path)  # before torch, which takes seconds
    from .. import opening
    from ..cache.reading import open_cache as opened

    loading = _checked(loading)
    stage(f"opening {path.name}")
    with opened(path) as file:
        if loading.max_length is not None:
            rope = loading.rope or opening.maker_of(file)[1].rope
            warn_of_length(given or opening.find(file), loading.max_length, rope=rope)
        loaded, cache = opening.read(file, model=model, loading=loading)
        return loaded, cache, file.header


def find_heads(source: str) -> Path:
    """Returns a file of head scores: the one at this path, or the one that comes with the library under this name.

    As in `head_scores.shipped`, the name may be the last part of a path or a hub id, in any case. Without torch.

    Raises: ValueError that lists the names.
    """
    path = Path(source)
    if path.is_file():
        check_ours(path, made_by="kvzip heads make")
        return path
    shipped = shipped_scores()
    if (name := shipped_name(source)) not in shipped:
        known = ", ".join(shipped)
        raise ValueError(
            f"expected a file of head scores or one of the names {known}, got {source}: kvzip heads make writes one"
        )
    return shipped[name]


def short(source: str) -> str:
    """Returns a source as people call it: the last part of a path, a hub id whole."""
    path = Path(source)
    return path.resolve().name if path.is_dir() else source
