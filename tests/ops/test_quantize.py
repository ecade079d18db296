from dataclasses import replace

import pytest
import torch
from compiling import assert_fits, compile_launches
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvzip.ops.quantize import (
    Channels,
    Quantized,
    dequantize,
    dequantize_reference,
    measure_channels,
    quantize,
    quantize_reference,
)
from kvzip.ops.triton.quantize import dequantize_triton, quantize_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTHS = [64, 80, 96, 128, 256]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BITS = st.sampled_from([8, 4, 2])


def rows(n: int, width: int, dtype: torch.dtype, seed: int = 0, spread: float = 1.0) -> Tensor:
    return (torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) * spread).to(DEVICE, dtype)


def assert_same(a: Quantized, b: Quantized) -> None:
    assert (a.bits, a.group, a.scale.dtype) == (b.bits, b.group, b.scale.dtype)
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.scale, b.scale)
    assert torch.equal(a.zero, b.zero)


def by_groups(values: Tensor, q: Quantized) -> Tensor:
    return values.double().unflatten(1, (-1, q.group))


def assert_within_half_a_step(x: Tensor, q: Quantized) -> None:
    """In float64, from codes, scale and zero as they are stored; the slack is for the float32 division of the codes."""
    scale = q.scale.double()[..., None]
    values = by_groups(unpacked(q), q) * scale + q.zero.double()[..., None]
    slack = 2.0**-22 * (by_groups(x, q).abs().amax(2, keepdim=True) + 2**q.bits * scale)
    assert ((values - by_groups(x, q)).abs() <= scale / 2 + slack).all()


@given(
    n=st.integers(1, 9), width=st.sampled_from(WIDTHS), dtype=st.sampled_from(DTYPES), bits=BITS,
    seed=st.integers(0, 99), exponent=st.integers(-9, 9), shift=st.sampled_from([0.0, 1.0, -300.0]),
)  # fmt: skip
def test_half_a_step_and_kernel_equals_reference(n, width, dtype, bits, seed, exponent, shift):
    x = rows(n, width, dtype, seed, 10.0 ** max(exponent, -3 if dtype == torch.float16 else -9)) + shift
    x = x.clamp(-6e4, 6e4)
    q = quantize_reference(x, bits=bits)
    assert_within_half_a_step(x, q)
    assert_same(q, quantize_triton(x, bits=bits))
    assert torch.equal(dequantize_reference(q), dequantize_triton(q))


@given(value=st.floats(width=16, allow_nan=False, allow_infinity=False), dtype=st.sampled_from(DTYPES), bits=BITS)
def test_constant_rows_are_exact(value, dtype, bits):
    x = torch.full((2, 64), value, device=DEVICE).to(dtype)
    x[1] = x[1] * 0.37
    for quantizer in (quantize_reference, quantize_triton):
        assert torch.equal(dequantize(quantizer(x, bits=bits)), x.float())


@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=8, max_size=8),
    dtype=st.sampled_from(DTYPES), bits=BITS, group=st.sampled_from([2, 4, 8]),
)  # fmt: skip
def test_finite_values_stay_finite(values, dtype, bits, group):
    largest = torch.finfo(dtype).max
    x = torch.tensor([values, values[::-1]]).clamp(-largest, largest).to(DEVICE, dtype)
    x, group = x.clamp(-largest, largest), max(group, 8 // bits)
    q = quantize_reference(x, bits=bits, group=group)
    assert dequantize_reference(q).isfinite().all()
    assert_same(q, quantize_triton(x, bits=bits, group=group))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_group_wider_than_float32_stays_finite(dtype, bits):
    largest = torch.finfo(dtype).max
    x = torch.tensor([[-largest, largest, 0.0, 1.0]], device=DEVICE).to(dtype)
    for quantizer in (quantize_reference, quantize_triton):
        q = quantizer(x, bits=bits)
        assert_within_half_a_step(x, q)
        assert dequantize(q).isfinite().all()
        assert dequantize(q)[0, 0] == -largest


EXTREMES = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([3.4028235e38, -3.4028235e38, 1e-45, -1e-45, 3e-43, 1.2e-38, 65504.0, -65504.0, 2.0**64, 0.0, 1.0]),
    st.integers(-400, 400).map(lambda n: n * 2.0**-149),
)


