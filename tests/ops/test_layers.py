"""The ops of the transformer itself: norm, linear, rotary, append."""

import pytest
import torch
from compiling import assert_fits, compile_launches
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from accuracy import assert_as_accurate
from kvzip import ops
from kvzip.ops.append import append_reference_
from kvzip.ops.linear import linear_reference
from kvzip.ops.norm import rms_norm_reference
from kvzip.ops.rotary import rotary_reference
from kvzip.ops.triton.append import append_triton_
from kvzip.ops.triton.gate import gated
from kvzip.ops.triton.linear import launch_config, linear_triton
from kvzip.ops.triton.norm import rms_norm_triton
from kvzip.ops.triton.rotary import rotary_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, spread: float = 1.0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread
    return x.to(DEVICE, dtype)


def cast(x, dtype):
    """Everything in x in another dtype."""
    if isinstance(x, ops.Norm):
        return ops.Norm(x.weight.to(dtype), x.eps, x.offset)
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def check(kernel, reference, *args, **options) -> None:
    """The kernel against its reference in float64 and in the inputs' dtype."""

    def run(op, dtype=None):
        got = op(
            *(x if dtype is None else cast(x, dtype) for x in args),
            **{name: x if dtype is None else cast(x, dtype) for name, x in options.items()},
        )
        return got if isinstance(got, tuple) else (got,)

    for got, exact, plain in zip(run(kernel), run(reference, torch.float64), run(reference), strict=True):
        assert_as_accurate(got, exact, plain)


