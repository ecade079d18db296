"""What follows a context: tokens added to its tail, turns of a conversation, and the tail folded into the context.

Every function returns a new cache and leaves the old one as it was: a cache is one state of a conversation, and the
frozen context is shared by all that follow from it. With a chat template a user turn is open at the end of a cache,
after prefill, `extend` and `ask` alike, so that a query, a text or a repeat prompt may always come next.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import SupportsFloat

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from . import checks, ops, options, prompts
from .attention import decode_attend, score_rows
from .cache import (
    DenseCache,
    RaggedCache,
    RaggedKV,
    Tail,
    WindowKV,
    all_ragged,
    as_ragged,
    check_pairs,
    grow_tail,
)
from .cache.caches import roomy_tail
from .cache.rows import join, pack, prefix_keys
from .checks import check_kind, check_text_or_ids, check_texts
from .generation import Answer, generate
from .inputs import check_fingerprint, check_length, context_ids, following_ids, prompt_of, query_ids, tokenizer_of
from .models import Attend, Model, run_attention
from .options import Scoring
from .scoring import formula_of, repeats, run_repeats

FOLDED = "+fold"  # in a cache's method: not all pairs of its turns were kept


def extend(
    model: Model, cache: DenseCache | RaggedCache, text: str | Int64[Tensor, " S"], *, chunk: int = 2_000
) -> RaggedCache:
    """Returns a cache whose tail holds more: the text's tokens, as they are, after what `cache` holds.

    The context is shared with `cache`, the tail is a copy.

    Args:
        text: text, of which nothing becomes a control token, or token ids.
        chunk: tokens per forward pass; bounds the memory for activations, changes nothing else.

    Raises: ValueError for a cache of another model, no text, or more positions than the model was made for.
    """
    check_kind(model, Model)
    check_pairs(cache)
    check_text_or_ids(text, "text")
    chunk = checks.whole(chunk, "chunk", least=1)
    check_fingerprint(model, cache.fingerprint)
    ids = torch.tensor(following_ids(model, cache, text)) if isinstance(text, str) else context_ids(model, text)
    if len(ids) == 0:
        raise ValueError("expected at least one token to extend the cache by, got none: pass text or ids")
    cache, ids = as_ragged(cache), ids.long()
    used = len(cache.token_ids)
    check_length(model, used + len(ids), f"a cache of {used} and {len(ids)} new tokens")
    tail, context = roomy_tail(cache, 1, len(ids), dtype=model.dtype), all_ragged(cache.context)
    for piece in ids.to(model.device).split(chunk):
        positions = torch.arange(used, used + len(piece), device=model.device)
        with torch.no_grad():
            run_attention(model, piece[None], positions, decode_attend(model.config, context, tail))
        tail = replace(tail, lengths=tail.lengths + len(piece))
        used += len(piece)
    return replace(cache, tail=tail, token_ids=torch.cat([cache.token_ids, ids]))


def fork(cache: DenseCache | RaggedCache) -> RaggedCache:
    """Returns another cache of the same tokens: the same tensors for the context, a copy of the tail."""
    check_pairs(cache)
    cache = as_ragged(cache)
    return cache if cache.tail is None else replace(cache, tail=grow_tail(cache.tail, 1, 0))


def ask(
    model: Model,
    cache: DenseCache | RaggedCache,
    query: str,
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    template: bool = True,
    on_token: Callable[[str], None] | None = None,
) -> tuple[Answer, RaggedCache]:
    """Returns the answer to a query, and the cache in which query and answer stay: the next turn's.

        answer, cache = ask(model, cache, "Who signed it?")
        answer, cache = ask(model, cache, "And who paid?")

    The tail then holds what the chat template renders for the turns, the answer's last token and the end of its turn
    included, whatever ended the answer; of a stop text only what the answer's last token holds of it. The turn is read
    again in one forward pass, which costs about one step of decoding. Arguments are those of `generate`, whose answer
    this is; with template=False query and answer are plain text that continues the context.

    Raises: as `generate`; ValueError too where the end of the turn would not fit in the model's length.
    """
    check_kind(model, Model)
    check_pairs(cache)
    if not isinstance(query, str):
        check_texts(query, "query")
        raise TypeError("expected query to be one text, got several: one turn has one, kvzip.generate takes a list")
    cache = as_ragged(cache)
    check_fingerprint(model, cache.fingerprint)
    (asked,) = query_ids(model, cache, [query], template=template)
    tokenizer = tokenizer_of(model)
    close = prompts.turn_close(prompt_of(model)) if template else ""
    separator = prompts.encode_control(tokenizer, close)
    used = len(cache.token_ids) + len(asked) + len(separator)
    check_length(model, used + 1, f"a cache of {len(cache.token_ids)}, a query of {len(asked)} and the end of the turn")
    answer = generate(
        model,
        cache,
        query,
        max_tokens=min(checks.whole(max_tokens, "max_tokens"), model.config.max_length - used),
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=stop,
        template=template,
        on_token=on_token,
    )
    said = [*asked, *answer.token_ids]
    separator = prompts.encode_control(tokenizer, close, before=prompts.text_of(tokenizer, said))
    return answer, extend(model, cache, torch.tensor([*said, *separator]))


def fold(
    model: Model,
    cache: DenseCache | RaggedCache,
    ratio: SupportsFloat = 1.0,
    *,
    method: str = "kvzip",
    chunk: int = 2_000,
    hint: int = 8,
) -> RaggedCache:
    """Returns a cache whose context includes the tail: int(ratio * L * H * n) pairs of its n tokens, over all layers
    and heads, packed after the rows of their heads. What the context held before stays as it is, bit for bit.

    The pairs are scored as `kvzip.score` scores those of a context that the tail is the last part of: the model is
    asked to repeat it, the rows attend to context and tail, and a pair's score is its largest weight in a softmax over
    prefix, chunk and repeat. There is no other `scope`: turns refer to their context, and to read what is kept of it
    costs little. At ratio 1 nothing needs scoring, and the answers are those of `cache`. Window layers move
    on to the last tokens, new rows of a quantized context are quantized alike, and `kept` and `total` count the
    tail's pairs too. May be repeated, after further turns.

    Args:
        cache: one without a tail is returned as it is.
        ratio: fraction of the tail's pairs KEPT, 0 < ratio <= 1.
        method, chunk, hint: as in `kvzip.score`.

    Raises: ValueError for a cache of another model, options out of range, or one too long to leave room for a repeat.
    Source: the authors' code drops kept turns when a later question is rolled back, while positions go on counting
    them; folded turns are part of the frozen context, which nothing drops.
    """
    check_kind(model, Model)
    check_pairs(cache)
    scoring = options.scoring("context", method, chunk, hint)
    check_fingerprint(model, cache.fingerprint)
    cache, ratio = as_ragged(cache), checks.kept_ratio(ratio, of="the tail")
    tail, start, stop = cache.tail, cache.context_length, len(cache.token_ids)
    if tail is None or start == stop:
        return replace(cache, tail=None)
    keep = _keep(model, cache, tail, ratio, scoring)
    counts = keep.sum(-1).tolist()
    context: list[RaggedKV | WindowKV] = []
    scored = iter(zip(keep, counts, strict=True))
    for layer, k, v, spec in zip(cache.context, tail.k, tail.v, model.config.layers, strict=True):
        k, v = k[:, :, : stop - start], v[:, :, : stop - start]
        if isinstance(layer, WindowKV):
            assert spec.window is not None
            last_k, last_v = (torch.cat(x, dim=2)[:, :, -spec.window :].clone() for x in ((layer.k, k), (layer.v, v)))
            context.append(WindowKV(last_k, last_v, stop - last_k.shape[2]))
        else:
            more = pack(k[0], v[0], *next(scored))
            context.append(join(layer, replace(more, positions=more.positions + start)))
    return replace(
        cache,
        context=tuple(context),
        tail=None,
        context_length=stop,
        kept=cache.kept + sum(map(sum, counts)),
        total=cache.total + keep.numel(),
        scores=None,
        method=cache.method if ratio == 1 or cache.method.endswith(FOLDED) else cache.method + FOLDED,
    )


def _keep(model: Model, cache: RaggedCache, tail: Tail, ratio: float, scoring: Scoring) -> Bool[Tensor, "L H E"]:
    """Which pairs of the tail are kept."""
    shape = (len(cache.scored_layers), cache.heads, len(cache.token_ids) - cache.context_length)
    if ratio == 1 or not cache.scored_layers:
        return torch.ones(shape, dtype=torch.bool, device=model.device)
    values = torch.empty(shape, dtype=torch.float32, device=model.device)
    _score_tail(model, cache, tail, values, scoring)
    mask = ops.select(values, ratio=ratio)
    assert isinstance(mask, Tensor)
    return mask


def _score_tail(
    model: Model, cache: RaggedCache, tail: Tail, values: Float32[Tensor, "L H E"], scoring: Scoring
) -> None:
    """Fills `values` with the scores of the tail's pairs. The repeats go to a copy of the tail, and are dropped."""
    config, begin, used = model.config, cache.context_length, len(cache.token_ids)
    passes = list(repeats(model, cache, chunk=scoring.chunk, hint=scoring.hint, begin=begin))
    scratch = grow_tail(tail, 1, max(len(ids) for _, _, ids in passes))
    scored = {layer: n for n, layer in enumerate(cache.scored_layers)}
    prefixes = [prefix_keys(x, cache.start, model.dtype) for x in cache.context if isinstance(x, RaggedKV)]
    decode = decode_attend(config, all_ragged(cache.context), scratch)
    formula, observe = formula_of(model, scoring)

    def attend_of(first: int, stop: int) -> Attend:
        part = slice(first - begin, stop - begin)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if layer in scored:
                n, chunk = scored[layer], (scratch.k[layer][0, :, part], scratch.v[layer][0, :, part])
                values[n, :, part] = score_rows(config, formula, layer, q, k, prefixes[n], chunk)
            return decode(layer, q, k, v)

        return attend

    run_repeats(model, passes, used, attend_of, observe=observe)
