"""Ctrl-C at any line: what a signal may do between two lines of a module, done on purpose."""

import sys
from collections.abc import Callable, Sequence
from types import FrameType, ModuleType
from typing import Any


def interrupted(modules: ModuleType | Sequence[ModuleType], line: int, run: Callable[[], object]) -> bool:
    """Whether `run` was stopped by a KeyboardInterrupt before the n-th line of these modules that it comes to."""
    files = {module.__file__ for module in ([modules] if isinstance(modules, ModuleType) else modules)}
    passed = 0

    def step(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal passed
        passed += event == "line"
        if passed == line and event == "line":
            sys.settrace(None)
            raise KeyboardInterrupt
        return step

    before = sys.gettrace()
    sys.settrace(lambda frame, *_: step if frame.f_code.co_filename in files else None)
    try:
        run()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False
