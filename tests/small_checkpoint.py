"""A tiny checkpoint in Hugging Face's form that vLLM reads too: random weights, a token per byte, 1,024 rows."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import random_model
from kvzip.models.llama import LAYER_NAMES
from kvzip.models.weights import slots

WORDS = 1024


def write(
    directory: Path, *, seed: int = 0, family: str = "Llama", dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """Writes a checkpoint of "Llama", "Mistral", "Qwen2" or "Qwen3"; `changes` are fields of config.json."""
    directory.mkdir()
    config = random_model.config(
        vocab_size=WORDS, hidden_size=128, intermediate_size=96, head_dim=32, attn_scale=32**-0.5, max_length=2048,
        qkv_bias=family == "Qwen2", qk_norm=family == "Qwen3",
    )  # fmt: skip
    model = random_model.make(config, seed=seed)
    tensors = {
        name if name.startswith("lm_head") else f"model.{name}": tensor.to(dtype, copy=True)
        for name, tensor in slots(config, model.weights, LAYER_NAMES).items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    described = {
        "architectures": [f"{family}ForCausalLM"],
        "model_type": family.lower(),
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "num_hidden_layers": len(config.layers),
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.layers[0].rope.theta},
        "max_position_embeddings": config.max_length,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "eos_token_id": random_model.END,
        "sliding_window": None,
        **({"use_sliding_window": False} if family.startswith("Qwen") else {}),
        **changes,
    }
    (directory / "config.json").write_text(json.dumps(described), encoding="utf-8")
    told = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": random_model.TEMPLATE,
        "eos_token": "<|end|>",
        "model_max_length": config.max_length,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(told), encoding="utf-8")
    model.tokenizer.control.save(str(directory / "tokenizer.json"))
    return directory
