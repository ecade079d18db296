"""Contexts as the device reads them: one table for each format, with places that are taken and given back."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..cache import RaggedCache, all_ragged
from ..models import Model
from ..ops import Context, ContextTable, Quantized, context_table, drop_context_, put_context_

_ALIGNMENT = 16  # bytes, as `put_context_` wants them
_FIRST = 8  # places of a new table


@dataclass
class Tables:
    """A table for each format of contexts. `versions[t]` changes when table t is another object than before.

    Table 0 is for rows of the model's own dtype without biases. Rows without a context go there too.
    """

    formats: dict[tuple, int] = field(default_factory=dict)
    tables: list[ContextTable] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)


def make_tables(model: Model) -> Tables:
    """Returns tables with an empty one for the model's own dtype."""
    config, device = model.config, model.device
    none = torch.empty((0, config.head_dim), dtype=model.dtype, device=device)
    offsets = torch.zeros(config.num_kv_heads + 1, dtype=torch.int32, device=device)
    tables = Tables()
    _table_of(tables, tuple(Context(none, none, offsets) for _ in config.layers))
    return tables


def enter_(tables: Tables, cache: RaggedCache) -> tuple[int, int]:
    """Puts a cache's context into the table of its format; returns which table, and the place in it.

    Nothing is copied but offsets, and rows that the kernels could not read where they are.
    """
    layers = layers_of(cache)
    number = _table_of(tables, layers)
    table = tables.tables[number]
    if None not in table.layers:
        table = tables.tables[number] = _grown(table, layers)
        tables.versions[number] += 1
    place = table.layers.index(None)
    put_context_(table, place, layers)
    return number, place


def leave_(tables: Tables, number: int, place: int) -> None:
    """Takes a context out of its table. Steps that read it must have ended."""
    drop_context_(tables.tables[number], place)


def layers_of(cache: RaggedCache) -> tuple[Context, ...]:
    """Returns the layers of a cache as `ops` take them, contiguous and aligned."""
    found = []
    for layer in all_ragged(cache.context):
        k, v = (_readable(x) if isinstance(x, Tensor) else _readable_codes(x) for x in (layer.k, layer.v))
        bias = None if layer.bias is None else _readable(layer.bias)
        found.append(Context(k, v, layer.offsets.contiguous(), bias))
    return tuple(found)


def _table_of(tables: Tables, layers: tuple[Context, ...]) -> int:
    form = tuple(_format(layer) for layer in layers)
    if form not in tables.formats:
        tables.formats[form] = len(tables.tables)
        tables.tables.append(context_table(layers, _FIRST))
        tables.versions.append(0)
    return tables.formats[form]


def _grown(table: ContextTable, like: tuple[Context, ...]) -> ContextTable:
    grown = context_table(like, 2 * len(table.layers))
    for place, layers in enumerate(table.layers):
        if layers is not None:
            put_context_(grown, place, layers)
    return grown


def _format(layer: Context) -> tuple:
    """What contexts of one table share."""
    rows = [
        (x.dtype,)
        if isinstance(x, Tensor)
        else (x.bits, x.group, x.turned, x.scale.dtype, x.zero.dtype, x.channels is not None)
        for x in (layer.k, layer.v)
    ]
    return (*rows, None if layer.bias is None else layer.bias.dtype)


def _readable(x: Tensor) -> Tensor:
    x = x.contiguous()
    return x.clone() if x.numel() and x.data_ptr() % _ALIGNMENT else x


def _readable_codes(x: Quantized) -> Quantized:
    channels = x.channels
    if channels is not None:
        channels = type(channels)(_readable(channels.center), _readable(channels.spread))
    return replace(x, codes=_readable(x.codes), scale=_readable(x.scale), zero=_readable(x.zero), channels=channels)
