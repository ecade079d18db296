"""Models of published shapes with random weights, for measuring where real ones cannot be had."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

from benchmarks.linear import random_weight
from kvzip import DenseCache, prompts
from kvzip.cache import Scores
from kvzip.models import LayerWeights, Model, Weights, checkpoint_digest, empty_weights, stored_tensor
from kvzip.models.division import COLUMNS, divided, share_in
from kvzip.models.load import translate_config
from kvzip.models.weights import LINEAR, named_tensors, named_weights
from kvzip.parallel import agreed, make_sum
from kvzip.parallel.reduction import head_rows
from kvzip.prompts import ChatTemplate, Tokenizer, make_tokenizer

CONFIGS = Path(__file__).parents[1] / "tests" / "data" / "configs"
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CONTROL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def shapes() -> list[str]:
    """Returns the names of the shapes that are known."""
    return sorted(path.stem for path in CONFIGS.glob("*.json"))


def random_model(
    name: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    layers: int | None = None,
    max_length: int | None = None,
    form: str | None = None,
    group: Any = None,
) -> Model:
    """Returns a model of a published shape with normally distributed weights; it never stops by itself.

    Args:
        layers: how many, counted from the first; None takes all.
        max_length: in place of the config's.
        form: one of `linear.FORMS` for linear layers of random codes; no 16-bit ones are made before.
        group: a process group whose ranks share the model, as for `kvzip.load`.
    """
    config = translate_config(json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8")))
    config = replace(config, layers=config.layers[:layers], max_length=max_length or config.max_length)
    share = share_in(config, group)
    own, rows = divided(config, share), head_rows(share, config.vocab_size)
    weights = empty_weights(
        own,
        dtype=dtype,
        device=device if form is None else "meta",
        head=None if share is None else rows.stop - rows.start,
    )
    if form is not None:
        weights = _in_codes(weights, form, device)
    alike = torch.Generator(weights.embed.device).manual_seed(0)  # what every rank has whole
    apart = alike if share is None else torch.Generator(weights.embed.device).manual_seed(1 + share.rank)
    for called, tensor in named_weights(weights):
        if not isinstance(tensor, torch.Tensor):
            continue
        field = called.rpartition(".")[2]
        if tensor.ndim > 1:
            inputs = tensor.shape[-1] * (share.size if share is not None and field in COLUMNS else 1)
            tensor.normal_(std=inputs**-0.5, generator=alike if field == "embed" else apart)
        else:
            noise = torch.empty_like(tensor).normal_(std=0.1, generator=apart if field == "qkv_bias" else alike)
            tensor.fill_(1 - config.norm_offset).add_(noise)
    if share is not None and config.tied:
        weights = replace(weights, unembed=weights.embed[rows])
    return Model(
        config=own,
        weights=weights,
        tokenizer=_tokenizer(config.vocab_size),
        device=weights.embed.device,
        dtype=dtype,
        template=ChatTemplate(TEMPLATE),
        stop_ids=(),
        checkpoint=agreed(share, lambda: checkpoint_digest(stored_tensor(*x) for x in named_tensors(weights))),
        source=name,
        quantized=form,
        share=share,
        whole=config,
        add=None if share is None else make_sum(share, device=weights.embed.device, dtype=dtype),
    )


def _in_codes(meta: Weights, form: str, device: torch.device | str) -> Weights:
    """Weights of the same shapes on a device: linear layers of random codes, the others uninitialised."""

    def real(field: str, tensor: Any) -> Any:
        if isinstance(tensor, torch.Tensor):
            return random_weight(form, *tensor.shape, device=device) if field in LINEAR else empty(tensor)
        return tensor

    def empty(tensor: Any) -> Any:
        return torch.empty_like(tensor, device=device)

    layers = [LayerWeights(**{field: real(field, x) for field, x in vars(layer).items()}) for layer in meta.layers]
    embed = empty(meta.embed)
    unembed = embed if meta.unembed is meta.embed else empty(meta.unembed)
    return Weights(embed=embed, layers=tuple(layers), norm=empty(meta.norm), unembed=unembed)


def with_scores(cache: DenseCache, model: Model) -> DenseCache:
    """The cache with random scores whose heads differ as real ones do: some keep most of their pairs, some few."""
    layers = tuple(i for i, spec in enumerate(model.config.layers) if spec.window is None)
    generator = torch.Generator(model.device).manual_seed(1)
    shape = (len(layers), cache.all_heads, cache.length - cache.start)
    values = torch.rand(shape, generator=generator, device=model.device)
    values += 0.5 * torch.randn(shape[:2], generator=generator, device=model.device)[..., None]
    return replace(
        cache, scores=Scores(values=values, layers=layers, start=cache.start, stop=cache.length, source="random")
    )


def _tokenizer(size: int) -> Tokenizer:
    """One token for each word of the repeat prompts, which are then as long as a real model's; else one per byte.

    Random weights answer with any of `size` tokens, so the others are numbers, which no text is read as.
    """
    words = sorted(set(re.findall(r" ?\w+", prompts.REPEAT_FIRST + prompts.REPEAT_NEXT)))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    space, others = "\u0120", range(len(alphabet), size - len(words) - len(CONTROL))
    vocab = {name: i for i, name in enumerate([*alphabet, *(f"{space}{i}" for i in others)])}
    raw = RawTokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_tokens([AddedToken(word) for word in words])
    raw.add_special_tokens([AddedToken(token, special=True) for token in CONTROL])
    return make_tokenizer(raw)
