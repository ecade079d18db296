import os
import subprocess
import sys
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from compiling import assert_fits, compile_launches
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import kvzip.ops.triton.select as steps
from kvzip.ops.select import select, select_count, select_rows_reference, select_uniform, select_uniform_count

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, torch.inf, -torch.inf, 1.0, -1.0, 1e-45, -1e-45]),  # ties and edges
    st.floats(width=32, allow_nan=False),
)
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 7))
FEW_HEADS = st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 7))  # the interpreter runs each by itself
RATIOS = st.floats(0.0, 1.0, exclude_min=True)


@st.composite
def scores_of(draw, values=VALUES, shapes=SHAPES) -> Tensor:
    shape = draw(shapes)
    size = shape[0] * shape[1] * shape[2]
    return torch.tensor(draw(st.lists(values, min_size=size, max_size=size)), dtype=torch.float32).view(shape)


@pytest.fixture(params=["reference", "triton"])
def backend(request, monkeypatch):
    """Runs a test with both; hypothesis may reuse it, since nothing in it changes between examples."""
    monkeypatch.setenv("KVZIP_BACKEND", request.param)
    return request.param


def brute(scores: Tensor, count: int) -> Tensor:
    """The definition: sort pairs of (score, index) in Python, whose comparison of floats holds -0.0 equal to 0.0."""
    flat = scores.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda index: (-flat[index], index))
    keep = torch.zeros(len(flat), dtype=torch.bool)
    keep[order[:count]] = True
    return keep.view(scores.shape)


def at_once(run, scores: Tensor, count: int) -> Tensor:
    """`run` over all scores as one row."""
    return run(scores.reshape(1, -1), count=count).view(scores.shape)


@given(scores=scores_of(), share=st.floats(0, 1))
def test_keeps_exactly_the_highest_and_ties_by_index(scores, share):
    count = round(share * scores.numel())
    assert torch.equal(select_count(scores, count=count), brute(scores, count))


@given(scores=scores_of(), share=st.floats(0, 1))
def test_kernel_equals_definition(scores, share):
    count = round(share * scores.numel())
    keep = at_once(steps.select_rows_triton, scores.to(DEVICE), count)
    assert torch.equal(keep.cpu(), brute(scores, count))


@given(scores=scores_of(), ratios=st.tuples(RATIOS, RATIOS))
def test_keeps_the_floor_and_nests(scores, ratios):
    small, large = (select(scores, ratio=ratio) for ratio in sorted(ratios))
    assert small.sum() == int(min(ratios) * scores.numel())
    assert not (small & ~large).any()


@given(scores=scores_of(st.integers(-4000, 4000).map(lambda n: n / 8)), data=st.data())
def test_order_of_layers_does_not_matter_without_ties(scores, data):
    scores = scores + torch.arange(scores.numel()).view(scores.shape) * 2.0**-12  # makes equal scores differ
    order = data.draw(st.permutations(range(len(scores))))
    assert torch.equal(select(scores, ratio=0.4)[order], select(scores[order], ratio=0.4))


@given(scores=scores_of(shapes=FEW_HEADS), ratio=RATIOS)
def test_uniform_keeps_the_same_number_in_each_head(scores, ratio):
    count = int(ratio * scores.shape[2])
    keep = select_uniform(scores, ratio=ratio)
    by_kernel = steps.select_rows_triton(scores.flatten(0, 1).to(DEVICE), count=count).cpu().view(scores.shape)
    expected = torch.stack([brute(head, count) for head in scores.flatten(0, 1)]).view(scores.shape)
    assert torch.equal(keep, expected)
    assert torch.equal(by_kernel, expected)
    assert torch.equal(select_uniform_count(scores, count=count), expected)


@pytest.mark.parametrize("value", [0.0, -0.0, torch.inf, -torch.inf, 3.0])
def test_all_equal_scores_are_kept_in_index_order(value, backend):
    keep = select(torch.full((2, 3, 5), value, device=DEVICE), ratio=0.5)
    assert keep.flatten().tolist() == [True] * 15 + [False] * 15


def test_list_of_layers_equals_concatenation(backend):
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randint(0, 9, (2, length), generator=generator).float().to(DEVICE) for length in (5, 1, 40, 8)]
    whole = torch.cat([layer.flatten() for layer in layers])[None, None]
    expected = select(whole, ratio=0.37).flatten().split([layer.numel() for layer in layers])
    layers[2] = layers[2].T.contiguous().T  # the same values in other strides
    for keep, part, layer in zip(select(layers, ratio=0.37), expected, layers, strict=True):
        assert torch.equal(keep, part.view(layer.shape))
    for keep, part in zip(select(tuple(layers), ratio=0.37), expected, strict=True):
        assert torch.equal(keep.flatten(), part)


