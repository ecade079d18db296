"""Weights in 8 and 4 bits: what codes mean, how they are made, the linear layer with them, and its kernels."""

import sys
from dataclasses import replace

import pytest
import torch
from compiling import assert_fits, compile_launches
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from accuracy import assert_as_accurate
from kvzip import ops
from kvzip.ops.linear import linear_reference
from kvzip.ops.triton import linear as linear_launches
from kvzip.ops.triton import linear_rounded
from kvzip.ops.triton.codes import expand_triton, suits, within_group
from kvzip.ops.triton.linear import linear_triton
from kvzip.ops.triton.linear_columns import takes_columns
from kvzip.ops.triton.linear_quantized import LAUNCHES, Launch, few_rows, launch_config, most_rows
from kvzip.ops.triton.linear_rounded import round_rows, rounded_product
from kvzip.ops.weights import (
    KINDS,
    LARGEST,
    Activations,
    QuantizedWeight,
    empty_weight,
    expand,
    pack_codes,
    plain,
    quantize_inputs,
    quantize_weight,
    round_inputs,
    stack_weights,
    unpack_codes,
)

linear_module = sys.modules["kvzip.ops.linear"]  # the name kvzip.ops.linear is the function
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, spread: float = 1.0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread
    return x.to(DEVICE, dtype)


def weight(
    kind: str, n: int, k: int, *, group: int | None = None, rows: int = 1, zeros: bool = False, seed: int = 0
) -> QuantizedWeight:
    """Random codes of all kinds, those at the ends of the range included, with scales that differ by factors."""
    made = empty_weight(n, k, kind=kind, group=group or k, rows=rows, zeros=zeros, device="cpu")
    generator = torch.Generator().manual_seed(seed)
    made.codes.view(torch.uint8).copy_(torch.randint(0, 256, made.codes.shape, generator=generator, dtype=torch.uint8))
    if kind == "e4m3":
        bits = made.codes.view(torch.uint8)
        bits[bits & 127 == 127] = 9  # NaN
    else:
        made.codes.view(torch.uint8)[0] = 0
    spread = 0.01 if kind == "e4m3" else 0.3 if kind == "int4" else 0.02
    made.scale.copy_(spread * k**-0.5 * (0.5 + torch.rand(made.scale.shape, generator=generator)))
    if made.zero is not None:
        low, high = (-8, 8) if kind == "int4" else (-128, 128)
        made.zero.copy_(torch.randint(low, high, made.zero.shape, generator=generator))
    zero = None if made.zero is None else made.zero.to(DEVICE)
    return QuantizedWeight(made.codes.to(DEVICE), made.scale.to(DEVICE), zero, kind, made.inputs, made.group, made.rows)


