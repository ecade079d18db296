"""Prefill: runs the model over a context in chunks and returns the dense cache."""

import logging
from collections.abc import Callable

import torch
from jaxtyping import Int64
from torch import Tensor

from . import checks, options
from .attention import new_layers, prefill_attend
from .cache import DenseCache, RaggedCache, explain_out_of_memory
from .cache.caches import check_cache
from .checks import check_kind, check_text_or_ids
from .inputs import check_belongs, check_length, encode
from .models import Model, run_attention

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""progress(done, total), in tokens."""


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
    """Returns the dense cache of the system prefix and the context, ready to be scored or asked.

    Args:
        context: text, or its token ids without any prefix.
        chunk: tokens per forward pass; bounds the memory for activations and does not change the result.
        system: system message; None takes the chat template's default.
        instruction: text at the beginning of the user turn, before the context.
        template: False puts only BOS (if the tokenizer adds one) in front, for base models.
        progress: called with (tokens done, tokens in all).

    Raises: ValueError for an empty context, one beyond `model.config.max_length`, a model without a chat template
        unless template=False, or system or instruction without a template; torch.OutOfMemoryError that says what
        needed the memory.
    Source: KVzip, arXiv 2505.23416.
    """
    check_kind(model, Model)
    check_text_or_ids(context, "context")
    chunk = checks.whole(chunk, "chunk", least=1)
    prefix, ids = encode(model, context, options.turn(system, instruction, template))
    if len(ids) == 0:
        raise ValueError("expected a context of at least one token, got an empty one: pass the document's text or ids")
    token_ids = torch.cat([torch.tensor(prefix, dtype=torch.long), ids])
    return _read(model, token_ids, len(prefix), bool(template), chunk, progress)


def read_again(
    model: Model, cache: DenseCache | RaggedCache, *, chunk: int = 16_000, progress: Progress | None = None
) -> DenseCache:
    """Returns the dense cache of a compressed cache's prefix and context, whose tokens the model reads once more.

    Raises: ValueError for a cache of another model; and as `prefill` does.
    """
    check_cache(cache)
    check_belongs(model, cache)
    return _read(model, cache.token_ids[: cache.context_length], cache.start, cache.chat, chunk, progress)


def _read(
    model: Model, token_ids: Int64[Tensor, " S"], start: int, chat: bool, chunk: int, progress: Progress | None
) -> DenseCache:
    """The dense cache of tokens, the first `start` of which are the prefix."""
    length = len(token_ids)
    check_length(model, length, f"a prefix of {start} and a context of {length - start} tokens")
    limit = model.config.warn_length
    if limit is not None and length > limit:
        logger.warning("%s positions are beyond the %s for which this model needs dual chunk attention", length, limit)
    size = dense_bytes(model, length)
    needed = f"{size:,} bytes for the pairs of {length} tokens, beside activations of {min(chunk, length)}"
    remedy = "lower chunk, use 16-bit weights, or call prefill_compressed, which never holds the full cache"
    with explain_out_of_memory(needed, remedy):
        layers = new_layers(model.config, length, dtype=model.dtype, device=model.device)
        on_device = token_ids.to(model.device)
    for done in range(0, length, chunk):
        part = on_device[done : done + chunk]
        positions = torch.arange(done, done + len(part), device=model.device)
        needed = f"the activations of {len(part)} tokens beside {size:,} bytes of pairs"
        with torch.no_grad(), explain_out_of_memory(needed, remedy):
            run_attention(model, part[None], positions, prefill_attend(model.config, layers, done))
        if progress is not None:
            progress(done + len(part), length)
    return DenseCache(layers, length, start, chat, token_ids, model.fingerprint, share=model.share)


def dense_bytes(model: Model, length: int) -> int:
    """Returns the bytes of keys and values of a dense cache of `length` tokens; window layers hold at most a window."""
    rows = sum(length if spec.window is None else min(spec.window, length) for spec in model.config.layers)
    return 2 * rows * model.config.num_kv_heads * model.config.head_dim * model.dtype.itemsize