def test_strided_scores_select_as_contiguous_ones(backend):
    scores = torch.randn(7, 3, 4, generator=torch.Generator().manual_seed(0)).to(DEVICE).permute(2, 1, 0)
    assert torch.equal(select(scores, ratio=0.3), select(scores.contiguous(), ratio=0.3))


def test_nan_raises_or_sets_the_flag_and_counts_as_lowest(backend):
    scores = torch.tensor([[[1.0, torch.nan, -torch.inf, 2.0, -5.0]]], device=DEVICE)
    with pytest.raises(ValueError, match="without NaN"):
        select(scores, ratio=0.5)
    with pytest.raises(ValueError, match="without NaN"):
        select_uniform(scores, ratio=0.5)
    flag = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    assert select(scores, ratio=0.6, nan=flag).flatten().tolist() == [True, False, False, True, True]
    assert select(scores, ratio=0.8, nan=flag).flatten().tolist() == [True, True, False, True, True]
    assert flag.item() == 1
    flag.zero_()
    select(scores.nan_to_num(0.0), ratio=0.5, nan=flag)
    assert flag.item() == 0


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (2, 3, 0)])
def test_nothing_to_select(shape, backend):
    scores = torch.empty(shape, device=DEVICE)
    assert select(scores, ratio=0.5).shape == shape
    assert select_uniform(scores, ratio=0.5).shape == shape
    assert select([], ratio=0.5) == []


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.01, float("nan")])
def test_ratio_outside_its_range_raises(ratio):
    with pytest.raises(ValueError, match="ratio"):
        select(torch.zeros(1, 1, 4), ratio=ratio)


@pytest.mark.parametrize("count", [-1, 5])
def test_count_outside_its_range_raises(count):
    with pytest.raises(ValueError, match="number of scores"):
        select_count(torch.zeros(1, 1, 4), count=count)
    with pytest.raises(ValueError, match="scores of a head"):
        select_uniform_count(torch.zeros(2, 1, 4), count=count)


