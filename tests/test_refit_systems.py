"""The problems of a fit and their solutions, on tensors alone: against float64, on a CPU and on a GPU."""

from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import random_model
from accuracy import assert_as_accurate
from kvzip.options import Refitting
from kvzip.refitting import planning, solving, systems
from kvzip.refitting.systems import Seen, Systems

D, GROUP, OTHERS = 16, 2, 5  # width, query heads of a head, keys of the prefix and the repeat
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@dataclass(frozen=True)
class Case:
    """Two layers of heads that keep `counts` of `chunk` keys each, which come first; keys of heads after each other."""

    counts: tuple[int, ...]
    chunk: int
    tokens: int
    seen: list[Seen]
    values: torch.Tensor
    far: torch.Tensor
    softcap: float | None = None

    @property
    def heads(self):
        return len(self.counts) // 2

    @property
    def config(self):
        return random_model.config(
            num_kv_heads=self.heads, num_heads=GROUP * self.heads, attn_scale=0.25, attn_softcap=self.softcap
        )


def case(counts, *, chunk=30, tokens=20, seed=0, softcap=None, dtype=torch.float64, far=0.2, twins=0.2):
    """Draws one; a part of the kept keys is `far` from all queries (weight 0), and a part repeats the key before."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q = draw(len(counts), GROUP * tokens, D)
    q[..., 0] = q[..., 0].abs() + 1
    k, v = draw(len(counts), chunk + OTHERS, D), draw(len(counts), chunk + OTHERS, D) + 1
    twin = torch.rand(len(counts), chunk, generator=generator) < twins
    away = torch.rand(len(counts), chunk, generator=generator) < (0 if softcap else far)
    for n in range(1, chunk):
        k[:, n] = torch.where(twin[:, n, None], k[:, n - 1], k[:, n])
    k[:, :chunk, 0] = torch.where(away, -1e4, k[:, :chunk, 0])
    q, k, v = (x.to(dtype).double() for x in (q, k, v))
    logits = 0.25 * q @ k.mT
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    out, chunk_out = (x.softmax(-1) @ v[:, : x.shape[2]] for x in (logits, logits[..., :chunk]))
    lse, chunk_lse = logits.logsumexp(-1), logits[..., :chunk].logsumexp(-1)
    half = len(counts) // 2
    seen = []
    for part in (slice(0, half), slice(half, None)):
        keys = torch.cat([own[:count] for own, count in zip(k[part], counts[part], strict=True)])
        shown = [x[part].unflatten(1, (GROUP, -1)).flatten(0, 1) for x in (q, out, lse, chunk_out, chunk_lse)]
        seen.append(Seen(*(x.to(dtype) for x in (*shown, keys))))
    values = torch.cat([own[:count] for own, count in zip(v, counts, strict=True)]).to(dtype)
    lost = torch.cat([own[:count] for own, count in zip(away, counts, strict=True)])
    return Case(tuple(counts), chunk, tokens, seen, values, lost, softcap)


def moved(made, dtype, device="cpu"):
    def move(x):
        return x.to(device, dtype)

    seen = [Seen(*map(move, vars(one).values())) for one in made.seen]
    return replace(made, seen=seen, values=move(made.values))


def built(made):
    """The systems of the case's one block."""
    seen = list(made.seen)
    return list(systems.build(made.config, block_of(made), seen, systems.masses(seen, made.heads), made.values))


def block_of(made):
    starts, bounds = [0], []
    for n in range(2):
        ends = [0, *accumulate(made.counts[n * made.heads : (n + 1) * made.heads])]
        bounds.append([list(pair) for pair in pairwise(ends)])
        starts.append(starts[-1] + ends[-1])
    return planning.blocks_of(bounds, starts, [made.chunk], 2, made.values.device)[0][0]


