"""The operations on tensors: each has a plain PyTorch reference and a Triton kernel of the same signature."""

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
