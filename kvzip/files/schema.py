"""The schema of kvzip's files: each entry of their header and each tensor, its type and what it means.

Files are checked against it when read, `kvzip info` and `kvzip report` read headers by it, and a test compares the
tables of docs/file_format.md with it. Tensors are named after the fields that hold them
(`layers.3.k`, `tail.k.3`, `scores.values`); everything else is one JSON object in the file's metadata under "kvzip".
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..display import visible_line
from .damage import require

VERSION = (3, 0)  # of the format: another major version cannot be read, a newer minor one can
OTHERS = {"Scores": "kvzip.scores.load", "HeadScores": "kvzip.head_scores.load"}  # what reads files without pairs
DTYPES = ("bfloat16", "float16", "float32", "float64")  # of a model, as torch calls them

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
    """Entries of a header that have one type and are explained together; optional ones may be null or missing."""

    names: str
    type: str
    about: str


@dataclass(frozen=True)
class Stored:
    """A tensor. dtype "float" is any of DTYPES; axes are sizes or names; `of` is the kind of layer if kinds differ."""

    name: str
    dtype: str
    axes: str
    about: str
    of: str = ""


FILE = (
    Entry("version", "list", "`[major, minor]` of the format, now `[3, 0]`"),
    Entry("library", "text", "version of kvzip that wrote it"),
    Entry("cache", "text", "`RaggedCache` (compressed), `DenseCache` (all pairs), `Scores` or `HeadScores` (no pairs)"),
    Entry("checksums", "object", "16 hex digits for each tensor, by its name, see below"),
    Entry("note", "object", "anything the caller gave; the command line puts title, documents and times here"),
)
"""What every file has."""

CACHE = (
    Entry("fingerprint", "text", "digest of shape, RoPE and samples of each tensor of the model, a dash, its dtype"),
    Entry("length", "count", "tokens of the context, prefix included; the next token's position is `tokens`"),
    Entry("start", "count", "tokens of the prefix, which are the first rows of every head, but for window layers"),
    Entry("chat", "flag", "whether the prefix is a chat template's, with the user turn open"),
    Entry("tokens", "count", "`length` and the tokens of the tail"),
    Entry("kept, total", "count", "evictable pairs held, and before compression"),
    Entry("ratio", "number", "`kept / total`; 1 if there are none"),
    Entry("method", "text", "how pairs were chosen, as `kvzip-chunk/pair`; empty: all are held"),
    Entry("layers", "list", "an object for each layer, see below"),
    Entry("tail", "flag", "whether there are turns after the context"),
    Entry("scores", "object, optional", "of the scores that are attached, see below"),
    Entry("model", "object, optional", "of the model, if `save` was given it, see below"),
    Entry("pieces", "count, optional", "number of different tokens whose text is in the file"),
)

LAYER = (
    Entry("kind", "text", "`RaggedKV`, `DenseKV` or `WindowKV`"),
    Entry("start", "count, optional", "`WindowKV`: the token of its first row"),
    Entry("bits, group", "count, optional", "of quantized rows: 8, 4 or 2 bits, and how many values share a scale"),
    Entry("value_bits", "count, optional", "bits of quantized values where they are not those of keys, `bits`"),
    Entry("channels", "flag, optional", "whether keys have `center` and `spread` too, see the tensors"),
    Entry("bias", "flag, optional", "`RaggedKV`: whether rows have biases, see the tensors"),
)
"""What an object of `layers` has."""

SCORES = (
    Entry("layers", "list", "the scored layers: those without a window"),
    Entry("start, stop", "count", "the tokens that are scored, from `start` to before `stop`"),
    Entry("source", "text", "the method that gave the scores"),
    Entry("bits", "count, optional", "8 where each score is in 8 bits"),
)
"""What the object `scores` has."""

MODEL = (
    Entry("source", "text", "a directory by its absolute path, or a name on the hub"),
    Entry("dtype", "dtype", "of its weights and its cache"),
    Entry("max_length", "length, optional", "as `kvzip.load` was given it"),
    Entry("rope", "object, optional", "as `kvzip.load` was given it"),
    Entry("weights, head_weights, activations", "text, optional", "as `kvzip.load` was given them"),
)
"""What the object `model` has."""

SCORES_FILE = (
    Entry("fingerprint", "text", "of the model, as in a cache"),
    Entry("tokens", "text", "SHA-256 of the token ids before `stop`"),
    *SCORES[:3],
)

HEAD_SCORES_FILE = (
    Entry("fingerprint", "text", "the model's `identity`, without RoPE scaling and dtype; empty if unknown"),
    Entry("family", "text", "of the model's architecture"),
    Entry("method", "text", "how the scores were made"),
    Entry("layers", "list", "the scored layers"),
    Entry("sink, recent", "count", "first and last tokens that dropped heads keep in DuoAttention"),
    Entry("sources", "list", "a name, a number of tokens and a SHA-256 of the ids for each text"),
)

KINDS = {"RaggedCache": CACHE, "DenseCache": CACHE, "Scores": SCORES_FILE, "HeadScores": HEAD_SCORES_FILE}
"""What a file has beside `FILE`, by its entry `cache`."""

TENSORS = (
    Stored("token_ids", "i64", "tokens", "all tokens, those of the tail too"),
    Stored("layers.N.X", "float", "rows, D", "the rows of head 0, then of head 1, ...; each oldest first", "RaggedKV"),
    Stored("layers.N.X", "float", "1, H, length, D", "a row for each token", "DenseKV"),
    Stored("layers.N.X", "float", "1, H, W, D", "tokens `start` to `length`, of a layer with a window", "WindowKV"),
    Stored("layers.N.offsets", "i32", "H + 1", "of `RaggedKV`: head h owns rows `offsets[h]` to `offsets[h + 1]`"),
    Stored("layers.N.positions", "i32", "rows", "of `RaggedKV`: the token of each row, ascending within a head"),
    Stored("layers.N.bias", "f16 or f32", "rows", "of `RaggedKV`: added to each row's logit, after scale and softcap"),
    Stored("layers.N.X.codes", "u8", "rows, D * bits / 8", "quantized rows in place of `layers.N.X`, see below"),
    Stored(
        "layers.N.X.turned", "u8", "rows, D * bits / 8", "in place of `codes`: those of rows that are turned, see below"
    ),
    Stored("layers.N.X.scale", "f16 or f32", "rows, D / group", "value d: `zero + scale * code` of group `d // group`"),
    Stored("layers.N.X.zero", "f16 or f32", "rows, D / group", "the value of code 0 in each group"),
    Stored("layers.N.X.center", "f32", "H, D", "with `channels`: a key of head h is `center[h] + spread[h] * x`"),
    Stored("layers.N.X.spread", "f32", "H, D", "with `channels`: the factor of x, which is what scale and zero give"),
    Stored("tail.X.N", "float", "1, H, R, D", "of every layer, windows too; rows from `tail.lengths` on mean nothing"),
    Stored("tail.lengths", "i32", "1", "tokens of the tail"),
    Stored("scores.values", "f32", "L, H, length - start", "of each evictable pair, removed ones too; larger stay"),
    Stored("scores.codes", "u8", "L, H, length - start", "in place of `scores.values`: a score is `levels[code]`"),
    Stored("scores.levels", "f32", "K", "the values that scores in 8 bits may have, ascending, at most 256"),
    Stored("pieces.ids", "i64", "P", "the different token ids, ascending"),
    Stored("pieces.offsets", "i64", "P + 1", "the UTF-8 of `ids[i]` is `bytes[offsets[i]:offsets[i + 1]]`"),
    Stored("pieces.bytes", "u8", "bytes", "the UTF-8 of all of them; one may begin or end within a character"),
)
"""The tensors of a cache's file. N numbers a layer, X is k or v."""

