"""Evaluation: how much quality is left at which ratio, against other methods, with real eviction."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .tasks import GROUPS, TASKS, Example, Question, Request

if TYPE_CHECKING:
    from .comparison import Comparison, compare
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
    "Comparison": "comparison",
    "METHODS": "methods",
    "Method": "methods",
    "compare": "comparison",
    "run_eval": "run",
    "write_report": "report",
}


def __getattr__(name: str) -> Any:
    """A public name that needs torch, imported when it is first asked for: `kvzip eval tasks` needs none."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
