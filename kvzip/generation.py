"""Generation: answers from a dense or a compressed cache, one question or many over the same frozen context."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, overload

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from . import prompts
from .attention import decode_attend
from .cache import DenseCache, RaggedCache, RaggedKV, Tail, all_ragged, as_ragged, empty_tail, grow_tail
from .models import Model, forward, logits
from .prefilling import prompt_of, tokenizer_of
from .scoring import check_fingerprint


@dataclass(frozen=True)
class Answer:
    """An answer, without the stop token or stop text that ended it.

    `stopped` is "stop" for a stop token or text, "length" for max_tokens or the model's last position.
    """

    text: str
    token_ids: list[int]
    stopped: Literal["stop", "length"]


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
    stop: Sequence[str] = (),
    template: bool = True,
    on_token: Callable[..., None] | None = None,
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
    stop: Sequence[str] = (),
    template: bool = True,
    on_token: Callable[..., None] | None = None,
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
    stop: Sequence[str] = (),
    template: bool = True,
    on_token: Callable[..., None] | None = None,
) -> Answer | list[Answer]:
    """Returns the answer to a query, or those to a list of queries, run as one batch. The cache is left as it was.

    Args:
        temperature: 0 takes the most likely token; above, samples from softmax(logits / temperature).
        top_p: samples among the most likely tokens whose probabilities sum to it.
        seed: of the sampling. Every question has its own generator with this seed, so that its answer does not
            depend on the others; None draws one.
        stop: texts that end an answer, besides the model's stop tokens.
        template: False continues the context as plain text, with no chat markers after the query (cloze).
        on_token: called with each piece of text as it is decided: on_token(piece) for one query,
            on_token(piece, index) for a list.

    Raises: ValueError for a cache of another model, an empty query, options out of range, or a question that does
        not fit in the model's length.
    """
    _check_options(max_tokens, temperature, top_p)
    check_fingerprint(model, cache.fingerprint)
    queries = [query] if isinstance(query, str) else query
    ids = _query_ids(model, cache, queries, template=template)
    if not ids:
        return []
    cache = as_ragged(cache) if isinstance(cache, DenseCache) else cache
    used = len(cache.token_ids) + max(map(len, ids))
    room = model.config.max_length - used
    if room < 1:
        raise ValueError(
            f"expected room for an answer within {model.config.max_length} positions (the model's length), got a "
            f"context and question of {used}: shorten it, or pass max_length= (and rope=) to load"
        )
    seed = int(torch.empty((), dtype=torch.int64).random_()) if seed is None else seed
    generators = [torch.Generator(model.device).manual_seed(seed) for _ in ids]
    emit = None if on_token is None else (lambda piece, n: on_token(piece)) if isinstance(query, str) else on_token
    streams = [_Stream(tokenizer_of(model), tuple(stop), emit, n) for n in range(len(ids))]
    with torch.no_grad():
        answers = _decode(
            model, cache, ids, streams, generators, limit=min(max_tokens, room), temperature=temperature, top_p=top_p
        )
    return answers[0] if isinstance(query, str) else answers


def _check_options(max_tokens: int, temperature: float, top_p: float) -> None:
    if max_tokens < 1:
        raise ValueError(f"expected max_tokens of at least 1, got {max_tokens}")
    if not temperature >= 0:
        raise ValueError(f"expected a temperature of 0 (greedy) or more, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"expected 0 < top_p <= 1, got {top_p}: 1 samples among all tokens")


def _query_ids(model: Model, cache: DenseCache | RaggedCache, queries: list[str], *, template: bool) -> list[list[int]]:
    tokenizer = tokenizer_of(model)
    if not all(query.strip() for query in queries):
        raise ValueError("expected a query with text in it, got an empty one")
    if not template:
        return [prompts.encode_text(tokenizer, query) for query in queries]
    if not cache.chat:
        raise ValueError(
            "expected a cache with a chat prefix for a chat query, got one prefilled with template=False: "
            "pass template=False here too, or prefill with the template"
        )
    postfix = prompts.encode_control(tokenizer, prompt_of(model).postfix)
    texts = [prompts.QUERY_SEPARATOR + query.strip() for query in queries]
    return [prompts.encode_text(tokenizer, text) + postfix for text in texts]


def _decode(
    model: Model,
    cache: RaggedCache,
    questions: list[list[int]],
    streams: list["_Stream"],
    generators: list[torch.Generator],
    *,
    limit: int,
    temperature: float,
    top_p: float,
) -> list[Answer]:
    """Reads the questions, padded on the right, then takes a token of each per step until all have stopped."""
    batch, longest = len(questions), max(map(len, questions))
    rows = longest + limit
    if cache.tail is None:
        tail = empty_tail(cache.context, batch, rows, dtype=model.dtype)
    else:
        tail = grow_tail(cache.tail, batch, rows)
    padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids in questions], device=model.device)
    counts = torch.tensor([len(ids) for ids in questions], device=model.device)
    context = all_ragged(cache.context)
    hidden = _step(model, context, cache.context_length, tail, padded)
    last = hidden[torch.arange(batch, device=model.device), counts - 1]
    tail = _advance(tail, counts)
    answers: list[Answer | None] = [None] * batch
    for step in range(limit):
        tokens = _pick(logits(model, last), generators, temperature=temperature, top_p=top_p)
        for n, token in enumerate(tokens.tolist()):
            if answers[n] is None:
                answers[n] = streams[n].add(token, model.stop_ids)
        if step == limit - 1 or all(answer is not None for answer in answers):
            break
        last = _step(model, context, cache.context_length, tail, tokens[:, None])[:, 0]
        tail = _advance(tail, 1)
    return [
        stream.finish("length") if answer is None else answer for answer, stream in zip(answers, streams, strict=True)
    ]


def _step(
    model: Model, context: Sequence[RaggedKV], start: int, tail: Tail, token_ids: Int64[Tensor, "B T"]
) -> Float[Tensor, "B T M"]:
    """The hidden states of T tokens for each question; their keys and values go to the tail."""
    offsets = torch.arange(token_ids.shape[1], device=model.device)
    positions = start + tail.lengths[:, None].long() + offsets
    return forward(model, token_ids, positions, decode_attend(model.config, context, tail))


def _advance(tail: Tail, count: Tensor | int) -> Tail:
    return replace(tail, lengths=(tail.lengths + count).int())


def _pick(
    scores: Float[Tensor, "B V"], generators: list[torch.Generator], *, temperature: float, top_p: float
) -> Int64[Tensor, " B"]:
    if temperature == 0:
        return scores.argmax(-1)
    ordered, tokens = (scores.float() / temperature).softmax(-1).sort(stable=True, dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    ordered = ordered.masked_fill(before >= top_p, 0)  # the most likely token always stays: nothing is before it
    picks = [torch.multinomial(row, 1, generator=g) for row, g in zip(ordered, generators, strict=True)]
    return tokens.gather(1, torch.stack(picks))[:, 0]


@dataclass
class _Stream:
    """One answer in the making: ids to text as they come, held back while a stop text or a character is unfinished."""

    tokenizer: prompts.Tokenizer
    stops: tuple[str, ...]
    emit: Callable[[str, int], None] | None
    index: int
    ids: list[int] = field(default_factory=list)
    text: str = ""
    sent: int = 0
    window: int = 0  # ids[window:read] are decoded again with each new id, to place spaces right
    read: int = 0

    def add(self, token: int, stop_ids: tuple[int, ...]) -> Answer | None:
        """Takes one token; returns the answer if it ends it."""
        if token in stop_ids:
            return self.finish("stop")
        self.ids.append(token)
        self._extend(final=False)
        return self._stopped()

    def finish(self, reason: Literal["stop", "length"]) -> Answer:
        """Ends the answer: what was held back is part of it."""
        self._extend(final=True)
        stopped = self._stopped()
        if stopped is not None:
            return stopped
        self._send(len(self.text))
        return Answer(self.text, self.ids, reason)

    def _stopped(self) -> Answer | None:
        found = [at for at in (self.text.find(stop) for stop in self.stops) if at >= 0]
        if found:
            self.text = self.text[: min(found)]
            self._send(len(self.text))
            return Answer(self.text, self.ids, "stop")
        held = max((n for stop in self.stops for n in range(1, len(stop)) if self.text.endswith(stop[:n])), default=0)
        self._send(len(self.text) - held)
        return None

    def _extend(self, *, final: bool) -> None:
        before = prompts.decode(self.tokenizer, self.ids[self.window : self.read])
        now = prompts.decode(self.tokenizer, self.ids[self.window :])
        if final or not now.endswith("\ufffd"):
            self.text += now[len(before) :]
            self.window, self.read = self.read, len(self.ids)

    def _send(self, upto: int) -> None:
        if self.emit is not None and upto > self.sent:
            self.emit(self.text[self.sent : upto], self.index)
        self.sent = max(self.sent, upto)
