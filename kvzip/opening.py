"""Opens a cache file together with the model that made it. A model that only the file names is never downloaded."""

import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .cache import DenseCache, RaggedCache
from .cache.reading import open_cache, read_cache
from .checks import check_path
from .display import visible_line
from .files.damage import refusing, require
from .files.header import OpenFile
from .files.schema import dtype_of, entry, foreign
from .hub import Loading, resolve
from .models import Model, load

ROUNDING = ("weights", "head_weights", "activations")  # options of `load` that change what a model computes
_LONGEST = 4096  # characters of a source: the limit of a path on Linux


def open(
    path: str | Path,
    *,
    model: str | Path | Model | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    rope: Mapping[str, Any] | None = None,
    max_length: int | None = None,
    weights: str | None = None,
    head_weights: str | None = None,
    activations: str | None = None,
    group: Any = None,
) -> tuple[Model, DenseCache | RaggedCache]:
    """Returns the model that made a cache file, loaded, and the file's cache on the model's device.

        model, cache = kvzip.open("contract.kvz")

    The model that the file names is used if it is a directory here or in the hub's cache. It is never downloaded:
    opening a file must not cause network requests.

    Args:
        model: a model, or the source of one (downloaded if needed), in place of the one that the file names.
        dtype, rope, max_length, weights, head_weights, activations: as for `load`, in place of the file's; the cache
            must be of the model that this gives.
        device: where both go; None takes CUDA where there is one, else the CPU.
        group: a torch.distributed process group whose ranks share the model, as for `load`.

    Raises: FileNotFoundError for no file, or if the model that it names is not here; ValueError for a file that names
        none, a loaded model with options to load one, and whatever `load_cache` and `load` refuse; OSError.
    """
    if isinstance(model, Model):
        options = {"dtype": dtype, "rope": rope, "max_length": max_length}
        options |= {"weights": weights, "head_weights": head_weights, "activations": activations, "group": group}
        given = ", ".join(name for name, value in options.items() if value is not None)
        if given:
            raise ValueError(
                f"expected a loaded model, or how to load one, got a Model and {given}: pass "
                f"model=model.source, or load the model with {given}"
            )
    elif model is not None:
        check_path(model, "model")
    loading = Loading(dtype, device, max_length, rope, weights, head_weights, activations, group)
    with open_cache(path) as file:
        return read(file, model=model, loading=loading)


def read(
    file: OpenFile, *, model: str | Path | Model | None, loading: Loading
) -> tuple[Model, DenseCache | RaggedCache]:
    """Returns the model and the cache of a file that `cache.reading.open_cache` opened, as `open` does."""
    if isinstance(model, Model):
        return model, read_cache(file, model=model, device=loading.device)
    source, made = maker_of(file)
    dtype: Any = loading.dtype or made.dtype or torch.bfloat16  # `load` refuses anything but a dtype
    rounding = {name: getattr(loading, name) or getattr(made, name) for name in ROUNDING}
    loaded = load(
        find(file) if model is None else model,
        dtype=dtype,
        device=loading.device,
        rope=made.rope if loading.rope is None else loading.rope,
        max_length=made.max_length if loading.max_length is None else loading.max_length,
        **{name: how for name, how in (rounding | {"group": loading.group}).items() if how is not None},
    )
    if model is None and source is not None:
        loaded = replace(loaded, source=source)
    reason = foreign(file.header["fingerprint"], loaded.fingerprint)
    if reason:
        own = {"weights": loaded.quantized, "head_weights": loaded.quantized_head, "activations": loaded.activations}
        wanted = _called(source, made.dtype, {name: getattr(made, name) for name in ROUNDING})
        got = _called(loaded.source, loaded.dtype, own)
        raise ValueError(f"expected the model that made {visible_line(file.path.name)}, {wanted}, got {got}: {reason}")
    return loaded, read_cache(file, model=loaded)


def find(file: OpenFile) -> Path:
    """Returns where the model that a file names lies on this machine.

    Raises: FileNotFoundError if it does not; ValueError if the file names none.
    """
    name, (source, _) = visible_line(file.path.name), maker_of(file)
    if source is None:
        raise ValueError(f"expected {name} to say which model made it, got none: pass --model (in Python model=)")
    try:
        return resolve(source, local_only=True)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        shown = visible_line(source, limit=300)
        raise FileNotFoundError(
            f"expected the model that {name} names, {shown}, in a directory here or in the hub's cache, got neither: a "
            f"file does not choose what is fetched, pass --model {shlex.quote(shown)} if you mean it (in Python model=)"
        ) from error


def maker_of(file: OpenFile) -> tuple[str | None, Loading]:
    """Returns the source of the model that made a cache file, and how it was loaded; None where the file says nothing.

    Raises: ValueError for a source that is empty, too long or a network path.
    """
    told = entry(file.header, "model")
    source = told.get("source")
    fits = source is None or (0 < len(source) <= _LONGEST and source[:2] not in ("//", "\\\\"))
    with refusing(file.path):
        require(fits, f"a model from {source!r}")
    dtype = getattr(torch, told.get("dtype") or dtype_of(file.header["fingerprint"]) or "", None)
    how = {name: told.get(name) for name in ("max_length", "rope", *ROUNDING)}
    return source, Loading(dtype, **how)


def _called(source: str | None, dtype: torch.dtype | str | None, rounding: Mapping[str, str | None]) -> str:
    """A model's name for people: that of its directory, or its source, its dtype, and the options that round it."""
    name = "another model" if source is None else Path(source).name if Path(source).is_dir() else source
    how = "".join(f", {option}={value}" for option, value in rounding.items() if value is not None)
    return visible_line(name, limit=300) + (f" in {str(dtype).removeprefix('torch.')}" if dtype else "") + how
