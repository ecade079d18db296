"""One row times weights of 4 bits: inputs become integers, whose products are exact."""

from dataclasses import replace

import pytest
import torch
from compiling import assert_fits, compile_launches
from hypothesis import given, settings
from hypothesis import strategies as st

from kvzip import ops
from kvzip.ops.triton import linear
from kvzip.ops.triton.linear_integers import LAUNCHES, Launch, has_integers, integer_row, launch_config
from ops.test_linear_quantized import check, check_linear, meant, values, weight

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = [torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]  # interpreted, bfloat16 is cut off
CASES = [  # kind, outputs, inputs, group, rows, zeros
    ("int4", 24, 128, 64, 1, False),
    ("int4", 18, 96, 32, 1, True),
    ("int4", 34, 1056, None, 1, True),
    ("int4", 40, 512, 128, 16, False),
]


@settings(max_examples=10 if DEVICE == "cpu" else 30)
@given(
    case=st.sampled_from(CASES),
    norm=st.sampled_from([None, 0, 1]),
    gate=st.sampled_from([None, "silu", "gelu_tanh"]),
    bias=st.booleans(),
    residual=st.booleans(),
    dtype=st.sampled_from(HALVES),
    launch=st.sampled_from([None, Launch(4, 8, 64), Launch(16, 16, 0, early=True)]),
)
def test_a_row_is_the_product_with_the_weights_meant(case, norm, gate, bias, residual, dtype, launch):
    def run(*args, **options):
        return integer_row(*args, **options, config=launch)

    check_linear(run, (1, 1), case, norm, gate, bias, residual, dtype)


