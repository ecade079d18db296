"""Reading a cache: each tensor is checked against the schema, the header and the others before it is used."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..checks import check_path
from ..display import visible_line
from ..files import schema
from ..files.damage import Damaged, refusing, require
from ..files.header import OpenFile, open_file
from ..files.shared import SharedSums
from ..files.tensors import DTYPES, read_tensor, staging
from ..ops import Channels, Quantized, decode_schedule
from ..parallel import Share, together
from .caches import DenseCache, RaggedCache
from .parts import DenseKV, RaggedKV, Scores, Tail, WindowKV
from .score_codes import MOST


@runtime_checkable
class BelongsTo(Protocol):
    """What `load_cache` needs from a model."""

    @property
    def config(self) -> Any: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...


@contextmanager
def open_cache(path: str | Path) -> Iterator[OpenFile]:
    """Opens a cache's file and checks its header. Raises as `read_header` does, and ValueError for other kinds."""
    check_path(path, "path")
    with open_file(path) as file:
        check_content(file)
        yield file


def check_content(file: OpenFile) -> None:
    """Raises ValueError for a file that holds no cache."""
    kind = file.header["cache"]
    if not schema.is_cache(file.header):
        other = f"use {schema.OTHERS[kind]}" if kind in schema.OTHERS else "name a file that kvzip.save wrote"
        raise ValueError(f"expected a cache, got {kind!r} without pairs in {visible_line(file.path.name)}: {other}")


def read_cache(
    file: OpenFile,
    *,
    model: BelongsTo | None = None,
    device: torch.device | str | None = None,
    pairs: bool = True,
) -> DenseCache | RaggedCache:
    """Returns the cache of a file that `open_cache` opened, as `load_cache` does."""
    if model is not None:
        reason = schema.foreign(file.header["fingerprint"], model.fingerprint)
        if reason:
            raise ValueError(f"expected a cache of this model, got {visible_line(file.path.name)} of another: {reason}")
    if device is None:
        device = "cpu" if model is None else model.device
    torch.empty(0, device=device)  # outside of `refusing`: a missing device is not damage of the file
    with refusing(file.path):
        share: Share | None = getattr(model, "share", None)
        with together(share):
            sums = None if share is None else SharedSums(share)
            cache = _Reader(file, str(device), pairs, staging(device), sums).cache()
            if model is not None:
                _check_fits(cache, model)
        if sums is not None:
            sums.check(file)
        return cache


def read_texts(file: OpenFile) -> dict[int, bytes]:
    """Returns the texts of tokens in a file that `open_cache` opened, as `read_pieces` does."""
    with refusing(file.path):
        reader = _Reader(file)
        return reader.texts(reader.token_ids())


def _check_fits(cache: DenseCache | RaggedCache, model: BelongsTo) -> None:
    """Raises Damaged unless the model can read the cache. The fingerprint proves nothing: anyone can write it."""
    config, layers, length = model.config, cache.context, cache.context_length
    windows = [spec.window is not None for spec in config.layers]
    require([isinstance(layer, WindowKV) for layer in layers] == windows, "other layers than the model's")
    sizes = (cache.heads, layers[0].width)
    require(sizes == (config.num_kv_heads, config.head_dim), f"{sizes[0]} heads of width {sizes[1]}")
    for layer, spec in zip(layers, config.layers, strict=True):
        if isinstance(layer, WindowKV):  # one row less in a cache that Transformers made
            rows = layer.k.shape[2]
            require(min(length, spec.window - 1) <= rows <= spec.window, f"{rows} rows in a window of {spec.window}")
    tail = () if cache.tail is None else (*cache.tail.k, *cache.tail.v)
    rows = [x for layer in layers for x in (layer.k, layer.v) if isinstance(x, Tensor)]
    require(all(x.dtype == model.dtype for x in (*rows, *tail)), f"pairs that are not in {model.dtype}")
    largest = int(cache.token_ids.max()) if len(cache.token_ids) else 0
    require(largest < config.vocab_size, f"token {largest} of a vocabulary of {config.vocab_size}")


