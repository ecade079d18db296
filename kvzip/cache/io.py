"""Caches as files: saved and loaded."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..checks import check_path, check_values
from ..files.header import open_file
from ..files.schema import foreign, is_divided, is_offsets, ratio_of
from ..files.shared import write_shared
from ..files.tensors import write_file
from ..ops import Quantized
from ..parallel import Share, everyone
from ..prompts import token_bytes
from .caches import DenseCache, RaggedCache, check_pairs
from .parts import DenseKV, RaggedKV, Scores, WindowKV
from .reading import BelongsTo, open_cache, read_cache, read_texts
from .score_codes import encode_levels


@runtime_checkable
class Origin(BelongsTo, Protocol):
    """What `save` needs from a model to name it in a file."""

    @property
    def source(self) -> str: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def rope(self) -> Mapping[str, Any] | None: ...
    @property
    def max_length(self) -> int | None: ...
    @property
    def quantized(self) -> str | None: ...
    @property
    def quantized_head(self) -> str | None: ...
    @property
    def activations(self) -> str | None: ...


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
        model: the cache's own. The header then says under "model" where it came from (a local directory by its absolute
            path) and with which dtype, max_length, rope, weights, head_weights and activations it was loaded, and the
            file holds the text of each token, so that it can be shown without the model.
        score_bits: 32 keeps scores exact, so that a dense cache can be compressed at any ratio as before; 8 rounds
            them down to at most 256 values (`levels.encode_levels`), a quarter of the bytes.
        overwrite: replaces a file that kvzip wrote. Any other file is left as it is, always.

    Raises: ValueError for a consumed cache, one of another model, another number of bits, or NaN scores in 8 bits;
        TypeError for what is no cache, or a note that JSON cannot hold; FileExistsError for a file that is there and
        must not be replaced; OSError if it cannot be written.

    Where ranks share the model, all of them must call it; the first writes the file, which does not depend on how many
    there are.
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
        directory = Path(model.source).expanduser()
        header["model"] = {
            "source": str(directory.resolve()) if directory.is_dir() else model.source,
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_length": model.max_length,
            "rope": model.rope,
        }
        rounding = {"weights": model.quantized, "head_weights": model.quantized_head, "activations": model.activations}
        header["model"] |= {name: how for name, how in rounding.items() if how is not None}
        if model.tokenizer is not None:
            tensors |= _texts(model.tokenizer, cache.token_ids)
            header["pieces"] = len(tensors["pieces.ids"])
    if cache.share is None:
        write_file(path, tensors, header, note=note, overwrite=overwrite)
        return
    whole = {name: _whole_offsets(cache.share, x) for name, x in tensors.items() if is_offsets(name)}
    write_shared(cache.share, Path(path), tensors | whole, header, divided=is_divided, note=note, overwrite=overwrite)


def read_header(path: str | Path) -> dict[str, Any]:
    """Returns what a file says of itself, without reading its pairs.

    Raises: FileNotFoundError; OSError for a file that may not be read; ValueError for one that is damaged, not kvzip's,
        of another major version, or not a regular file, and for header entries of a wrong type.
    """
    check_path(path, "path")
    with open_file(path) as file:
        return file.header


def load_cache(
    path: str | Path,
    *,
    model: BelongsTo | None = None,
    device: torch.device | str | None = None,
    pairs: bool = True,
) -> DenseCache | RaggedCache:
    """Returns the cache of a file that `save` wrote.

    Args:
        model: the model that it must belong to, if given. A rank of several reads the pairs of its heads.
        device: where its tensors go; None takes the model's, or the CPU.
        pairs: False leaves the keys and values in the file and gives meta tensors of their shapes and dtypes. Lengths,
            offsets, positions, token ids and scores are read: they say which pairs are kept.

    Raises: FileNotFoundError; OSError for a file that may not be read; ValueError for a file of another model or dtype,
        of another major version, with a tensor that differs from its checksum, or whose lengths, offsets, dtypes or
        positions do not fit together, or the model; torch.OutOfMemoryError; what torch raises for a device that is not
        there.
    """
    if model is not None and not isinstance(model, BelongsTo):
        raise TypeError(f"expected a model that kvzip.load made, got {type(model).__name__}: kvzip.open(path) loads it")
    with open_cache(path) as file:
        return read_cache(file, model=model, device=device, pairs=pairs)


def read_pieces(path: str | Path) -> dict[int, bytes]:
    """Returns the UTF-8 of each different token of a file, by id; a token may begin or end within a character.

    Empty for a file that was saved without `model`.

    Raises: as `load_cache` does.
    """
    with open_cache(path) as file:
        return read_texts(file)


def _whole_offsets(share: Share, own: Tensor) -> Tensor:
    """Where the rows of each head begin and end among those of all ranks."""
    counts = everyone(share, own.diff().cpu())
    return torch.cat([counts[0].new_zeros(1), *(counts[rank] for rank in share.speakers)]).cumsum(0).int()


def _texts(tokenizer: Any, token_ids: Tensor) -> dict[str, Tensor]:
    """The text of each different token: ids ascending, and their bytes one after the other between offsets."""
    ids = token_ids.unique()
    parts = token_bytes(tokenizer, ids.tolist())
    offsets = torch.tensor([0, *map(len, parts)]).cumsum(0)
    text = torch.frombuffer(bytearray(b"".join(parts) or b"\0"), dtype=torch.uint8)[: int(offsets[-1])]
    return {"pieces.ids": ids, "pieces.offsets": offsets, "pieces.bytes": text}


def _describe(cache: DenseCache | RaggedCache, score_bits: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the header of a cache, as `files.schema` defines them."""
    layers = [_describe_layer(f"layers.{n}", layer) for n, layer in enumerate(cache.context)]
    tensors = {"token_ids": cache.token_ids} | {name: x for held, _ in layers for name, x in held.items()}
    header: dict[str, Any] = {"cache": type(cache).__name__, "fingerprint": cache.fingerprint}
    header |= {"length": cache.context_length, "start": cache.start, "chat": cache.chat, "tokens": len(cache.token_ids)}
    header |= {"kept": cache.kept, "total": cache.total, "ratio": ratio_of(cache.kept, cache.total)}
    header |= {"method": cache.method, "layers": [spec for _, spec in layers], "tail": cache.tail is not None}
    header["scores"] = None
    if cache.tail is not None:
        tensors["tail.lengths"] = cache.tail.lengths
        for name in ("k", "v"):
            tensors |= {f"tail.{name}.{n}": x for n, x in enumerate(getattr(cache.tail, name))}
    if cache.scores is not None:
        header["scores"] = {
            f.name: getattr(cache.scores, f.name) for f in fields(Scores) if f.name not in ("values", "asked")
        }
        if score_bits == 32:
            tensors["scores.values"] = cache.scores.values
        else:
            header["scores"]["bits"] = score_bits
            tensors["scores.codes"], tensors["scores.levels"] = encode_levels(cache.scores.values)
    return tensors, header


