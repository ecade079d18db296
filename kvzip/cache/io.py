"""Caches as files: what each tensor and each entry of the header means, and what must fit together.

Tensors are named after the fields that hold them (`layers.3.k`, `tail.k.3`, `scores.values`); everything else is one
JSON object in the file's metadata under "kvzip". Nothing is ever unpickled.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..checks import check_path, check_values
from ..display import visible_line
from ..ops import Channels, Quantized, decode_schedule
from ..prompts import token_bytes
from .caches import DenseCache, RaggedCache, check_pairs
from .files import Bad, OpenFile, open_file, outline, read_tensor, refusing, require, staging, write_file
from .levels import LEVELS, encode_levels
from .parts import DenseKV, RaggedKV, Scores, Tail, WindowKV

_OTHERS = {"Scores": "kvzip.scores.load", "HeadScores": "kvzip.head_scores.load"}  # files that hold no cache
_CACHES = ("RaggedCache", "DenseCache")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PAIRS = re.compile(r"layers\.\d+\.[kv]|tail\.[kv]\.\d+|layers\.\d+\.[kv]\.(codes|scale|zero|center|spread)")
_KINDS = {"fingerprint": str, "method": str, "chat": bool, "tail": bool, "layers": list}  # of a cache's header
_NAMES = tuple(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
_COUNTS = ("length", "start", "tokens", "kept", "total")


@runtime_checkable
class BelongsTo(Protocol):
    """What `load_cache` asks of a model."""

    @property
    def config(self) -> Any: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...


@runtime_checkable
class Origin(BelongsTo, Protocol):
    """What `save` asks of a model that a file shall name."""

    @property
    def source(self) -> str: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def rope(self) -> Mapping[str, Any] | None: ...
    @property
    def max_length(self) -> int | None: ...


def save(
    cache: DenseCache | RaggedCache,
    path: str | Path,
    *,
    note: Mapping[str, Any] | None = None,
    model: Origin | None = None,
    score_bits: int = 32,
    overwrite: bool = False,
) -> None:
    """Writes the cache to one file: under another name first, then renamed, so a crash leaves the old file or the new.

    A process that is killed meanwhile leaves what it wrote in a hidden file beside it, which may be deleted.

    Args:
        note: anything that JSON can hold, for the header.
        model: the cache's own. The header then says under "model" where it came from (a local directory by its
            absolute path) and with which dtype, max_length and rope it was loaded, and the file holds the text of each
            token, so that it can be read without it.
        score_bits: 32 keeps scores exact, so that a dense cache can be compressed at any ratio as before; 8 rounds
            them down to at most 256 levels (`levels.encode_levels`), a quarter of the bytes.
        overwrite: replaces a file that kvzip wrote. Any other file is left as it is, always.

    Raises: ValueError for a consumed cache, one of another model, another number of bits, or NaN scores in 8 bits;
        TypeError for what is no cache, or a note that JSON cannot hold; FileExistsError for a file that is there and
        must not be replaced; OSError if it cannot be written.
    """
    check_pairs(cache)
    check_path(path, "path")
    if score_bits not in (32, 8):
        raise ValueError(f"expected score_bits of 32 or 8, got {score_bits}: 32 is exact")
    if cache.scores is not None:
        check_values(cache.scores.values, "scores")
    tensors, header = _describe(cache, score_bits)
    if model is not None:
        if not isinstance(model, Origin):
            raise TypeError(f"expected a model that kvzip.load made, got {type(model).__name__}: pass the cache's own")
        reason = foreign(cache.fingerprint, model.fingerprint)
        if reason:
            raise ValueError(f"expected the model that made the cache, got another: {reason}")
        header["model"] = {
            "source": _absolute(model.source),
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_length": model.max_length,
            "rope": model.rope,
        }
        if model.tokenizer is not None:
            tensors |= _pieces(model.tokenizer, cache.token_ids)
            header["pieces"] = len(tensors["pieces.ids"])
    write_file(path, tensors, header, note=note, overwrite=overwrite)


def read_header(path: str | Path) -> dict[str, Any]:
    """Returns what a file says of itself, without reading its pairs.

    Raises: FileNotFoundError; OSError for a file that may not be read; ValueError for one that is damaged, not kvzip's,
        of another major version, or no file; for entries of a cache's header that have another type than they must.
    """
    with open_file(path) as file:
        return check_header(file)


def load_cache(
    path: str | Path,
    *,
    model: BelongsTo | None = None,
    device: torch.device | str | None = None,
    pairs: bool = True,
) -> DenseCache | RaggedCache:
    """Returns the cache of a file that `save` wrote.

    Args:
        model: the model that it must belong to, if given.
        device: where its tensors go; None takes the model's, or the CPU.
        pairs: False leaves the keys and values in the file: they have their shapes and dtypes, on torch's meta device.
            Lengths, offsets, positions, token ids and scores are read, which say what is kept of what.

    Raises: FileNotFoundError; OSError for a file that may not be read; ValueError for a file of another model or dtype,
        of another major version, with a tensor that differs from its checksum, or whose lengths, offsets, dtypes or
        positions do not fit together, or the model; torch.OutOfMemoryError; what torch raises for a device that is not
        there.
    """
    check_path(path, "path")
    if model is not None and not isinstance(model, BelongsTo):
        raise TypeError(f"expected a model that kvzip.load made, got {type(model).__name__}: kvzip.open(path) loads it")
    with open_cache(path) as file:
        return read_cache(file, model=model, device=device, pairs=pairs)


@contextmanager
def open_cache(path: str | Path) -> Iterator[OpenFile]:
    """Gives a file that `save` wrote, open, its header checked. Raises as `read_header` does, and for other kinds."""
    with open_file(path) as file:
        check_header(file)
        check_content(file)
        yield file


def read_cache(
    file: OpenFile,
    *,
    model: BelongsTo | None = None,
    device: torch.device | str | None = None,
    pairs: bool = True,
) -> DenseCache | RaggedCache:
    """Returns the cache of a file that `open_cache` opened, as `load_cache` does."""
    if model is not None:
        reason = foreign(file.header["fingerprint"], model.fingerprint)
        if reason:
            raise ValueError(f"expected a cache of this model, got {visible_line(file.path.name)} of another: {reason}")
    if device is None:
        device = "cpu" if model is None else model.device
    torch.empty(0, device=device)  # a device that is not there is no fault of the file
    with refusing(file.path):
        cache = _Reader(file, str(device), pairs, staging(device)).cache(file.header)
        if model is not None:
            _check_fits(cache, model)
        return cache


def read_pieces(path: str | Path) -> dict[int, bytes]:
    """Returns the UTF-8 of each different token of a file, by id; a token may begin or end within a character.

    Empty for a file that was saved without `model`.

    Raises: as `load_cache` does.
    """
    with open_cache(path) as file:
        return pieces_of(file)


def pieces_of(file: OpenFile) -> dict[int, bytes]:
    """Returns the pieces of a file that `open_cache` opened, as `read_pieces` does."""
    with refusing(file.path):
        reader = _Reader(file)
        return reader.pieces(file.header, reader.token_ids(file.header))


def foreign(found: str, expected: str) -> str:
    """Returns why something of one fingerprint does not belong to a model of another; empty if it does.

    A fingerprint is "identity-dtype", so that a model in another dtype is told from another model.
    """
    if found == expected:
        return ""
    (identity, _, theirs), (own, _, ours) = (x.rpartition("-") for x in (found, expected))
    if identity and identity == own and theirs in _NAMES:
        return f"its pairs are {theirs}, the model is {ours}: load the model in {theirs}"
    return (
        f"its fingerprint is {visible_line(found, limit=300)!r}, the model's {expected!r}: take the model that made it"
    )


def is_cache(header: Mapping[str, Any]) -> bool:
    """Returns whether a file of this header holds pairs."""
    return header["cache"] in _CACHES


def check_content(file: OpenFile) -> None:
    """Raises ValueError for a file that holds no cache."""
    kind = file.header["cache"]
    if not is_cache(file.header):
        other = f"use {_OTHERS[kind]}" if kind in _OTHERS else "name a file that kvzip.save wrote"
        raise ValueError(f"expected a cache, got {kind!r} without pairs in {visible_line(file.path.name)}: {other}")


def check_header(file: OpenFile) -> dict[str, Any]:
    """Returns the header of an open file. Raises ValueError if it is a cache's and its entries have other types."""
    header = file.header
    if not is_cache(header):
        return header
    with refusing(file.path):
        for key in _COUNTS:
            _count(header, key)
        for key, kind in _KINDS.items():
            require(type(header[key]) is kind, f"{key} is {header[key]!r}")
        require(header["start"] <= header["length"] <= header["tokens"], "start, length and tokens in another order")
        require(header["ratio"] == _ratio(header["kept"], header["total"]), "ratio is not kept / total")
        for spec in header["layers"]:
            require(isinstance(spec, dict) and isinstance(spec["kind"], str), f"a layer {spec!r}")
        for key in ("scores", "model"):
            require(header.get(key) is None or isinstance(header[key], dict), f"{key} is {header.get(key)!r}")
        origin = header.get("model")
        if origin is not None:
            length, rope = origin.get("max_length"), origin.get("rope")
            require(isinstance(origin["source"], str) and origin["dtype"] in _NAMES, f"model is {origin!r}")
            require(length is None or (type(length) is int and 0 < length < 1 << 31), f"max_length is {length!r}")
            require(rope is None or isinstance(rope, dict), f"rope is {rope!r}")
    return header


