"""Writing a file whole or not at all: which files may be replaced, whether a path can be written, and the write."""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..display import visible_line
from .header import is_kvzip_file


def is_replaceable(path: str | Path, ours: Callable[[Path], bool] = is_kvzip_file) -> bool | None:
    """Returns whether what is at a path may be replaced, if the caller asks for that; None if nothing is there.

    The one rule, for the library and the command line: only a regular file, or a link to one, that is ours.
    """
    path = Path(path)
    return (path.is_file() and ours(path)) if os.path.lexists(path) else None


def check_target(path: str | Path, *, overwrite: bool = False) -> None:
    """Raises FileExistsError if a file is there that must not be replaced: any, or with `overwrite` any but kvzip's."""
    replaceable, name = is_replaceable(path), visible_line(Path(path).name)
    if replaceable is False:
        wanted, why = ", or one of kvzip's", "which kvzip did not write: it is left as it is, choose another name"
    elif replaceable and not overwrite:
        wanted, why = "", "which is there: pass overwrite=True to replace it, or choose another name"
    else:
        return
    raise FileExistsError(f"expected a new file to write{wanted}, got {name}, {why}")


def check_writable(path: str | Path, *, kind: str | None = None, suffix: str = "") -> None:
    """Raises OSError now, not after hours of work, if `whole_file` could not write to a path. Nothing is left there.

    Args:
        kind: what the file is, for the error.
        suffix: the end of a longer file name that will be written beside it too.
    """
    path = Path(path)
    if not path.parent.is_dir():
        what = f"the {kind} {path.name}" if kind else path.name
        raise FileNotFoundError(f"expected a directory to write {what} in, got no {path.parent}: make it first")
    try:
        os.unlink(_create_beside(path.parent / (path.name + suffix)))
    except OSError as error:
        reason = f"expected a {kind} that can be written, got {error.strerror!r}: name a file elsewhere"
        raise type(error)(error.errno, reason if kind else error.strerror, str(path)) from error


@contextmanager
def whole_file(path: str | Path, *, overwrite: bool | None = None) -> Iterator[Path]:
    """Yields an empty file beside `path` to write to, which replaces it at the end, or is deleted on an error.

    Its mode is what the process's umask leaves of 0666, as of any new file.

    Args:
        overwrite: None replaces whatever file is there; True one of kvzip's alone; False none.
    """
    path = Path(path)
    partial = _create_beside(path)
    try:
        yield partial
        with open(partial, "rb") as written:
            os.fsync(written.fileno())
        if overwrite is not None:
            with suppress(OSError):  # a file is there, or the file system has no hard links
                os.link(partial, path)
                return
            check_target(path, overwrite=overwrite)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _create_beside(path: Path) -> Path:
    """Makes an empty hidden file in the same directory, under a name that no other process has."""
    partial = path.parent / f".{path.name}.{secrets.token_hex(6)}.partial"
    os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return partial
