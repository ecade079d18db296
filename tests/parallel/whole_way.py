"""The whole way of a document, which ranks go together, and one process for the comparison."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kvzip
from kvzip.attention import new_layers, prefill_attend
from kvzip.cache.rows import kept_mask
from kvzip.models import transformer
from kvzip.options import Refitting
from kvzip.parallel import reduction
from kvzip.refitting import refit_and_measure

TEXT = "The lighthouse at Cape Rouen was built in 1871. Its keeper counted 312 steps. " * 2
QUESTION = "How many steps?"


def way(
    directory: Path, out: Path, *, group: Any = None, dtype: torch.dtype = torch.float32, brief: bool = False
) -> dict[str, Any]:
    """Loads a model and does everything that ranks share, or only what depends on the family. Files are out/NAME."""
    model = kvzip.load(directory, dtype=dtype, device="cpu", group=group)
    found: dict[str, Any] = {"fingerprint": model.fingerprint, "shapes": shapes(model)}
    ids = torch.arange(3, 103) % model.config.vocab_size
    layers = new_layers(model.config, len(ids), dtype=dtype, device=model.device)
    with torch.no_grad():
        hidden = kvzip.models.forward(model, ids[None], torch.arange(len(ids)), prefill_attend(model.config, layers, 0))
        found["logits"] = kvzip.models.logits(model, hidden)
    if dtype == torch.float64:
        return found
    dense = kvzip.prefill(model, TEXT)
    scored = kvzip.score(model, dense)
    assert scored.scores is not None
    found["scores"] = scored.scores.values
    found["kvzip+"] = kvzip.score(model, dense, method="kvzip+").scores.values
    given = replace(scored, scores=replace(scored.scores, values=made_up(scored.scores.values)))
    found["choices"] = {
        name: kept_mask(kvzip.compress(given, **how))
        for name, how in {
            "pair": {"ratio": 0.3, "protect": [(2, 5)], "min_rows": 2},
            "layer": {"ratio": 0.4, "level": "layer"},
            "uniform": {"ratio": 0.5, "level": "uniform"},
            "head": {"ratio": 0.5, "level": "head", "sink": 2, "recent": 3},
            "threshold": {"threshold": 0.5},
            "floor": {"ratio": 0.3, "floor": 0.4},
        }.items()
    }
    kvzip.save(dense, out / "dense.kvz")
    if brief:
        return found
    small = kvzip.compress(given, 0.4)
    found["counts"] = (small.kept, small.total)
    found["shrunk"] = kept_mask(kvzip.scores.shrink(small, 0.2, protect=[(0, 3)]))
    answers = [
        kvzip.generate(model, cache, [QUESTION, "When?"], max_tokens=6, temperature=heat)
        for cache, heat in (
            (small, 0.0),
            (kvzip.compress(given, 0.4, bits=8), 0.0),
            (dense, 0.0),
            (small, 0.8),
        )
    ]
    found["answers"] = [[x.token_ids for x in pair] for pair in answers]
    longer = kvzip.extend(model, small, "And then it was dark.")
    kvzip.save(longer, out / "longer.kvz", model=model, score_bits=8, note={"of": "ranks"})
    kvzip.save(kvzip.compress(given, 0.3, bits=4), out / "four.kvz", model=model)
    kvzip.scores.save(given, out / "scores.kvz")
    grown = kvzip.append(model, small, " And then it was light.", 0.5)
    found["grown"] = (grown.kept, grown.total, kept_mask(grown))
    if model.share is None or model.share.repeats == 1:
        fitted, mass = refit_and_measure(model, given, small, Refitting(chunk=40))
        kvzip.save(fitted, out / "fitted.kvz", model=model)
        found["mass"] = torch.stack([mass.before, mass.after])
    folded = kvzip.fold(model, longer, 0.5)
    found["folded"] = (folded.kept, folded.total, kept_mask(folded))
    stream = kvzip.prefill_compressed(model, TEXT, 0.4, segment=64)
    found["stream"] = (stream.kept, stream.total, kept_mask(stream))
    return found


def again(directory: Path, held: Path, out: Path, *, group: Any) -> dict[str, Any]:
    """Loads files of one process and saves them again, and asks them."""
    model = kvzip.load(directory, dtype=torch.float32, device="cpu", group=group)
    answers = []
    for name in ("longer", "four", "dense"):
        cache = kvzip.load_cache(held / f"{name}.kvz", model=model)
        note = {"of": "ranks"} if name == "longer" else None
        bits = 8 if name == "longer" else 32
        own = None if name == "dense" else model
        kvzip.save(cache, out / f"{name}.again.kvz", model=own, score_bits=bits, note=note)
        (answer,) = kvzip.generate(model, cache, [QUESTION], max_tokens=5)
        answers.append(answer.token_ids)
    return {"answers": answers, "refused": refused(model, held, out)}


def refused(model: Any, held: Path, out: Path) -> dict[str, str]:
    """What every rank is told of errors that only one of them sees, or the first."""
    told = {}

    def note(name: str, call: Any) -> None:
        try:
            call()
            told[name] = ""
        except Exception as error:
            told[name] = f"{type(error).__name__}: {error}"

    scored = kvzip.score(model, kvzip.prefill(model, TEXT))
    values = scored.scores.values.clone()
    values[0, -1, 3] = torch.nan
    broken = replace(scored, scores=replace(scored.scores, values=values))
    note("nan", lambda: kvzip.compress(broken, 0.3))
    note("there", lambda: kvzip.save(scored, held / "dense.kvz"))
    note("nowhere", lambda: kvzip.save(scored, out / "none" / "x.kvz"))
    note("whole", lambda: kvzip.generate(model, kvzip.load_cache(held / "dense.kvz"), QUESTION))
    note("checkpoint", lambda: kvzip.prefill_compressed(model, TEXT, 0.4, checkpoint=out / "x.partial"))
    if model.share.rank == 1:  # a value that only the second rank holds
        scored.layers[scored.scored_layers[0]].k[0, 0, -1] = torch.inf
    note("infinite", lambda: kvzip.compress(scored, 1.0, bits=8))
    note("damaged", lambda: kvzip.load_cache(held / "damaged.kvz", model=model))
    return told


def made_up(values: Tensor) -> Tensor:
    """Scores of few levels, so that most are ties, the same in every process."""
    drawn = torch.rand(values.shape, generator=torch.Generator().manual_seed(5))
    return (drawn * 8).floor() / 8


def shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the first layer's weights and of the head."""
    first = model.weights.layers[0]
    names = ("qkv", "o", "gate_up", "down")
    return {name: tuple(getattr(first, name).shape) for name in names} | {"head": tuple(model.weights.unembed.shape)}


def all_of(group: Any, models: dict[str, tuple[str, str, bool]], directory: Path) -> dict[str, Any]:
    """What a rank finds of each model: where it is, and where the files of one process are."""
    transformer._ROWS_PER_BLOCK = 64  # so that sums run beside products
    reduction.BESIDE_BYTES = 0
    told = {}
    for name, (source, held, brief) in models.items():
        out = directory / f"made-{name}"
        out.mkdir(exist_ok=True)
        told[name] = way(Path(source), out, group=group, brief=brief)
        if brief:
            continue
        told[name]["again"] = again(Path(source), Path(held), out, group=group)
    return told
