"""Laws of `score`, and its kernels against the reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accuracy import assert_as_accurate
from kvzip.ops.score import score, score_reference

pytest.importorskip("triton")

from compiling import assert_fits, compile_launches

from kvzip.ops.triton.score import score_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def make(seed, H, G, T, C, A, D, dtype, weights=False, lse=False, device=DEVICE) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    found = {"q": draw(H * G, T, D), "k": draw(H, C, D), "k_sink": draw(H, A, D), "k_self": draw(H, T, D)}
    if weights:
        found |= {"row_weight": draw(H * G, T).relu(), "key_weight": draw(H * G, C).abs()}
    if lse:
        found["lse"] = torch.randn(H * G, T, generator=generator) + 2
    return {name: x.to(device) for name, x in found.items()}


def check_kernel(inputs: dict, **options) -> None:
    """The kernel obeys the accuracy rule.

    On a GPU its products of 16-bit values come from the tensor cores, whose float32 sums keep fewer bits than those
    of the reference, and a score shows the error of one logit. There plain PyTorch means the same products by torch.
    """
    exact = score_reference(**{name: x.double() for name, x in inputs.items()}, **options)
    sixteen = DEVICE == "cuda" and inputs["q"].dtype != torch.float32
    plain = (
        by_definition(**inputs, **options, product=tensor_cores) if sixteen else score_reference(**inputs, **options)
    )
    # Weights enter as logarithms and the exponential is taken of a maximum: four more roundings of an exponent.
    plain = exact + (plain - exact).abs() + 4 * torch.finfo(torch.float32).eps * exact.abs()
    assert_as_accurate(score_triton(**inputs, **options), exact, plain)


def tensor_cores(a, b):
    return torch.mm(a, b.contiguous(), out_dtype=torch.float32)


def by_definition(
    q, k, k_sink, k_self, *, scale, softcap=None, lse=None, row_weight=None, key_weight=None, softmax=True,
    product=torch.mm,
):  # fmt: skip
    """The authors' way: one softmax over all the keys of a row, whole."""
    H, C, _ = k.shape
    G, T = q.shape[0] // H, q.shape[1]
    dtype = q.dtype if product is torch.mm else torch.float32
    out = torch.full((H, C), 0.0 if softmax else -math.inf, dtype=dtype, device=q.device)
    for head in range(H * G):
        h = head // G
        logits = scale * product(q[head], torch.cat([k_sink[h], k[h], k_self[h]]).T)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if not softmax:
            out[h] = torch.maximum(out[h], logits[:, k_sink.shape[1] : k_sink.shape[1] + C].amax(0))
            continue
        seen = torch.ones(T, T, device=q.device).tril().bool()
        logits[:, -T:] = torch.where(seen, logits[:, -T:], -math.inf)
        total = logits.logsumexp(1) if lse is None else lse[head]
        weight = torch.exp(logits - total[:, None])[:, k_sink.shape[1] : k_sink.shape[1] + C]
        if row_weight is not None:
            weight = weight * row_weight[head, :, None] * key_weight[head, None]
        out[h] = torch.maximum(out[h], weight.amax(0))
    return out


SHAPES = {
    "seed": st.integers(0, 2**16),
    "H": st.integers(1, 2),
    "G": st.sampled_from([1, 2, 3]),
    "T": st.sampled_from([1, 2, 17, 40]),
    "C": st.sampled_from([1, 31, 64, 70]),
    "A": st.sampled_from([0, 1, 35]),
    "softcap": st.sampled_from([None, 3.0]),
    "weights": st.booleans(),
}


@given(**SHAPES)
def test_reference_is_the_definition(seed, H, G, T, C, A, softcap, weights):
    inputs = make(seed, H, G, T, C, A, 8, torch.float64, weights, device="cpu")
    want = by_definition(**inputs, scale=0.5, softcap=softcap)
    torch.testing.assert_close(score_reference(**inputs, scale=0.5, softcap=softcap), want)


@settings(max_examples=12)
@given(D=st.sampled_from([16, 80]), dtype=st.sampled_from(KERNEL_DTYPES), lse=st.booleans(), **SHAPES)
def test_kernel_is_as_accurate_as_the_reference(seed, H, G, T, C, A, softcap, weights, D, dtype, lse):
    check_kernel(make(seed, H, G, T, C, A, D, dtype, weights, lse), scale=D**-0.5, softcap=softcap)


