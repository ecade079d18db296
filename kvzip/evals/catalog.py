"""The methods by name: where each shares its budget, and where it is from. Listing them needs no torch."""

CATALOG: dict[str, tuple[str, str]] = {
    "kvzip": ("pair", "KVzip, arXiv 2505.23416"),
    "kvzip-chunk": ("pair", "KVzip, scope chunk"),
    "kvzip+": ("pair", "KVzip+ of KVzap, arXiv 2601.07891, equation 3"),
    "kvzip-heads": ("head", "KVzip, arXiv 2505.23416, section 4.2"),
    "snapkv": ("uniform", "SnapKV, arXiv 2404.14469"),
    "h2o": ("uniform", "H2O, arXiv 2306.14048"),
    "pyramidkv": ("pair", "PyramidKV, arXiv 2406.02069"),
    "adakv": ("layer", "AdaKV, arXiv 2407.11550"),
    "streaming-llm": ("uniform", "StreamingLLM, arXiv 2309.17453"),
    "key-norm": ("uniform", "L2 norm of keys, arXiv 2406.11430"),
    "expected-attention": ("layer", "Expected Attention, arXiv 2510.00636"),
    "random": ("pair", "none"),
}
"""Level (see `compress`) and source of each; `methods.METHODS` has the functions that score."""
