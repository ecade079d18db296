"""Quantizes rows to 4 or 2 bits after turning them: contract and reference."""

from dataclasses import replace
from itertools import pairwise

import torch
from jaxtyping import Float, Float32, Int32
from torch import Tensor

from kvzip.ops.backend import use_triton
from kvzip.ops.quantize import pack_codes, quantize
from kvzip.ops.turning import measure_roots, turn
from kvzip.ops.types import FINE, LIMIT, NARROW, NOT_FINITE, SHAPED, Channels, Quantized, divided, group_of, owners

Flags = Int32[Tensor, "2"]
"""What the device found: whether a value was not finite, and whether float16 scales are too coarse."""


def quantize_turned(
    x: Float[Tensor, "N D"],
    *,
    bits: int,
    group: int | None = None,
    offsets: Int32[Tensor, " H1"] | None = None,
    channels: Channels | None = None,
    feedback: Float32[Tensor, "H D D"] | None = None,
    wide: bool = False,
) -> Quantized:
    """Returns x turned (see `turn`) and quantized to `bits` bits. It waits for the device, once.

    With offsets, rows are keys: rest = (x - center) / spread of each head's channels (`measure_roots`), turned; without
    them, x is turned. Then as in `quantize`: zero = min, scale = (max - min) / (2**bits - 1), and
    code = floor((rest - zero) / scale + 1/2), with zero and scale as they are stored (a kernel multiplies by 1 / scale,
    and a value between two codes may get either). In 2 bits without offsets zero and scale
    are of NARROW of that range, around its middle, which loses less. The first row of a head comes back almost
    exactly, because the center is moved by what it loses: most attention goes to it, and it is far from the others.

    Scales and zeros are float16, or float32 where float16 would move a value by more than half a step. Values beyond
    4e34 (2 ** 115) count as that.

    Args:
        bits: 4 or 2. In 8, turning gives nothing.
        group: values that share a scale, `group_of(D)` if not given.
        offsets: rows offsets[h]:offsets[h + 1] are those of head h.
        channels: of these heads, measured on other rows of theirs; None measures them.
        feedback: from `shape_feedback`. Values are then rounded SHAPED at a time, and those after them make up for what
            they lose where queries ask for it.
        wide: takes float32 scales at once.

    Raises: ValueError for other bits, D not divisible by group, x that is not finite, or channels or feedback without
        offsets; TypeError for a float64 x.
    Source: rotation as in QuaRot (arXiv 2404.00456) and KVarN (2606.03458); feedback as in GPTQ (2210.17323), between
        blocks of values and over channels of keys instead of weights.
    """
    how = {"bits": bits, "group": group, "offsets": offsets, "channels": channels, "feedback": feedback}
    packed, flags = quantize_turned_ahead(x, **how, wide=wide)
    infinite, coarse = flags.tolist()
    if infinite:
        raise ValueError(NOT_FINITE)
    return quantize_turned_ahead(x, **how, wide=True)[0] if coarse else packed


def quantize_turned_ahead(
    x: Float[Tensor, "N D"],
    *,
    bits: int,
    group: int | None = None,
    offsets: Int32[Tensor, " H1"] | None = None,
    channels: Channels | None = None,
    feedback: Float32[Tensor, "H D D"] | None = None,
    wide: bool = False,
) -> tuple[Quantized, Flags]:
    """`quantize_turned` without waiting: returns float16 scales, and flags. Where one is set the rows are of no use.

    Raises: as `quantize_turned`, but for what is not finite.
    """
    group = group_of(x.shape[1]) if group is None else group
    _check(x, bits, group, offsets, channels, feedback)
    if use_triton(x):
        from kvzip.ops.triton.quantize_turned import quantize_turned_triton as run
    else:
        run = quantize_turned_reference
    return run(x, bits=bits, group=group, offsets=offsets, channels=channels, feedback=feedback, wide=wide)


def quantize_like(
    x: Float[Tensor, "N D"], like: Quantized, *, offsets: Int32[Tensor, " H1"] | None = None
) -> Quantized:
    """Returns further rows in the format of `like`: its bits, group and channels, and turned if it is. It waits.

    Args:
        offsets: of the heads that own the rows; needed where `like` has channels.
    """
    run = quantize_turned if like.turned else quantize
    return run(
        x, bits=like.bits, group=like.group, offsets=None if like.channels is None else offsets, channels=like.channels
    )


