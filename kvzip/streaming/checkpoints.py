"""Checkpoints of `prefill_compressed`: where one may be, what it holds, and whether a run may resume it."""

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
from .plan import Plan, note_of


def is_begun(path: Path) -> bool:
    """Whether there is a checkpoint to resume.

    Raises: OSError now, not after hours of work, where no file can be written; ValueError for another kind of file.
    """
    check_writable(path, kind="checkpoint")
    if not os.path.lexists(path):  # not `exists`: `save` would refuse a dangling link, so it is refused now
        return False
    if not path.is_file():
        raise ValueError(f"expected a file for the checkpoint, got {path}, which is none: name a file")
    try:
        read_header(path)
    except ValueError as error:
        raise _no_checkpoint(path, str(error)) from error
    return True


def read(model: Model, path: Path, plan: Plan) -> RaggedCache:
    """The cache of the segments that were finished, with their scores.

    Raises: ValueError if the file is no checkpoint, or that of a run with other settings.
    """
    with open_file(path) as file:  # opened once: settings and pairs are of one file, even if it is replaced meanwhile
        _check_settings(path, file.header["note"], note_of(plan))
        check_content(file)
        cache = read_cache(file, model=model)
    if not isinstance(cache, RaggedCache) or cache.scores is None or cache.tail is not None:
        raise _no_checkpoint(path, "it holds another kind of cache")
    packed = [x for layer in cache.context for x in (layer.k, layer.v) if not isinstance(x, Tensor)]
    prefix = tuple(cache.token_ids[: cache.start].tolist())
    if packed or (prefix, cache.chat) != (plan.prefix, plan.template):
        raise _no_checkpoint(path, "its pairs are not those of its settings")
    return cache


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


def _no_checkpoint(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"expected a checkpoint of prefill_compressed, got {path.name}, which is left as it is ({reason}): name another"
    )
