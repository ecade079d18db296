"""Conversations: tokens added to a cache's tail, turns of questions and answers, and the tail folded into the context.

Every function returns a new cache and does not change the old one: a cache is one state of a conversation, and all
states share the frozen context. With a chat template a cache ends inside an open user turn, after prefill, `extend` and
`ask` alike, so a query, a text or a repeat prompt can always come next.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
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
    Scores,
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
from .files.schema import ratio_of
from .generation import Answer, generate
from .inputs import check_belongs, check_length, context_ids, following_ids, prompt_of, query_ids, tokenizer_of
from .models import Attend, Model, run_attention
from .options import Scoring
from .parallel import heads_of, whole_scores
from .scoring import formula_of, repeats, run_repeats

FOLDED = "+fold"  # at the end of a cache's method: some pairs of folded turns were dropped


def extend(
    model: Model, cache: DenseCache | RaggedCache, text: str | Int64[Tensor, " S"], *, chunk: int = 2_000
) -> RaggedCache:
    """Returns a cache with the tokens of a text appended to its tail, without any template around them.

    The context is shared with `cache`, the tail is a copy.

    Args:
        text: a text, in which the strings of control tokens are encoded as plain text, or token ids.
        chunk: tokens per forward pass; bounds the memory for activations and does not change the result.

    Raises: ValueError for a cache of another model, an empty text, or more positions than the model was made for.
    """
    check_kind(model, Model)
    check_pairs(cache)
    check_text_or_ids(text, "text")
    chunk = checks.whole(chunk, "chunk", least=1)
    check_belongs(model, cache)
    ids = torch.tensor(following_ids(model, cache, text)) if isinstance(text, str) else context_ids(model, text)
    if len(ids) == 0:
        raise ValueError("expected at least one token to extend the cache by, got none: pass text or ids")
    cache, ids = as_ragged(cache), ids.long()
    used = len(cache.token_ids)
    check_length(model, used + len(ids), f"a cache of {used} and {len(ids)} new tokens")
    tail, context = roomy_tail(cache, 1, len(ids), dtype=model.dtype), all_ragged(cache.context)
    for part in ids.to(model.device).split(chunk):
        positions = torch.arange(used, used + len(part), device=model.device)
        with torch.no_grad():
            run_attention(model, part[None], positions, decode_attend(model.config, context, tail))
        tail = replace(tail, lengths=tail.lengths + len(part))
        used += len(part)
    return replace(cache, tail=tail, token_ids=torch.cat([cache.token_ids, ids]))


def fork(cache: DenseCache | RaggedCache) -> RaggedCache:
    """Returns another cache of the same tokens: the context's tensors are shared, the tail is a copy."""
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
    repetition_penalty: float = 1.0,
    template: bool = True,
    sources: int = 0,
    on_token: Callable[[str], None] | None = None,
) -> tuple[Answer, RaggedCache]:
    """Returns the answer to a query, and a cache that holds query and answer, for the next turn.

        answer, cache = ask(model, cache, "Who signed it?")
        answer, cache = ask(model, cache, "And who paid?")

    Arguments and answer are those of `generate`. The new tail holds the turns as the chat template renders them: the
    query, all tokens of the answer and the end of its turn, whatever ended the answer. A stop text is not in it, except
    for a part within the answer's last token. The turn is prefilled again in one forward pass, which costs about one
    step of decoding. With template=False query and answer are plain text that continues the context.

    Raises: as `generate`; ValueError also if the end of the turn would not fit in the model's length.
    """
    check_kind(model, Model)
    check_pairs(cache)
    if not isinstance(query, str):
        check_texts(query, "query")
        raise TypeError("expected query to be one text, got several: one turn has one, kvzip.generate takes a list")
    cache = as_ragged(cache)
    check_belongs(model, cache)
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
        repetition_penalty=repetition_penalty,
        template=template,
        sources=sources,
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
    """Returns a cache whose context includes the tail: int(ratio * L * H * n) pairs of its n tokens, the highest scored
    over all layers and heads, are packed behind the rows of their heads. Rows of the old context do not change.

    The pairs are scored as by `kvzip.score` with scope "context": the model repeats the tail, attending to context and
    tail, and a pair's score is its largest weight in a softmax over prefix, chunk and repeat. There is no
    other scope, because turns refer to their context, and attending to a compressed one costs little. At ratio 1
    nothing is scored, and the answers are those of `cache`. Window layers then hold the last tokens, new rows of a
    quantized context are quantized too, those of a refitted one have bias 0 and their own values (they are not fitted,
    also where a ratio drops others), and `kept` and `total` count the tail's pairs too. `fold` may be called again
    after further turns.

    Args:
        cache: a cache without a tail is returned as it is.
        ratio: fraction of the tail's pairs KEPT, 0 < ratio <= 1.
        method, chunk, hint: as in `kvzip.score`.

    Raises: ValueError for a cache of another model, options out of range, or a cache that leaves no room for a repeat.
    Source: unlike the authors' code, which drops kept turns when a later question is rolled back but goes on counting
    their positions, folded turns are part of the frozen context and are never dropped.
    """
    check_kind(model, Model)
    check_pairs(cache)
    scoring = options.scoring("context", method, chunk, hint)
    check_belongs(model, cache)
    cache, ratio = as_ragged(cache), checks.kept_ratio(ratio, of="the tail")
    tail, begin, stop = cache.tail, cache.context_length, len(cache.token_ids)
    if tail is None or begin == stop:
        return replace(cache, tail=None)
    keep, _ = _keep(model, cache, tail, ratio, scoring)
    return _folded(model, cache, tail, keep)


