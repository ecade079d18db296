"""Scoring: the model repeats its context, and each pair is scored by the largest attention it receives meanwhile."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from . import prompts
from .attention import score_attend
from .cache import DenseCache, RaggedCache, Scores, check_whole, explain_out_of_memory, global_layers
from .models import Model, run_attention
from .prefilling import Progress, check_count, check_length, prompt_of, tokenizer_of

PLAIN_POSTFIX = "\n\nAnswer: "  # between a repeat prompt and the repeat, where there is no chat template


def score(
    model: Model,
    cache: DenseCache,
    *,
    scope: str = "context",
    chunk: int = 2_000,
    hint: int = 8,
    progress: Progress | None = None,
) -> DenseCache:
    """Returns a cache of the same pairs with Scores attached; reads the pairs, writes nothing to them.

        score[l, h, e] = max over repeat rows r and query heads of head h of
                         softmax over [prefix, chunk of e, repeat up to r] of attn_scale * q_r . k, at key e

    The context is repeated a chunk at a time: prompt, the last `hint` tokens of the previous chunk, the answer's
    opening, then the chunk's own tokens. The repeat's positions start at `cache.length` for every chunk.

    Args:
        scope: what the rows attend to while they are computed. "context": the whole cache, as in the paper.
            "chunk": the prefix and the chunk being repeated, so that the cost is linear in the context.
        chunk: context tokens per repeat pass.
        hint: tokens of the previous chunk put before a repeat.
        progress: called with (context tokens done, context tokens in all).

    Raises: ValueError for a cache of another model, or one too long to leave room for a repeat.
    Source: KVzip, arXiv 2505.23416, section 3; prompts as in the authors' code. The softmax is float32 and the scale
    the model's own, where theirs is the model's dtype and 1/sqrt(D).
    """
    check_count(chunk, "chunk")
    if scope not in ("context", "chunk"):
        raise ValueError(f"expected scope 'context' or 'chunk', got {scope!r}")
    check_fingerprint(model, cache.fingerprint)
    check_whole(cache)
    layers = global_layers(cache)
    if not layers:
        raise ValueError(
            "expected a model with global layers, got sliding windows in all: there is nothing to compress"
        )
    sink, total = cache.start, cache.length - cache.start
    with explain_out_of_memory(
        f"{4 * len(layers) * model.config.num_kv_heads * total:,} bytes of scores",
        "free memory; the cache is as it was",
    ):
        shape = (len(layers), model.config.num_kv_heads, total)
        values = torch.empty(shape, dtype=torch.float32, device=model.device)
    for start, stop, repeat in repeats(model, cache, chunk=chunk, hint=hint):
        needed = cache.length + len(repeat)
        check_length(model, needed, f"a cache of {cache.length} and a repeat pass of {len(repeat)} tokens")
        positions = torch.arange(cache.length, needed, device=model.device)
        attend = score_attend(
            model.config, cache.layers, values, sink=sink, start=start, stop=stop, local=scope == "chunk"
        )
        with (
            torch.no_grad(),
            explain_out_of_memory(
                f"the activations of a repeat pass of {len(repeat)} tokens beside {values.nbytes:,} bytes of scores",
                "lower chunk; the cache is as it was",
            ),
        ):
            run_attention(model, repeat[None].to(model.device), positions, attend)
        if progress is not None:
            progress(stop - sink, total)
    scores = Scores(values=values, layers=layers, start=sink, stop=cache.length, source=f"kvzip-{scope}")
    return replace(cache, scores=scores)


def repeats(
    model: Model, cache: DenseCache | RaggedCache, *, chunk: int, hint: int, begin: int | None = None
) -> Iterator[tuple[int, int, Tensor]]:
    """Yields (start, stop, input ids) of each repeat pass over the tokens from `begin`, by default the whole context.

    Raises: ValueError without a tokenizer.
    """
    tokenizer = tokenizer_of(model)

    def encode(text: str) -> Tensor:
        return torch.tensor(prompts.encode_text(tokenizer, text), dtype=torch.long)

    if cache.chat:
        postfix = torch.tensor(prompts.encode_control(tokenizer, prompt_of(model).postfix), dtype=torch.long)
    else:
        postfix = encode(PLAIN_POSTFIX)
    end = len(cache.token_ids)
    for start in range(cache.start if begin is None else begin, end, chunk):
        stop = min(start + chunk, end)
        if start == cache.start:
            ask = [encode(prompts.REPEAT_FIRST)]
        else:
            ask = [encode(prompts.REPEAT_NEXT), cache.token_ids[max(cache.start, start - hint) : start]]
        yield start, stop, torch.cat([*ask, postfix, cache.token_ids[start:stop]])


def check_fingerprint(model: Model, fingerprint: str) -> None:
    """Raises ValueError if a cache was made by another model, or in another dtype."""
    if fingerprint != model.fingerprint:
        raise ValueError(
            f"expected a cache of this model (fingerprint {model.fingerprint}), got one of another "
            f"({fingerprint}): use the model and dtype that made it, or prefill again"
        )
