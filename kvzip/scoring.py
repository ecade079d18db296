"""Scoring: the model repeats its context, and a pair's score is the largest attention that the repeat pays to it."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from einops import rearrange
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from . import options, prompts
from .attention import Formula, Sight, score_attend
from .cache import DenseCache, RaggedCache, RaggedKV, Scores, WindowKV, check_pairs, check_whole, explain_out_of_memory
from .checks import check_kind
from .inputs import check_belongs, check_length, context_ids, prompt_of, tokenizer_of
from .models import Attend, Model, run_attention
from .ops.weights import plain
from .options import Scoring
from .parallel import whole_scores
from .prefilling import Progress

Observe = Callable[[int, Tensor], None]
AT_ONCE = 4  # repeat passes that a GPU runs side by side, at most
ROWS_AT_ONCE = 8_192  # tokens of them in all, at most
PLAIN_POSTFIX = "\n\nAnswer: "  # between the repeat prompt and the repeat, without a chat template


def score(
    model: Model,
    cache: DenseCache,
    *,
    scope: str = "chunk",
    method: str = "kvzip",
    chunk: int = 2_000,
    hint: int = 8,
    progress: Progress | None = None,
) -> DenseCache:
    """Returns a cache of the same pairs with Scores attached. The pairs are not changed.

        score[l, h, e] = max over repeat rows r and query heads of head h of
                         softmax over [prefix, chunk of e, repeat up to r] of attn_scale * q_r . k, at key e

    The context is repeated a chunk at a time. The input of a pass is the repeat prompt, the last `hint` tokens of the
    previous chunk, the beginning of the assistant's turn, and the chunk's own tokens; its positions start at
    `cache.length` for every chunk.

    Args:
        scope: what the repeat attends to in the forward pass. "chunk": the prefix and the chunk being repeated; the
            cost is linear in the context, and answers are as good or better (measured in docs/scoring.md). "context":
            the whole cache, as in the paper.
        method: "kvzip": the formula above. "kvzip+": the softmax weight times |W_O v| / |x_r|, the norm of what a pair
            adds to the residual stream relative to x_r, the layer's input; W_O is the query head's part of the
            output projection. The first token is an attention sink that adds almost nothing: without a prefix, protect
            it when compressing. "logit": the logit itself, without the softmax.
        chunk: context tokens per repeat pass.
        hint: tokens of the previous chunk quoted in the repeat prompt.
        progress: called with (context tokens done, context tokens in all).

    Raises: ValueError for a cache of another model, or one that leaves no room for a repeat in the model's length.
    Source: KVzip, arXiv 2505.23416, section 3, and appendix C.3 for "logit"; "kvzip+" is equation 3 of KVzap,
    arXiv 2601.07891. Prompts as in the authors' code. Our softmax is in float32 with the model's own scale; theirs is
    in the model's dtype with 1/sqrt(D).
    """
    check_kind(model, Model)
    check_kind(cache, DenseCache)
    scoring = options.scoring(scope, method, chunk, hint)
    check_pairs(cache)
    check_belongs(model, cache)
    layers = cache.scored_layers
    if not layers:
        raise ValueError(
            "expected a model with global layers, got sliding windows in all: there is nothing to compress"
        )
    asked = torch.zeros(len(layers), cache.heads, *2 * [model.config.head_dim], device=model.device)
    values = score_chunks(model, cache, scoring, progress=progress, asked=asked)
    values = whole_scores(model.share, values)
    scores = Scores(values, layers, start=cache.start, stop=cache.length, source=scoring.source, asked=asked)
    return replace(cache, scores=scores)


def score_chunks(
    model: Model,
    cache: DenseCache,
    scoring: Scoring,
    *,
    neighbors: int = 0,
    progress: Progress | None = None,
    past: Sequence[RaggedKV | WindowKV] | None = None,
    before: Int64[Tensor, " S"] | None = None,
    end: int = 0,
    asked: Float32[Tensor, "L h D D"] | None = None,
) -> Float32[Tensor, "L h E"]:
    """Returns the scores of a dense cache's context, which may be one segment of a longer context, of heads held here.

    Args:
        neighbors: context tokens before a chunk that scope "chunk" attends to as well.
        past: the compressed layers of the tokens before the segment, prefix included; scope "context" attends to them.
        before: ids of the context tokens before the segment, whose last `hint` the first repeat quotes; None if there
            are none.
        end: position where the repeats start, if larger than the number of tokens so far.
        asked: the sums of q q^T of queries are added to it, see `attention.score_attend`.
    """
    check_whole(cache)
    start, here = cache.start, cache.length + (0 if before is None else len(before))
    formula, observe = formula_of(model, scoring)
    shape = (len(cache.scored_layers), cache.heads, cache.length - start)
    with explain_out_of_memory(f"{4 * math.prod(shape):,} bytes of scores", "free memory; the cache is as it was"):
        values = torch.empty(shape, dtype=torch.float32, device=model.device)
    sight = Sight(scoring.scope == "chunk", neighbors, gap=end > here, past=past)
    options = {"start": start, "sight": sight, "formula": formula, "asked": asked}
    attend = partial(score_attend, model.config, cache.layers, values, **options)
    passes = list(repeats(model, cache, chunk=scoring.chunk, hint=scoring.hint, before=before))
    told = None if progress is None else lambda stop: progress(stop - start, shape[2])
    needed = f"beside {values.nbytes:,} bytes of scores"
    at_once = AT_ONCE if model.device.type == "cuda" else 1
    run_repeats(model, passes, max(here, end), attend, observe=observe, progress=told, needed=needed, at_once=at_once)
    # rounding may make exp(logit - log-sum-exp) exceed 1
    return values.clamp_(max=1) if scoring.method == "kvzip" else values


def run_repeats(
    model: Model,
    passes: list[tuple[int, int, Tensor]],
    position: int,
    attend: Callable[..., Attend],
    *,
    observe: Observe | None = None,
    progress: Callable[[int], None] | None = None,
    needed: str = "",
    at_once: int = 1,
) -> None:
    """Runs repeat passes (see `repeats`), each at positions from `position` on.

    Passes of one length may run side by side, as a batch: larger products, and fewer launches.

    Args:
        attend: attend(first=..., stop=...) returns the strategy of the pass that repeats these tokens.
        observe: given to `models.run_attention`.
        progress: called with `stop` after each pass.
        needed: what is in memory besides a pass, for the error message if memory runs out.
        at_once: passes that may run side by side; their strategies then see the layers of all in turn.

    Raises: ValueError before the first pass if the longest goes beyond the model's length.
    """
    sizes = [len(ids) for _, _, ids in passes]
    longest = max(sizes)
    check_length(model, position + longest, f"a cache of {position} and a repeat pass of {longest} tokens")
    on_device = torch.cat([ids for _, _, ids in passes]).to(model.device)  # one copy for all, as each copy waits
    for group in batches(sizes, at_once):
        first, last = group[0], group[-1]
        length, ids = sizes[first], on_device[sum(sizes[:first]) :][: len(group) * sizes[first]]
        positions = torch.arange(position, position + length, device=model.device).expand(len(group), -1)
        strategy, look = side_by_side([attend(first=passes[n][0], stop=passes[n][1]) for n in group], observe)
        count = f"{len(group)} repeat passes" if len(group) > 1 else "a repeat pass"
        beside = f"the activations of {count} of {length} tokens {needed}".rstrip()
        with torch.no_grad(), explain_out_of_memory(beside, "lower chunk; the cache is as it was"):
            run_attention(model, ids.view(len(group), length), positions, strategy, observe=look)
        if progress is not None:
            progress(passes[last][1])


def batches(sizes: Sequence[int], most: int) -> Iterator[list[int]]:
    """Yields neighbouring passes of one size that run side by side: at most `most` of them, and ROWS_AT_ONCE tokens."""
    for size, same in itertools.groupby(range(len(sizes)), key=sizes.__getitem__):
        passes, count = list(same), max(1, min(most, ROWS_AT_ONCE // size))
        yield from (passes[at : at + count] for at in range(0, len(passes), count))


def side_by_side(strategies: Sequence[Attend], observe: Observe | None) -> tuple[Attend, Observe | None]:
    """Returns one strategy for a batch, in which each pass has its own, and what shows each pass its layers' input."""
    if len(strategies) == 1:
        return strategies[0], observe
    inputs: dict[int, Tensor] = {}

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = []
        for n, strategy in enumerate(strategies):
            if observe is not None:
                observe(layer, inputs[layer][n : n + 1])
            outs.append(strategy(layer, q[n : n + 1], k[n : n + 1], v[n : n + 1]))
        inputs.clear()
        return torch.cat(outs)

    return attend, None if observe is None else inputs.__setitem__


