"""Tiny Transformers models with random weights, in which every feature of the architecture changes the logits."""

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 97
WINDOW = 7
LENGTH = 48  # tokens of a test input: longer than the window and than every original RoPE length below

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR_SCALING = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
YARN_SCALING = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}


def llama(**changes: Any) -> PreTrainedConfig:
    base = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "tie_word_embeddings": False}
    return LlamaConfig(**{**SIZES, **base, **changes})


def mistral(**changes: Any) -> PreTrainedConfig:
    base = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "sliding_window": None}
    return MistralConfig(**{**SIZES, "tie_word_embeddings": False, **base, **changes})


def qwen2(**changes: Any) -> PreTrainedConfig:
    base = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "use_sliding_window": False}
    return Qwen2Config(**{**SIZES, **base, **changes})


def qwen3(**changes: Any) -> PreTrainedConfig:
    base = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "use_sliding_window": False}
    return Qwen3Config(**{**SIZES, "head_dim": 12, "tie_word_embeddings": False, **base, **changes})


def gemma2(**changes: Any) -> PreTrainedConfig:
    base = {
        "head_dim": 12,
        "query_pre_attn_scalar": 30,
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 4.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "hidden_activation": "gelu_pytorch_tanh",
    }
    return Gemma2Config(**{**SIZES, **base, **changes})


def gemma3(**changes: Any) -> PreTrainedConfig:
    base = {
        "num_hidden_layers": 4,
        "head_dim": 12,
        "query_pre_attn_scalar": 30,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    }
    return Gemma3TextConfig(**{**SIZES, **base, **changes})


def gemma3_multimodal() -> PreTrainedConfig:
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    return Gemma3Config(
        text_config=gemma3().to_dict(),
        vision_config=vision,
        mm_tokens_per_image=1,
        image_token_index=VOCAB - 1,
        boi_token_index=VOCAB - 2,
        eoi_token_index=VOCAB - 3,
    )


def build(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Returns a model in eval mode, float32, eager attention, with no weight at its initial value."""
    kind = Gemma3ForConditionalGeneration if isinstance(config, Gemma3Config) else AutoModelForCausalLM
    make = kind._from_config if kind is Gemma3ForConditionalGeneration else kind.from_config
    model = make(config, attn_implementation="eager", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim > 1 and "embed_tokens" in name:
                weight.copy_(noise)
            elif weight.ndim > 1:
                peaked = 2.0 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.0
                weight.copy_(noise * peaked / weight.shape[-1] ** 0.5)
            else:  # norms lie around their initial 1 (Gemma: 0), biases around 0
                weight.add_(noise * 0.4)
    return model


def token_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    """Returns random ids that are neither control nor image tokens."""
    return torch.randint(3, VOCAB - 3, shape, generator=torch.Generator().manual_seed(seed))
