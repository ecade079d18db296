"""Torch's own fused attention, with the log-sum-exp that the public function does not return."""

import torch
from einops import rearrange, repeat
from torch import Tensor

WORTH_PLANNING = 2048 * 16384  # rows x keys from which cuDNN's planning pays
_FEW_KEYS = 64  # more than a vector register of any CPU holds


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns attention of all rows of q, and its log-sum-exp [B Hq T].

    `mask` is for a CPU only: True [B 1 T S] at the keys that a row sees, or numbers [B H 1 S] added to its logits. From
    Hopper on, large inputs take cuDNN's kernels, which are faster than flash's but plan each new shape on the host:
    docs/tuning.md.
    """
    aten = torch.ops.aten
    if has_flash(q):
        if torch.cuda.get_device_capability(q.device)[0] >= 9 and q.shape[2] * k.shape[2] >= WORTH_PLANNING:
            out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, scale=scale)
            return out, lse.view(q.shape[:3])
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
        return out, lse
    group, tokens = q.shape[1] // k.shape[1], q.shape[2]
    if causal:
        k, v = (repeat(x, "b h t d -> b (h g) t d", g=group) for x in (k, v))
    else:  # all rows of a group see the same keys: they become rows of one head, and keys need not be repeated
        q = rearrange(q, "b (h g) t d -> b h (g t) d", g=group)
        if mask is not None and mask.dtype == torch.bool:
            bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
            mask = bias.repeat(1, 1, group, 1)
    if q.is_cuda:
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
        lse = lse[..., : q.shape[2]]
    else:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
        if mask is None and k.shape[2] < _FEW_KEYS and bool((lse == 0).any()):
            # With fewer keys than a vector register holds, a query with a NaN logit gets an output and an lse of 0.
            logits = q @ k.mT
            lost = (lse == 0) & (logits.tril() if causal else logits).isnan().any(-1)
            out, lse = out.masked_fill(lost[..., None], torch.nan), lse.masked_fill(lost, torch.nan)
    if causal:
        return out, lse
    out = rearrange(out, "b h (g t) d -> b (h g) t d", t=tokens)
    return out, rearrange(lse, "b h (g t) -> b (h g) t", t=tokens)


def flash(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None) -> tuple[Tensor, Tensor]:
    """Attention of the last T of S tokens, each to those up to itself or the last `window` of them, and its lse."""
    rows, keys, values = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        rows, keys, values, None, None, rows.shape[1], keys.shape[1], 0.0, False, False,
        scale=scale, window_size_left=None if window is None else window - 1, window_size_right=0,
    )  # fmt: skip
    return out.transpose(1, 2), lse


def has_flash(x: Tensor) -> bool:
    """Whether torch's flash kernels take x."""
    sixteen = x.dtype in (torch.float16, torch.bfloat16)
    return x.is_cuda and sixteen and torch.cuda.get_device_capability(x.device)[0] >= 8
