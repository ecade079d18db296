"""Queries, keys and values of new tokens in one step: of one token they are one launch, of more two."""

from dataclasses import replace

import pytest
import torch
from compiling import assert_fits, compile_launches
from hypothesis import given, settings
from hypothesis import strategies as st

from accuracy import assert_as_accurate
from kvzip import ops
from kvzip.ops.project import project_reference
from kvzip.ops.triton import project as kernels
from kvzip.ops.triton.append import append_triton_
from kvzip.ops.triton.linear import linear_triton
from kvzip.ops.triton.linear_quantized import most_rows
from kvzip.ops.triton.project import project_triton
from kvzip.ops.triton.rotary import rotary_triton, rotate_heads
from ops.test_layers import DEVICE, DTYPES, cast, values
from ops.test_linear_quantized import meant, weight
from unchecked import unchecked

HEADS = [(1, 1), (4, 2), (2, 2)]


def case(kind, heads, width, inputs, dtype, *, rows=(1, 1), bias=False, head_norm=None, length=None, by_question=False):
    """Inputs of `project` and, with a length, tails of random rows. The weight is of codes if `kind` names some."""
    outputs = (heads[0] + 2 * heads[1]) * width
    w = values(outputs, inputs, seed=1, dtype=dtype, spread=inputs**-0.5)
    if kind is not None:
        w = weight(kind, outputs, inputs, group=32 if kind == "int4" else None)
    angles = values(*([rows[0]] if by_question else []), rows[1], width // 2, seed=3, dtype=torch.float64, spread=3)
    angles = torch.cat([angles, angles], -1)
    offset = head_norm or 0
    norms = [None, None] if head_norm is None else [values(width, seed=s, dtype=dtype) for s in (4, 5)]
    tail = None
    if length is not None:
        shape = (rows[0], heads[1], 5, 2 * width)  # rows of a tail may be parts of others
        k, v = (values(*shape, seed=s, dtype=dtype)[..., :width] for s in (6, 7))
        tail = k, v, torch.arange(length, length + rows[0], dtype=torch.int32, device=DEVICE)
    return {
        "x": values(*rows, inputs, dtype=dtype),
        "weight": w,
        "bias": values(outputs, seed=2, dtype=dtype) if bias else None,
        "norm": ops.Norm(values(inputs, seed=8, dtype=dtype), 1e-5, offset),
        "cos": angles.cos().to(dtype),
        "sin": angles.sin().to(dtype),
        "kv_heads": heads[1],
        "q_norm": norms[0],
        "k_norm": norms[1],
        "tail": tail,
    }


def check(given):
    """The kernels against the reference, in float64 and in the inputs' dtype: q, k, v, and both tails after them.

    Where a library has the product, in float32 of more than 8 rows, the weights that codes mean are one matrix there
    too: its product with parts of it, as the reference has them, may be four times as near.
    """

    def run(op, dtype=None):
        own = {name: x if dtype is None else cast(x, dtype) for name, x in given.items()}
        if not isinstance(own["weight"], torch.Tensor):
            own["weight"] = own["weight"] if dtype is None else meant(own["weight"]).to(DEVICE, dtype)
        if own["tail"] is not None:
            own["tail"] = tuple(
                x.clone() if dtype is None or n == 2 else x.to(dtype) for n, x in enumerate(own["tail"])
            )
        return *op(**own), *(own["tail"] or ())[:2]

    x = given["x"]
    whole = torch.float32 if x.dtype == torch.float32 and x.shape[0] * x.shape[1] > most_rows(x) else None
    found = zip(run(project_triton), run(project_reference, torch.float64), run(project_reference, whole), strict=True)
    for got, exact, plain in found:
        assert_as_accurate(got, exact, plain)


@settings(max_examples=10 if DEVICE == "cpu" else 40)
@given(
    kind=st.sampled_from([None, "e4m3", "int8", "int4"]),
    heads=st.sampled_from(HEADS),
    width=st.sampled_from([2, 8, 12]),
    inputs=st.sampled_from([32, 96]),
    bias=st.booleans(),
    offset=st.sampled_from([0, 1]),
    length=st.sampled_from([None, 0, 4]),
    by_question=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_one_token(kind, heads, width, inputs, bias, offset, length, by_question, dtype):
    given = case(kind, heads, width, inputs, dtype, bias=bias, length=length, by_question=by_question)
    check({**given, "norm": replace(given["norm"], offset=offset)})


@settings(max_examples=10 if DEVICE == "cpu" else 30)
@given(
    kind=st.sampled_from([None, "int4"]),
    rows=st.sampled_from([(1, 1), (1, 3), (2, 1), (0, 1)]),
    head_norm=st.sampled_from([None, 0, 1]),
    length=st.sampled_from([None, 2, 4]),
    dtype=st.sampled_from(DTYPES),
)
def test_more_tokens_and_normed_heads(kind, rows, head_norm, length, dtype):
    check(case(kind, (4, 2), 16, 96, dtype, rows=rows, head_norm=head_norm, length=length))


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
def test_a_full_tail_is_left_as_it_is(kind):
    given = case(kind, (2, 2), 16, 64, torch.float16, length=5)
    before = [x.clone() for x in given["tail"][:2]]
    project_triton(**given)
    assert all(torch.equal(x, y) for x, y in zip(given["tail"], before, strict=False))


@pytest.mark.parametrize("head_norm", [None, 1])
@pytest.mark.parametrize("rows", [(1, 1), (2, 3), (9, 2), (1, 70)], ids=str)
@pytest.mark.parametrize("kind", [None, "e4m3", "int8", "int4"])
def test_it_is_what_the_three_ops_give(kind, rows, head_norm):
    """What a product gives is rounded before it is rotated, as it is where another kernel reads it."""
    width = 16 if rows == (1, 1) else 24
    how = {"rows": rows, "length": 3, "bias": True, "head_norm": head_norm}
    given, apart = (case(kind, (3, 1), width, 160, torch.float16, **how) for _ in range(2))
    q, k, v = project_triton(**given)
    qkv = linear_triton(apart["x"], apart["weight"], apart["bias"], norm=apart["norm"])
    norms = {"q_norm": apart["q_norm"], "k_norm": apart["k_norm"], "eps": 1e-5, "offset": head_norm or 0}
    other = rotary_triton(qkv, apart["cos"], apart["sin"], kv_heads=1, **norms)
    append_triton_(*apart["tail"], *other[1:])
    for x, y in zip((q, k, v, *given["tail"]), (*other, *apart["tail"]), strict=True):
        assert torch.equal(x, y)


def test_parts_of_a_product_are_added_up_where_heads_are_rotated(monkeypatch):
    """A product with codes leaves its sums to the launch that rotates and appends."""
    calls = []
    monkeypatch.setattr(kernels, "linear_triton", lambda *a, **o: calls.append("whole"))
    run = kernels.column_products
    monkeypatch.setattr(kernels, "column_products", lambda *a, **o: calls.append("parts") or run(*a, **o))
    project_triton(**case("int4", (2, 1), 16, 320, torch.float16, rows=(2, 1), length=1))
    assert calls == ["parts"]


def test_one_token_is_one_launch(monkeypatch):
    """Of all kinds of weights that have a kernel for a row; what is not one token, or is normed by head, is not."""
    calls = []

    def counted(run):
        return lambda *a, **o: calls.append(run.__name__) or run(*a, **o)

    for run in (linear_triton, rotate_heads):
        monkeypatch.setattr(kernels, run.__name__, counted(run))
    for kind in (None, "e4m3", "int8", "int4"):
        project_triton(**case(kind, (2, 1), 16, 64, torch.float16, length=1))
    assert not calls
    for other in ({"rows": (1, 2)}, {"rows": (2, 1)}, {"head_norm": 0}):
        calls.clear()
        project_triton(**case(None, (2, 1), 16, 64, torch.float16, length=1, **other))
        assert calls == ["linear_triton", "rotate_heads"]


@unchecked()
def test_wrong_arguments_raise():
    given = case(None, (2, 1), 16, 64, torch.float32, length=1)
    k, v, lengths = given["tail"]
    wide = given["weight"].repeat(1, 2)
    for wrong, message in (
        ({"kv_heads": 2}, "values a token"),
        ({"cos": given["cos"][..., :8]}, "expected"),
        ({"weight": wide}, "expected a weight"),
        ({"weight": wide[:, :32].contiguous()}, "expected a weight"),
        ({"q_norm": torch.ones(16)}, "both q_norm"),
        ({"tail": (k[..., :8], v[..., :8], lengths)}, "fit the tails"),
        ({"tail": (k.half(), v.half(), lengths)}, "fit the tails"),
        ({"tail": (k, v.half(), lengths)}, "fit the tails"),
        ({"tail": (k, v, lengths[:0])}, "fit the tails"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.project(**{**given, **wrong})


def test_a_tail_whose_rows_are_not_contiguous_is_refused():
    given = case(None, (2, 1), 16, 64, torch.float16, length=1)
    k, v, lengths = given["tail"]
    with pytest.raises(ValueError, match="expected tail_k with a contiguous last axis"):
        project_triton(**{**given, "tail": (k.mT.contiguous().mT, v, lengths)})


SHAPES = ((32, 8, 128, 4096), (9, 3, 64, 576))
ALL_SHAPES = (*SHAPES, (64, 8, 128, 8192), (28, 4, 128, 3584), (8, 4, 256, 2304))


def compile_case(shapes: tuple[tuple[int, ...], ...], dtype: str, capability: int) -> str:
    return f"""
import torch
from kvzip import ops
from kvzip.ops.triton import linear, linear_integers
from kvzip.ops.triton.project import project_triton
from kvzip.ops.weights import empty_weight
for module in (linear, linear_integers):
    module.overlaps_launches = lambda x: {capability >= 90}
new = lambda *shape: torch.zeros(shape, dtype=torch.{dtype})
def weights(n, k):
    yield new(n, k)
    for kind, group in (("e4m3", k), ("int8", k), ("int4", 128)):
        scale = torch.float16 if kind == "int4" else torch.float32
        yield empty_weight(n, k, kind=kind, group=group, rows=1, scale_dtype=scale, device="cpu")
for heads, kv, width, inputs in {shapes}:
    for weight in weights((heads + 2 * kv) * width, inputs):
        tail = new(1, kv, 300, width), new(1, kv, 300, width), torch.zeros(1, dtype=torch.int32)
        how = dict(norm=ops.Norm(new(inputs), 1e-5, 0), cos=new(1, width), sin=new(1, width), kv_heads=kv)
        project_triton(new(1, 1, inputs), weight, **how, tail=tail)
        project_triton(new(1, 1, inputs), weight, new(weight.shape[0]), **how)
"""


def test_kernels_fit():
    check_fits(SHAPES, "bfloat16", 90)


@pytest.mark.parametrize(("capability", "dtype"), [(80, "float16"), (90, "bfloat16")])
def test_kernels_for_a_few_rows_fit(capability, dtype):
    source = (
        compile_case((), dtype, capability)
        + f"""
from kvzip.ops.triton import linear_columns, norm, rotary
for module in (linear_columns, norm, rotary):
    module.overlaps_launches = lambda x: {capability >= 90}
for width, head_norm in ((64, None), (128, None), (128, new(128)), (256, new(256))):
    for weight in list(weights(12 * width, 1024))[1:]:
        tail = new(32, 2, 300, width), new(32, 2, 300, width), torch.zeros(32, dtype=torch.int32)
        how = dict(norm=ops.Norm(new(1024), 1e-5, 0), cos=new(1, width), sin=new(1, width), kv_heads=2)
        project_triton(new(32, 1, 1024), weight, new(12 * width), **how, tail=tail, q_norm=head_norm, k_norm=head_norm)
"""
    )
    kernels = compile_launches(source, capability=capability)
    assert {kernel.name for kernel in kernels} == {"_norm_kernel", "_columns_kernel", "_rotary_kernel"}
    assert_fits(kernels, capability=capability)


def check_fits(shapes: tuple[tuple[int, ...], ...], dtype: str, capability: int) -> None:
    kernels = compile_launches(compile_case(shapes, dtype, capability), capability=capability)
    assert {kernel.name for kernel in kernels} == {"_row_kernel", "_integer_kernel"}
    assert_fits(kernels, capability=capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_all_kernels_fit(dtype, capability):
    check_fits(ALL_SHAPES, dtype, capability)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [None, "e4m3", "int8", "int4"])
@pytest.mark.parametrize(
    ("heads", "width", "inputs"), [((32, 8), 128, 4096), ((64, 8), 128, 8192), ((28, 4), 128, 3584), ((9, 3), 64, 576)]
)
def test_real_shapes(heads, width, inputs, kind, dtype):
    check(case(kind, heads, width, inputs, dtype, length=4))
    check(case(kind, heads, width, inputs, dtype, bias=True))
    check(case(kind, heads, width, inputs, dtype, rows=(32, 1), bias=True, length=2))
