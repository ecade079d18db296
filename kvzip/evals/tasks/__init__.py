"""Tasks by name: each makes contexts with questions, generated at any length or read from data."""

from collections.abc import Iterator
from dataclasses import replace

from . import data, haystack, ruler, synthetic
from .base import Example, Question, Request, Task

TASKS: dict[str, Task] = {task.name: task for module in (haystack, synthetic, ruler, data) for task in module.TASKS}
GROUPS: dict[str, tuple[str, ...]] = {
    "ruler": tuple(task.name for task in ruler.TASKS),
    **{
        f"scbench{size}": tuple(f"scbench_{name}{size}" for name in data.SCBENCH if f"scbench_{name}{size}" in TASKS)
        for size in data.SIZES
    },
    "synthetic": tuple(task.name for task in synthetic.TASKS),
}
"""Names that stand for several tasks."""


def expand(names: list[str]) -> list[str]:
    """Returns task names, each once, with groups replaced by their tasks; "ruler@4096" gives each of them the length.

    Raises: ValueError for an unknown name or a length that is no number.
    """
    found = []
    for name in names:
        stem, at, length = name.partition("@")
        if at and not length.isdecimal():
            raise ValueError(f"expected a length in tokens after @, as in kv@4096, got {name!r}")
        for own in GROUPS.get(stem, (stem,)):
            if own not in TASKS:
                raise ValueError(f"expected tasks or groups among {sorted([*TASKS, *GROUPS])}, got {stem!r}")
            found.append(own + at + length)
    return list(dict.fromkeys(found))


def examples(name: str, request: Request) -> Iterator[Example]:
    """Yields the examples of a task such as "squad" or "kv@4096"; without a length the task's own is taken."""
    stem, at, length = expand([name])[0].partition("@")
    task = TASKS[stem]
    yield from task.make(replace(request, length=int(length) if at else task.length))


__all__ = ["GROUPS", "TASKS", "Example", "Question", "Request", "Task", "examples", "expand"]
