"""The alternatives that kvzip's attention is timed beside: FlashInfer, flash-2, FlexAttention, the authors' score.

Queries and caches are put into each alternative's layout (layouts.py), and FlashInfer's plans are made, before anything
is timed; results are views. What cannot be imported or built here is left out, and the output says so. Written against
FlashInfer 0.6.13, which docs/gpu_tests.md says how to install.
"""

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from benchmarks.harness import Variant
from benchmarks.layouts import (
    PAGE,
    Batch,
    Pairs,
    Table,
    by_context,
    by_question,
    layout_of,
    page_table,
    paged_pairs,
    rows_by_head,
    starts_of,
    two_levels,
)
from kvzip import ops

WORKSPACE_BYTES = 256 * 2**20  # FlashInfer recommends 128 MiB
MOST_APART = 0.02  # of the largest value: 16-bit results differ by less, rows in a wrong order by far more


def available(builders: dict[str, Callable[[], Variant]]) -> dict[str, Variant]:
    """The variants that can be built here; the others are named in the output, with the reason."""
    found = {}
    for name, build in builders.items():
        try:
            found[name] = build()
        except Exception as error:  # whatever a missing package, compiler or kernel raises
            print(f"  {name}: not timed: {_reason(error)}", flush=True)
    return found


def agreeing(variants: dict[str, Variant], expected: Tensor) -> dict[str, Variant]:
    """The variants whose first call gives what is expected; the others are named in the output and are not timed."""
    found, allowed = {}, MOST_APART * expected.float().abs().max().item()
    for name, calls in variants.items():
        try:
            result = calls[0]()
            got = result[0] if isinstance(result, tuple) else result
            apart = (got.reshape(expected.shape).float() - expected.float()).abs().max().item()
        except Exception as error:
            print(f"  {name}: not timed: {_reason(error)}", flush=True)
            continue
        if apart <= allowed:  # false for NaN
            found[name] = calls
        else:
            print(f"  {name}: not timed: {apart:.2e} off where {allowed:.2e} are allowed", flush=True)
    return found


def decode_peers(
    q: Tensor, pairs: Pairs, lengths: list[int], scale: float, *, flex: bool = False
) -> dict[str, Callable[[], Variant]]:
    """How to build the alternatives to `ops.decode` of q [B Hq T D] over one context; each gives [B H G T D].

    FlashInfer's decode wrappers for one query row, else its prefill wrappers with G B T rows a head: as decoding, each
    question would read the context again.
    """
    found: dict[str, Callable[[], Variant]] = {"flash-2 varlen": lambda: flash_varlen(q, pairs, lengths, scale)}
    if q.shape[0] * q.shape[2] == 1:
        for cores in ("CUDA cores", "tensor cores"):
            tensor = cores == "tensor cores"
            found[f"FlashInfer, {cores}"] = lambda tensor=tensor: paged_decode(q, pairs, lengths, scale, tensor=tensor)
        if flex:
            found["FlexAttention"] = lambda: flex_attention(q, pairs, lengths, scale)
    else:
        for backend in ("fa2", "fa3"):
            found[f"FlashInfer, {backend}"] = lambda backend=backend: paged_rows(q, pairs, lengths, scale, backend)
    return found


# --- one context


def flash_varlen(q: Tensor, pairs: Pairs, lengths: list[int], scale: float) -> Variant:
    """torch's flash-2 over sequences of different lengths: a head's questions and tokens are its query positions.

    The group are query heads over one KV head, because flash-2 splits keys over programs for one position only.
    """
    heads, (queries, _, tokens, _) = len(lengths), q.shape
    rows = rearrange(q, "b (h g) t d -> (h b t) g d", h=heads)
    starts, ends = starts_of([queries * tokens] * heads, q.device), starts_of(lengths, q.device)

    def run(k: Tensor, v: Tensor) -> Tensor:
        out, _ = flash(rows, k, v, starts, ends, queries * tokens, max(lengths), scale)
        return rearrange(out, "(h b t) g d -> b h g t d", h=heads, b=queries)

    return [lambda k=k, v=v: run(k, v) for k, v in pairs]


