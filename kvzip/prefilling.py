"""Prefill: a context's tokens to a dense cache, in chunks."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from . import checks, prompts
from .attention import new_layers, prefill_attend
from .cache import DenseCache, explain_out_of_memory
from .checks import check_kind, check_text, check_text_or_ids
from .models import Model, run_attention

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""progress(done, total), in tokens."""

OPENING = 64  # characters of a context that its prefix may depend on


def prefill(
    model: Model,
    context: str | Int64[Tensor, " S"],
    *,
    chunk: int = 16_000,
    system: str | None = None,
    instruction: str | None = None,
    template: bool = True,
    progress: Progress | None = None,
) -> DenseCache:
    """Returns the dense cache of a system prefix and the context, ready to be scored or asked.

    Args:
        context: text, or its token ids without any prefix.
        chunk: tokens per forward pass; bounds the memory for activations, changes nothing else.
        system: system message; None takes what the chat template renders by itself.
        instruction: text that opens the user turn, before the context.
        template: False puts only BOS (if the tokenizer adds one) in front, for base models.
        progress: called with (tokens done, tokens in all).

    Raises: ValueError for an empty context, one beyond `model.config.max_length`, a model without a chat template
        where one is asked for, or system and instruction without a template; torch.OutOfMemoryError that says for what.
    Source: KVzip, arXiv 2505.23416.
    """
    check_kind(model, Model)
    check_text_or_ids(context, "context")
    chunk = checks.whole(chunk, "chunk", least=1)
    prefix, ids = encode(model, context, system=system, instruction=instruction, template=template)
    if len(ids) == 0:
        raise ValueError("expected a context of at least one token, got an empty one: pass the document's text or ids")
    token_ids = torch.cat([torch.tensor(prefix, dtype=torch.long), ids])
    length = len(token_ids)
    check_length(model, length, f"a prefix of {len(prefix)} and a context of {len(ids)} tokens")
    limit = model.config.warn_length
    if limit is not None and length > limit:
        logger.warning("%s positions are beyond the %s for which this model needs dual chunk attention", length, limit)
    size = dense_bytes(model, length)
    with (
        torch.no_grad(),
        explain_out_of_memory(
            f"{size:,} bytes for the pairs of {length} tokens, beside activations of {min(chunk, length)}",
            "lower chunk, use 16-bit weights, or call prefill_compressed, which never holds the full cache",
        ),
    ):
        layers = new_layers(model.config, length, dtype=model.dtype, device=model.device)
        on_device = token_ids.to(model.device)
    for start in range(0, length, chunk):
        piece = on_device[start : start + chunk]
        positions = torch.arange(start, start + len(piece), device=model.device)
        with (
            torch.no_grad(),
            explain_out_of_memory(
                f"the activations of {len(piece)} tokens beside {size:,} bytes of pairs",
                "lower chunk, use 16-bit weights, or call prefill_compressed, which never holds the full cache",
            ),
        ):
            run_attention(model, piece[None], positions, prefill_attend(model.config, layers, start))
        if progress is not None:
            progress(start + len(piece), length)
    return DenseCache(
        layers=layers,
        length=length,
        start=len(prefix),
        chat=bool(template),
        token_ids=token_ids,
        fingerprint=model.fingerprint,
    )


def dense_bytes(model: Model, length: int) -> int:
    """Returns the bytes of a dense cache of `length` tokens; window layers hold their window at most."""
    rows = sum(length if spec.window is None else min(spec.window, length) for spec in model.config.layers)
    return 2 * rows * model.config.num_kv_heads * model.config.head_dim * model.dtype.itemsize


def encode(
    model: Model,
    context: str | Int64[Tensor, " S"],
    *,
    system: str | None = None,
    instruction: str | None = None,
    template: bool = True,
) -> tuple[list[int], Int64[Tensor, " S"]]:
    """Returns the ids in front of a context and the context's, of a text those of both as one text.

    Raises: as `prefix_ids` and `context_ids` do.
    """
    turn: dict[str, Any] = {"system": system, "instruction": instruction, "template": template}
    if isinstance(context, str) and template and prompt_of(model, system=system, instruction=instruction).strips:
        context = context.lstrip()
    ids = context_ids(model, context, before=prefix_text(model, **turn))
    return prefix_ids(model, **turn, context=context[:OPENING] if isinstance(context, str) else ""), ids


def context_ids(model: Model, context: str | Int64[Tensor, " S"], *, before: str = "") -> Int64[Tensor, " S"]:
    """Returns the token ids of a context on the CPU, of a text as it goes on behind `before` (see `prefix_text`).

    Raises: ValueError for ids outside the vocabulary, and whatever `prompts.encode_text` refuses.
    """
    if isinstance(context, str):
        return torch.tensor(prompts.encode_context(tokenizer_of(model), context, before=before), dtype=torch.long)
    ids = context.detach().cpu().long()
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < model.config.vocab_size:
        raise ValueError(
            f"expected token ids in [0, {model.config.vocab_size}), got {int(ids.min())} to {int(ids.max())}: "
            "encode the text with this model's tokenizer"
        )
    return ids


def tokenizer_of(model: Model) -> prompts.Tokenizer:
    """Returns the model's tokenizer. Raises ValueError if its directory has none."""
    if model.tokenizer is None:
        raise ValueError(f"expected a tokenizer, got no tokenizer.json in {model.source}: add it, or pass token ids")
    return model.tokenizer


def prompt_of(model: Model, *, system: str | None = None, instruction: str | None = None) -> prompts.Prompt:
    """Returns the rendered chat prompt. Raises ValueError if the model has no chat template."""
    check_text(system, "system")
    check_text(instruction, "instruction")
    if model.template is None:
        raise ValueError(
            f"expected a chat template, got none in {model.source}: "
            "pass chat_template= (jinja source) to load, or template=False for a base model"
        )
    return prompts.render(model.template, system=system, instruction=instruction)


def prefix_ids(
    model: Model,
    *,
    system: str | None = None,
    instruction: str | None = None,
    template: bool = True,
    context: str = "",
) -> list[int]:
    """Returns the ids in front of a context: the chat template's, or BOS alone (if the tokenizer adds one).

    Args:
        context: how the context begins, which the prefix's last token may depend on (see `prompts.encode_prefix`).

    Raises: ValueError for a model without a chat template, or system and instruction without one.
    """
    if template:
        prompt = prompt_of(model, system=system, instruction=instruction)
        return prompts.encode_prefix(tokenizer_of(model), prompt, context=context)
    if system is not None or instruction is not None:
        raise ValueError("expected no system or instruction with template=False, got one: put it in the context")
    return [] if model.tokenizer is None else list(model.tokenizer.bos_ids)


def prefix_text(
    model: Model, *, system: str | None = None, instruction: str | None = None, template: bool = True
) -> str:
    """Returns the text whose ids `prefix_ids` are, spelled to be passed as `before`; empty without a template."""
    if not template:
        return ""
    return prompts.prefix_text(tokenizer_of(model), prompt_of(model, system=system, instruction=instruction))


def check_length(model: Model, needed: int, what: str) -> None:
    """Raises ValueError if `needed` positions are more than the model was made for."""
    if needed > model.config.max_length:
        raise ValueError(
            f"expected at most {model.config.max_length} positions (the model's length), got {needed} ({what}): "
            "shorten it, or load the model with RoPE scaling (rope=, and max_length=)"
        )
