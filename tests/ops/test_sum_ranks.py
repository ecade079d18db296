"""Sums over ranks: against sums in float64, with what other ranks send made here, and by several streams of one GPU."""

import signal

import pytest
import torch
from compiling import assert_fits, compile_launches
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvzip.ops.triton.sum_ranks import BLOCK, box_shape, new_turns, sum_ranks_
from unchecked import unchecked

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]  # interpreted, bfloat16 is cut
COUNTS = [2, 8, 2 * BLOCK - 2, 2 * BLOCK, 2 * BLOCK + 6, 5 * BLOCK]


@pytest.fixture(autouse=True)
def end():
    """A kernel that waits for numbers that never come fails its test."""

    def stop(*_):
        raise TimeoutError("the test took five minutes: does a rank wait for what no rank sends?")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 300, 5)  # and again, as Hypothesis runs what failed once more
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def numbers(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed % 7 - 3)
    return x.to(dtype).to(DEVICE)


def new_boxes(size: int, count: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    shape = box_shape(size, count, dtype)
    return tuple(torch.zeros(shape, dtype=torch.int64, device=DEVICE) for _ in range(size))


def words(x: Tensor, turn: int) -> Tensor:
    """What a rank sends: the number of the sum in the upper half of a word, four bytes of numbers in the lower."""
    low = x.reshape(-1).cpu().view(torch.int32).tolist()
    sent = [((turn & 0xFFFFFFFF) << 32) | (bits & 0xFFFFFFFF) for bits in low]
    return torch.tensor([word - (1 << 64) if word >> 63 else word for word in sent], dtype=torch.int64)


def assert_sums(got: Tensor, parts: list[Tensor], residual: Tensor | None) -> None:
    """One rounding to the dtype, and one of float32 for each sum before it."""
    exact = torch.stack([x.double() for x in parts]).sum(0)
    size = torch.stack([x.double().abs() for x in parts]).sum(0)
    if residual is not None:
        exact, size = exact + residual.double(), size + residual.double().abs()
    bound = torch.finfo(got.dtype).eps / 2 * exact.abs() * 1.01 + len(parts) * 2**-23 * size
    bound += torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps  # of subnormal results
    assert ((got.double() - exact).abs() <= bound).all()


@settings(deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # to shrink waits is to wait
@given(
    size=st.sampled_from([2, 3, 4, 8]),
    count=st.sampled_from(COUNTS),
    dtype=st.sampled_from(DTYPES),
    with_residual=st.booleans(),
    first=st.sampled_from([1, 2, 2**31 - 1, -1]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_every_rank_gets_the_sum_and_sends_its_part(size, count, dtype, with_residual, first, seed, data):
    """Two sums after each other by one rank, whose box has what the others would have sent."""
    rank = data.draw(st.integers(0, size - 1))
    boxes = tuple(
        torch.zeros(box_shape(size, COUNTS[-1] + 4, dtype), dtype=torch.int64, device=DEVICE) for _ in range(size)
    )
    turns = new_turns(boxes[0]).fill_(first)
    for number in range(2):
        turn = first + number - (1 << 32 if first + number >= 1 << 31 else 0)
        parts = [numbers(seed + number + 3 * r, (1, count), dtype) for r in range(size)]
        residual = numbers(seed + 50, (1, count), dtype) if with_residual else None
        sent = [words(x, turn) for x in parts]
        for r in range(size):
            if r != rank:
                boxes[rank][turn & 1, r, : len(sent[r])] = sent[r].to(DEVICE)
        got = sum_ranks_(parts[rank].view(1, -1), boxes, turns, rank=rank, residual=residual)
        assert got.shape == (1, count) and got.dtype == dtype
        assert_sums(got, parts, residual)
        for r in range(size):
            if r != rank:
                assert torch.equal(boxes[r][turn & 1, rank, : len(sent[rank])].cpu(), sent[rank])
    programs = -(-len(sent[0]) // BLOCK)
    assert set(turns[:programs].tolist()) == {(first + 2 + 2**31) % 2**32 - 2**31}
    assert set(turns[programs:].tolist()) <= {first}


def test_all_ranks_get_the_same_bits():
    """Also where the order of a sum counts."""
    size, count = 4, 64
    parts = [torch.full((count,), x, device=DEVICE) for x in (1e8, 1.0, -1e8, 1.0)]
    found = []
    for rank in range(size):
        boxes = tuple(
            torch.zeros(box_shape(size, count, torch.float32), dtype=torch.int64, device=DEVICE) for _ in parts
        )
        for r in range(size):
            boxes[rank][1, r] = words(parts[r], 1).to(DEVICE)
        found.append(sum_ranks_(parts[rank], boxes, new_turns(boxes[0]), rank=rank))
    assert all(torch.equal(x, found[0]) for x in found)


def test_nan_and_infinity_stay():
    dtype = torch.bfloat16
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38], dtype=dtype, device=DEVICE)
    boxes = new_boxes(2, 4, dtype)
    boxes[0][1, 1] = words(x, 1).to(DEVICE)
    got = sum_ranks_(x, boxes, new_turns(boxes[0]), rank=0).float().cpu()
    assert got[0].isnan() and got[1:].tolist() == [float("inf"), -float("inf"), float("inf")]


@unchecked()
def test_what_does_not_fit_is_refused():
    """It would be written over the numbers of another rank."""
    boxes = new_boxes(2, 4, torch.float32)
    turns, x = new_turns(boxes[0]), torch.zeros(4, device=DEVICE)
    for wrong, residual in ((torch.zeros(5, device=DEVICE), None), (x, x.half()), (x, x[:2]), (x.half()[:3], None)):
        with pytest.raises(ValueError, match="expected"):
            sum_ranks_(wrong, boxes, turns, rank=0, residual=residual)
    assert not any(box.any() for box in boxes) and turns.tolist() == [1]
    assert sum_ranks_(x[:0], boxes, turns, rank=0).shape == (0,)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ranks_that_run_at_once_wait_for_each_other(size, dtype):
    """Streams of one GPU for ranks: many sums of different lengths, one after the other."""
    count = 5 * BLOCK
    for rank in range(size):  # a kernel is loaded when nothing runs, so each rank's is before any waits for another
        alone, x = new_boxes(size, count, dtype), torch.zeros(COUNTS[0], dtype=dtype, device=DEVICE)
        sent = words(x, 1)
        alone[rank][1, :, : len(sent)] = sent.to(DEVICE)
        sum_ranks_(x, alone, new_turns(alone[0]), rank=rank, residual=x)
    boxes = new_boxes(size, count, dtype)
    turns = [new_turns(box) for box in boxes]
    streams = [torch.cuda.Stream() for _ in range(size)]
    for stream in streams:  # nor is memory asked for then
        with torch.cuda.stream(stream):
            torch.empty(1, device=DEVICE)
    given = [[numbers(7 * n + r, (COUNTS[n % len(COUNTS)],), dtype) for r in range(size)] for n in range(60)]
    torch.cuda.synchronize()
    found: list[list[Tensor]] = [[] for _ in range(size)]
    for parts in given:
        for rank, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[rank].append(sum_ranks_(parts[rank], boxes, turns[rank], rank=rank, residual=parts[0]))
    torch.cuda.synchronize()
    for n, parts in enumerate(given):
        assert all(torch.equal(found[rank][n], found[0][n]) for rank in range(size))
        assert_sums(found[0][n], parts, parts[0])


SOURCE = """
import torch
from kvzip.ops.triton import sum_ranks as ranks
ranks.overlaps_launches = lambda x: {overlap}
x = torch.zeros(1, 8192, dtype=torch.{dtype})
for size in (2, 4, 8):
    boxes = tuple(torch.zeros(ranks.box_shape(size, 8192, x.dtype), dtype=torch.int64) for _ in range(size))
    ranks.sum_ranks_(x, boxes, ranks.new_turns(boxes[0]), rank=1, residual=x)
"""


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_and_sends_whole_words(dtype, capability):
    kernels = compile_launches(SOURCE.format(dtype=dtype, overlap=capability >= 90), capability=capability)
    assert len(kernels) == 3
    assert_fits(kernels, capability=capability)
    for kernel in kernels:
        assert "st.relaxed.sys.global.b64" in kernel.ptx and "ld.volatile.global" in kernel.ptx