def flash(
    rows: Tensor, k: Tensor, v: Tensor, starts: Tensor, ends: Tensor, most: int, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [R G D] and log-sum-exp [R G] of sequences with rows starts[i]:starts[i+1] over keys ends[i]:ends[i+1]."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        rows, k[:, None], v[:, None], starts, ends, most, longest, 0.0, False, False, scale=scale
    )
    return out, lse.T


def paged_decode(q: Tensor, pairs: Pairs, lengths: list[int], scale: float, *, tensor: bool) -> Variant:
    """FlashInfer's decoding: a head is a request, with G query heads over one KV head."""
    import flashinfer

    heads, width = len(lengths), q.shape[3]
    table, rows = page_table(lengths, q.device), q.view(heads, -1, width)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        _workspace(q.device), "NHD", use_cuda_graph=True, use_tensor_cores=tensor,
        paged_kv_indptr_buffer=table.starts.clone(), paged_kv_indices_buffer=table.pages.clone(),
        paged_kv_last_page_len_buffer=table.last.clone(),
    )  # fmt: skip
    wrapper.plan(*table, rows.shape[1], 1, width, PAGE, q_data_type=q.dtype, kv_data_type=q.dtype, sm_scale=scale)
    out = torch.empty_like(rows)
    return [
        lambda kv=kv: wrapper.run(rows, kv, out=out).view(1, heads, -1, 1, width) for kv in paged_pairs(pairs, lengths)
    ]


