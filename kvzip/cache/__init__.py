"""Caches as data: dense, ragged, their bytes and devices."""

from ..files.header import is_kvzip_file
from ..files.writing import check_target, whole_file
from .caches import DenseCache, RaggedCache, as_ragged, check_cache, check_pairs, check_whole, global_layers, nbytes
from .io import load_cache, read_header, read_pieces, save
from .memory import explain_out_of_memory, free_bytes, full_nbytes, to
from .parts import DenseKV, RaggedKV, Scores, Tail, WindowKV, all_ragged, empty_tail, grow_tail
from .score_codes import encode_levels

__all__ = [
    "DenseCache",
    "DenseKV",
    "RaggedCache",
    "RaggedKV",
    "Scores",
    "Tail",
    "WindowKV",
    "all_ragged",
    "as_ragged",
    "check_cache",
    "check_pairs",
    "check_target",
    "check_whole",
    "empty_tail",
    "encode_levels",
    "explain_out_of_memory",
    "free_bytes",
    "full_nbytes",
    "global_layers",
    "grow_tail",
    "is_kvzip_file",
    "load_cache",
    "nbytes",
    "read_header",
    "read_pieces",
    "save",
    "to",
    "whole_file",
]
