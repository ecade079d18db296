"""Caches on disk: one safetensors file with a versioned header, written whole or not at all, checked when read.

Tensors are named after the fields that hold them (`layers.3.k`, `tail.k.3`, `scores.values`); everything else is one
JSON object in the file's metadata under "kvzip". Nothing is ever unpickled.
"""

import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..checks import check_kind, check_path
from ..ops import Channels, Quantized, decode_schedule
from ..prompts import token_bytes
from ..version import VERSION as LIBRARY
from .dense import DenseCache, DenseKV, Scores, WindowKV, check_whole
from .levels import LEVELS, encode_levels
from .ragged import RaggedCache, RaggedKV, Tail, head_count, head_dim

VERSION = (2, 0)  # of the format: a newer major version cannot be read, a newer minor or older one can
_OTHERS = {"Scores": "kvzip.scores.load", "HeadScores": "kvzip.head_scores.load"}  # files that hold no cache
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64, "U8": torch.uint8}
_PAIRS = re.compile(r"layers\.\d+\.[kv]|tail\.[kv]\.\d+|layers\.\d+\.[kv]\.(codes|scale|zero)")


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


def save(
    cache: DenseCache | RaggedCache,
    path: str | Path,
    *,
    note: Mapping[str, Any] | None = None,
    model: Origin | None = None,
    score_bits: int = 32,
) -> None:
    """Writes the cache to one file: under another name first, then renamed, so a crash leaves the old file or the new.

    A process that is killed meanwhile leaves what it wrote in a hidden file beside it, which may be deleted.

    Args:
        note: anything that JSON can hold, for the header.
        model: the cache's own. The header then says where it came from (a local directory by its absolute path) and
            its dtype, under "model", and the file holds the text of each token, so that it can be read without it.
        score_bits: 32 keeps scores exact, so that a dense cache can be compressed at any ratio as before; 8 rounds
            them down to at most 256 levels (`levels.encode_levels`), a quarter of the bytes.

    Raises: ValueError for a consumed cache, one of another model, another number of bits, or NaN scores in 8 bits;
        TypeError for a note that JSON cannot hold; OSError if it cannot be written.
    """
    check_kind(cache, DenseCache, RaggedCache)
    check_path(path, "path")
    if isinstance(cache, DenseCache):
        check_whole(cache)
    if score_bits not in (32, 8):
        raise ValueError(f"expected score_bits of 32 or 8, got {score_bits}: 32 is exact")
    tensors, header = _describe(cache, score_bits)
    if model is not None:
        if model.fingerprint != cache.fingerprint:
            raise ValueError(
                f"expected the model that made the cache (fingerprint {cache.fingerprint}), got another "
                f"({model.fingerprint}): save it with its own"
            )
        header["model"] = {"source": _absolute(model.source), "dtype": str(model.dtype).removeprefix("torch.")}
        if model.tokenizer is not None:
            tensors |= _pieces(model.tokenizer, cache.token_ids)
            header["pieces"] = len(tensors["pieces.ids"])
    write_file(path, tensors, header, note=note)


