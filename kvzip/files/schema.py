"""What files of kvzip hold, written once: each entry of their header and each tensor, its type and what it means.

Reading asks it what to accept, `kvzip info` and `kvzip report` ask it what a header says, and the tables of
docs/file_format.md are these, which a test compares. Tensors are named after the fields that hold them
(`layers.3.k`, `tail.k.3`, `scores.values`); everything else is one JSON object in the file's metadata under "kvzip".
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..display import visible_line
from .damage import require

VERSION = (3, 0)  # of the format: another major version cannot be read, a newer minor one can
CACHES = ("RaggedCache", "DenseCache")
OTHERS = {"Scores": "kvzip.scores.load", "HeadScores": "kvzip.head_scores.load"}  # what reads files without pairs
FLOAT = ("BF16", "F16", "F32", "F64")  # the model's dtype
DTYPES = ("bfloat16", "float16", "float32", "float64")  # the same, as torch calls them

_TYPES = {
    "text": lambda value: type(value) is str,
    "count": lambda value: type(value) is int and value >= 0,
    "number": lambda value: type(value) in (int, float),
    "flag": lambda value: type(value) is bool,
    "list": lambda value: type(value) is list,
    "object": lambda value: isinstance(value, dict),
    "dtype": lambda value: value in DTYPES,
    "length": lambda value: type(value) is int and 0 < value < 1 << 31,
}


@dataclass(frozen=True)
class Entry:
    """Entries of a header that have one type and are explained together; optional ones may be null or not there."""

    names: tuple[str, ...]
    type: str
    about: str
    optional: bool = False


@dataclass(frozen=True)
class TensorEntry:
    """Tensors of one dtype and shape. An axis is a size, or the name of one.

    `of` is the kind of layer that has them, where kinds differ. `pairs` says that they are keys and values, which
    `load_cache(pairs=False)` leaves in the file.
    """

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shape: tuple[int | str, ...]
    about: str
    of: str = ""
    pairs: bool = False


FILE = (
    Entry(("version",), "list", "`[major, minor]` of the format, now `[3, 0]`"),
    Entry(("library",), "text", "version of kvzip that wrote it"),
    Entry(
        ("cache",),
        "text",
        "`RaggedCache` (compressed), `DenseCache` (every pair), `Scores` or `HeadScores` (no pairs, see below)",
    ),
    Entry(("checksums",), "object", "16 hex digits for each tensor, by its name, see below"),
    Entry(("note",), "object", "anything the caller gave; the command line puts the title, documents and times here"),
)
"""What every file has."""

CACHE = (
    Entry(
        ("fingerprint",),
        "text",
        "hex digest of what the model computes (shape, RoPE, samples of each stored tensor), a dash, and its dtype",
    ),
    Entry(("length",), "count", "tokens of the context, prefix included; the next token's position is `tokens`"),
    Entry(
        ("start",), "count", "tokens of the prefix, which are the first rows of every head; window layers are excepted"
    ),
    Entry(("chat",), "flag", "whether the prefix is a chat template's, with the user turn open"),
    Entry(("tokens",), "count", "`length` and the tokens of the tail"),
    Entry(("kept", "total"), "count", "evictable pairs held, and before compression"),
    Entry(("ratio",), "number", "`kept / total`; 1 if there are none"),
    Entry(("method",), "text", "how pairs were chosen, as `kvzip-chunk/pair`; empty: all are held"),
    Entry(("layers",), "list", "an object for each layer, see below"),
    Entry(("tail",), "flag", "whether there are turns after the context"),
    Entry(("scores",), "object", "of the scores that are attached, see below", optional=True),
    Entry(("model",), "object", "of the model, if `save` was given it, see below", optional=True),
    Entry(("pieces",), "count", "number of different tokens whose text is in the file", optional=True),
)

LAYER = (
    Entry(("kind",), "text", "`RaggedKV`, `DenseKV` or `WindowKV`"),
    Entry(("start",), "count", "`WindowKV`: the token of its first row", optional=True),
    Entry(
        ("bits", "group"), "count", "of quantized rows: 4 or 8 bits, and how many values share a scale", optional=True
    ),
    Entry(("channels",), "flag", "whether keys have `center` and `spread` too, see the tensors", optional=True),
)
"""What an object of `layers` has."""

SCORES = (
    Entry(("layers",), "list", "the scored layers: those without a window"),
    Entry(("start", "stop"), "count", "the tokens that are scored, from `start` to before `stop`"),
    Entry(("source",), "text", "the method that gave the scores"),
    Entry(("bits",), "count", "8 where each score is in 8 bits", optional=True),
)
"""What the object `scores` has."""

MODEL = (
    Entry(("source",), "text", "a directory by its absolute path, or a name on the hub"),
    Entry(("dtype",), "dtype", "of its weights and its cache"),
    Entry(("max_length",), "length", "as `kvzip.load` was given it", optional=True),
    Entry(("rope",), "object", "as `kvzip.load` was given it", optional=True),
)
"""What the object `model` has."""

SCORES_FILE = (
    Entry(("fingerprint",), "text", "of the model, as in a cache"),
    Entry(("tokens",), "text", "SHA-256 of the token ids before `stop`"),
    *SCORES[:3],
)

HEAD_SCORES_FILE = (
    Entry(("fingerprint",), "text", "the model's `identity`, without RoPE scaling and dtype; empty if unknown"),
    Entry(("family",), "text", "of the model's architecture"),
    Entry(("method",), "text", "how the scores were made"),
    Entry(("layers",), "list", "the scored layers"),
    Entry(("sink", "recent"), "count", "first and last tokens that dropped heads keep in DuoAttention"),
    Entry(("sources",), "list", "a name, a number of tokens and a SHA-256 of the ids for each text"),
)

TENSORS = (
    TensorEntry(("token_ids",), ("I64",), ("tokens",), "all tokens, those of the tail too"),
    TensorEntry(
        ("layers.N.k", "layers.N.v"),
        FLOAT,
        ("rows", "D"),
        "the rows of head 0, then of head 1, ...; each oldest first",
        of="RaggedKV",
        pairs=True,
    ),
    TensorEntry(
        ("layers.N.k", "layers.N.v"), FLOAT, (1, "H", "length", "D"), "a row for each token", of="DenseKV", pairs=True
    ),
    TensorEntry(
        ("layers.N.k", "layers.N.v"),
        FLOAT,
        (1, "H", "W", "D"),
        "tokens `start` to `length` of a layer with a sliding window",
        of="WindowKV",
        pairs=True,
    ),
    TensorEntry(
        ("layers.N.offsets",), ("I32",), ("H + 1",), "of `RaggedKV`: head h owns rows `offsets[h]` to `offsets[h + 1]`"
    ),
    TensorEntry(
        ("layers.N.positions",), ("I32",), ("rows",), "of `RaggedKV`: the token of each row, ascending within a head"
    ),
    TensorEntry(
        ("layers.N.k.codes", "layers.N.v.codes"),
        ("U8",),
        ("rows", "D * bits / 8"),
        "quantized rows, in place of `layers.N.k` and `layers.N.v`; see below for 4 bits",
        pairs=True,
    ),
    TensorEntry(
        ("layers.N.k.scale", "layers.N.k.zero", "layers.N.v.scale", "layers.N.v.zero"),
        ("F16", "F32"),
        ("rows", "D / group"),
        "value d of a row is `zero + scale * code`, with those of its group, `d // group`",
        pairs=True,
    ),
    TensorEntry(
        ("layers.N.k.center", "layers.N.k.spread"),
        ("F32",),
        ("H", "D"),
        "with `channels`: a key of head h is `center[h] + spread[h] * x`, where x is what scale and zero give",
        pairs=True,
    ),
    TensorEntry(
        ("tail.k.N", "tail.v.N"),
        FLOAT,
        (1, "H", "R", "D"),
        "of every layer, windows too; rows at and beyond `tail.lengths` mean nothing",
        pairs=True,
    ),
    TensorEntry(("tail.lengths",), ("I32",), (1,), "tokens of the tail"),
    TensorEntry(
        ("scores.values",),
        ("F32",),
        ("L", "H", "length - start"),
        "one for each evictable pair, removed ones too; the larger is kept first",
    ),
    TensorEntry(
        ("scores.codes",),
        ("U8",),
        ("L", "H", "length - start"),
        "in place of `scores.values` in 8 bits: a score is `levels[code]`",
    ),
    TensorEntry(
        ("scores.levels",), ("F32",), ("K",), "the values that scores in 8 bits may have, ascending, at most 256"
    ),
    TensorEntry(("pieces.ids",), ("I64",), ("P",), "the different token ids, ascending"),
    TensorEntry(
        ("pieces.offsets",),
        ("I64",),
        ("P + 1",),
        "the UTF-8 of `ids[i]` is `bytes[offsets[i]:offsets[i + 1]]`; it may begin or end within a character",
    ),
    TensorEntry(("pieces.bytes",), ("U8",), ("bytes",), "the texts of all of them, one after the other"),
)
"""The tensors of a cache's file. N numbers a layer."""

