"""Tables of contexts for `decode_rows`: the device reads which contexts there are, and where."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvzip.ops.types import Channels, Context, ContextTable, Quantized

_ALIGNMENT = 16  # bytes: the kernel loads 16 at a time


def context_table(like: Sequence[Context], capacity: int, *, biased: bool | None = None) -> ContextTable:
    """Returns an empty table for `capacity` contexts whose layers have the dtypes, bits and groups of those of `like`.

    Args:
        biased: whether contexts may have biases; None: if `like` has them. Without, no kernel looks for them.
    """
    device, heads = like[0].offsets.device, len(like[0].offsets)
    formats = []
    for layer in like:
        bias = None if layer.bias is None or biased is False else layer.bias.new_empty(0)
        if bias is None and biased:
            bias = torch.empty(0, dtype=torch.float32, device=device)
        formats.append(Context(_empty(layer.k), _empty(layer.v), layer.offsets.new_zeros(heads), bias))
    return ContextTable(
        layers=[None] * capacity,
        addresses=torch.zeros((len(like), capacity, 10), dtype=torch.int64, device=device),
        offsets=torch.zeros((len(like), capacity, heads), dtype=torch.int32, device=device),
        formats=tuple(formats),
    )


def put_context_(table: ContextTable, place: int, layers: Sequence[Context]) -> None:
    """Makes `layers` the context at `place` of the table, in place. Nothing is copied but offsets.

    The table keeps the tensors alive. A captured graph that reads the table sees the new context at its next replay;
    the device must not be reading the old one then, which is freed.

    Raises: ValueError if a layer's format is not the table's, or its memory cannot be read 16 bytes at a time.
    """
    if len(layers) != len(table.formats):
        raise ValueError(f"expected {len(table.formats)} layers, got {len(layers)}: the table is for another model")
    layers = tuple(_fit(x, form, layer) for layer, (x, form) in enumerate(zip(layers, table.formats, strict=True)))
    rows = torch.tensor([[x.data_ptr() for x in _tensors(layer)] for layer in layers], dtype=torch.int64)
    table.addresses[:, place] = rows.to(table.addresses.device)
    table.offsets[:, place] = torch.stack([layer.offsets for layer in layers])
    table.layers[place] = layers


def drop_context_(table: ContextTable, place: int) -> None:
    """Takes the context at `place` out of the table, in place; rows that name it see nothing but their tails."""
    table.offsets[:, place] = 0
    table.addresses[:, place] = 0
    table.layers[place] = None


def _fit(layer: Context, form: Context, index: int) -> Context:
    """The layer as kernels read it, with the bias that the table's format asks for."""
    if layer.bias is not None and form.bias is None:
        raise ValueError(f"expected no bias in layer {index}: make the table with biased=True")
    if form.bias is not None:
        rows = len(layer.k.codes if isinstance(layer.k, Quantized) else layer.k)
        bias = form.bias.new_zeros(rows) if layer.bias is None else layer.bias.to(form.bias.dtype)
        layer = replace(layer, bias=bias)
    got, want = ([(str(x.dtype), list(x.shape[1:])) for x in _tensors(c)] for c in (layer, form))
    if got != want or _bits(layer) != _bits(form) or layer.offsets.shape != form.offsets.shape:
        raise ValueError(
            f"expected layer {index} of the table's format {_bits(form)}, {want}, got {_bits(layer)}, {got}: "
            "contexts of a table share dtypes, bits, groups, turning, heads and width"
        )
    for x in _tensors(layer):
        misaligned = x is not layer.offsets and x.numel() > 0 and x.data_ptr() % _ALIGNMENT > 0
        if x.device != form.offsets.device or not x.is_contiguous() or misaligned:
            raise ValueError(
                f"expected layer {index} on {form.offsets.device}, contiguous and aligned to {_ALIGNMENT} bytes, got a "
                f"tensor of shape {list(x.shape)} on {x.device} at {x.data_ptr():#x}: clone it"
            )
    return layer


def _tensors(layer: Context) -> list[Tensor]:
    """The tensors whose addresses a table holds, in its order; `offsets` stands for those that a format lacks."""
    found = []
    for x in (layer.k, layer.v):
        found.append((x.codes, x.scale, x.zero) if isinstance(x, Quantized) else (x, layer.offsets, layer.offsets))
    (k, k_scale, k_zero), (v, v_scale, v_zero) = found
    channels = layer.k.channels if isinstance(layer.k, Quantized) else None
    center, spread = (layer.offsets,) * 2 if channels is None else (channels.center, channels.spread)
    bias = layer.offsets if layer.bias is None else layer.bias
    return [k, v, k_scale, k_zero, v_scale, v_zero, center, spread, bias, layer.offsets]


def _bits(layer: Context) -> list[tuple[int, int, bool] | None]:
    return [(x.bits, x.group, x.turned) if isinstance(x, Quantized) else None for x in (layer.k, layer.v)]


def _empty(x: Tensor | Quantized) -> Tensor | Quantized:
    if isinstance(x, Tensor):
        return x.new_empty((0, *x.shape[1:]))
    channels = x.channels
    if channels is not None:
        channels = Channels(torch.empty_like(channels.center), torch.empty_like(channels.spread))
    return replace(x, codes=_empty(x.codes), scale=_empty(x.scale), zero=_empty(x.zero), channels=channels)
