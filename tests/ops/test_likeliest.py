"""Where rows are largest: against a search in plain Python, kernel and reference alike."""

import math

import pytest
import torch
from compiling import assert_fits, compile_launches
from hypothesis import given
from hypothesis import strategies as st

from kvzip import ops
from kvzip.ops.likeliest import likeliest_reference
from kvzip.ops.triton.likeliest import likeliest_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
VALUES = [0.0, -0.0, 1.0, 2.0, -1.5, -3e-5, -math.inf, math.inf, math.nan]


def search(row: list[float]) -> int:
    largest = max((x for x in row if x == x), default=-math.inf)
    return -1 if any(x != x for x in row) or largest == -math.inf else row.index(largest)


@pytest.mark.parametrize("op", [likeliest_reference, likeliest_triton])
@given(
    rows=st.integers(0, 3),
    width=st.sampled_from([1, 7, 1023, 1024, 1025, 3300]),
    values=st.lists(st.sampled_from(VALUES), min_size=1, max_size=6),
    strided=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_it_is_the_first_of_the_largest(op, rows, width, values, strided, dtype, seed):
    chosen = torch.randint(len(values), (rows, width), generator=torch.Generator().manual_seed(seed))
    scores = torch.tensor(values, dtype=dtype)[chosen].to(DEVICE)
    if strided:
        scores = torch.cat([scores, torch.full_like(scores, math.inf)], 1)[:, :width]
    got = op(scores)
    assert got.dtype == torch.long
    assert got.tolist() == [search(row) for row in scores.tolist()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_are_alike_and_what_is_lost_has_no_token(dtype):
    inf, nan = math.inf, math.nan
    for row, place in (
        ([-1.0, -0.0, 0.0], 1),
        ([-1.0, 0.0, -0.0], 1),
        ([-inf, -inf, -inf], -1),
        ([-inf, -1e4, -inf], 1),
        ([inf, 1.0, nan], -1),
        ([1.0, inf, inf], 1),
        ([-1e-7, 0.0, 6e-8], 2),  # subnormal in float16
    ):
        scores = torch.tensor([row], dtype=dtype, device=DEVICE)
        assert likeliest_triton(scores).tolist() == [place]
        assert likeliest_reference(scores).tolist() == [place]


@pytest.mark.parametrize("op", [likeliest_reference, likeliest_triton])
@given(spread=st.sampled_from([1e-3, 1.0, 1e4]), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_it_orders_as_numbers_do(op, spread, dtype, seed):
    scores = (torch.randn(2, 1500, generator=torch.Generator().manual_seed(seed)) * spread - spread).to(DEVICE, dtype)
    rows = torch.arange(2, device=DEVICE)
    assert torch.equal(scores[rows, op(scores)], scores.amax(1))


def test_rows_without_scores_are_refused():
    with pytest.raises(ValueError, match=r"at least one a row, got \[2, 0\]"):
        ops.likeliest(torch.zeros(2, 0, device=DEVICE))


def compile_case(dtype: str, capability: int) -> str:
    return f"""
import torch
from kvzip.ops.triton import likeliest
likeliest.overlaps_launches = lambda x: {capability >= 90}
for rows, width in ((1, 128256), (32, 262144), (3, 1000)):
    likeliest.likeliest_triton(torch.zeros(rows, width, dtype=torch.{dtype}))
"""


@pytest.mark.parametrize(("capability", "dtype"), [(80, "float32"), (90, "bfloat16")])
def test_kernels_fit(capability, dtype):
    kernels = compile_launches(compile_case(dtype, capability), capability=capability)
    assert {kernel.name for kernel in kernels} == {"_parts_kernel", "_places_kernel"}
    assert_fits(kernels, capability=capability)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 128256), (32, 262144)])
def test_real_vocabularies(rows, width, dtype):
    scores = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    assert likeliest_triton(scores).tolist() == [row.index(max(row)) for row in scores.tolist()]
