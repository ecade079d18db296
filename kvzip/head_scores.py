"""Head scores: one number for each layer and KV head, made once from any text, good for every later context.

A head that never attends far back while the model repeats one text does not need its context in another text either.
`make` scores some texts once and keeps the largest score of each head; `attach` then lets `compress(level="head")` keep
or drop the whole context of each head without a scoring pass. The authors recommend a ratio of 0.6.

    scores = head_scores.make(model, [essay, code])
    head_scores.save(scores, "heads.safetensors")
    small = kvzip.compress(head_scores.attach(kvzip.prefill(model, document), scores), 0.6, level="head")

Source: KVzip, arXiv 2505.23416, section 4.2; DuoAttention, arXiv 2410.10819, for the files of `to_duo_attention`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from .cache import DenseCache, Scores, check_whole, global_layers, read_header
from .checks import check_kind, check_path, check_text_or_ids, check_texts, check_values
from .display import visible_line
from .files import duo_attention
from .files.damage import refusing, require
from .files.header import open_file
from .files.tensors import read_tensor, write_file
from .hub import shipped_name, shipped_scores
from .inputs import digest_of, encode
from .models import Model
from .options import Turn
from .prefilling import Progress, prefill
from .scoring import score

RECOMMENDED_RATIO = 0.6


@dataclass(frozen=True)
class Source:
    """A text that head scores were made from: what the caller calls it, its tokens, and the SHA-256 of their ids."""

    name: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class HeadScores:
    """How much each head needs its context, larger is kept first.

    values[l, h] belongs to the scored layer layers[l] and KV head h. `fingerprint` and `family` say which model made
    them (see `fingerprint_of`), or are "" where that is not known. `method` says how. `sink` and `recent` are the first
    and last tokens that dropped heads keep in DuoAttention, whose files hold them; `compress` takes them as arguments.
    """

    values: Float32[Tensor, "L H"]
    layers: tuple[int, ...]
    fingerprint: str
    family: str
    method: str
    sources: tuple[Source, ...]
    sink: int = 128
    recent: int = 256

    def __repr__(self) -> str:
        layers, heads = self.values.shape
        made = f"by {visible_line(self.method)} from {len(self.sources)} texts, sink {self.sink}, recent {self.recent}"
        where = f"{str(self.values.dtype).removeprefix('torch.')}, {self.values.device}"
        return f"HeadScores({layers} layers of {heads} heads, {made}, {where})"


def make(
    model: Model,
    text: str | Int64[Tensor, " S"] | Sequence[str | Int64[Tensor, " S"]],
    *,
    names: Sequence[str] | None = None,
    template: bool = True,
    scope: str = "context",
    chunk: int = 2_000,
    progress: Progress | None = None,
) -> HeadScores:
    """Returns the head scores of one text, or the largest of several texts'.

        values[l, h] = max over texts and their tokens e of score(model, prefill(model, text)).scores.values[l, h, e]

    A text's pairs and scores are freed before the next one is read. Pass tens of thousands of tokens of the kind that
    the model will read, as the authors do: a book, and source code too for questions about code.

    Args:
        text: texts or their token ids, without any prefix.
        names: what to call each text in `sources`; None numbers them.
        template, scope, chunk: as in `prefill` and `score`.
        progress: called with (tokens done, tokens in all); each context token counts twice, read and repeated.

    Raises: ValueError for no text, an empty one, a wrong number of names, NaN scores, and whatever `prefill` and
        `score` refuse.
    Source: KVzip, arXiv 2505.23416, section 4.2: the largest score over one book of 88,000 tokens, and over several
    such files where there are any.
    """
    check_kind(model, Model)
    texts = [text] if isinstance(text, (str, Tensor)) or not isinstance(text, Iterable) else list(text)
    for one in texts:
        check_text_or_ids(one, "text")
    if not texts:
        raise ValueError("expected at least one text to make head scores from, got none")
    names = [f"text {n + 1}" for n in range(len(texts))] if names is None else check_texts(names, "names")
    if len(names) != len(texts):
        raise ValueError(f"expected names for each of {len(texts)} texts, got {len(names)}: pass as many")
    contexts = [encode(model, one, Turn(template=bool(template)))[1] for one in texts]
    total, done = 2 * sum(map(len, contexts)), 0

    tell = progress or (lambda done, total: None)

    def stage(before: int, tokens: int) -> Progress:
        """A stage's callback, told in tokens of the whole. It counts what is left: a stage may count a prefix too."""
        return lambda now, of: tell(before + max(0, tokens - (of - now)), total)

    found = []
    for name, one, ids in zip(names, texts, contexts, strict=True):
        cache = prefill(model, one, template=template, progress=stage(done, len(ids)))
        cache = score(model, cache, scope=scope, chunk=chunk, progress=stage(done + len(ids), len(ids)))
        assert cache.scores is not None
        values, layers, method = cache.scores.values.amax(-1), cache.scores.layers, cache.scores.source
        _check_numbers(values)  # amax keeps a NaN
        source = Source(name, len(ids), digest_of(ids))
        found.append(HeadScores(values, layers, model.identity, model.config.family, method, (source,)))
        done += 2 * len(ids)
        del cache
    return combine(*found)