def write_file(
    path: str | Path, tensors: dict[str, Tensor], header: dict[str, Any], *, note: Mapping[str, Any] | None = None
) -> None:
    """Writes tensors and a header whole or not at all. Raises as `save` does."""
    header = header | {"version": VERSION, "library": LIBRARY, "note": dict(note or {})}
    metadata = {"kvzip": json.dumps(header)}
    with whole_file(path) as partial:
        save_file(_apart(tensors), partial, metadata=metadata)


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Gives an empty file beside `path` to write to, which takes its place at the end, or is deleted on an error.

    Its mode is what the process's umask leaves of 0666, as of any new file.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(6)}.partial")
    os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    mode = partial.stat().st_mode
    try:
        yield partial
        os.chmod(partial, mode)  # a writer may have put a private file in its place, as safetensors does
        with open(partial, "rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, path)
    except BaseException as error:
        os.unlink(partial)
        if isinstance(error, SafetensorError):  # a full disk, in safetensors' words
            raise OSError(f"expected to write {path.name}, got {error}: free some space, or write elsewhere") from error
        raise


def read_header(path: str | Path) -> dict[str, Any]:
    """Returns what a file says of itself, without reading its pairs.

    Raises: FileNotFoundError; ValueError for a file that is damaged, not a kvzip cache, or of a newer major version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a cache file, got no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _damaged(path, str(error)) from error
    try:
        header = json.loads(metadata["kvzip"])
        major, minor = header["version"]
        known = isinstance(major, int) and isinstance(minor, int)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"expected a file written by kvzip.save, got {path.name} without its header") from error
    if not known or not 1 <= major <= VERSION[0]:
        raise ValueError(
            f"expected a cache file of version {VERSION[0]}.x or older, got {major}.{minor} in {path.name}: "
            "read it with the version of kvzip that wrote it"
        )
    return header


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

    Raises: FileNotFoundError; ValueError for a file of another model, of a newer major version, or whose lengths,
        offsets, dtypes or positions do not fit together, or the model; torch.OutOfMemoryError; what torch raises for a
        device that is not there.
    """
    check_path(path, "path")
    path = Path(path)
    header = read_header(path)
    kind = header.get("cache")
    if isinstance(kind, str) and kind in _OTHERS:
        raise ValueError(f"expected a cache, got {kind} without pairs in {path.name}: use {_OTHERS[kind]}")
    if model is not None and header.get("fingerprint") != model.fingerprint:
        raise ValueError(
            f"expected a cache of this model (fingerprint {model.fingerprint}), got one of another "
            f"({header.get('fingerprint')}) in {path.name}: load it with the model and dtype that made it"
        )
    if device is None:
        device = "cpu" if model is None else model.device
    torch.empty(0, device=device)  # a device that is not there is no fault of the file

    def read(reader: _Reader) -> DenseCache | RaggedCache:
        cache = reader.cache(header)
        if model is not None:
            _check_fits(cache, model)
        return cache

    return _read(path, str(device), read, pairs=pairs)


def read_pieces(path: str | Path) -> dict[int, bytes]:
    """Returns the UTF-8 of each different token of a file, by id; a token may begin or end within a character.

    Empty for a file that was saved without `model`.

    Raises: as `load_cache` does.
    """
    path = Path(path)
    header = read_header(path)
    return _read(path, "cpu", lambda reader: reader.pieces(header, reader.token_ids(header)))


def _read(path: Path, device: str, read: Callable[["_Reader"], Any], *, pairs: bool = True) -> Any:
    """What `read` makes of a file, every failure an error that names the file."""
    try:
        with safe_open(path, framework="pt", device=device) as file:

            def get(name: str) -> Tensor:
                if pairs or not _PAIRS.fullmatch(name):
                    return file.get_tensor(name)
                stored = file.get_slice(name)
                return torch.empty(stored.get_shape(), dtype=_STORED[stored.get_dtype()], device="meta")

            return read(_Reader(get, set(file.keys())))
    except torch.OutOfMemoryError:
        raise
    except (
        SafetensorError,
        _Bad,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        IndexError,
        OverflowError,
        RuntimeError,
    ) as error:
        raise _damaged(path, str(error)) from error


class _Bad(Exception):
    """What does not fit together in a file."""


def _check_fits(cache: DenseCache | RaggedCache, model: BelongsTo) -> None:
    """Raises _Bad unless the model can read the cache: a fingerprint is a word that anyone can write."""
    config = model.config
    layers = cache.layers if isinstance(cache, DenseCache) else cache.context
    length = cache.length if isinstance(cache, DenseCache) else cache.context_length
    windows = [spec.window is not None for spec in config.layers]
    _require([isinstance(layer, WindowKV) for layer in layers] == windows, "other layers than the model's")
    sizes = (head_count(layers[0]), head_dim(layers[0].k))
    _require(sizes == (config.num_kv_heads, config.head_dim), f"{sizes[0]} heads of width {sizes[1]}")
    for layer, spec in zip(layers, config.layers, strict=True):
        if isinstance(layer, WindowKV):  # one row less in a cache that Transformers made
            rows = layer.k.shape[2]
            _require(min(length, spec.window - 1) <= rows <= spec.window, f"{rows} rows in a window of {spec.window}")
    tail = () if isinstance(cache, DenseCache) or cache.tail is None else (*cache.tail.k, *cache.tail.v)
    rows = [x for layer in layers for x in (layer.k, layer.v) if isinstance(x, Tensor)]
    _require(all(x.dtype == model.dtype for x in (*rows, *tail)), f"pairs that are not in {model.dtype}")
    largest = int(cache.token_ids.max()) if len(cache.token_ids) else 0
    _require(largest < config.vocab_size, f"token {largest} of a vocabulary of {config.vocab_size}")


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"expected a whole kvzip cache, got {path.name} that is truncated or tampered with ({reason})")


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


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors contiguous, none sharing memory with another, as the file format wants them."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        whole = tensor.detach().contiguous()
        address = whole.untyped_storage().data_ptr()
        apart[name] = whole.clone() if address in seen else whole
        seen.add(address)
    return apart