@dataclass(frozen=True)
class _Reader:
    """Reads the parts of one file."""

    file: OpenFile
    device: str = "cpu"
    pairs_too: bool = True
    scratch: Tensor | None = None
    sums: SharedSums | None = None  # of a rank that reads its heads alone

    @property
    def share(self) -> Share | None:
        return None if self.sums is None else self.sums.share

    @property
    def header(self) -> dict[str, Any]:
        return self.file.header

    def take(
        self,
        name: str,
        sizes: Mapping[str, int] | None = None,
        *,
        of: str = "",
        like: Tensor | None = None,
        own: slice | None = None,
    ) -> Tensor:
        """The tensor of that name, checked against the schema before it is read.

        Args:
            sizes: of axes, by their names in the schema; others may have any size.
            of: the kind of layer.
            like: a tensor of the same shape and dtype, of which as much was read.
            own: the part to read, along heads or rows.
        """
        require(name in self.file.tensors, f"no tensor {name}")
        place = self.file.tensors[name]
        shape, dtype = place.shape, DTYPES[place.dtype]
        fits = schema.fits(name, of, place.dtype, shape, sizes or {})
        part = shape
        if own is not None:
            at = 1 if len(shape) == 4 else 0
            part = (*shape[:at], own.stop - own.start, *shape[at + 1 :])
        fits = fits and (like is None or (part, dtype) == (tuple(like.shape), like.dtype))
        require(fits, f"{name} of shape {list(shape)} and {dtype}")
        if not self.pairs_too and {"k", "v"} & {*name.split(".")}:
            return torch.empty(part, dtype=dtype, device="meta")
        if own is not None:
            assert self.sums is not None
            return self.sums.read(self.file, name, own.start, own.stop, self.device)
        if name == "token_ids" or name.startswith("pieces."):
            return read_tensor(self.file, name)
        return read_tensor(self.file, name, self.device, scratch=self.scratch)

    def cache(self) -> DenseCache | RaggedCache:
        header, token_ids = self.header, self.token_ids()
        length, start = header["length"], header["start"]
        self.texts(token_ids)
        layers: list[Any] = [self.layer(f"layers.{n}", spec) for n, spec in enumerate(header["layers"])]
        require(len(layers) > 0, "no layers")
        widths = {layer.width for layer in layers}
        require(len(widths) == 1 and min(widths) > 0, f"heads of widths {sorted(widths)}")
        heads = {layer.heads for layer in layers}
        require(len(heads) == 1 and min(heads) > 0, "layers with other numbers of heads")
        windows = {layer.start for layer in layers if isinstance(layer, WindowKV)}
        require(len(windows) <= 1, "windows of different lengths")
        common: dict[str, Any] = {name: header[name] for name in ("start", "chat", "fingerprint")}
        common |= {"token_ids": token_ids, "scores": self.scores(layers), "share": self.share}
        kinds = {type(layer) for layer in layers}
        if header["cache"] == "DenseCache":
            require(not header["tail"], "a tail in a dense cache")
            require(RaggedKV not in kinds, "ragged layers in a dense cache")
            cache: DenseCache | RaggedCache = DenseCache(layers=layers, length=length, **common)
            after, rows, pairs = 0, cache.total, cache.total
        else:
            require(DenseKV not in kinds, "dense layers in a ragged cache")
            tail = self.tail(layers) if header["tail"] else None
            more = {name: header[name] for name in ("kept", "total", "method")}
            cache = RaggedCache(context=tuple(layers), tail=tail, context_length=length, **common, **more)
            after = int(tail.lengths[0]) if tail is not None else 0
            ragged = [n for n, layer in enumerate(layers) if isinstance(layer, RaggedKV)]
            held = [self.file.tensors[f"layers.{n}.positions"].shape[0] for n in ragged]
            rows = sum(held) - len(ragged) * start * cache.all_heads
            pairs = (length - start) * len(ragged) * cache.all_heads
        require(len(token_ids) == length + after, "token ids and lengths differ")
        kept, total = header["kept"], header["total"]
        require((rows, pairs) == (kept, total), f"{rows} of {pairs} pairs, {kept} of {total} by the header")
        return cache

    def token_ids(self) -> Tensor:
        token_ids = self.take("token_ids", {"tokens": self.header["tokens"]})
        require(not len(token_ids) or int(token_ids.min()) >= 0, "a negative token id")
        return token_ids

    def texts(self, token_ids: Tensor) -> dict[int, bytes]:
        """The bytes of each different token of `token_ids`; empty where the file has none."""
        count = self.header.get("pieces")
        if count is None:
            return {}
        ids = self.take("pieces.ids", {"P": count})
        require(torch.equal(ids, token_ids.unique()), "pieces of other tokens")
        offsets = self.take("pieces.offsets", {"P + 1": count + 1})
        text = self.take("pieces.bytes").numpy().tobytes()
        require(int(offsets[0]) == 0 and int(offsets[-1]) == len(text), "pieces and their bytes differ in length")
        require(bool((offsets.diff() >= 0).all()), "offsets of pieces decrease")
        bounds = offsets.tolist()
        return {i: text[a:b] for i, a, b in zip(ids.tolist(), bounds, bounds[1:], strict=False)}

    def layer(self, name: str, spec: dict[str, Any]) -> DenseKV | WindowKV | RaggedKV:
        kind, length = spec["kind"], self.header["length"]
        if kind == "RaggedKV":
            return self.ragged(name, spec)
        require(kind in ("DenseKV", "WindowKV"), f"a layer of kind {kind!r}")
        own = self.heads(f"{name}.k")
        k = self.take(f"{name}.k", {"length": length}, of=kind, own=own)
        v = self.take(f"{name}.v", of=kind, like=k, own=own)
        if kind == "DenseKV":
            return DenseKV(k, v)
        first = length - k.shape[2]
        require(spec.get("start") == first, f"the window of {name} does not end at token {length}")
        return WindowKV(k, v, first)

    def heads(self, name: str, axis: int = 1, more: int = 0) -> slice | None:
        """The heads to read of a tensor; None for all. Raises Damaged for other heads than the model's."""
        share = self.share
        if share is None or name not in self.file.tensors:  # `take` says that it is missing
            return None
        shape = self.file.tensors[name].shape
        held = shape[axis] - more if len(shape) > axis else 0
        require(held == share.heads, f"{held} heads in {name}, not the model's {share.heads}")
        return share.own

    def ragged(self, name: str, spec: dict[str, Any]) -> RaggedKV:
        start, length = self.header["start"], self.header["length"]
        offsets, heads = self.take(f"{name}.offsets"), self.heads(f"{name}.offsets", 0, 1)
        place = self.file.tensors.get(f"{name}.positions")
        count, own = 0 if place is None else place.shape[0], None
        require(len(offsets) > 1 and int(offsets[0]) == 0 and int(offsets[-1]) == count, f"offsets of {name}")
        require(bool((offsets.diff() >= 0).all()), f"offsets of {name} decrease")
        if heads is not None:
            offsets = offsets[heads.start : heads.stop + 1]
            own = slice(int(offsets[0]), int(offsets[-1]))
            offsets = offsets - offsets[0]
        positions = self.take(f"{name}.positions", own=own)
        k = self.rows(f"{name}.k", spec, spec.get("bits"), count, own)
        value_bits = spec.get("value_bits")
        v = self.rows(f"{name}.v", spec, spec.get("bits") if value_bits is None else value_bits, count, own)
        for part in ("center", "spread"):
            stored = f"{name}.k.{part}" in self.file.tensors
            require(stored == bool(spec.get("channels")), f"{part} of {name}.k, of which the header says otherwise")
        if spec.get("channels"):
            if not isinstance(k, Quantized):
                raise Damaged(f"channels of {name}, which is not quantized")
            sizes = {"D": k.width} if heads is not None else {"H": len(offsets) - 1, "D": k.width}
            k = replace(k, channels=self.channels(f"{name}.k", sizes, heads))
        widths = [x.shape[-1] if isinstance(x, Tensor) else x.width for x in (k, v)]
        require(widths[0] == widths[1], f"k and v of {name} differ in width")
        if len(positions):
            inside = int(positions.min()) >= 0 and int(positions.max()) < length
            require(inside, f"positions of {name} outside of {length} tokens")
            firsts = torch.zeros(len(positions) + 1, dtype=torch.bool, device=offsets.device)
            firsts[offsets.long()] = True
            require(bool((firsts[1:-1] | (positions.diff() > 0)).all()), f"positions of {name} out of order")
        if start:  # kernels take the first `start` rows of a head for the prefix
            require(int(offsets.diff().min()) >= start, f"a head of {name} without the {start} tokens of the prefix")
            prefix = torch.arange(start, dtype=torch.int32, device=offsets.device)
            whole = positions[offsets[:-1, None] + prefix] == prefix
            require(bool(whole.all()), f"the prefix of {name} is not whole")
        return RaggedKV(k, v, offsets, positions, decode_schedule(offsets), self.bias(name, spec, len(positions)))

    def bias(self, name: str, spec: dict[str, Any], count: int) -> Tensor | None:
        name = f"{name}.bias"
        require((name in self.file.tensors) == bool(spec.get("bias")), f"{name}, of which the header says otherwise")
        if not spec.get("bias"):
            return None
        bias = self.take(name, {"rows": count})
        require(bool(bias.isfinite().all()), f"{name} that is not finite")
        return bias

    def rows(
        self, name: str, spec: dict[str, Any], bits: int | None, count: int, own: slice | None
    ) -> Tensor | Quantized:
        group = spec.get("group") or 0
        if bits is None:
            return self.take(name, {"rows": count}, of="RaggedKV", own=own)
        turned = f"{name}.turned" in self.file.tensors
        require(not (turned and f"{name}.codes" in self.file.tensors), f"{name} as codes and turned")
        require(not turned or bits in (4, 2), f"{name} of {bits} bits turned")
        codes = self.take(f"{name}.{'turned' if turned else 'codes'}", {"rows": count}, own=own)
        width = codes.shape[1] * 8 // bits if bits in (8, 4, 2) else 0
        whole = group > 0 and width > 0 and width % group == 0 and group % (8 // bits) == 0
        require(whole, f"{name} of {bits} bits in groups of {group}")
        scale = self.take(f"{name}.scale", {"rows": count, "D / group": width // group}, own=own)
        zero = self.take(f"{name}.zero", like=scale, own=own)
        finite = scale.is_meta or bool(scale.isfinite().all() and zero.isfinite().all())
        require(finite, f"scales of {name} that are not finite")
        return Quantized(codes, scale, zero, bits, group, turned=turned)

    def channels(self, name: str, sizes: dict[str, int], own: slice | None) -> Channels:
        parts = (f"{name}.{part}" for part in ("center", "spread"))
        center, spread = (self.take(x, sizes, own=own and self.heads(x, 0)) for x in parts)
        fit = center.is_meta or bool(center.isfinite().all() and spread.isfinite().all() and (spread > 0).all())
        require(fit, f"channels of {name} that are no numbers or not above 0")
        return Channels(center, spread)

    def tail(self, layers: list[Any]) -> Tail:
        sizes = {} if self.share is not None else {"H": layers[0].heads}
        names = [f"tail.k.{n}" for n in range(len(layers))]
        k = tuple(
            self.take(name, {**sizes, "D": x.width}, own=self.heads(name))
            for name, x in zip(names, layers, strict=True)
        )
        v = tuple(self.take(f"tail.v.{n}", like=x, own=self.heads(f"tail.v.{n}")) for n, x in enumerate(k))
        lengths = self.take("tail.lengths")
        require(all(0 <= int(lengths[0]) <= x.shape[2] for x in k), "the tail is longer than its rows")
        require(len({x.dtype for x in k}) == 1, "the tail has other dtypes in other layers")
        return Tail(k, v, lengths)

    def scores(self, layers: list[Any]) -> Scores | None:
        spec, start, length = self.header.get("scores"), self.header["start"], self.header["length"]
        if spec is None:
            return None
        scored = [n for n, layer in enumerate(layers) if not isinstance(layer, WindowKV)]
        require(spec["layers"] == scored and (spec["start"], spec["stop"]) == (start, length), "scores of other tokens")
        require(spec.get("bits") in (None, 8), f"scores of {spec.get('bits')!r} bits")
        heads = layers[0].heads if self.share is None else self.share.heads
        sizes = {"L": len(scored), "H": heads, "length - start": length - start}
        if spec.get("bits") is None:
            values = self.take("scores.values", sizes)
        else:
            codes, levels = self.take("scores.codes", sizes), self.take("scores.levels")
            require(0 < len(levels) <= MOST and not bool(levels.isnan().any()), f"{len(levels)} levels of scores")
            require(bool((levels.diff() > 0).all()), "levels of scores that do not ascend")
            require(not codes.numel() or int(codes.max()) < len(levels), "scores above the highest level")
            values = torch.stack([levels[layer.int()] for layer in codes])
        return Scores(values, tuple(scored), start, length, spec["source"])