_BY_NAME = {(name, entry.of): entry for entry in TENSORS for name in entry.names}


def tensor_entry(name: str, of: str = "") -> TensorEntry:
    """Returns what a tensor of a cache's file must be, `of` a kind of layer where kinds differ."""
    return _BY_NAME[re.sub(r"\.\d+(?=\.|$)", ".N", name), of]


def check_header(header: Mapping[str, Any]) -> None:
    """Raises Damaged if an entry has another type than it must, or entries contradict each other."""
    _check(header, FILE)
    kind = header["cache"]
    _check(header, {"Scores": SCORES_FILE, "HeadScores": HEAD_SCORES_FILE}.get(kind, CACHE if is_cache(header) else ()))
    if not is_cache(header):
        return
    require(header["start"] <= header["length"] <= header["tokens"], "start, length and tokens in another order")
    require(header["ratio"] == ratio_of(header["kept"], header["total"]), "ratio is not kept / total")
    for spec in header["layers"]:
        require(isinstance(spec, dict), f"a layer {spec!r}")
        _check(spec, LAYER)
    for key, entries in (("scores", SCORES), ("model", MODEL)):
        if header.get(key) is not None:
            _check(header[key], entries)


def is_cache(header: Mapping[str, Any]) -> bool:
    """Returns whether a file of this header holds pairs."""
    return header["cache"] in CACHES


