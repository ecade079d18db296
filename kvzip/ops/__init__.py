"""The operations on tensors: each has a plain PyTorch reference and a Triton kernel of the same signature."""

from kvzip.ops.append import append_
from kvzip.ops.decode import decode
from kvzip.ops.linear import linear
from kvzip.ops.merge import merge
from kvzip.ops.norm import rms_norm
from kvzip.ops.prune import prune
from kvzip.ops.quantize import dequantize, quantize, take_rows
from kvzip.ops.rotary import rotary
from kvzip.ops.schedule import decode_schedule
from kvzip.ops.score import score
from kvzip.ops.select import select, select_count, select_uniform, select_uniform_count
from kvzip.ops.types import Channels, DecodeSchedule, Norm, Quantized
from kvzip.ops.weights import Activations, QuantizedWeight, quantize_weight

__all__ = [
    "Activations",
    "Channels",
    "DecodeSchedule",
    "Norm",
    "Quantized",
    "QuantizedWeight",
    "append_",
    "decode",
    "decode_schedule",
    "dequantize",
    "linear",
    "merge",
    "prune",
    "quantize",
    "quantize_weight",
    "rms_norm",
    "rotary",
    "score",
    "select",
    "select_count",
    "select_uniform",
    "select_uniform_count",
    "take_rows",
]
