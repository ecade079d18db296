"""The file of a run that was interrupted: what it holds, and whether a run may go on from it."""

import json
import os
import reprlib
from pathlib import Path
from typing import Any

from torch import Tensor

from ..cache import RaggedCache, read_header
from ..cache.reading import check_content, read_cache
from ..files.header import open_file
from ..files.writing import check_writable
from ..models import Model
from .segments import Run, run_of


def note_of(path: Path) -> dict[str, Any] | None:
    """The note of the checkpoint that goes on, None where there is none yet.

    Raises: OSError now, not after hours of work, where no file can be written; ValueError for another kind of file.
    """
    check_writable(path, kind="checkpoint")
    if not os.path.lexists(path):  # a link to nothing is refused when the file is written, after the work
        return None
    if not path.is_file():
        raise ValueError(f"expected a file for the checkpoint, got {path}, which is none: name a file")
    try:
        note = read_header(path).get("note")
    except ValueError as error:
        raise _no_checkpoint(path, str(error)) from error
    return note


def _no_checkpoint(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"expected a checkpoint of prefill_compressed, got {path.name}, which is left as it is ({reason}): name another"
    )


def resume(model: Model, path: Path, settings: dict[str, Any], spans: list[tuple[int, int]]) -> Run:
    """The run that a checkpoint holds. Raises ValueError if it is none, or was made with other arguments."""
    with open_file(path) as file:  # once, so that settings and pairs are of one file, whatever replaces it meanwhile
        _check_settings(path, file.header["note"], settings)
        check_content(file)
        cache = read_cache(file, model=model)
    if not isinstance(cache, RaggedCache) or cache.scores is None or cache.tail is not None:
        raise _no_checkpoint(path, "it holds another kind of cache")
    packed = [x for layer in cache.context for x in (layer.k, layer.v) if not isinstance(x, Tensor)]
    prefix = cache.token_ids[: cache.start].tolist()
    if packed or (prefix, cache.chat) != (settings["prefix"], settings["template"]):
        raise _no_checkpoint(path, "its pairs are not those of its settings")
    return run_of(cache, (cache.scores.values.cpu(),), spans)


def _check_settings(path: Path, note: dict[str, Any], settings: dict[str, Any]) -> None:
    if not note.keys() >= settings.keys():
        raise _no_checkpoint(path, "its note holds no settings of a run")
    for name, value in settings.items():
        if json.dumps(note[name]) != json.dumps(value):
            wanted, got = f"with {name}={value}", reprlib.repr(note[name])
            if name == "expected" and type(value) is type(note[name]) is int:
                wanted, got = f"over {value:,} tokens", f"one over {note[name]:,}"
            raise ValueError(
                f"expected a checkpoint of a run {wanted}, got {got} in {path.name}: "
                "give the arguments that it was begun with, or another file"
            )
