"""Further methods of `evaluation.py`, which measure what single choices in a method cost.

STUDY asks why random keys and values are lost: wrong pairs, or too few? "chunk-N" and "context-N" repeat N tokens at a
time. "lookups" is an oracle: it asks for every key of the context, with the right answer, and scores a pair by the
largest attention that it receives meanwhile.

SCORING has the ways of scoring: "context" and "chunk" are the scopes, with ":N" of another chunk size; "chunk+near"
also attends to the chunk before; "logit" and "kvzip+" are methods in scope chunk; "positions" places the repeat at the
end of its chunk; "stream-segment", "stream-running" and "stream-final" are shares of `prefill_compressed` in segments
of 2,000 tokens, "stream-unknown" is "running" with the length unknown.

FITS has the variants of `refit`, and REFITS those that the published tasks are asked of: "select" keeps pairs by scope
chunk, the others are fitted and keep as many pairs fewer as their biases take bytes.

BYTES has what is kept of a part of the full cache's bytes: kvzip's ways and the other methods'.

BITS has the bits, and whole heads by the scores that come with the library: "heads", and "heads and ends" where dropped
heads keep 16 first and 64 last tokens.
"""

import math
import re
from collections.abc import Callable
from dataclasses import replace

import torch

import kvzip
from kvzip import DenseCache, Model, RaggedCache, head_scores, prompts, score
from kvzip.attention import Formula, Sight, score_attend
from kvzip.cache import RaggedKV, Scores, global_layers
from kvzip.cache.caches import nbytes, tensors_of
from kvzip.evals.methods import METHODS, Method, expected_values, received_attention
from kvzip.generation import query_ids
from kvzip.inputs import tokenizer_of
from kvzip.models import run_attention
from kvzip.options import Refitting, Scoring
from kvzip.refitting import refit_and_measure
from kvzip.scores import attach
from kvzip.scoring import score_chunks

CHUNK, SEGMENT = 2_000, 2_000
Bits = int | tuple[int, int] | None
SINK, RECENT = 16, 64
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
ASKED = {  # pairs in a context of `kv` and `ruler_niah_multikey_3`: question and answer in a chat, and as plain text
    f'"({UUID})": "({UUID})"': (
        'Q: Key: "{}"\nThe value associated with the specified key is: ',
        'The value associated with the specified key "{}" is "{}".',
        '"{}": "{}"',
    ),
    f"One of the special magic uuids for ({UUID}) is: ({UUID})": (
        "Q: What is the special magic uuid for {} mentioned in the provided text?",
        "The special magic uuid for {} is: {}.",
        "The special magic uuid for {} mentioned in the provided text is {}.",
    ),
}


def lookups(model: Model, cache: DenseCache) -> DenseCache:
    """Returns the cache with the largest weight that a pair has in any lookup of a key with its value.

    Raises: ValueError for a context without such pairs.
    """
    tokenizer = tokenizer_of(model)
    text = prompts.decode(tokenizer, cache.token_ids[cache.start :].tolist())
    asked = [
        (question.format(key), (answer if cache.chat else prompts.QUERY_SEPARATOR + plain).format(key, value))
        for pattern, (question, answer, plain) in ASKED.items()
        for key, value in re.findall(pattern, text)
    ]
    if not asked:
        raise ValueError(f"expected a context with pairs of UUIDs, got {text[:80]!r}: take kv or ruler_niah_multikey_3")
    layers, start, stop = global_layers(cache), cache.start, cache.length
    best = torch.zeros(len(layers), model.config.num_kv_heads, stop - start, device=model.device)
    values = torch.empty_like(best)
    for question, answer in asked:
        before = query_ids(model, cache, [question], template=True)[0] if cache.chat else []
        ids = before + prompts.encode_text(tokenizer, answer)
        attend = score_attend(
            model.config,
            cache.layers,
            values,
            start=start,
            first=start,
            stop=stop,
            sight=Sight(local=False),
            formula=Formula(),
        )
        positions = torch.arange(stop, stop + len(ids), device=model.device)
        with torch.no_grad():
            run_attention(model, torch.tensor([ids], device=model.device), positions, attend)
        best = torch.maximum(best, values)
    return replace(cache, scores=Scores(best.clamp_(max=1), layers, start, stop, "lookups"))


def repeated(name: str, scope: str, chunk: int = CHUNK, method: str = "kvzip") -> Method:
    """KVzip with other options."""
    return Method(name, lambda model, cache: score(model, cache, scope=scope, method=method, chunk=chunk), "pair", "")


