"""Generation: answers from a dense or a compressed cache, one question or many over the same frozen context."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import overload

from . import checks, options, prompts
from .answers import Answer as Answer
from .answers import Stream
from .cache import DenseCache, RaggedCache, check_pairs, free_bytes
from .checks import check_kind, check_texts
from .decoding import Decoder, answers_of, tail_bytes_per_token
from .inputs import check_belongs, query_ids, room_for_answer, tokenizer_of
from .models import Model
from .parallel import agreed, everyone
from .sources import find_sources


@overload
def generate(
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
    on_token: Callable[..., None] | None = None,
    decoder: Decoder | None = None,
) -> Answer: ...
@overload
def generate(
    model: Model,
    cache: DenseCache | RaggedCache,
    query: list[str],
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    repetition_penalty: float = 1.0,
    template: bool = True,
    sources: int = 0,
    on_token: Callable[..., None] | None = None,
    decoder: Decoder | None = None,
) -> list[Answer]: ...
def generate(
    model: Model,
    cache: DenseCache | RaggedCache,
    query: str | list[str],
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    repetition_penalty: float = 1.0,
    template: bool = True,
    sources: int = 0,
    on_token: Callable[..., None] | None = None,
    decoder: Decoder | None = None,
) -> Answer | list[Answer]:
    """Returns the answer to a query, or the answers to a list of queries, run as one batch. The cache is not changed.

    Args:
        temperature: 0 takes the most likely token; above, samples from softmax(logits / temperature).
        top_p: samples among the fewest of the most likely tokens whose probabilities sum to it.
        seed: of the sampling, from -2**63 to 2**64 - 1. Every question has its own generator with this seed, so its
            answer does not depend on the other questions. None draws a seed.
        stop: a text that ends an answer, or several, besides the model's stop tokens.
        repetition_penalty: 1 is none. Above, what the answer has said already becomes less likely: positive logits of
            its tokens are divided by it, negative ones multiplied. 1.1 ends most loops. Tokens of the context and of
            the question count as new, so that both can be quoted.
        template: False continues the context as plain text, with no chat markers after the query (cloze).
        sources: how many passages to name that each answer attended to most (`Answer.sources`, see
            `kvzip.sources.find_sources`); each answer is then read once more.
        on_token: called with each piece of text as soon as it is known: on_token(piece) for one query,
            on_token(piece, index) for a list.
        decoder: a decoder made for this model and cache, to be used again; None makes one for this call. More questions
            than a decoder takes, or than fit in memory, are answered in several batches.

    Raises: ValueError for a cache of another model, an empty query, options out of range, a decoder of another cache
        or too small, a question that does not fit in the model's length, or a model whose logits are not numbers;
        TypeError for arguments of another kind; torch.OutOfMemoryError that says what needed the memory.
    """
    check_kind(model, Model)
    check_pairs(cache)
    named = checks.whole(sources, "sources", least=0)
    if seed is None:
        seed = agreed(
            model.share,
            lambda: options.sampling(max_tokens, temperature, top_p, None, stop, repetition_penalty).seed,
        )
    sampling = options.sampling(max_tokens, temperature, top_p, seed, stop, repetition_penalty)
    for text in sampling.stop:
        prompts.encode_text(tokenizer_of(model), text)  # raises for a text that no answer can contain
    check_belongs(model, cache)
    queries = check_texts(query, "query")
    ids = query_ids(model, cache, queries, template=template)
    if not ids:
        return []
    room = room_for_answer(model, len(cache.token_ids) + max(map(len, ids)))
    emit = None if on_token is None else (lambda piece, n: on_token(piece)) if isinstance(query, str) else on_token
    streams = [Stream(tokenizer_of(model), sampling.stop, emit, n) for n in range(len(ids))]
    limit = min(sampling.max_tokens, room)
    rows = max(map(len, ids)) + limit
    if decoder is None:
        decoder = Decoder(model, cache, batch=_batch_that_fits(model, len(ids), rows), tail=rows)
    check_kind(decoder, Decoder)
    if decoder.model is not model or decoder.cache is not cache:
        raise ValueError("expected a decoder made for this model and cache, got another's: kvzip.Decoder(model, cache)")
    if decoder.rows < rows:
        raise ValueError(
            f"expected a decoder with room for {rows} tokens (the longest question and max_tokens), got "
            f"{decoder.rows}: pass tail={rows} to Decoder, or lower max_tokens"
        )
    answers: list[Answer] = []
    for first in range(0, len(ids), decoder.batch):
        group = slice(first, first + decoder.batch)
        answers += answers_of(decoder, ids[group], sampling, limit, streams[group])
    if named:
        said = zip(ids, answers, strict=True)
        answers = [replace(a, sources=find_sources(model, cache, q, a.token_ids, count=named)) for q, a in said]
    return answers[0] if isinstance(query, str) else answers


def _batch_that_fits(model: Model, questions: int, rows: int) -> int:
    """How many questions of `rows` tokens to answer at once: as many as fit in four fifths of the free memory."""
    free = free_bytes(model.device)
    if free is None:
        return questions
    # a question needs its tail and activations to be read, and sampling up to eight float64 values per logit
    widest = 4 * (model.config.intermediate_size + model.config.hidden_size) * model.dtype.itemsize
    needed = rows * (tail_bytes_per_token(model) + widest) + 64 * model.config.vocab_size
    return max(1, min(questions, *everyone(model.share, int(0.8 * free) // needed)))
