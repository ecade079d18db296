"""Several processes, one model: what each of them has of it, and what they tell each other."""

from .exchange import agreed, everyone, together
from .reduction import REDUCTIONS, Sum, make_sum, whole_logits
from .share import Share, share_of
from .whole import heads_of, select_rows, whole_scores

__all__ = [
    "REDUCTIONS",
    "Share",
    "Sum",
    "agreed",
    "everyone",
    "heads_of",
    "make_sum",
    "select_rows",
    "share_of",
    "together",
    "whole_logits",
    "whole_scores",
]
