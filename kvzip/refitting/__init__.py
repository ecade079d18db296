"""Refitting: what compress kept gets biases and new values, so that the attention of what was dropped is kept."""

from .fitting import Mass, Rows, fit_rows
from .caches import check_refit, refit, refit_and_measure

__all__ = ["Mass", "Rows", "check_refit", "fit_rows", "refit", "refit_and_measure"]
