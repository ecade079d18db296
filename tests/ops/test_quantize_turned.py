"""Laws of rows that are turned and quantized, and the kernels against the reference."""

from itertools import pairwise

import pytest
import torch
from compiling import assert_fits, compile_calls
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvzip.ops import dequantize, quantize, turn
from kvzip.ops.quantize_turned import (
    measure_channels_turned_reference,
    quantize_like,
    quantize_turned,
    quantize_turned_ahead,
    quantize_turned_reference,
    shape_feedback,
)
from kvzip.ops.triton.quantize_turned import measure_channels_turned_triton, quantize_turned_triton
from kvzip.ops.types import NARROW, SHAPED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def keys(lengths, width, dtype, seed=0):
    """Keys of heads as models have them: channels of very different size, far from 0, and a first row far from all."""
    draw = torch.Generator().manual_seed(seed)
    size = torch.exp2(torch.rand(width, generator=draw) * 6 - 3)
    x = torch.randn(sum(lengths), width, generator=draw) * size + torch.randn(width, generator=draw) * 8 * size
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    for begin, end in pairwise(offsets.tolist()):
        if end > begin:
            x[begin] *= -3
    return x.to(DEVICE, dtype), offsets.to(DEVICE)


def matrix(width: int) -> Tensor:
    """The orthonormal matrix in float64, by Sylvester's construction."""
    found, two = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while width % (2 * len(found)) == 0:
        found = torch.kron(found, two)
    return torch.block_diag(*[found / len(found) ** 0.5] * (width // len(found))).to(DEVICE)


def meant(x: Tensor, q, offsets) -> Tensor:
    """What is packed of rows: their rests, turned, in float64."""
    rest = x.double()
    if q.channels is not None:
        center, spread = (t.double().repeat_interleave(offsets.diff(), 0) for t in vars(q.channels).values())
        rest = (rest - center) / spread
    return rest @ matrix(x.shape[1])


def stored(q) -> Tensor:
    """What codes, scales and zeros say, in float64."""
    places = range(8 - q.bits, -1, -q.bits)
    codes = torch.stack([q.codes >> place & 2**q.bits - 1 for place in places], dim=2).flatten(1)
    steps = codes.double().unflatten(1, (-1, q.group))
    return (steps * q.scale.double()[..., None] + q.zero.double()[..., None]).flatten(1)


def off(x, q, offsets):
    """How far each value is from what was meant, in its step, and what rounding to float16 first may add."""
    want = meant(x, q, offsets)
    step = q.scale.double().repeat_interleave(q.group, 1).clamp_min(2e-3)  # that of a head's only row is 0
    slack = 2.0**-10 * want.abs().amax(1, keepdim=True) / step
    return (stored(q) - want).abs() / step, slack


@pytest.mark.parametrize("width", [8, 64, 80, 96, 128, 256])
def test_turning_is_by_the_hadamard_matrix(width):
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(DEVICE)
    torch.testing.assert_close(turn(x), x @ matrix(width))
    torch.testing.assert_close(turn(turn(x)), x)


SHAPES = {
    "lengths": st.lists(st.sampled_from([0, 1, 2, 17, 70]), min_size=1, max_size=3).filter(any),
    "width": st.sampled_from([16, 40, 64, 80, 128, 256]),
    "dtype": st.sampled_from(DTYPES),
    "bits": st.sampled_from([4, 2]),
    "seed": st.integers(0, 99),
}


@settings(max_examples=12)
@given(as_keys=st.booleans(), kernel=st.booleans(), **SHAPES)
def test_what_is_turned_is_within_half_a_step(lengths, width, dtype, bits, seed, as_keys, kernel):
    x, offsets = keys(lengths, width, dtype, seed)
    run = quantize_turned_triton if kernel else quantize_turned_reference
    q, flags = run(x, bits=bits, offsets=offsets if as_keys else None)
    assert not flags.any() and q.turned and q.scale.dtype == torch.float16
    apart, slack = off(x, q, offsets)
    assert (apart <= 0.5 + slack).all()
    back = dequantize(q, offsets=offsets if as_keys else None)
    want = stored(q) @ matrix(width)
    if as_keys:
        center, spread = (t.double().repeat_interleave(offsets.diff(), 0) for t in vars(q.channels).values())
        want = want * spread + center
    assert (back.double() - want).abs().max() <= 1e-5 * want.abs().max()


@settings(max_examples=8)
@given(**SHAPES)
def test_the_first_row_of_each_head_comes_back(lengths, width, dtype, bits, seed):
    x, offsets = keys(lengths, width, dtype, seed)
    for run in (quantize_turned_reference, quantize_turned_triton):
        q, _ = run(x, bits=bits, offsets=offsets)
        apart, slack = off(x, q, offsets)
        begins = [begin for begin, end in pairwise(offsets.tolist()) if end > begin]
        assert (apart[begins] <= 0.02 + slack[begins]).all()


@settings(max_examples=6)
@given(**SHAPES)
def test_the_kernel_measures_as_the_reference(lengths, width, dtype, bits, seed):
    x, offsets = keys(lengths, width, dtype, seed)
    plain = measure_channels_turned_reference(x, offsets, bits=bits)
    found = measure_channels_turned_triton(x, offsets, bits=bits)
    torch.testing.assert_close(found.spread, plain.spread, rtol=1e-4, atol=0)
    q, _ = quantize_turned_reference(x, bits=bits, offsets=offsets)
    step = q.scale.float().amax() * plain.spread  # a tie of the first row may go another way
    assert ((found.center - plain.center).abs() <= step + 1e-4 * plain.center.abs()).all()


def asked_of(heads, width, seed=0):
    draw = torch.Generator().manual_seed(seed)
    queries = torch.randn(heads, 3 * width, width, generator=draw) @ torch.randn(width, width, generator=draw)
    return (queries.mT @ queries).to(DEVICE)


def logit_error(x, q, offsets, asked):
    apart = dequantize(q, offsets=offsets).double() - x.double()
    return sum(
        ((own @ asked[h].double()) * own).sum().item() for h, own in enumerate(apart.split(offsets.diff().tolist()))
    )


@pytest.mark.parametrize("width", [40, 64, 128])
@pytest.mark.parametrize("bits", [4, 2])
def test_feedback_brings_the_errors_of_logits_down(width, bits):
    x, offsets = keys([130, 0, 75], width, torch.bfloat16)
    asked = asked_of(3, width)
    channels = measure_channels_turned_reference(x, offsets, bits=bits)
    how = {"bits": bits, "offsets": offsets, "channels": channels}
    shaped = shape_feedback(asked, channels.spread)
    plain = logit_error(x, quantize_turned_reference(x, **how)[0], offsets, asked)
    best = logit_error(x, quantize_turned_reference(x, **how, feedback=shaped)[0], offsets, asked)
    kernel = logit_error(x, quantize_turned_triton(x, **how, feedback=shaped)[0], offsets, asked)
    assert best < (0.6 if width > 40 else 0.75) * plain  # 40 values are five blocks
    assert kernel < best * 1.05
    today = logit_error(x, quantize(x, bits=bits, offsets=offsets), offsets, asked)
    assert best < 0.5 * today


def test_feedback_is_what_makes_the_error_least():
    """Of one row, with the errors of the first values given, by solving for the others in float64."""
    width = 24
    asked, spread = (
        asked_of(1, width),
        torch.rand(1, width, generator=torch.Generator().manual_seed(2)).to(DEVICE) + 0.5,
    )
    found = shape_feedback(asked, spread)[0].double()
    own = matrix(width)
    metric = own @ (asked[0].double() * spread[0].double()[:, None] * spread[0].double()) @ own
    metric = metric / metric.diagonal().mean() + 1e-2 * torch.eye(width, dtype=torch.float64, device=DEVICE)
    error = torch.randn(width, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(DEVICE)
    total = torch.zeros_like(error)  # of each value from what was meant
    for first in range(0, width, SHAPED):
        shift = torch.zeros_like(error)
        if first:
            done, rest = slice(0, first), slice(first, width)
            shift[rest] = -total[done] @ metric[done, rest] @ torch.linalg.inv(metric[rest, rest])
        block = slice(first, first + SHAPED)
        told = sum(
            (error[i : i + SHAPED] @ found[i : i + SHAPED, block] for i in range(0, first, SHAPED)), 0 * error[block]
        )
        torch.testing.assert_close(told, shift[block], rtol=1e-3, atol=1e-3)
        total[block] = told + error[block]


def test_values_in_two_bits_are_rounded_within_a_part_of_their_range():
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    q = quantize_turned(x, bits=2)
    span = (x.double() @ matrix(64)).amax(1) - (x.double() @ matrix(64)).amin(1)
    torch.testing.assert_close(q.scale[:, 0].double() * 3, NARROW * span, rtol=2e-3, atol=0)
    plain = quantize(x, bits=2)
    assert (dequantize(q) - x).square().mean() < 0.75 * (dequantize(plain) - x).square().mean()


@pytest.mark.parametrize("kernel", [False, True])
def test_what_float16_cannot_say_is_flagged_and_taken_wide(kernel):
    run = quantize_turned_triton if kernel else quantize_turned_reference
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for factor in (1e6, 1e-9):
        assert run(x * factor, bits=2)[1].tolist() == [0, 1]
        q = quantize_turned(x * factor, bits=2)
        assert q.scale.dtype == torch.float32
        torch.testing.assert_close(
            dequantize(q), dequantize(quantize_turned(x, bits=2)) * factor, rtol=0.02, atol=factor
        )
    for bad in (float("nan"), float("inf")):
        x[3, 4] = bad
        assert run(x, bits=4)[1].tolist()[0] == 1
        with pytest.raises(ValueError, match="expected finite values"):
            quantize_turned(x, bits=4)
    huge = torch.full((4, 16), torch.finfo(torch.float32).max).to(DEVICE)
    assert dequantize(quantize_turned(huge, bits=4)).isfinite().all()


def test_further_rows_are_packed_alike():
    x, offsets = keys([40, 30], 64, torch.bfloat16)
    q = quantize_turned(x, bits=4, offsets=offsets)
    again = quantize_like(x, q, offsets=offsets)
    assert torch.equal(again.codes, q.codes) and again.channels is q.channels and again.turned
    plain = quantize(x, bits=8)
    assert not quantize_like(x, plain).turned and torch.equal(quantize_like(x, plain).codes, plain.codes)


def test_bad_arguments_are_named():
    x, offsets = keys([5], 64, torch.float32)
    with pytest.raises(ValueError, match="expected bits to be 4 or 2, got 8"):
        quantize_turned(x, bits=8)
    with pytest.raises(ValueError, match="group of whole bytes, got D=64 and group=48"):
        quantize_turned(x, bits=4, group=48)
    with pytest.raises(ValueError, match="expected offsets with channels or feedback"):
        quantize_turned(x, bits=4, feedback=torch.zeros(1, 64, 64))
    with pytest.raises(ValueError, match="expected feedback of shape"):
        quantize_turned(x, bits=4, offsets=offsets, feedback=torch.zeros(2, 64, 64).to(DEVICE))
    with pytest.raises(TypeError, match="float64"):
        quantize_turned(x.double(), bits=4)


COMPILE = """
import torch
from kvzip.ops.triton import quantize_turned as module
from kvzip.ops.types import Channels
def go(D, dtype, bits, keys, feedback=False):
    offsets = torch.tensor([0, 4000, 9000], dtype=torch.int32) if keys else None
    x = torch.empty(9000, D, dtype=dtype)
    module.quantize_turned_triton(x, bits=bits, offsets=offsets, feedback=torch.empty(2, D, D) if feedback else None)
"""


@pytest.mark.parametrize("D", [pytest.param(64, marks=pytest.mark.slow), 128, 256])  # 64 is launched as 128
def test_kernels_compile_without_spills(D):
    calls = [f"{D}, torch.bfloat16, 4, True, True", f"{D}, torch.bfloat16, 2, False"]
    assert_fits(compile_calls(COMPILE, calls, capability=90), capability=90)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 80, 96, 128, 256])
def test_compiled_kernels_of_many_rows(width, dtype):
    x, offsets = keys([3000, 0, 1, 1777], width, dtype)
    asked = asked_of(4, width)
    for bits in (4, 2):
        q, flags = quantize_turned_ahead(x, bits=bits, offsets=offsets)
        apart, slack = off(x, q, offsets)
        assert not flags.any() and (apart <= 0.5 + slack).all()
        shaped = shape_feedback(asked, q.channels.spread)
        better, _ = quantize_turned_ahead(x, bits=bits, offsets=offsets, channels=q.channels, feedback=shaped)
        plain, _ = quantize_turned_reference(x, bits=bits, offsets=offsets, channels=q.channels, feedback=shaped)
        assert logit_error(x, better, offsets, asked) < 1.05 * logit_error(x, plain, offsets, asked)
        assert logit_error(x, better, offsets, asked) < 0.6 * logit_error(x, q, offsets, asked)


@pytest.mark.gpu
def test_the_host_does_not_wait():
    x, offsets = keys([3000, 1777], 128, torch.bfloat16)
    asked = asked_of(2, 128)

    def run():
        channels = measure_channels_turned_triton(x, offsets, bits=4)
        feedback = shape_feedback(asked, channels.spread)
        quantize_turned_ahead(x, bits=4, offsets=offsets, channels=channels, feedback=feedback)
        quantize_turned_ahead(x, bits=2)

    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
