"""What follows a context: tokens added to its tail, turns of a conversation, and the tail folded into the context.

Every function returns a new cache and leaves the old one as it was: a cache is one state of a conversation, and the
frozen context is shared by all that follow from it. With a chat template a user turn is open at the end of a cache,
after prefill, `extend` and `ask` alike, so that a query, a text or a repeat prompt may always come next.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import SupportsFloat

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from . import checks, ops, prompts
from .attention import decode_attend
from .cache import (
    DenseCache,
    RaggedCache,
    RaggedKV,
    Tail,
    WindowKV,
    all_ragged,
    as_ragged,
    check_pairs,
    empty_tail,
    grow_tail,
)
from .checks import check_kind, check_text_or_ids, check_texts
from .generation import Answer, generate, query_ids
from .models import Model, run_attention
from .ops import Quantized
from .prefilling import check_length, context_ids, prompt_of, tokenizer_of
from .scoring import check_choice, check_fingerprint, plus_factors, repeats

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
    ids = _following(model, cache, text) if isinstance(text, str) else context_ids(model, text)
    if len(ids) == 0:
        raise ValueError("expected at least one token to extend the cache by, got none: pass text or ids")
    cache = as_ragged(cache) if isinstance(cache, DenseCache) else cache
    used = len(cache.token_ids)
    check_length(model, used + len(ids), f"a cache of {used} and {len(ids)} new tokens")
    tail, context = _roomy(cache, len(ids), model.dtype), all_ragged(cache.context)
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
    if isinstance(cache, DenseCache):
        return as_ragged(cache)
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
    cache = as_ragged(cache) if isinstance(cache, DenseCache) else cache
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
    chunk, hint = checks.whole(chunk, "chunk", least=1), checks.whole(hint, "hint", least=0)
    check_choice("context", method)
    check_fingerprint(model, cache.fingerprint)
    cache = as_ragged(cache) if isinstance(cache, DenseCache) else cache
    ratio = checks.kept_ratio(ratio, of="the tail")
    start, stop = cache.context_length, len(cache.token_ids)
    if cache.tail is None or start == stop:
        return replace(cache, tail=None)
    tail = cache.tail
    keep = _keep(model, cache, tail, ratio, method=method, chunk=chunk, hint=hint)
    counts = keep.sum((1, 2)).tolist()
    context: list[RaggedKV | WindowKV] = []
    scored = iter(zip(keep, counts, strict=True))
    for layer, k, v, spec in zip(cache.context, tail.k, tail.v, model.config.layers, strict=True):
        k, v = k[:, :, : stop - start], v[:, :, : stop - start]
        if isinstance(layer, WindowKV):
            assert spec.window is not None
            last_k, last_v = (torch.cat(x, dim=2)[:, :, -spec.window :].clone() for x in ((layer.k, k), (layer.v, v)))
            context.append(WindowKV(last_k, last_v, stop - last_k.shape[2]))
        else:
            mask, count = next(scored)
            k, v, offsets, positions = ops.prune(k[0], v[0], mask, total=count)
            context.append(_join(layer, k, v, offsets, positions + start))
    return replace(
        cache,
        context=tuple(context),
        tail=None,
        context_length=stop,
        kept=cache.kept + sum(counts),
        total=cache.total + keep.numel(),
        scores=None,
        method=cache.method if ratio == 1 or cache.method.endswith(FOLDED) else cache.method + FOLDED,
    )


def _following(model: Model, cache: DenseCache | RaggedCache, text: str) -> Int64[Tensor, " S"]:
    """The ids of a text that continues what a cache holds."""
    tokenizer = tokenizer_of(model)
    held = cache.token_ids.tolist()
    if cache.chat:  # the spaces at the end of a turn's opening come with what is said in it
        text = (prompts.turn_opened(tokenizer, prompt_of(model), held) or "") + text
    before = prompts.text_of(tokenizer, held)
    return torch.tensor(prompts.encode_text(tokenizer, text, before=before), dtype=torch.long)


def _roomy(cache: RaggedCache, rows: int, dtype: torch.dtype) -> Tail:
    """A copy of the cache's tail with `rows` further rows reserved."""
    if cache.tail is None:
        return empty_tail(cache.context, 1, rows, dtype=dtype)
    return grow_tail(cache.tail, 1, rows)


