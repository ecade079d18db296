"""Laws of `decode`, `decode_schedule` and `merge`, and its kernels against the reference."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from accuracy import assert_as_accurate
from kvzip.ops import Channels, DecodeSchedule, Quantized, decode, decode_schedule, dequantize, merge, quantize
from kvzip.ops.decode import decode_reference
from kvzip.ops.merge import merge_reference
from kvzip.ops.quantize_turned import quantize_turned

pytest.importorskip("triton")

from compiling import assert_fits, compile_calls

from kvzip.ops.triton.common import interpreted
from kvzip.ops.triton.decode import decode_triton
from kvzip.ops.triton.decode_launch import launch_config
from kvzip.ops.triton.merge import merge_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def make(
    seed, B, H, G, T, D, lengths, R, dtype, bits=None, channels=False, device=DEVICE, bias=None, turned=False
) -> dict:
    """Random inputs of `decode`. Tails hold NaN where they are not written, and are slices of something larger."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    k, v = (draw(sum(lengths), D) for _ in "kv")
    found = {"q": draw(B, H * G, T, D), "k": k, "v": v, "offsets": offsets}
    bits = (bits, bits) if isinstance(bits, int) else bits
    if bits is not None and sum(lengths):
        if channels:
            found["k"] = stretch(found["k"], generator)
        for name, each in zip("kv", bits, strict=True):
            run = quantize_turned if turned and each < 8 else quantize
            found[name] = run(found[name], bits=each, offsets=offsets if channels and name == "k" else None)
    if bias is not None:
        found["bias"] = (torch.rand(sum(lengths), generator=generator, dtype=torch.float64) * 6 - 3).to(bias)
    if R:
        ends = torch.randint(0, R + 1, (B,), generator=generator, dtype=torch.int32)
        tails = [torch.full((B, H, R + 3, D), math.nan, dtype=dtype) for _ in "kv"]
        for x in tails:
            for b, end in enumerate(ends.tolist()):
                x[b, :, :end] = draw(H, end, D)
        found["tail"] = (*(x[:, :, :R] for x in tails), ends)
    return {name: move(x, device) for name, x in found.items()}


def stretch(k: Tensor, generator: torch.Generator) -> Tensor:
    """Rows whose channels differ in size by up to 16 times, and are as far from 0."""
    size, center = (torch.rand(k.shape[1], generator=generator) * 4 - 2 for _ in range(2))
    return (k.float() * size.exp2() + center * size.exp2()).to(k.dtype)


def move(x, device):
    if isinstance(x, Quantized):
        channels = None if x.channels is None else Channels(*(t.to(device) for t in vars(x.channels).values()))
        return Quantized(*(t.to(device) for t in (x.codes, x.scale, x.zero)), x.bits, x.group, channels, x.turned)
    return tuple(part.to(device) for part in x) if isinstance(x, tuple) else x.to(device)


