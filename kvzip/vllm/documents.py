"""The documents of a server: what is loaded, who reads it, and the table that attention finds it in."""

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch

from kvzip import ops
from kvzip.cache import RaggedCache, as_ragged, load_cache, read_header
from kvzip.cache.rows import pack
from kvzip.files.schema import bits_of
from kvzip.models import ModelConfig
from kvzip.ops.types import Context, ContextTable, Quantized
from kvzip.vllm.settings import Settings, check_name

SALT = "kvzip:"
"""What salts of pages begin with that stand for a document."""


@dataclass(frozen=True)
class Server:
    """What documents must fit, one of the model's `fingerprints` among it.

    `room` is the number of positions that are left of the model's for questions and answers (`max_model_len`),
    `longest` the number of positions that the model has.
    """

    config: ModelConfig
    fingerprints: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype
    room: int
    longest: int

    @property
    def fingerprint(self) -> str:
        """The one that a file is compared with."""
        return self.fingerprints[0]


@dataclass(frozen=True)
class Document:
    """A document that requests may name. `key` stands for its content in the hash of a request's pages."""

    name: str
    file: str
    key: str
    place: int
    tokens: int
    chat: bool
    kept: int
    total: int
    size_bytes: int


class Documents:
    """The documents of one engine, shared by its scheduler and its worker, which are in one thread of one process.

    A dropped document stays in memory until the last request that reads it has ended.
    """

    def __init__(self) -> None:
        self._table: ContextTable | None = None
        self._server: Server | None = None
        self._bits: int | list[int] | None = None
        self._biased = False
        self._named: dict[str, Document] = {}
        self._dropped: list[Document] = []
        self._readers: dict[str, Document] = {}  # by request

    def start(self, server: Server, settings: Settings) -> None:
        """Makes the table, and loads the documents that are to be there from the start.

        Raises: as `load` does.
        """
        self._server, self._bits, self._biased = server, settings.bits, settings.bias
        caches = {name: self._read(Path(file)) for name, file in settings.documents.items()}
        like = _formats(server, settings, list(caches.values()))
        self._table = ops.context_table(like, settings.capacity, biased=settings.bias)
        for name, file in settings.documents.items():
            self.put(name, caches[name], file=Path(file).name, key=_key(Path(file)))

    @property
    def table(self) -> ContextTable:
        """The documents' rows, as `ops.decode_rows` reads them."""
        assert self._table is not None
        return self._table

    def load(self, name: str, path: Path) -> dict[str, Any]:
        """Loads a document under a name that is not in use, and returns what it is.

        Raises: ValueError for a file that this server cannot read (of another model, of other bits, too long), a name
            in use, or more documents than the table has places; OSError; torch.OutOfMemoryError.
        """
        check_name(name)
        if name in self._named:
            raise ValueError(f"expected a name that is not in use, got {name!r}: drop it first, or choose another")
        self._free_place()
        return self.put(name, self._read(path), file=path.name, key=_key(path))

    def put(self, name: str, cache: RaggedCache, *, file: str, key: str) -> dict[str, Any]:
        """Makes a cache a document; nothing but the format of its rows is checked. See `Document` for the arguments."""
        place = self._free_place()
        layers = [_fitted(layer, form) for layer, form in zip(_contexts(cache), self.table.formats, strict=True)]
        ops.put_context_(self.table, place, layers)
        self._named[name] = Document(
            name=name,
            file=file,
            key=key,
            place=place,
            tokens=len(cache.token_ids),
            chat=cache.chat,
            kept=cache.kept,
            total=cache.total,
            size_bytes=sum(_bytes(x) for layer in layers for x in (layer.k, layer.v)),
        )
        return _shown(self._named[name], readers=0)

    def list(self) -> list[dict[str, Any]]:
        """Returns what each document is, with the number of requests that read it."""
        readers = list(self._readers.values())
        return [_shown(document, readers=readers.count(document)) for document in self._named.values()]

    def drop(self, name: str) -> dict[str, Any]:
        """Takes a document away from new requests; those that read it go on. Raises KeyError for an unknown name."""
        document = self._named.pop(name)
        self._dropped.append(document)
        self._sweep()
        return _shown(document, readers=list(self._readers.values()).count(document))

    def hold(self, request: str, name: str) -> Document | None:
        """Notes that a request reads a document, and returns it; None if there is none of that name."""
        document = self._named.get(name)
        if document is not None:
            self._readers[request] = document
        return document

    def held(self, request: str) -> Document | None:
        """Returns the document that a request reads."""
        return self._readers.get(request)

    def release(self, request: str) -> None:
        """Notes that a request has ended."""
        if self._readers.pop(request, None) is not None:
            self._sweep()

    def _sweep(self) -> None:
        """Frees dropped documents that no request reads."""
        if not self._dropped:
            return
        held = [document.place for document in self._readers.values()]
        for document in [x for x in self._dropped if x.place not in held]:
            ops.drop_context_(self.table, document.place)
            self._dropped.remove(document)

    def _free_place(self) -> int:
        taken = {document.place for document in (*self._named.values(), *self._dropped)}
        free = [place for place in range(len(self.table.layers)) if place not in taken]
        if not free:
            raise ValueError(
                f"expected fewer than {len(self.table.layers)} documents, got that many: drop one, or serve with a "
                "larger capacity"
            )
        return free[0]

    def _read(self, path: Path) -> RaggedCache:
        """The cache of a file that fits this server."""
        server = self._server
        assert server is not None
        header = read_header(path)
        bits, needed = bits_of(header), header["tokens"] + server.room
        if bits != self._bits:
            raise ValueError(
                f"expected a document of {_bits(self._bits)}, got {path.name} of {_bits(bits)}: all documents of a "
                'server have the same, which "bits" of kvzip in --additional-config names'
            )
        if header["tail"]:
            raise ValueError(
                f"expected a document without turns after it, got {path.name} with some: fold them into it (kvzip.fold)"
            )
        if needed > server.longest:
            raise ValueError(
                f"expected document, question and answer of at most {server.longest} positions, got {needed} "
                f"({header['tokens']} of {path.name}, and --max-model-len {server.room}): lower --max-model-len"
            )
        if header["fingerprint"] in server.fingerprints:
            server = replace(server, fingerprints=(header["fingerprint"],))
        cache = as_ragged(load_cache(path, model=server))
        if not self._biased and any(layer.bias is not None for layer in _contexts(cache)):
            raise ValueError(
                f"expected a document without biases, got {path.name} with some: compress it without --refit, or serve "
                'with "bias": true for kvzip in --additional-config'
            )
        return cache