@settings(max_examples=50)
@given(values=st.lists(EXTREMES, min_size=8, max_size=8), dtype=st.sampled_from(DTYPES), bits=BITS)
@example(values=[-3.4028235e38, 3.4028235e38, 0.0, 1.0, 1e38, -1e38, 3e38, -3e38], dtype=torch.float32, bits=8)
@example(values=[n * 2.0**-149 for n in (0, 1, 7, 100, 254, 255, 256, 381)], dtype=torch.float32, bits=8)
def test_whatever_is_finite_is_restored_within_half_a_step(values, dtype, bits):
    """Groups wider than float32, steps below its least number: the last row is one value, the one before halves it."""
    x = torch.tensor([values, values[::-1], values, [values[0]] * 8], device=DEVICE)
    x[2, 4:] = x[2, 0] / 2
    x = x.to(dtype).nan_to_num()
    for quantizer in (quantize_reference, quantize_triton):
        q = quantizer(x, bits=bits, group=4)
        assert_within_half_a_step(x, q)
        back = dequantize(q)
        assert torch.equal(back[3], x[3].float())
        steps = by_groups(unpacked(q), q) * q.scale.double()[..., None] + q.zero.double()[..., None]
        steps = steps.flatten(1).clamp(-torch.finfo(torch.float32).max, torch.finfo(torch.float32).max)
        largest = by_groups(x, q).abs().amax(2).repeat_interleave(4, 1)
        assert ((back.double() - steps).abs() <= 2.0**-21 * largest).all()
        assert dequantize(q, dtype=dtype).isfinite().all()
    assert_same(q, quantize_reference(x, bits=bits, group=4))
    for out in (torch.float32, torch.float16):  # the interpreter cuts bfloat16 off instead of rounding
        assert torch.equal(dequantize_reference(q, dtype=out), dequantize_triton(q, dtype=out))


@settings(max_examples=60)
@given(
    scale=st.sampled_from([1e-45, 1e-15, 1.0, 1e4, 3e38]),
    outlier=st.sampled_from([0.0, 1.0, 1e5, -3.3e38, 3.3e38]),
    center=st.sampled_from([0.0, 1.0, -3e38, 60000.0]),
    dtype=st.sampled_from(DTYPES),
    bits=BITS,
    given_channels=st.booleans(),
)
@example(scale=1e-15, outlier=3.3e38, center=0.0, dtype=torch.bfloat16, bits=8, given_channels=False)
@example(scale=0.0, outlier=1.0, center=0.0, dtype=torch.bfloat16, bits=4, given_channels=False)
def test_rows_far_from_those_that_channels_were_measured_of(scale, outlier, center, dtype, bits, given_channels):
    most = torch.finfo(dtype).max
    near = (rows(600, 8, torch.float32) * scale + center).nan_to_num().clamp(-most, most).to(dtype)
    x = near.clone()
    x[1] = torch.full((8,), outlier).clamp(-most, most)  # row 1 of 600 is not among the 256
    offsets = torch.tensor([0, 600], dtype=torch.int32, device=DEVICE)
    channels = measure_channels(near, offsets) if given_channels else None
    q = quantize(x, bits=bits, offsets=offsets, channels=channels)
    assert dequantize(q, offsets=offsets).isfinite().all()
    rest = (x.double() - q.channels.center[0]) / q.channels.spread[0]
    if not given_channels:
        assert rest.abs().max() <= torch.finfo(torch.float32).max
    rest = rest.clamp(-torch.finfo(torch.float32).max, torch.finfo(torch.float32).max).float()
    half = dtype != torch.float32 and rest.abs().max() <= 65504
    assert_within_half_a_step(rest.half() if half else rest, replace(q, channels=None, group=8))


def unpacked(q: Quantized) -> Tensor:
    places = range(8 - q.bits, -1, -q.bits)
    return torch.stack([q.codes >> place & 2**q.bits - 1 for place in places], dim=2).flatten(1)


