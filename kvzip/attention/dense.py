"""Attention over dense keys and values: causal, in a window, with a softcap; by torch's own fused kernels."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from .. import ops
from ..models import ModelConfig

_WORTH_PLANNING = 2048 * 16384  # rows x keys
ROWS_PER_BLOCK = 512  # query rows of a block where logits are held in memory
_FEW_KEYS = 64  # more than a vector register of any CPU holds; only with fewer `_with_nan` is needed


def causal_attention(
    q: Float[Tensor, "1 Hq T D"],
    past_k: Sequence[Float[Tensor, "1 H _ D"]],
    past_v: Sequence[Float[Tensor, "1 H _ D"]],
    k: Float[Tensor, "1 H T D"],
    v: Float[Tensor, "1 H T D"],
    config: ModelConfig,
) -> tuple[Float[Tensor, "1 Hq T D"], Float[Tensor, "1 Hq T"]]:
    """Returns attention of T new tokens to all parts of the past and causally to themselves, with its log-sum-exp.

    Past and self are computed apart and merged, so there is never a mask of T x S; a short past goes to one kernel with
    the new tokens.
    """
    tokens, past = q.shape[2], sum(part.shape[2] for part in past_k)
    few = 0 < past <= 4 * tokens and tokens * past < _WORTH_PLANNING
    if config.attn_softcap is None and few and _has_flash(q):
        return _flash(q, torch.cat([*past_k, k], dim=2), torch.cat([*past_v, v], dim=2), config.attn_scale)
    keys, values = (x[0] if len(x) == 1 else torch.cat(list(x), dim=2) for x in (past_k, past_v))
    if config.attn_softcap is not None:
        return _softcapped(q, keys, values, k, v, config)
    own = sdpa(q, k, v, scale=config.attn_scale, causal=True)
    return own if past == 0 else ops.merge(*sdpa(q, keys, values, scale=config.attn_scale), *own)


def window_attention(
    q: Float[Tensor, "1 Hq T D"],
    k: Float[Tensor, "1 H S D"],
    v: Float[Tensor, "1 H S D"],
    window: int,
    config: ModelConfig,
) -> Float[Tensor, "1 Hq T D"]:
    """Returns attention of the last T of S tokens, each to the last `window` up to itself.

    The cost is T x window, whatever S is. Where no library kernel has the window, queries go in blocks that see one
    band of keys each.
    """
    if _has_flash(q) and config.attn_softcap is None:
        reach = q.shape[2] + window - 1
        return _flash(q, k[:, :, -reach:], v[:, :, -reach:], config.attn_scale, window)[0]
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
    """`causal_attention` with a softcap, which no library kernel has: the decode op, in blocks of rows."""
    heads, length = past_k.shape[1:3]
    keys, values = (rearrange(x, "1 h s d -> (h s) d") for x in (past_k, past_v))
    offsets = torch.arange(heads + 1, dtype=torch.int32, device=q.device) * length
    parts = []
    for start in range(0, q.shape[2], ROWS_PER_BLOCK):
        rows = q[:, :, start : start + ROWS_PER_BLOCK]
        seen = torch.tensor([start + rows.shape[2]], dtype=torch.int32, device=q.device)
        tail = (k[:, :, : start + rows.shape[2]], v[:, :, : start + rows.shape[2]], seen)
        parts.append(
            ops.decode(rows, keys, values, offsets, scale=config.attn_scale, softcap=config.attn_softcap, tail=tail)
        )
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Torch's fused attention with its log-sum-exp [B Hq T], which the public function does not return.

    A mask [B 1 T S] of what is seen is for the CPU.

    On an H100 cuDNN's kernels reach 580 to 720 TFLOP/s where flash's reach 320 to 370, but planning for a new shape
    takes them 50 ms of the host's time.
    """
    aten = torch.ops.aten
    if _has_flash(q):
        if torch.cuda.get_device_capability(q.device)[0] >= 9 and q.shape[2] * k.shape[2] >= _WORTH_PLANNING:
            out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, scale=scale)
            return out, lse.view(q.shape[:3])
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
        return out, lse
    group, tokens = q.shape[1] // k.shape[1], q.shape[2]
    if causal:
        k, v = (repeat(x, "b h t d -> b (h g) t d", g=group) for x in (k, v))
    else:  # where no key is hidden by place the rows of a group are just rows: keys need not be repeated
        q = rearrange(q, "b (h g) t d -> b h (g t) d", g=group)
        if mask is not None:
            bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
            mask = bias.repeat(1, 1, group, 1)
    if q.is_cuda:
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
        lse = lse[..., : q.shape[2]]
    else:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
        if mask is None and k.shape[2] < _FEW_KEYS and bool((lse == 0).any()):
            out, lse = _with_nan(out, lse, q, k, causal=causal)
    if causal:
        return out, lse
    out = rearrange(out, "b h (g t) d -> b (h g) t d", t=tokens)
    return out, rearrange(lse, "b h (g t) -> b (h g) t", t=tokens)


def _with_nan(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Puts NaN back where torch lost it.

    On a CPU it gives a query with a NaN logit an output and an lse of 0 if there are fewer keys than a vector register
    holds. For attention without a mask.
    """
    logits = q @ k.mT
    lost = (lse == 0) & (logits.tril() if causal else logits).isnan().any(-1)
    return out.masked_fill(lost[..., None], torch.nan), lse.masked_fill(lost, torch.nan)


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None) -> tuple[Tensor, Tensor]:
    """Attention of the last T of S tokens, each to those up to itself or the last `window` of them, and its lse."""
    rows, keys, values = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        rows, keys, values, None, None, rows.shape[1], keys.shape[1], 0.0, False, False,
        scale=scale, window_size_left=None if window is None else window - 1, window_size_right=0,
    )  # fmt: skip
    return out.transpose(1, 2), lse


def _has_flash(x: Tensor) -> bool:
    sixteen = x.dtype in (torch.float16, torch.bfloat16)
    return x.is_cuda and sixteen and torch.cuda.get_device_capability(x.device)[0] >= 8
