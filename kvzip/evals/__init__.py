"""Evaluation: how much quality is left at which ratio, against other methods, with real eviction."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .tasks import GROUPS, TASKS, Example, Question, Request

if TYPE_CHECKING:
    from .compare import Comparison, compare
    from .methods import METHODS, Method
    from .report import write_report
    from .run import run_eval

__all__ = [
    "GROUPS",
    "METHODS",
    "TASKS",
    "Comparison",
    "Example",
    "Method",
    "Question",
    "Request",
    "compare",
    "run_eval",
    "write_report",
]

_HOMES = {
    "Comparison": "compare",
    "METHODS": "methods",
    "Method": "methods",
    "compare": "compare",
    "run_eval": "run",
    "write_report": "report",
}


class _Package(ModuleType):
    """Its `compare` is the function: importing the module of that name does not put the module in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    """A public name that needs torch, imported when it is first asked for: `kvzip eval tasks` needs none."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