def turning(width: int) -> Tensor:
    """The matrix that turns rows, in float64, by Sylvester's construction."""
    matrix, two = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while width % (2 * len(matrix)) == 0:
        matrix = torch.kron(matrix, two)
    return torch.block_diag(*[matrix / len(matrix) ** 0.5] * (width // len(matrix))).to(DEVICE)


def widen(x, offsets):
    """The same values in float64; quantized rows stand for their value in exact arithmetic."""
    if isinstance(x, Quantized):
        places = range(8 - x.bits, -1, -x.bits)
        codes = torch.stack([x.codes >> place & 2**x.bits - 1 for place in places], dim=2).flatten(1)
        steps = codes.double().unflatten(1, (-1, x.group))
        rest = (steps * x.scale.double()[..., None] + x.zero.double()[..., None]).flatten(1)
        rest = rest @ turning(x.width) if x.turned else rest
        if x.channels is None:
            return rest
        spread, center = (
            t.double().repeat_interleave(offsets.diff(), 0) for t in (x.channels.spread, x.channels.center)
        )
        return rest * spread + center
    if isinstance(x, tuple):
        return tuple(widen(part, offsets) for part in x)
    return x.double() if x.is_floating_point() else x


def split(inputs: dict) -> tuple[tuple, dict]:
    rest = dict(inputs)
    return tuple(rest.pop(name) for name in ("q", "k", "v", "offsets")), rest


def check_kernel(inputs: dict, schedule: DecodeSchedule | None = None, **options) -> None:
    """The kernel's output and log-sum-exp obey the accuracy rule."""
    head, rest = split(inputs)
    got = decode_triton(*head, schedule=schedule, **rest, **options)
    plain = decode_reference(*head, **rest, **options)
    head, rest = split({name: widen(x, inputs["offsets"]) for name, x in inputs.items()})
    exact = decode_reference(*head, **rest, **options)
    assert_as_accurate(got[0], exact[0], plain[0])
    lse = plain[1]
    if isinstance(inputs["k"], Quantized):
        # The kernel takes zero and step out of a logit's sum: step * (q . code) + zero * sum(q). Two roundings of the
        # larger of these two numbers show in the log-sum-exp of a row that sees one key.
        lse = exact[1] + (plain[1] - exact[1]).abs() + lse_rounding(inputs, **options)
    assert_as_accurate(got[1], exact[1], lse)


def lse_rounding(inputs: dict, *, scale: float, **_) -> float:
    k, q = inputs["k"], inputs["q"].float()
    largest = torch.zeros(())
    if k.channels is not None:  # q . center is added last, in one more rounding
        group = q.shape[1] // len(k.channels.center)
        center, spread = (x.repeat_interleave(group, 0)[:, None] for x in (k.channels.center, k.channels.spread))
        largest = (q * center).sum(-1).abs().amax().cpu()
        q = q * spread
    rounded = 0.0
    if k.turned:
        q = (q.double() @ turning(q.shape[-1])).float()
        if inputs["q"].dtype != torch.float32:  # a turned query has more digits than float16, tensor cores' operand
            apart = (q.half().float() - q).abs()
            most = k.zero.float().abs() + (2**k.bits - 1) * k.scale.float()
            rounded = scale * (apart.sum(-1).amax() * most.amax()).item()
    half = 2 ** (k.bits - 1) * k.scale.float()
    larger = (k.zero.float() + half).abs().amax()
    if inputs["q"].dtype != torch.float32:  # tensor cores multiply codes that no half was taken from: sums begin at it
        larger += half.amax()
    sums = q.unflatten(-1, (-1, k.group)).sum(-1).abs()
    largest += (sums.amax() * larger * k.zero.shape[1]).cpu()
    return float(2 * torch.finfo(torch.float32).eps * scale * largest) + rounded


def one_row(inputs, b, head, t, scale, softcap, window) -> tuple[Tensor, Tensor]:
    """Attention of one query row, from the definition: a list of visible rows, one softmax."""
    heads = len(inputs["offsets"]) - 1
    h = head // (inputs["q"].shape[1] // heads)
    start, stop = inputs["offsets"][h : h + 2].tolist()
    tokens = inputs["q"].shape[2]
    tail = inputs.get("tail")
    place = (1 if tail is None else int(tail[2][b])) - 1 - (tokens - 1 - t)
    bias = inputs.get("bias", torch.zeros(len(inputs["k"])))
    rows = [(inputs["k"][i], inputs["v"][i], place + stop - i, bias[i]) for i in range(start, stop)]
    if tail is not None:
        rows += [(tail[0][b, h, j], tail[1][b, h, j], place - j, torch.zeros(())) for j in range(place + 1)]
    if window is not None:
        rows = [row for row in rows if 0 <= row[2] < window]
    query = inputs["q"][b, head, t]
    if not rows:
        return torch.zeros_like(query), torch.tensor(-math.inf, dtype=torch.float64)
    logits = torch.stack([query @ k for k, *_ in rows]) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits + torch.stack([bias for *_, bias in rows])
    return torch.softmax(logits, 0) @ torch.stack([v for _, v, *_ in rows]), torch.logsumexp(logits, 0)


SHAPES = {
    "seed": st.integers(0, 2**16),
    "B": st.integers(1, 3),
    "G": st.sampled_from([1, 2, 3, 7]),
    "T": st.integers(1, 4),
    "lengths": st.lists(st.sampled_from([0, 1, 2, 15, 31, 40, 67]), min_size=1, max_size=3),
    "R": st.sampled_from([0, 1, 5, 35]),
    "softcap": st.sampled_from([None, 2.0, 50.0]),
    "window": st.sampled_from([None, None, 0, 1, 7, 33, 100]),
    "bias": st.sampled_from([None, torch.float16, torch.float32]),
}


@given(D=st.sampled_from([1, 3, 8]), **SHAPES)
def test_reference_is_the_definition(seed, B, G, T, lengths, R, softcap, window, bias, D):
    inputs = make(seed, B, len(lengths), G, T, D, lengths, R, torch.float64, device="cpu", bias=bias)
    options = {"scale": 0.7, "softcap": softcap, "window": window}
    head, rest = split(inputs)
    out, lse = decode_reference(*head, **rest, **options)
    for b in range(B):
        for query_head in range(len(lengths) * G):
            for t in range(T):
                row = one_row(inputs, b, query_head, t, *options.values())
                torch.testing.assert_close((out[b, query_head, t], lse[b, query_head, t]), row)


@settings(max_examples=8)
@given(D=st.sampled_from([16, 64, 80]), dtype=st.sampled_from(KERNEL_DTYPES), **SHAPES)
def test_kernel_is_as_accurate_as_the_reference(seed, B, G, T, lengths, R, softcap, window, bias, D, dtype):
    inputs = make(seed, B, len(lengths), G, T, D, lengths, R, dtype, bias=bias)
    check_kernel(inputs, scale=D**-0.5, softcap=softcap, window=window)


@settings(max_examples=8)
@given(
    D=st.sampled_from([32, 64, 80]),
    dtype=st.sampled_from(KERNEL_DTYPES),
    bits=st.sampled_from([8, 4, 2, (8, 4), (4, 8), (4, 2), (8, 2)]),
    channels=st.booleans(),
    turned=st.booleans(),
    **SHAPES,
)
def test_kernel_reads_quantized_rows_as_accurately_as_the_reference(
    seed, B, G, T, lengths, R, softcap, window, bias, D, dtype, bits, channels, turned
):
    inputs = make(seed, B, len(lengths), G, T, D, lengths, R, dtype, bits, channels, bias=bias, turned=turned)
    check_kernel(inputs, scale=D**-0.5, softcap=softcap, window=window)


@pytest.mark.parametrize(
    ("D", "bits", "dtype", "lengths", "bias", "options"),
    [
        (64, 4, torch.bfloat16, [70, 33], None, {"softcap": 20.0, "window": 51}),
        (80, (8, 2), torch.float16, [0, 45], torch.float32, {}),
        (128, (4, 2), torch.float16, [40], None, {}),
        (32, (2, 8), torch.float16, [5], torch.float16, {"softcap": 5.0}),
        (160, (4, 2), torch.bfloat16, [40], None, {}),
    ],
)
def test_kernel_reads_codes_for_many_query_rows(D, bits, dtype, lengths, bias, options):
    for turned in (False, True):
        inputs = make(4, 9, len(lengths), 4, 1, D, lengths, 20, dtype, bits, True, bias=bias, turned=turned)
        check_kernel(inputs, scale=D**-0.5, **options)


@pytest.mark.parametrize(("part", "wide"), [("scale", ()), ("zero", ("v",)), ("scale", ("k",))])
def test_more_query_rows_than_64_and_steps_of_any_dtypes(part, wide):
    """The largest tile of codes, with a part of one, over steps and zeros that can and cannot be loaded together."""
    inputs = make(5, 17, 2, 4, 1, 64, [130, 5], 3, torch.bfloat16, 4, True, turned=True)
    for name in wide:
        inputs[name] = replace(inputs[name], **{part: getattr(inputs[name], part).float()})
    check_kernel(inputs, scale=0.125)


@pytest.mark.parametrize(("bits", "largest"), [((8, 8), 1e35), ((4, 4), 3e33), ((4, 2), 1e33)])
def test_values_near_the_largest_of_their_dtype(bits, largest):
    """Steps are up to 1e34: what is computed of one, as 2 ** 24 of it, must not be beyond float32."""
    inputs = make(7, 1, 2, 4, 1, 64, [130, 5], 0, torch.bfloat16, bits, turned=bits == (4, 2))
    v = (torch.randn(135, 64, generator=torch.Generator().manual_seed(6)) * largest / 4).bfloat16()
    run = quantize_turned if bits == (4, 2) else quantize
    inputs["v"] = move(run(v, bits=bits[1]), DEVICE)
    check_kernel(inputs, scale=0.125)


def test_many_query_rows_read_rows_of_several_groups():
    inputs = make(3, 9, 1, 4, 1, 32, [40], 5, torch.float16, 4)
    for name, bits in (("k", 4), ("v", 8)):
        rows = torch.randn(40, 32, generator=torch.Generator().manual_seed(bits)) * torch.arange(1, 33)
        inputs[name] = move(quantize(rows.half(), bits=bits, group=16), DEVICE)
    check_kernel(inputs, scale=32**-0.5)


@pytest.mark.parametrize("seed", [0, 2, 6])
@pytest.mark.parametrize("B", [1, 9])
def test_rounded_weights_of_turned_values_are_made_up_for(seed, B):
    """Few keys have most weight: what rounding takes from it, times the mean of codes, would come out in one place."""
    inputs = make(seed, B, 1, 4, 1, 128, [40], 0, torch.float16, (4, 2), bias=torch.float16, turned=True)
    check_kernel(inputs, scale=128**-0.5)


@pytest.mark.parametrize(("bits", "dtype"), [(8, torch.float16), (4, torch.float32)])
def test_kernel_reads_rows_of_two_groups(bits, dtype):
    inputs = make(3, 2, 2, 2, 2, 256, [0, 40], 5, dtype, bits, True, bias=torch.float16)
    check_kernel(inputs, scale=0.0625)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_steps_of_very_different_sizes_keep_their_accuracy(bits, dtype):
    """Rows scaled from 1e-4 to 1e4, constant rows and zero rows: weights times steps must not leave 16 bits."""
    inputs = make(1, 1, 2, 2, 1, 64, [70, 50], 0, dtype)
    sizes = torch.logspace(-4, 4, 120)[torch.randperm(120, generator=torch.Generator().manual_seed(2))]
    v = (inputs["v"].cpu().float() * sizes[:, None]).clamp(-6e4, 6e4)
    v[::9] = 3.0
    v[4::9] = 0.0
    for name, x in (("k", inputs["k"]), ("v", v.to(dtype).to(DEVICE))):
        inputs[name] = quantize(x, bits=bits)
    check_kernel(inputs, scale=0.125)


@settings(max_examples=6)
@given(
    where=st.sampled_from(["q", "k", "v", "tail k", "tail v"]),
    dtype=st.sampled_from(KERNEL_DTYPES),
    bits=st.sampled_from([None, 8, 4]),
    T=st.sampled_from([1, 3]),
    softcap=st.sampled_from([None, 2.0]),
    window=st.sampled_from([None, 1000]),
    lengths=st.lists(st.sampled_from([1, 15, 33]), min_size=1, max_size=2),
    row=st.integers(0, 99),
)
def test_a_nan_comes_out_and_stays_in_its_question(where, dtype, bits, T, softcap, window, lengths, row):
    """In the output and the log-sum-exp (values: in the output) of all rows that see it, and in none of another."""
    inputs = make(row, 2, len(lengths), 2, T, 64, lengths, 5, dtype, bits, channels=bits == 4)
    inputs["tail"] = (*(x.nan_to_num(0.5) for x in inputs["tail"][:2]), torch.full_like(inputs["tail"][2], 5))
    where = f"tail {where}" if bits is not None and where in ("k", "v") else where  # codes are numbers
    rows = inputs["tail"]["kv".index(where[-1])] if where.startswith("tail") else inputs[where]
    if where == "q":
        rows[0, 0, 0, row % 64] = math.nan
    elif where.startswith("tail"):
        rows[0, 0, row % (5 - T + 1), row % 64] = math.nan
    else:
        rows[row % lengths[0], row % 64] = math.nan
    head, rest = split(inputs)
    for run in (decode_reference, decode_triton):
        out, lse = run(*head, **rest, scale=0.1, softcap=softcap, window=window)
        broken = torch.zeros(out.shape[:3], dtype=torch.bool)
        if where == "q":
            broken[0, 0, 0] = True
        else:
            broken[: 1 if where.startswith("tail") else 2, :2] = True
        assert torch.equal(out.isnan().any(-1).cpu(), broken)
        assert torch.equal(lse.isnan().cpu(), broken & (where[-1] != "v"))
    if where[-1] == "v":
        return
    none = torch.zeros_like(out), torch.full_like(lse, -math.inf)
    for run in (merge_reference, merge_triton):
        for parts in ((out, lse, *none), (*none, out, lse)):
            merged = run(*parts)
            assert torch.equal(merged[0].isnan().any(-1).cpu(), broken) and torch.equal(merged[1].isnan().cpu(), broken)


@settings(max_examples=10)
@given(seed=st.integers(0, 99), data=st.data())
def test_ragged_equals_dense_with_the_rest_masked(seed, data):
    H, S, D = 3, 20, 16
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(H, S, D, generator=generator) for _ in "kv")
    q = torch.randn(2, H * 2, 1, D, generator=generator)
    share = data.draw(st.sampled_from([0.1, 0.5, 1.0]))
    keep = torch.rand(H, S, generator=generator) < share
    keep[:, 0] = True
    mask = keep.repeat_interleave(2, 0)[None, :, None]
    wide = (x.repeat_interleave(2, 0)[None].expand(2, -1, -1, -1).double() for x in (k, v))
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), *wide, attn_mask=mask)
    offsets = torch.tensor([0, *keep.sum(1).tolist()]).cumsum(0).int()
    head = [x.to(DEVICE) for x in (q, k[keep], v[keep], offsets)]
    got, plain = (run(*head, scale=D**-0.5)[0] for run in (decode_triton, decode_reference))
    assert_as_accurate(got, exact, plain)
    assert_as_accurate(plain, exact, plain)


