"""Weights in 8 and 4 bits: one form for all that checkpoints have, how it is made, and what it means."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd, lcm

import torch
from jaxtyping import Float, Float32, Int8, Int64, Shaped
from torch import Tensor

from kvzip.ops.types import divided

KINDS = ("e4m3", "int8", "int4")
BLOCK = 32  # inputs whose 4-bit codes lie in 16 bytes
GROUP = 128  # inputs that share a scale where `quantize_weight` makes 4 bits
LARGEST = {"e4m3": 448.0, "int8": 127.0}  # the code of a row's largest weight
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # of a 4-bit group's range: outliers may be clipped
_VALUES = 1 << 20  # expanded at once: few enough for a processor's caches


@dataclass(frozen=True)
class Activations:
    """How the inputs of a layer are rounded before the product, if they are: x ~ scale * (code - zero).

    The scale of a token (of each `group` of its inputs) is its largest magnitude / `steps`; without `symmetric` codes
    span the token's range, 0 included. A static `scale` is one number for all inputs.
    """

    kind: str  # "e4m3" or "int8"
    steps: float  # the code of the largest value: 448, 127 or 127.5
    group: int | None = None
    bound: float | None = None  # larger magnitudes do not raise the scale
    symmetric: bool = True
    scale: Float32[Tensor, ""] | None = None
    zero: Float32[Tensor, ""] | None = None


@dataclass(frozen=True)
class QuantizedWeight:
    """N x K weights: w[n, k] = scale[n // rows, k // group] * (code[n, k] - zero[n // rows, k // group]).

    Codes are e4m3 numbers, int8 integers, or integers of -8 to 7, stored plus 8 in 4 bits: byte j of 16 holds the code
    of input j of a block of 32 in its low half and that of input 16 + j in its high half, and inputs after K are zeros.
    """

    codes: Shaped[Tensor, "N P"]  # float8_e4m3fn and int8: P = K; uint8: P = 16 * ceil(K / 32)
    scale: Float[Tensor, "S Q"]  # S = ceil(N / rows), Q = ceil(K / group)
    zero: Int8[Tensor, "S Q"] | None
    kind: str
    inputs: int
    group: int
    rows: int = 1
    activations: Activations | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K), as of a plain weight."""
        return self.codes.shape[0], self.inputs

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zeros."""
        return sum(tensor.nbytes for tensor in (self.codes, self.scale, self.zero) if tensor is not None)


def empty_weight(
    outputs: int,
    inputs: int,
    *,
    kind: str,
    group: int,
    rows: int = 1,
    zeros: bool = False,
    scale_dtype: torch.dtype = torch.float32,
    device: torch.device | str,
) -> QuantizedWeight:
    """Returns an uninitialised weight; on the meta device it costs nothing. `group` may be larger than `inputs`."""
    group = min(group, inputs)
    shape = -(-outputs // rows), -(-inputs // group)
    width, dtype = inputs, {"e4m3": torch.float8_e4m3fn, "int8": torch.int8}.get(kind, torch.uint8)
    if kind == "int4":
        width = -(-inputs // BLOCK) * BLOCK // 2
    return QuantizedWeight(
        codes=torch.empty((outputs, width), dtype=dtype, device=device),
        scale=torch.empty(shape, dtype=scale_dtype, device=device),
        zero=torch.empty(shape, dtype=torch.int8, device=device) if zeros else None,
        kind=kind,
        inputs=inputs,
        group=group,
        rows=rows,
    )


def expand(
    weight: QuantizedWeight, dtype: torch.dtype, *, start: int = 0, stop: int | None = None
) -> Float[Tensor, "N K"]:
    """Returns the weights of outputs start:stop in a floating dtype: the formula, rounded once."""
    stop = weight.shape[0] if stop is None else stop
    wide = torch.promote_types(dtype, torch.float32)
    codes = weight.codes[start:stop]
    codes = unpack_codes(codes, weight.inputs) if weight.kind == "int4" else codes
    owner = slice(start, stop)
    if weight.rows > 1:
        owner = torch.arange(start, stop, device=codes.device) // weight.rows
    values = codes.to(wide)
    if weight.inputs % weight.group:
        values = torch.nn.functional.pad(values, (0, -weight.inputs % weight.group))
    values = values.unflatten(1, (-1, weight.group))
    if weight.zero is not None:
        values -= weight.zero[owner].to(wide)[..., None]
    values *= weight.scale[owner].to(wide)[..., None]  # in place: fresh memory costs a processor more than the product
    return values.flatten(1)[:, : weight.inputs].to(dtype)


def embedding(
    ids: Int64[Tensor, "*b"], weight: Float[Tensor, "N K"] | QuantizedWeight, dtype: torch.dtype
) -> Float[Tensor, "*b K"]:
    """Returns the rows of a table in a floating dtype; of a quantized one, the rows asked for are expanded."""
    if isinstance(weight, Tensor):
        return torch.nn.functional.embedding(ids, weight)
    flat = ids.flatten()
    codes = weight.codes.view(torch.uint8)[flat].view(weight.codes.dtype)
    owner = flat // weight.rows
    zero = None if weight.zero is None else weight.zero[owner]
    picked = replace(weight, codes=codes, scale=weight.scale[owner], zero=zero, rows=1)
    return expand(picked, dtype).view(*ids.shape, weight.inputs)


def plain(weight: Tensor | QuantizedWeight, dtype: torch.dtype) -> Float[Tensor, "N K"]:
    """Returns all of a weight as a plain matrix: one that is plain already as it is, a quantized one in `dtype`."""
    return weight if isinstance(weight, Tensor) else expand(weight, dtype)


def blocks(weight: QuantizedWeight, values: int = _VALUES) -> list[tuple[int, int]]:
    """Returns ranges of outputs that together are all, each of about `values` weights at most."""
    outputs, inputs = weight.shape
    step = max(1, values // inputs)
    return [(at, min(at + step, outputs)) for at in range(0, outputs, step)]


def pack_codes(codes: Int8[Tensor, "N K"]) -> Shaped[Tensor, "N P"]:
    """Returns integers of -8 to 7 in 4 bits each, as `QuantizedWeight` has them."""
    codes = codes.to(torch.int8) + 8
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % BLOCK), value=8)
    low, high = padded.to(torch.uint8).unflatten(1, (-1, 2, BLOCK // 2)).unbind(2)
    return (low | high << 4).flatten(1)


def unpack_codes(packed: Shaped[Tensor, "N P"], inputs: int) -> Int8[Tensor, "N K"]:
    """Returns the integers that `pack_codes` packed."""
    halves = packed.unflatten(1, (-1, 1, BLOCK // 2))
    both = torch.cat([halves & 15, halves >> 4], 2)
    return both.flatten(1)[:, :inputs].to(torch.int8) - 8


def stack_weights(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Returns weights of the same inputs, one below the other.

    Raises: ValueError for parts of different kinds, groups or activations.
    """
    first = parts[0]
    if any((x.kind, x.inputs, x.group) != (first.kind, first.inputs, first.group) for x in parts):
        found = sorted({f"{x.kind} in groups of {x.group}" for x in parts})
        raise ValueError(f"expected parts of one kind, got {' and '.join(found)}: they are one product")
    rows = shared_rows([x.shape[0] for x in parts], [x.rows for x in parts])
    zeros = any(x.zero is not None for x in parts)
    dtype = first.scale.dtype if len({x.scale.dtype for x in parts}) == 1 else torch.float32
    scales = [repeated(x.scale.to(dtype), x.rows, rows, x.shape[0]) for x in parts]
    zero = [
        repeated(torch.zeros_like(x.scale, dtype=torch.int8) if x.zero is None else x.zero, x.rows, rows, x.shape[0])
        for x in parts
    ]
    return QuantizedWeight(
        codes=torch.cat([x.codes for x in parts]),
        scale=torch.cat(scales),
        zero=torch.cat(zero) if zeros else None,
        kind=first.kind,
        inputs=first.inputs,
        group=first.group,
        rows=rows,
        activations=first.activations,
    )


def outputs(weight: QuantizedWeight, part: slice) -> QuantizedWeight:
    """Returns a range of outputs, in the same memory, which begins where `weight.rows` do.

    Raises: ValueError for outputs that begin within.
    """
    if part.start % weight.rows:
        raise ValueError(f"expected outputs from a multiple of {weight.rows}, got {part.start}: they share scales")
    scales = slice(part.start // weight.rows, -(-part.stop // weight.rows))
    zero = None if weight.zero is None else weight.zero[scales]
    return replace(weight, codes=weight.codes[part], scale=weight.scale[scales], zero=zero)


def columns(weight: QuantizedWeight, start: int, stop: int) -> QuantizedWeight:
    """Returns the weights of inputs start:stop, which begin with a group and, in 4 bits, with a block of codes.

    Raises: ValueError for inputs that begin within one.
    """
    unit = weight.group if weight.group < weight.inputs else 1
    unit = lcm(unit, BLOCK) if weight.kind == "int4" else unit
    if start % unit or (stop % unit and stop != weight.inputs):
        raise ValueError(f"expected inputs in multiples of {unit}, got {start}:{stop}: their codes are not apart")
    codes = slice(start // 2, -(-stop // BLOCK) * BLOCK // 2) if weight.kind == "int4" else slice(start, stop)
    groups = slice(start // weight.group, -(-stop // weight.group)) if weight.group < weight.inputs else slice(None)
    return replace(
        weight,
        codes=weight.codes[:, codes].contiguous(),
        scale=weight.scale[:, groups].contiguous(),
        zero=None if weight.zero is None else weight.zero[:, groups].contiguous(),
        inputs=stop - start,
        group=min(weight.group, stop - start),
    )


def rows_at_once(inputs: int) -> int:
    """Returns how many rows `quantize_weight` rounds at once; in 4 bits their scales have one dtype."""
    return max(1, _VALUES // max(1, inputs))


def shared_rows(outputs: Sequence[int], rows: Sequence[int]) -> int:
    """Returns how many outputs may share a row of scales when parts of so many outputs and rows are stacked."""
    return gcd(*rows, *outputs[:-1])  # the last part may end within a block


def repeated(scale: Tensor, rows: int, fewer: int, outputs: int) -> Tensor:
    """Returns rows of scales, one for `rows` outputs each, as rows for `fewer` of them; `rows` is a multiple."""
    return scale if rows == fewer else scale.repeat_interleave(rows // fewer, 0)[: -(-outputs // fewer)]


def quantize_weight(x: Float[Tensor, "N K"], kind: str, *, group: int = GROUP) -> QuantizedWeight:
    """Returns weights rounded to the nearest code: 8 bits with a scale for each output, 4 bits for each `group`.

    In 8 bits the largest magnitude of a row becomes the largest code, 448 (e4m3) or 127 (int8). In 4 bits a group's
    scale is the one of six, `SHRINKS` of its largest magnitude / -8 with that weight's sign, that has the least squared
    error; scales are float16 (float32 where one is beyond it, or the largest is a subnormal one).

    Raises: ValueError for an unknown kind, or weights that are not finite.
    """
    if kind not in KINDS:
        raise ValueError(f"expected a kind in {KINDS}, got {kind!r}: choose one of them")
    if not bool(x.isfinite().all()):
        raise ValueError("expected finite weights, got inf or NaN: they have no scale; check the checkpoint")
    parts = [_quantized(part.float(), kind, group) for part in x.split(rows_at_once(x.shape[1]))]
    return parts[0] if len(parts) == 1 else stack_weights(parts)


def _quantized(x: Tensor, kind: str, group: int) -> QuantizedWeight:
    if kind == "int4":
        return _in_groups(x, min(group, x.shape[1]))
    scale = divided(x.abs().amax(1, keepdim=True), LARGEST[kind])
    scaled = x / torch.where(scale > 0, scale, 1)
    codes = scaled.to(torch.float8_e4m3fn) if kind == "e4m3" else scaled.round().clamp(-127, 127).to(torch.int8)
    return QuantizedWeight(codes, scale, None, kind, x.shape[1], x.shape[1])


def _in_groups(x: Tensor, group: int) -> QuantizedWeight:
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % group)).unflatten(1, (-1, group))  # [N Q group]
    largest = padded.gather(2, padded.abs().argmax(2, keepdim=True)) / -8
    half, most = torch.finfo(torch.float16), float(largest.abs().max())
    dtype = torch.float16 if most == 0 or half.tiny <= most < half.max else torch.float32
    unit = torch.exp2(-largest.abs().log2().floor().clamp(-120, 120))  # errors of any weights are then near 1
    best = torch.full_like(largest, torch.inf)
    scale, codes = torch.zeros_like(largest), torch.zeros_like(padded)
    for shrink in SHRINKS:
        tried = (largest * shrink).to(dtype).float()
        rounded = (padded / torch.where(tried == 0, 1, tried)).round_().clamp_(-8, 7)
        error = (rounded * tried - padded).mul_(unit).square_().sum(2, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, tried, scale)
        codes = torch.where(better, rounded, codes)
    codes = codes.flatten(1)[:, : x.shape[1]].to(torch.int8)
    return QuantizedWeight(pack_codes(codes), scale[..., 0].to(dtype), None, "int4", x.shape[1], group)


def round_inputs(x: Float[Tensor, "*b K"], how: Activations) -> Float[Tensor, "*b K"]:
    """Returns x as its codes mean it: scale * (code - zero), in x's dtype."""
    codes, scale, zero = quantize_inputs(x, how)
    values = codes.to(scale.dtype)
    if zero is not None:
        values = values - zero
    return (values * scale).flatten(-2)[..., : x.shape[-1]].to(x.dtype)


def quantize_inputs(
    x: Float[Tensor, "*b K"], how: Activations
) -> tuple[Shaped[Tensor, "*b Q G"], Float[Tensor, "..."], Float[Tensor, "..."] | None]:
    """Returns the codes of inputs in groups (one of all, without `group`), their scales and, if any, their zeros."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    size = how.group or max(1, x.shape[-1])
    parts = torch.nn.functional.pad(wide, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))
    zero = None
    if how.scale is not None:
        scale = how.scale.to(wide.dtype)
        zero = None if how.zero is None else how.zero.to(wide.dtype)
    elif how.symmetric:
        top = parts.abs().amax(-1, keepdim=True)
        scale = divided(top if how.bound is None else top.clamp(max=how.bound), how.steps)
    else:
        low, high = parts.amin(-1, keepdim=True).clamp(max=0), parts.amax(-1, keepdim=True).clamp(min=0)
        scale = divided(high - low, 255)
        zero = (-128 - low / torch.where(scale > 0, scale, 1)).round().clamp(-128, 127)
    codes = parts / torch.where(scale > 0, scale, 1)
    codes = codes if zero is None else codes + zero
    if how.kind == "e4m3":
        return codes.clamp(-448, 448).to(torch.float8_e4m3fn), scale, zero
    return codes.round().clamp(-128, 127).to(torch.int8), scale, zero