def ratio_of(kept: int, total: int) -> float:
    """Returns the fraction of pairs that is kept."""
    return kept / total if total else 1.0


def bits_of(header: Mapping[str, Any]) -> int | None:
    """Returns the bits of a cache's quantized rows; None if they are in the model's dtype."""
    return next((spec["bits"] for spec in header["layers"] if spec.get("bits") is not None), None)


def entry(header: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns an entry that is an object, as `note` and `model` are, of a header that may be unchecked; {} if not."""
    value = header.get(name)
    return value if isinstance(value, dict) else {}


def dtype_of(fingerprint: str) -> str | None:
    """Returns the dtype at the end of a fingerprint, which is "identity-dtype"; None if there is none."""
    dtype = fingerprint.rpartition("-")[2]
    return dtype if dtype in DTYPES else None


def foreign(found: str, expected: str) -> str:
    """Returns why something of one fingerprint does not belong to a model of another; empty if it does.

    A model in another dtype is told from another model.
    """
    if found == expected:
        return ""
    theirs = dtype_of(found)
    (identity, _, _), (own, _, ours) = (x.rpartition("-") for x in (found, expected))
    if identity and identity == own and theirs:
        return f"its pairs are {theirs}, the model is {ours}: load the model in {theirs}"
    return (
        f"its fingerprint is {visible_line(found, limit=300)!r}, the model's {expected!r}: take the model that made it"
    )


def _check(values: Mapping[str, Any], entries: tuple[Entry, ...]) -> None:
    for one in entries:
        for name in one.names:
            value = values.get(name)
            require((one.optional and value is None) or _TYPES[one.type](value), f"{name} is {value!r}")