def combine(*scores: HeadScores) -> HeadScores:
    """Returns the largest of several head scores of one model, head by head; their sources follow each other.

    Raises: ValueError for none, or scores of other layers, heads or models, or made by other methods.
    """
    if not scores:
        raise ValueError("expected head scores to combine, got none: pass two or more")
    for one in scores:
        check_kind(one, HeadScores)
        check_values(one.values, "head scores")
    told = dict.fromkeys((one.layers, tuple(one.values.shape), one.fingerprint, one.method) for one in scores)
    if len(told) > 1:
        raise ValueError(
            f"expected head scores of one model and method, got {' and '.join(map(str, [*told][:2]))} "
            "(layers, shape, fingerprint, method): combine those of one model only"
        )
    return replace(
        scores[0],
        values=reduce(torch.maximum, (one.values.to(scores[0].values.device) for one in scores)),
        sources=tuple(source for one in scores for source in one.sources),
        sink=max(one.sink for one in scores),
        recent=max(one.recent for one in scores),
    )


def attach(cache: DenseCache, scores: HeadScores) -> DenseCache:
    """Returns a cache of the same pairs in which every token of a head has the head's score, as an expanded view.

    `compress(cache, 0.6, level="head", sink=..., recent=...)` then keeps whole heads. Without a prefix in front of the
    context (template=False) pass a few `sink` tokens: dropped heads need an attention sink. Only layers and heads
    are checked, because the scores of a model serve its fine-tunes; `load(path, model=model)` checks the model.

    Raises: ValueError for scores of other layers or heads, or a cache that was consumed.
    """
    check_whole(cache)
    check_kind(scores, HeadScores)
    check_values(scores.values, "head scores")
    layers = global_layers(cache)
    if scores.layers != layers or tuple(scores.values.shape) != (len(layers), cache.all_heads):
        raise ValueError(
            f"expected head scores of layers {layers} with {cache.all_heads} KV heads each (the cache's), got "
            f"{list(scores.values.shape)} of layers {scores.layers}: make them with this model"
        )
    values = scores.values.to(cache.device)[:, :, None].expand(-1, -1, cache.length - cache.start)
    return replace(cache, scores=Scores(values, layers, cache.start, cache.length, source="heads"))


def save(
    scores: HeadScores, path: str | Path, *, note: Mapping[str, Any] | None = None, overwrite: bool = False
) -> None:
    """Writes head scores to one safetensors file, whole or not at all.

    Args:
        note: anything else that JSON can hold, for the header (`kvzip.cache.read_header` reads it).
        overwrite: replaces a file that kvzip wrote. Any other file is left as it is, always.

    Raises: ValueError for NaN; TypeError for a note that JSON cannot hold; FileExistsError for a file that is there and
        must not be replaced; OSError if it cannot be written.
    """
    check_kind(scores, HeadScores)
    check_path(path, "path")
    check_values(scores.values, "head scores")
    _check_numbers(scores.values)
    header = {"cache": "HeadScores", **{k: v for k, v in asdict(scores).items() if k != "values"}}
    write_file(path, {"values": scores.values}, header, note=note, overwrite=overwrite)


def load(path: str | Path, *, model: Model | None = None) -> HeadScores:
    """Returns the head scores of a file that `save` wrote, on the CPU.

    Args:
        model: the model that they must have been made by, in any dtype, if given.

    Raises: FileNotFoundError; ValueError for a file of something else, of a newer major version, that is damaged, or
        of another model.
    """
    check_path(path, "path")
    if model is not None:
        check_kind(model, Model)
    with open_file(path) as file:
        name = visible_line(file.path.name)
        if file.header["cache"] != "HeadScores":
            raise ValueError(
                f"expected head scores, got a file of {file.header['cache']!r} in {name}: load_cache reads caches"
            )
        with refusing(file.path):
            scores = _from_header(file.header, read_tensor(file, "values"))
    if model is not None and scores.fingerprint != model.identity:
        raise ValueError(
            f"expected head scores made by this model ({model.identity}), got those of another "
            f"({visible_line(scores.fingerprint, limit=300)}) in {name}: make them with this model, or load without "
            "model= if it is one of its fine-tunes"
        )
    return scores


