"""Head scores in DuoAttention's format: a table with a row for each layer, and the tokens that dropped heads keep."""

import json
import math
import os
from pathlib import Path

from ..display import visible_line
from .writing import whole_file

TABLE, CONFIG = "full_attention_heads.tsv", "config.json"
SIZES = ("sink_size", "recent_size")  # the only keys of the config


def write(directory: Path, rows: list[list[float]], sizes: tuple[int, int], *, overwrite: bool) -> None:
    """Writes the table and the config, each whole or not at all.

    Raises: FileExistsError for a file that must not be replaced: any, or with `overwrite` any but DuoAttention's;
        OSError if they cannot be written.
    """
    _check_target(directory, overwrite=overwrite)
    directory.mkdir(parents=True, exist_ok=True)
    config = json.dumps(dict(zip(SIZES, sizes, strict=True)), indent=4) + "\n"
    table = "".join("\t".join(f"{value:.18e}" for value in row) + "\n" for row in rows)
    for name, text in ((CONFIG, config), (TABLE, table)):  # config first: `_check_target` knows ours by it
        with whole_file(directory / name, overwrite=None if overwrite else False) as partial:
            partial.write_text(text, encoding="ascii")


def read(directory: Path) -> tuple[list[list[float]], list[int]]:
    """Returns the rows of the table and the sizes. Raises FileNotFoundError; ValueError for files of another form."""
    for name in (TABLE, CONFIG):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"expected {TABLE} and {CONFIG} in {directory}, got no {name}")
    try:
        lines = (directory / TABLE).read_text(encoding="utf-8").splitlines()
        rows = [[float(cell) for cell in line.split("\t")] for line in lines if line.strip()]
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        for key in SIZES:
            if type(config[key]) is not int or config[key] < 0:
                raise ValueError(f"{key} is {config[key]!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"expected a table of tab-separated numbers in {TABLE}, and sink_size and recent_size in {CONFIG}, "
            f"got {directory} where that fails ({error!r})"
        ) from error
    if not rows or len(set(map(len, rows))) != 1 or not all(math.isfinite(x) for row in rows for x in row):
        raise ValueError(
            f"expected a row of as many finite numbers for each layer in {TABLE}, got rows of {[*map(len, rows)]}"
        )
    return rows, [config[key] for key in SIZES]


def _check_target(directory: Path, *, overwrite: bool) -> None:
    there = [name for name in (CONFIG, TABLE) if os.path.lexists(directory / name)]
    if not there:
        return
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict) or set(config) != set(SIZES):
        raise FileExistsError(
            f"expected a directory without {CONFIG} and {TABLE}, or with those of DuoAttention, got "
            f"{visible_line(str(directory))} with another {there[0]}: it is left as it is, choose another directory"
        )
    if not overwrite:
        raise FileExistsError(
            f"expected a directory without {CONFIG} and {TABLE}, got {visible_line(str(directory))} with "
            f"{' and '.join(there)}: pass overwrite=True to replace them, or choose another directory"
        )
