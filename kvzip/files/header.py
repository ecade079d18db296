"""The head of a file: where each tensor lies and kvzip's JSON header, written, read and checked."""

import hashlib
import json
import math
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from ..display import visible_line
from .damage import Damaged, Refused, refusing, require
from .schema import VERSION, check_header

_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1}  # bytes of a value, by dtype
_LIMIT = 1 << 24  # bytes of a header; once parsed, JSON takes about twenty times as much
_AXES, _LONGEST = 8, 1 << 40  # limits of a shape: number of axes, and length of one
_NONE = "0" * 16  # placeholder of a checksum, as long as one


@dataclass(frozen=True)
class Place:
    """A tensor in a file: its dtype as safetensors calls it, and where it lies, bytes start:stop of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class OpenFile:
    """A file of ours, open, its header checked and its size found right; `tensors.read_tensor` reads its tensors."""

    path: Path
    header: dict[str, Any]
    tensors: dict[str, Place]
    raw: FileIO
    helper: ThreadPoolExecutor  # one thread, which computes checksums


@contextmanager
def open_file(path: str | Path) -> Iterator[OpenFile]:
    """Opens a file that `tensors.write_file` wrote, once: header and tensors come from the same file.

    Raises: FileNotFoundError; OSError for one that may not be read; ValueError for a directory or a device, and a file
        that is damaged, not kvzip's, or of another major version.
    """
    path = Path(path)
    with _opened(path) as raw, ThreadPoolExecutor(1) as helper:
        with refusing(path):
            header, tensors = _read_head(visible_line(path.name), raw)
        yield OpenFile(path, header, tensors, raw, helper)


def is_kvzip_file(path: str | Path) -> bool:
    """Returns whether kvzip wrote a file, of any kind and version, whole or not."""
    return isinstance(_metadata(Path(path)).get("kvzip"), str)


def peek(path: str | Path) -> dict[str, Any]:
    """Returns what a file of kvzip says of itself, of any version and unchecked; {} for any other file."""
    try:
        return _object(str(_metadata(Path(path)).get("kvzip")))
    except (Damaged, ValueError):
        return {}


def is_something_else(file: BinaryIO | FileIO) -> bool:
    """Returns whether an open file does not begin as safetensors files do. A shorter one counts as damaged instead."""
    begin = file.read(9) or b""
    file.seek(0)
    return len(begin) == 9 and begin[8:] != b"{"  # byte 8 begins the JSON header


def encode_head(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], header: Mapping[str, Any], checksums: Mapping[str, str] | None
) -> bytes:
    """Returns the head of a file. Its length is the same with and without checksums.

    Args:
        tensors: the dtype and shape of each, in the order of their data.
        checksums: of each tensor; None if they are not known yet.

    Raises: TypeError for a header that JSON cannot hold; ValueError for one that is too long.
    """
    sums = dict.fromkeys(tensors, _NONE) if checksums is None else {name: checksums[name] for name in tensors}
    try:
        text = json.dumps({**header, "checksums": sums}, allow_nan=False)
        _object(text)
    except (Damaged, TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"expected a note that JSON can hold, got {error}: write it as text and numbers") from error
    table: dict[str, Any] = {"__metadata__": {"checksum": _NONE, "kvzip": text}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * _SIZES[dtype]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    head = json.dumps(table, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    if len(head) > _LIMIT:
        raise ValueError(f"expected a header of at most {_LIMIT} bytes, got {len(head)}: shorten the note")
    return struct.pack("<Q", len(head)) + head.replace(_NONE.encode(), digest(head).encode(), 1)


def digest(data: bytes) -> str:
    """Returns the checksum of a header, or of a tensor's sums, in hex."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def fill(raw: FileIO, view: memoryview) -> None:
    """Reads as many bytes as a view has. Raises Damaged if the file has fewer."""
    while len(view):
        count = raw.readinto(view)
        require(bool(count), "it ends too early")
        view = view[count:]


