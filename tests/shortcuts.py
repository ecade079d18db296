"""What makes tests quicker and changes no result."""

import itertools
from typing import Any

import pytest
from _pytest import runner


def run_with_room(item: pytest.Item, next_item: pytest.Item | None) -> bool:
    """Runs a test with room on Python's own stack.

    Python keeps the frames of its functions in chunks of 16 KiB, and gives a chunk back when its first frame ends: a
    loop whose calls begin just where a chunk ends has memory mapped and unmapped at each call. Where chunks end is a
    matter of how deep pytest stands; it took a tenth of all time. This function claims a frame of 560 KB, so that a
    chunk of 1 MiB is taken for it and holds the frames of the test too; only what is used becomes memory.
    """
    return runner.pytest_runtest_protocol(item, next_item)


run_with_room.__code__ = run_with_room.__code__.replace(co_stacksize=70_000)


def patch_once(interpreter: Any) -> Any:
    """Triton's `_patch_builtin`, which leaves alone what is patched already.

    The interpreter puts its own functions in the place of those of `triton.language`, at a launch and again at each
    call of a jitted function by another, where it looks through hundreds of names to find that nothing is left to do.
    A third of a kernel's time went there. All names of a package change together, so one of them tells.
    """
    patch, is_builtin = interpreter._patch_builtin, interpreter.tl.core.is_builtin
    probes: dict[Any, str] = {}

    def patched(package: Any, *rest: Any) -> None:
        if package in probes and not is_builtin(getattr(package, probes[package])):
            return
        found = (name for name in dir(package) if is_builtin(getattr(package, name)))
        probes.update((package, name) for name in itertools.islice(found, 1))
        patch(package, *rest)

    return patched
