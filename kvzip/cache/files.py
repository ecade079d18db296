"""Whole files: tensors and one JSON header in the safetensors format, written whole or not at all, checked when read.

A file is opened once. Its tensors are read into memory of their own, so that they stay what they are whatever becomes
of the file, and each is compared with its checksum.
"""

import hashlib
import json
import math
import os
import secrets
import stat
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..checks import check_mapping, check_path
from ..display import visible_line
from ..version import VERSION as LIBRARY

VERSION = (3, 0)  # of the format: another major version cannot be read, a newer minor one can
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_LIMIT = 1 << 24  # bytes of a header: JSON takes some twenty times as much when it is parsed
_AXES, _LONGEST = 8, 1 << 40  # of a tensor's shape
_ROW = 509  # words of 8 bytes, whose columns are summed: a prime, so that blocks that change places change columns
_PIECE = 1024 * 8 * _ROW  # bytes, about 4 MiB, that are read and summed at a time: a processor's cache holds them
_NONE = "0" * 16  # in place of a checksum that is not known yet


class Bad(Exception):
    """What does not fit together in a file."""


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: bytes start:stop of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class OpenFile:
    """A file of ours, open, its header read and its size found right; `tensors` are those that `read_tensor` reads."""

    path: Path
    header: dict[str, Any]
    tensors: dict[str, Stored]
    raw: FileIO
    helper: ThreadPoolExecutor  # one thread


@contextmanager
def open_file(path: str | Path) -> Iterator[OpenFile]:
    """Gives a file that `write_file` wrote, open.

    Raises: FileNotFoundError; OSError for one that may not be read; ValueError for a directory or a device, and a file
        that is damaged, not kvzip's, or of another major version.
    """
    check_path(path, "path")
    path = Path(path)
    with _opened(path) as raw, ThreadPoolExecutor(1) as helper:
        with refusing(path):
            header, tensors = _read_head(path, raw)
        yield OpenFile(path, header, tensors, raw, helper)


def read_tensor(
    file: OpenFile, name: str, device: str | torch.device = "cpu", *, scratch: Tensor | None = None
) -> Tensor:
    """Returns a tensor of an open file, in memory of its own. Raises Bad if it is not what was written.

    Args:
        scratch: what `staging` gave, through which bytes go to another device.
    """
    place = file.tensors[name]
    file.raw.seek(place.start)
    if scratch is None:
        read = torch.empty(place.stop - place.start, dtype=torch.uint8)
        sums = [file.helper.submit(_sums, piece) for piece in _read_pieces(file.raw, read.numpy())]
        found = read.view(place.dtype).view(place.shape).to(device) if len(read) else None
    else:
        found = torch.empty(place.shape, dtype=place.dtype, device=device)
        sums = _read_through(file, found, scratch)
    digest = _digest(b"".join(future.result() for future in sums))
    require(digest == file.header["checksums"][name], f"{name} differs from its checksum")
    return torch.empty(place.shape, dtype=place.dtype, device=device) if found is None else found


def staging(device: str | torch.device) -> Tensor | None:
    """Returns memory through which `read_tensor` reads tensors that go to another device than the CPU."""
    kind = torch.device(device).type
    return None if kind == "cpu" else torch.empty(4, _PIECE, dtype=torch.uint8, pin_memory=kind == "cuda")


def _read_pieces(raw: FileIO, buffer: np.ndarray) -> Iterator[np.ndarray]:
    """Yields each piece of a buffer when it is read: it is summed while the next one is read."""
    for piece in _pieces(buffer):
        _fill(raw, piece)
        yield piece


def _read_through(file: OpenFile, out: Tensor, scratch: Tensor) -> list[Future[bytes]]:
    """Fills a tensor of another device. A piece is summed and copied while the next ones are read."""
    flat, sums = out.view(-1).view(torch.uint8), []
    copied = [torch.cuda.Event() if out.is_cuda else None for _ in scratch]
    for number, target in enumerate(flat.split(_PIECE) if out.numel() else ()):
        slot = number % len(scratch)
        piece, event = scratch[slot, : len(target)], copied[slot]
        if number >= len(scratch):  # what is in the slot may still be read
            sums[number - len(scratch)].result()
            if event is not None:
                event.synchronize()
        _fill(file.raw, piece.numpy())
        sums.append(file.helper.submit(_sums, piece.numpy()))
        target.copy_(piece, non_blocking=event is not None)
        if event is not None:
            event.record(torch.cuda.current_stream(out.device))
    for event in copied:
        if event is not None:
            event.synchronize()
    return sums


def outline(file: OpenFile, name: str) -> Tensor:
    """Returns a tensor's shape and dtype as a tensor on torch's meta device. Nothing is read."""
    return torch.empty(file.tensors[name].shape, dtype=file.tensors[name].dtype, device="meta")