def _describe_layer(name: str, layer: DenseKV | WindowKV | RaggedKV) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a layer, and its object in the header's `layers`."""
    tensors: dict[str, Tensor] = {}
    spec: dict[str, Any] = {"kind": type(layer).__name__}
    for part in ("k", "v"):
        x = getattr(layer, part)
        if isinstance(x, Quantized):
            if part == "k" or "bits" not in spec:
                spec |= {"bits": x.bits, "group": x.group}
            elif x.bits != spec["bits"]:
                spec["value_bits"] = x.bits
            tensors[f"{name}.{part}.{'turned' if x.turned else 'codes'}"] = x.codes
            tensors |= {f"{name}.{part}.{each}": getattr(x, each) for each in ("scale", "zero")}
            if x.channels is not None:
                spec["channels"] = True
                tensors |= {f"{name}.{part}.{each}": getattr(x.channels, each) for each in ("center", "spread")}
        else:
            tensors[f"{name}.{part}"] = x
    if isinstance(layer, RaggedKV):
        tensors |= {f"{name}.offsets": layer.offsets, f"{name}.positions": layer.positions}
        if layer.bias is not None:
            spec["bias"] = True
            tensors[f"{name}.bias"] = layer.bias
    if isinstance(layer, WindowKV):
        spec["start"] = layer.start
    return tensors, spec
