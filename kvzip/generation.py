"""Generation: answers from a dense or a compressed cache, one question or many over the same frozen context."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, overload

from . import checks, options, prompts
from .cache import DenseCache, RaggedCache, check_pairs, free_bytes
from .checks import check_kind, check_texts
from .decoding import NO_TOKEN, Decoder, tail_bytes_per_token
from .inputs import check_belongs, query_ids, tokenizer_of
from .models import Model
from .parallel import agreed, everyone
from .sources import Source, find_sources


@dataclass(frozen=True)
class Answer:
    """An answer, without the stop token or stop text that ended it.

    `token_ids` decode to `text`; if a stop text begins within the last token, they decode to `text` and the part of the
    stop text in that token. `stopped` is "stop" for a stop token or text, "length" for max_tokens or the model's last
    position. `sources` are the passages of the context that the answer attended to most, where they were asked for.
    """

    text: str
    token_ids: list[int]
    stopped: Literal["stop", "length"]
    sources: tuple[Source, ...] = ()


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
    used = len(cache.token_ids) + max(map(len, ids))
    room = model.config.max_length - used
    if room < 1:
        raise ValueError(
            f"expected room for an answer within {model.config.max_length} positions (the model's length), got a "
            f"context and question of {used}: shorten it, or load the model with RoPE scaling (rope=, and max_length=)"
        )
    emit = None if on_token is None else (lambda piece, n: on_token(piece)) if isinstance(query, str) else on_token
    streams = [_Stream(tokenizer_of(model), sampling.stop, emit, n) for n in range(len(ids))]
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
        decoder.read(
            ids[group],
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            repetition_penalty=sampling.repetition_penalty,
        )
        answers += _decode(decoder, streams[group], model.stop_ids, limit)
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


def _decode(decoder: Decoder, streams: "list[_Stream]", stop_ids: tuple[int, ...], limit: int) -> list[Answer]:
    """Answers of the questions that the decoder has read.

    On a GPU the next step is launched before the host looks at the last tokens, so that the device never waits for the
    host; one step is wasted when all answers have ended.
    """
    answers: list[Answer | None] = [None] * len(streams)
    ahead = 1 if decoder.model.device.type == "cuda" else 0
    waiting: deque[Callable[[], list[int]]] = deque()
    for step in range(limit + ahead):
        if step < limit:
            if step > 0:
                decoder.step()
            waiting.append(decoder.fetch())
        if step < ahead:
            continue
        for n, token in enumerate(waiting.popleft()()[: len(streams)]):
            if answers[n] is not None:
                continue
            if token == NO_TOKEN:
                raise ValueError(
                    f"expected logits that are numbers, got NaN for token {len(streams[n].ids) + 1} of an answer: the "
                    "model overflowed, load it in bfloat16 or float32"
                )
            answers[n] = streams[n].add(token, stop_ids)
        if all(answers):
            break
    return [answer or stream.finish("length") for answer, stream in zip(answers, streams, strict=True)]


@dataclass
class _Stream:
    """One answer as it grows: ids become text, held back while a stop text or a character is incomplete."""

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
        return self._read(final=False)

    def finish(self, reason: Literal["stop", "length"]) -> Answer:
        """Ends the answer, with the text that was held back."""
        stopped = self._read(final=True)
        self._send(len(self.text))
        return stopped or Answer(self.text, self.ids, reason)

    def _read(self, *, final: bool) -> Answer | None:
        """Decodes the new ids and sends the text; returns the answer if a stop text ends it."""
        before = prompts.decode(self.tokenizer, self.ids[self.window : self.read])
        now = prompts.decode(self.tokenizer, self.ids[self.window :])
        if len(now) > len(before) and (final or not now.endswith("\ufffd")):
            self.text += now[len(before) :]
            self.window, self.read = self.read, len(self.ids)
        found = [at for at in (self.text.find(stop) for stop in self.stops) if at >= 0]
        if found:
            self.text = self.text[: min(found)]
            self._send(len(self.text))
            while self.ids and prompts.decode(self.tokenizer, self.ids[:-1]).startswith(self.text):
                self.ids.pop()
            return Answer(self.text, self.ids, "stop")
        held = max((n for stop in self.stops for n in range(1, len(stop)) if self.text.endswith(stop[:n])), default=0)
        self._send(len(self.text) - held)
        return None

    def _send(self, upto: int) -> None:
        if self.emit is not None and upto > self.sent:
            self.emit(self.text[self.sent : upto], self.index)
        self.sent = max(self.sent, upto)
