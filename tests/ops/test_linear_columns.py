"""Few rows times weights in 8 and 4 bits, as products of 64 outputs: in one launch, or in parts that are added up."""

import pytest
import torch
from compiling import assert_fits, compile_launches
from hypothesis import given, settings
from hypothesis import strategies as st

from kvzip.ops.triton import linear
from kvzip.ops.triton.codes import suits, within_group
from kvzip.ops.triton.linear_columns import Launch, few_columns
from ops.test_linear_quantized import check_linear, values, weight

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = [torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
CASES = [  # kind, outputs, inputs, group, rows, zeros
    ("e4m3", 24, 70, None, 1, False),
    ("e4m3", 40, 96, 32, 16, False),
    ("int8", 130, 160, 32, 1, True),
    ("int8", 18, 80, None, 1, True),
    ("int4", 24, 128, 64, 1, False),
    ("int4", 200, 256, 128, 4, True),
    ("int4", 16, 50, None, 1, True),
]


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=8 if DEVICE == "cpu" else 15)
@given(
    rows=st.sampled_from([(2,), (3, 3), (17,)]),
    gate=st.sampled_from([None, "silu", "gelu_tanh"]),
    bias=st.booleans(),
    residual=st.booleans(),
    dtype=st.sampled_from(HALVES),
    launch=st.sampled_from([None, Launch(64, 32, 3, 3), Launch(128, 64, 2, 2)]),
)
def test_rows_are_the_product_with_the_weights_meant(rows, case, gate, bias, residual, dtype, launch):
    def run(*args, norm=None, **options):
        return few_columns(*args, **options, config=launch)

    check_linear(run, rows, case, None, gate, bias, residual, dtype)


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_parts_of_the_inputs_are_all_of_them(parts):
    """Where they do not divide evenly, the last parts have fewer tiles, or none."""

    def run(*args, norm=None, **options):
        return few_columns(*args, **options, config=Launch(64, 16, 2, parts))

    for kind, inputs in (("int8", 80), ("int8", 64), ("int4", 160), ("e4m3", 70)):
        check_linear(run, (9,), (kind, 24, inputs, None, 1, False), None, None, True, True, torch.float16)


def test_a_tile_is_within_a_group():
    for kind, group, block in (("int8", 48, 16), ("int8", 64, 64), ("int4", 64, 32), ("int4", 128, 64)):
        w = weight(kind, 8, 2 * group, group=group)
        assert within_group(128, w) == block and suits(w)
    assert within_group(128, weight("int8", 8, 70)) == 128


GROUPS = {"e4m3": None, "int8": None, "int4": 128}


def compile_case(dtype: str, capability: int, rows: int, *kinds: str) -> str:
    return f"""
import torch
from kvzip.ops.triton import linear_columns
from kvzip.ops.weights import empty_weight
linear_columns.overlaps_launches = lambda x: {capability >= 90}
new = lambda *shape: torch.zeros(shape, dtype=torch.{dtype})
def make(kind, n, k, group=None, zeros=False, rows=1):
    how = dict(kind=kind, group=group or k, rows=rows, zeros=zeros, scale_dtype=torch.float16)
    return empty_weight(n, k, **how, device="cpu")
rows = {rows}
for kind, group in {[(kind, GROUPS[kind]) for kind in kinds or GROUPS]}:
    linear_columns.few_columns(new(rows, 4096), make(kind, 4096, 4096, group), residual=new(rows, 4096))
    linear_columns.few_columns(new(rows, 4096), make(kind, 28672, 4096, group), gate="silu")
    linear_columns.few_columns(new(rows, 14336), make(kind, 4096, 14336, group), residual=new(rows, 4096))
    if rows >= 32:
        linear_columns.few_columns(new(rows, 4096), make(kind, 6144, 4096, group), new(6144))
if rows == 32:
    linear_columns.few_columns(new(32, 4096), make("e4m3", 4096, 4096, 128, rows=128), new(4096))
    linear_columns.few_columns(new(32, 4096), make("int4", 28672, 4096, 128, True), gate="silu")
    linear_columns.few_columns(new(32, 576), make("int4", 1538, 576, 64, True), gate="gelu_tanh")
    linear_columns.few_columns(new(17, 4090), make("int8", 4096, 4090))
"""


def test_kernels_fit():
    check_fits("bfloat16", 90)


def test_older_cards_have_the_shared_memory():
    kernels = compile_launches(compile_case("bfloat16", 80, 64, "int8"), capability=80)
    assert_fits(kernels, capability=80)
    assert_fits_older(kernels)


def assert_fits_older(kernels):
    """RTX 30 and 40 have 99 KiB for a program, of an A100's 163."""
    assert kernels and all(kernel.shared <= 99 * 1024 for kernel in kernels)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_all_kernels_fit(dtype, capability):
    check_fits(dtype, capability)


def check_fits(dtype: str, capability: int) -> None:
    def compiled(rows: int, *kinds: str) -> list:
        return compile_launches(compile_case(dtype, capability, rows, *kinds), capability=capability)

    many = compiled(16, "e4m3", "int8") + compiled(32) + compiled(64)
    kernels = many + compiled(2, "int4")
    assert {kernel.name for kernel in kernels} == {"_columns_kernel", "_add_kernel"}
    assert_fits(kernels, capability=capability)
    if capability < 90:
        assert_fits_older(kernels)
    else:  # fewer than 16 rows have the older products with Triton 3.6
        assert all("wgmma" in kernel.ptx for kernel in many if kernel.name == "_columns_kernel")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [2, 9, 32, 64])
@pytest.mark.parametrize("kind", ["e4m3", "int8", "int4"])
def test_real_shapes(kind, rows, dtype):
    group = 128 if kind == "int4" else None
    run = linear.linear_triton  # of 8 bits and few rows by the other kernel
    check_linear(run, (rows,), (kind, 6144, 4096, group, 1, False), 0, None, True, False, dtype)
    check_linear(run, (rows,), (kind, 28672, 4096, group, 1, kind != "e4m3"), 0, "silu", False, False, dtype)
    check_linear(run, (rows,), (kind, 4096, 14336, group, 1, False), None, None, False, True, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("group", [None, 128])
@pytest.mark.parametrize("kind", ["e4m3", "int8", "int4"])
def test_every_run_gives_the_same_bits_beside_other_work(kind, group):
    """A product that is late, as where another program's share its tensor cores, still reads what it was given."""
    w, x = weight(kind, 6144, 4096, group=group), values(64, 4096, dtype=torch.bfloat16)
    big = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    beside, expected = torch.cuda.Stream(), few_columns(x, w)
    torch.cuda.synchronize()
    for _ in range(50):
        with torch.cuda.stream(beside):
            big @ big
        results = [few_columns(x, w) for _ in range(8)]
        torch.cuda.synchronize()
        assert all(torch.equal(result, expected) for result in results)


def test_rows_of_16_bits_come_here(monkeypatch):
    calls = []
    monkeypatch.setattr(linear, "few_columns", lambda *a, **o: calls.append(a) or few_columns(*a, **o))
    for rows, kind, expected in ((9, "int8", 1), (8, "e4m3", 0), (2, "int4", 1), (1, "int4", 0), (65, "int4", 0)):
        calls.clear()
        linear.linear_triton(values(rows, 64, dtype=torch.float16), weight(kind, 8, 64))
        assert len(calls) == expected