def test_least_and_greatest_values_get_the_first_and_last_code():
    x = torch.linspace(-3, 5, 64)[None].to(DEVICE)
    for bits in (8, 4, 2):
        codes = quantize(x, bits=bits).codes[0].tolist()
        assert (codes[0] >> (8 - bits), codes[-1] & 2**bits - 1) == (0, 2**bits - 1)


def test_the_first_code_of_a_byte_is_highest():
    q = quantize(torch.tensor([[0.0, 15.0, 3.0, 4.0]], device=DEVICE), bits=4)
    assert q.codes.tolist() == [[0x0F, 0x34]]
    q = quantize(torch.tensor([[0.0, 3.0, 2.0, 1.0, 3.0, 0.0, 0.0, 1.0]], device=DEVICE), bits=2)
    assert q.codes.tolist() == [[0b00111001, 0b11000001]]


def test_each_group_has_its_own_scale():
    x = torch.cat([rows(3, 128, torch.float32), rows(3, 128, torch.float32, seed=1, spread=1000.0)], dim=1)
    for quantizer in (quantize_reference, quantize_triton):
        q = quantizer(x, bits=8)
        assert q.scale.shape == (3, 2)
        assert_same(q, Quantized(*_joined(quantizer(x[:, :128], bits=8), quantizer(x[:, 128:], bits=8)), 8, 128))


def _joined(a: Quantized, b: Quantized) -> list[Tensor]:
    return [torch.cat([getattr(part, name) for part in (a, b)], dim=1) for name in ("codes", "scale", "zero")]


@pytest.mark.parametrize(
    ("x", "dtype"),
    [
        (rows(3, 64, torch.bfloat16), torch.float16),
        (rows(3, 64, torch.float16), torch.float16),
        (rows(3, 64, torch.float32), torch.float32),
        (rows(3, 64, torch.bfloat16, spread=1e30), torch.float32),  # beyond float16
        (rows(3, 64, torch.bfloat16, spread=1e-6), torch.float32),  # below it
    ],
)
def test_scales_are_float16_where_it_holds_them(x, dtype):
    for quantizer in (quantize_reference, quantize_triton):
        q = quantizer(x, bits=8)
        assert q.scale.dtype == q.zero.dtype == dtype
        assert_within_half_a_step(x, q)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_values_that_are_not_finite_raise(value):
    x = torch.zeros(5, 64, device=DEVICE, dtype=torch.float16)
    x[3, 17] = value
    for quantizer in (quantize_reference, quantize_triton):
        with pytest.raises(ValueError, match="finite"):
            quantizer(x, bits=8)