@given(
    rows=st.sampled_from([(1,), (2, 3), (0,)]),
    width=st.sampled_from([1, 5, 64, 96]),
    offset=st.integers(0, 1),
    residual=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_norm(rows, width, offset, residual, dtype):
    x, weight = values(*rows, width, dtype=dtype, spread=3), values(width, seed=1, dtype=dtype)
    added = values(*rows, width, seed=2, dtype=dtype) if residual else None
    check(rms_norm_triton, rms_norm_reference, x, weight, eps=1e-5, offset=offset, residual=added)


def test_norm_is_the_formula():
    x, weight = values(3, 7, dtype=torch.float64), values(7, seed=1, dtype=torch.float64)
    expected = torch.stack([row / (row @ row / 7 + 1e-3).sqrt() * (1 + weight) for row in x]) + 2
    got = ops.rms_norm(x, weight, eps=1e-3, offset=1, residual=torch.full_like(x, 2)) if DEVICE == "cpu" else None
    if got is not None:
        torch.testing.assert_close(got, expected)


@given(
    rows=st.sampled_from([(1,), (1, 1), (3,), (2, 2), (0,)]),
    inputs=st.sampled_from([1, 8, 72, 1030]),
    outputs=st.sampled_from([2, 6, 34]),
    norm=st.sampled_from([None, 0, 1]),
    gate=st.sampled_from([None, "silu", "gelu_tanh"]),
    bias=st.booleans(),
    residual=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_linear(rows, inputs, outputs, norm, gate, bias, residual, dtype):
    check_linear(rows, inputs, outputs, norm, gate, bias, residual, dtype)


def check_linear(rows, inputs, outputs, norm, gate, bias, residual, dtype):
    width = outputs if gate is None else outputs // 2
    check(
        linear_triton,
        linear_reference,
        values(*rows, inputs, dtype=dtype),
        values(outputs, inputs, seed=1, dtype=dtype, spread=inputs**-0.5),
        values(outputs, seed=2, dtype=dtype) if bias else None,
        norm=None if norm is None else ops.Norm(values(inputs, seed=3, dtype=dtype), 1e-5, norm),
        gate=gate,
        residual=values(*rows, width, seed=4, dtype=dtype) if residual else None,
    )


@given(gate=st.sampled_from(["silu", "gelu_tanh"]), rows=st.integers(0, 3), width=st.sampled_from([1, 7, 1025]))
def test_gated_alone(gate, rows, width):
    def reference(x, gate):
        first, second = x.chunk(2, -1)
        act = torch.nn.functional.silu if gate == "silu" else torch.nn.GELU(approximate="tanh")
        return act(first) * second

    check(gated, reference, values(rows, 2 * width, spread=4), gate=gate)


@given(
    batch=st.integers(1, 2),
    tokens=st.sampled_from([0, 1, 5]),
    heads=st.sampled_from([(1, 1), (4, 2), (7, 1), (6, 6)]),
    width=st.sampled_from([2, 64, 80, 96]),
    by_question=st.booleans(),
    norm=st.sampled_from([None, 0, 1]),
    dtype=st.sampled_from(DTYPES),
)
def test_rotary(batch, tokens, heads, width, by_question, norm, dtype):
    check_rotary(batch, tokens, heads, width, by_question, norm, dtype)


def check_rotary(batch, tokens, heads, width, by_question, norm, dtype):
    qkv = values(batch, tokens, (heads[0] + 2 * heads[1]) * width, dtype=dtype)
    angles = values(*([batch] if by_question else []), tokens, width // 2, seed=1, dtype=torch.float64, spread=3)
    angles = torch.cat([angles, angles], -1)
    weights = [None, None] if norm is None else [values(width, seed=s, dtype=dtype) for s in (2, 3)]
    check(
        rotary_triton,
        rotary_reference,
        qkv,
        angles.cos().to(dtype),
        angles.sin().to(dtype),
        kv_heads=heads[1],
        q_norm=weights[0],
        k_norm=weights[1],
        eps=1e-5,
        offset=norm or 0,
    )


def test_rotary_turns_pairs_by_their_angle():
    """As complex numbers: (x1 + i x2) e^(i angle), heads in the order q, k, v."""
    x, angle = values(1, 2, 4 * 6, dtype=torch.float64), values(2, 3, seed=1, dtype=torch.float64)
    table = torch.cat([angle, angle], -1)
    q, k, v = rotary_reference(x, table.cos(), table.sin(), kv_heads=1)
    heads = x[0].unflatten(1, (4, 6)).transpose(0, 1)
    turned = torch.complex(heads[..., :3], heads[..., 3:]) * torch.polar(torch.ones_like(angle), angle)
    turned = torch.cat([turned.real, turned.imag], -1)
    torch.testing.assert_close(torch.cat([q, k], 1)[0], turned[:3])
    assert torch.equal(v[0], heads[3:])


@pytest.mark.parametrize("op", [append_reference_, append_triton_])
@given(
    tokens=st.sampled_from([0, 1, 3, 20]),
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    strided=st.booleans(),
)
def test_append_writes_these_rows_and_no_others(op, tokens, lengths, strided):
    batch, rows = len(lengths), 12
    tail = [torch.full((batch, 2, rows, 8), torch.nan, device=DEVICE) for _ in range(2)]
    shape = (batch, tokens, 2, 8) if strided else (batch, 2, tokens, 8)
    new = [values(*shape, seed=s).transpose(1, 2) if strided else values(*shape, seed=s) for s in (1, 2)]
    op(*tail, torch.tensor(lengths, dtype=torch.int32, device=DEVICE), *new)
    for x, y in zip(tail, new, strict=True):
        for b, length in enumerate(lengths):
            room = max(min(tokens, rows - length), 0)
            assert torch.equal(x[b, :, length : length + room], y[b, :, :room])
            assert x[b, :, :length].isnan().all() and x[b, :, length + room :].isnan().all()


def test_wrong_arguments_raise():
    x, weight = torch.zeros(2, 8), torch.zeros(6, 8)
    with pytest.raises(ValueError, match="gate"):
        ops.linear(x, weight, gate="relu")
    with pytest.raises((ValueError, TypeError), match="weight"):  # TypeError where calls are type-checked
        ops.linear(x, torch.zeros(6, 9))
    with pytest.raises(ValueError, match="residual"):
        ops.linear(x, weight, residual=torch.zeros(2, 5))
    with pytest.raises((ValueError, TypeError), match="weight"):
        ops.rms_norm(x, torch.zeros(7), eps=0.0)
    table = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="values a token"):
        ops.rotary(torch.zeros(1, 3, 9), table, table, kv_heads=1)
    with pytest.raises(ValueError, match="both q_norm"):
        ops.rotary(torch.zeros(1, 3, 12), table, table, kv_heads=1, q_norm=torch.zeros(4))
    tail = torch.zeros(1, 2, 5, 4)
    with pytest.raises((ValueError, TypeError), match=r"fit the tail|parameter 'k'"):
        ops.append_(tail, tail, torch.zeros(1, dtype=torch.int32), torch.zeros(1, 1, 1, 4), torch.zeros(1, 2, 1, 4))


def compile_case(width: int, dtype: str, capability: int) -> str:
    return f"""
import torch
from kvzip import ops
from kvzip.ops.triton import append, gate, linear, norm, rotary
for module in (append, gate, linear, norm, rotary):
    module.overlaps_launches = lambda x: {capability >= 90}
from kvzip.ops.triton.append import append_triton_
from kvzip.ops.triton.linear import linear_triton
from kvzip.ops.triton.norm import rms_norm_triton
from kvzip.ops.triton.rotary import rotary_triton, rotate_heads
new = lambda *shape: torch.zeros(shape, dtype=torch.{dtype})
norm = ops.Norm(new(4096), 1e-5, 1)
for gate in (None, "silu", "gelu_tanh"):
    linear_triton(new(1, 4096), new(16, 4096), None if gate else new(16), norm=norm, gate=gate)
linear_triton(new(1, 3584), new(16384, 3584), residual=new(1, 16384))
linear_triton(new(2, 64), new(16, 64), gate="silu")
rms_norm_triton(new(3, 4096), new(4096), eps=1e-5, residual=new(3, 4096))
for tokens in (1, 100):
    table, lengths = new(tokens, {width}), torch.zeros(1, dtype=torch.int32)
    qkv, weight = new(1, tokens, 40 * {width}), new({width})
    q, k, v = rotary_triton(qkv, table, table, kv_heads=4, q_norm=weight, k_norm=weight)
    tail = new(1, 4, 200, {width}), new(1, 4, 200, {width}), lengths
    append_triton_(*tail, k, v)
    rotate_heads(qkv, table, table, kv_heads=4, q_norm=None, k_norm=None, eps=0.0, offset=0, tail=tail)
"""


@pytest.mark.parametrize(("capability", "width"), [(80, 128), (90, 80), (90, 256)])
def test_kernels_fit(capability, width):
    kernels = compile_launches(compile_case(width, "bfloat16", capability), capability=capability)
    names = {"_row_kernel", "_gate_kernel", "_norm_kernel", "_rotary_kernel", "_append_kernel"}
    assert {kernel.name for kernel in kernels} == names
    assert_fits(kernels, capability=capability)
    assert all("v4.b32" in kernel.ptx for kernel in kernels if kernel.name == "_row_kernel"), "narrow loads of weights"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [(1, 1), (2, 17)], ids=str)
@pytest.mark.parametrize(
    ("inputs", "outputs", "norm", "gate", "bias", "residual"),
    [
        (4096, 6144, 0, None, False, False),
        (3584, 4608, 0, None, True, False),
        (4096, 28672, 0, "silu", False, False),
        (2560, 20480, 1, "gelu_tanh", False, False),
        (14336, 4096, None, None, False, True),
        (18944, 3584, None, None, False, True),
        (4096, 128256, None, None, False, False),
    ],
)
def test_linear_of_real_shapes(rows, inputs, outputs, norm, gate, bias, residual, dtype):
    check_linear(rows, inputs, outputs, norm, gate, bias, residual, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("norm", [None, 1])
def test_rotary_grid(width, norm, dtype):
    check_rotary(2, 3001, (28, 4), width, False, norm, dtype)
    check_rotary(32, 1, (32, 8), width, True, norm, dtype)


@pytest.mark.gpu
def test_a_chain_of_overlapping_launches_is_in_order():
    """Each kernel may start before the one in front has ended, and reads what it wrote."""
    weight, gate = values(4096, 4096, dtype=torch.float16, spread=4096**-0.5), values(8192, 4096, dtype=torch.float16)
    norm = ops.Norm(values(4096, dtype=torch.float16), 1e-5)

    def chain(linear, rms_norm, x, weight, gate, norm):
        for _ in range(8):
            x = linear(x, weight, norm=norm, residual=x)
            x = rms_norm(linear(x, gate, norm=norm, gate="silu"), norm.weight, eps=1e-5, residual=x)
        return x

    x = values(1, 4096, seed=9, dtype=torch.float16)
    args = (x, weight, gate, norm)
    exact = chain(linear_reference, rms_norm_reference, *(cast(a, torch.float64) for a in args))
    plain = chain(linear_reference, rms_norm_reference, *args)
    for _ in range(20):
        assert_as_accurate(chain(linear_triton, rms_norm_triton, *args), exact, plain)


def test_launches_cover_every_shape():
    for shape in [(1, 1), (6144, 4096), (28672, 4096), (4096, 14336), (128256, 4096)]:
        config = launch_config(*shape)
        assert config.block_n & (config.block_n - 1) == 0 and config.block_k & (config.block_k - 1) == 0
