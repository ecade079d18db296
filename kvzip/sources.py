"""Where an answer came from: the passages of a context that the answer's tokens attended to most."""

import codecs
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from . import ops, prompts
from .attention import decode_attend
from .cache import DenseCache, RaggedCache, RaggedKV, all_ragged, as_ragged, explain_out_of_memory
from .cache.caches import roomy_tail
from .inputs import check_length, check_whole_model, tokenizer_of
from .models import Model, ModelConfig, run_attention
from .ops.types import Quantized

__all__ = ["Source", "find_sources"]

PASSAGE = (8, 64)
"""Tokens of a passage, at least and at most: between them it ends with a sentence or a line."""
USUAL = 3.0
"""How many times a token must be more to an answer than it is to the question, before it counts."""
_WEIGHTS = 1 << 24  # of one head, at a time
_ENDS = re.compile(r"[.!?\u3002\uff01\uff1f][\"'\u201d\u2019)]*\s*$|\n\s*$")


@dataclass(frozen=True)
class Source:
    """A passage of the context that an answer attended to.

    `text` is that of the tokens start:stop, positions in the cache with the prefix counted; it stands at the characters
    begin:end of the context's text. `weight` is the passage's share of what the answer attended to, from 0 to 1.
    """

    text: str
    start: int
    stop: int
    begin: int
    end: int
    weight: float


def find_sources(
    model: Model, cache: DenseCache | RaggedCache, asked: Sequence[int], answered: Sequence[int], *, count: int = 3
) -> tuple[Source, ...]:
    """Returns the `count` passages that an answer attended to most, the strongest first, each at most 64 tokens.

    Question and answer are read once more, in one pass after the cache. With w[l, h, r, s] the softmax weight that row
    r gives to the kept pair of token s in layer l and query head h, over all that the row sees, a token's weight is

        mean over l, h and the rows r that predict the answer of max(0, w[l, h, r, s] - 3 * mean over question's rows)

    so that what every row attends to, as the first tokens of a text, is no source. Passages are the sentences and lines
    of the context; windows of layers count for nothing.

    Args:
        asked: ids of the question as they follow the cache, at least one; `answered`: those of the answer.

    Raises: ValueError for more positions than the model was made for, or without a tokenizer; torch.OutOfMemoryError.
    """
    check_whole_model(model, "sources")
    tokenizer, cache = tokenizer_of(model), as_ragged(cache)
    if not answered or not cache.scored_layers or count < 1:
        return ()
    paid = attention_paid(model, cache, asked, answered)[cache.start : cache.context_length]
    total = paid.sum().item()
    pieces = texts_of(tokenizer, cache.token_ids[cache.start : cache.context_length].tolist())
    begins = [0]
    for piece in pieces:
        begins.append(begins[-1] + len(piece))
    sums = torch.cat([paid.new_zeros(1).double(), paid.double().cumsum(0)]).tolist()
    found = [(sums[stop] - sums[start], start, stop) for start, stop in passages(pieces)]
    strongest = sorted(found, key=lambda each: (-each[0], each[1]))[:count]
    return tuple(
        Source(
            text="".join(pieces[start:stop]),
            start=cache.start + start,
            stop=cache.start + stop,
            begin=begins[start],
            end=begins[stop],
            weight=weight / total,
        )
        for weight, start, stop in strongest
        if weight > 0
    )


