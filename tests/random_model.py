"""Small random models made in memory, with a byte tokenizer and a chat template: for laws that need no real weights."""

from dataclasses import replace

import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

from kvzip.models import (
    LayerSpec,
    Model,
    ModelConfig,
    RopeSpec,
    Weights,
    checkpoint_digest,
    empty_weights,
    stored_tensor,
)
from kvzip.models.gemma import LAYER_NAMES
from kvzip.models.weights import LayerWeights, slots
from kvzip.prompts import ChatTemplate, Tokenizer, make_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CONTROL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
END = 256


def config(**changes: object) -> ModelConfig:
    """A two-layer Llama-like config of 260 tokens; `changes` replace fields, `windows` sets one window per layer."""
    windows = changes.pop("windows", (None, None))
    base = ModelConfig(
        family="random",
        vocab_size=260,
        hidden_size=32,
        intermediate_size=48,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        layers=tuple(LayerSpec(window=w, rope=RopeSpec(theta=1000.0)) for w in windows),
        norm_eps=1e-6,
        norm_offset=0,
        activation="silu",
        embed_scale=1.0,
        attn_scale=8**-0.5,
        attn_softcap=None,
        logit_softcap=None,
        max_length=4096,
        tied=False,
    )
    return replace(base, **changes)


def make(
    config: ModelConfig,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    template: bool = True,
    device: str = "cpu",
) -> Model:
    """A model whose weights depend on the seed alone: the same values in every dtype, up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    weights = empty_weights(config, dtype=torch.float64, device="cpu")

    def fill(x: torch.Tensor) -> None:
        spread = 1.0 if x.ndim == 1 else 2.0 * x.shape[-1] ** -0.5
        x.copy_(torch.randn(x.shape, generator=generator, dtype=torch.float64) * spread)

    for tensor in [weights.embed, weights.norm, weights.unembed, *_layer_tensors(weights)]:
        fill(tensor)
    stored = [stored_tensor(name, tensor) for name, tensor in slots(config, weights, LAYER_NAMES).items()]
    weights = _cast(weights, dtype, device)
    return Model(
        config=config,
        weights=weights,
        tokenizer=tokenizer(),
        device=weights.embed.device,
        dtype=dtype,
        template=ChatTemplate(TEMPLATE) if template else None,
        stop_ids=(END,),
        checkpoint=checkpoint_digest(stored),
        source="random",
    )


def tokenizer() -> Tokenizer:
    """One token per byte, and four control tokens."""

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = RawTokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(token, special=True) for token in CONTROL])
    return make_tokenizer(raw)


def _layer_tensors(weights: Weights) -> list[torch.Tensor]:
    return [t for layer in weights.layers for t in vars(layer).values() if t is not None]


def _cast(weights: Weights, dtype: torch.dtype, device: str) -> Weights:
    layers = tuple(
        LayerWeights(**{name: None if t is None else t.to(device, dtype) for name, t in vars(layer).items()})
        for layer in weights.layers
    )
    embed = weights.embed.to(device, dtype)
    unembed = embed if weights.unembed is weights.embed else weights.unembed.to(device, dtype)
    return Weights(embed=embed, layers=layers, norm=weights.norm.to(device, dtype), unembed=unembed)
