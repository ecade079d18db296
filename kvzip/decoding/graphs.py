"""CUDA graphs: captured at first use, replayed later."""

import functools
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class GraphMemory:
    """Memory that graphs share, so none may run while another does.

    torch gives a pool up with its last graph, and fails if a capture names that pool again: a new one is taken then.
    """

    def __init__(self) -> None:
        self.graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._pool: Any = None

    def pool(self) -> Any:
        """The pool of the graphs that are there, or a new one."""
        if not self.graphs:
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool


def capture(run: Callable[[], T], device: torch.device, *, memory: GraphMemory | None = None) -> Callable[[], T]:
    """Returns a function that replays a CUDA graph of what `run` launches, and returns what `run` did.

    Capturing executes nothing. Tensors that are returned are the graph's own: its next replay, or that of a graph that
    shares its memory, writes them again.

    torch gives the memory of deleted graphs back to the driver when an allocation fails, but not during a capture. If
    a capture runs out of memory, that memory is freed here and the capture is tried once more.
    """
    try:
        return _capture_once(run, device, memory)
    except RuntimeError as error:  # torch's OutOfMemoryError, or a driver error without a type of its own
        if "out of memory" not in str(error):
            raise
    torch.cuda.empty_cache()  # not in the except block, where the exception still holds the failed capture's tensors
    return _capture_once(run, device, memory)


def _capture_once(run: Callable[[], T], device: torch.device, memory: GraphMemory | None) -> Callable[[], T]:
    graph = torch.cuda.CUDAGraph()
    stream = _capture_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        # torch.cuda.graph would also collect garbage and empty the allocator's cache, which is slower than the capture
        # relaxed: kernels may be compiled and loaded during the capture
        graph.capture_begin(pool=None if memory is None else memory.pool(), capture_error_mode="relaxed")
        try:
            result = run()
        except BaseException:
            with suppress(RuntimeError):  # ending a broken capture may fail too; the first error is the cause
                graph.capture_end()
            raise
        graph.capture_end()
    torch.cuda.current_stream(device).wait_stream(stream)
    if memory is not None:
        memory.graphs.add(graph)

    def replay() -> T:
        graph.replay()
        return result

    return replay


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream for all captures on a device: cuBLAS keeps a workspace of 32 MiB for every stream it has seen."""
    return torch.cuda.Stream(device)