def near(model: Model, cache: DenseCache) -> DenseCache:
    """Scope chunk, in which each chunk's repeat also attends to the chunk before it."""
    values = score_chunks(model, cache, Scoring(chunk=CHUNK), neighbors=CHUNK)
    return attach(cache, Scores(values, global_layers(cache), cache.start, cache.length, "chunk+near"))


def positions(model: Model, cache: DenseCache) -> DenseCache:
    """Scope chunk where a repeat follows its segment: at ratio 1 nothing is dropped, so that only positions differ."""
    scores = streamed(None)(model, cache, 1.0).scores
    assert scores is not None
    values = scores.values.to(model.device)
    return attach(cache, Scores(values, global_layers(cache), cache.start, cache.length, "positions"))


def streamed(share: str | None) -> Callable[[Model, DenseCache, float], RaggedCache]:
    """A `pack` that reads the context again in segments, by a `share`; None is "running" with unknown length."""

    def pack(model: Model, cache: DenseCache, ratio: float) -> RaggedCache:
        ids = cache.token_ids[cache.start :]
        context, how = (iter([ids]), "running") if share is None else (ids, share)
        small = kvzip.prefill_compressed(
            model, context, ratio, share=how, segment=SEGMENT, chunk=CHUNK, template=cache.chat
        )
        if small.start != cache.start:
            raise ValueError(f"expected a task without an instruction, got a prefix of {cache.start} tokens: take gold")
        return small

    return pack


def by_heads(model: Model, cache: DenseCache) -> DenseCache:
    """The scores of heads that come with the library."""
    return head_scores.attach(cache, head_scores.shipped(model))


def packed(name: str, bits: Bits, level: str = "pair", sink: int = 0, recent: int = 0) -> Method:
    """Pairs by scope chunk, or whole heads, in so many bits."""

    def pack(model: Model, cache: DenseCache, ratio: float) -> RaggedCache:
        return kvzip.compress(cache, ratio, level=level, bits=bits, sink=sink, recent=recent)

    return Method(name, score if level == "pair" else by_heads, level, "", pack)


def within(base: Method, name: str = "", *, level: str = "", bits: Bits = None, fitted: bool = False) -> Method:
    """As many pairs of a method as fit into a part of the full cache's bytes; fitted, each head has a fifth of its
    equal share as a floor, and its biases are counted."""
    shared = level or base.level

    def pack(model: Model, cache: DenseCache, ratio: float) -> RaggedCache:
        size = int(ratio * nbytes(cache))
        floor = FLOORS["+fifth"] if fitted else 0.0
        small = kvzip.compress(cache, budget_bytes=size, level=shared, floor=floor, bits=bits, biases=fitted)
        return kvzip.refit(model, cache, small) if fitted else small

    return replace(base, name=name or base.name, level=shared, pack=pack)


def attention_sums(model: Model, cache: DenseCache) -> DenseCache:
    """The attention that each pair receives in the context, which H2O orders each head by."""
    values = received_attention(model, cache)
    return attach(cache, Scores(values, global_layers(cache), cache.start, cache.length, "h2o"))


def expected_sums(model: Model, cache: DenseCache) -> DenseCache:
    """Expected Attention's scores before AdaKV shares a layer's budget."""
    values = expected_values(model, cache, 512, 0.01)
    return attach(cache, Scores(values, global_layers(cache), cache.start, cache.length, "expected-attention"))


def floored(cache: DenseCache, ratio: float, floor: float) -> RaggedCache:
    """Returns what compress keeps of a ratio, of which each head has at least the part `floor` of its equal share."""
    return kvzip.compress(cache, ratio, min_rows=int(floor * ratio * (cache.length - cache.start)))


def equal_bytes(cache: DenseCache, ratio: float, floor: float = 0.0) -> RaggedCache:
    """Returns what `floored` does, less as many pairs as make room for a bias of 2 bytes for every row."""
    small = floored(cache, ratio, floor)
    layers = [layer for layer in small.context if isinstance(layer, RaggedKV)]
    rows = sum(len(layer.positions) for layer in layers)
    row = sum(x.nbytes for x in tensors_of([(layer.k, layer.v, layer.positions) for layer in layers])) / rows  # bytes
    kept = small.kept - math.ceil(2 * rows / (row + 2))
    return floored(cache, max(1, kept) / small.total, floor)


def refitted(name: str, options: Refitting, floor: float = 0.0, scores: str = "kvzip") -> Method:
    """Pairs by scope chunk, fitted, in the bytes of those that are not."""

    def pack(model: Model, cache: DenseCache, ratio: float) -> RaggedCache:
        return refit_and_measure(model, cache, equal_bytes(cache, ratio, floor), options)[0]

    own = repeated(name, "chunk", method=scores)
    return replace(own, cite="Attention Matching, arXiv 2602.16284", pack=pack)


