"""Decoding: the buffers and CUDA graphs that decode answers to a batch of questions over one frozen context."""

import functools
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from . import checks, options
from .attention import decode_attend
from .cache import DenseCache, RaggedCache, all_ragged, as_ragged, check_pairs, explain_out_of_memory
from .cache.caches import roomy_tail
from .checks import check_kind
from .inputs import check_belongs, context_ids
from .models import Model, forward, logits

NO_TOKEN = -1  # in place of a token where the logits are NaN or all -inf
_ROWS_OF_A_GRAPH = 4096  # questions x tokens; larger passes are bound by matmuls, not by launches


class Decoder:
    """Answers up to `batch` questions at a time over a frozen cache; `generate` makes one, or is given one.

    It owns the tails of the questions and, on a GPU, CUDA graphs of the questions' prefill and of one decoding step.
    They are captured at first use and replayed later, so that a decoder used again starts at once. The cache is shared
    and never written; its own tail, if any, is copied to the beginning of each question's.

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
        self._layers, self._start = all_ragged(cache.context), cache.context_length
        self._past = len(cache.token_ids) - cache.context_length  # tokens in the cache's own tail
        rows = self._past + tail
        needed = (
            f"{batch * rows * tail_bytes_per_token(model):,} bytes for the tails of {batch} questions of {rows} tokens"
        )
        with explain_out_of_memory(needed, "ask fewer questions at once or lower max_tokens"):
            self._tail = roomy_tail(cache, batch, tail, dtype=model.dtype)
            self.tokens = torch.zeros(batch, dtype=torch.long, device=model.device)
            self._controls = torch.ones(2, dtype=torch.float64, device=model.device)  # temperature, top_p
            self._draws = torch.zeros(tail, dtype=torch.float32, device=model.device)
            self._drawn = torch.zeros(1, dtype=torch.long, device=model.device)
            self._counts = torch.zeros(batch, dtype=torch.long, device=model.device)
        self._sampled = self._penalized = False
        self._penalty = torch.ones((), dtype=torch.float32, device=model.device)
        self._said: Tensor | None = None  # [batch, V], which tokens an answer has; made for the first penalty
        self._replays = model.device.type == "cuda"
        self._questions: dict[int, Tensor] = {}  # by padded length
        self._graphs: dict[tuple[int, bool, bool], Callable[[], None]] = {}  # by the ids' address, sampled, penalized
        self._host: list[tuple[Tensor, Any]] = []

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
        longest = max(map(len, questions), default=0)
        if not 1 <= len(questions) <= self.batch or not min(map(len, questions)) >= 1 or longest > self.rows:
            raise ValueError(
                f"expected 1 to {self.batch} questions of 1 to {self.rows} tokens, got {len(questions)} of up to "
                f"{longest}: make a Decoder with a larger batch or tail"
            )
        replayed = self._replays and self.batch * longest <= _ROWS_OF_A_GRAPH
        if replayed:  # padded, so that one graph serves many lengths
            longest = min(-(-longest // 32) * 32, self.rows)
        rows = [*questions, *[questions[-1]] * (self.batch - len(questions))]
        padded = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in rows])
        context_ids(self.model, padded.flatten())  # a GPU would abort the process on an id beyond the vocabulary
        self._counts.copy_(torch.tensor([len(ids) for ids in rows]))
        self._tail.lengths.fill_(self._past)
        self._sampled = sampling.temperature > 0
        if self._sampled:
            self._draws.copy_(torch.rand(self.rows, generator=torch.Generator().manual_seed(sampling.seed)))
            self._controls.copy_(torch.tensor([sampling.temperature, sampling.top_p], dtype=torch.float64))
            self._drawn.zero_()
        self._penalized = sampling.repetition_penalty > 1
        if self._penalized:
            if self._said is None:
                shape = (self.batch, self.model.config.vocab_size)
                self._said = torch.empty(shape, dtype=torch.bool, device=self.model.device)
            self._said.zero_()
            self._penalty.fill_(sampling.repetition_penalty)
        if not replayed:
            self._advance(padded.to(self.model.device))
            return
        if longest not in self._questions:
            self._questions[longest] = torch.empty_like(padded, device=self.model.device)
        self._run(self._questions[longest].copy_(padded))

    def step(self) -> None:
        """Feeds the last tokens (0 for NO_TOKEN) and chooses the next; the host does not wait."""
        self._run(self.tokens[:, None])

    def fetch(self) -> Callable[[], list[int]]:
        """Starts copying the last tokens to the host; the function returned waits for the copy and returns them.

        Call that function before fetching twice more: there are two host buffers.
        """
        if self.model.device.type != "cuda":
            tokens = self.tokens.tolist()
            return lambda: tokens
        if not self._host:
            buffers = torch.empty((2, self.batch), dtype=torch.long, pin_memory=True)
            self._host = [(buffer, torch.cuda.Event()) for buffer in buffers]
        host, copied = self._host.pop(0)
        self._host.append((host, copied))
        host.copy_(self.tokens, non_blocking=True)
        copied.record(torch.cuda.current_stream(self.tokens.device))  # another device may be current

        def wait() -> list[int]:
            copied.synchronize()
            return host.tolist()

        return wait

    def _run(self, token_ids: Int64[Tensor, "B T"]) -> None:
        """Runs `_advance`, on a GPU as a CUDA graph captured at first use; the ids must keep their address."""
        if not self._replays:
            self._advance(token_ids)
            return
        key = (token_ids.data_ptr(), self._sampled, self._penalized)
        if key not in self._graphs:
            self._graphs[key] = _capture(lambda: self._advance(token_ids), self.model.device)
        self._graphs[key]()

    @torch.no_grad()
    def _advance(self, token_ids: Int64[Tensor, "B T"]) -> None:
        """Appends T tokens to each tail (if T > 1 the first `_counts`, the rest is padding) and chooses the next."""
        hidden = self._forward(token_ids)
        if token_ids.shape[1] == 1:
            last, count = hidden[:, 0], 1
        else:
            last, count = hidden[torch.arange(self.batch, device=token_ids.device), self._counts - 1], self._counts
        scores = logits(self.model, last)
        if self._penalized:
            assert self._said is not None
            scores = penalize(scores, self._said, self._penalty)
        likeliest = scores.argmax(-1, keepdim=True)  # argmax returns a NaN if there is one
        top = scores.gather(-1, likeliest)
        if self._sampled:
            draw = self._draws.gather(0, self._drawn.clamp(max=self.rows - 1))
            chosen = sample(scores, draw, temperature=self._controls[0], top_p=self._controls[1])
            self._drawn.add_(1)
        else:
            chosen = likeliest[:, 0]
        if self._penalized:
            assert self._said is not None
            self._said.scatter_(1, chosen[:, None], True)
        self.tokens.copy_(torch.where(top[:, 0] > -torch.inf, chosen, NO_TOKEN))
        self._tail.lengths.add_(count)

    @torch.no_grad()
    def hidden(self, token_ids: Int64[Tensor, "B T"]) -> Float[Tensor, "B T M"]:
        """Returns the hidden states of T tokens in each row, right after the cache; earlier questions are dropped."""
        self._tail.lengths.fill_(self._past)
        return self._forward(token_ids)

    def _forward(self, token_ids: Int64[Tensor, "B T"]) -> Float[Tensor, "B T M"]:
        steps = torch.arange(token_ids.shape[1], device=token_ids.device)
        positions = self._start + self._tail.lengths[:, None].long() + steps
        attend = decode_attend(self.model.config, self._layers, self._tail)
        return forward(self.model, token_ids.clamp(min=0), positions, attend)


def penalize(
    scores: Float[Tensor, "B V"], said: Bool[Tensor, "B V"], penalty: Float32[Tensor, ""]
) -> Float[Tensor, "B V"]:
    """Returns scores in which those of tokens that were said are divided by the penalty, or multiplied if negative.

    Source: CTRL, arXiv 1909.05858, section 4.1, with the rule for negative scores that Transformers has.
    """
    less = torch.where(scores > 0, scores / penalty, scores * penalty)
    return torch.where(said, less, scores).to(scores.dtype)


def sample(
    scores: Float[Tensor, "B V"],
    draw: Float32[Tensor, " 1"],
    *,
    temperature: Float[Tensor, ""],
    top_p: Float[Tensor, ""],
) -> Int64[Tensor, " B"]:
    """Returns a token of each row, drawn from softmax(scores / temperature) among the most likely that sum to top_p.

    It inverts the cumulative probabilities at `draw`, uniform in [0, 1), so that the host does not wait for the device.
    Sums are float64: no temperature above 0 turns finite scores into NaN, and a top_p just below 1 differs from 1.
    Infinite scores share all of the probability. A row with NaN gives an arbitrary token.
    """
    ordered, tokens = scores.sort(stable=True, dim=-1, descending=True)
    wide = ordered.double()
    below = torch.where(wide == wide[:, :1], 0.0, wide - wide[:, :1])
    weights = torch.exp(below / temperature.double())  # at most 1
    reached = weights.cumsum(-1)
    before = reached - weights
    weights = weights.masked_fill(before >= top_p * reached[:, -1:], 0)  # the first always stays
    reached = weights.cumsum(-1)
    place = (reached <= draw * reached[:, -1:]).sum(-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
    return tokens.gather(1, place)[:, 0]


def tail_bytes_per_token(model: Model) -> int:
    """Returns the bytes of one token of one question in the tails of all layers."""
    config = model.config
    return 2 * len(config.layers) * config.num_kv_heads * config.head_dim * model.dtype.itemsize


def _capture(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Returns a function that replays a CUDA graph of what `run` launches. Capturing executes nothing.

    torch gives the memory of deleted graphs back to the driver when an allocation fails, but not during a capture. If
    a capture runs out of memory, that memory is freed here and the capture is tried once more.
    """
    try:
        return _capture_once(run, device)
    except RuntimeError as error:  # torch's OutOfMemoryError, or a driver error without a type of its own
        if "out of memory" not in str(error):
            raise
    torch.cuda.empty_cache()  # not in the except block, where the exception still holds the failed capture's tensors
    return _capture_once(run, device)


def _capture_once(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    stream = _capture_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        # torch.cuda.graph would also collect garbage and empty the allocator's cache, which is slower than the capture
        graph.capture_begin(capture_error_mode="relaxed")  # kernels may be compiled and loaded during the capture
        try:
            run()
        except BaseException:
            with suppress(RuntimeError):  # ending a broken capture may fail too; the first error is the cause
                graph.capture_end()
            raise
        graph.capture_end()
    torch.cuda.current_stream(device).wait_stream(stream)
    return graph.replay


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream for all captures on a device: cuBLAS keeps a workspace of 32 MiB for every stream it has seen."""
    return torch.cuda.Stream(device)