@settings(max_examples=7)
@given(seed=st.integers(0, 99), cut=st.integers(0, 20))
def test_two_halves_merged_equal_the_whole(seed, cut):
    inputs = make(seed, 2, 1, 2, 3, 16, [20], 0, torch.float32)
    q, k, v, _ = split(inputs)[0]
    parts = []
    for rows in (slice(0, cut), slice(cut, 20)):
        offsets = torch.tensor([0, len(k[rows])], dtype=torch.int32, device=DEVICE)
        parts += decode_triton(q, k[rows], v[rows], offsets, scale=0.1)
    exact = decode_reference(*(widen(x, inputs["offsets"]) for x in split(inputs)[0]), scale=0.1)
    plain = decode_reference(*split(inputs)[0], scale=0.1)
    for run in (merge_triton, merge_reference):
        for got, want, base in zip(run(*parts), exact, plain, strict=True):
            assert_as_accurate(got, want, base)


@pytest.mark.parametrize("run", [merge, merge_reference, merge_triton])
def test_nothing_is_the_identity_of_merge(run):
    a = torch.randn(3, 5, 80, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    lse = torch.tensor([[-200.0, 0, 3, 90, -math.inf]] * 3, device=DEVICE)
    a[:, 4] = 0
    nothing = torch.zeros_like(a), torch.full_like(lse, -math.inf)
    for out, total in (run(a, lse, *nothing), run(*nothing, a, lse)):
        assert torch.equal(out, a)
        assert torch.equal(total, lse)


@given(
    lengths=st.lists(st.sampled_from([0, 0, 1, 127, 128, 129, 1000, 5000]), min_size=1, max_size=9),
    sms=st.integers(1, 140),
)
def test_schedule_cuts_every_head_into_equal_splits(lengths, sms):
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    cuts = decode_schedule(offsets, processors=sms).cuts
    busy = sum(n > 0 for n in lengths)
    for cut, target in zip(cuts, (8, 4, 2, 1), strict=False):
        assert len(cut.bounds) <= max(target * sms, busy)
    assert len(cuts[-1].bounds) == busy
    for cut in cuts:
        assert cut.first[-1] == len(cut.bounds)
        for h, n in enumerate(lengths):
            splits = cut.bounds[cut.first[h] : cut.first[h + 1]].tolist()
            rows = [row for _, start, stop in splits for row in range(start, stop)]
            assert rows == list(range(int(offsets[h]), int(offsets[h]) + n))
            sizes = [stop - start for _, start, stop in splits]
            assert all(head == h for head, _, _ in splits)
            tiles = [-(-size // 64) for size in sizes]
            assert all(size % 64 == 0 for size in sizes[:-1]) and max(tiles, default=0) - min(tiles, default=0) <= 1


def test_every_cut_of_a_schedule_gives_the_same_attention():
    inputs = make(3, 1, 3, 2, 1, 16, [500, 0, 150], 0, torch.float32)
    schedule = decode_schedule(inputs["offsets"], processors=1)
    assert len({len(cut.bounds) for cut in schedule.cuts}) > 1
    for cut in {len(cut.bounds): cut for cut in schedule.cuts}.values():
        check_kernel(inputs, DecodeSchedule((cut,) * 4, 10**6), scale=0.125)


def test_many_rows_take_several_programs():
    inputs = make(4, 2, 1, 4, 33, 16, [50], 40, torch.float16)  # over 128 rows of one question, 256 in all
    check_kernel(inputs, scale=0.25)
    check_kernel(inputs, scale=0.25, window=21)


def test_strided_inputs_give_the_same_and_others_raise():
    inputs = make(5, 2, 2, 2, 2, 64, [20, 30], 9, torch.float32)
    head, rest = split(inputs)
    want = decode_triton(*head, **rest, scale=0.125)
    q, k, v, offsets = head
    wide = torch.stack([k, v], dim=1)
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)
    got = decode_triton(turned, wide[:, 0], wide[:, 1], offsets, **rest, scale=0.125)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with pytest.raises(ValueError, match="contiguous last axis"):
        decode_triton(q, k.T.contiguous().T, v, offsets, **rest, scale=0.125)


def test_dispatch_follows_the_backend(monkeypatch):
    inputs = make(6, 1, 1, 1, 1, 64, [50], 0, torch.float32)
    head, _ = split(inputs)
    monkeypatch.setenv("KVZIP_BACKEND", "reference")
    plain = decode(*head, scale=0.125)
    monkeypatch.setenv("KVZIP_BACKEND", "triton")
    kernel = decode(*head, scale=0.125)
    assert torch.equal(plain[0], decode_reference(*head, scale=0.125)[0])
    assert torch.equal(kernel[0], decode_triton(*head, scale=0.125)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 3, 1, 8)}, "equal groups"),
        ({"k": torch.zeros(4, 9)}, "width D=8"),
        ({"v": torch.zeros(4, 8, dtype=torch.float16)}, "q's dtype"),
        ({"softcap": 0.0}, "softcap above 0"),
        ({"scale": 0.0}, "finite scale above 0"),
        ({"scale": -1.0}, "finite scale above 0"),
        ({"scale": math.inf}, "finite scale above 0"),
        ({"window": -1}, "window of 0 or more"),
        ({"bias": torch.zeros(3)}, "a bias of shape"),
        ({"tail": (torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 8).half(), torch.zeros(1).int())}, "tail's v"),
    ],
)
def test_what_does_not_fit_raises(change, message):
    """In the op's own words, or before it in those of the type checker that tests run with."""
    inputs = {
        "q": torch.zeros(1, 4, 1, 8),
        "k": torch.zeros(4, 8),
        "v": torch.zeros(4, 8),
        "offsets": torch.tensor([0, 2, 4], dtype=torch.int32),
        "scale": 1.0,
    }
    with pytest.raises((ValueError, TypeError), match=f"{message}|Type-check"):
        decode(**(inputs | change))


