"""A file that several ranks share: the first writes it from what the others send, and each reads its own part."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..parallel import Share, everyone
from .damage import require
from .header import OpenFile, digest
from .tensors import DTYPES, Pieces, blocks_of, in_order, write_file

_SENT = 32 << 20  # bytes sent at once


def write_shared(
    share: Share,
    path: Path,
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any],
    *,
    divided: Callable[[str], bool],
    note: Mapping[str, Any] | None,
    overwrite: bool,
) -> None:
    """Writes a file as `tensors.write_file` does, of the parts of all ranks; every rank must call it.

    The first rank holds what is sent of one part of one tensor at a time. If it fails, all raise its error.

    Args:
        divided: whether a tensor of this name is a rank's part. Parts follow each other in the order of ranks, along
            the first axis of more than one entry; of ranks that share heads one is taken.
    """
    shapes = everyone(share, {name: tuple(x.shape) for name, x in tensors.items() if divided(name)})
    names = [name for name in in_order(tensors) if divided(name)]
    failure: Exception | None = None
    if share.rank:
        for name in names:
            if not _told(share):
                break
            if share.speaks:
                for block in _sent(tensors[name]):
                    dist.send(block, group=share.host, group_dst=0)
    else:
        begun: list[str] = []
        whole: dict[str, Tensor | Pieces] = {}
        for name, x in tensors.items():
            sizes = [shapes[n].get(name, ()) for n in share.speakers]
            parts = partial(_received, share, name, x, [shape for shape in sizes], begun)
            whole[name] = Pieces(x.dtype, _joined(sizes), parts) if divided(name) else x
        try:
            write_file(path, whole, header, note=note, overwrite=overwrite)
        except Exception as error:
            failure = error
        if len(begun) < len(names):
            _told(share, go_on=False)
    errors = everyone(share, failure)
    if failure is not None:
        raise failure
    for error in errors:
        if error is not None:
            raise error


def _told(share: Share, *, go_on: bool = True) -> bool:
    """Whether the first rank goes on, which says so to the others."""
    flag = torch.tensor([go_on], dtype=torch.uint8)
    dist.broadcast(flag, group=share.host, group_src=0)
    return bool(flag)


def _joined(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    axis = _axis(shapes[0])
    return (*shapes[0][:axis], sum(shape[axis] for shape in shapes), *shapes[0][axis + 1 :])


def _axis(shape: tuple[int, ...]) -> int:
    """The axis along which ranks have parts: heads, behind that of the one question, or rows."""
    return 1 if len(shape) == 4 else 0


def _sent(tensor: Tensor) -> Iterator[Tensor]:
    """The bytes of a tensor in blocks on the host."""
    for block in tensor.detach().contiguous().view(-1).view(torch.uint8).split(_SENT) if tensor.numel() else ():
        yield block.cpu()


def _received(
    share: Share, name: str, own: Tensor, shapes: list[tuple[int, ...]], begun: list[str]
) -> Iterator[Tensor]:
    """Yields the blocks of a tensor, first the own ones; receives the rest too if the caller stops."""
    begun.append(name)
    _told(share)
    incoming = []
    for rank, shape in zip(share.speakers[1:], shapes[1:], strict=True):
        size = own.new_empty(shape, device="meta").nbytes
        incoming += [(rank, min(_SENT, size - at)) for at in range(0, size, _SENT)]
    try:
        yield from _sent(own)
        while incoming:
            rank, size = incoming.pop(0)
            block = torch.empty(size, dtype=torch.uint8)
            dist.recv(block, group=share.host, group_src=rank)
            yield block
    except GeneratorExit:
        for rank, size in incoming:
            dist.recv(torch.empty(size, dtype=torch.uint8), group=share.host, group_src=rank)
        raise


@dataclass(frozen=True)
class SharedSums:
    """Sums of the blocks that this rank answers for, by tensor, until `check` has those of all ranks."""

    share: Share
    sums: dict[str, dict[int, bytes]] = field(default_factory=dict)

    def read(self, file: OpenFile, name: str, start: int, stop: int, device: torch.device | str) -> Tensor:
        """Returns entries start:stop of a tensor along the axis on which it is divided. Its checksum comes later.

        Whole blocks are read: up to one more at both ends. A block belongs to the rank that has its first byte.
        """
        place = file.tensors[name]
        axis, dtype = _axis(place.shape), DTYPES[place.dtype]
        require(all(n == 1 for n in place.shape[:axis]), f"{name} of shape {list(place.shape)}")
        each = torch.empty(place.shape[axis + 1 :], dtype=dtype, device="meta").nbytes
        first, end = start * each, stop * each
        shape = (*place.shape[:axis], stop - start, *place.shape[axis + 1 :])
        found = torch.empty(shape, dtype=dtype, device=device)
        flat = found.view(-1).view(torch.uint8) if found.numel() else torch.empty(0, dtype=torch.uint8)
        mine = self.sums.setdefault(name, {})
        size = place.shape[axis] * each
        for number, at, block, sums in blocks_of(file, place.start, size, first, end):
            low, high = max(first, at), min(end, at + len(block))
            flat[low - first : high - first].copy_(block[low - at : high - at])
            if first <= at < end and self.share.speaks:
                mine[number] = sums
        return found

    def check(self, file: OpenFile) -> None:
        """Raises Damaged, on all ranks alike, if a tensor that was read is not what was written."""
        found = everyone(self.share, self.sums)
        for name in self.sums:
            blocks = {number: sums for of_rank in found for number, sums in of_rank.get(name, {}).items()}
            total = digest(b"".join(blocks[number] for number in sorted(blocks)))
            require(total == file.header["checksums"][name], f"{name} differs from its checksum")
