"""The alternatives of the benchmark of ops get the same rows as kvzip, and the pages name the best that was timed."""

import inspect
import json
import sys
import types
from pathlib import Path

import pytest
import torch

from accuracy import assert_as_accurate
from kvzip import ops

sys.path.append(str(Path(__file__).parents[1]))

from benchmarks import layouts, peers
from benchmarks import ops as benchmark

GROUP, WIDTH, SCALE = 2, 16, 0.4


# --- FlashInfer as its 0.6.13 is called, in plain PyTorch


def attend(q, k, v, scale):
    """Of q [R Hq D] over k and v [S 1 D]; with the log-sum-exp in base 2."""
    logits = torch.einsum("rhd,sd->rhs", q.double(), k[:, 0].double()) * scale
    lse = logits.logsumexp(-1)
    return torch.einsum("rhs,sd->rhd", (logits - lse[..., None]).exp(), v[:, 0].double()), lse / 0.6931471805599453


class Prefill:
    def __init__(
        self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, qo_indptr_buf=None,
        paged_kv_indptr_buf=None, paged_kv_indices_buf=None, paged_kv_last_page_len_buf=None, *, backend="auto",
    ):  # fmt: skip
        assert float_workspace_buffer.dtype == torch.uint8 and not float_workspace_buffer.any() and kv_layout == "NHD"
        self.buffers = (qo_indptr_buf, paged_kv_indptr_buf, paged_kv_indices_buf, paged_kv_last_page_len_buf)
        assert use_cuda_graph is all(x is not None for x in self.buffers) and backend in ("auto", "fa2", "fa3")
        self.graph = use_cuda_graph

    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads,
        head_dim_qk, page_size, *, causal=False, sm_scale=None, q_data_type="float16", kv_data_type=None,
    ):  # fmt: skip
        given = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        assert all(x.dtype == torch.int32 for x in given) and not causal
        assert len(qo_indptr) == len(paged_kv_indptr) == len(paged_kv_last_page_len) + 1
        assert paged_kv_last_page_len.min() >= 1 and paged_kv_last_page_len.max() <= page_size
        if self.graph:
            assert [x.shape for x in given] == [x.shape for x in self.buffers]
        self.tables, self.scale = [x.tolist() for x in given], sm_scale
        self.kind = (num_qo_heads, num_kv_heads, head_dim_qk, page_size, q_data_type, kv_data_type)

    def run(self, q, paged_kv_cache, *, out=None, lse=None, return_lse=False):
        starts, first, pages, last = self.tables
        k, v = paged_kv_cache
        assert (q.shape[1], k.shape[2], q.shape[2], k.shape[1], q.dtype, k.dtype) == self.kind and len(q) == starts[-1]
        assert q.is_contiguous() and k.is_contiguous() and v.shape == k.shape
        out = torch.full_like(q, torch.nan) if out is None else out
        lse = torch.full(q.shape[:2], torch.nan) if lse is None else lse
        for i, end in enumerate(last):
            own = pages[first[i] : first[i + 1]]
            rows = (len(own) - 1) * k.shape[1] + end
            part = slice(starts[i], starts[i + 1])
            out[part], lse[part] = attend(q[part], *(x[own].flatten(0, 1)[:rows] for x in (k, v)), self.scale)
        return (out, lse) if return_lse else out


class Decode:
    def __init__(
        self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, use_tensor_cores=False,
        paged_kv_indptr_buffer=None, paged_kv_indices_buffer=None, paged_kv_last_page_len_buffer=None,
    ):  # fmt: skip
        buffers = (paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer)
        starts = torch.arange(len(paged_kv_indptr_buffer), dtype=torch.int32)
        self.inner = Prefill(float_workspace_buffer, kv_layout, use_cuda_graph, starts, *buffers)

    def plan(self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, **kind):
        assert set(kind) <= set(inspect.signature(Prefill.plan).parameters)
        starts = torch.arange(len(indptr), dtype=torch.int32)
        self.inner.plan(starts, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, **kind)

    def run(self, q, paged_kv_cache, *, out=None):
        return self.inner.run(q, paged_kv_cache, out=out)