@settings(max_examples=10 if DEVICE == "cpu" else 30)
@given(
    power=st.sampled_from([-24, -9, 0, 7]),
    zeros=st.booleans(),
    dtype=st.sampled_from(HALVES),
    seed=st.integers(0, 99),
)
def test_integers_of_eight_bits_are_multiplied_exactly(power, zeros, dtype, seed):
    """Whatever their common power of two: no sum here has more bits than float32, and so only the last is rounded."""
    generator = torch.Generator().manual_seed(seed)
    w = weight("int4", 8, 64, zeros=zeros, seed=seed)
    w = replace(w, scale=torch.full_like(w.scale, 2.0 ** (-9 - power)))
    numbers = torch.randint(-255, 256, (1, 64), generator=generator)
    numbers[0, ::16] = torch.tensor([1, -255, 255, 0])
    x = (numbers.double() * 2.0**power).to(DEVICE, dtype)
    exact = numbers.double() @ meant(w).T * 2.0**power
    assert torch.equal(integer_row(x, w).cpu(), exact.to(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_one_large_input_costs_no_more_than_16_bit_numbers_do(dtype):
    """Such an input makes the others of its chunk coarser, in a sum that it rules."""
    for large in (3e2, 65504):
        x = values(1, 512, dtype=dtype)
        x[0, 70] = large
        check(integer_row, x, weight("int4", 24, 512, group=128, zeros=True), None)
        check(integer_row, x * 0 + x[:, :1], weight("int4", 24, 512, group=128), None)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_not_lost(value):
    x = values(1, 512, dtype=torch.float16)
    x[0, 300] = value
    norm = ops.Norm(values(512, seed=3, dtype=torch.float16), 1e-5)
    w = weight("int4", 24, 512, group=128)
    assert integer_row(x, w).isnan().all() and integer_row(x, w, norm=norm).isnan().all()


def test_the_largest_integer_is_not_exceeded():
    """An input times its norm's weight just below 2: it rounds to 2 ** 15 steps, which 16 bits do not have."""
    x = torch.full((1, 64), 1025 / 1024, dtype=torch.float16, device=DEVICE)
    norm = ops.Norm(torch.full((64,), 2046 / 1024, dtype=torch.float16, device=DEVICE), 1e-5)
    assert 2 - 2**-15 < 1025 * 2046 / 2**20 < 2
    check(integer_row, x, weight("int4", 24, 64), None, norm=norm)


def test_zeros_give_zeros():
    x = torch.zeros(1, 64, dtype=torch.bfloat16, device=DEVICE)
    assert not integer_row(x, weight("int4", 24, 64, zeros=True)).any()


def test_a_row_may_begin_anywhere():
    whole = values(1, 129, dtype=torch.float16)
    w = weight("int4", 24, 128, group=64)
    odd = whole[:, 1:]
    assert odd.data_ptr() % 16 and torch.equal(integer_row(odd, w), integer_row(odd.clone(), w))


def test_one_row_of_integers_goes_here_and_what_does_not_fit_elsewhere(monkeypatch):
    x = values(1, 96, dtype=torch.float16)
    assert has_integers(weight("int4", 8, 96, group=32), x) and has_integers(weight("int4", 8, 96), x)
    for unfit in (weight("e4m3", 8, 96), weight("int8", 8, 96), weight("int4", 8, 80), weight("int4", 8, 96, group=24)):
        assert not has_integers(unfit, x)
    assert not has_integers(weight("int4", 8, 96), x.float())
    assert not has_integers(weight("int4", 8, 96), x, ops.Norm(values(96), 1e-5))
    calls = []
    monkeypatch.setattr(linear, "integer_row", lambda *a, **o: calls.append(a) or integer_row(*a, **o))
    linear.linear_triton(x, weight("int4", 8, 96, group=32))
    linear.linear_triton(values(2, 96, dtype=torch.float16), weight("int4", 8, 96, group=32))
    assert len(calls) == 1


def compile_case(dtype: str, capability: int) -> str:
    return f"""
import torch
from kvzip import ops
from kvzip.ops.triton import linear_integers
from kvzip.ops.weights import empty_weight
linear_integers.overlaps_launches = lambda x: {capability >= 90}
new = lambda *shape: torch.zeros(shape, dtype=torch.{dtype})
def make(n, k, zeros=False, rows=1, group=128):
    how = dict(kind="int4", group=group, rows=rows, zeros=zeros, scale_dtype=torch.float16)
    return empty_weight(n, k, **how, device="cpu")
for width in (4096, 8192):
    norm = ops.Norm(new(width), 1e-5, 0)
    linear_integers.integer_row(new(1, width), make(6144, width), new(6144), norm=norm)
    linear_integers.integer_row(new(1, width), make(7 * width, width, zeros=True), norm=norm, gate="silu")
    linear_integers.integer_row(new(1, width), make(4096, width), residual=new(1, 4096))
    inputs = width // 2 * 7
    linear_integers.integer_row(new(1, inputs), make(4096, inputs, zeros=True), residual=new(1, 4096))
linear_integers.integer_row(new(1, 576), make(1538, 576, group=64), norm=ops.Norm(new(576), 1e-5, 1))
linear_integers.integer_row(new(1, 4096), make(4096, 4096, zeros=True, rows=128, group=64))
"""


@pytest.mark.parametrize(("dtype", "capability"), [("bfloat16", 90), ("float16", 80)])
def test_kernels_fit(dtype, capability):
    check_fits(dtype, capability)


def check_fits(dtype: str, capability: int) -> None:
    kernels = compile_launches(compile_case(dtype, capability), capability=capability)
    assert_fits(kernels, capability=capability)
    assert all("dp4a" in kernel.ptx for kernel in kernels), "products are not of integers"
    assert all("ld.global.v4" in kernel.ptx or "ld.global.L1" in kernel.ptx for kernel in kernels)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_all_kernels_fit(dtype, capability):
    check_fits(dtype, capability)


def test_launches_that_are_chosen_are_timed():
    chosen = {launch_config(n, k) for n, k in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))}
    assert chosen <= set(LAUNCHES) and len(set(LAUNCHES)) == len(LAUNCHES)


@pytest.mark.gpu
@pytest.mark.parametrize("launch", LAUNCHES)
def test_every_launch_on_the_gpu(launch):
    def run(*args, **options):
        return integer_row(*args, **options, config=launch)

    check_linear(run, (1, 1), ("int4", 6144, 4096, 128, 1, False), 0, "silu", False, False, torch.bfloat16)
    check_linear(run, (1, 1), ("int4", 1000, 14336, 128, 1, True), None, None, True, True, torch.float16)
