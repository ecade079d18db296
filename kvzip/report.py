"""One self-contained HTML page about a saved cache: what is kept of its document, token by token and head by head.

The page is `data/report.html` with the file's facts as JSON and its arrays as deflate-compressed base64 in it. It
needs no network and no model.
"""

import base64
import codecs
import html
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from .cache import DenseCache, RaggedCache, RaggedKV, check_pairs, encode_levels, full_nbytes, nbytes
from .cache.reading import open_cache, read_cache, read_texts
from .cache.rows import kept_mask
from .display import visible_line
from .files import schema
from .files.writing import whole_file
from .generation import generate
from .inputs import query_ids
from .machine import timed
from .models import Model
from .options import LEVELS
from .prefilling import read_again
from .refitting import mass_of_note, note_of
from .sources import Source, find_sources

_SHOWN = ("title", "document", "model", "mass_kept")  # entries of a note that the page shows elsewhere


@dataclass(frozen=True)
class Asked:
    """A question, its answers from the full and the compressed cache in so many seconds, and the latter's sources."""

    question: str
    full: str
    small: str
    full_s: float
    small_s: float
    sources: tuple[Source, ...]


def write_report(file: Path, out: Path, *, answers: Sequence[Asked] = ()) -> None:
    """Writes the page of a file that `kvzip.save` wrote, whole or not at all.

    It shows the document with each token shaded by the fraction of layers and heads that keep its pair, a map of the
    fractions by layer and head, the distribution of the scores, sizes, and what the file's note says. Where the file
    has scores, a slider shows what another ratio would keep, at the file's level, by scores in 8 bits (see
    `cache.encode_levels`), without protected or minimum rows. Text needs a file saved with `model`; otherwise tokens
    are shown by their ids.

    Raises: FileNotFoundError; ValueError for a file that is damaged or holds no cache; OSError.
    """
    with open_cache(file) as opened:
        cache, token_texts = read_cache(opened, pairs=False), read_texts(opened)
    facts, arrays = describe(opened.header, cache, token_texts)
    facts["answers"] = [asdict(each) for each in answers]
    facts |= {"file": visible_line(file.name), "fileBytes": file.stat().st_size}
    facts["title"] = facts["title"] or visible_line(file.stem)
    # a note may hold lone surrogates, which UTF-8 cannot encode: they are escaped as in JSON
    with whole_file(out) as partial, open(partial, "wb") as written:
        written.writelines(part.encode("utf-8", "backslashreplace") for part in render(facts, arrays))


def answered(
    model: Model,
    cache: DenseCache | RaggedCache,
    questions: Sequence[str],
    *,
    sources: int = 3,
    **options: Any,
) -> list[Asked]:
    """Returns the answers to questions from a cache and from the full cache of its context, which is read again.

    Args:
        questions: without a chat template each continues the document.
        options: of `kvzip.generate`: max_tokens, stop and so on.

    Raises: as `generate` and `prefill` do.
    """
    check_pairs(cache)
    full, found = read_again(model, cache), []
    for question in questions:
        (own, full_s), (other, small_s) = (
            timed(model.device, partial(generate, model, each, question, template=cache.chat, **options))
            for each in (full, cache)
        )
        (asked,) = query_ids(model, cache, [question], template=cache.chat)
        from_where = find_sources(model, cache, asked, other.token_ids, count=sources)
        found.append(Asked(question.strip(), own.text, other.text, full_s, small_s, from_where))
    return found


