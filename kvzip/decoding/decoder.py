"""A decoder: a batch of its own over one frozen context, for callers who wait."""

from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from .. import checks, options
from ..answers import Answer, Stream
from ..cache import DenseCache, RaggedCache, as_ragged, check_pairs, explain_out_of_memory
from ..checks import check_kind
from ..inputs import check_belongs, context_ids
from ..models import Model
from ..options import Sampling
from .alone import alone
from .batch import Batch, advance, forget
from .sequences import Sequence as Asked
from .sequences import next_parts
from .steps import Runner


class Decoder:
    """Answers up to `batch` questions at a time over a frozen cache; `generate` makes one, or is given one.

    It owns the tails of the questions and, on a GPU, CUDA graphs of the questions' prefill and of one decoding step.
    They are captured at first use and replayed later, so that a decoder used again starts at once. The cache is shared
    and never written; its own tail, if any, is copied to the beginning of each question's. Its steps are those of the
    engine, over one context that its graphs know.

    Args:
        batch: questions at once.
        tail: tokens reserved for each question and its answer together.

    Raises: ValueError for a cache of another model, or sizes below 1; torch.OutOfMemoryError that says what needed the
        memory.
    """

    @torch.no_grad()
    def __init__(self, model: Model, cache: DenseCache | RaggedCache, *, batch: int = 1, tail: int = 512) -> None:
        check_kind(model, Model)
        check_pairs(cache)
        batch, tail = checks.whole(batch, "batch", least=1), checks.whole(tail, "tail", least=1)
        check_belongs(model, cache)
        self.model, self.cache, self.batch, self.rows = model, cache, batch, tail
        cache = as_ragged(cache)
        rows = len(cache.token_ids) - cache.context_length + tail
        needed = (
            f"{batch * rows * tail_bytes_per_token(model):,} bytes for the tails of {batch} questions of {rows} tokens"
        )
        with explain_out_of_memory(needed, "ask fewer questions at once or lower max_tokens"):
            self._reader = alone(model, cache, batch=batch, rows=tail)
            self._runner = Runner(model, self._reader, slots=batch)
        self._sequences: Batch[Asked] = Batch(
            self._runner, model.stop_ids, ahead=1 if model.device.type == "cuda" else 0
        )
        self._wait: Callable[[], list[int]] = list

    def read(
        self,
        questions: Sequence[Sequence[int]],
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        repetition_penalty: float = 1.0,
    ) -> None:
        """Prefills one question in each row and chooses its answer's first token; earlier questions are dropped.

        Every question draws the same random numbers, from `seed`, so its answer does not depend on the other questions.
        The repetition penalty holds until the next questions are read, see `generate`.

        Raises: ValueError for more questions than rows, an empty or too long one, ids beyond the vocabulary, or options
            out of range; TypeError for options that are no numbers.
        """
        seed = checks.whole(seed, "seed")
        sampling = options.sampling(1, temperature, top_p, seed, repetition_penalty=repetition_penalty)
        self._begin(questions, sampling, None)
        self._wait = self._runner.run(next_parts(self._sequences.running))

    def step(self) -> None:
        """Feeds the last tokens (0 for NO_TOKEN) and chooses the next; the host does not wait.

        Raises: ValueError where the tail is full, or nothing was read.
        """
        running = self._sequences.running
        if not running or not all(sequence.decodes for sequence in running):
            raise ValueError(
                f"expected questions that were read, with room for another token in {self.rows}, got none: read "
                "questions first, or make a Decoder with a larger tail"
            )
        self._wait = self._runner.run(next_parts(running))

    def fetch(self) -> Callable[[], list[int]]:
        """Returns a function that waits for the last tokens, which are on their way to the host, and returns them.

        Call that function before launching three more steps: there are few host buffers.
        """
        return self._wait

    @torch.no_grad()
    def hidden(self, token_ids: Int64[Tensor, "B T"]) -> Float[Tensor, "B T M"]:
        """Returns the hidden states of T tokens in each row, right after the cache; earlier questions are dropped."""
        forget(self._sequences)
        lengths = torch.full((len(token_ids),), self._reader.past, dtype=torch.int32, device=token_ids.device)
        return self._reader.read(token_ids, lengths)

    def _begin(self, questions: Sequence[Sequence[int]], sampling: Sampling, limit: int | None) -> list[Asked]:
        """Takes questions in place of those before; limit None: as many tokens as the tail has room for."""
        longest = max(map(len, questions), default=0)
        if not 1 <= len(questions) <= self.batch or not min(map(len, questions)) >= 1 or longest > self.rows:
            raise ValueError(
                f"expected 1 to {self.batch} questions of 1 to {self.rows} tokens, got {len(questions)} of up to "
                f"{longest}: make a Decoder with a larger batch or tail"
            )
        context_ids(self.model, torch.tensor([i for ids in questions for i in ids]))  # or a GPU aborts the process
        rows, where = self.rows, self._reader
        draws = draws_of(sampling, rows if limit is None else limit)
        self._sequences.running = [
            Asked(
                ids=list(ids),
                sampling=sampling,
                draws=draws,
                limit=rows - len(ids) + 1 if limit is None else limit,
                past=where.past,
                start=where.start,
                slot=slot,
            )
            for slot, ids in enumerate(questions)
        ]
        return self._sequences.running


def answers_of(
    decoder: Decoder, questions: Sequence[Sequence[int]], sampling: Sampling, limit: int, streams: Iterable[Stream]
) -> list[Answer]:
    """Returns the answers to up to `batch` questions, of at most `limit` tokens, through their streams.

    Raises: ValueError for a model whose logits are not numbers; what a stream's reader or the device raises.
    """
    sequences, batch = decoder._begin(questions, sampling, limit), decoder._sequences
    for sequence, stream in zip(sequences, streams, strict=True):
        sequence.stream = stream
    try:
        going = True
        while going:
            going = advance(batch)
            for sequence in batch.changed:
                if sequence.error is not None:
                    raise sequence.error
            batch.changed.clear()
    finally:
        forget(batch)
    return [sequence.answer for sequence in sequences if sequence.answer is not None]


def draws_of(sampling: Sampling, count: int) -> list[float]:
    """Returns the random numbers of an answer of up to `count` tokens, uniform in [0, 1); none where none are drawn."""
    if sampling.temperature == 0:
        return []
    return torch.rand(count, generator=torch.Generator().manual_seed(sampling.seed)).tolist()


def tail_bytes_per_token(model: Model) -> int:
    """Returns the bytes of one token of one question in the tails of all layers."""
    config = model.config
    return 2 * len(config.layers) * config.num_kv_heads * config.head_dim * model.dtype.itemsize