@given(
    lengths=st.lists(st.sampled_from([0, 1, 3, 300, 700]), min_size=1, max_size=4), dtype=st.sampled_from(DTYPES),
    bits=BITS, seed=st.integers(0, 99),
)  # fmt: skip
def test_channels_are_those_of_each_head_and_leave_half_a_step_of_the_rest(lengths, dtype, bits, seed):
    offsets = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    generator = torch.Generator().manual_seed(seed)
    size, center = (torch.randn(len(lengths), 64, generator=generator).to(DEVICE) * x for x in (2.0, 30.0))
    owner = torch.arange(len(lengths), device=DEVICE).repeat_interleave(offsets.diff())
    x = (rows(sum(lengths), 64, torch.float32, seed) * size.exp2()[owner] + center[owner]).to(dtype)
    q = quantize(x, bits=bits, offsets=offsets)
    for head, length in enumerate(lengths):
        part = x[owner == head].float()
        mean, spread = q.channels.center[head], q.channels.spread[head]
        assert torch.equal(spread.log2(), spread.log2().round())
        if length == 0:
            assert (mean == 0).all() and (spread == 1).all()
            continue
        sample = part[torch.arange(256, device=DEVICE) * length // 256].double()
        assert torch.allclose(mean.double(), sample.mean(0), rtol=1e-5, atol=1e-5)
        farthest = (sample - mean).abs().amax(0)
        nearest = (spread / farthest).log2().abs() < 0.501  # of the powers of two
        assert torch.where(farthest < 2.0**-60, spread == 1, nearest).all()
        if length > 1:  # the mean of the sample is within six standard errors of all rows'
            assert ((mean - part.mean(0)).abs() < 6 * part.std(0) / min(length, 256) ** 0.5 + 1e-3).all()
    spread, middle = q.channels.spread[owner], q.channels.center[owner]
    rest = ((x.float() - middle) / spread).to(torch.float32 if dtype == torch.float32 else torch.float16)
    assert_within_half_a_step(rest, Quantized(q.codes, q.scale, q.zero, bits, 64))
    back = dequantize(q, offsets=offsets)
    assert torch.allclose(back, dequantize(quantize(rest, bits=bits)) * spread + middle, rtol=1e-6, atol=1e-5)
    more = quantize(x, bits=bits, offsets=offsets, channels=q.channels)
    assert_same(more, q)
    assert more.channels is q.channels


def test_channels_make_room_for_what_differs():
    """Keys with a large common part and one wide channel: nearly all of 16 steps went there."""
    x = rows(500, 64, torch.float32)
    x[:, 3] *= 50
    x[:, 7] += 200
    offsets = torch.tensor([0, 500], dtype=torch.int32, device=DEVICE)
    apart = dequantize(quantize(x, bits=4, offsets=offsets), offsets=offsets)
    together = dequantize(quantize(x, bits=4))
    others = [n for n in range(64) if n not in (3, 7)]
    assert (apart - x)[:, others].square().mean() < (together - x)[:, others].square().mean() / 50


def test_channels_need_offsets():
    x, offsets = rows(4, 64, torch.float32), torch.tensor([0, 4], dtype=torch.int32, device=DEVICE)
    channels = measure_channels(x, offsets)
    assert isinstance(channels, Channels)
    with pytest.raises(ValueError, match="expected offsets with channels"):
        quantize(x, bits=8, channels=channels)
    with pytest.raises(ValueError, match="expected offsets, got none"):
        dequantize(quantize(x, bits=8, offsets=offsets))


def test_strided_rows_and_no_rows():
    x = rows(64, 20, torch.float32).T[::2]
    for quantizer in (quantize_reference, quantize_triton):
        assert_same(quantizer(x, bits=4), quantizer(x.contiguous(), bits=4))
        assert dequantize(quantizer(x[:0], bits=4)).shape == (0, 64)


def test_wrong_arguments_raise():
    x = torch.zeros(2, 96)
    with pytest.raises(ValueError, match="divisible by group, got D=96 and group=64"):
        quantize(x, bits=8, group=64)
    with pytest.raises(ValueError, match="bits"):
        quantize(x, bits=3)
    for bits, group in ((4, 3), (2, 6)):
        with pytest.raises(ValueError, match=rf"whole bytes in {bits} bits .*, got {group}"):
            quantize(x, bits=bits, group=group)
    with pytest.raises(TypeError, match="float64"):
        quantize(x.double(), bits=8)


def compile_case(width: int, dtype: str) -> str:
    return (
        "import torch\n"
        "from kvzip.ops.triton.quantize import dequantize_triton, quantize_triton\n"
        f"x = torch.zeros(64, {width}, dtype=torch.{dtype})\n"
        "for bits in (8, 4, 2):\n"
        f"    dequantize_triton(quantize_triton(x, bits=bits), dtype=torch.{dtype})"
    )


@pytest.mark.parametrize(("capability", "width"), [(80, 128), (90, 80), (90, 256)])
def test_kernels_fit(capability, width):
    kernels = compile_launches(compile_case(width, "bfloat16"), capability=capability)
    assert {kernel.name for kernel in kernels} == {"_quantize_kernel", "_dequantize_kernel"}
    assert_fits(kernels, capability=capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("width", WIDTHS)
def test_all_kernels_fit(capability, dtype, width):
    assert_fits(compile_launches(compile_case(width, dtype), capability=capability), capability=capability)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_full_grid(dtype, width, bits):
    for n in (1, 5003):
        x = rows(n, width, dtype) * torch.logspace(-3, 3, n, device="cuda")[:, None].to(dtype)
        q = quantize(x, bits=bits)
        assert_within_half_a_step(x, q)
        assert_same(q, quantize_reference(x, bits=bits))
        assert torch.equal(dequantize(q, dtype=dtype), dequantize_reference(q, dtype=dtype))
