"""The transformer and its families. Nothing here knows that caches exist."""

from ..hub import ALIASES
from .config import LayerSpec, ModelConfig, RopeSpec
from .load import load, translate_config
from .transformer import Attend, Model, forward, logits, run_attention
from .weights import LayerWeights, Weights, empty_weights

__all__ = [
    "ALIASES",
    "Attend",
    "LayerSpec",
    "LayerWeights",
    "Model",
    "ModelConfig",
    "RopeSpec",
    "Weights",
    "empty_weights",
    "forward",
    "load",
    "logits",
    "run_attention",
    "translate_config",
]
