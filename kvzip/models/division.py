"""How a model is divided among ranks: which sizes each has, and which part of each stored tensor it reads.

q, k, v, gate, up and the head are divided by rows, o and down by columns; embedding and norms are whole everywhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import lcm
from typing import Any

import torch
from torch import Tensor

from ..ops import QuantizedWeight
from ..ops.weights import BLOCK, GROUP, outputs
from ..parallel import Share, share_of
from ..parallel.reduction import head_rows
from .config import ModelConfig
from .schemes import Scheme
from .weights import HEAD, LINEAR

COLUMNS = ("o", "down")
"""Fields of LayerWeights that are divided by columns; other matrices are by rows."""

HEAD_UNIT = 128  # a quantized head is divided in multiples of so many rows


@dataclass(frozen=True)
class Part:
    """The part start:stop of `of` rows (axis 0) or columns (axis 1) of a matrix."""

    axis: int
    start: int
    stop: int
    of: int


def divided(config: ModelConfig, share: Share | None) -> ModelConfig:
    """Returns the sizes of a rank's part, in which the forward pass computes."""
    if share is None:
        return config
    return replace(
        config,
        num_heads=config.num_heads // share.size,
        num_kv_heads=max(1, config.num_kv_heads // share.size),
        intermediate_size=config.intermediate_size // share.size,
    )


def share_in(config: ModelConfig, group: Any) -> Share | None:
    """Returns this process's share of a model; None for a group of one or none.

    Raises: as `parallel.share_of`.
    """
    if group is None:
        return None
    sizes = f"{config.num_heads} heads, {config.num_kv_heads} KV heads, {config.intermediate_size} of the MLP"
    share = share_of(group, heads=config.num_kv_heads, fits=lambda ranks: _divides(config, ranks), reason=sizes)
    return share if share.size > 1 else None


def _divides(config: ModelConfig, ranks: int) -> bool:
    shared = config.num_kv_heads % ranks == 0 or ranks % config.num_kv_heads == 0
    return shared and config.num_heads % ranks == 0 and config.intermediate_size % ranks == 0


def parts_of(
    config: ModelConfig, layer_names: Mapping[str, tuple[str, ...]], share: Share, *, unit: int
) -> dict[str, Part]:
    """Returns the part that a rank reads of each stored weight that is divided, by its name.

    Args:
        unit: the head's rows are divided in multiples of it.
    """

    def part(axis: int, of: int, pieces: int) -> Part:
        size, index = of // pieces, share.rank * pieces // share.size
        return Part(axis, index * size, (index + 1) * size, of)

    q, inner = config.num_heads * config.head_dim, config.intermediate_size
    kv = part(0, config.num_kv_heads * config.head_dim, min(share.size, config.num_kv_heads))
    rows = part(0, q, share.size)
    of_fields = {
        "qkv": (rows, kv, kv),
        "qkv_bias": (rows, kv, kv),
        "gate_up": (part(0, inner, share.size),) * 2,
        "o": (part(1, q, share.size),),
        "down": (part(1, inner, share.size),),
    }
    head = head_rows(share, config.vocab_size, unit=unit)
    found = {HEAD: Part(0, head.start, head.stop, config.vocab_size)}
    for index in range(len(config.layers)):
        for field, names in layer_names.items():
            found |= {f"layers.{index}.{x}": y for x, y in zip(names, of_fields.get(field, ()), strict=False)}
    return found


def own_head(embed: Tensor | QuantizedWeight, share: Share) -> Tensor | QuantizedWeight:
    """Returns the rows of a tied head whose logits a rank computes, in the embedding's memory."""
    if isinstance(embed, Tensor):
        return embed[head_rows(share, embed.shape[0])]
    return outputs(embed, head_rows(share, embed.shape[0], unit=HEAD_UNIT))


def check_units(
    config: ModelConfig,
    layer_names: Mapping[str, tuple[str, ...]],
    share: Share,
    *,
    schemes: Mapping[str, Scheme],
    kind: str | None,
) -> None:
    """Raises ValueError unless parts of quantized weights end where groups of inputs and blocks of outputs end.

    The message names the numbers of ranks that work.
    """
    if HEAD in schemes and HEAD_UNIT % lcm(*_unit(schemes[HEAD], columns=False)):
        raise ValueError(
            f"expected a head whose scales are shared by a divisor of {HEAD_UNIT} rows, got {schemes[HEAD].rows}: "
            "ranks cannot divide it, take another checkpoint"
        )
    units: dict[str, set[tuple[int, int]]] = {field: set() for field in LINEAR}
    for field in LINEAR:
        if kind == "int4" and field in COLUMNS:
            units[field].add((GROUP, BLOCK))
        names = [f"layers.{index}.{name}" for index in range(len(config.layers)) for name in layer_names[field]]
        units[field] |= {_unit(schemes[name], columns=field in COLUMNS) for name in names if name in schemes}
    q, kv, inner = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim, config.intermediate_size

    def fits(ranks: int) -> bool:
        groups = (kv, min(ranks, config.num_kv_heads))
        pieces = {"qkv": ((q, ranks), groups), "gate_up": ((inner, ranks),)}
        pieces |= {"o": ((q, ranks),), "down": ((inner, ranks),)}
        ends = [(*unit, size, n) for field in LINEAR for unit in units[field] for size, n in pieces[field]]
        return _divides(config, ranks) and all(_ends_well(*end) for end in ends)

    if not fits(share.size):
        works = [str(n) for n in range(1, config.num_heads + 1) if fits(n)]
        told = [f"{field} every {max(unit)}" for field in LINEAR for unit in sorted(units[field]) if max(unit) > 1]
        raise ValueError(
            f"expected ranks whose parts end where groups of quantized weights do ({', '.join(told)}), got "
            f"{share.size}: use {' or '.join(works)}"
        )


def _ends_well(group: int, each: int, size: int, pieces: int) -> bool:
    """Whether parts end where a group does, unless it is the whole, which all share, and where a word of codes does."""
    part = size // pieces
    return pieces == 1 or ((group >= size or part % group == 0) and part % each == 0)


def _unit(scheme: Scheme, *, columns: bool) -> tuple[int, int]:
    """Rows or columns that share a scale, and those whose codes or zeros are in one word."""
    word = 1 if scheme.layout == "plain" else 8 if scheme.kind == "int4" else 4
    if columns:
        return scheme.group or 1, 1 if scheme.layout == "awq" else word
    packed = {"awq": True, "gptq": True, "packed": scheme.zeros}.get(scheme.layout, False)  # zeros, and codes of AWQ
    return scheme.rows, word if packed else 1


def own_index(shape: tuple[int, ...], layout: str, suffix: str, part: Part, scheme: Scheme) -> tuple[slice, ...]:
    """Returns the index of a rank's part in a stored tensor of a quantized layer: codes, scales, zeros, order.

    A tensor whose axis has one entry for several rows or columns is divided accordingly; one entry for all is whole.
    """
    turned = layout in ("awq", "gptq")  # stored [in, out]
    if suffix == "g_idx" or suffix == "weight_g_idx":
        axis = 0 if part.axis == 1 else None
    elif suffix in ("input_scale", "activation_scale", "input_zero_point", "input_scale_ub", "weight_shape"):
        axis = None
    else:
        axis = 1 - part.axis if turned else part.axis
    index = [slice(None)] * len(shape)
    if axis is None or axis >= len(shape) or shape[axis] == 1:
        return tuple(index)
    each = 8 if scheme.kind == "int4" else 4
    for unit in (1, scheme.rows if part.axis == 0 else scheme.group or 0, each):
        if unit and -(-part.of // unit) == shape[axis]:
            index[axis] = slice(part.start // unit, -(-part.stop // unit))
            break
    return tuple(index)


def own_values(suffix: str, stored: Tensor, part: Part, whole: tuple[int, int], scheme: Scheme) -> Tensor:
    """Returns what was read of a tensor as the rank's own layer would have it: its shape, and its groups' numbers."""
    if suffix == "weight_shape" and stored.tolist() == list(whole):
        own = [*whole]
        own[part.axis] = part.stop - part.start
        return torch.tensor(own, dtype=stored.dtype)
    if suffix in ("g_idx", "weight_g_idx") and part.axis == 1:
        return stored - part.start // (scheme.group or part.of)
    return stored