def repeats(
    model: Model,
    cache: DenseCache | RaggedCache,
    *,
    chunk: int,
    hint: int,
    begin: int | None = None,
    before: Int64[Tensor, " S"] | None = None,
) -> Iterator[tuple[int, int, Tensor]]:
    """Yields (first, stop, input ids) of each repeat pass over the tokens from `begin`, by default the whole context.

    `before` holds the ids of context tokens that precede those of the cache.

    Raises: ValueError without a tokenizer.
    """
    tokenizer = tokenizer_of(model)
    if cache.chat:
        postfix, encode = prompt_of(model).postfix, prompts.encode_control
    else:
        postfix, encode = PLAIN_POSTFIX, prompts.encode_text
    ids, first = context_ids(model, cache.token_ids), cache.start if begin is None else begin
    older = ids[cache.start : first] if before is None else torch.cat([before, ids[cache.start : first]])
    known, end = older[max(0, len(older) - hint) :], prompts.text_of(tokenizer, ids.tolist())
    for at in range(first, len(ids), chunk):
        stop = min(at + chunk, len(ids))
        continued = len(older) > 0 or at > first
        ask = prompts.encode_text(tokenizer, prompts.REPEAT_NEXT if continued else prompts.REPEAT_FIRST, before=end)
        ask += known.tolist() if continued else []
        ask += encode(tokenizer, postfix, before=prompts.text_of(tokenizer, ask))
        yield at, stop, torch.cat([torch.tensor(ask, dtype=torch.long), ids[at:stop]])
        known = ids[max(cache.start, stop - hint) : stop]