def write_file(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any],
    *,
    note: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes tensors and a header whole or not at all, a tensor at a time.

    Raises: FileExistsError for a file that is there, unless it is one of kvzip's and `overwrite`; TypeError for a note
        that JSON cannot hold; ValueError for one that is too long; OSError.
    """
    check_mapping(note, "note")
    path = Path(path)
    check_target(path, overwrite=overwrite)
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))  # each aligned, for who maps it
    checksums = dict.fromkeys(ordered, _NONE)
    header = {**header, "version": VERSION, "library": LIBRARY, "note": dict(note or {})}
    size = len(_head(ordered, header, checksums))
    try:
        with whole_file(path, overwrite=overwrite) as partial, open(partial, "wb") as out:
            out.seek(size)
            for name, tensor in ordered.items():
                checksums[name] = _write(out, tensor)
            out.seek(0)
            out.write(_head(ordered, header, checksums))
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk does not say whose


@contextmanager
def whole_file(path: str | Path, *, overwrite: bool | None = None) -> Iterator[Path]:
    """Gives an empty file beside `path` to write to, which takes its place at the end, or is deleted on an error.

    Its mode is what the process's umask leaves of 0666, as of any new file.

    Args:
        overwrite: None replaces whatever file is there; True one of kvzip's alone; False none.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(6)}.partial")
    os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield partial
        with open(partial, "rb") as written:
            os.fsync(written.fileno())
        if overwrite is None or not _link(partial, path):
            if overwrite is not None:
                check_target(path, overwrite=overwrite)
            os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def check_target(path: str | Path, *, overwrite: bool = False) -> None:
    """Raises FileExistsError if a file is there that must not be replaced: any, or with `overwrite` any but kvzip's."""
    path = Path(path)
    if not os.path.lexists(path):
        return
    if not is_kvzip_file(path):
        raise FileExistsError(
            f"expected a new file to write, or one of kvzip's, got {visible_line(path.name)}, which kvzip did not "
            "write: it is left as it is, choose another name"
        )
    if not overwrite:
        raise FileExistsError(
            f"expected a new file to write, got {visible_line(path.name)}, which is there: pass overwrite=True to "
            "replace it, or choose another name"
        )


def is_kvzip_file(path: str | Path) -> bool:
    """Returns whether kvzip wrote a file, of any kind and version, whole or not."""
    try:
        with _opened(Path(path)) as raw:
            metadata = _object(_head_of(raw).decode()).get("__metadata__")
    except (Bad, OSError, ValueError):
        return False
    return isinstance(metadata, dict) and isinstance(metadata.get("kvzip"), str)


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Raises ValueError that names the file for whatever does not fit together within."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Refused as error:
        raise ValueError(str(error)) from error.__cause__
    except (Bad, ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"expected a whole kvzip cache, got {visible_line(path.name)} that is truncated or tampered with "
            f"({visible_line(str(error), limit=300)}): copy it again, or make it again"
        ) from error


class Refused(Exception):
    """What is wrong with a file, in the words of the error that says so."""


def require(condition: bool, reason: str) -> None:
    """Raises Bad with the reason unless the condition holds."""
    if not condition:
        raise Bad(reason)


@contextmanager
def _opened(path: Path) -> Iterator[FileIO]:
    """A regular file, open. A pipe has no end that a reader could wait for, and devices may obey being opened."""
    name = visible_line(path.name)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"expected a cache file, got no file {visible_line(str(path))}") from error
    if stat.S_ISREG(mode):  # else it may have changed since, so it is asked again, and opened without waiting
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        with FileIO(os.open(path, flags)) as raw:
            mode = os.fstat(raw.fileno()).st_mode
            if stat.S_ISREG(mode):
                yield raw
                return
    kind = "a directory" if stat.S_ISDIR(mode) else "a pipe or a device"
    raise ValueError(f"expected a cache file, got {name}, {kind}: name a file that kvzip.save wrote")


def _head_of(raw: FileIO) -> bytes:
    """The bytes of the header."""
    start = raw.read(8)
    require(len(start) == 8, "it has no header")
    (size,) = struct.unpack("<Q", start)
    require(size <= _LIMIT, f"a header of {size} bytes, more than {_LIMIT}")
    require(size <= os.fstat(raw.fileno()).st_size - 8, "it ends within its header")
    head = np.empty(size, np.uint8)
    _fill(raw, head)
    return head.tobytes()


