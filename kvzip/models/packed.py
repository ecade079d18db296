"""The tensors of a quantized linear layer, as each format lays them out, brought into the one form of `ops`."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NoReturn

import torch
from torch import Tensor

from ..ops import QuantizedWeight
from ..ops.weights import pack_codes
from .schemes import Scheme, activations_of, is_static

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


def with_activations(name: str, parts: Sequence[QuantizedWeight], scheme: Scheme, gets: Sequence[Get]):
    """Returns parts that round their inputs as the scheme says; the parts of a stack have one static scale.

    Raises: ValueError for a scheme that is not understood, or static scales that are missing or differ.
    """
    how = activations_of(scheme)
    if how is None:
        return list(parts)
    if is_static(scheme):
        scale, zero = (_shared(name, gets, names) for names in (INPUT_SCALES, ("input_zero_point",)))
        if scale is None:
            _refuse(f"{name}.input_scale", None, "the scale of static activations")
        how = replace(how, scale=scale, zero=None if how.symmetric else zero)
    return [replace(part, activations=how) for part in parts]


def _shared(name: str, gets: Sequence[Get], suffixes: Sequence[str]) -> Tensor | None:
    found = [next((x for x in map(get, suffixes) if x is not None), None) for get in gets]
    values = {None if x is None else float(x.float().reshape(-1)[0]) for x in found}
    if len(values) > 1 or any(x is not None and x.numel() != 1 for x in found):
        _refuse(f"{name}.{suffixes[0]}", sorted(map(str, values)), "one number, the same for layers of one input")
    value = values.pop()
    return None if value is None else torch.tensor(value)


def _plain(name: str, scheme: Scheme, get: Get, outputs: int, inputs: int) -> QuantizedWeight:
    dtype = torch.float8_e4m3fn if scheme.kind == "e4m3" else torch.int8
    codes = _tensor(name, get, "weight", (outputs, inputs), dtype)
    suffix = next((x for x in SCALES if get(x) is not None), SCALES[0])
    scale = get(suffix)
    if scale is None:
        _refuse(f"{name}.{suffix}", None, "the scale of its weights")
    scale, group, rows = _shaped(name, suffix, scale, scheme, outputs, inputs)
    zero = get("weight_zero_point")
    if zero is not None:
        if scheme.kind != "int8":
            zero = _no_zeros(name, zero)
        else:
            zero = zero.reshape(scale.shape).to(torch.int8)
            zero = zero if scheme.zeros else _no_zeros(name, zero)
    return QuantizedWeight(codes, scale, zero, scheme.kind, inputs, group, rows)


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
        if tuple(scale.shape) in shapes and scale.is_floating_point():
            return scale.reshape(-(-outputs // rows), -1), min(width, inputs), rows
    fitting = [list(shape) for kind in kinds for shape in options[kind][0]]
    _refuse(f"{name}.{suffix}", f"{scale.dtype} {list(scale.shape)}", f"floating, of shape {fitting}")


def _packed(name: str, scheme: Scheme, get: Get, outputs: int, inputs: int) -> QuantizedWeight:
    bits = 4 if scheme.kind == "int4" else 8
    words = _tensor(name, get, "weight_packed", (outputs, -(-inputs * bits // 32)), torch.int32)
    shape = get("weight_shape")
    if shape is not None and shape.tolist() != [outputs, inputs]:
        _refuse(f"{name}.weight_shape", shape.tolist(), str([outputs, inputs]))
    scale = get("weight_scale")
    if scale is None:
        _refuse(f"{name}.weight_scale", None, "the scale of its weights")
    scale, group, rows = _shaped(name, "weight_scale", scale, scheme, outputs, inputs)
    _check_order(name, get("weight_g_idx"), inputs, group)
    codes = torch.cat([_codes(_fields(part, bits, 1)[:, :inputs], bits) for part in words.split(_ROWS)])
    zero = get("weight_zero_point")
    if zero is not None and zero.dtype == torch.int32:  # packed along outputs, plus half of the range as codes are
        zero = _fields(zero, bits, 0)[: scale.shape[0]]
        zero = (zero.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    if zero is not None:
        zero = zero.reshape(scale.shape).to(torch.int8)
        zero = zero if scheme.zeros else _no_zeros(name, zero)
    elif scheme.zeros:
        _refuse(f"{name}.weight_zero_point", None, "the zero points of weights that are not symmetric")
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
    _check_order(name, get("g_idx"), inputs, group)
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
    wanted = f"{'floating' if dtype is None else str(dtype).removeprefix('torch.')} {list(shape)}"
    if found is None:
        _refuse(f"{name}.{suffix}", None, wanted)
    fits = found.is_floating_point() if dtype is None else found.dtype == dtype
    if not fits or tuple(found.shape) != shape:
        _refuse(f"{name}.{suffix}", f"{found.dtype} {list(found.shape)}", wanted)
    return found


def _check_order(name: str, owners: Tensor | None, inputs: int, group: int) -> None:
    """Refuses groups of inputs that are not neighbours (GPTQ with desc_act, or actorder of groups)."""
    if owners is not None and not torch.equal(owners.long(), torch.arange(inputs) // group):
        _refuse(f"{name}.g_idx", "another order", "groups of neighbouring inputs (desc_act=false, or static groups)")


def _no_zeros(name: str, zero: Tensor) -> None:
    """None for zero points that are all 0, which symmetric weights may have."""
    if bool((zero.float() != 0).any()):
        _refuse(f"the zero points of {name}", "others", "0 for symmetric weights")


def _refuse(what: str, got: object, expected: str) -> NoReturn:
    raise ValueError(
        f"expected {what} to be {expected}, got {got}: is config.json this checkpoint's? kvzip reads no other form"
    )