def _keep(
    model: Model, cache: RaggedCache, tail: Tail, ratio: float, *, method: str, chunk: int, hint: int
) -> Bool[Tensor, "L H E"]:
    """Which pairs of the tail are kept."""
    layers = sum(isinstance(layer, RaggedKV) for layer in cache.context)
    shape = (layers, model.config.num_kv_heads, len(cache.token_ids) - cache.context_length)
    if ratio == 1 or layers == 0:
        return torch.ones(shape, dtype=torch.bool, device=model.device)
    values = torch.empty(shape, dtype=torch.float32, device=model.device)
    _score_tail(model, cache, tail, values, method=method, chunk=chunk, hint=hint)
    mask = ops.select(values, ratio=ratio)
    assert isinstance(mask, Tensor)
    return mask


def _score_tail(
    model: Model,
    cache: RaggedCache,
    tail: Tail,
    values: Float32[Tensor, "L H E"],
    *,
    method: str,
    chunk: int,
    hint: int,
) -> None:
    """Fills `values` with the scores of the tail's pairs. The repeats go to a copy of the tail, and are dropped."""
    config, first, used = model.config, cache.context_length, len(cache.token_ids)
    passes = list(repeats(model, cache, chunk=chunk, hint=hint, begin=first))
    longest = max(len(ids) for _, _, ids in passes)
    check_length(model, used + longest, f"a cache of {used} and a repeat pass of {longest} tokens")
    scratch, context = grow_tail(tail, 1, longest), all_ragged(cache.context)
    prefixes = [_prefix_keys(x, cache.start, model.dtype) for x in cache.context if isinstance(x, RaggedKV)]
    scored = [n for n, layer in enumerate(cache.context) if isinstance(layer, RaggedKV)]
    decode = decode_attend(config, context, scratch)
    factors, observe = plus_factors(model) if method == "kvzip+" else (None, None)
    for start, stop, ids in passes:
        part = slice(start - first, stop - first)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, part: slice = part) -> Tensor:
            if config.layers[layer].window is None:
                n = scored.index(layer)
                weights = (None, None) if factors is None else factors(layer, scratch.v[layer][0, :, part])
                values[n, :, part] = ops.score(
                    q[0],
                    scratch.k[layer][0, :, part],
                    prefixes[n],
                    k[0],
                    scale=config.attn_scale,
                    softcap=config.attn_softcap,
                    row_weight=weights[0],
                    key_weight=weights[1],
                    softmax=method != "logit",
                )
            return decode(layer, q, k, v)

        positions = torch.arange(used, used + len(ids), device=model.device)
        with torch.no_grad():
            run_attention(model, ids[None].to(model.device), positions, attend, observe=observe)


def _prefix_keys(layer: RaggedKV, start: int, dtype: torch.dtype) -> Float[Tensor, "H A D"]:
    """The keys of the system prefix, which are the first rows of every head."""
    rows = layer.offsets[:-1, None].long() + torch.arange(start, device=layer.offsets.device)
    if isinstance(layer.k, Tensor):
        return layer.k[rows]
    prefix = ops.take_rows(layer.k, rows.flatten())
    keys = ops.dequantize(prefix, dtype=dtype, offsets=torch.arange(len(rows) + 1, device=rows.device).int() * start)
    return rearrange(keys, "(h a) d -> h a d", h=len(rows))


def _join(layer: RaggedKV, k: Tensor, v: Tensor, offsets: Tensor, positions: Tensor) -> RaggedKV:
    """The layer with further rows after those of each head: rows offsets[h]:offsets[h+1] of k and v after head h's."""
    heads = torch.arange(len(offsets) - 1, device=offsets.device)
    old_head, new_head = (
        heads.repeat_interleave(bounds.diff(), output_size=rows)
        for bounds, rows in ((layer.offsets, len(layer.positions)), (offsets, len(positions)))
    )
    old = torch.arange(len(layer.positions), device=offsets.device) + offsets[old_head]
    new = torch.arange(len(positions), device=offsets.device) + layer.offsets[new_head + 1]

    def put(x: Tensor, y: Tensor) -> Tensor:
        out = x.new_empty(len(x) + len(y), *x.shape[1:], dtype=torch.promote_types(x.dtype, y.dtype))
        out[old], out[new] = x.to(out.dtype), y.to(out.dtype)
        return out

    def rows(x: Tensor | Quantized, y: Tensor) -> Tensor | Quantized:
        if isinstance(x, Tensor):
            return put(x, y)
        whose = None if x.channels is None else offsets
        z = ops.quantize(y, bits=x.bits, group=x.group, offsets=whose, channels=x.channels)
        return replace(x, codes=put(x.codes, z.codes), scale=put(x.scale, z.scale), zero=put(x.zero, z.zero))

    joined = layer.offsets + offsets
    return RaggedKV(
        rows(layer.k, k), rows(layer.v, v), joined, put(layer.positions, positions), ops.decode_schedule(joined)
    )
