"""Writes a GGUF file as a Hugging Face model directory: config, bf16 safetensors, tokenizer, chat template.

For the models of `packages.py`, so only for what its files need: Llama, Qwen 2 and Gemma 3 text models with tied
embeddings.
The weights are dequantized, hence near the original checkpoint and not equal to it.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .gguf_tokenizer import make_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

Metadata = dict[str, Any]  # the key-value part of a GGUF file

_MODEL_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "model.embed_tokens.weight",  # tied: the same table at a higher precision
}
_BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_BLOCK_TENSORS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

# The public Gemma 3 turn format, text only; a leading system message is folded into the first user turn.
_GEMMA_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set first = messages[0]['content'] + '\n\n' -%}{%- set msgs = messages[1:] -%}"
    "{%- else -%}{%- set first = '' -%}{%- set msgs = messages -%}{%- endif -%}"
    "{%- for m in msgs -%}"
    "{%- set role = 'model' if m['role'] == 'assistant' else m['role'] -%}"
    "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '')"
    " + (m['content'] | trim) + '<end_of_turn>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)


@dataclass(frozen=True)
class Family:
    """How one GGUF architecture differs from the common case; absent means as in Llama."""

    config: Callable[[Callable[[str], Any]], dict[str, Any]]  # extra fields of config.json, from the metadata
    block_tensors: dict[str, str]
    rotary_interleaved: bool = False  # llama.cpp interleaves the two rotary halves of q and k
    norm_offset: float = 0.0  # GGUF stores the factor itself, HF the factor less this
    stop_tokens: tuple[str, ...] = ()  # none: the metadata's end-of-sequence token
    writes_bos: bool = True
    chat_template: str | None = None  # none: the metadata's


def _llama_config(_: Callable[[str], Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }


def _qwen2_config(field: Callable[[str], Any]) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": field("block_count"),
    }


def _gemma3_config(field: Callable[[str], Any]) -> dict[str, Any]:
    layers = range(1, field("block_count") + 1)
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "sliding_window": field("attention.sliding_window"),
        "query_pre_attn_scalar": field("attention.key_length"),
        "rope_local_base_freq": 10000.0,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "layer_types": ["full_attention" if i % 6 == 0 else "sliding_attention" for i in layers],
    }


_FAMILIES = {
    "llama": Family(_llama_config, _BLOCK_TENSORS, rotary_interleaved=True),
    "qwen2": Family(_qwen2_config, _BLOCK_TENSORS, stop_tokens=("<|im_end|>", "<|endoftext|>"), writes_bos=False),
    "gemma3": Family(
        _gemma3_config,
        _BLOCK_TENSORS | _GEMMA_BLOCK_TENSORS,
        norm_offset=1.0,
        stop_tokens=("<eos>", "<end_of_turn>"),
        chat_template=_GEMMA_CHAT_TEMPLATE,
    ),
}


def convert(gguf_file: Path, directory: Path) -> None:
    """Writes the model in `gguf_file` into `directory`, which exists and is the caller's.

    Raises: ValueError if the architecture, a tensor or the tokenizer is not one of those understood.
    """
    from gguf import GGUFReader
    from safetensors.torch import save_file

    reader = GGUFReader(gguf_file)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    architecture = metadata["general.architecture"]
    if architecture not in _FAMILIES:
        raise ValueError(
            f"expected a GGUF architecture among {sorted(_FAMILIES)}, got {architecture!r}: convert it with other tools"
        )
    family = _FAMILIES[architecture]
    config = make_config(metadata, family)
    save_file(make_weights(reader.tensors, config, family), directory / "model.safetensors", metadata={"format": "pt"})
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", _generation_config(metadata, config, family))
    _write_json(directory / "tokenizer.json", make_tokenizer(metadata), indent=None)
    _write_json(directory / "tokenizer_config.json", _tokenizer_config(metadata, config, family))


def make_config(metadata: Metadata, family: Family) -> dict[str, Any]:
    """Returns the content of config.json."""

    def field(name: str) -> Any:
        return metadata[f"{metadata['general.architecture']}.{name}"]

    def token_id(name: str) -> int | None:
        return metadata.get(f"tokenizer.ggml.{name}_token_id")

    hidden_size, heads = field("embedding_length"), field("attention.head_count")
    head_width = metadata.get(f"{metadata['general.architecture']}.attention.key_length", hidden_size // heads)
    return {
        "hidden_size": hidden_size,
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv"),
        "head_dim": head_width,
        "max_position_embeddings": field("context_length"),
        "rms_norm_eps": round(field("attention.layer_norm_rms_epsilon"), 9),  # a float32 in the file
        "rope_theta": field("rope.freq_base"),
        "rope_scaling": None,
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "bos_token_id": token_id("bos"),
        "eos_token_id": token_id("eos"),
        "pad_token_id": token_id("padding"),
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    } | family.config(field)


def make_weights(tensors: Iterable[Any], config: dict[str, Any], family: Family) -> "dict[str, Tensor]":
    """Returns the tensors of a GGUF file in bf16, under their HF names and in HF's layout."""
    import numpy as np
    import torch
    from gguf import dequantize

    by_name = {tensor.name: tensor for tensor in tensors}
    if "output.weight" in by_name:
        by_name.pop("token_embd.weight")
    heads = {"attn_q.weight": config["num_attention_heads"], "attn_k.weight": config["num_key_value_heads"]}
    weights = {}
    for name, tensor in by_name.items():
        weight = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        part = name.split(".", 2)[-1]
        if family.rotary_interleaved and part in heads:
            pairs = weight.reshape(heads[part], -1, 2, weight.shape[-1])
            weight = pairs.swapaxes(1, 2).reshape(weight.shape)
        if name.endswith("norm.weight"):
            weight = weight - family.norm_offset
        weights[_hf_name(name, family)] = torch.from_numpy(np.ascontiguousarray(weight)).to(torch.bfloat16)
    return weights


def _hf_name(name: str, family: Family) -> str:
    if name in _MODEL_TENSORS:
        return _MODEL_TENSORS[name]
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[2] not in family.block_tensors:
        raise ValueError(f"expected a tensor known to this converter, got {name!r}: add its HF name to the tables")
    return f"model.layers.{parts[1]}.{family.block_tensors[parts[2]]}.{parts[3]}"


def _generation_config(metadata: Metadata, config: dict[str, Any], family: Family) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    return {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": [tokens.index(token) for token in family.stop_tokens] or config["eos_token_id"],
        "pad_token_id": config["pad_token_id"],
        "do_sample": False,
    }


def _tokenizer_config(metadata: Metadata, config: dict[str, Any], family: Family) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]

    def token(name: str) -> str | None:
        token_id = config[f"{name}_token_id"]
        return None if token_id is None else tokens[token_id]

    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token("bos") if family.writes_bos else None,
        "eos_token": token("eos"),
        "pad_token": token("pad"),
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": family.chat_template or metadata.get("tokenizer.chat_template"),
    }


def _write_json(path: Path, content: dict[str, Any], indent: int | None = 1) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=indent), encoding="utf-8")
