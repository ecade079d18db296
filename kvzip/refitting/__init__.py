"""Refitting: what compress kept gets biases and new values, so that the attention of what was dropped is kept."""

from .caches import check_refit, refit, refit_and_measure
from .fitting import Mass, Rows, fit_rows, mass_of_note, note_of

__all__ = ["Mass", "Rows", "check_refit", "fit_rows", "mass_of_note", "note_of", "refit", "refit_and_measure"]