def paged_rows(q: Tensor, pairs: Pairs, lengths: list[int], scale: float, backend: str) -> Variant:
    """FlashInfer's prefill without a mask: a head is a sequence whose query rows are those of all its questions."""
    heads = len(lengths)
    rows = rows_by_head(q, heads)
    starts = starts_of([len(rows) // heads] * heads, q.device)
    run = _planned(starts, page_table(lengths, q.device), q, scale, backend)
    return [lambda kv=kv: by_question(run(rows, kv)[0], q, heads) for kv in paged_pairs(pairs, lengths)]


def flex_attention(q: Tensor, pairs: Pairs, lengths: list[int], scale: float) -> Variant:
    """FlexAttention over heads padded to the longest, with a mask by head; gives [1 Hq 1 D]."""
    from torch.nn.attention import flex_attention as flex

    heads, longest = len(lengths), max(lengths)
    group = q.shape[1] // heads
    ends = torch.tensor(lengths, device=q.device)
    mask = flex.create_block_mask(lambda b, h, i, j: j < ends[h // group], 1, q.shape[1], 1, longest, device=q.device)
    compiled = torch.compile(flex.flex_attention)

    def padded(x: Tensor) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True)[None]

    ready = [(padded(k), padded(v)) for k, v in pairs]
    return [lambda k=k, v=v: compiled(q, k, v, block_mask=mask, scale=scale, enable_gqa=True) for k, v in ready]


# --- several contexts, with tails


def batch_peers(batch: Batch) -> dict[str, Callable[[], Variant]]:
    """How to build the alternatives for a `Batch`; each gives [C U H G D]."""
    return {
        "flash-2 varlen, merged": lambda: flash_batch(batch),
        "FlashInfer cascade": lambda: cascade(batch),
        "FlashInfer prefills merged, fa2": lambda: merged_prefills(batch, "fa2"),
        "FlashInfer prefills merged, fa3": lambda: merged_prefills(batch, "fa3"),
    }


def flash_batch(batch: Batch) -> Variant:
    """flash-2 over contexts and over tails, merged."""
    at = layout_of(batch)
    most = [len(at.rows) // len(lengths) for lengths in at.lengths]
    ends = [starts_of(lengths, batch.q.device) for lengths in at.lengths]

    def run(k: Tensor, v: Tensor) -> Tensor:
        read, own = (
            flash(at.rows[:, None], *pair, at.starts[i], ends[i], most[i], max(at.lengths[i]), batch.scale)
            for i, pair in enumerate([(k, v), at.tails])
        )
        return by_context(ops.merge(*read, *own)[0][:, 0], batch)

    return [lambda k=k, v=v: run(k, v) for k, v in batch.contexts]


def cascade(batch: Batch) -> Variant:
    """FlashInfer's cascade: contexts are level 0, tails level 1; a sequence is a context's head, or a question's.

    Planned as a server that replays graphs must, for any lengths of sequences (`use_cuda_graph`).
    """
    import flashinfer

    at, width = layout_of(batch), batch.q.shape[-1]
    tables, caches = two_levels(batch, at)
    columns = [list(column) for column in zip(*tables, strict=True)]
    starts, pages, last = ([x.clone() for x in column] for column in columns)
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(
        2, _workspace(batch.q.device), "NHD", use_cuda_graph=True, qo_indptr_buf_arr=[x.clone() for x in at.starts],
        paged_kv_indptr_buf_arr=starts, paged_kv_indices_buf_arr=pages, paged_kv_last_page_len_buf_arr=last,
    )  # fmt: skip
    kind = {"sm_scale": batch.scale, "q_data_type": batch.q.dtype, "kv_data_type": batch.q.dtype}
    wrapper.plan(list(at.starts), *columns, 1, 1, width, PAGE, **kind)
    rows = at.rows[:, None]
    return [lambda kv=kv: by_context(wrapper.run(rows, kv)[:, 0], batch) for kv in caches]


def merged_prefills(batch: Batch, backend: str) -> Variant:
    """What the cascade does, by FlashInfer's prefill and merge: with a backend of our choice, tiles that fit these
    lengths and no outputs filled with zeros first."""
    import flashinfer

    at = layout_of(batch)
    tables, caches = two_levels(batch, at)
    levels = [_planned(at.starts[i], tables[i], batch.q, batch.scale, backend) for i in range(2)]

    def run(kv: tuple[Tensor, Tensor]) -> Tensor:
        (out, lse), (own, own_lse) = (level(at.rows, kv) for level in levels)
        flashinfer.merge_state_in_place(out, lse, own, own_lse)
        return by_context(out, batch)

    return [lambda kv=kv: run(kv) for kv in caches]


# --- FlashInfer's pages and plans


def _planned(starts: Tensor, table: Table, q: Tensor, scale: float, backend: str) -> Callable[..., Any]:
    """FlashInfer's prefill without a mask; gives output [R 1 D] and log-sum-exp (base 2) [R 1], the same each time.

    Its plan is for these lengths. It can be captured, since nothing that it points to changes here.
    """
    import flashinfer

    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(q.device), "NHD", backend=backend)
    kind = {"sm_scale": scale, "q_data_type": q.dtype, "kv_data_type": q.dtype}
    wrapper.plan(starts, *table, 1, 1, q.shape[-1], PAGE, causal=False, **kind)
    out = torch.empty(int(starts[-1]), 1, q.shape[-1], dtype=q.dtype, device=q.device)
    lse = torch.empty(out.shape[:2], dtype=torch.float32, device=q.device)
    return lambda rows, kv: wrapper.run(rows[:, None], kv, out=out, lse=lse, return_lse=True)


def _workspace(device: torch.device) -> Tensor:
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)  # zeros, as its first use asks for


def _reason(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


# --- scores


def score_plainly(q: Tensor, k: Tensor, k_sink: Tensor, k_self: Tensor, hidden: Tensor, scale: float) -> Tensor:
    """As the authors compute it: all logits, divided, the mask added, softmax in the model's dtype, the maximum.

    Args:
        hidden: [T T], the least finite value of q's dtype where a row does not see a key of the repeat, else 0.
    """
    keys = torch.cat([k_sink, k, k_self], dim=1)
    rows = q.unflatten(0, (len(k), -1)).flatten(1, 2)  # [H G*T D]
    logits = ((rows @ keys.mT) / (1 / scale)).unflatten(1, (-1, q.shape[1]))
    logits[..., -q.shape[1] :] += hidden
    weights = torch.softmax(logits, dim=-1)
    return weights[..., k_sink.shape[1] : k_sink.shape[1] + k.shape[1]].amax(dim=(1, 2))


def score_lse(q: Tensor, k: Tensor, k_sink: Tensor, k_self: Tensor, scale: float) -> Tensor:
    keys = torch.cat([k_sink, k, k_self], dim=1).repeat_interleave(q.shape[0] // k.shape[0], dim=0)
    logits = torch.einsum("htd,hsd->hts", q.float(), keys.float()) * scale
    hidden = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).triu(1)
    logits[..., -q.shape[1] :].masked_fill_(hidden, -torch.inf)
    return logits.logsumexp(-1)