def append(
    model: Model,
    cache: DenseCache | RaggedCache,
    text: str | Int64[Tensor, " S"],
    ratio: SupportsFloat | None = None,
    *,
    method: str = "kvzip",
    chunk: int = 2_000,
    hint: int = 8,
) -> RaggedCache:
    """Returns the cache of a document that has grown: the text is read after what is kept so far, scored and packed.

    It is `extend` and then `fold`, as a segment of `prefill_compressed` is: the model reads the new text behind the
    compressed one, repeats it, and int(ratio * L * H * n) pairs of its n tokens stay. Pairs of the old text do not
    change, and their scores stay where a cache has some; those of the new text are not fitted where the old ones were
    (`refit`). Meanwhile the new text is held whole.

    Args:
        text: continues the context as it is; begin it with a blank line where a paragraph should begin.
        ratio: fraction of the new pairs KEPT; None takes that of the cache.
        method, chunk, hint: as in `kvzip.score`; `chunk` also bounds the tokens of a pass that reads.

    Raises: ValueError for a cache with turns after its context, an empty text, a cache of another model, more positions
        than the model was made for (those of the repeat too), or options out of range; TypeError for another kind.
    """
    check_kind(model, Model)
    check_pairs(cache)
    turns = len(cache.token_ids) - cache.context_length
    if turns:
        raise ValueError(
            f"expected a cache that ends with its document, got one with {turns} tokens of turns after it: fold them "
            "into it first (kvzip.fold)"
        )
    scoring = options.scoring("context", method, chunk, hint)
    held = ratio_of(cache.kept, cache.total)
    part = checks.kept_ratio(held if ratio is None else ratio, of="the new text")
    longer = extend(model, cache, text, chunk=scoring.chunk)
    assert longer.tail is not None
    keep, values = _keep(model, longer, longer.tail, part, scoring)
    grown = _folded(model, longer, longer.tail, keep)
    if cache.scores is None or values is None:
        return grown
    old = cache.scores
    source = old.source if scoring.source in old.source else f"{old.source}, {scoring.source}"
    joined = torch.cat([old.values, values.to(old.values.device)], dim=2)
    return replace(grown, scores=Scores(joined, old.layers, old.start, grown.context_length, source))


def _folded(model: Model, cache: RaggedCache, tail: Tail, keep: Bool[Tensor, "L H E"]) -> RaggedCache:
    """The cache whose context includes the pairs of the tail that `keep` marks, of all heads."""
    begin, stop = cache.context_length, len(cache.token_ids)
    own = heads_of(cache.share, keep)
    context: list[RaggedKV | WindowKV] = []
    scored = iter(zip(own, own.sum(-1).tolist(), strict=True))
    for layer, k, v, spec in zip(cache.context, tail.k, tail.v, model.config.layers, strict=True):
        k, v = k[:, :, : stop - begin], v[:, :, : stop - begin]
        if isinstance(layer, WindowKV):
            assert spec.window is not None
            last_k, last_v = (torch.cat(x, dim=2)[:, :, -spec.window :].clone() for x in ((layer.k, k), (layer.v, v)))
            context.append(WindowKV(last_k, last_v, stop - last_k.shape[2]))
        else:
            more = pack(k[0], v[0], *next(scored))
            context.append(join(layer, replace(more, positions=more.positions + begin)))
    return replace(
        cache,
        context=tuple(context),
        tail=None,
        context_length=stop,
        kept=cache.kept + int(keep.sum()),
        total=cache.total + keep.numel(),
        scores=None,
        method=cache.method if bool(keep.all()) or cache.method.endswith(FOLDED) else cache.method + FOLDED,
    )


def _keep(
    model: Model, cache: RaggedCache, tail: Tail, ratio: float, scoring: Scoring
) -> tuple[Bool[Tensor, "L H E"], Float32[Tensor, "L H E"] | None]:
    """Which pairs of the tail are kept, of all heads, and their scores; None if all are, unscored.

    Repeat passes write to a copy of the tail, each over the rows before it.
    """
    config, begin, used = model.config, cache.context_length, len(cache.token_ids)
    shape = (len(cache.scored_layers), cache.heads, used - begin)
    if ratio == 1 or not cache.scored_layers:
        return torch.ones(shape[0], cache.all_heads, shape[2], dtype=torch.bool, device=model.device), None
    values = torch.empty(shape, dtype=torch.float32, device=model.device)
    passes = list(repeats(model, cache, chunk=scoring.chunk, hint=scoring.hint, begin=begin))
    scratch = grow_tail(tail, 1, max(len(ids) for _, _, ids in passes))
    scored = {layer: n for n, layer in enumerate(cache.scored_layers)}
    prefixes = [prefix_keys(x, cache.start, model.dtype) for x in cache.context if isinstance(x, RaggedKV)]
    decode = decode_attend(config, all_ragged(cache.context), scratch)
    formula, observe = formula_of(model, scoring)

    def attend(part: slice, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer in scored:
            n, chunk = scored[layer], (scratch.k[layer][0, :, part], scratch.v[layer][0, :, part])
            values[n, :, part] = score_rows(config, formula, layer, q, k, prefixes[n], chunk)
        return decode(layer, q, k, v)

    def strategy(first: int, stop: int) -> Attend:
        return partial(attend, slice(first - begin, stop - begin))

    run_repeats(model, passes, used, strategy, observe=observe)
    whole = whole_scores(cache.share, values)
    mask = ops.select(whole, ratio=ratio)
    assert isinstance(mask, Tensor)
    return mask, whole