def _check_fits(cache: DenseCache | RaggedCache, model: BelongsTo) -> None:
    """Raises Bad unless the model can read the cache: a fingerprint is a word that anyone can write."""
    config = model.config
    layers = cache.layers if isinstance(cache, DenseCache) else cache.context
    length = cache.length if isinstance(cache, DenseCache) else cache.context_length
    windows = [spec.window is not None for spec in config.layers]
    require([isinstance(layer, WindowKV) for layer in layers] == windows, "other layers than the model's")
    sizes = (layers[0].heads, layers[0].width)
    require(sizes == (config.num_kv_heads, config.head_dim), f"{sizes[0]} heads of width {sizes[1]}")
    for layer, spec in zip(layers, config.layers, strict=True):
        if isinstance(layer, WindowKV):  # one row less in a cache that Transformers made
            rows = layer.k.shape[2]
            require(min(length, spec.window - 1) <= rows <= spec.window, f"{rows} rows in a window of {spec.window}")
    tail = () if isinstance(cache, DenseCache) or cache.tail is None else (*cache.tail.k, *cache.tail.v)
    rows = [x for layer in layers for x in (layer.k, layer.v) if isinstance(x, Tensor)]
    require(all(x.dtype == model.dtype for x in (*rows, *tail)), f"pairs that are not in {model.dtype}")
    largest = int(cache.token_ids.max()) if len(cache.token_ids) else 0
    require(largest < config.vocab_size, f"token {largest} of a vocabulary of {config.vocab_size}")


