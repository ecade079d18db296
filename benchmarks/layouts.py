"""Where rows of queries, keys and values stand for the alternatives that kvzip is timed beside.

None of them has heads of different lengths, so a head is a sequence of its own with one KV head.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

PAGE = 16  # rows of a page

Pairs = Sequence[tuple[Tensor, Tensor]]
"""Keys and values [N D] of all heads, packed head after head; one pair for each copy that keeps the L2 cold."""


def rows_by_head(q: Tensor, heads: int) -> Tensor:
    """The query rows [H*B*T*G D] of each head, one head after the other."""
    return q.unflatten(1, (heads, -1)).permute(1, 0, 3, 2, 4).reshape(-1, q.shape[-1]).contiguous()


def by_question(rows: Tensor, q: Tensor, heads: int) -> Tensor:
    """Results of such rows as a view [B H G T D]."""
    return rows.view(heads, q.shape[0], q.shape[2], -1, q.shape[3]).permute(1, 0, 3, 2, 4)


# --- several contexts, with tails


class Batch(NamedTuple):
    """C contexts of H heads, U questions each, and the tails of all questions.

    q: [C U Hq D], one token each. contexts: for each copy, keys and values [N D] of one context after the other, head
    after head. lengths: rows of each head, of each context. tails: keys and values [C U H R D], all rows in use.
    """

    q: Tensor
    contexts: Pairs
    lengths: list[list[int]]
    tails: tuple[Tensor, Tensor]
    scale: float


class Layout(NamedTuple):
    """A batch as two levels of sequences: a context's heads, and each question's heads with their tail."""

    rows: Tensor  # [C*H*U*G D]: the rows of a context's head are neighbours, and in them those of a question
    starts: tuple[Tensor, Tensor]  # of a context's head, and of a question's, in the rows
    lengths: tuple[list[int], list[int]]  # keys of a context's head, and of a question's
    tails: list[Tensor]  # keys and values [C*H*U*R D]


def layout_of(batch: Batch) -> Layout:
    """Copies the queries and tails of a batch to where the sequences of both levels have their rows."""
    contexts, questions, _, width = batch.q.shape
    heads, long = len(batch.lengths[0]), batch.tails[0].shape[3]
    rows = batch.q.unflatten(2, (heads, -1)).transpose(1, 2).reshape(-1, width).contiguous()
    sequences = contexts * heads
    starts = tuple(starts_of([len(rows) // n] * n, rows.device) for n in (sequences, sequences * questions))
    tails = [x.transpose(1, 2).reshape(-1, width).contiguous() for x in batch.tails]
    return Layout(rows, starts, ([n for one in batch.lengths for n in one], [long] * (sequences * questions)), tails)


def by_context(rows: Tensor, batch: Batch) -> Tensor:
    """Results of such rows as a view [C U H G D]."""
    contexts, questions, _, width = batch.q.shape
    return rows.view(contexts, len(batch.lengths[0]), questions, -1, width).transpose(1, 2)


# --- pages


class Table(NamedTuple):
    """Which pages each sequence has, and how many rows of its last one; int32."""

    starts: Tensor
    pages: Tensor
    last: Tensor


def page_table(lengths: list[int], device: torch.device) -> Table:
    """The table of sequences of at least one row whose pages follow each other."""
    counts = [-(-n // PAGE) for n in lengths]
    pages = torch.arange(sum(counts), dtype=torch.int32, device=device)
    last = torch.tensor([(n - 1) % PAGE + 1 for n in lengths], dtype=torch.int32, device=device)
    return Table(starts_of(counts, device), pages, last)


def paged_pairs(pairs: Pairs, lengths: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Packed rows as pages [P 16 1 D]; each sequence begins a page."""
    counts = [-(-n // PAGE) for n in lengths]
    to = [first * PAGE + row for first, n in zip(_sums(counts), lengths, strict=False) for row in range(n)]
    place = torch.tensor(to, device=pairs[0][0].device)

    def paged(x: Tensor) -> Tensor:
        pages = x.new_zeros(sum(counts) * PAGE, x.shape[1])
        return pages.index_copy_(0, place, x).view(-1, PAGE, 1, x.shape[1])

    return [(paged(k), paged(v)) for k, v in pairs]


def two_levels(batch: Batch, at: Layout) -> tuple[list[Table], list[tuple[Tensor, Tensor]]]:
    """The page tables of contexts and of tails in one cache, and that cache for each copy of the contexts."""
    tables = [page_table(lengths, batch.q.device) for lengths in at.lengths]
    tables[1] = tables[1]._replace(pages=tables[1].pages + len(tables[0].pages))
    ends = paged_pairs([(at.tails[0], at.tails[1])], at.lengths[1])[0]
    caches = paged_pairs(batch.contexts, at.lengths[0])
    return tables, [(torch.cat([k, ends[0]]), torch.cat([v, ends[1]])) for k, v in caches]


def starts_of(counts: Sequence[int], device: torch.device) -> Tensor:
    """Where each of some sequences begins, and the end of the last, as int32."""
    return torch.tensor(_sums(counts), dtype=torch.int32, device=device)


def _sums(counts: Sequence[int]) -> list[int]:
    return list(accumulate(counts, initial=0))