@settings(max_examples=12)
@given(D=st.sampled_from([16, 80]), dtype=st.sampled_from(KERNEL_DTYPES), sign=st.sampled_from([-1, 1]), **SHAPES)
def test_without_the_softmax_the_largest_logit_is_the_score(seed, H, G, T, C, A, softcap, weights, D, dtype, sign):
    inputs = make(seed, H, G, T, C, A, D, dtype)
    inputs["k"] = sign * inputs["k"].abs()
    inputs["q"] = inputs["q"].abs()  # so that all logits have the sign of the keys
    options = {"scale": D**-0.5, "softcap": softcap, "softmax": False}
    exact = {name: x.double().cpu() for name, x in inputs.items()}
    torch.testing.assert_close(score_reference(**exact, **options), by_definition(**exact, **options))
    check_kernel(inputs, **options)
    unread = {"k_sink": torch.full_like(inputs["k_sink"], math.nan), "k_self": inputs["k_self"] * math.nan}
    assert torch.equal(score(**inputs | unread, **options), score(**inputs, **options))
    if weights:
        with pytest.raises(ValueError, match="neither lse nor weights with softmax=False"):
            score(**make(seed, H, G, T, C, A, D, dtype, weights), **options)


def test_the_log_sum_exp_of_the_same_keys_changes_nothing():
    inputs = make(0, 2, 2, 40, 50, 3, 64, torch.float32)
    keys = torch.cat([inputs["k_sink"], inputs["k"], inputs["k_self"]], dim=1).double()
    logits = inputs["q"].double() @ keys.repeat_interleave(2, 0).mT * 0.125
    later = torch.ones(40, 40, device=DEVICE).triu(1).bool()
    logits[..., -40:] = logits[..., -40:].masked_fill(later, -math.inf)
    given = score_triton(**inputs, scale=0.125, lse=logits.logsumexp(-1).float())
    plain = score_reference(**inputs, scale=0.125)
    assert_as_accurate(given, by_definition(**{n: x.double().cpu() for n, x in inputs.items()}, scale=0.125), plain)


@given(
    where=st.sampled_from(["q", "k", "k_sink", "k_self", "lse", "lse", "row_weight", "key_weight"]),
    value=st.sampled_from([math.nan, math.inf]),
    dtype=st.sampled_from(KERNEL_DTYPES),
    softcap=st.sampled_from([None, 3.0]),
    softmax=st.booleans(),
    T=st.sampled_from([1, 9]),
    row=st.integers(0, 99),
)
def test_a_nan_reaches_the_scores_of_its_head_and_no_other(where, value, dtype, softcap, softmax, T, row):
    """All of a head's where a row sees it, and a key's own; an infinite log-sum-exp is flash attention's for NaN."""
    weights, lse = where.endswith("weight"), where == "lse"
    inputs = make(1, 2, 2, T, 20, 2, 64, dtype, weights=weights, lse=lse)
    if not softmax and (weights or lse):
        return
    value = value if lse else math.nan
    flat = inputs[where][0].view(-1, inputs[where].shape[-1] if inputs[where].ndim == 3 else 1)
    at = T - 1 if where == "q" else row % (1 if where == "k_self" else len(flat))  # every later row sees the first
    flat[at, row % flat.shape[1]] = value
    for run in (score_reference, score_triton):
        found = run(**inputs, scale=0.1, softcap=softcap, softmax=softmax).isnan()
        assert not found[1].any()
        if where == "key_weight" or (where == "k" and not softmax):
            assert found[0].nonzero().tolist() == [[at]]
        else:
            assert found[0].all() == (softmax or where == "q")


def test_views_of_a_cache_give_the_same():
    inputs = make(2, 2, 2, 9, 20, 3, 64, torch.float32)
    want = score_triton(**inputs, scale=0.1)
    cache = torch.cat([inputs["k_sink"], inputs["k"], torch.full_like(inputs["k"], math.nan)], dim=1)
    turned = inputs["q"].transpose(0, 1).contiguous().transpose(0, 1)
    views = inputs | {"q": turned, "k_sink": cache[:, :3], "k": cache[:, 3:23]}
    assert torch.equal(score_triton(**views, scale=0.1), want)
    with pytest.raises(ValueError, match="contiguous last axis"):
        score_triton(**inputs | {"k": inputs["k"].mT.contiguous().mT}, scale=0.1)


