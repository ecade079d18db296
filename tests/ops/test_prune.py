import pytest
import torch
from compiling import assert_fits, compile_launches
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvzip.ops.prune import prune, prune_reference
from kvzip.ops.triton.prune import prune_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTHS = [64, 80, 96, 128, 256]
PRUNES = [prune_reference, prune_triton]


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_packs(packed, k: Tensor, v: Tensor, keep: Tensor) -> None:
    """The definition, head by head, by boolean indexing."""
    packed_k, packed_v, offsets, positions = packed
    assert offsets.dtype == positions.dtype == torch.int32
    assert offsets.tolist() == [0, *keep.sum(1).cumsum(0).tolist()]
    assert len(packed_k) == len(packed_v) == len(positions) == keep.sum()
    for head, (start, stop) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:], strict=False)):
        assert torch.equal(packed_k[start:stop], k[head][keep[head]])
        assert torch.equal(packed_v[start:stop], v[head][keep[head]])
        assert torch.equal(positions[start:stop].long(), keep[head].nonzero()[:, 0])


@st.composite
def masks(draw) -> Tensor:
    heads, tokens = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    share = [draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])) for _ in range(heads)]  # empty and full heads too
    chance = torch.rand(heads, tokens, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    return (chance < torch.tensor(share)[:, None]).to(DEVICE)


@pytest.mark.parametrize("implementation", PRUNES)
@given(keep=masks(), width=st.sampled_from([1, 7, 64, 80]), known=st.booleans())
def test_equals_boolean_indexing(implementation, keep, width, known):
    k, v = rows(*keep.shape, width), rows(*keep.shape, width, seed=1)
    total = int(keep.sum()) if known else None
    assert_packs(implementation(k, v, keep, total=total), k, v, keep)


@pytest.mark.parametrize("implementation", PRUNES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_over_several_blocks_of_columns(implementation, dtype):
    k, v = rows(3, 8201, 64, dtype=dtype), rows(3, 8201, 64, seed=1, dtype=dtype)
    keep = rows(3, 8201, seed=2) > torch.tensor([0.5, torch.inf, -torch.inf], device=DEVICE)[:, None]
    assert_packs(implementation(k, v, keep), k, v, keep)


@pytest.mark.parametrize("implementation", PRUNES)
def test_strided_inputs(implementation):
    k = rows(50, 3, 128).transpose(0, 1)[:, 5:45, :64]
    v = rows(3, 90, 64, seed=1)[:, ::2][:, :40]
    keep = (rows(40, 3, seed=2) > 0).T
    assert_packs(implementation(k, v, keep), k, v, keep)


@pytest.mark.parametrize("implementation", PRUNES)
@pytest.mark.parametrize("shape", [(2, 0, 8), (0, 4, 8), (2, 5, 0)])
def test_empty_shapes(implementation, shape):
    k, keep = rows(*shape), torch.ones(shape[:2], dtype=torch.bool, device=DEVICE)
    packed_k, packed_v, offsets, positions = implementation(k, k, keep)
    assert packed_k.shape == packed_v.shape == (shape[0] * shape[1], shape[2])
    assert offsets.tolist() == [shape[1] * head for head in range(shape[0] + 1)]
    assert positions.tolist() == list(range(shape[1])) * shape[0]


def test_dropped_rows_are_never_read_into_the_result():
    k = rows(2, 30, 64)
    keep = rows(2, 30, seed=1) > 0
    poisoned = k.where(keep[..., None], torch.nan)
    assert torch.equal(prune_triton(poisoned, poisoned, keep)[0], k[keep])


def test_a_total_that_is_too_small_stays_inside_its_memory():
    k, keep = rows(2, 30, 64), torch.ones(2, 30, dtype=torch.bool, device=DEVICE)
    packed_k, _, offsets, positions = prune_triton(k, k, keep, total=41)
    assert torch.equal(packed_k, k.flatten(0, 1)[:41])
    assert offsets.tolist() == [0, 30, 60]
    assert len(positions) == 41


def test_wrong_arguments_raise():
    k, keep = torch.zeros(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)
    with pytest.raises((ValueError, TypeError), match="keep"):  # TypeError where calls are type-checked
        prune(k, k, keep[:, :4])
    with pytest.raises(ValueError, match="dtype"):
        prune(k, k.half(), keep)
    with pytest.raises(ValueError, match="contiguous rows"):
        prune(k.transpose(1, 2).contiguous().transpose(1, 2), k, keep)
    with pytest.raises(ValueError, match="number of kept rows"):
        prune(k, k, keep, total=11)
    with pytest.raises(ValueError, match="number of kept rows"):
        prune_reference(k, k, keep, total=9)


def compile_case(width: int, dtype: str) -> str:
    return (
        "import torch\n"
        "from kvzip.ops.triton.prune import prune_triton\n"
        f"k, keep = torch.zeros(8, 64, {width}, dtype=torch.{dtype}), torch.ones(8, 64, dtype=torch.bool)\n"
        "prune_triton(k, k, keep, total=160)"
    )


@pytest.mark.parametrize(("capability", "width"), [(80, 128), *((90, width) for width in WIDTHS)])
def test_kernels_fit(capability, width):
    kernels = compile_launches(compile_case(width, "bfloat16"), capability=capability)
    assert {kernel.name for kernel in kernels} == {"_count_kernel", "_place_kernel", "_copy_kernel"}
    assert_fits(kernels, capability=capability)
    copy = next(kernel for kernel in kernels if kernel.name == "_copy_kernel")
    assert ".v4.b32" in copy.ptx, "rows are not moved 16 bytes at a time"


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("width", WIDTHS)
def test_all_kernels_fit(capability, dtype, width):
    assert_fits(compile_launches(compile_case(width, dtype), capability=capability), capability=capability)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("shape", [(8, 20011), (4, 4096), (1, 1)])
def test_full_grid(dtype, width, shape):
    k, v = rows(*shape, width, dtype=dtype), rows(*shape, width, seed=1, dtype=dtype)
    for share in (0.0, 0.3, 1.0):
        keep = torch.rand(shape, device="cuda") < share
        assert_packs(prune(k, v, keep), k, v, keep)


@pytest.mark.gpu
def test_offsets_beyond_2_to_the_31():
    k = torch.empty(3, 2**23, 128, dtype=torch.float16, device="cuda").normal_()  # 3 * 2**30 elements
    keep = torch.rand(3, 2**23, device="cuda") < 0.9
    keep[2, -1] = True
    assert keep.sum() * 128 > 2**31
    packed_k, packed_v, _, _ = prune(k, k, keep)
    for head, part in enumerate(packed_k.split(keep.sum(1).tolist())):
        assert torch.equal(part, k[head][keep[head]])
    assert torch.equal(packed_k, packed_v)


@pytest.mark.gpu
def test_never_waits_for_the_device_when_the_total_is_known():
    k, keep = rows(2, 300, 64), torch.arange(300, device="cuda").expand(2, -1) % 3 == 0
    prune(k, k, keep, total=200)
    torch.cuda.set_sync_debug_mode("error")
    try:
        packed = prune(k, k, keep, total=200)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_packs(packed, k, k, keep)
