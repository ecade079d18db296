"""kvzip: prefill a document once, keep the pairs that matter for any question, answer many questions from the rest."""

from . import head_scores, models, ops, prompts, scores
from .cache import DenseCache, RaggedCache, Scores, load_cache, nbytes, save, to
from .compression import compress, keep_mask
from .conversation import ask, extend, fold, fork
from .decoding import Decoder
from .generation import Answer, generate
from .interop import from_transformers, to_transformers
from .models import Model, ModelConfig, load
from .prefilling import prefill
from .scoring import score
from .streaming import prefill_compressed

__all__ = [
    "Answer",
    "Decoder",
    "DenseCache",
    "Model",
    "ModelConfig",
    "RaggedCache",
    "Scores",
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
    "ops",
    "prefill",
    "prefill_compressed",
    "prompts",
    "save",
    "score",
    "scores",
    "to",
    "to_transformers",
]
__version__ = "0.1.0"