@torch.no_grad()
def attention_paid(
    model: Model, cache: RaggedCache, asked: Sequence[int], answered: Sequence[int]
) -> Float[Tensor, " S"]:
    """Returns what the rows that predict an answer pay to each token of a cache, see `find_sources`; on the CPU.

    It is float32, or float64 for a model in that. Tokens after the context get 0.
    """
    ids = torch.tensor([*asked, *answered[:-1]])
    used, first = len(cache.token_ids), len(asked) - 1
    check_length(model, used + len(ids), f"a cache of {used} tokens, a question of {len(asked)} and its answer")
    needed = f"the tail and activations of {len(ids)} tokens, to see what an answer of {len(answered)} attended to"
    with explain_out_of_memory(needed, "ask for no sources, or lower max_tokens"):
        tail, context = roomy_tail(cache, 1, len(ids), dtype=model.dtype), all_ragged(cache.context)
        decode, seen = decode_attend(model.config, context, tail), tail.lengths + len(ids)
        paid = torch.zeros(used, dtype=_wide(model.dtype), device=model.device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = decode(layer, q, k, v)  # the tail has the keys of these tokens now
            kv = cache.context[layer]
            if isinstance(kv, RaggedKV):
                lse = ops.decode(
                    q,
                    kv.k,
                    kv.v,
                    kv.offsets,
                    scale=model.config.attn_scale,
                    softcap=model.config.attn_softcap,
                    schedule=kv.schedule,
                    tail=(tail.k[layer], tail.v[layer], seen),
                    bias=kv.bias,
                )[1]
                add_weights_(paid, model.config, kv, q[0], lse[0], first)
            return out

        positions = torch.arange(used, used + len(ids), device=model.device)
        run_attention(model, ids[None].to(model.device), positions, attend)
    return paid.cpu() / (len(cache.scored_layers) * model.config.num_heads)


def add_weights_(
    paid: Float[Tensor, " S"],
    config: ModelConfig,
    layer: RaggedKV,
    q: Float[Tensor, "Hq T D"],
    lse: Float[Tensor, "Hq T"],
    first: int,
) -> None:
    """Adds to each token what the query heads of one layer pay to its pair.

    Rows from `first` on count, less what those before pay, see `find_sources`.
    """
    bounds, group = layer.offsets.tolist(), q.shape[0] // layer.heads
    for h in range(layer.heads):
        rows = slice(bounds[h], bounds[h + 1])
        keys, tokens = _keys(layer, h, rows, q.dtype).to(paid.dtype), layer.positions[rows].long()
        bias = None if layer.bias is None else layer.bias[rows].to(paid.dtype)
        if not len(tokens):
            continue
        for head in range(h * group, (h + 1) * group):
            question, answer = paid.new_zeros(2, len(tokens))
            rows_q, rows_lse, step = q[head], lse[head], max(1, _WEIGHTS // len(tokens))
            for part in zip(rows_q[:first].split(step), rows_lse[:first].split(step), strict=True):
                question += _weights(*part, keys, bias, config).sum(0)
            question *= USUAL / max(1, first)
            for part in zip(rows_q[first:].split(step), rows_lse[first:].split(step), strict=True):
                answer += (_weights(*part, keys, bias, config) - question).clamp_(min=0).sum(0)
            paid.index_add_(0, tokens, answer / (q.shape[1] - first))


def _weights(q: Tensor, lse: Tensor, keys: Tensor, bias: Tensor | None, config: ModelConfig) -> Float[Tensor, "T n"]:
    """The softmax weights of rows, whose log-sum-exp is known."""
    logits = q.to(keys.dtype) @ keys.T * config.attn_scale
    if config.attn_softcap is not None:
        logits = config.attn_softcap * torch.tanh(logits / config.attn_softcap)
    if bias is not None:
        logits = logits + bias
    return (logits - lse.to(keys.dtype)[:, None]).exp_()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _keys(layer: RaggedKV, head: int, rows: slice, dtype: torch.dtype) -> Tensor:
    """The keys of one head, as decoding sees them."""
    if isinstance(layer.k, Tensor):
        return layer.k[rows]
    assert isinstance(layer.k, Quantized)
    index = torch.arange(rows.start, rows.stop, device=layer.positions.device)
    counts = [0] * (head + 1) + [len(index)] * (layer.heads - head)  # all of them are this head's
    offsets = torch.tensor(counts, dtype=torch.int32, device=index.device)
    return ops.dequantize(ops.take_rows(layer.k, index), dtype=dtype, offsets=offsets)


def passages(pieces: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yields (start, stop) of passages, one after the other: they end with a sentence or a line, see `PASSAGE`."""
    least, most = PASSAGE
    start = 0
    for n, piece in enumerate(pieces, start=1):
        long = n - start
        if n == len(pieces) or long >= most or (long >= least and _ENDS.search(piece)):
            yield start, n
            start = n


def texts_of(tokenizer: prompts.Tokenizer, ids: Sequence[int]) -> list[str]:
    """Returns the text of each token; a character that several share is its last one's."""
    known = dict.fromkeys(ids)
    spelled = dict(zip(known, prompts.token_bytes(tokenizer, known), strict=True))
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [decoder.decode(spelled[i], final=n == len(ids)) for n, i in enumerate(ids, start=1)]