def shipped(model: Model | str) -> HeadScores:
    """Returns head scores that come with the library: those made by this model, or those of a name.

    A model finds its own by its weights, in every dtype. A name is one of `shipped_names`, also as the last part of a
    path or a hub id, in any case. The header of the file says what texts they were made from.

    Raises: ValueError that lists the names, if there are none.
    """
    files = shipped_scores()
    if isinstance(model, str):
        wanted = shipped_name(model)
        found = files.get(wanted)
    else:
        check_kind(model, Model)
        wanted = model.identity
        found = next((path for path in files.values() if read_header(path).get("fingerprint") == wanted), None)
    if found is None:
        raise ValueError(f"expected a model with shipped head scores, {', '.join(files)}, got {wanted!r}: call make")
    return load(found)


def shipped_names() -> tuple[str, ...]:
    """Returns the names of the models whose head scores come with the library."""
    return tuple(shipped_scores())


def to_duo_attention(scores: HeadScores, directory: str | Path, *, overwrite: bool = False) -> None:
    """Writes `full_attention_heads.tsv` and `config.json` as DuoAttention reads them.

    The first has a line of H tab-separated numbers for each layer; the second gives `sink_size` and `recent_size`,
    taken from the scores. DuoAttention keeps the heads above a quantile and adds noise of up to 1e-6 first, so heads
    that differ by less may change places.

    Args:
        overwrite: replaces DuoAttention's files, a config of these two sizes alone and the table beside it. Any other
            file, a model's `config.json` among them, is left as it is, always.

    Raises: ValueError for scores outside [0, 1], to which DuoAttention clips them, or of a model with window layers,
        which its file has no room for; FileExistsError for a file that is there and must not be replaced; OSError if
        they cannot be written.
    """
    check_kind(scores, HeadScores)
    check_path(directory, "directory")
    if scores.layers != tuple(range(len(scores.layers))):
        raise ValueError(
            f"expected scores of all layers, a row of DuoAttention's file for each, got layers {scores.layers}: "
            "it has no window layers"
        )
    _check_numbers(scores.values)
    low, high = (x.item() for x in scores.values.aminmax())
    if low < 0 or high > 1 + 1e-6:  # a softmax may exceed 1 by rounding
        raise ValueError(
            f"expected scores in [0, 1], to which DuoAttention clips them, got [{low:g}, {high:g}]: rescale them"
        )
    rows = scores.values.clamp(max=1).tolist()
    duo_attention.write(Path(directory), rows, (scores.sink, scores.recent), overwrite=overwrite)


def from_duo_attention(directory: str | Path) -> HeadScores:
    """Returns the head scores of a directory in DuoAttention's format, clipped to [0, 1] as its own loader does.

    The file names no model, so `fingerprint` and `family` are "". Numbers are rounded to float32.

    Raises: FileNotFoundError; ValueError for a table or a config that is not understood.
    """
    check_path(directory, "directory")
    rows, (sink, recent) = duo_attention.read(Path(directory))
    values = torch.tensor(rows, dtype=torch.float64).clamp(0, 1).float()
    return HeadScores(values, tuple(range(len(rows))), "", "", "duo-attention", (), sink, recent)


def fingerprint_of(model: Model) -> str:
    """Returns the model's identity: what it computes, whatever the dtype it was loaded in.

    `max_length` and RoPE scaling, which a caller may change, are not part of it.
    """
    check_kind(model, Model)
    return model.identity


def _check_numbers(values: Tensor) -> None:
    if values.isnan().any():
        raise ValueError("expected head scores without NaN, got some: the model overflowed, use bfloat16 or float32")


def _from_header(header: Mapping[str, Any], values: Tensor) -> HeadScores:
    """The scores of a file whose header has entries of the right types. Raises Damaged if they do not fit together."""
    layers = tuple(header["layers"])
    counts = all(type(n) is int and n >= 0 for n in layers)
    require(counts and list(layers) == sorted(set(layers)), f"layers {layers}")
    fits = values.dtype == torch.float32 and values.ndim == 2 and len(values) == len(layers) and values.numel() > 0
    require(fits, f"values of shape {list(values.shape)} and {values.dtype} for {len(layers)} layers")
    _check_numbers(values)
    sources = tuple(Source(**entry) for entry in header["sources"])
    for one in sources:
        require((type(one.name), type(one.sha256)) == (str, str), f"source {one}")
        require(type(one.tokens) is int and one.tokens >= 0, f"tokens is {one.tokens!r}")
    told = {name: header[name] for name in ("fingerprint", "family", "method", "sink", "recent")}
    return HeadScores(values, layers, sources=sources, **told)
