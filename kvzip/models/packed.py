"""The tensors of a quantized linear layer, as each format lays them out, brought into the one form of `ops`."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NoReturn

import torch
from torch import Tensor

from ..ops import QuantizedWeight
from ..ops.weights import pack_codes
from .schemes import Scheme, activations_of

MAIN = {"plain": "weight", "packed": "weight_packed", "awq": "qweight", "gptq": "qweight"}
"""The tensor with the codes, by layout."""

SCALES = ("weight_scale", "weight_scale_inv", "dequant_scale")  # all of them multiply
INPUT_SCALES = ("input_scale", "activation_scale")
OTHERS = {
    "plain": (*SCALES, *INPUT_SCALES, "weight_zero_point", "input_zero_point", "input_scale_ub"),
    "packed": ("weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", *INPUT_SCALES, "input_zero_point"),
    "awq": ("qzeros", "scales"),
    "gptq": ("qzeros", "scales", "g_idx"),
}
"""The tensors beside it that may be there."""

OF_CACHES = ("k_scale", "v_scale", "q_scale", "prob_scale", "output_scale")
"""Scales for caches in 8 bits, which other programs keep; ours have their own."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes of scales. float64 and powers of two (e8m0) become float32."""

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output of each 4 bits of an int32, the lowest first
_ROWS = 1024  # unpacked at once

Get = Callable[[str], Tensor | None]
"""The stored tensor of a layer by its suffix, as `weight_scale`; None if there is none."""


def read_part(name: str, scheme: Scheme, get: Get, outputs: int, inputs: int) -> QuantizedWeight:
    """Returns one layer's stored weight as a QuantizedWeight, on the host.

    Raises: ValueError that names a tensor that is missing, has another shape or type, or says what is not implemented.
    """
    weight = _LAYOUTS[scheme.layout](name, scheme, get, outputs, inputs)
    if weight.kind == "e4m3" and bool((weight.codes.view(torch.uint8) & 127 == 127).any()):
        _refuse(f"{name}.weight", "NaN", "numbers")
    if not bool(weight.scale.isfinite().all()):
        _refuse(f"the scales of {name}", "inf or NaN", "finite")
    return weight


def with_activations(
    name: str, parts: Sequence[QuantizedWeight], schemes: Sequence[Scheme], gets: Sequence[Get]
) -> list[QuantizedWeight]:
    """Returns parts that round their inputs as their schemes say; the parts of a stack have one static scale.

    Raises: ValueError for schemes that are not understood or differ, or static scales that are missing or differ.
    """
    found = [(activations_of(scheme), scheme.static) for scheme in schemes]
    how, static = found[0]
    if any(other != found[0] for other in found):
        _refuse(f"the inputs of {name}", found, "rounded as those of the layers that share them")
    if how is None:
        return list(parts)
    bound = _shared(name, gets, ("input_scale_ub",))
    if how.bound is not None and bound not in (None, how.bound):
        _refuse(f"{name}.input_scale_ub", bound, f"the config's bound, {how.bound}")
    if static:
        scale, zero = (_shared(name, gets, names) for names in (INPUT_SCALES, ("input_zero_point",)))
        if scale is None or not 0 < scale < torch.inf:
            _refuse(f"{name}.input_scale", scale, "the scale of static activations, finite and above 0")
        if how.symmetric and zero:
            _refuse(f"{name}.input_zero_point", zero, "0 for symmetric activations")
        if not how.symmetric and (zero is None or not -128 <= zero <= 127 or zero != int(zero)):
            _refuse(f"{name}.input_zero_point", zero, "an integer from -128 to 127, for activations not symmetric")
        how = replace(how, scale=torch.tensor(scale), zero=None if how.symmetric else torch.tensor(zero))
    return [replace(part, activations=how) for part in parts]


def _shared(name: str, gets: Sequence[Get], suffixes: Sequence[str]) -> float | None:
    """The number that all layers of one input have; NaN counts as no number."""
    found = [_one_of(name, get, suffixes)[1] for get in gets]
    if any(x is not None and x.numel() != 1 for x in found):
        _refuse(f"{name}.{suffixes[0]}", [None if x is None else list(x.shape) for x in found], "one number")
    values = [None if x is None else float(x.float().reshape(())) for x in found]
    if any(x != values[0] for x in values):
        _refuse(f"{name}.{suffixes[0]}", values, "one number, the same for layers of one input")
    return values[0]


def _one_of(name: str, get: Get, suffixes: Sequence[str]) -> tuple[str, Tensor | None]:
    """The tensor that has one of these names, and its name; the first and None if there is none."""
    found = [(suffix, x) for suffix, x in ((suffix, get(suffix)) for suffix in suffixes) if x is not None]
    if len(found) > 1:
        _refuse(f"{name}.{found[1][0]}", "both", f"absent beside {found[0][0]}")
    return found[0] if found else (suffixes[0], None)