def _ratio(kept: int, total: int) -> float:
    return kept / total if total else 1.0


def _absolute(source: str) -> str:
    """Where a model can be found from any directory."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.is_dir() else source


def _pieces(tokenizer: Any, token_ids: Tensor) -> dict[str, Tensor]:
    """The text of each different token: ids ascending, and their bytes one after the other between offsets."""
    ids = token_ids.unique()
    parts = token_bytes(tokenizer, ids.tolist())
    offsets = torch.tensor([0, *map(len, parts)]).cumsum(0)
    text = torch.frombuffer(bytearray(b"".join(parts) or b"\0"), dtype=torch.uint8)[: int(offsets[-1])]
    return {"pieces.ids": ids, "pieces.offsets": offsets, "pieces.bytes": text}


def _describe(cache: DenseCache | RaggedCache, score_bits: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {"token_ids": cache.token_ids}
    dense = isinstance(cache, DenseCache)
    layers = cache.layers if dense else cache.context
    described = []
    for index, layer in enumerate(layers):
        kind: dict[str, Any] = {"kind": type(layer).__name__}
        for name in ("k", "v"):
            x = getattr(layer, name)
            if isinstance(x, Quantized):
                kind |= {"bits": x.bits, "group": x.group}
                tensors |= {f"layers.{index}.{name}.{part}": getattr(x, part) for part in ("codes", "scale", "zero")}
                if x.channels is not None:
                    kind["channels"] = True
                    channels = {part: getattr(x.channels, part) for part in ("center", "spread")}
                    tensors |= {f"layers.{index}.{name}.{part}": tensor for part, tensor in channels.items()}
            else:
                tensors[f"layers.{index}.{name}"] = x
        if isinstance(layer, RaggedKV):
            tensors |= {f"layers.{index}.offsets": layer.offsets, f"layers.{index}.positions": layer.positions}
        if isinstance(layer, WindowKV):
            kind["start"] = layer.start
        described.append(kind)
    header = {
        "cache": type(cache).__name__,
        "fingerprint": cache.fingerprint,
        "length": cache.length if dense else cache.context_length,
        "start": cache.start,
        "chat": cache.chat,
        "tokens": len(cache.token_ids),
        "kept": cache.kept,
        "total": cache.total,
        "ratio": _ratio(cache.kept, cache.total),
        "method": cache.method if not dense else cache.scores.source if cache.scores else "",
        "layers": described,
        "tail": not dense and cache.tail is not None,
        "scores": None,
    }
    if not dense and cache.tail is not None:
        tensors["tail.lengths"] = cache.tail.lengths
        for name in ("k", "v"):
            tensors |= {f"tail.{name}.{n}": x for n, x in enumerate(getattr(cache.tail, name))}
    if cache.scores is not None:
        header["scores"] = {f.name: getattr(cache.scores, f.name) for f in fields(Scores) if f.name != "values"}
        if score_bits == 8:
            header["scores"]["bits"] = 8
            tensors["scores.codes"], tensors["scores.levels"] = encode_levels(cache.scores.values)
        else:
            tensors["scores.values"] = cache.scores.values
    return tensors, header


@dataclass(frozen=True)
class _Reader:
    """Reads one file's tensors and checks each against the header and the others before it is used."""

    file: OpenFile
    device: str = "cpu"
    pairs_too: bool = True
    scratch: Tensor | None = None

    def cache(self, header: dict[str, Any]) -> DenseCache | RaggedCache:
        length, start, kept, total = (header[name] for name in ("length", "start", "kept", "total"))
        token_ids = self.token_ids(header)
        self.pieces(header, token_ids)
        layers: list[Any] = [self.layer(n, spec, start, length) for n, spec in enumerate(header["layers"])]
        require(len(layers) > 0, "no layers")
        widths = {layer.width for layer in layers}
        require(len(widths) == 1 and min(widths) > 0, f"heads of widths {sorted(widths)}")
        heads = {layer.heads for layer in layers}
        require(len(heads) == 1 and min(heads) > 0, "layers with other numbers of heads")
        windows = {layer.start for layer in layers if isinstance(layer, WindowKV)}
        require(len(windows) <= 1, "windows of different lengths")
        scores = None if header.get("scores") is None else self.scores(header["scores"], layers, start, length)
        common: dict[str, Any] = {
            "start": start,
            "chat": header["chat"],
            "token_ids": token_ids,
            "scores": scores,
            "fingerprint": header["fingerprint"],
        }
        if header["cache"] == "DenseCache":
            require(len(token_ids) == length and not header["tail"], "token ids and length differ")
            require(all(isinstance(layer, (DenseKV, WindowKV)) for layer in layers), "ragged layers in a dense cache")
            cache = DenseCache(layers=layers, length=length, **common)
            require((kept, total) == (cache.kept, cache.total), "kept and total differ from the pairs held")
            return cache
        require(all(isinstance(layer, (RaggedKV, WindowKV)) for layer in layers), "dense layers in a ragged cache")
        tail = self.tail(layers) if header["tail"] else None
        tail_length = int(tail.lengths[0]) if tail is not None else 0
        require(len(token_ids) == length + tail_length, "token ids and lengths differ")
        ragged = [layer for layer in layers if isinstance(layer, RaggedKV)]
        rows = sum(len(layer.positions) - start * layer.heads for layer in ragged)
        pairs = (length - start) * sum(layer.heads for layer in ragged)
        require((rows, pairs) == (kept, total), f"{rows} of {pairs} pairs, {kept} of {total} by the header")
        return RaggedCache(
            context=tuple(layers),
            tail=tail,
            context_length=length,
            kept=kept,
            total=total,
            method=header["method"],
            **common,
        )

    def token_ids(self, header: dict[str, Any]) -> Tensor:
        token_ids = self.take("token_ids", (header["tokens"],), torch.int64, device="cpu")
        require(not len(token_ids) or int(token_ids.min()) >= 0, "a negative token id")
        return token_ids

    def pieces(self, header: dict[str, Any], token_ids: Tensor) -> dict[int, bytes]:
        """The bytes of each different token of `token_ids`; empty where the file has none."""
        if header.get("pieces") is None:
            return {}
        count = _count(header, "pieces")
        ids = self.take("pieces.ids", (count,), torch.int64, device="cpu")
        require(torch.equal(ids, token_ids.unique()), "pieces of other tokens")
        offsets = self.take("pieces.offsets", (count + 1,), torch.int64, device="cpu")
        text = self.take("pieces.bytes", (None,), torch.uint8, device="cpu").numpy().tobytes()
        require(int(offsets[0]) == 0 and int(offsets[-1]) == len(text), "pieces and their bytes differ in length")
        require(bool((offsets.diff() >= 0).all()), "offsets of pieces decrease")
        bounds = offsets.tolist()
        return {i: text[a:b] for i, a, b in zip(ids.tolist(), bounds, bounds[1:], strict=False)}

    def take(self, name: str, shape: tuple[int | None, ...], *dtypes: torch.dtype, device: str | None = None) -> Tensor:
        """The tensor of that name, if it has the shape (None is any size) and one of the dtypes; or it is not read."""
        require(name in self.file.tensors, f"no tensor {name}")
        place = self.file.tensors[name]
        fits = len(place.shape) == len(shape) and all(n in (None, m) for n, m in zip(shape, place.shape, strict=True))
        require(fits and place.dtype in dtypes, f"{name} of shape {list(place.shape)} and {place.dtype}")
        if _PAIRS.fullmatch(name) and not self.pairs_too:
            return outline(self.file, name)
        return read_tensor(self.file, name, device or self.device, scratch=self.scratch)

    def layer(self, index: int, spec: dict[str, Any], start: int, length: int) -> DenseKV | WindowKV | RaggedKV:
        name, kind = f"layers.{index}", spec["kind"]
        if kind == "RaggedKV":
            return self.ragged(name, spec, start, length)
        require(kind in ("DenseKV", "WindowKV"), f"a layer of kind {kind!r}")
        k = self.take(f"{name}.k", (1, None, None, None), *_DTYPES)
        v = self.take(f"{name}.v", tuple(k.shape), k.dtype)
        if kind == "DenseKV":
            require(k.shape[2] == length, f"{k.shape[2]} rows in {name}, {length} tokens")
            return DenseKV(k, v)
        first = _count(spec, "start")
        require(first + k.shape[2] == length, f"the window of {name} does not end at token {length}")
        return WindowKV(k, v, first)

    def ragged(self, name: str, spec: dict[str, Any], start: int, length: int) -> RaggedKV:
        offsets = self.take(f"{name}.offsets", (None,), torch.int32)
        positions = self.take(f"{name}.positions", (None,), torch.int32)
        k, v = (self.rows(f"{name}.{part}", spec, len(positions)) for part in ("k", "v"))
        if _flag({"channels": False} | spec, "channels"):
            if not isinstance(k, Quantized):
                raise Bad(f"channels of {name}, which is not quantized")
            k = replace(k, channels=self.channels(f"{name}.k", (len(offsets) - 1, k.width)))
        widths = {x.shape[-1] if isinstance(x, Tensor) else x.width for x in (k, v)}
        require(len(widths) == 1, f"k and v of {name} differ in width")
        require(len(offsets) > 1 and int(offsets[0]) == 0 and int(offsets[-1]) == len(positions), f"offsets of {name}")
        require(bool((offsets.diff() >= 0).all()), f"offsets of {name} decrease")
        if len(positions):
            inside = int(positions.min()) >= 0 and int(positions.max()) < length
            require(inside, f"positions of {name} outside of {length} tokens")
            starts = torch.zeros(len(positions) + 1, dtype=torch.bool, device=offsets.device)
            starts[offsets.long()] = True
            require(bool((starts[1:-1] | (positions.diff() > 0)).all()), f"positions of {name} out of order")
        if start:  # the prefix is read by place: every head begins with it
            require(int(offsets.diff().min()) >= start, f"a head of {name} without the {start} tokens of the prefix")
            prefix = torch.arange(start, dtype=torch.int32, device=offsets.device)
            whole = positions[offsets[:-1, None] + prefix] == prefix
            require(bool(whole.all()), f"the prefix of {name} is not whole")
        return RaggedKV(k, v, offsets, positions, decode_schedule(offsets))

    def rows(self, name: str, spec: dict[str, Any], count: int) -> Tensor | Quantized:
        if "bits" not in spec:
            return self.take(name, (count, None), *_DTYPES)
        bits, group = _count(spec, "bits"), _count(spec, "group")
        codes = self.take(f"{name}.codes", (count, None), torch.uint8)
        width = codes.shape[1] * 8 // bits if bits in (4, 8) else 0
        even = bits == 8 or group % 2 == 0
        require(group > 0 and even and width > 0 and width % group == 0, f"{name} of {bits} bits in groups of {group}")
        scale = self.take(f"{name}.scale", (count, width // group), torch.float16, torch.float32)
        zero = self.take(f"{name}.zero", tuple(scale.shape), scale.dtype)
        finite = scale.is_meta or bool(scale.isfinite().all() and zero.isfinite().all())
        require(finite, f"scales of {name} that are not finite")
        return Quantized(codes, scale, zero, bits, group)

    def channels(self, name: str, shape: tuple[int, int]) -> Channels:
        center, spread = (self.take(f"{name}.{part}", shape, torch.float32) for part in ("center", "spread"))
        fit = center.is_meta or bool(center.isfinite().all() and spread.isfinite().all() and (spread > 0).all())
        require(fit, f"channels of {name} that are no numbers or not above 0")
        return Channels(center, spread)

    def tail(self, layers: list[Any]) -> Tail:
        k = tuple(self.take(f"tail.k.{n}", (1, None, None, layer.width), *_DTYPES) for n, layer in enumerate(layers))
        v = tuple(self.take(f"tail.v.{n}", tuple(x.shape), x.dtype) for n, x in enumerate(k))
        lengths = self.take("tail.lengths", (1,), torch.int32)
        require(all(0 <= int(lengths[0]) <= x.shape[2] for x in k), "the tail is longer than its rows")
        shapes = {(x.shape[1], x.dtype) for x in k}
        require(shapes == {(layers[0].heads, k[0].dtype)}, "the tail has other heads than the context")
        return Tail(k, v, lengths)

    def scores(self, spec: dict[str, Any], layers: list[Any], start: int, length: int) -> Scores:
        scored = [n for n, layer in enumerate(layers) if not isinstance(layer, WindowKV)]
        require(spec["layers"] == scored and (spec["start"], spec["stop"]) == (start, length), "scores of other tokens")
        bits = spec.get("bits", 32)
        require(bits in (8, 32) and type(bits) is int, f"scores of {bits!r} bits")
        shape = (len(scored), layers[0].heads, length - start)
        if bits == 32:
            values = self.take("scores.values", shape, torch.float32)
        else:
            codes = self.take("scores.codes", shape, torch.uint8)
            levels = self.take("scores.levels", (None,), torch.float32)
            require(0 < len(levels) <= LEVELS and not bool(levels.isnan().any()), f"{len(levels)} levels of scores")
            require(bool((levels.diff() > 0).all()), "levels of scores that do not ascend")
            require(not codes.numel() or int(codes.max()) < len(levels), "scores above the highest level")
            values = torch.stack([levels[layer.int()] for layer in codes])
        require(isinstance(spec["source"], str), f"scores from {spec['source']!r}")
        return Scores(values, tuple(scored), start, length, spec["source"])


def _count(header: dict[str, Any], key: str) -> int:
    value = header[key]
    require(type(value) is int and value >= 0, f"{key} is {value!r}")
    return value


def _flag(header: dict[str, Any], key: str) -> bool:
    value = header[key]
    require(type(value) is bool, f"{key} is {value!r}")
    return value
