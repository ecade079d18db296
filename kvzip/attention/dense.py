"""Attention over dense keys and values: causal, sliding-window, with softcap; by torch's fused kernels if they can."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from .. import ops
from ..models import ModelConfig
from ..ops.fused import WORTH_PLANNING, flash, has_flash, sdpa

_TOKENS_AT_ONCE = 512  # query tokens of one decode call, which bounds the memory of its logits


def causal_attention(
    q: Float[Tensor, "1 Hq T D"],
    past_k: Sequence[Float[Tensor, "1 H _ D"]],
    past_v: Sequence[Float[Tensor, "1 H _ D"]],
    k: Float[Tensor, "1 H T D"],
    v: Float[Tensor, "1 H T D"],
    config: ModelConfig,
) -> tuple[Float[Tensor, "1 Hq T D"], Float[Tensor, "1 Hq T"]]:
    """Returns attention of T new tokens to all parts of the past and causally to themselves, with its log-sum-exp.

    Past and new tokens are computed separately and merged by log-sum-exp, so no T x S mask is built. A short past is
    concatenated with the new tokens instead, for one kernel.
    """
    tokens, past = q.shape[2], sum(part.shape[2] for part in past_k)
    few = 0 < past <= 4 * tokens and tokens * past < WORTH_PLANNING
    if config.attn_softcap is None and few and has_flash(q):
        return flash(q, torch.cat([*past_k, k], dim=2), torch.cat([*past_v, v], dim=2), config.attn_scale)
    keys, values = (x[0] if len(x) == 1 else torch.cat(list(x), dim=2) for x in (past_k, past_v))
    if config.attn_softcap is not None:
        return _softcapped(q, keys, values, k, v, config)
    own = sdpa(q, k, v, scale=config.attn_scale, causal=True)
    return own if past == 0 else ops.merge(*sdpa(q, keys, values, scale=config.attn_scale), *own)


def open_attention(
    q: Float[Tensor, "1 Hq T D"], k: Float[Tensor, "1 H C D"], v: Float[Tensor, "1 H C D"], config: ModelConfig
) -> tuple[Float[Tensor, "1 Hq T D"], Float[Tensor, "1 Hq T"]]:
    """Returns attention of all T tokens to all C keys, without any mask, with its log-sum-exp."""
    if config.attn_softcap is None:
        return sdpa(q, k, v, scale=config.attn_scale)
    heads, length = k.shape[1:3]
    keys, values = (rearrange(x, "1 h s d -> (h s) d") for x in (k, v))
    offsets = torch.arange(heads + 1, dtype=torch.int32, device=q.device) * length
    how: Any = {"scale": config.attn_scale, "softcap": config.attn_softcap}
    parts = [ops.decode(rows, keys, values, offsets, **how) for rows in q.split(_TOKENS_AT_ONCE, dim=2)]
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def window_attention(
    q: Float[Tensor, "1 Hq T D"],
    k: Float[Tensor, "1 H S D"],
    v: Float[Tensor, "1 H S D"],
    window: int,
    config: ModelConfig,
) -> Float[Tensor, "1 Hq T D"]:
    """Returns attention of the last T of S tokens, each to the last `window` up to itself.

    The cost is T x window, whatever S is. Without a library kernel for windows, queries are computed in blocks, each
    against one band of keys.
    """
    if has_flash(q) and config.attn_softcap is None:
        reach = q.shape[2] + window - 1
        return flash(q, k[:, :, -reach:], v[:, :, -reach:], config.attn_scale, window)[0]
    tokens, reach = q.shape[2], window - 1
    block = min(tokens, max(window, 128))
    blocks = -(-tokens // block)
    k, v = (x[:, :, -(tokens + reach) :] for x in (k, v))
    missing = tokens + reach - k.shape[2]  # rows that the first queries would see before the first token
    padding = blocks * block - tokens
    k, v = (F.pad(x, (0, 0, missing, padding)) for x in (k, v))
    keys, values = (rearrange(x.unfold(2, block + reach, block), "1 h n d s -> n h s d") for x in (k, v))
    rows = rearrange(F.pad(q, (0, 0, 0, padding)), "1 h (n t) d -> n h t d", t=block)
    row = torch.arange(block, device=q.device)[:, None]
    column = torch.arange(block + reach, device=q.device)
    distance = row + reach - column
    first = torch.arange(blocks, device=q.device)[:, None, None, None] * block
    seen = (distance >= 0) & (distance < window) & (first + column >= missing)
    if config.attn_softcap is None:
        out = F.scaled_dot_product_attention(
            rows, keys, values, attn_mask=seen, scale=config.attn_scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    else:
        out = torch.cat([_plain(*part, config) for part in zip(rows, keys, values, seen, strict=True)])
    return rearrange(out, "n h t d -> 1 h (n t) d")[:, :, :tokens]


def _plain(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, config: ModelConfig) -> Tensor:
    """One masked block with softcap, logits held in memory in float32: [Hq T D] against [H S D] -> [1 Hq T D]."""
    group = config.num_heads // config.num_kv_heads
    cap = config.attn_softcap
    assert cap is not None
    rows = rearrange(q, "(h g) t d -> h g t d", g=group).float()
    logits = torch.einsum("hgtd,hsd->hgts", rows, k.float()) * config.attn_scale
    weights = (torch.tanh(logits / cap) * cap).masked_fill(~seen, -torch.inf).softmax(-1)
    return rearrange(torch.einsum("hgts,hsd->hgtd", weights, v.float()), "h g t d -> 1 (h g) t d").to(q.dtype)


def _softcapped(
    q: Tensor, past_k: Tensor, past_v: Tensor, k: Tensor, v: Tensor, config: ModelConfig
) -> tuple[Tensor, Tensor]:
    """`causal_attention` with a softcap, which no library kernel has: by the decode op, in blocks of queries."""
    heads, length = past_k.shape[1:3]
    keys, values = (rearrange(x, "1 h s d -> (h s) d") for x in (past_k, past_v))
    offsets = torch.arange(heads + 1, dtype=torch.int32, device=q.device) * length
    parts = []
    for first in range(0, q.shape[2], _TOKENS_AT_ONCE):
        rows = q[:, :, first : first + _TOKENS_AT_ONCE]
        seen = torch.tensor([first + rows.shape[2]], dtype=torch.int32, device=q.device)
        tail = (k[:, :, : first + rows.shape[2]], v[:, :, : first + rows.shape[2]], seen)
        parts.append(
            ops.decode(rows, keys, values, offsets, scale=config.attn_scale, softcap=config.attn_softcap, tail=tail)
        )
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)