def formula_of(model: Model, scoring: Scoring) -> tuple[Formula, Observe | None]:
    """Returns the formula of a method, and a function that must see each layer's input (for `run_attention`)."""
    if scoring.method != "kvzip+":
        return Formula(softmax=scoring.method != "logit"), None
    config = model.config
    seen: dict[str, Tensor] = {}
    grams: dict[int, Tensor] = {}

    def observe(layer: int, hidden: Float[Tensor, "1 T M"]) -> None:
        seen["inverse"] = 1 / torch.linalg.vector_norm(hidden[0], dim=-1, dtype=_wide(hidden))

    def factors(layer: int, v: Float[Tensor, "H C D"]) -> tuple[Tensor, Tensor]:
        if layer not in grams:  # |W v|^2 = v' (W' W) v: a product of D x D instead of M x D for each pair
            o = rearrange(plain(model.weights.layers[layer].o, v.dtype), "m (h d) -> h m d", d=config.head_dim)
            grams[layer] = rearrange(o.mT.to(_wide(o)) @ o.to(_wide(o)), "(h g) d e -> h g d e", h=v.shape[0])
        wide = v.to(_wide(v))[:, None]
        squares = ((wide @ grams[layer]) * wide).sum(-1).clamp(min=0)  # [H G C]
        return seen["inverse"].expand(config.num_heads, -1), squares.sqrt().flatten(0, 1)

    return Formula(factors=factors), observe


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
