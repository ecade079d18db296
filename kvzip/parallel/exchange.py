"""What ranks tell each other on the host: values, decisions and errors. Without a share there is one process."""

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from .share import Share

T = TypeVar("T")


def everyone(share: Share | None, value: T) -> list[T]:
    """Returns the values that the ranks gave, in their order. Every rank must call it."""
    if share is None:
        return [value]
    found: list[Any] = [None] * share.size
    dist.all_gather_object(found, value, group=share.host)
    return found


def agreed(share: Share | None, decide: Callable[[], T]) -> T:
    """Returns what `decide` returns on the first rank, which alone calls it. An error of it is raised by all."""
    if share is None:
        return decide()
    told: list[Any] = [None, None]
    failure: Exception | None = None
    if share.rank == 0:
        try:
            told[0] = decide()
        except Exception as error:
            failure, told[1] = error, _portable(error)
    dist.broadcast_object_list(told, group=share.host, group_src=0)
    if failure is not None:
        raise failure
    if told[1] is not None:
        raise told[1]
    return told[0]


def gathered(share: Share, x: Tensor) -> Tensor:
    """Returns what the ranks have on their devices, [ranks, ...], in their order. CUDA graphs may capture it."""
    found = x.new_empty(share.size, *x.shape)
    # torch renames it in 2.13 and warns of the older name
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(found.view(-1), x.contiguous().view(-1), group=share.group)
    return found


@contextmanager
def together(share: Share | None) -> Iterator[None]:
    """Within it each rank works for itself; if one of them fails, all do, so that none waits for it in vain.

    A rank raises its own error, others that of the first rank that has one. Nothing within may talk to other ranks.
    """
    if share is None:
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    found = everyone(share, None if failure is None else _portable(failure))
    if failure is not None:
        raise failure
    for error in found:
        if error is not None:
            raise error


def _portable(error: Exception) -> Exception:
    """The error itself if another process can be given it, else one with its message."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = None
    if isinstance(copy, Exception) and type(copy) is type(error) and str(copy) == str(error):
        return copy
    return RuntimeError(f"{type(error).__name__}: {error}")
