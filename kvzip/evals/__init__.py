"""Evaluation: how much quality is left at which ratio, against other methods, with real eviction."""

from .compare import Comparison, compare
from .methods import METHODS, Method
from .report import write_report
from .run import run_eval
from .tasks import GROUPS, TASKS, Example, Question, Request

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