def quantize_turned_reference(
    x: Float[Tensor, "N D"],
    *,
    bits: int,
    group: int | None = None,
    offsets: Int32[Tensor, " H1"] | None = None,
    channels: Channels | None = None,
    feedback: Float32[Tensor, "H D D"] | None = None,
    wide: bool = False,
) -> tuple[Quantized, Flags]:
    group = group_of(x.shape[1]) if group is None else group
    dtype = torch.float32 if wide else torch.float16
    narrow = NARROW if bits == 2 and offsets is None else 1.0
    if offsets is None:
        values, head = x.float().clamp(-LIMIT, LIMIT), None
    else:
        found = channels or measure_channels_turned_reference(x, offsets, bits=bits, group=group)
        channels, head = found, owners(offsets, len(x))
        values = (x.float().clamp(-LIMIT, LIMIT) - found.center[head]) / found.spread[head]
    rest = turn(values)
    if offsets is not None:
        rest = rest.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    rest = rest.nan_to_num(0.0)
    zero, scale, coarse = _grid(rest, bits, group, narrow, 0.0 if offsets is None else FINE, dtype)
    parts = [slice(None)]
    if feedback is not None and offsets is not None:
        parts = [slice(*ends) for ends in pairwise(offsets.tolist())]
    own = [
        _codes(rest[p], zero[p], scale[p], bits, group, None if feedback is None else feedback[h])
        for h, p in enumerate(parts)
    ]
    codes = torch.cat(own)
    flags = torch.stack([~x.isfinite().all(), coarse]).int()
    return Quantized(pack_codes(codes, bits), scale, zero, bits, group, channels, turned=True), flags


def measure_channels_turned(
    x: Float[Tensor, "N D"], offsets: Int32[Tensor, " H1"], *, bits: int, group: int | None = None
) -> Channels:
    """Returns `measure_roots`, with centers moved so that each head's first row is one that codes can say.

    The host does not wait for the device.
    """
    if use_triton(x):
        from kvzip.ops.triton.quantize_turned import measure_channels_turned_triton as run
    else:
        run = measure_channels_turned_reference
    return run(x, offsets, bits=bits, group=group)


def measure_channels_turned_reference(
    x: Float[Tensor, "N D"], offsets: Int32[Tensor, " H1"], *, bits: int, group: int | None = None
) -> Channels:
    group = group_of(x.shape[1]) if group is None else group
    found = measure_roots(x, offsets)
    if len(x) == 0:
        return found
    first = x[offsets[:-1].long().clamp(max=len(x) - 1)].float().clamp(-LIMIT, LIMIT)
    rest = turn((first - found.center) / found.spread)
    rest = rest.clamp(-torch.finfo(torch.float16).max, torch.finfo(torch.float16).max)
    zero, scale, _ = _grid(rest, bits, group, 1.0, FINE, torch.float16)
    steps = _codes(rest, zero, scale, bits, group, None).unflatten(1, (-1, group))
    back = (steps * scale.float()[..., None] + zero.float()[..., None]).flatten(1)
    lost = turn(rest - back) * found.spread
    usable = lost.isfinite() & (offsets.diff() > 0)[:, None]
    return replace(found, center=found.center + lost.where(usable, 0.0))


