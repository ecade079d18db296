"""Attention as the stages use it: the strategies that join the transformer to a cache, and dense attention."""

from .dense import causal_attention, window_attention
from .strategies import (
    Formula,
    Sight,
    decode_attend,
    new_layers,
    prefill_attend,
    repeat_attend,
    score_attend,
    score_rows,
    segment_attend,
)

__all__ = [
    "Formula",
    "Sight",
    "causal_attention",
    "decode_attend",
    "new_layers",
    "prefill_attend",
    "repeat_attend",
    "score_attend",
    "score_rows",
    "segment_attend",
    "window_attention",
]
