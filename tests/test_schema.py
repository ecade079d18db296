"""The schema of files: the page of the format has its tables, what is written is what it says, and the bytes stay."""

import dataclasses
import hashlib
import json
import math
import re
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import kvzip
import random_model
import rewritten
from kvzip import head_scores, scores
from kvzip.cache import RaggedCache, RaggedKV, Scores, Tail, WindowKV, as_ragged
from kvzip.cache.caches import tensors_of
from kvzip.files import header, schema, tensors
from kvzip.ops import Channels, Quantized, decode_schedule

PAGE = Path(__file__).parents[1] / "docs" / "file_format.md"
SAVED = {
    "named": "bef6becbdbd424a57b685c2a70d76653218e7a00e03449bd6204624b3b128a34",
    "plain": "0b370ad4a8dd2b25c0d30b9760b0fe26d0a2e11f449f7960d6e727e88d960f27",
    "scores": "53584ba0a142ebc0865fdec178516e689087707207bda2c0b2a3c70c8ddb40a3",
    "biased": "b5ade908b30e0c801a4ebacbf7b4f7dfcda4448c15d56a018f59abf924946ee2",
    "heads": "c8608e1e96ef962eb04ef7ef84552d19635cffe322e9f04f552449b47f75edf8",
}
"""SHA-256 of the files of `fixed_cache` in version 3.0, with "0" for the library's version."""


def fixed_cache():
    """A small cache whose every number is exact, with all that a file may hold: a window, quantized rows with and
    without channels, a tail and scores."""

    def numbers(*shape):
        return (torch.arange(math.prod(shape)) % 13 - 6).reshape(shape).to(torch.bfloat16)

    def ragged(k, v):
        offsets = torch.tensor([0, 3, 5], dtype=torch.int32)
        positions = torch.tensor([0, 2, 5, 0, 4], dtype=torch.int32)
        return RaggedKV(k, v, offsets, positions, decode_schedule(offsets))

    def packed(channels):
        codes = (torch.arange(20, dtype=torch.uint8) * 11).reshape(5, 4)
        return Quantized(codes, torch.full((5, 2), 0.5).half(), torch.full((5, 2), -1.0).half(), 4, 4, channels)

    layers = (
        ragged(numbers(5, 8), numbers(5, 8)),
        WindowKV(numbers(1, 2, 3, 8), numbers(1, 2, 3, 8), 3),
        ragged(packed(Channels(torch.ones(2, 8), torch.full((2, 8), 2.0))), packed(None)),
    )
    rows = (numbers(1, 2, 4, 8),) * 3
    tail = Tail(rows, rows, torch.tensor([2], dtype=torch.int32))
    return RaggedCache(
        context=layers,
        tail=tail,
        context_length=6,
        start=1,
        chat=True,
        token_ids=torch.tensor([258, 72, 105, 33, 32, 72, 258, 10]),
        fingerprint="ab-bfloat16",
        kept=6,
        total=20,
        scores=Scores(torch.arange(20.0).reshape(2, 2, 5) / 8, (0, 2), 1, 6, "kvzip-chunk"),
        method="kvzip-chunk/pair",
    )


def with_biases(cache):
    """The cache with a bias of each row in float16, and in the last layer in float32."""
    first, window, last = cache.context
    own = torch.arange(5.0) / 4 - 1
    return replace(cache, context=(replace(first, bias=own.half()), window, replace(last, bias=own)))


def with_wide_keys(cache):
    """The cache with keys in 8 bits where it has them in 4."""
    first, window, last = cache.context
    k = replace(last.k, codes=torch.cat([last.k.codes, last.k.codes + 1], 1), bits=8)
    return replace(cache, context=(first, window, replace(last, k=k)))


def with_turned_rows(cache):
    """The cache with rows that are turned where it has codes."""
    first, window, last = cache.context
    return replace(cache, context=(first, window, replace(last, k=replace(last.k, turned=True))))