def test_empty_shapes_score_nothing():
    assert score_triton(**make(3, 2, 2, 4, 0, 3, 64, torch.float32), scale=1.0).shape == (2, 0)
    rowless = make(3, 2, 2, 0, 5, 3, 64, torch.float32)
    for run in (score_reference, score_triton):
        assert torch.equal(run(**rowless, scale=1.0).cpu(), torch.zeros(2, 5))
        assert torch.equal(run(**rowless, scale=1.0, softmax=False).cpu(), torch.full((2, 5), -math.inf))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(3, 4, 8)}, "equal groups"),
        ({"k_self": torch.zeros(2, 5, 8)}, "k_self of shape"),
        ({"k_sink": torch.zeros(2, 1, 8, dtype=torch.float16)}, "k_sink of torch.float32"),
        ({"lse": torch.zeros(4, 5)}, "lse of shape"),
        ({"key_weight": torch.zeros(2, 6)}, "key_weight of shape"),
        ({"softcap": -1.0}, "softcap above 0"),
        ({"scale": -1.0}, "finite scale above 0"),
    ],
)
def test_what_does_not_fit_raises(change, message):
    """In the op's own words, or before it in those of the type checker that tests run with."""
    inputs = make(4, 2, 2, 4, 6, 1, 8, torch.float32, device="cpu")
    with pytest.raises((ValueError, TypeError), match=f"{message}|Type-check"):
        score(**inputs | {"scale": 1.0} | change)


COMPILE = """
import torch
from kvzip.ops.triton.score import score_triton
def go(D, dtype, G=4, softcap=None, weights=False, softmax=True):
    q, k = torch.empty(2 * G, 256, D, dtype=dtype), torch.empty(2, 256, D, dtype=dtype)
    weights = {"row_weight": torch.empty(2 * G, 256), "key_weight": torch.empty(2 * G, 256)} if weights else {}
    score_triton(q, k, k[:, :16], k, scale=1.0, softcap=softcap, **weights, softmax=softmax)
"""


@pytest.mark.parametrize(
    ("D", "capability"),
    [
        pytest.param(64, 90, marks=pytest.mark.slow),  # launched as 128
        (80, 90),
        pytest.param(96, 90, marks=pytest.mark.slow),  # launched as 80
        (128, 90),
        (256, 90),
        (128, 80),
    ],
)
def test_kernels_compile_without_spills(D, capability):
    calls = [f"{D}, torch.bfloat16", f"{D}, torch.float16, 7, 5.0, True", f"{D}, torch.bfloat16, softmax=False"]
    calls.append(f"{D}, torch.float32")
    source = COMPILE + "\n".join(f"go({call})" for call in calls)
    assert_fits(compile_launches(source, capability=capability), capability=capability)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("D", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("G", [1, 4, 7, 16])
def test_compiled_kernel_over_the_grid(dtype, D, G):
    check_kernel(make(5, 2, G, 333, 500, 17, D, dtype), scale=D**-0.5)
    check_kernel(make(6, 2, G, 130, 257, 0, D, dtype, weights=True), scale=D**-0.5, softcap=30.0)
    check_kernel(make(7, 2, G, 333, 129, 0, D, dtype, lse=True), scale=D**-0.5)
    check_kernel(make(8, 2, G, 333, 129, 0, D, dtype), scale=D**-0.5, softmax=False)


@pytest.mark.gpu
def test_offsets_beyond_2_to_the_31():
    """The chunk of the last head starts more than 2**31 elements into a cache of all tokens."""
    H, D, far = 3, 256, 2**30 // 256 + 5000
    inputs = make(8, H, 1, 50, 70, 3, D, torch.bfloat16)
    cache = torch.zeros(H, far + 70, D, dtype=torch.bfloat16, device="cuda")
    cache[:, far:] = inputs["k"]
    assert torch.equal(score_triton(**inputs | {"k": cache[:, far:]}, scale=0.06), score_triton(**inputs, scale=0.06))


@pytest.mark.gpu
def test_score_never_waits_for_the_device():
    inputs = make(9, 2, 4, 100, 300, 5, 128, torch.bfloat16)
    want = score(**inputs, scale=0.09)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = score(**inputs, scale=0.09)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, want)