@dataclass(frozen=True)
class _Reader:
    """Reads one file's tensors and checks each against the header and the others before it is used."""

    get: Callable[[str], Tensor]
    names: set[str]

    def cache(self, header: dict[str, Any]) -> DenseCache | RaggedCache:
        length, start = _count(header, "length"), _count(header, "start")
        _require(start <= length, f"start {start} after length {length}")
        token_ids = self.token_ids(header)
        self.pieces(header, token_ids)
        origin = header.get("model")  # files before version 1.2 have neither model nor pieces
        known = origin is None or all(isinstance(origin[key], str) for key in ("source", "dtype"))
        _require(known, f"model is {origin!r}")
        kept, total, has_tail = _count(header, "kept"), _count(header, "total"), _flag(header, "tail")
        method = header.get("method", "")  # files of version 1.0 have neither method nor ratio
        _require(isinstance(method, str), f"method is {method!r}")
        _require(header.get("ratio", _ratio(kept, total)) == _ratio(kept, total), "ratio is not kept / total")
        layers: list[Any] = [self.layer(n, spec, start, length) for n, spec in enumerate(header["layers"])]
        _require(len(layers) > 0, "no layers")
        widths = {head_dim(layer.k) for layer in layers}
        _require(len(widths) == 1, f"heads of widths {sorted(widths)}")
        _require(len(set(map(head_count, layers))) == 1, "layers with other numbers of heads")
        windows = {layer.start for layer in layers if isinstance(layer, WindowKV)}
        _require(len(windows) <= 1, "windows of different lengths")
        scores = self.scores(header["scores"], layers, start, length) if header["scores"] is not None else None
        common: dict[str, Any] = {
            "start": start,
            "chat": _flag(header, "chat"),
            "token_ids": token_ids,
            "scores": scores,
        }
        common["fingerprint"] = str(header["fingerprint"])
        if header["cache"] == "DenseCache":
            _require(len(token_ids) == length and not has_tail, "token ids and length differ")
            _require(all(isinstance(layer, (DenseKV, WindowKV)) for layer in layers), "ragged layers in a dense cache")
            cache = DenseCache(layers=layers, length=length, **common)
            _require((kept, total) == (cache.kept, cache.total), "kept and total differ from the pairs held")
            return cache
        _require(header["cache"] == "RaggedCache", f"a cache of kind {header['cache']!r}")
        _require(all(isinstance(layer, (RaggedKV, WindowKV)) for layer in layers), "dense layers in a ragged cache")
        tail = self.tail(layers) if has_tail else None
        tail_length = int(tail.lengths[0]) if tail is not None else 0
        _require(len(token_ids) == length + tail_length, "token ids and lengths differ")
        ragged = [layer for layer in layers if isinstance(layer, RaggedKV)]
        rows = sum(len(layer.positions) - start * (len(layer.offsets) - 1) for layer in ragged)
        _require(rows == kept <= total, f"{rows} kept pairs, {kept} of {total} by the header")
        return RaggedCache(
            context=tuple(layers),
            tail=tail,
            context_length=length,
            kept=kept,
            total=total,
            method=method,
            **common,
        )

    def token_ids(self, header: dict[str, Any]) -> Tensor:
        token_ids = self.take("token_ids", (_count(header, "tokens"),), torch.int64).cpu()
        _require(not len(token_ids) or int(token_ids.min()) >= 0, "a negative token id")
        return token_ids

    def pieces(self, header: dict[str, Any], token_ids: Tensor) -> dict[int, bytes]:
        """The bytes of each different token of `token_ids`; empty where the file has none."""
        if header.get("pieces") is None:
            return {}
        count = _count(header, "pieces")
        ids = self.take("pieces.ids", (count,), torch.int64).cpu()
        _require(torch.equal(ids, token_ids.unique()), "pieces of other tokens")
        offsets = self.take("pieces.offsets", (count + 1,), torch.int64).cpu()
        text = self.take("pieces.bytes", (None,), torch.uint8).cpu().numpy().tobytes()
        _require(int(offsets[0]) == 0 and int(offsets[-1]) == len(text), "pieces and their bytes differ in length")
        _require(bool((offsets.diff() >= 0).all()), "offsets of pieces decrease")
        bounds = offsets.tolist()
        return {i: text[a:b] for i, a, b in zip(ids.tolist(), bounds, bounds[1:], strict=False)}

    def take(self, name: str, shape: tuple[int | None, ...], *dtypes: torch.dtype) -> Tensor:
        """The tensor of that name, if it has the shape (None is any size) and one of the dtypes."""
        _require(name in self.names, f"no tensor {name}")
        tensor = self.get(name)
        fits = tensor.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, tensor.shape, strict=True))
        _require(fits and tensor.dtype in dtypes, f"{name} of shape {list(tensor.shape)} and {tensor.dtype}")
        return tensor

    def layer(self, index: int, spec: dict[str, Any], start: int, length: int) -> DenseKV | WindowKV | RaggedKV:
        name, kind = f"layers.{index}", spec["kind"]
        if kind == "RaggedKV":
            return self.ragged(name, spec, start, length)
        _require(kind in ("DenseKV", "WindowKV"), f"a layer of kind {kind!r}")
        k = self.take(f"{name}.k", (1, None, None, None), *_DTYPES)
        v = self.take(f"{name}.v", tuple(k.shape), k.dtype)
        if kind == "DenseKV":
            _require(k.shape[2] == length, f"{k.shape[2]} rows in {name}, {length} tokens")
            return DenseKV(k, v)
        first = _count(spec, "start")
        _require(first + k.shape[2] == length, f"the window of {name} does not end at token {length}")
        return WindowKV(k, v, first)

    def ragged(self, name: str, spec: dict[str, Any], start: int, length: int) -> RaggedKV:
        offsets = self.take(f"{name}.offsets", (None,), torch.int32)
        positions = self.take(f"{name}.positions", (None,), torch.int32)
        k, v = (self.rows(f"{name}.{part}", spec, len(positions)) for part in ("k", "v"))
        if _flag({"channels": False} | spec, "channels"):
            if not isinstance(k, Quantized):
                raise _Bad(f"channels of {name}, which is not quantized")
            k = replace(k, channels=self.channels(f"{name}.k", (len(offsets) - 1, head_dim(k))))
        _require(head_dim(k) == head_dim(v), f"k and v of {name} differ in width")
        _require(len(offsets) > 1 and int(offsets[0]) == 0 and int(offsets[-1]) == len(positions), f"offsets of {name}")
        _require(bool((offsets.diff() >= 0).all()), f"offsets of {name} decrease")
        if len(positions):
            inside = int(positions.min()) >= 0 and int(positions.max()) < length
            _require(inside, f"positions of {name} outside of {length} tokens")
            starts = torch.zeros(len(positions) + 1, dtype=torch.bool, device=offsets.device)
            starts[offsets.long()] = True
            _require(bool((starts[1:-1] | (positions.diff() > 0)).all()), f"positions of {name} out of order")
        if start:  # the prefix is read by place: every head begins with it
            _require(int(offsets.diff().min()) >= start, f"a head of {name} without the {start} tokens of the prefix")
            prefix = torch.arange(start, dtype=torch.int32, device=offsets.device)
            whole = positions[offsets[:-1, None] + prefix] == prefix
            _require(bool(whole.all()), f"the prefix of {name} is not whole")
        return RaggedKV(k, v, offsets, positions, decode_schedule(offsets))

    def rows(self, name: str, spec: dict[str, Any], count: int) -> Tensor | Quantized:
        if "bits" not in spec:
            return self.take(name, (count, None), *_DTYPES)
        bits, group = _count(spec, "bits"), _count(spec, "group")
        codes = self.take(f"{name}.codes", (count, None), torch.uint8)
        width = codes.shape[1] * 8 // bits if bits in (4, 8) else 0
        _require(group > 0 and width > 0 and width % group == 0, f"{name} of {bits} bits in groups of {group}")
        scale = self.take(f"{name}.scale", (count, width // group), torch.float16, torch.float32)
        zero = self.take(f"{name}.zero", tuple(scale.shape), scale.dtype)
        finite = scale.is_meta or bool(scale.isfinite().all() and zero.isfinite().all())
        _require(finite, f"scales of {name} that are not finite")
        return Quantized(codes, scale, zero, bits, group)

    def channels(self, name: str, shape: tuple[int, int]) -> Channels:
        center, spread = (self.take(f"{name}.{part}", shape, torch.float32) for part in ("center", "spread"))
        fit = center.is_meta or bool(center.isfinite().all() and spread.isfinite().all() and (spread > 0).all())
        _require(fit, f"channels of {name} that are no numbers or not above 0")
        return Channels(center, spread)

    def tail(self, layers: list[Any]) -> Tail:
        k = tuple(
            self.take(f"tail.k.{n}", (1, None, None, head_dim(layer.k)), *_DTYPES) for n, layer in enumerate(layers)
        )
        v = tuple(self.take(f"tail.v.{n}", tuple(x.shape), x.dtype) for n, x in enumerate(k))
        lengths = self.take("tail.lengths", (1,), torch.int32)
        _require(all(0 <= int(lengths[0]) <= x.shape[2] for x in k), "the tail is longer than its rows")
        heads = {x.shape[1] for x in k}
        _require(heads == {head_count(layers[0])}, "the tail has other heads than the context")
        return Tail(k, v, lengths)

    def scores(self, spec: dict[str, Any], layers: list[Any], start: int, length: int) -> Scores:
        scored = [n for n, layer in enumerate(layers) if not isinstance(layer, WindowKV)]
        _require(
            spec["layers"] == scored and (spec["start"], spec["stop"]) == (start, length), "scores of other tokens"
        )
        bits = spec.get("bits", 32)
        _require(bits in (8, 32) and type(bits) is int, f"scores of {bits!r} bits")
        shape = (len(scored), head_count(layers[0]), length - start)
        if bits == 32:
            values = self.take("scores.values", shape, torch.float32)
        else:
            codes = self.take("scores.codes", shape, torch.uint8)
            levels = self.take("scores.levels", (None,), torch.float32)
            _require(0 < len(levels) <= LEVELS and not bool(levels.isnan().any()), f"{len(levels)} levels of scores")
            _require(bool((levels.diff() > 0).all()), "levels of scores that do not ascend")
            _require(not codes.numel() or int(codes.max()) < len(levels), "scores above the highest level")
            values = torch.stack([levels[layer.int()] for layer in codes])
        return Scores(values, tuple(scored), start, length, str(spec["source"]))


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise _Bad(reason)


def _count(header: dict[str, Any], key: str) -> int:
    value = header[key]
    _require(type(value) is int and value >= 0, f"{key} is {value!r}")
    return value


def _flag(header: dict[str, Any], key: str) -> bool:
    value = header[key]
    _require(type(value) is bool, f"{key} is {value!r}")
    return value