def named(*methods: Method) -> dict[str, Method]:
    return {method.name: method for method in methods}


STUDY = named(
    Method("lookups", lookups, "pair", "none: it has seen the questions and the answers"),
    *(repeated(f"chunk-{chunk}", "chunk", chunk) for chunk in (1000, 500, 250, 125, 60)),
    *(repeated(f"context-{chunk}", "context", chunk) for chunk in (500, 125)),
)
SCORING = named(
    repeated("context", "context"),
    repeated("chunk", "chunk"),
    Method("chunk+near", near, "pair", ""),
    *(repeated(f"chunk:{chunk}", "chunk", chunk) for chunk in (512, 1024, 4096, 8192)),
    repeated("context:512", "context", 512),
    repeated("kvzip+", "chunk", method="kvzip+"),
    repeated("logit", "chunk", method="logit"),
    Method("positions", positions, "pair", ""),
    METHODS["random"],
)
STREAMS = named(
    *(
        Method(f"stream-{name}", lambda model, cache: cache, "pair", "", streamed(share))
        for name, share in (("segment", "segment"), ("running", "running"), ("final", "final"), ("unknown", None))
    )
)
BITS = named(*(packed(f"{bits} bits", None if bits == 16 else bits) for bits in (16, 8, 4)))
FEWER = named(packed("16 bits", None), packed("4 bits", 4), packed("4 and 2 bits", (4, 2)))
CHUNKED = METHODS["kvzip-chunk"]
OWN = named(
    *(within(METHODS[name]) for name in ("kvzip", "kvzip-chunk", "kvzip+")),
    within(CHUNKED, "equal heads", level="uniform"),
    within(METHODS["kvzip-heads"], "whole heads"),
    within(CHUNKED, "refit", fitted=True),
)
FEW_BITS = {
    8: within(CHUNKED, "refit, 8 bits", bits=8, fitted=True),
    4: within(CHUNKED, "refit, 4 bits", bits=4, fitted=True),
    2: within(CHUNKED, "refit, 4 and 2 bits", bits=(4, 2), fitted=True),
}
OTHERS = named(
    *(within(method) for name, method in METHODS.items() if not name.startswith("kvzip")),
    within(METHODS["snapkv"], "snapkv, shared", level="pair"),
    within(Method("h2o, shared", attention_sums, "pair", "H2O, arXiv 2306.14048")),
    within(METHODS["key-norm"], "key-norm, shared", level="pair"),
    within(Method("expected-attention, shared", expected_sums, "pair", "Expected Attention, arXiv 2510.00636")),
)
"""The baselines with their papers' budgets, and "shared": with one over all heads, by score, as kvzip has it."""
BYTES = {**OWN, **named(*FEW_BITS.values()), **OTHERS}
"""Of these `ratio` is a part of the full cache's bytes."""
HEADS = named(
    packed("heads", None, "head"),
    packed("heads, 4 bits", 4, "head"),
    packed("heads and ends", None, "head", SINK, RECENT),
    packed("heads and ends, 4 bits", 4, "head", SINK, RECENT),
)
FLOORS = {"": 0.0, "+tenth": 0.1, "+fifth": 0.2, "+third": 1 / 3, "+half": 0.5}
"""After a variant's name: this part of what the ratio keeps is the same in every head, as `min_rows`."""
FITS = {
    "bias": Refitting(values=False),
    "values": Refitting(bound=0.0),
    "both": Refitting(),
    **{f"bias:bound={x:g}": Refitting(values=False, bound=x) for x in (0.5, 1.0, 2.0, 5.0)},
    **{f"both:bound={x:g}": Refitting(bound=x) for x in (0.5, 1.0, 2.0, 5.0)},
    **{f"both:pull={x:g}": Refitting(pull=x) for x in (1e-2, 1.0)},
    **{f"both:ridge={x:g}": Refitting(ridge=x) for x in (1e-2, 1e-1)},
    **{f"both:every={n}": Refitting(every=n) for n in (2, 4, 8)},
}
REFITS = named(
    repeated("select", "chunk"),
    refitted("bias", FITS["bias"]),
    refitted("refit", FITS["both"]),
    refitted("refit+fifth", FITS["both"], FLOORS["+fifth"]),
    repeated("select@kvzip+", "chunk", method="kvzip+"),
    refitted("refit@kvzip+", FITS["both"], scores="kvzip+"),
    refitted("refit+fifth@kvzip+", FITS["both"], FLOORS["+fifth"], "kvzip+"),
)
"""Of pairs by the scores of "kvzip+" after @; floors as in FLOORS."""