def _plain(name: str, scheme: Scheme, get: Get, outputs: int, inputs: int) -> QuantizedWeight:
    dtype = torch.float8_e4m3fn if scheme.kind == "e4m3" else torch.int8
    codes = _tensor(name, get, "weight", (outputs, inputs), dtype)
    suffix, stored = _one_of(name, get, SCALES)
    if stored is None:
        _refuse(f"{name}.{suffix}", None, "the scale of its weights")
    scale, group, rows = _shaped(name, suffix, stored, scheme, outputs, inputs)
    zero = get("weight_zero_point")
    zeros = scheme.zeros and scheme.kind == "int8"
    if zero is not None:
        zero = _zero_points(name, zero, stored, 8).reshape(scale.shape) if zeros else _no_zeros(name, zero)
    elif zeros:
        _refuse_no_zeros(name)
    return QuantizedWeight(codes, scale, zero, scheme.kind, inputs, group, rows)


def _zero_points(name: str, zero: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Zero points as int8, as they are stored: as many as scales, and in the range of the codes."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    whole = not (zero.is_floating_point() or zero.is_complex() or zero.dtype == torch.bool)
    alike = [n for n in zero.shape if n != 1] == [n for n in scale.shape if n != 1]
    if not whole or not alike or (zero.numel() and not low <= int(zero.min()) <= int(zero.max()) <= high):
        got = f"{zero.dtype} {list(zero.shape)}" + (f" of {zero.min()} to {zero.max()}" if whole and alike else "")
        _refuse(f"{name}.weight_zero_point", got, f"integers from {low} to {high} of shape {list(scale.shape)}")
    return zero.to(torch.int8)


def _refuse_no_zeros(name: str) -> NoReturn:
    _refuse(f"{name}.weight_zero_point", None, "the zero points of weights that are not symmetric")


def _shaped(
    name: str, suffix: str, scale: Tensor, scheme: Scheme, outputs: int, inputs: int
) -> tuple[Tensor, int, int]:
    """A scale as [S, Q], with how many inputs and outputs share one."""
    scale = scale.float() if scale.dtype in (torch.float64, torch.float8_e8m0fnu) else scale
    group = inputs if scheme.group is None else scheme.group
    options = {
        "tensor": ([(), (1,), (1, 1)], inputs, outputs),
        "channel": ([(outputs,), (outputs, 1)], inputs, 1),
        "group": ([(outputs, -(-inputs // group))], group, 1),
        "block": ([(-(-outputs // scheme.rows), -(-inputs // group))], group, scheme.rows),
    }
    kinds = ("tensor", "channel") if scheme.strategy == "any" else (scheme.strategy,)
    for kind in kinds:
        shapes, width, rows = options[kind]
        if tuple(scale.shape) in shapes and scale.dtype in FLOATS:
            return scale.reshape(-(-outputs // rows), -1), min(width, inputs), rows
    fitting = [list(shape) for kind in kinds for shape in options[kind][0]]
    _refuse(f"{name}.{suffix}", f"{scale.dtype} {list(scale.shape)}", f"of 16 or 32 bits, of shape {fitting}")


def _packed(name: str, scheme: Scheme, get: Get, outputs: int, inputs: int) -> QuantizedWeight:
    bits = 4 if scheme.kind == "int4" else 8
    words = _tensor(name, get, "weight_packed", (outputs, -(-inputs * bits // 32)), torch.int32)
    shape = get("weight_shape")
    if shape is not None and shape.tolist() != [outputs, inputs]:
        _refuse(f"{name}.weight_shape", shape.tolist(), str([outputs, inputs]))
    stored = get("weight_scale")
    if stored is None:
        _refuse(f"{name}.weight_scale", None, "the scale of its weights")
    scale, group, rows = _shaped(name, "weight_scale", stored, scheme, outputs, inputs)
    owners = get("weight_g_idx")
    if owners is None or not bool((owners == -1).any()):  # -1: as made, groups are of neighbours
        _check_order(f"{name}.weight_g_idx", owners, inputs, group, scheme)
    codes = torch.cat([_codes(_fields(part, bits, 1)[:, :inputs], bits) for part in words.split(_ROWS)])
    zero = get("weight_zero_point")
    if zero is not None and zero.dtype == torch.int32:  # packed along outputs, plus half of the range as codes are
        shape = -(-scale.shape[0] * bits // 32), scale.shape[1]
        zero = _fields(_tensor(name, get, "weight_zero_point", shape, torch.int32), bits, 0)[: scale.shape[0]]
        zero = (zero.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    elif zero is not None:
        zero = _zero_points(name, zero, stored, bits).reshape(scale.shape)
    if zero is not None:
        zero = zero if scheme.zeros else _no_zeros(name, zero)
    elif scheme.zeros:
        _refuse_no_zeros(name)
    return QuantizedWeight(codes, scale, zero, scheme.kind, inputs, group, rows)


def _awq(name: str, scheme: Scheme, get: Get, outputs: int, inputs: int) -> QuantizedWeight:
    group = min(scheme.group or inputs, inputs)
    groups = -(-inputs // group)
    words = _tensor(name, get, "qweight", (inputs, -(-outputs // 8)), torch.int32)
    zeros = _tensor(name, get, "qzeros", (groups, -(-outputs // 8)), torch.int32)
    scale = _tensor(name, get, "scales", (groups, outputs))
    place = torch.tensor(AWQ_ORDER).argsort()  # of each output within its word

    def unpacked(words: Tensor) -> Tensor:
        return _fields(words, 4, 1).unflatten(1, (-1, 8))[:, :, place].flatten(1)

    codes = [_codes(unpacked(part).T, 4) for part in words.split(_ROWS // 8, dim=1)]
    zero = (unpacked(zeros).T.to(torch.int8) - 8).contiguous()
    return QuantizedWeight(torch.cat(codes), scale.T.contiguous(), zero, "int4", inputs, group)


def _gptq(name: str, scheme: Scheme, get: Get, outputs: int, inputs: int) -> QuantizedWeight:
    bits = 4 if scheme.kind == "int4" else 8
    each = 32 // bits
    group = min(scheme.group or inputs, inputs)
    groups = -(-inputs // group)
    words = _tensor(name, get, "qweight", (-(-inputs // each), outputs), torch.int32)
    zeros = _tensor(name, get, "qzeros", (groups, -(-outputs // each)), torch.int32)
    scale = _tensor(name, get, "scales", (groups, outputs))
    _check_order(f"{name}.g_idx", get("g_idx"), inputs, group, scheme)
    codes = [_codes(_fields(part, bits, 0)[:inputs].T, bits) for part in words.split(_ROWS, dim=1)]
    if scheme.offset:  # one less in each field was stored, with borrows from the next: add it to whole words
        ones = sum(1 << bits * at for at in range(each))
        zeros = ((zeros.to(torch.int64) + ones + (1 << 31)) % (1 << 32) - (1 << 31)).to(torch.int32)
    zero = (_fields(zeros, bits, 1)[:, :outputs].T.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8).contiguous()
    zero = zero if scheme.zeros else _no_zeros(name, zero)
    return QuantizedWeight(torch.cat(codes), scale.T.contiguous(), zero, scheme.kind, inputs, group)


_LAYOUTS = {"plain": _plain, "packed": _packed, "awq": _awq, "gptq": _gptq}


def _fields(words: Tensor, bits: int, axis: int) -> Tensor:
    """The fields of int32 words along an axis, as uint8, the lowest bits first."""
    words = words.T if axis == 0 else words
    fields = words.contiguous().view(torch.uint8)  # little endian
    if bits == 4:
        fields = torch.stack([fields & 15, fields >> 4], 2).flatten(1)
    return fields.T if axis == 0 else fields


def _codes(fields: Tensor, bits: int) -> Tensor:
    """Codes of `QuantizedWeight` of fields with half of their range added, [outputs, inputs]."""
    if bits == 4:
        return pack_codes(fields.to(torch.int8) - 8)
    return (fields ^ 128).contiguous().view(torch.int8)


def _tensor(name: str, get: Get, suffix: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    found = get(suffix)
    wanted = f"{'of 16 or 32 bits' if dtype is None else str(dtype).removeprefix('torch.')} {list(shape)}"
    if found is None:
        _refuse(f"{name}.{suffix}", None, wanted)
    fits = found.dtype in FLOATS if dtype is None else found.dtype == dtype
    if not fits or tuple(found.shape) != shape:
        _refuse(f"{name}.{suffix}", f"{found.dtype} {list(found.shape)}", wanted)
    return found


def _check_order(name: str, owners: Tensor | None, inputs: int, group: int, scheme: Scheme) -> None:
    """Refuses groups of inputs that are not neighbours (GPTQ with desc_act, or actorder of groups), or may not be."""
    neighbours = "groups of neighbouring inputs (desc_act=false, or static groups)"
    if owners is None:
        if scheme.ordered and group < inputs:
            _refuse(name, None, f"there to show {neighbours}")
    elif owners.is_floating_point() or not torch.equal(owners.long(), torch.arange(inputs) // group):
        _refuse(name, "another order", neighbours)


def _no_zeros(name: str, zero: Tensor) -> None:
    """None for zero points that are all 0, which symmetric weights may have."""
    if bool((zero.float() != 0).any()):
        _refuse(f"the zero points of {name}", "others", "0 for symmetric weights")


def _refuse(what: str, got: object, expected: str) -> NoReturn:
    raise ValueError(
        f"expected {what} to be {expected}, got {got}: is config.json this checkpoint's? kvzip reads no other form"
    )