@contextmanager
def _opened(path: Path) -> Iterator[FileIO]:
    """Opens a regular file, and no other: reading a pipe may never end, and opening a device may start it."""
    name = visible_line(path.name)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"expected a cache file, got no file {visible_line(str(path))}") from error
    if stat.S_ISREG(mode):  # a pipe may replace it before it is open, hence O_NONBLOCK and a second check
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
    length = raw.read(8) or b""
    require(len(length) == 8, "it has no header")
    (size,) = struct.unpack("<Q", length)
    require(size <= _LIMIT, f"a header of {size} bytes, more than {_LIMIT}")
    require(size <= os.fstat(raw.fileno()).st_size - 8, "it ends within its header")
    head = bytearray(size)
    fill(raw, memoryview(head))
    return bytes(head)


def _metadata(path: Path) -> dict[str, Any]:
    """The `__metadata__` of a safetensors file; {} for any other file."""
    try:
        with _opened(path) as raw:
            metadata = _object(_head_of(raw).decode()).get("__metadata__")
    except (Damaged, OSError, ValueError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def _read_head(name: str, raw: FileIO) -> tuple[dict[str, Any], dict[str, Place]]:
    if is_something_else(raw):
        raise Refused(f"expected a file written by kvzip.save, got {name}, which is none of kvzip's: name another")
    head = _head_of(raw)
    table = _object(head.decode())
    metadata = table.pop("__metadata__", None)
    try:
        header = _object(metadata["kvzip"])
        major, minor = header["version"]
        require(all(type(n) is int and 0 <= n < 1000 for n in (major, minor)), f"version {header['version']!r}")
    except (Damaged, KeyError, TypeError, ValueError) as error:
        raise Refused(f"expected a file written by kvzip.save, got {name} without its header: name another") from error
    if major != VERSION[0]:
        remedy = "read it with the version of kvzip that wrote it"
        if major < VERSION[0]:
            remedy = "made by an older kvzip, compress the document again"
        raise Refused(f"expected version {VERSION[0]}.x, got {major}.{minor} in {name}: {remedy}")
    found = metadata.get("checksum")
    require(isinstance(found, str) and len(found) == len(_NONE), "its header has no checksum")
    blank = head.replace(found.encode(), _NONE.encode(), 1)
    require(digest(blank) == found, "its header differs from its checksum")
    tensors = _places(table, 8 + len(head), os.fstat(raw.fileno()).st_size)
    checksums = header.get("checksums")
    require(isinstance(checksums, dict) and set(checksums) == set(tensors), "checksums of other tensors")
    check_header(header)
    return header, tensors


def _places(table: dict[str, Any], begin: int, size: int) -> dict[str, Place]:
    """Where each tensor lies. Raises Damaged unless they fill the rest of the file without gaps or overlaps."""
    places = {}
    for name, entry in table.items():
        require(isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"}, f"{name} is {entry!r}")
        dtype, shape, offsets = str(entry["dtype"]), entry["shape"], entry["data_offsets"]
        known = dtype in _SIZES and isinstance(shape, list) and len(shape) <= _AXES
        require(known and all(type(n) is int and 0 <= n < _LONGEST for n in shape), f"shape and dtype of {name}")
        whole = isinstance(offsets, list) and len(offsets) == 2 and all(type(n) is int and n >= 0 for n in offsets)
        require(whole and offsets[1] - offsets[0] == math.prod(shape) * _SIZES[dtype], f"the place of {name}")
        places[name] = Place(dtype, tuple(shape), begin + offsets[0], begin + offsets[1])
    end = begin
    for place in sorted(places.values(), key=lambda place: (place.start, place.stop)):
        require(place.start == end, "tensors that overlap, or bytes between them")
        end = place.stop
    require(end == size, f"{size} bytes, {end} by its header")
    return places


def _object(text: str) -> dict[str, Any]:
    """A JSON object. Raises Damaged for other text, duplicate keys, NaN and infinities."""
    try:
        value = json.loads(
            text, object_pairs_hook=_pairs, parse_constant=lambda x: require(False, f"{x} in its header")
        )
    except RecursionError as error:
        raise Damaged("a header too deep to read") from error
    require(isinstance(value, dict), "its header is no object")
    return value


def _pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
    require(len(dict(found)) == len(found), "a key that is there twice")
    return dict(found)
