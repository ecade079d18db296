"""Pages: where questions and answers lie. A request's pages are reserved before it begins, so that none runs out."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from ..cache import Tail, explain_out_of_memory
from ..models import Model
from ..ops import Pages, append_
from ..ops.backend import use_triton

ROWS = 32  # of a page: less is wasted at the end of an answer, and attention takes 64 at a time in two of them
_SPARE = 0  # the page that rows of no request are written to


@dataclass
class PagePool:
    """Pages of all layers under one number, and which are free.

    A layer's keys are k[layer], [P R H D]: rows of a page are consecutive, so that new rows of all requests are written
    by one operation. `table` names the pages of each slot; the last slot is of no request.
    """

    k: list[Float[Tensor, "P R H D"]]
    v: list[Float[Tensor, "P R H D"]]
    table: Int32[Tensor, "S X"]
    free: list[int] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Pages for requests, free or not."""
        return len(self.k[0]) - 1


def page_bytes(model: Model) -> int:
    """Returns the bytes of one page in all layers."""
    config = model.config
    return 2 * ROWS * len(config.layers) * config.num_kv_heads * config.head_dim * model.dtype.itemsize


def pages_for(tokens: int) -> int:
    """Returns how many pages hold so many tokens."""
    return -(-tokens // ROWS)


def make_pool(model: Model, *, pages: int, slots: int) -> PagePool:
    """Returns a pool of `pages` pages for up to `slots` requests at a time.

    Raises: torch.OutOfMemoryError that says what needed the memory.
    """
    config, device = model.config, model.device
    shape = (pages + 1, ROWS, config.num_kv_heads, config.head_dim)
    longest = min(pages, pages_for(config.max_length))
    with explain_out_of_memory(f"{pages * page_bytes(model):,} bytes of pages for answers", "lower tail_tokens"):
        k, v = ([torch.empty(shape, dtype=model.dtype, device=device) for _ in config.layers] for _ in "kv")
        table = torch.full((slots + 1, longest), _SPARE, dtype=torch.int32, device=device)
    for x in (*k, *v):
        x[_SPARE].zero_()
    return PagePool(k, v, table, list(range(pages, 0, -1)))


def take_pages_(pool: PagePool, slot: int, count: int) -> list[int]:
    """Takes `count` pages, which must be free, for a slot."""
    taken = [pool.free.pop() for _ in range(count)]
    pool.table[slot, :count] = _sent(torch.tensor(taken, dtype=torch.int32), pool.table.device)
    return taken


def give_pages_(pool: PagePool, pages: Sequence[int]) -> None:
    """Gives pages back. Steps that read them must have been launched before."""
    pool.free.extend(reversed(pages))


def layer_pages(pool: PagePool, layer: int, table: Int32[Tensor, "S X"]) -> Pages:
    """Returns a layer's pages as `ops.decode_rows` takes them, with the tables of a step's requests."""
    return Pages(pool.k[layer].transpose(1, 2), pool.v[layer].transpose(1, 2), table)


def write_rows_(
    pool: PagePool,
    layer: int,
    rows: Int32[Tensor, " N"],
    k: Float[Tensor, "N H D"],
    v: Float[Tensor, "N H D"],
) -> None:
    """Writes new rows of a layer. rows[n] is page * ROWS + place of row n."""
    flat = [x.view(-1, *x.shape[2:]) for x in (pool.k[layer], pool.v[layer])]
    if use_triton(k):  # one launch that overlaps with those around it, where index_copy_ takes two
        tail_k, tail_v = (x.transpose(0, 1).expand(len(rows), -1, -1, -1) for x in flat)
        append_(tail_k, tail_v, rows, k[:, :, None], v[:, :, None])
        return
    for x, new in zip(flat, (k, v), strict=True):
        x.index_copy_(0, rows.long(), new)


def write_tail_(pool: PagePool, pages: Sequence[int], tail: Tail, length: int) -> None:
    """Copies the first `length` rows of a context's own tail to the beginning of a request's pages."""
    rows = _sent(row_numbers(pages, 0, length), pool.table.device)
    for layer, (k, v) in enumerate(zip(tail.k, tail.v, strict=True)):
        write_rows_(pool, layer, rows, *(x[0, :, :length].transpose(0, 1) for x in (k, v)))


def row_numbers(pages: Sequence[int], begin: int, stop: int) -> Int32[Tensor, " n"]:
    """Returns where rows begin:stop of a request lie, as `write_rows_` takes them."""
    places = torch.arange(begin, stop)
    return (torch.tensor(pages, dtype=torch.long)[places // ROWS] * ROWS + places % ROWS).int()


def _sent(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device. The host does not wait: a step may be running."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