def _read_head(path: Path, raw: FileIO) -> tuple[dict[str, Any], dict[str, Stored]]:
    name = visible_line(path.name)
    start = raw.read(9)
    if len(start) == 9 and start[8:] != b"{":  # where the header of every safetensors file begins
        raise Refused(f"expected a file written by kvzip.save, got {name}, which is none of kvzip's: name another")
    raw.seek(0)
    head = _head_of(raw)
    table = _object(head.decode())
    metadata = table.pop("__metadata__", None)
    try:
        header = _object(metadata["kvzip"])
        major, minor = header["version"]
        require(all(type(n) is int and 0 <= n < 1000 for n in (major, minor)), f"version {header['version']!r}")
    except (Bad, KeyError, TypeError, ValueError) as error:
        raise Refused(f"expected a file written by kvzip.save, got {name} without its header: name another") from error
    if major != VERSION[0]:
        remedy = "read it with the version of kvzip that wrote it"
        if major < VERSION[0]:
            remedy = "made by an older kvzip, compress the document again"
        raise Refused(f"expected version {VERSION[0]}.x, got {major}.{minor} in {name}: {remedy}")
    digest = metadata.get("checksum")
    if not isinstance(digest, str) or len(digest) != len(_NONE):
        raise Bad("its header has no checksum")
    blank = head.replace(digest.encode(), _NONE.encode(), 1)
    require(_digest(blank) == digest, "its header differs from its checksum")
    begin = 8 + len(head)
    tensors = _places(table, begin, os.fstat(raw.fileno()).st_size)
    checksums = header.get("checksums")
    require(isinstance(checksums, dict) and set(checksums) == set(tensors), "checksums of other tensors")
    require(isinstance(header.get("cache"), str), f"cache is {header.get('cache')!r}")
    require(isinstance(header.get("library"), str), f"library is {header.get('library')!r}")
    require(isinstance(header.get("note"), dict), f"note is {header.get('note')!r}")
    return header, tensors


def _places(table: dict[str, Any], begin: int, size: int) -> dict[str, Stored]:
    """Where each tensor lies. Raises Bad unless together they are all that follows the header, each once."""
    places = {}
    for name, entry in table.items():
        require(isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"}, f"{name} is {entry!r}")
        dtype, shape, offsets = _DTYPES.get(str(entry["dtype"])), entry["shape"], entry["data_offsets"]
        known = isinstance(shape, list) and len(shape) <= _AXES
        if dtype is None or not known or not all(type(n) is int and 0 <= n < _LONGEST for n in shape):
            raise Bad(f"shape and dtype of {name}")
        whole = isinstance(offsets, list) and len(offsets) == 2 and all(type(n) is int and n >= 0 for n in offsets)
        require(whole and offsets[1] - offsets[0] == math.prod(shape) * dtype.itemsize, f"the place of {name}")
        places[name] = Stored(dtype, tuple(shape), begin + offsets[0], begin + offsets[1])
    end = begin
    for place in sorted(places.values(), key=lambda place: (place.start, place.stop)):
        require(place.start == end, "tensors that overlap, or bytes between them")
        end = place.stop
    require(end == size, f"{size} bytes, {end} by its header")
    return places


def _object(text: str) -> dict[str, Any]:
    """A JSON object. Raises Bad for other text, keys that are there twice, and numbers that JSON has not."""

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        require(len(dict(found)) == len(found), "a key that is there twice")
        return dict(found)

    def constant(name: str) -> None:
        raise Bad(f"{name} in its header")

    try:
        value = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except RecursionError as error:
        raise Bad("a header too deep to read") from error
    require(isinstance(value, dict), "its header is no object")
    return value


def _head(tensors: Mapping[str, Tensor], header: Mapping[str, Any], checksums: dict[str, str]) -> bytes:
    """The first bytes of a file; as many whatever the checksums."""
    try:
        text = json.dumps({**header, "checksums": checksums}, allow_nan=False)
        _object(text)
    except (Bad, TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"expected a note that JSON can hold, got {error}: write it as text and numbers") from error
    table: dict[str, Any] = {"__metadata__": {"checksum": _NONE, "kvzip": text}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        table[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    head = json.dumps(table, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    if len(head) > _LIMIT:
        raise ValueError(f"expected a header of at most {_LIMIT} bytes, got {len(head)}: shorten the note")
    return struct.pack("<Q", len(head)) + head.replace(_NONE.encode(), _digest(head).encode(), 1)


def _write(out: BinaryIO, tensor: Tensor) -> str:
    """Writes a tensor and returns its checksum."""
    sums = []
    if tensor.numel():
        for piece in _pieces(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()):
            out.write(piece.data)
            sums.append(_sums(piece))
    return _digest(b"".join(sums))


def _sums(piece: np.ndarray) -> bytes:
    """The sums of 8-byte words over the columns of rows of 509, modulo 2**64; zeros fill the last row.

    Any change within one word is seen, and words that are exchanged, but for those at a multiple of 4,072 bytes. A
    cryptographic digest of all bytes would take ten times as long.
    """
    whole = len(piece) // (8 * _ROW) * 8 * _ROW
    last = np.zeros(_ROW, "<i8")
    last.view(np.uint8)[: len(piece) - whole] = piece[whole:]
    last += np.add.reduce(piece[:whole].view("<i8").reshape(-1, _ROW), axis=0)
    return last.tobytes()


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _pieces(buffer: np.ndarray) -> Iterator[np.ndarray]:
    return (buffer[start : start + _PIECE] for start in range(0, len(buffer), _PIECE))


def _fill(raw: FileIO, piece: np.ndarray) -> None:
    view = piece.data
    while len(view):
        count = raw.readinto(view)
        require(bool(count), "it ends too early")
        view = view[count:]


def _link(partial: Path, path: Path) -> bool:
    """Gives the file its name if no file has it, and returns whether that was so."""
    try:
        os.link(partial, path)
    except OSError:  # a file is there, or the file system has no hard links
        return False
    os.unlink(partial)
    return True
