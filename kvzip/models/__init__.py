"""The transformer and its families. Nothing here knows that caches exist."""

from ..hub import ALIASES
from .config import LayerSpec, ModelConfig, RopeSpec
from .files import read_json
from .identity import StoredTensor, checkpoint_digest, identity_of, stored_tensor
from .load import load, stored_checkpoint, translate_config
from .transformer import Attend, Model, Tails, forward, logits, run_attention
from .weights import LayerWeights, Weights, empty_weights

__all__ = [
    "ALIASES",
    "Attend",
    "LayerSpec",
    "LayerWeights",
    "Model",
    "ModelConfig",
    "RopeSpec",
    "StoredTensor",
    "Tails",
    "Weights",
    "checkpoint_digest",
    "empty_weights",
    "forward",
    "identity_of",
    "load",
    "logits",
    "read_json",
    "run_attention",
    "stored_checkpoint",
    "stored_tensor",
    "translate_config",
]
