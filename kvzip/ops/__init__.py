"""Functional ops: each a contract, a plain PyTorch reference and a Triton kernel. Nothing here knows of models or caches."""

from kvzip.ops.decode import DecodeSchedule, decode, decode_schedule, merge
from kvzip.ops.prune import prune
from kvzip.ops.quantize import Quantized, dequantize, quantize
from kvzip.ops.score import score
from kvzip.ops.select import select, select_count, select_uniform

__all__ = [
    "DecodeSchedule",
    "Quantized",
    "decode",
    "decode_schedule",
    "dequantize",
    "merge",
    "prune",
    "quantize",
    "score",
    "select",
    "select_count",
    "select_uniform",
]