def problems(made):
    """What each head is asked, from its definition in float64: weights on kept keys, their rows, o, and y + m mean."""
    first = 0
    for n, count in enumerate(made.counts):
        one, heads = made.seen[n // made.heads], made.heads
        own = slice((n % heads) * GROUP, (n % heads + 1) * GROUP)
        q, out, lse, chunk_out, chunk_lse = (x[own].double().flatten(0, 1) for x in list(vars(one).values())[:5])
        at = sum(made.counts[n // heads * heads : n])
        logits = 0.25 * q @ one.keys[at : at + count].double().mT
        if made.softcap:
            logits = made.softcap * torch.tanh(logits / made.softcap)
        p, m = (logits - lse[:, None]).exp(), (chunk_lse - lse).exp()
        yield n, slice(first, first + count), p, m, out, chunk_out * m[:, None]
        first += count


def objective(p, m, out, given, w, values):
    """F of `kvzip.refit`."""
    mean = out.mean(0)
    spread = (out - mean).square().sum(1).mean()
    output = (p * w) @ (values - mean) - (given - m[:, None] * mean)
    return float(spread * (p @ w - m).square().sum() + output.square().sum())


@settings(max_examples=25)
@given(
    counts=st.lists(st.integers(0, 30), min_size=2, max_size=8).filter(lambda x: len(x) % 2 == 0),
    seed=st.integers(0, 99),
    softcap=st.sampled_from([None, 2.0]),
    how=st.sampled_from([Refitting(), Refitting(values=False), Refitting(bound=0.0), Refitting(bound=10.0, pull=1e-6)]),
    part=st.sampled_from([0.0, 0.5, 1.0]),
)
@example(counts=[0, 1, 30, 29], seed=0, softcap=None, how=Refitting(), part=0.0)
def test_no_head_is_worse_off_and_rows_that_no_query_sees_stay(counts, seed, softcap, how, part):
    """With no rows, one row, all rows; keys that repeat, keys of weight 0, and nothing but such."""
    made = case(counts, seed=seed, softcap=softcap, far=part, twins=part)
    bias, change = torch.zeros(len(made.values)).double(), torch.zeros_like(made.values)
    slots = []
    for each in built(made):
        fit = solving.solve(each, how, torch.float64)
        assert fit.bias.isfinite().all() and fit.change.isfinite().all()
        for n, slot in enumerate(each.slots.tolist()):
            slots.append(slot)
            count = int(each.counts[n])
            assert torch.equal(fit.bias[n, count:], torch.zeros_like(fit.bias[n, count:]))
            bias[each.rows[n, :count]], change[each.rows[n, :count]] = fit.bias[n, :count], fit.change[n, :count]
    assert sorted(slots) == [n for n, count in enumerate(counts) if 0 < count < made.chunk]
    assert torch.equal(bias[made.far], torch.zeros_like(bias[made.far])) and not change[made.far].any()
    assert bias.abs().max().item() <= how.bound * (1 + torch.finfo(bias.dtype).eps) if len(bias) else True
    gains = 0
    for _, rows, p, m, out, given_ in problems(made):
        old, one = made.values[rows], torch.ones(p.shape[1], dtype=p.dtype)
        before = objective(p, m, out, given_, one, old)
        after = objective(p, m, out, given_, bias[rows].exp(), old + change[rows])
        assert after <= before
        gains += after < before
    if part == 0 and how == Refitting():
        assert gains >= sum(0 < count < made.chunk - 3 for count in counts)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_products_are_as_accurate_as_their_factors(softcap, dtype, device, monkeypatch):
    """The baseline multiplies factors in the model's dtype, as tensor cores do, and sums in float32."""
    made = case([0, 3, 17, 30, 29, 8, 9, 1], tokens=70, softcap=softcap, dtype=dtype)
    monkeypatch.setattr(systems, "_WEIGHTS_AT_ONCE", 4_000)  # so that queries come in several parts
    exact, got = built(moved(made, torch.float64)), built(moved(made, dtype, device))
    monkeypatch.setattr(systems, "_narrow", lambda q: q.dtype)
    plain = built(moved(made, dtype))
    assert len(got) == len(exact) > 2
    for name in ("gram", "load", "cross", "reach"):
        for ours, true, base in zip(got, exact, plain, strict=True):
            assert_as_accurate(getattr(ours, name), getattr(true, name), getattr(base, name))


@pytest.mark.parametrize("device", DEVICES)
def test_solutions_are_as_accurate_as_plain_float32(device):
    """Of the same systems, so that it is the iterations alone that are compared."""
    for wide in built(case([0, 3, 17, 30, 29, 8, 9, 1] * 8, tokens=70, far=0.0, twins=0.0)):
        single = cast(wide, torch.float32)
        exact, plain, got = (
            solving.solve(each, Refitting(), torch.float32)
            for each in (cast(single, torch.float64), single, cast(single, torch.float32, device))
        )
        for name in ("bias", "change"):
            assert_as_accurate(getattr(got, name), getattr(exact, name), getattr(plain, name))


def cast(made, dtype, device="cpu"):
    parts = {name: x.to(device, dtype if x.is_floating_point() else None) for name, x in vars(made).items()}
    return Systems(**parts)


class Counting(TorchDispatchMode):
    """Counts the operations that are not views, and refuses those that would wait for a device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal"), name
        result = func(*args, **(kwargs or {}))
        self.count += not func.is_view
        return result


def test_no_step_waits_for_a_device_and_their_number_does_not_grow_with_heads():
    numbers = []
    for heads in (1, 2, 8):
        made = case([7, 8] * heads, far=0.0, twins=0.0)
        with Counting() as seen:
            for each in built(made):
                solving.solve(each, Refitting(), torch.float32)
        numbers.append(seen.count)
    assert numbers[0] == numbers[1] == numbers[2], numbers


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_waits_on_a_gpu(dtype):
    made = moved(case([0, 3, 17, 30, 29, 8, 9, 1]), dtype, "cuda")
    seen, block = list(made.seen), block_of(made)
    for each in built(made):  # what libraries load at first waits
        solving.solve(each, Refitting(), dtype)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        mass = systems.masses(seen, made.heads)
        for each in systems.build(made.config, block, seen, mass, made.values):
            solving.solve(each, Refitting(), dtype)
    finally:
        torch.cuda.set_sync_debug_mode("default")
