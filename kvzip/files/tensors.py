"""The tensors of a file, read and written: each in memory of its own, compared with its checksum.

Files are read and summed in blocks of about 4 MiB, which stay in a CPU's cache between the two.
"""

from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from ..checks import check_mapping
from ..version import VERSION as LIBRARY
from .damage import require
from .header import OpenFile, digest, encode_head, fill
from .schema import VERSION
from .writing import check_target, whole_file

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_ROW = 509  # 8-byte words of a row, whose columns are summed; prime, so that swapped ranges end in other columns
_BLOCK = 1024 * 8 * _ROW  # bytes


@dataclass(frozen=True)
class Pieces:
    """A tensor to write whose bytes come in pieces of any size, one after the other, when they are asked for."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Tensor]]


def read_tensor(
    file: OpenFile, name: str, device: str | torch.device = "cpu", *, scratch: Tensor | None = None
) -> Tensor:
    """Returns a tensor of an open file, in memory of its own. Raises Damaged if it is not what was written.

    Args:
        scratch: the buffer that `staging` gave for another device than the CPU.
    """
    place, sums = file.tensors[name], []
    file.raw.seek(place.start)
    found = torch.empty(place.shape, dtype=DTYPES[place.dtype], device="cpu" if scratch is None else device)
    if scratch is not None:
        sums = _read_through(file, found, scratch)
    elif found.numel():
        for block in _blocks(found.view(-1).view(torch.uint8).numpy()):
            fill(file.raw, block.data)
            sums.append(file.helper.submit(_sums, block))  # while the next block is read
    total = digest(b"".join(future.result() for future in sums))
    require(total == file.header["checksums"][name], f"{name} differs from its checksum")
    return found.to(device)


def staging(device: str | torch.device) -> Tensor | None:
    """Returns the buffer through which `read_tensor` reads tensors to another device; None for the CPU."""
    kind = torch.device(device).type
    return None if kind == "cpu" else torch.empty(4, _BLOCK, dtype=torch.uint8, pin_memory=kind == "cuda")


def write_file(
    path: str | Path,
    tensors: Mapping[str, Tensor | Pieces],
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
    ordered = {name: tensors[name] for name in in_order(tensors)}
    entries = {name: (_CODES[tensor.dtype], tuple(tensor.shape)) for name, tensor in ordered.items()}
    header = {**header, "version": VERSION, "library": LIBRARY, "note": dict(note or {})}
    size = len(encode_head(entries, header, None))
    try:
        with whole_file(path, overwrite=overwrite) as partial, open(partial, "wb") as out:
            out.seek(size)
            checksums = {name: _write(out, tensor) for name, tensor in ordered.items()}
            out.seek(0)
            out.write(encode_head(entries, header, checksums))
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # errors of a full disk name no file


def in_order(tensors: Mapping[str, Tensor | Pieces]) -> list[str]:
    """Returns the names of tensors as they are written: the widest first, so that all are aligned."""
    return sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)


def blocks_of(file: OpenFile, begin: int, size: int, first: int, end: int) -> Iterator[tuple[int, int, Tensor, bytes]]:
    """Yields the blocks with bytes first:end of a tensor of `size` bytes at `begin`: number, place, bytes, sums."""
    buffer = torch.empty(min(_BLOCK, size), dtype=torch.uint8)
    for number in range(first // _BLOCK, -(-end // _BLOCK) if end > first else 0):
        at = number * _BLOCK
        block = buffer[: min(_BLOCK, size - at)]
        file.raw.seek(begin + at)
        fill(file.raw, block.numpy().data)
        yield number, at, block, _sums(block.numpy())


def _read_through(file: OpenFile, out: Tensor, scratch: Tensor) -> list[Future[bytes]]:
    """Fills a tensor of another device. A block is summed and copied while the next ones are read."""
    flat, sums = out.view(-1).view(torch.uint8), []
    copied = [torch.cuda.Event() if out.is_cuda else None for _ in scratch]
    for number, target in enumerate(flat.split(_BLOCK) if out.numel() else ()):
        slot = number % len(scratch)
        block, event = scratch[slot, : len(target)], copied[slot]
        if number >= len(scratch):  # the block that was in the slot may still be summed, or copied
            sums[number - len(scratch)].result()
            if event is not None:
                event.synchronize()
        fill(file.raw, block.numpy().data)
        sums.append(file.helper.submit(_sums, block.numpy()))
        target.copy_(block, non_blocking=event is not None)
        if event is not None:
            event.record(torch.cuda.current_stream(out.device))
    for event in copied:
        if event is not None:
            event.synchronize()
    return sums


def _write(out: BinaryIO, tensor: Tensor | Pieces) -> str:
    """Writes a tensor and returns its checksum."""
    sums = []
    for block in _filled(tensor.pieces()) if isinstance(tensor, Pieces) else _blocks(_bytes(tensor)):
        out.write(block.data)
        sums.append(_sums(block))
    return digest(b"".join(sums))


def _bytes(tensor: Tensor) -> np.ndarray:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)


def _filled(pieces: Iterator[Tensor]) -> Iterator[np.ndarray]:
    """The bytes of pieces in blocks as of one tensor."""
    buffer, held = np.empty(_BLOCK, np.uint8), 0
    with closing(cast(Generator[Tensor], pieces)):
        for piece in pieces:
            rest = _bytes(piece)
            while len(rest):
                taken = rest[: _BLOCK - held]
                buffer[held : held + len(taken)] = taken
                held, rest = held + len(taken), rest[len(taken) :]
                if held == _BLOCK:
                    yield buffer
                    held = 0
    if held:
        yield buffer[:held]


def _sums(block: np.ndarray) -> bytes:
    """The sums of 8-byte words over the columns of rows of 509, modulo 2**64; zeros fill the last row.

    They show any change within one word, and swapped words unless a multiple of 4,072 bytes apart. A
    cryptographic digest of all bytes would take ten times as long.
    """
    whole = len(block) // (8 * _ROW) * 8 * _ROW
    last = np.zeros(_ROW, "<i8")
    last.view(np.uint8)[: len(block) - whole] = block[whole:]
    last += np.add.reduce(block[:whole].view("<i8").reshape(-1, _ROW), axis=0)
    return last.tobytes()


def _blocks(buffer: np.ndarray) -> Iterator[np.ndarray]:
    return (buffer[at : at + _BLOCK] for at in range(0, len(buffer), _BLOCK))