COMPILE = """
import torch
from kvzip.ops import Channels, Quantized, decode_schedule
from kvzip.ops.types import group_of
from kvzip.ops.triton import decode as module, decode_launch
module.overlaps_launches = decode_launch.overlaps_launches = lambda x: {capability} >= 90
def go(D, G, B, T, dtype, bits=16, softcap=None, window=None, tail=True, turned=False):
    offsets = torch.tensor([0, 4000, 9000], dtype=torch.int32)
    q, k = torch.empty(B, 2 * G, T, D, dtype=dtype), torch.empty(9000, D, dtype=dtype)
    v = k
    if bits != 16:
        group = group_of(D)
        steps, channels = torch.empty(9000, D // group, dtype=torch.float16), torch.empty(2, D)
        k_bits, v_bits = bits if isinstance(bits, tuple) else (bits, bits)
        codes = [torch.empty(9000, D * x // 8, dtype=torch.uint8) for x in (k_bits, v_bits)]
        k = Quantized(codes[0], steps, steps, k_bits, group, Channels(channels, channels), turned and k_bits < 8)
        v = Quantized(codes[1], steps, steps, v_bits, group, turned=turned and v_bits < 4)
    ends = (torch.empty(B, 2, 512, D, dtype=dtype),) * 2 + (torch.empty(B, dtype=torch.int32),)
    schedule = decode_schedule(offsets, processors=132)
    module.decode_triton(q, k, v, offsets, scale=1.0, softcap=softcap, window=window, schedule=schedule,
                         tail=ends if tail else None)
"""