def meant(w: QuantizedWeight) -> Tensor:
    """The float64 weights, by the definition of the codes, one output and input at a time where codes are packed."""
    n, k = w.shape
    codes = w.codes.cpu()
    if w.kind == "int4":
        numbers = torch.empty(n, k, dtype=torch.float64)
        for column in range(k):
            byte = codes[:, column // 32 * 16 + column % 16].long()
            numbers[:, column] = (byte % 16 if column % 32 < 16 else byte // 16).double() - 8
    elif w.kind == "int8":
        numbers = codes.double()
    else:
        bits = codes.view(torch.uint8).long()
        exponent, fraction = bits // 8 % 16, (bits % 8).double() / 8
        numbers = torch.where(exponent == 0, fraction * 2.0**-6, (1 + fraction) * 2.0 ** (exponent - 7).double())
        numbers = torch.where(bits >= 128, -numbers, numbers)
    owner, group = torch.arange(n) // w.rows, torch.arange(k) // w.group
    zero = 0 if w.zero is None else w.zero.cpu().double()[owner][:, group]
    return (numbers - zero) * w.scale.cpu().double()[owner][:, group]


CASES = [  # kind, outputs, inputs, group, rows, zeros
    ("e4m3", 24, 70, None, 1, False),
    ("e4m3", 40, 96, 32, 16, False),
    ("int8", 24, 64, None, 1, False),
    ("int8", 18, 80, 16, 1, True),
    ("int8", 16, 40, 10, 1, False),
    ("int4", 24, 128, 64, 1, False),
    ("int4", 18, 96, 32, 1, True),
    ("int4", 16, 50, None, 1, True),
    ("int4", 20, 72, 24, 4, False),
]


@pytest.mark.parametrize(("kind", "n", "k", "group", "rows", "zeros"), CASES)
def test_codes_mean_what_the_formula_says(kind, n, k, group, rows, zeros):
    w = weight(kind, n, k, group=group, rows=rows, zeros=zeros)
    torch.testing.assert_close(expand(w, torch.float64).cpu(), meant(w), rtol=1e-15, atol=0)
    part = expand(w, torch.float64, start=3, stop=11)
    torch.testing.assert_close(part.cpu(), meant(w)[3:11], rtol=1e-15, atol=0)
    assert torch.equal(expand(w, torch.bfloat16).cpu(), meant(w).float().to(torch.bfloat16))


@given(n=st.integers(1, 5), k=st.integers(1, 80), seed=st.integers(0, 99))
def test_packing_is_undone_by_unpacking(n, k, seed):
    codes = torch.randint(-8, 8, (n, k), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    packed = pack_codes(codes)
    assert packed.shape == (n, -(-k // 32) * 16)
    assert torch.equal(unpack_codes(packed, k), codes)


@given(
    kind=st.sampled_from(KINDS),
    n=st.integers(1, 9),
    k=st.sampled_from([1, 31, 64, 200]),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
    seed=st.integers(0, 9),
)
def test_quantizing_is_within_half_a_step(kind, n, k, scale, seed):
    x = values(n, k, seed=seed, spread=scale).cpu()
    x[0] = 0
    q = quantize_weight(x, kind)
    error = (expand(q, torch.float64) - x.double()).abs()
    if kind == "e4m3":  # half of the last of 3 bits, or half of the smallest step
        bound = x.double().abs() * 2.0**-4 + q.scale.double() * 2.0**-10
    elif kind == "int8":
        bound = 0.5 * q.scale.double()
    else:  # largest / 8 is a step; a scale may be three quarters of it, and 8 is no code
        steps = q.scale.double().abs().repeat_interleave(q.group, 1)[:, :k]
        inside = x.double() / torch.where(steps > 0, q.scale.double().repeat_interleave(q.group, 1)[:, :k], 1)
        bound = torch.where((inside >= -8.5) & (inside <= 7.5), 0.5 * steps, (inside.abs() - 7) * steps) + 2.0**-25
    assert (error <= bound * (1 + 1e-5) + 1e-30).all()
    assert not expand(q, torch.float32)[0].any()
    if kind != "int4":
        row = x.abs().amax(1, keepdim=True)
        assert torch.allclose(expand(q, torch.float32).abs().amax(1, keepdim=True), row, rtol=1e-6)


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e-12, 1e-7, 1e7, 1e20, 1e30, 1e37])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_any_size_are_rounded_alike(kind, size):
    x = values(4, 256).cpu()
    usual, own = (quantize_weight(w, kind) for w in (x, x * size))
    wanted = (expand(usual, torch.float64) - x.double()).norm() / x.norm()
    assert (expand(own, torch.float64) - (x * size).double()).norm() / (x * size).double().norm() < 1.2 * wanted


def test_four_bits_are_nearer_than_plain_rounding():
    x = values(64, 512).cpu()
    step = x.unflatten(1, (-1, 128)).abs().amax(2, keepdim=True) / 7
    plain = (x.unflatten(1, (-1, 128)) / step).round().clamp(-8, 7).mul(step).flatten(1)
    own = expand(quantize_weight(x, "int4"), torch.float32)
    assert (own - x).norm() < 0.9 * (plain - x).norm()


def test_wrong_weights_are_refused():
    with pytest.raises(ValueError, match="inf or NaN"):
        quantize_weight(torch.tensor([[1.0, torch.inf]]), "int8")
    with pytest.raises(ValueError, match=r"kind in .*got 'int3'"):
        quantize_weight(torch.ones(1, 2), "int3")
    with pytest.raises(ValueError, match="one kind"):
        stack_weights([weight("int8", 2, 64), weight("int4", 2, 64)])


@given(
    parts=st.lists(st.sampled_from([(16, 16), (32, 16), (20, 8), (20, 20), (7, 7), (8, 1)]), min_size=1, max_size=3),
    zeros=st.booleans(),
)
def test_a_stack_means_its_parts(parts, zeros):
    parts = [
        weight("int8", n, 48, group=16, rows=rows, zeros=zeros and at == 0, seed=at)
        for at, (n, rows) in enumerate(parts)
    ]
    stacked = stack_weights(parts)
    want = torch.cat([meant(part) for part in parts])
    torch.testing.assert_close(expand(stacked, torch.float64).cpu(), want, rtol=1e-15, atol=0)


ROUNDINGS = {
    "fp8, token": Activations("e4m3", 448.0),
    "fp8, block": Activations("e4m3", 448.0, group=16),
    "fp8, bound": Activations("e4m3", 448.0, bound=1.5),
    "fp8, static": Activations("e4m3", 448.0, scale=torch.tensor(0.004)),
    "int8, token": Activations("int8", 127.0),
    "int8, 127.5": Activations("int8", 127.5),
    "int8, asymmetric": Activations("int8", 127.5, symmetric=False),
    "int8, static, zero": Activations(
        "int8", 127.5, symmetric=False, scale=torch.tensor(0.02), zero=torch.tensor(-5.0)
    ),
}


@pytest.mark.parametrize("name", ROUNDINGS)
def test_inputs_are_rounded_to_the_nearest_code(name):
    """By trying every code: none is nearer than the one taken, within the range of the codes."""
    how = ROUNDINGS[name]
    x = values(3, 40, seed=3, dtype=torch.float64).cpu()
    x[1] = 0
    group = how.group or 40
    parts = torch.nn.functional.pad(x, (0, -40 % group)).unflatten(1, (-1, group))
    table = torch.arange(-128, 128).double()
    if how.kind == "e4m3":
        table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
        table = table[table.isfinite()]
    top = parts.abs().amax(2, keepdim=True)
    zero = torch.tensor(0.0)
    if how.scale is not None:
        scale, zero = how.scale.double(), zero if how.zero is None else how.zero.double()
    elif how.symmetric:
        scale = (top if how.bound is None else top.clamp(max=how.bound)) / how.steps
    else:
        low, high = parts.amin(2, keepdim=True).clamp(max=0), parts.amax(2, keepdim=True).clamp(min=0)
        scale = (high - low) / 255
        zero = (-128 - low / torch.where(scale > 0, scale, 1)).round()
    choices = (table - zero.unsqueeze(-1)) * scale.unsqueeze(-1)
    nearest = (choices - parts.unsqueeze(-1)).abs().amin(-1)
    got = round_inputs(x, how)
    want_error = nearest.flatten(1)[:, :40]
    assert ((got - x).abs() <= want_error + 1e-9).all()
    assert got.shape == x.shape and not got[1].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [(1,), (2, 3), (0,)])
def test_the_layer_is_the_product_with_the_weights_meant(kind, rows):
    w, bias = weight(kind, 12, 64, group=None if kind != "int4" else 32), values(12, seed=4, dtype=torch.float64)
    x = values(*rows, 64, seed=1, dtype=torch.float64)
    with_gate = torch.nn.functional.linear(x, meant(w).to(DEVICE), bias)
    first, second = with_gate.chunk(2, -1)
    residual = values(*rows, 6, seed=2, dtype=torch.float64)
    want = torch.nn.functional.silu(first) * second + residual
    torch.testing.assert_close(linear_reference(x, w, bias, gate="silu", residual=residual), want)


def cast(x, dtype):
    if isinstance(x, ops.Norm):
        return ops.Norm(x.weight.to(dtype), x.eps, x.offset)
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def check(kernel, x, w, bias, **options) -> None:
    """The baseline is one product with the weights in x's dtype: by parts a library sums float32 in another order."""

    def run(op, w, dtype=None):
        change = (lambda y: y) if dtype is None else (lambda y: cast(y, dtype))
        return op(change(x), w, change(bias), **{name: change(y) for name, y in options.items()})

    baseline = w if w.activations is not None else plain(w, x.dtype)
    assert_as_accurate(run(kernel, w), run(linear_reference, w, torch.float64), run(linear_reference, baseline))


def check_linear(kernel, rows, case, norm, gate, bias, residual, dtype):
    kind, n, k, group, shared, zeros = case
    width = n if gate is None else n // 2
    check(
        kernel,
        values(*rows, k, dtype=dtype),
        weight(kind, n, k, group=group, rows=shared, zeros=zeros),
        values(n, seed=2, dtype=dtype) if bias else None,
        norm=None if norm is None else ops.Norm(values(k, seed=3, dtype=dtype), 1e-5, norm),
        gate=gate,
        residual=values(*rows, width, seed=4, dtype=dtype) if residual else None,
    )


@settings(max_examples=30)
@given(
    rows=st.sampled_from([(1,), (1, 1), (3,), (2, 5), (0,), (65,)]),
    case=st.sampled_from([*CASES, ("e4m3", 34, 1030, None, 1, False), ("int4", 34, 1056, None, 1, False)]),
    norm=st.sampled_from([None, 0, 1]),
    gate=st.sampled_from([None, "silu", "gelu_tanh"]),
    bias=st.booleans(),
    residual=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_kernel(rows, case, norm, gate, bias, residual, dtype):
    check_linear(linear_triton, rows, case, norm, gate, bias, residual, dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("launch", [Launch(16, 32, 2, 2, 2), Launch(32, 16, 4, 4, 3, fused=False)])
def test_every_launch_gives_the_same(kind, launch):
    def kernel(*args, **options):
        return few_rows(*args, **options, config=launch)

    case = (kind, 20, 256, 64 if kind == "int4" else None, 1, kind != "e4m3")
    check_linear(kernel, (1,), case, 0, "silu", True, True, DTYPES[-1])


@pytest.mark.parametrize("kind", ["e4m3", "int8"])
def test_every_launch_of_one_row_of_codes_gives_the_same(kind):
    for launch in linear_launches.LAUNCHES[:3]:
        run = lambda *a, launch=launch, **o: linear_launches.one_row(*a, **o, config=launch)  # noqa: E731
        check_linear(run, (1, 1), (kind, 20, 272, None, 1, False), 1, "silu", True, True, DTYPES[-1])


@pytest.mark.parametrize(("kind", "n", "k", "group", "rows", "zeros"), CASES)
def test_the_kernel_expands_as_the_reference_does(kind, n, k, group, rows, zeros):
    w = weight(kind, n, k, group=group, rows=rows, zeros=zeros)
    for dtype in DTYPES:
        assert torch.equal(expand_triton(w, dtype, start=2, stop=13), expand(w, dtype, start=2, stop=13))


@pytest.mark.skipif(DEVICE != "cpu", reason="the host's path")
@given(
    rows=st.sampled_from([1, 7, 16]), inputs=st.sampled_from([32, 96, 16, 24, 47, 50, 129]),
    shared=st.sampled_from([1, 4]), bias=st.booleans(),
)  # fmt: skip
def test_integers_are_multiplied_on_the_host_as_they_are(rows, inputs, shared, bias):
    """Other numbers of inputs than torch's vectors have are expanded: torch would read beyond the rows."""
    w, x = weight("int8", 20, inputs, rows=shared), values(rows, inputs, dtype=torch.bfloat16)
    assert linear_module._suits_integers(x, w) == (inputs % 32 == 0)
    norm = ops.Norm(values(inputs, seed=3, dtype=torch.bfloat16), 1e-5)
    check(ops.linear, x, w, values(20, dtype=torch.bfloat16) if bias else None, norm=norm, gate="silu")


@pytest.mark.parametrize(
    "name", ["fp8, token", "fp8, bound", "fp8, static", "int8, token", "int8, 127.5", "fp8, block"]
)
def test_rows_are_rounded_as_the_reference_rounds_them(name):
    how = ROUNDINGS[name]
    how = how if how.scale is None else replace(how, scale=how.scale.to(DEVICE))
    x = values(5, 96, seed=3, dtype=torch.float16)
    x[1], x[2, 5] = 0, torch.nan
    codes, scale = round_rows(x, how)
    want, steps, _ = quantize_inputs(x, how)
    sound = [0, 1, 3, 4]
    assert torch.equal(codes[sound].view(torch.uint8), want.flatten(1)[sound].view(torch.uint8))
    if how.scale is None:
        assert torch.equal(scale[sound], steps[..., 0][sound])
    assert scale[2].isnan().any()


@pytest.mark.gpu
def test_a_gpu_rounds_as_a_host_does():
    """Bit for bit: torch multiplies by the reciprocal on a GPU where it is asked to divide by a plain number."""
    x = values(65, 96, dtype=torch.float16)
    for how in ROUNDINGS.values():
        if how.scale is None:
            for own, host in zip(quantize_inputs(x, how), quantize_inputs(x.cpu(), how), strict=True):
                assert own is None or torch.equal(own.cpu().float(), host.float())
    for kind in LARGEST:
        own, host = (quantize_weight(w, kind) for w in (x.float(), x.float().cpu()))
        assert torch.equal(own.scale.cpu(), host.scale) and torch.equal(own.codes.cpu().float(), host.codes.float())


@pytest.mark.parametrize(("inputs", "group"), [(200, 96), (300, 128), (2500, None), (2200, 2100), (40, 7)])
@pytest.mark.parametrize("kind", ["int8", "e4m3"])
def test_groups_of_any_size_are_rounded(kind, inputs, group):
    """The last group may be shorter, and one may be longer than what a program rounds at a time."""
    how = Activations(kind, LARGEST[kind], group=group)
    x = values(3, inputs, dtype=torch.float16)
    codes, scale = round_rows(x, how)
    want, steps, _ = quantize_inputs(x, how)
    assert torch.equal(codes.view(torch.uint8), want.flatten(1)[:, :inputs].view(torch.uint8))
    assert torch.equal(scale, steps[..., 0])


@pytest.mark.parametrize("form", ["int8", "e4m3", *(["blocks"] if DEVICE == "cuda" else [])])
def test_many_rows_in_8_bits_are_the_product_of_what_is_rounded(form, monkeypatch):
    monkeypatch.setattr(linear_rounded, "_ROWS", 40)
    rows = 65
    kind = "int8" if form == "int8" else "e4m3"
    n, k, group, shared = (256, 1024, 128, 128) if form == "blocks" else (32, 64, None, 1)
    how = Activations(kind, LARGEST[kind], group=group)
    w = replace(weight(kind, n, k, group=group, rows=shared), activations=how)
    x = values(rows, k, dtype=torch.bfloat16)
    got = rounded_product(x, w)
    assert got is not None
    codes, scale, _ = quantize_inputs(x, how)
    exact = (codes.double() * scale).flatten(1) @ meant(w).to(DEVICE).T
    assert_as_accurate(got, exact, exact.to(torch.bfloat16))
    bias = values(n, seed=2, dtype=torch.bfloat16)
    whole = linear_triton(x, w, bias, gate="silu")
    first, second = (exact + bias.double()).chunk(2, -1)
    assert (whole.double() - torch.nn.functional.silu(first) * second).abs().max() < 0.05 * exact.abs().max()


def test_products_that_no_library_has_are_expanded():
    w = replace(weight("int8", 32, 64, group=32), activations=Activations("int8", 127.0))
    x = values(70, 64, dtype=DTYPES[-1])
    assert rounded_product(x, w) is None
    assert_as_accurate(linear_triton(x, w), linear_reference(x.double(), w), linear_reference(x, w))


def test_codes_and_inputs_that_are_rounded_give_integers():
    x = values(4, 32, dtype=torch.float64).cpu()
    codes, scale, zero = quantize_inputs(x, Activations("int8", 127.0))
    assert zero is None and codes.dtype == torch.int8 and codes.abs().amax(-1).eq(127).all()
    torch.testing.assert_close(codes.double() * scale, x[:, None], rtol=0, atol=float(scale.max()) / 2)


def compile_case(kind: str, dtype: str, capability: int, rows: int, every: bool) -> str:
    return f"""
import torch
from kvzip import ops
from kvzip.ops.triton import codes, linear, linear_quantized, linear_rounded, norm
for module in (codes, linear, linear_quantized, linear_rounded, norm):
    module.overlaps_launches = lambda x: {capability >= 90}
from kvzip.ops.triton.codes import expand_triton
from kvzip.ops.triton.linear_quantized import LAUNCHES, few_rows
from kvzip.ops.weights import empty_weight
new = lambda *shape: torch.zeros(shape, dtype=torch.{dtype})
def make(n, k, zeros=False, rows=1):
    group = 128 if "{kind}" == "int4" or rows > 1 else k
    how = dict(kind="{kind}", group=group, rows=rows, zeros=zeros, scale_dtype=torch.float16)
    return empty_weight(n, k, **how, device="cpu")
norm = ops.Norm(new(4096), 1e-5, 0)
launches = LAUNCHES["{kind}"] if {every} else (None,)
for config in launches:
    few_rows(new({rows}, 4096), make(6144, 4096), new(6144), norm=norm, config=config)
    few_rows(new({rows}, 4096), make(28672, 4096), norm=norm, gate="silu", config=config)
if {rows} == 1 and "{kind}" != "int4":
    for config in linear.LAUNCHES if {every} else linear.LAUNCHES[:1]:
        linear.one_row(new(1, 4096), make(28672, 4096), norm=norm, gate="silu", config=config)
        linear.one_row(new(1, 14336), make(4096, 14336), residual=new(1, 4096), config=config)
few_rows(new({rows}, 14336), make(4096, 14336), residual=new({rows}, 4096))
few_rows(new({rows}, 4096), make(4096, 4096, zeros="{kind}" != "e4m3", rows=1 if "{kind}" == "int4" else 128))
few_rows(new({rows}, 576), make(1536, 576))
expand_triton(make(256, 4096), torch.{dtype}, start=0, stop=128)
for how in (ops.Activations("int8", 127.0), ops.Activations("int8", 127.5, group=128)):
    codes, scale = linear_rounded.round_rows(new(2100, 14336), how)
if {capability} >= 90:
    linear_rounded.round_rows(new(100, 14336), ops.Activations("e4m3", 448.0, group=128))
    linear_rounded.round_rows(new(100, 14336), ops.Activations("e4m3", 448.0, bound=1200.0))
"""


@pytest.mark.parametrize(("capability", "kind", "rows"), [(80, "int4", 1), (90, "int8", 16), (90, "e4m3", 1)])
def test_kernels_fit(capability, kind, rows):
    check_fits(kind, "bfloat16", capability, rows)


NAMES = ("float32", "float16", "bfloat16")


def comes_here(kind: str, rows: int, dtype: str) -> bool:
    """Whether so many rows are neither expanded nor go to `few_columns`."""
    x = torch.empty(0, dtype=getattr(torch, dtype))
    return rows <= most_rows(x) and not takes_columns(weight(kind, 8, 64), rows, x)


def check_fits(kind: str, dtype: str, capability: int, rows: int, every: bool = False) -> None:
    kernels = compile_launches(compile_case(kind, dtype, capability, rows, every), capability=capability)
    assert {"_quantized_kernel", "_expand_kernel", "_round_kernel"} <= {kernel.name for kernel in kernels}
    assert_fits(kernels, capability=capability)
    own = [kernel for kernel in kernels if kernel.name == "_quantized_kernel"]
    if dtype != "float32":
        assert all("mma.sync" in kernel.ptx or "wgmma" in kernel.ptx for kernel in own), "no tensor cores"
        assert all("cp.async" in kernel.ptx for kernel in own), "weights are not loaded ahead"


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("kind", "rows", "dtype"),
    [(kind, rows, dtype) for kind in KINDS for rows in (1, 2, 16) for dtype in NAMES if comes_here(kind, rows, dtype)],
)
def test_all_kernels_fit(kind, rows, dtype, capability):
    check_fits(kind, dtype, capability, rows, every=rows == 1 and dtype == "bfloat16" and capability == 90)


def test_launches_do_not_cross_groups():
    for kind in KINDS:
        for group in (16, 32, 48, 64, 128, 160):
            if kind == "int4" and group % 32:
                continue
            for dtype in (torch.bfloat16, torch.float32):
                for inputs in (2 * group, 8192 // group * group + group):
                    made = empty_weight(4, inputs, kind=kind, group=group, device="cpu")
                    size = within_group(launch_config(kind, torch.empty(0, dtype=dtype)).block_bytes, made)
                    assert group % (size * (2 if kind == "int4" else 1)) == 0 and size >= 16
        assert all(len(set(LAUNCHES[kind])) == len(LAUNCHES[kind]) for kind in KINDS)
    assert suits(weight("int4", 4, 96, group=32)) and not suits(weight("int4", 4, 72, group=24))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [(1, 1), (2, 8), (64,), (70,)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("inputs", "outputs", "norm", "gate", "bias", "residual"),
    [
        (4096, 6144, 0, None, False, False),
        (3584, 4608, 0, None, True, False),
        (4096, 28672, 0, "silu", False, False),
        (2560, 20480, 1, "gelu_tanh", False, False),
        (14336, 4096, None, None, False, True),
        (576, 1536, 0, None, False, False),
    ],
)
def test_kernel_of_real_shapes(inputs, outputs, norm, gate, bias, residual, kind, rows, dtype):
    for group, shared, zeros in ((None, 1, False), (64 if inputs % 128 else 128, 1, kind != "e4m3"), (64, 128, False)):
        if group is None or inputs % group == 0:
            case = (kind, outputs, inputs, group, shared, zeros)
            check_linear(linear_triton, rows, case, norm, gate, bias, residual, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_every_launch_on_the_gpu(kind):
    for launch in LAUNCHES[kind]:
        case = (kind, 6144, 4096, 128 if kind == "int4" else None, 1, False)
        check_linear(
            lambda *a, launch=launch, **o: few_rows(*a, **o, config=launch), (1, 1), case, 0, "silu", False, False,
            torch.bfloat16,
        )  # fmt: skip
    for launch in linear_launches.LAUNCHES if kind != "int4" else ():
        run = lambda *a, launch=launch, **o: linear_launches.one_row(*a, **o, config=launch)  # noqa: E731
        check_linear(run, (1, 1), (kind, 6144, 4096, None, 1, False), 0, "silu", False, False, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_chain_of_overlapping_launches_is_in_order(kind):
    """Each kernel may start before the one in front has ended, and reads what it wrote."""
    square, wide = (weight(kind, n, 4096, group=128 if kind == "int4" else None, seed=n) for n in (4096, 8192))
    norm = ops.Norm(values(4096, dtype=torch.float16), 1e-5)

    def chain(linear, x, norm):
        for _ in range(8):
            x = linear(x, square, norm=norm, residual=x)
            x = linear(linear(x, wide, norm=norm, gate="silu"), square, residual=x)
        return x

    x = values(1, 4096, seed=9, dtype=torch.float16)
    exact = chain(linear_reference, x.double(), cast(norm, torch.float64))
    plain = chain(linear_reference, x, norm)
    for _ in range(20):
        assert_as_accurate(chain(linear_triton, x, norm), exact, plain)