def shape_feedback(asked: Float32[Tensor, "*B D D"], spread: Float32[Tensor, "*B D"]) -> Float32[Tensor, "*B D D"]:
    """Returns what the errors of rounded values add to the targets of those after them, for keys with these spreads.

    The expected square of a logit's error is e^T A e, e the error of a turned row and A = T^T S M S T, with M the
    second moment of the queries (`asked`), S the spreads and T the matrix of `turn`, and a hundredth of A's mean
    diagonal added for queries that were not seen. With the first i blocks of e fixed it is least where the others are
    e F: with A^-1 = U^T U and U upper triangular, row block i of F is U_ii^-1 U_i right of the diagonal, and 0
    elsewhere. As each block's error is counted from its target, with the errors before it, these add up to that.

    With R upper triangular and A = R R^T, U is R^-1, and F the blocks of R on its diagonal times U, right of them.
    Matrices are few and small: give those of all layers at once, a device needs hardly longer for them.

    The host does not wait for the device. Where `asked` is not finite F is 0.
    """
    width = asked.shape[-1]
    matrix = turn(turn(asked * spread[..., None] * spread[..., None, :]).mT)
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(2.0**-60)
    eye = torch.eye(width, device=asked.device)
    matrix = torch.add(matrix / mean, eye, alpha=1e-2)
    root = torch.linalg.cholesky_ex(matrix.flip(-1, -2))[0].flip(-1, -2)  # cholesky would wait for its error
    upper = torch.linalg.solve_triangular(root, eye.expand_as(root), upper=True)
    block = torch.arange(width, device=asked.device) // SHAPED
    found = root.where(block[:, None] == block, 0.0) @ upper
    usable = found.isfinite().flatten(-2).all(-1)[..., None, None]
    return found.where((block[:, None] < block) & usable, 0.0)


def _grid(
    rest: Float32[Tensor, "N D"], bits: int, group: int, narrow: float, fine: float, dtype: torch.dtype
) -> tuple[Float[Tensor, "N Q"], Float[Tensor, "N Q"], Tensor]:
    """Zeros and scales as they are stored, and whether some are too coarse: what is below `fine` does not count."""
    groups, last = rest.unflatten(1, (-1, group)), 2**bits - 1
    low, high = groups.amin(2), groups.amax(2)
    span = (high - low) * narrow
    exact = (low + high - span) * 0.5 if narrow < 1 else low
    step = divided(span, last)
    zero, scale = exact.to(dtype), step.to(dtype)
    most = (step * 0.5).clamp_min(fine)
    held = ((zero.float() - exact).abs() <= most) & ((scale.float() - step).abs() * last <= most)
    return zero, scale, ~held.all()


def _codes(
    rest: Float32[Tensor, "N D"],
    zero: Float[Tensor, "N Q"],
    scale: Float[Tensor, "N Q"],
    bits: int,
    group: int,
    feedback: Float32[Tensor, "D D"] | None,
) -> Float32[Tensor, "N D"]:
    """Codes of rows, those of one head if there is feedback."""
    last = 2**bits - 1
    zeros, scales = (x.float().repeat_interleave(group, 1) for x in (zero, scale))
    safe = scales.where(scales > 0, 1.0)
    if feedback is None:
        steps = ((rest - zeros) / safe).where(scales > 0, 0.0)
        return (steps + 0.5).floor().clamp(0, last)
    target, codes = rest.clone(), torch.empty_like(rest)
    for first in range(0, rest.shape[1], SHAPED):
        own = slice(first, first + SHAPED)
        steps = ((target[:, own] - zeros[:, own]) / safe[:, own]).where(scales[:, own] > 0, 0.0)
        codes[:, own] = (steps + 0.5).floor().clamp(0, last)
        error = codes[:, own] * scales[:, own] + zeros[:, own] - target[:, own]
        target += error @ feedback[own]
    return codes


def _check(
    x: Tensor,
    bits: int,
    group: int,
    offsets: Tensor | None,
    channels: Channels | None,
    feedback: Tensor | None,
) -> None:
    if x.dtype == torch.float64:
        raise TypeError("expected bfloat16, float16 or float32 rows, got float64: convert them first")
    if bits not in (4, 2):
        raise ValueError(f"expected bits to be 4 or 2, got {bits}: rows in 8 bits are not turned, use quantize")
    if group < 1 or x.shape[1] % group or group % (8 // bits):
        raise ValueError(
            f"expected D divisible by group, and a group of whole bytes, got D={x.shape[1]} and group={group} in "
            f"{bits} bits: pass group=D"
        )
    if offsets is None and (channels is not None or feedback is not None):
        raise ValueError("expected offsets with channels or feedback, got none: they say which rows are which head's")
    heads = None if offsets is None else len(offsets) - 1
    if feedback is not None and feedback.shape != (heads, x.shape[1], x.shape[1]):
        raise ValueError(
            f"expected feedback of shape [H={heads}, D={x.shape[1]}, D], got {list(feedback.shape)}: it is of others"
        )