class Cascade:
    def __init__(
        self, num_levels, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, qo_indptr_buf_arr=None,
        paged_kv_indptr_buf_arr=None, paged_kv_indices_buf_arr=None, paged_kv_last_page_len_buf_arr=None,
    ):  # fmt: skip
        arrays = (qo_indptr_buf_arr, paged_kv_indptr_buf_arr, paged_kv_indices_buf_arr, paged_kv_last_page_len_buf_arr)
        levels = zip(*arrays, strict=True)
        self.levels = [Prefill(float_workspace_buffer, kv_layout, use_cuda_graph, *level) for level in levels]
        assert len(self.levels) == num_levels

    def plan(
        self, qo_indptr_arr, paged_kv_indptr_arr, paged_kv_indices_arr, paged_kv_last_page_len, *sizes, **kind
    ):  # fmt: skip
        arrays = (qo_indptr_arr, paged_kv_indptr_arr, paged_kv_indices_arr, paged_kv_last_page_len)
        for level, given in zip(self.levels, zip(*arrays, strict=True), strict=True):
            level.plan(*given, *sizes, **kind)

    def run(self, q, paged_kv_cache):
        first, second = (level.run(q, paged_kv_cache, return_lse=True) for level in self.levels)
        merge(*second, *first)
        return second[0]


def merge(v, s, v_other, s_other):
    total = torch.logaddexp2(s, s_other)
    v.copy_(v * (s - total).exp2()[..., None] + v_other * (s_other - total).exp2()[..., None])
    s.copy_(total)


def flash(rows, k, v, starts, ends, most, longest, scale):
    bounds = list(zip(starts[:-1], starts[1:], ends[:-1], ends[1:], strict=True))
    assert most == max(b - a for a, b, _, _ in bounds) and longest == max(b - a for _, _, a, b in bounds)
    parts = [attend(rows[a:b], k[c:d, None], v[c:d, None], scale) for a, b, c, d in bounds]
    out, lse = (torch.cat(x).to(rows.dtype) for x in zip(*parts, strict=True))
    return out, lse * 0.6931471805599453


@pytest.fixture
def installed(monkeypatch):
    module = types.SimpleNamespace(
        BatchDecodeWithPagedKVCacheWrapper=Decode,
        BatchPrefillWithPagedKVCacheWrapper=Prefill,
        MultiLevelCascadeAttentionWrapper=Cascade,
        merge_state_in_place=merge,
    )
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(peers, "flash", flash)
    monkeypatch.setattr(peers, "WORKSPACE_BYTES", 64)


# --- the same answer from all


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.mark.parametrize("questions, tokens", [(1, 1), (3, 1), (2, 5)])
def test_alternatives_answer_what_decode_answers(installed, questions, tokens):
    lengths = [33, 1, 16, 40]
    q = random(questions, GROUP * 4, tokens, WIDTH)
    pairs = [(random(90, WIDTH, seed=i), random(90, WIDTH, seed=i + 5)) for i in (1, 2)]
    offsets = layouts.starts_of(lengths, q.device)
    found = peers.available(peers.decode_peers(q, pairs, lengths, SCALE))
    other = {"FlashInfer, CUDA cores", "FlashInfer, tensor cores"} if questions * tokens == 1 else None
    assert set(found) == {"flash-2 varlen"} | (other or {"FlashInfer, fa2", "FlashInfer, fa3"})
    for copy, (k, v) in enumerate(pairs):
        exact = ops.decode(q.double(), k.double(), v.double(), offsets, scale=SCALE)[0]
        plain = ops.decode(q, k, v, offsets, scale=SCALE)[0]
        for calls in found.values():
            assert_as_accurate(calls[copy]().reshape(plain.shape), exact, plain)
    assert set(peers.agreeing(found, exact)) == set()  # the first copy's answer is not the last's
    assert set(peers.agreeing(found, ops.decode(q, *pairs[0], offsets, scale=SCALE)[0])) == set(found)


def batch_of(dtype=torch.float32):
    lengths = [[33, 1, 16], [5, 40, 17]]
    tails = tuple(random(2, 4, 3, 21, WIDTH, seed=i).to(dtype) for i in (7, 8))
    pairs = [(random(112, WIDTH, seed=i).to(dtype), random(112, WIDTH, seed=i + 5).to(dtype)) for i in (1, 2)]
    return layouts.Batch(random(2, 4, GROUP * 3, WIDTH).to(dtype), pairs, lengths, tails, SCALE)