def fixed_origin() -> Any:
    how = {"config": None, "fingerprint": "ab-bfloat16", "device": torch.device("cpu"), "dtype": torch.bfloat16}
    told = {"source": "org/name", "rope": {"rope_type": "linear", "factor": 2.0}, "max_length": 99}
    told |= {"quantized": None, "quantized_head": None, "activations": None}
    return types.SimpleNamespace(**how, **told, tokenizer=random_model.tokenizer())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Files of every kind: those of `SAVED`, a dense cache, and one with keys and values in different bits."""
    directory, cache = tmp_path_factory.mktemp("saved"), fixed_cache()
    source = head_scores.Source("a", 3, "ff")
    heads = head_scores.HeadScores(torch.ones(2, 2), (0, 2), "ab", "f", "m", (source,))
    model = random_model.make(random_model.config(windows=(None, 6)))
    model = dataclasses.replace(model, quantized="int8", quantized_head="fp8", activations="checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "LIBRARY", "0")
        kvzip.save(cache, directory / "named", model=fixed_origin(), score_bits=8, note={"title": "Anna"})
        kvzip.save(cache, directory / "plain")
        kvzip.save(with_biases(cache), directory / "biased")
        kvzip.save(with_wide_keys(cache), directory / "mixed")
        kvzip.save(with_turned_rows(cache), directory / "turned")
        scores.save(cache, directory / "scores", note={"a": 1})
        head_scores.save(heads, directory / "heads")
        kvzip.save(kvzip.prefill(model, "Happy families"), directory / "dense", model=model)
    return {path.name: path for path in directory.iterdir()}


@pytest.mark.parametrize("kind", SAVED)
def test_the_bytes_of_version_3_0_stay_as_they_are(saved, kind):
    """So files that were written before load, and what is written now loads there."""
    assert hashlib.sha256(saved[kind].read_bytes()).hexdigest() == SAVED[kind]


@pytest.mark.parametrize("kind", ["named", "plain", "biased", "mixed", "turned"])
def test_the_fixed_cache_comes_back(saved, kind):
    back, cache = kvzip.load_cache(saved[kind]), fixed_cache()
    change = {"biased": with_biases, "mixed": with_wide_keys, "turned": with_turned_rows}
    cache = change.get(kind, lambda cache: cache)(cache)
    assert (back.context[2].k.turned, back.context[2].v.turned) == (kind == "turned", False)
    assert back.scores is not None and cache.scores is not None
    for ours, theirs in zip(tensors_of(back), tensors_of(cache), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    assert torch.equal(back.scores.values, cache.scores.values) and back.method == cache.method


def header_table(entries):
    rows = [f"| `{one.names.replace(', ', '`, `')}` | {one.type} | {one.about} |" for one in entries]
    return "\n".join(["| key | type | what |", "|---|---|---|", *rows])


def tensor_table():
    rows = []
    for one in schema.TENSORS:
        about = f"`{one.of}`: {one.about}" if one.of else one.about
        rows.append(f"| `{one.name}` | {one.dtype} `[{one.axes}]` | {about} |")
    return "\n".join(["| name | dtype, shape | what |", "|---|---|---|", *rows])


HEADERS = ("FILE", "CACHE", "LAYER", "SCORES", "MODEL", "SCORES_FILE", "HEAD_SCORES_FILE")


@pytest.mark.parametrize("table", [*HEADERS, "TENSORS"])
def test_the_page_has_the_tables_of_the_schema(table):
    wanted = tensor_table() if table == "TENSORS" else header_table(getattr(schema, table))
    assert f"\n\n{wanted}\n\n" in PAGE.read_text(encoding="utf-8") + "\n", f"in docs/file_format.md write\n{wanted}"
    assert f"`{[*schema.VERSION]}`" in schema.FILE[0].about


def names_of(entries):
    return {name for one in entries for name in one.names.split(", ")}


def test_what_is_written_is_what_the_schema_says(saved):
    """It knows each entry and each tensor of these files, and each that it knows is in one of them."""
    found = {name: set() for name in (*HEADERS, "TENSORS")}
    for path in saved.values():
        table, told, _ = rewritten.parts(path)
        kind = {"Scores": "SCORES_FILE", "HeadScores": "HEAD_SCORES_FILE"}.get(told["cache"], "CACHE")
        found["FILE"] |= names_of(schema.FILE)
        found[kind] |= set(told) - names_of(schema.FILE)
        if kind != "CACHE":
            continue
        for spec in told["layers"]:
            found["LAYER"] |= set(spec)
        for name in ("scores", "model"):
            found[name.upper()] |= set(told.get(name) or {})
        for name in table.keys() - {"__metadata__"}:
            layer = name.split(".")[1] if name.startswith("layers.") else None
            of = told["layers"][int(layer)]["kind"] if layer and name.count(".") == 2 and name[-1] in "kv" else ""
            assert schema.fits(name, of, table[name]["dtype"], table[name]["shape"], {})
            found["TENSORS"].add((re.sub(r"\.\d+", ".N", re.sub(r"\.[kv]\b", ".X", name)), of))
    assert {name: found[name] for name in HEADERS} == {name: names_of(getattr(schema, name)) for name in HEADERS}
    assert found["TENSORS"] == {(one.name, one.of) for one in schema.TENSORS}


@pytest.mark.parametrize("kind", ["named", "dense", "scores", "heads"])
def test_each_entry_must_have_its_type(saved, tmp_path, kind):
    """None of the types takes another's value; whether an entry may be missing is what the schema says."""
    path = tmp_path / "doc.kvz"
    _, whole, _ = rewritten.parts(saved[kind])
    for one in (*schema.FILE[1:], *schema.KINDS[whole["cache"]]):
        for name in one.names.split(", "):
            for change in (lambda h, name=name: h.pop(name, None), lambda h, name=name: h.update({name: -1.5})):
                rewritten.put(path, saved[kind].read_bytes())
                rewritten.rewrite(path, change)
                if "optional" in one.type and name not in rewritten.parts(path)[1]:
                    with header.open_file(path) as file:
                        assert json.dumps(file.header)
                    continue
                with pytest.raises(ValueError, match="truncated or tampered"), header.open_file(path):
                    pass


def test_a_dense_cache_as_a_ragged_one_has_the_same_length_and_ratio(saved):
    dense = kvzip.load_cache(saved["dense"])
    kvzip.save(as_ragged(dense), saved["dense"].with_name("ragged"))
    ours, theirs = (rewritten.parts(saved["dense"].with_name(name))[1] for name in ("dense", "ragged"))
    names = ("length", "start", "tokens", "kept", "total", "ratio")
    assert [ours[name] for name in names] == [theirs[name] for name in names]
