"""How much memory an engine takes, and how many requests run: what is asked for, or what is free."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import checks
from ..cache import free_bytes
from ..decoding.paged import SIZES
from ..decoding.pages import ROWS, page_bytes, pages_for
from ..models import Model

_RESERVE = 4_000_000_000  # bytes at most of free memory that are left for answers, graphs and activations
_UNKNOWN = 8_000_000_000  # free bytes where they cannot be known
_USUAL = 2_048  # tokens of a question and its answer, by which pages are counted at most


@dataclass(frozen=True)
class Limits:
    """How much memory contexts and answers may take.

    memory: bytes of contexts on the model's device. host_memory: bytes of contexts in pinned memory of the host, 0
    where the model is on the host. directory: where contexts go for which there is no room in either; None: nowhere.
    tail_tokens: tokens of questions and answers of all requests that run. requests: that run at a time. portion:
    question tokens of a step.
    """

    memory: int
    host_memory: int
    directory: Path | None
    tail_tokens: int
    requests: int
    portion: int


def limits_of(
    model: Model, memory: Any, host_memory: Any, directory: Any, tail_tokens: Any, requests: Any, portion: Any
) -> Limits:
    """The limits of an engine, those that are None chosen by what is free now."""
    requests = checks.whole(requests, "requests", least=1)
    portion = checks.whole(portion, "portion", least=1)
    if requests > SIZES[-1] // 2 or portion > SIZES[-1] - requests:
        raise ValueError(
            f"expected requests and portion of at most {SIZES[-1]} together, and at most {SIZES[-1] // 2} requests, "
            f"got {requests} and {portion}: a step has no more rows"
        )
    free = _free_or(model, _UNKNOWN)
    reserve = min(free // 8, _RESERVE)
    if tail_tokens is None:
        longest = pages_for(model.config.max_length)  # of one request
        usual = min(max(requests * pages_for(_USUAL), longest), requests * longest)
        tail_tokens = ROWS * max(1, min(usual, reserve // 2 // page_bytes(model)))
    tail_tokens = checks.whole(tail_tokens, "tail_tokens", least=1)
    if memory is None:
        memory = max(1, (free - reserve) // (1 if model.device.type == "cuda" else 2))
    if host_memory is None:
        host_memory = (free_bytes(torch.device("cpu")) or 0) // 2
    host_memory = checks.whole(host_memory, "host_memory", least=0)
    if model.device.type != "cuda":
        host_memory = 0
    if directory is not None:
        checks.check_path(directory, "directory")
    return Limits(
        checks.whole(memory, "memory", least=1),
        host_memory,
        None if directory is None else Path(directory),
        tail_tokens,
        requests,
        portion,
    )


def _free_or(model: Model, otherwise: int) -> int:
    """Returns the free bytes on the model's device, or `otherwise` where that is not known."""
    free = free_bytes(model.device)
    return otherwise if free is None else free