def test_alternatives_answer_what_decode_answers_for_several_contexts(installed):
    batch = batch_of()
    found = peers.available(peers.batch_peers(batch))
    assert set(found) == set(peers.batch_peers(batch)) and len(found) == 4
    for copy in range(2):
        exact = benchmark.flat_rows(batch_of(torch.float64))["kvzip"][copy]()
        plain = benchmark.flat_rows(batch)["kvzip"][copy]()
        for calls in found.values():
            assert_as_accurate(calls[copy]().reshape(plain.shape), exact, plain)


def test_what_is_missing_or_wrong_is_not_timed_and_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    assert peers.available({"FlashInfer cascade": lambda: peers.cascade(batch_of())}) == {}
    assert "FlashInfer cascade: not timed: ModuleNotFoundError" in capsys.readouterr().out
    expected = torch.linspace(-1, 1, 12).view(3, 4)
    variants = {
        "right": [lambda: (expected.view(1, 3, 2, 2) * 1.01, None)],
        "other rows": [lambda: expected.flip(0)],
        "NaN": [lambda: expected * torch.nan],
        "broken": [lambda: expected[7]],
    }
    assert set(peers.agreeing(variants, expected)) == {"right"}
    said = capsys.readouterr().out
    assert all(f"{name}: not timed" in said for name in ("other rows", "NaN", "broken"))


def test_scores_of_the_alternative_are_those_of_the_op_in_the_models_dtype():
    shapes = ((4, 9, WIDTH), (2, 12, WIDTH), (2, 3, WIDTH), (2, 9, WIDTH))

    def both(dtype):
        inputs = [random(*shape).to(dtype) for shape in shapes]
        hidden = torch.full((9, 9), torch.finfo(dtype).min, dtype=dtype).triu(1)
        return peers.score_plainly(*inputs, hidden, SCALE), ops.score(*inputs, scale=SCALE)

    assert_as_accurate(both(torch.float32)[0], both(torch.float64)[1].double(), both(torch.float32)[1])
    assert both(torch.bfloat16)[0].dtype == torch.bfloat16


# --- the table


def test_the_table_names_the_best_of_the_others_that_were_timed(tmp_path):
    figures = [
        ("a", "decode", "one", "kvzip", 60.0),
        ("a", "decode", "one", "flash-2 varlen", 61.0),
        ("a", "decode", "one", "FlashInfer, tensor cores", 65.0),
        ("a", "decode", "one", "flash-2 varlen", 80.0),  # a later line takes its place
        ("a", "decode", "int8", "kvzip", 36.0),
        ("a", "decode", "int8", "kvzip, bf16", 31.0),
        ("a", "decode", "both", "kvzip", 35.0),
        ("a", "decode", "both", "kvzip, bf16", 30.0),
        ("a", "decode", "both", "flash-2 varlen", 1500.0),
        ("a", "select", "alone", "kvzip", 266.0),
        ("a", "decode", "full", "SDPA", 183.0),
        ("b", "decode", "one", "kvzip", 55.0),  # a run without the best of the others says less
        ("b", "decode", "one", "flash-2 varlen", 81.0),
        ("b", "decode", "int8", "kvzip", 35.0),  # one with as many takes the place of the one before
        ("b", "decode", "int8", "kvzip, bf16", 30.0),
    ]
    lines = [
        {"op": op, "case": case, "variant": name, "median_us": us, "fraction_of_floor": 0.5, "commit": run, "date": run}
        for run, op, case, name, us in figures
    ]
    (tmp_path / "ops.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- ops:start -->\nold\n<!-- ops:end -->\nafter\n", encoding="utf-8")
    benchmark.render_table(tmp_path / "ops.jsonl", page)
    before, heads, _, *rows, after = [x for x in page.read_text(encoding="utf-8").splitlines() if "<!--" not in x]
    assert (before, after) == ("before", "after") and heads.endswith("| best alternative timed |")
    assert rows == [
        "| decode | one | [60.0 µs](ops.jsonl#L1) | 50% | FlashInfer, tensor cores, [65.0 µs](ops.jsonl#L3) |",
        "| decode | int8 | [35.0 µs](ops.jsonl#L14) | 50% | none; kvzip, bf16, [30.0 µs](ops.jsonl#L15) |",
        "| decode | both | [35.0 µs](ops.jsonl#L7) | 50% | flash-2 varlen, [1.50 ms](ops.jsonl#L9) |",
        "| select | alone | [266.0 µs](ops.jsonl#L10) | 50% | - |",
        "| decode | full | - | - | SDPA, [183.0 µs](ops.jsonl#L11) |",
    ]
