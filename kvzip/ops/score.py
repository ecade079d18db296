"""The importance of each cached pair: the largest attention it receives. Contract and reference."""

import torch
from jaxtyping import Float
from torch import Tensor

from kvzip.ops.backend import use_triton
from kvzip.ops.decode import check_logits


def score(
    q: Float[Tensor, "Hq T D"],
    k: Float[Tensor, "H C D"],
    k_sink: Float[Tensor, "H A D"],
    k_self: Float[Tensor, "H T D"],
    *,
    scale: float,
    softcap: float | None = None,
    lse: Float[Tensor, "Hq T"] | None = None,
    row_weight: Float[Tensor, "Hq T"] | None = None,
    key_weight: Float[Tensor, "Hq C"] | None = None,
    softmax: bool = True,
) -> Float[Tensor, "H C"]:
    """Returns, for each key of the chunk, the largest attention weight that any query row of its KV head gives it.

        weight[r, i] = softmax over [prefix, k, k_self up to r] of scale * q_r.k    at key i of k
        score[h, i]  = max over the rows r of head h's query heads of weight[r, i] * row_weight[r] * key_weight[r, i]

    with softcap * tanh(. / softcap) around the logits when a softcap is given. Float32, or float64 for float64 inputs.

    Args:
        k: keys of the chunk that the queries repeat.
        k_sink: keys of the prefix, which every row sees too; A may be 0.
        k_self: keys of the T repeated tokens themselves, seen causally.
        lse: natural log-sum-exp by which each row's weights are normalized. With it one pass over k is enough, and
            k_sink and k_self are not read; None computes it over [prefix, k, causal k_self].
            Infinity counts as NaN: flash attention writes it for a row with NaN.
        row_weight, key_weight: non-negative factors of KVzip+.
        softmax: False returns the largest logit itself, softcapped, which may be negative: one pass over the chunk that
            reads neither k_sink nor k_self.

    Raises: ValueError if shapes, dtypes or devices do not fit together, for a scale that is not above 0, or for weights
        or lse without the softmax.
    Source: KVzip, arXiv 2505.23416, section 3, and its appendix C.3 for scores without the softmax; the weights are
    those of KVzap, arXiv 2601.07891, equation 3. The authors take the softmax in the model's dtype, we in float32.
    """
    _check(q, k, k_sink, k_self, scale, softcap, lse, row_weight, key_weight)
    if not softmax and not (lse is row_weight is key_weight is None):
        raise ValueError("expected neither lse nor weights with softmax=False, got some: they belong to the softmax")
    if use_triton(q):
        from kvzip.ops.triton.score import score_triton as run
    else:
        run = score_reference
    weights = {"row_weight": row_weight, "key_weight": key_weight}
    return run(q, k, k_sink, k_self, scale=scale, softcap=softcap, lse=lse, **weights, softmax=softmax)


def score_reference(
    q: Float[Tensor, "Hq T D"],
    k: Float[Tensor, "H C D"],
    k_sink: Float[Tensor, "H A D"],
    k_self: Float[Tensor, "H T D"],
    *,
    scale: float,
    softcap: float | None = None,
    lse: Float[Tensor, "Hq T"] | None = None,
    row_weight: Float[Tensor, "Hq T"] | None = None,
    key_weight: Float[Tensor, "Hq C"] | None = None,
    softmax: bool = True,
) -> Float[Tensor, "H C"]:
    """Plain PyTorch `score`, a query head at a time."""
    heads, group = k.shape[0], q.shape[0] // k.shape[0]
    rows, chunk = q.shape[1], k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    future = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu(1)
    best = torch.full((heads, chunk), 0.0 if softmax else -torch.inf, dtype=dtype, device=q.device)
    if rows == 0:
        return best

    def logits(x: Tensor, keys: Tensor) -> Tensor:
        scaled = x.to(dtype) @ keys.to(dtype).T * scale
        return scaled if softcap is None else softcap * torch.tanh(scaled / softcap)

    for head in range(heads * group):
        h = head // group
        to_chunk = logits(q[head], k[h])  # [T C]
        if not softmax:
            best[h] = torch.maximum(best[h], to_chunk.amax(dim=0))
            continue
        if lse is None:
            to_self = logits(q[head], k_self[h]).masked_fill_(future, -torch.inf)
            parts = [to_chunk, to_self, logits(q[head], k_sink[h])]
            total = torch.stack([part.logsumexp(dim=1) for part in parts]).logsumexp(dim=0)
        else:
            total = lse[head].to(dtype).masked_fill(lse[head] == torch.inf, torch.nan)
        if row_weight is not None:
            total = total - row_weight[head].to(dtype).log()
        highest = (to_chunk - total[:, None]).amax(dim=0).exp()  # exp is monotonic: it may follow the maximum
        if key_weight is not None:
            highest = highest * key_weight[head].to(dtype)
        best[h] = torch.maximum(best[h], highest)
    return best


def _check(
    q: Tensor,
    k: Tensor,
    k_sink: Tensor,
    k_self: Tensor,
    scale: float,
    softcap: float | None,
    lse: Tensor | None,
    row_weight: Tensor | None,
    key_weight: Tensor | None,
) -> None:
    query_heads, rows, width = q.shape
    heads, chunk, _ = k.shape
    if heads < 1 or query_heads % heads:
        raise ValueError(f"expected query heads in equal groups over H={heads} KV heads, got {query_heads} query heads")
    keys = (("k", k, chunk), ("k_sink", k_sink, k_sink.shape[1]), ("k_self", k_self, rows))
    for name, x, length in keys:
        if x.shape != (heads, length, width):
            raise ValueError(
                f"expected {name} of shape [H={heads}, {length}, D={width}], got {list(x.shape)}: it must fit q and k"
            )
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"expected {name} of {q.dtype} on {q.device} like q, got {x.dtype} on {x.device}")
    check_logits(scale, softcap)
    per_row = (("lse", lse, rows), ("row_weight", row_weight, rows), ("key_weight", key_weight, chunk))
    for name, x, length in per_row:
        if x is not None and (x.shape != (query_heads, length) or x.device != q.device):
            raise ValueError(
                f"expected {name} of shape [Hq={query_heads}, {length}] on {q.device}, "
                f"got {list(x.shape)} on {x.device}: it has one value per row or key of each query head"
            )
