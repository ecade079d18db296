"""The operations on tensors: each has a plain PyTorch reference and a Triton kernel of the same signature."""

from kvzip.ops.append import append_
from kvzip.ops.contexts import context_table, drop_context_, put_context_
from kvzip.ops.decode import decode
from kvzip.ops.decode_rows import decode_plan, decode_rows
from kvzip.ops.likeliest import likeliest
from kvzip.ops.linear import linear
from kvzip.ops.merge import merge
from kvzip.ops.norm import rms_norm
from kvzip.ops.project import project
from kvzip.ops.prune import prune
from kvzip.ops.quantize import dequantize, quantize, take_rows
from kvzip.ops.quantize_turned import (
    measure_channels_turned,
    quantize_like,
    quantize_turned,
    quantize_turned_ahead,
    shape_feedback,
)
from kvzip.ops.rotary import rotary
from kvzip.ops.schedule import decode_schedule
from kvzip.ops.score import score
from kvzip.ops.select import select, select_count, select_uniform, select_uniform_count
from kvzip.ops.turning import turn
from kvzip.ops.types import (
    Channels,
    Context,
    ContextTable,
    DecodeSchedule,
    Norm,
    Pages,
    Quantized,
    QueryRows,
    TailTensors,
)
from kvzip.ops.weights import Activations, QuantizedWeight, embedding, quantize_weight

__all__ = [
    "Activations",
    "Channels",
    "Context",
    "ContextTable",
    "DecodeSchedule",
    "Norm",
    "Pages",
    "Quantized",
    "QuantizedWeight",
    "QueryRows",
    "TailTensors",
    "append_",
    "context_table",
    "decode",
    "decode_plan",
    "decode_rows",
    "decode_schedule",
    "dequantize",
    "drop_context_",
    "embedding",
    "likeliest",
    "linear",
    "measure_channels_turned",
    "merge",
    "project",
    "prune",
    "put_context_",
    "quantize",
    "quantize_like",
    "quantize_turned",
    "quantize_turned_ahead",
    "quantize_weight",
    "rms_norm",
    "rotary",
    "score",
    "select",
    "select_count",
    "select_uniform",
    "select_uniform_count",
    "shape_feedback",
    "take_rows",
    "turn",
]
