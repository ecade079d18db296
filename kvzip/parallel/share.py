"""What one of several processes has of a model: which of its heads, and the groups in which they talk."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True)
class Share:
    """The part of one of `size` ranks in a model of `heads` KV heads.

    Ranks have neighbouring heads, heads / size each; where there are fewer heads than ranks, size / heads neighbouring
    ranks have the same one, with different query heads. `group` adds up what is on the devices; `host` is a group of
    the same ranks for everything else, on the CPU, so that nothing there waits for a GPU.
    """

    rank: int
    size: int
    heads: int
    group: Any
    host: Any

    @property
    def repeats(self) -> int:
        """How many ranks have the same KV head."""
        return max(1, self.size // self.heads)

    @property
    def own(self) -> slice:
        """This rank's KV heads."""
        first = self.rank * self.heads // self.size
        return slice(first, first + max(1, self.heads // self.size))

    @property
    def speaks(self) -> bool:
        """Whether this rank is the first of those that have its KV heads, and so the one that gives their rows."""
        return self.rank % self.repeats == 0

    @property
    def speakers(self) -> tuple[int, ...]:
        """The ranks that speak; together they have every KV head once, in order."""
        return tuple(range(0, self.size, self.repeats))

    def __repr__(self) -> str:
        return f"Share(rank {self.rank} of {self.size}, KV heads {self.own.start} to {self.own.stop - 1})"


def share_of(group: Any, *, heads: int, fits: Callable[[int], bool], reason: str) -> Share:
    """Returns this process's share of a model. Every rank of the group must call it.

    Args:
        group: a torch.distributed process group; those of NCCL are for CUDA devices.
        heads: KV heads of the model.
        fits: whether so many ranks can divide the model.
        reason: what has to be divided, for the error.

    Raises: ValueError for a number of ranks that does not divide the model, naming those that do; TypeError for what is
        no process group, or one that this process is not in.
    """
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"expected group to be a torch.distributed process group with this process in it, got "
            f"{type(group).__name__}: call torch.distributed.init_process_group and pass torch.distributed.group.WORLD"
        )
    size = dist.get_world_size(group)
    if not fits(size):
        works = [n for n in range(1, 1025) if fits(n)]
        raise ValueError(
            f"expected a number of ranks that divides the model ({reason}), got {size}: use "
            f"{', '.join(map(str, works[:-1]))}{' or ' if len(works) > 1 else ''}{works[-1]}"
        )
    ranks = dist.get_process_group_ranks(group)
    host = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    return Share(dist.get_rank(group), size, heads, group, host)