def salted(key: str | None, salt: str | None) -> str:
    """Returns the salt of pages behind a document of that key (None: of none), for a request with a salt of its own.

    It begins with `SALT`, and is another for each other pair.
    """
    return SALT + hashlib.sha256(json.dumps([key, salt]).encode()).hexdigest()


def documents_of(instance: str) -> Documents:
    """Returns the documents of the engine of that `instance_id`, the same for its scheduler and its worker.

    They live as long as one of the two does.
    """
    return _engines().setdefault(instance, Documents())


@functools.cache
def _engines() -> WeakValueDictionary[str, Documents]:
    """The documents of the engines of this process: vLLM's scheduler and worker have nothing in common but a name."""
    return WeakValueDictionary()


def _contexts(cache: RaggedCache) -> list[Context]:
    return [Context(x.k, x.v, x.offsets, getattr(x, "bias", None)) for x in cache.context]  # type: ignore[union-attr]


def _formats(server: Server, settings: Settings, caches: Sequence[RaggedCache]) -> list[Context]:
    """The formats of layers: rows in the model's dtype or in bits, whose steps are as wide as any document's.

    Without documents at the start steps are float32, which holds those of all files.
    """
    config, count = server.config, len(server.config.layers)
    offsets = torch.zeros(config.num_kv_heads + 1, dtype=torch.int32, device=server.device)
    rows = torch.empty((0, config.head_dim), dtype=server.dtype, device=server.device)
    if settings.bits is None:
        return [Context(rows, rows, offsets)] * count
    if not caches:
        none = rows.float().expand(config.num_kv_heads, 0, -1)
        keys, values = settings.bits if isinstance(settings.bits, list) else (settings.bits, settings.bits)
        layer = pack(none, none, none[..., 0].bool(), [0] * config.num_kv_heads, bits=(keys, values))
        return [Context(_wide(layer.k), _wide(layer.v), offsets)] * count
    widest = list(_contexts(caches[0]))
    for cache in caches[1:]:
        widest = [_widened(a, b) for a, b in zip(widest, _contexts(cache), strict=True)]
    return widest


def _widened(a: Context, b: Context) -> Context:
    """`a` with steps as wide as those of both."""
    return replace(a, k=_like(a.k, b.k), v=_like(a.v, b.v))


def _fitted(layer: Context, form: Context) -> Context:
    return replace(layer, k=_like(layer.k, form.k), v=_like(layer.v, form.v))


def _wide(x: Any) -> Any:
    return replace(x, scale=x.scale.float(), zero=x.zero.float())


def _like(x: Any, other: Any) -> Any:
    if not isinstance(x, Quantized) or not isinstance(other, Quantized):
        return x
    scale, zero = (torch.promote_types(getattr(x, n).dtype, getattr(other, n).dtype) for n in ("scale", "zero"))
    return replace(x, scale=x.scale.to(scale), zero=x.zero.to(zero))


def _key(path: Path) -> str:
    """A digest of a file's content, by the sums of its tensors."""
    header = {name: value for name, value in read_header(path).items() if name not in ("note", "library")}
    return hashlib.sha256(json.dumps(header, sort_keys=True, default=str).encode()).hexdigest()


def _bytes(x: Any) -> int:
    parts = (x.codes, x.scale, x.zero) if isinstance(x, Quantized) else (x,)
    return sum(part.numel() * part.element_size() for part in parts)


def _shown(document: Document, *, readers: int) -> dict[str, Any]:
    hidden = ("key", "place")
    return {name: value for name, value in asdict(document).items() if name not in hidden} | {"requests": readers}


def _bits(bits: int | list[int] | None) -> str:
    told = " and ".join(map(str, bits)) if isinstance(bits, list) else bits
    return "rows in the model's dtype" if bits is None else f"{told} bits"
