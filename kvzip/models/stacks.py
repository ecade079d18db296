"""The matrices of one product, quantized as a checkpoint has them or while they are read, whole or a rank's part."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..ops import QuantizedWeight, quantize_weight
from ..ops.weights import columns, rows_at_once, stack_weights
from ..parallel import Share
from .division import Part, own_index, own_values
from .packed import MAIN, OTHERS, read_part, with_activations
from .schemes import Scheme
from .shards import Place, Read

COMPANIONS = {suffix for others in OTHERS.values() for suffix in others} | set(MAIN.values())
"""Endings of the names of tensors that belong to a quantized layer."""

_AT_ONCE = 1 << 25  # weights that are rounded at once


@dataclass(frozen=True)
class Reading:
    """What is made of stored weights. `kind`: linear layers of 16 bits are quantized to it while they are read."""

    dtype: torch.dtype
    device: torch.device
    kind: str | None = None
    head: str | None = None  # the same of the head, and of the embedding where it is tied
    round_inputs: bool = False  # as the checkpoint says
    share: Share | None = None  # of what is read


@dataclass(frozen=True)
class Files:
    """What is stored where, and where it goes: `places` by name, with the `parts` of those that are divided."""

    found: Mapping[str, Place]
    places: Mapping[str, Tensor]
    schemes: Mapping[str, Scheme]
    parts: Mapping[str, Part]
    reading: Reading


def index_of(part: Part | None) -> tuple[slice, ...]:
    """The index of a part of a matrix or a vector that is stored as it is."""
    if part is None:
        return ()
    return (slice(None),) * part.axis + (slice(part.start, part.stop),)


def read_stack(names: Sequence[str], files: Files, read: Read) -> QuantizedWeight:
    """The matrices of one product, as the checkpoint quantizes them."""

    def get(name: str, suffix: str) -> Tensor | None:
        place = files.found.get(f"{name.removesuffix('.weight')}.{suffix}")
        if place is None:
            return None
        part, scheme = files.parts.get(name), files.schemes[name]
        if part is None:
            return read(place)
        index = own_index(tuple(read(place).shape), scheme.layout, suffix, part, scheme)
        inner = files.places[name].shape
        whole = (part.of, inner[1]) if part.axis == 0 else (inner[0], part.of)
        return own_values(suffix, read(place, index), part, whole, scheme)

    stems = [name.removesuffix(".weight") for name in names]
    gets = [partial(get, name) for name in names]
    parts = [
        read_part(stem, files.schemes[name], own, *files.places[name].shape)
        for name, stem, own in zip(names, stems, gets, strict=True)
    ]
    if files.reading.round_inputs:
        parts = with_activations(stems[0], parts, [files.schemes[name] for name in names], gets)
    return stack_weights(parts)


def rounded_stack(names: Sequence[str], files: Files, read: Read, kind: str) -> QuantizedWeight:
    """The matrices of one product, quantized to a kind while they are read.

    A row's scale is of its largest weight, wherever it is: rows are read whole, and rounded before they are divided.
    """
    device, rounded = files.reading.device, []
    for name in names:
        place, part = files.found[name], files.parts.get(name)
        try:
            if part is None or part.axis == 0:
                rounded.append(quantize_weight(read(place, index_of(part)).to(device), kind))
                continue
            outputs = files.places[name].shape[0]
            step = rows_at_once(part.of) * max(1, _AT_ONCE // (rows_at_once(part.of) * part.of))
            blocks = (read(place, (slice(at, at + step),)).to(device) for at in range(0, outputs, step))
            rounded.append(stack_weights([columns(quantize_weight(x, kind), part.start, part.stop) for x in blocks]))
        except ValueError as error:  # of weights that are not finite
            raise ValueError(f"{place.name} in {place.path.name}: {error}") from error
    return stack_weights(rounded)


def on_device(weight: QuantizedWeight, device: torch.device) -> QuantizedWeight:
    """Returns a quantized weight on a device."""
    how = weight.activations
    if how is not None:
        fixed = {"scale": how.scale, "zero": how.zero}
        how = replace(how, **{name: None if x is None else x.to(device) for name, x in fixed.items()})
    zero = None if weight.zero is None else weight.zero.to(device)
    return replace(weight, codes=weight.codes.to(device), scale=weight.scale.to(device), zero=zero, activations=how)
