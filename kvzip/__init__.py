"""kvzip: prefill a document once, drop the KV pairs that no question needs, answer many questions from the others."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .version import VERSION

if TYPE_CHECKING:
    from . import head_scores, models, ops, prompts, scores, sources
    from .cache import DenseCache, RaggedCache, Scores, load_cache, nbytes, save, to
    from .compression import compress, keep_mask
    from .conversation import append, ask, extend, fold, fork
    from .decoding import Decoder
    from .generation import Answer, generate
    from .interop import from_transformers, to_transformers
    from .models import Model, ModelConfig, load
    from .opening import open
    from .prefilling import prefill
    from .refitting import refit
    from .scoring import score
    from .sources import Source
    from .streaming import prefill_compressed
    from .tuning import tune

__all__ = [
    "Answer",
    "Decoder",
    "DenseCache",
    "Model",
    "ModelConfig",
    "RaggedCache",
    "Scores",
    "Source",
    "append",
    "ask",
    "compress",
    "extend",
    "fold",
    "fork",
    "from_transformers",
    "generate",
    "head_scores",
    "keep_mask",
    "load",
    "load_cache",
    "models",
    "nbytes",
    "open",
    "ops",
    "prefill",
    "prefill_compressed",
    "prompts",
    "refit",
    "save",
    "score",
    "scores",
    "sources",
    "to",
    "to_transformers",
    "tune",
]

__version__ = VERSION

_HOMES = {
    "cache": ("DenseCache", "RaggedCache", "Scores", "load_cache", "nbytes", "save", "to"),
    "compression": ("compress", "keep_mask"),
    "conversation": ("append", "ask", "extend", "fold", "fork"),
    "decoding": ("Decoder",),
    "generation": ("Answer", "generate"),
    "interop": ("from_transformers", "to_transformers"),
    "models": ("Model", "ModelConfig", "load"),
    "opening": ("open",),
    "prefilling": ("prefill",),
    "refitting": ("refit",),
    "scoring": ("score",),
    "sources": ("Source",),
    "streaming": ("prefill_compressed",),
    "tuning": ("tune",),
}


def __getattr__(name: str) -> Any:
    """Returns a public name or a module, imported at first use, so that `kvzip --help` does not wait for torch."""
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None and (name.startswith("_") or find_spec(f"{__name__}.{name}") is None):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = import_module(f"{__name__}.{home or name}")
    if home is not None:
        value = getattr(value, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