def compiled(calls: list[str], capability: int) -> None:
    assert_fits(compile_calls(COMPILE, calls, capability=capability), capability=capability)


@pytest.mark.parametrize(("D", "capability"), [(80, 90), (128, 90), (256, 90), (128, 80)])
def test_kernels_compile_without_spills(D, capability):
    """The usual width in many forms, the others in a few; `test_the_whole_grid_compiles_without_spills` has all."""
    few, many = f"{D}, 4, 1, 1, torch.bfloat16", f"{D}, 4, 32, 1, torch.bfloat16"
    calls = [few, f"{few}, 4, turned=True", f"{many}, 8", f"{D}, 7, 1, 1, torch.float32"]
    if (D, capability) == (128, 90):
        calls += [many, f"{few}, (8, 4)", f"{few}, (4, 2), turned=True"]
        calls += [f"{few}, (8, 2), turned=True", f"{many}, 4, turned=True", f"{many}, (4, 2), turned=True"]
        calls += [f"{D}, 4, 8, 1, torch.{dtype}, (4, 2), turned=True" for dtype in ("bfloat16", "float16")]
        calls += [f"{D}, 4, 8, 1, torch.bfloat16, (4, 2), 5.0, 9, turned=True"]
    compiled(calls, capability)


def test_one_token_alone_starts_early():
    calls = [f"128, 4, {questions}, {tokens}, torch.bfloat16" for questions, tokens in ((1, 1), (2, 1), (1, 2))]
    kernels = [x for x in compile_calls(COMPILE, calls, capability=90) if x.name == "decode_kernel"]
    assert ["griddepcontrol.wait" in kernel.ptx for kernel in kernels] == [True, False, False]


