"""The one forward pass. The caller's `attend` gets q, k and v; nothing here knows about caches."""

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Float32, Int, Int64
from torch import Tensor

from .. import ops
from ..parallel import Share, Sum, whole_logits
from ..parallel.reduction import BESIDE_BYTES
from ..prompts import ChatTemplate
from .config import ModelConfig, RopeSpec
from .division import HEAD_UNIT
from .identity import fingerprint_of, identity_of
from .rope import cos_sin, inverse_frequencies
from .weights import LayerWeights, Weights, named_weights

_ROWS_PER_BLOCK = 8192  # of the MLP, whose activations are the widest

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""attend(layer, q [B Hq T D], k [B H T D], v [B H T D]) -> [B Hq T D]; q, k normed and rotated, q not scaled."""

Tails = Callable[[int], ops.TailTensors]
"""tails(layer) -> keys and values [B H R D] and lengths [B]: where k and v are written, behind the rows there."""


@dataclass(frozen=True, repr=False)
class Model:
    """A loaded model. `tokenizer` and `template` are None where the directory has none.

    `stop_ids` end an answer; `checkpoint` is the digest of the stored tensors (`models.checkpoint_digest`). `rope` and
    `max_length` are the arguments of `load`, kept so that a file can say how to load the model again; so are
    `quantized` (its `weights`), `quantized_head` (its `head_weights`) and `activations`. `form` is what the
    checkpoint's config says of quantized weights that its tensors do not. `identity` is a digest of the shape and the
    stored weights. `fingerprint`, which ties caches to the model, adds the RoPE, how weights and activations are
    rounded, a dash and the dtype.

    `frequencies` are the inverse frequencies of each RoPE that layers have.

    Where several ranks share a model, `share` says which part this one has, `config` has the sizes of that part, in
    which it computes, `whole` those of the model, and `add` adds up tensors over the ranks.
    """

    config: ModelConfig
    weights: Weights
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    template: ChatTemplate | None
    stop_ids: tuple[int, ...]
    checkpoint: str
    source: str
    rope: Mapping[str, Any] | None = None
    max_length: int | None = None
    quantized: str | None = None
    quantized_head: str | None = None
    activations: str | None = None
    form: str = ""
    share: Share | None = None
    whole: ModelConfig | None = None  # None: config
    add: Sum | None = None
    frequencies: Mapping[RopeSpec, Float32[Tensor, " half"]] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        """Computes the inverse frequencies of each RoPE here, as graphs of steps are captured without a first run."""
        ropes = {spec.rope for spec in self.config.layers}
        found = {rope: inverse_frequencies(rope, self.config.head_dim, self.device) for rope in ropes}
        object.__setattr__(self, "frequencies", found)

    @property
    def identity(self) -> str:
        return identity_of(self.whole or self.config, self.checkpoint)

    @property
    def fingerprint(self) -> str:
        head = self.quantized_head and f"head {self.quantized_head}"
        rounding = [x for x in (self.form, self.quantized, head, self.activations) if x]
        return fingerprint_of(self.whole or self.config, self.identity, self.dtype, rounding=rounding)

    def __repr__(self) -> str:
        count = sum(math.prod(weight.shape) for _, weight in named_weights(self.weights))
        return (
            f"Model({self.config.family}, {count:,} parameters, {len(self.config.layers)} layers, "
            f"{str(self.dtype).removeprefix('torch.')} on {self.device}, from {self.source!r}"
            + ("" if self.share is None else f", rank {self.share.rank} of {self.share.size}")
            + ")"
        )


def forward(
    model: Model,
    token_ids: Int64[Tensor, "B T"],
    positions: Int[Tensor, "*b T"],
    attend: Attend,
    *,
    tails: Tails | None = None,
) -> Float[Tensor, "B T M"]:
    """Returns the hidden states after the final norm. `attend` is called once per layer, in order.

    Args:
        positions: absolute, [T] for all questions or [B T].
        tails: the tail of a layer, to which its keys and values are appended before `attend` is called.
    """
    hidden = _run(model, token_ids, positions, attend, whole=True, tails=tails)
    return ops.rms_norm(hidden, model.weights.norm, eps=model.config.norm_eps, offset=model.config.norm_offset)


def run_attention(
    model: Model,
    token_ids: Int64[Tensor, "B T"],
    positions: Int[Tensor, "*b T"],
    attend: Attend,
    *,
    observe: Callable[[int, Tensor], None] | None = None,
) -> None:
    """Runs `forward` up to the last layer's `attend`, whose result is not used: no hidden states are returned.

    `observe(layer, hidden [B T M])` is called with the input of each layer before its `attend` is.
    """
    _run(model, token_ids, positions, attend, whole=False, observe=observe)


def logits(model: Model, hidden: Float[Tensor, "*b M"]) -> Float[Tensor, "*b V"]:
    """Returns next-token logits of hidden states that `forward` returned."""
    out = ops.linear(hidden, model.weights.unembed)
    if model.share is not None:
        unit = 1 if isinstance(model.weights.unembed, Tensor) else HEAD_UNIT
        out = whole_logits(model.share, out, model.config.vocab_size, unit=unit)
    cap = model.config.logit_softcap
    return out if cap is None else torch.tanh(out / cap) * cap


def _run(
    model: Model,
    token_ids: Tensor,
    positions: Tensor,
    attend: Attend,
    *,
    whole: bool,
    observe: Callable[[int, Tensor], None] | None = None,
    tails: Tails | None = None,
) -> Tensor:
    config, weights = model.config, model.weights
    hidden = ops.embedding(token_ids, weights.embed, model.dtype)
    if config.embed_scale != 1.0:
        hidden = hidden * torch.tensor(config.embed_scale, dtype=hidden.dtype)
    tables = {rope: cos_sin(rope, positions, own, hidden.dtype) for rope, own in model.frequencies.items()}
    for index, (spec, layer) in enumerate(zip(config.layers, weights.layers, strict=True)):
        if observe is not None:
            observe(index, hidden)
        norm = ops.Norm(layer.attn_norm, config.norm_eps, config.norm_offset)
        q, k, v = ops.project(
            hidden,
            layer.qkv,
            layer.qkv_bias,
            norm=norm,
            cos=tables[spec.rope][0],
            sin=tables[spec.rope][1],
            kv_heads=config.num_kv_heads,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            tail=None if tails is None else tails(index),
        )
        attended = attend(index, q, k, v)
        if not whole and index == len(config.layers) - 1:
            return hidden
        shape, attended = hidden.shape, rearrange(attended, "b h t d -> b t (h d)")
        hidden = _after_attention(hidden.flatten(0, 1), attended.flatten(0, 1), layer, model).view(shape)
    return hidden


def _after_attention(hidden: Tensor, attended: Tensor, layer: LayerWeights, model: Model) -> Tensor:
    """The rest of a layer, in blocks of rows.

    The product of each block is begun before the sum over ranks of the one before is waited for, so ranks have at least
    two blocks of rows whose sums take long.
    """
    rows = _ROWS_PER_BLOCK
    if model.add is not None and hidden.nbytes >= 2 * BESIDE_BYTES:
        rows = min(rows, -(-len(hidden) // 2))
    blocks = zip(hidden.split(rows), attended.split(rows), strict=True)
    sums = deque(_adding(*block, layer.o, layer.o_bias, layer.attn_post_norm, model) for block in blocks)
    outs = deque[Callable[[], Tensor]]()
    while sums:  # each is dropped with what it holds
        outs.append(_mlp(sums.popleft()(), layer, model))
    parts = [outs.popleft()() for _ in range(len(outs))]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _mlp(hidden: Tensor, layer: LayerWeights, model: Model) -> Callable[[], Tensor]:
    config = model.config
    norm = ops.Norm(layer.mlp_norm, config.norm_eps, config.norm_offset)
    gated = ops.linear(hidden, layer.gate_up, norm=norm, gate=config.activation)
    return _adding(hidden, gated, layer.down, None, layer.mlp_post_norm, model)


def _adding(
    hidden: Tensor,
    x: Tensor,
    weight: Tensor | ops.QuantizedWeight,
    bias: Tensor | None,
    post_norm: Tensor | None,
    model: Model,
) -> Callable[[], Tensor]:
    """Begins hidden + W x, with the product normed first in families that have a post-norm; returns what ends it.

    Where ranks share the model, each has some of the columns of W and of x, and the products are added up; the first
    adds the bias.
    """
    add, bias = model.add, bias if model.share is None or model.share.rank == 0 else None
    if post_norm is None:
        if add is not None:
            return add(ops.linear(x, weight, bias), hidden)
        out = ops.linear(x, weight, bias, residual=hidden)
        return lambda: out
    product = ops.linear(x, weight, bias)
    wait = None if add is None else add(product)

    def end() -> Tensor:
        out, config = product if wait is None else wait(), model.config
        return ops.rms_norm(out, post_norm, eps=config.norm_eps, offset=config.norm_offset, residual=hidden)

    return end
