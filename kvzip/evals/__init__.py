"""Evaluation: how much quality is left at which ratio, against other methods, with real eviction."""

from .methods import METHODS, Method
from .run import run_eval
from .tasks import GROUPS, TASKS, Example, Question, Request

__all__ = ["GROUPS", "METHODS", "TASKS", "Example", "Method", "Question", "Request", "run_eval"]