def describe(
    header: Mapping[str, Any], cache: DenseCache | RaggedCache, token_texts: Mapping[int, bytes]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns what the page says of a cache (JSON) and the arrays that it computes with.

    Arrays, little-endian: `ids` [S] int32 and `texts` [S] int32, a token's place in the list of texts; `kept`, the
    mask of `kept_mask` as bits, lowest first; with scores `codes` [L H E] uint8 and `levels` [K] float32, as
    `encode_levels` gives them.

    Args:
        token_texts: the UTF-8 of each different token; empty where the file has none.

    Raises: ValueError for a cache of window layers only.
    """
    mask = kept_mask(cache)
    if not mask.shape[0]:
        raise ValueError("expected a cache with global layers, got sliding windows in all: nothing is ever dropped")
    texts, places = _texts(cache.token_ids.tolist(), token_texts)
    note, origin = (schema.entry(header, name) for name in ("note", "model"))
    method, source = header.get("method", ""), origin.get("source", "")
    level = method.rpartition("/")[2].partition("+")[0]  # what comes after it was done to the pairs that it chose
    mass = mass_of_note(note)
    fits = mass is not None and mass.before.shape == mask.shape[:2]  # anyone may have written the note
    facts: dict[str, Any] = {
        "title": next((str(note[key]) for key in ("title", "document") if note.get(key)), ""),
        "format": ".".join(map(str, header["version"])),
        "library": str(header.get("library", "")),
        "model": Path(source).name if Path(source).is_absolute() else source,
        "dtype": origin.get("dtype", ""),
        "method": method,
        "level": level if level in LEVELS else "pair",
        "bits": schema.bits_of(header),
        "biases": any(isinstance(layer, RaggedKV) and layer.bias is not None for layer in cache.context),
        "mass": note_of(mass) if mass is not None and fits else None,
        "layers": list(cache.scored_layers),
        "windows": len(cache.context) - len(cache.scored_layers),
        "length": cache.context_length,
        **{name: getattr(cache, name) for name in ("heads", "start", "kept", "total")},
        "fullBytes": full_nbytes(cache),
        "cacheBytes": nbytes(cache),
        "answers": [],
        "note": list(_flat({key: value for key, value in note.items() if key not in _SHOWN})),
        "hasText": bool(token_texts),
        "texts": texts,
    }
    arrays = {
        "ids": cache.token_ids.numpy().astype("<i4"),
        "texts": np.array(places, dtype="<i4"),
        "kept": np.packbits(mask.flatten().numpy(), bitorder="little"),
    }
    if cache.scores is not None:
        codes, levels = encode_levels(cache.scores.values)
        arrays |= {"codes": codes.numpy(), "levels": levels.numpy().astype("<f4")}
    return facts, arrays


def render(facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Iterator[str]:
    """Yields the page of what `describe` returns, in parts. `<` is escaped, so that no text ends its script block."""
    page = resources.files("kvzip").joinpath("data/report.html").read_text(encoding="utf-8")
    before, after = page.split("<!-- data -->")
    yield before.replace("<!-- title -->", html.escape(facts["title"]))
    written = json.dumps(facts, ensure_ascii=False).replace("<", "\\u003c")
    yield f'<script type="application/json" id="facts">{written}</script>\n'
    for name, array in arrays.items():
        packed = base64.b64encode(zlib.compress(np.ascontiguousarray(array).tobytes())).decode("ascii")
        yield f'<script type="text/plain" id="{name}">{packed}</script>\n'
    yield after


def _texts(ids: list[int], token_texts: Mapping[int, bytes]) -> tuple[list[str], list[int]]:
    """The different texts of tokens, and which one each token shows; a split character goes to its last token."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    places: dict[str, int] = {}
    order = []
    for n, i in enumerate(ids):
        text = decoder.decode(token_texts[i], final=n + 1 == len(ids)) if token_texts else f"⟨{i}⟩"
        order.append(places.setdefault(text, len(places)))
    return list(places), order


def _flat(note: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """The entries of a note; a nested one is named by its keys, joined by spaces."""
    for key, value in note.items():
        name = f"{path} {key}".strip()
        if isinstance(value, Mapping):
            yield from _flat(value, name)
        elif isinstance(value, list) and all(isinstance(each, str) for each in value):
            yield name, ", ".join(value)
        elif value is not None:
            yield name, value if isinstance(value, (int, float, str)) else json.dumps(value)