@pytest.mark.parametrize(
    "kind", ["distinct", "ties", "equal", "equal in a block", "heads of very different size", "sample misleads"]
)
def test_kernel_equals_reference_over_several_blocks(kind):
    scores = torch.randn(2, 3, 4099, generator=torch.Generator().manual_seed(1))
    if kind == "ties":
        scores = scores.round()
    elif kind == "equal":
        scores = torch.zeros_like(scores)
    elif kind == "equal in a block":
        scores = 1 + (torch.arange(scores.numel()) // steps.BLOCK * 2.0**-16).view(scores.shape)
    elif kind == "heads of very different size":
        scores = scores.abs() * torch.logspace(-30, 30, 3)[:, None]
    elif kind == "sample misleads":
        scores.view(-1)[:: steps.sample_step(1, scores.numel() * 100)] += 100
    for count in (1, 7000, scores.numel()):
        keep = at_once(steps.select_rows_triton, scores.to(DEVICE), count).cpu()
        assert torch.equal(keep, at_once(select_rows_reference, scores, count))


def test_a_wrong_guess_costs_rounds_and_not_exactness():
    """Every guess of a range that misses the rank still ends at the right key within the rounds that there are."""
    scores = torch.randn(1, 3000, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    for below, beyond in [(2**32 - 10, 0), (0, 2**32 - 10), (2**31 + 2**29, 2**29), (2**31, 2**31 - 2)]:
        state = torch.tensor([[below, beyond, 0]], device=DEVICE)
        for _ in range(steps.FULL_ROUNDS):
            steps.narrow_(state, steps.histogram(scores, state), count=900, total=3000)
        keep, ties = steps.mark(scores, state)
        steps.settle_(keep, scores, state, ties, ties.cumsum(1) - ties, count=900)
        assert torch.equal(keep.cpu(), select_rows_reference(scores.cpu(), count=900))


def select_sharded(shards: list[Tensor], count: int) -> list[Tensor]:
    """Selection where each part holds some heads of all layers, as in tensor parallelism; a sum is an all-reduce."""
    layers, total = len(shards[0]), sum(shard.numel() for shard in shards)
    state = steps.begin(1, shards[0].device)
    for index in range(1 + steps.FULL_ROUNDS):
        step = steps.sample_step(1, total) if index == 0 else 1
        counts = sum(steps.histogram(shard.reshape(1, -1), state, step=step) for shard in shards)
        steps.narrow_(state, counts, count=count, total=total, guess=index == 0)
    parts = [shard.flatten(1) for shard in shards]
    state = state.expand(layers, -1)
    marked = [steps.mark(part, state) for part in parts]
    ties = torch.cat([ties for _, ties in marked], dim=1)  # gathered: [layers, blocks of all parts], in index order
    before = (ties.flatten().cumsum(0) - ties.flatten()).view(ties.shape)
    before = before.split([ties.shape[1] for _, ties in marked], dim=1)
    for (keep, own), part, earlier in zip(marked, parts, before, strict=True):
        steps.settle_(keep, part, state, own, earlier.contiguous(), count=count)
    return [keep.view(shard.shape) for (keep, _), shard in zip(marked, shards, strict=True)]


@pytest.mark.parametrize("kind", ["distinct", "ties", "equal"])
@pytest.mark.parametrize("heads", [(1, 3), (2, 1, 1)])
def test_sharded_by_heads_equals_unsharded(kind, heads):
    scores = torch.randn(3, 4, 501, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    if kind != "distinct":
        scores = scores.round() if kind == "ties" else torch.zeros_like(scores)
    shards = [shard.contiguous() for shard in scores.split(heads, dim=1)]
    for count in (1, 2000):
        kept = torch.cat(select_sharded(shards, count), dim=1)
        assert torch.equal(kept.cpu(), at_once(select_rows_reference, scores.cpu(), count))


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_fit(capability):
    kernels = compile_launches(
        "import torch\n"
        "from kvzip.ops.triton.select import select_rows_triton\n"
        "nan = torch.zeros(1, dtype=torch.int32)\n"
        "select_rows_triton(torch.zeros(1, 2**18), count=5, nan=nan)\n"
        "select_rows_triton(torch.zeros(1, 2002), count=5)",
        capability=capability,
    )
    names = {"_histogram_kernel", "_narrow_kernel", "_mark_kernel", "_settle_kernel"}
    assert {kernel.name for kernel in kernels} >= names
    assert_fits(kernels, capability=capability)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["softmax", "ties", "equal", "sorted", "zeros"])
@pytest.mark.parametrize("shape", [(32, 8, 131072), (28, 4, 32769), (1, 1, 5)])
def test_full_size_equals_reference(kind, shape):
    scores = torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).mul(3).exp()
    if kind == "ties":
        scores = scores.bfloat16().float()
    elif kind == "equal":
        scores = torch.full_like(scores, 0.25)
    elif kind == "sorted":
        scores = scores.flatten().sort().values.view(shape)
    elif kind == "zeros":
        scores = scores.where(scores > 2, 0.0)
    for ratio in (0.001, 0.3, 0.9, 1.0):
        count = int(ratio * scores.numel())
        keep = select(scores, ratio=ratio)
        assert torch.equal(keep, at_once(select_rows_reference, scores, count)), (kind, ratio)
        assert keep.sum() == count
    keep = select_rows_reference(scores.flatten(0, 1), count=int(0.3 * shape[2])).view(shape)
    assert torch.equal(select_uniform(scores, ratio=0.3), keep)


@pytest.mark.gpu
def test_never_waits_for_the_device():
    scores, flag = torch.rand(4, 2, 1000, device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")
    select(scores, ratio=0.3, nan=flag)
    torch.cuda.set_sync_debug_mode("error")
    try:
        select(scores, ratio=0.3, nan=flag)
        select(list(scores), ratio=0.3, nan=flag)
        select_uniform(scores, ratio=0.3, nan=flag)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_replays_in_a_graph():
    scores, flag = torch.rand(4, 2, 9000, device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")
    select(scores, ratio=0.3, nan=flag)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        keep = select(scores, ratio=0.3, nan=flag)
    scores.copy_(torch.rand(4, 2, 9000, device="cuda"))
    graph.replay()
    assert torch.equal(keep, at_once(select_rows_reference, scores, int(0.3 * scores.numel())))


def test_a_float32_ratio_is_widened_before_it_is_multiplied(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # it is no float
    ratio = np.float32(0.7)
    assert int(ratio * 10) == 7 and int(float(ratio) * 10) == 6
    assert select(torch.rand(1, 1, 10), ratio=ratio).sum() == 6
    assert select_uniform(torch.rand(1, 1, 10), ratio=ratio).sum() == 6


def test_importing_the_reference_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import kvzip.ops.select, kvzip.ops.prune, kvzip.ops.quantize"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