@pytest.mark.parametrize("bits", [8, 4])
def test_as_many_programs_over_quantized_rows_fit_on_an_sm_as_splits_are_cut_for(bits):
    calls = [
        f"128, 4, 1, 1, torch.{dtype}, {bits}{rest}" for dtype in ("bfloat16", "float16") for rest in ("", ", 5.0, 9")
    ]
    kernels = compile_calls(COMPILE, calls, capability=90)
    assert_fits(kernels, capability=90)
    programs = launch_config(128, 4, torch.bfloat16, bits).per_sm
    found = [kernel.shared + kernel.static for kernel in kernels if kernel.name == "decode_kernel"]
    assert len(found) == 4
    assert all(size * programs <= 228 * 1024 < size * (programs + 1) for size in found)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("D", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_whole_grid_compiles_without_spills(D, capability, dtype):
    if capability == 80 and D > 128:
        pytest.skip("the sizes of D=256 are for sm_90, the only one it was tuned on")
    calls = [
        f"{D}, {G}, {B}, 1, torch.{dtype}, {bits}{rest}"
        for G, B in ((1, 1), (7, 4), (16, 4), (4, 32))
        for bits in (16, 8, 4, (8, 4), (4, 2))
        for rest in ("", ", 5.0, 9")
    ]
    calls += [
        f"{D}, {G}, {B}, 1, torch.{dtype}, {bits}, turned=True"
        for G, B in ((1, 1), (4, 32))
        for bits in (4, (4, 2), (8, 2))
    ]
    compiled(calls, capability)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("D", [64, 80, 96, 128, 160, 256])
@pytest.mark.parametrize("G", [1, 4, 7, 16])
@pytest.mark.parametrize(("B", "T"), [(1, 1), (3, 5), (32, 1)])
def test_compiled_kernel_over_the_grid(dtype, D, G, B, T):
    lengths = [1700, 0, 1, 333]
    check_kernel(make(7, B, 4, G, T, D, lengths, 0, dtype), scale=D**-0.5)
    check_kernel(make(8, B, 4, G, T, D, lengths, 300, dtype), scale=D**-0.5, softcap=20.0, window=501)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("D", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", [8, 4, 2, (8, 4), (4, 2)])
@pytest.mark.parametrize(("B", "G"), [(1, 4), (1, 7), (32, 4)])
def test_compiled_kernel_over_the_grid_of_quantized_rows(dtype, D, bits, B, G):
    check_kernel(make(9, B, 4, G, 1, D, [1700, 0, 1, 333], 300, dtype, bits, channels=G == 4), scale=D**-0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("D", [64, 80, 128, 160, 256])
@pytest.mark.parametrize("bits", [4, 2, (8, 2), (4, 2)])
@pytest.mark.parametrize(("B", "T"), [(1, 1), (1, 30), (32, 1)])
def test_compiled_kernel_over_the_grid_of_turned_rows(dtype, D, bits, B, T):
    inputs = make(9, B, 4, 4, T, D, [1700, 0, 1, 333], 300, dtype, bits, channels=True, turned=True)
    check_kernel(inputs, scale=D**-0.5)


@pytest.mark.gpu
def test_offsets_beyond_2_to_the_31():
    """The last head starts more than 2**31 elements into the cache."""
    D, far = 256, 2**31 // 256 + 1000
    q = torch.randn(1, 2, 1, D, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.zeros(far + 500, D, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    k[far:], v[far:] = torch.randn_like(k[far:]), torch.randn_like(v[far:])
    offsets = torch.tensor([0, far, far + 500], dtype=torch.int32, device="cuda")
    near = torch.tensor([0, 0, 500], dtype=torch.int32, device="cuda")
    got = decode_triton(q, k, v, offsets, scale=0.06)[0][:, 1:]
    plain = decode_reference(q, k[far:], v[far:], near, scale=0.06)[0][:, 1:]
    exact = decode_reference(q.double(), k[far:].double(), v[far:].double(), near, scale=0.06)[0][:, 1:]
    assert_as_accurate(got, exact, plain)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_decode_never_waits_for_the_device_and_replays_in_a_graph(bits):
    inputs = make(10, 4, 2, 4, 1, 128, [3000, 500], 600, torch.bfloat16, bits)
    head, rest = split(inputs)
    options = {"scale": 0.09, "schedule": decode_schedule(inputs["offsets"])}
    decode(*head, **rest, **options)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode(*head, **rest, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = decode(*head, **rest, **options)
    k, v, lengths = rest["tail"]
    k.nan_to_num_(), v.nan_to_num_()
    for length in (0, 1, 255, 256, 600):
        lengths.fill_(length)
        graph.replay()
        want = decode_triton(*head, **rest, **options)
        assert torch.equal(out, want[0]) and torch.equal(lse, want[1])


def test_interpreter_runs_where_there_is_no_gpu():
    assert interpreted() == (DEVICE == "cpu")


@settings(max_examples=10)
@given(seed=st.integers(0, 99), bits=st.sampled_from([8, 4, 2, (4, 2)]), channels=st.booleans())
def test_reference_of_quantized_rows_is_the_reference_of_their_values(seed, bits, channels):
    inputs = make(seed, 1, 2, 2, 1, 64, [20, 9], 0, torch.float32, bits, channels)
    head, _ = split(inputs)
    values = [dequantize(x, offsets=head[3]) for x in head[1:3]]
    assert torch.equal(decode_reference(*head, scale=0.1)[0], decode_reference(head[0], *values, head[3], scale=0.1)[0])