_BY_NAME = {(entry.name, entry.of): entry for entry in TENSORS}


def fits(name: str, of: str, dtype: str, shape: Sequence[int], sizes: Mapping[str, int]) -> bool:
    """Returns whether a tensor of a cache's file is as the table says; axes without a size may have any."""
    entry = _BY_NAME[re.sub(r"\.[kv]\b", ".X", re.sub(r"\.\d+\b", ".N", name)), of]
    axes = entry.axes.split(", ")
    dtypes = ("BF16", "F16", "F32", "F64") if entry.dtype == "float" else entry.dtype.upper().split(" OR ")
    wanted = [{"1": 1, **sizes}.get(axis) for axis in axes]
    fitting = len(shape) == len(axes) and all(n in (None, m) for n, m in zip(wanted, shape, strict=True))
    return fitting and dtype in dtypes


def check_header(header: Mapping[str, Any]) -> None:
    """Raises Damaged if an entry has another type than it must, or entries contradict each other."""
    _check(header, FILE)
    _check(header, KINDS.get(header["cache"], ()))
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
    return KINDS.get(header["cache"]) is CACHE


def ratio_of(kept: int, total: int) -> float:
    """Returns the fraction of pairs that is kept."""
    return kept / total if total else 1.0


def bits_of(header: Mapping[str, Any]) -> int | list[int] | None:
    """Returns the bits of a cache's quantized rows, [keys, values] if they differ; None if rows are in its dtype."""
    for spec in header["layers"]:
        if spec.get("bits") is not None:
            own = spec.get("value_bits")
            return spec["bits"] if own is None else [spec["bits"], own]
    return None


def entry(header: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns a header's entry that should be an object, such as `note`; {} if it is missing or of another type."""
    value = header.get(name)
    return value if isinstance(value, dict) else {}


def dtype_of(fingerprint: str) -> str | None:
    """Returns the dtype at the end of a fingerprint, which is "identity-dtype"; None if there is none."""
    dtype = fingerprint.rpartition("-")[2]
    return dtype if dtype in DTYPES else None


def foreign(found: str, expected: str) -> str:
    """Returns why something of fingerprint `found` does not belong to the model of `expected`; empty if it does.

    If only the dtype differs, the reason says so.
    """
    if found == expected:
        return ""
    (identity, _, theirs), (own, _, ours) = (x.rpartition("-") for x in (found, expected))
    if identity and identity == own and theirs in DTYPES:
        return f"its pairs are {theirs}, the model is {ours}: load the model in {theirs}"
    shown = visible_line(found, limit=300)
    return f"its fingerprint is {shown!r}, the model's {expected!r}: take the model that made it"


def _check(values: Mapping[str, Any], entries: tuple[Entry, ...]) -> None:
    for one in entries:
        kind, _, optional = one.type.partition(", ")
        for name in one.names.split(", "):
            value = values.get(name)
            if value is not None or not optional:
                require(_TYPES[kind](value), f"{name} is {value!r}")


def is_offsets(name: str) -> bool:
    """Whether a tensor says where the rows of each head begin."""
    return name.startswith("layers.") and name.endswith(".offsets")


def is_divided(name: str) -> bool:
    """Whether a tensor holds rows or heads, of which a rank has its own."""
    return name.startswith(("layers.", "tail.k.", "tail.v.")) and not is_offsets(name)
