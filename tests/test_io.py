"""Caches on disk: bit-exact round trips, nothing half written, and files that lie."""

import os
import struct
from dataclasses import replace
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers

import kvzip
import random_model
from kvzip import prompts
from kvzip.cache import RaggedCache, RaggedKV, empty_tail, encode_levels, read_header, read_pieces
from kvzip.cache.caches import tensors_of
from kvzip.ops import decode_schedule
from rewritten import put, retouch, rewrite

TEXT = "Happy families are all alike; every unhappy family is unhappy in its own way."
KINDS = ["dense", "scored", "ragged", "emptied", "tail", "int8", "int4", "mixed", "turn", "folded", "named", "biased"]


@pytest.fixture(scope="module")
def caches(model):
    dense = kvzip.prefill(model, TEXT)
    scored = kvzip.score(model, dense)
    ragged = kvzip.compress(scored, 0.3)
    bare = kvzip.score(model, kvzip.prefill(model, TEXT, template=False))
    tail = replace(empty_tail(ragged.context, 1, 9, dtype=torch.float32), lengths=torch.tensor([2], dtype=torch.int32))
    for x in (*tail.k, *tail.v):
        x.fill_(0.5)
    ids = torch.cat([ragged.token_ids, torch.tensor([1, 2])])
    turn = kvzip.ask(model, kvzip.compress(scored, 0.5, bits=8), "Who is?", max_tokens=4)[1]
    return {
        "turn": turn,
        "named": in_levels(ragged),
        "biased": biased(ragged),
        "folded": kvzip.fold(model, turn, 0.6),
        "dense": dense,
        "scored": scored,
        "ragged": ragged,
        "emptied": kvzip.compress(bare, 0.01),
        "tail": replace(ragged, tail=tail, token_ids=ids),
        **{f"int{bits}": quantized(ragged, (bits, bits)) for bits in (8, 4)},
        "mixed": quantized(ragged, (8, 4)),
    }


@pytest.fixture(scope="module")
def files(model, caches, tmp_path_factory):
    """The bytes of each cache's file."""
    path = tmp_path_factory.mktemp("files") / "doc.kvz"

    def written(kind):
        kvzip.save(caches[kind], path, **options(kind, model), overwrite=True)
        return path.read_bytes()

    return {kind: written(kind) for kind in caches}


def options(kind, model):
    """What a kind is saved with: "named" with its model and scores of 8 bits."""
    return {"model": model, "score_bits": 8} if kind == "named" else {}


def biased(cache):
    """The cache with a bias for each row, in float16 in one layer and in float32 in the next."""
    rows = [torch.linspace(-1.5, 2, len(x.positions)) if isinstance(x, RaggedKV) else None for x in cache.context]
    rows[0] = rows[0].half()
    pairs = zip(cache.context, rows, strict=True)
    return replace(cache, context=tuple(x if own is None else replace(x, bias=own) for x, own in pairs))


def in_levels(cache):
    """The cache with its scores rounded as 8 bits round them, so that they come back exactly."""
    codes, levels = encode_levels(cache.scores.values)
    return replace(cache, scores=replace(cache.scores, values=levels[codes.long()]))


def quantized(cache: RaggedCache, bits: tuple[int, int]) -> RaggedCache:
    def pack(layer):
        if not isinstance(layer, RaggedKV):
            return layer
        offsets = layer.offsets if bits[0] == 4 else None  # keys with channels, and as older files have them
        k = kvzip.ops.quantize(layer.k, bits=bits[0], offsets=offsets)
        return replace(layer, k=k, v=kvzip.ops.quantize(layer.v, bits=bits[1]))

    return replace(cache, context=tuple(map(pack, cache.context)))


def same(a, b):
    assert type(a) is type(b)
    ours, theirs = ([*tensors_of(x), *([x.scores.values] if x.scores else [])] for x in (a, b))
    assert len(ours) == len(theirs)
    for x, y in zip(ours, theirs, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)
    names = ["start", "chat", "fingerprint", "kept", "total", *(["method"] if isinstance(a, RaggedCache) else [])]
    for name in names:
        assert getattr(a, name) == getattr(b, name)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_back_bit_for_bit(model, caches, kind, tmp_path):
    path = tmp_path / "doc.kvz"
    kvzip.save(caches[kind], path, note={"from": "a book"}, **options(kind, model))
    back = kvzip.load_cache(path, model=model)
    same(caches[kind], back)
    if caches[kind].scores is not None:
        for name in ("layers", "start", "stop", "source"):
            assert getattr(back.scores, name) == getattr(caches[kind].scores, name)
    asked = {"max_tokens": 8, "template": False}
    assert kvzip.generate(model, back, "Who?", **asked) == kvzip.generate(model, caches[kind], "Who?", **asked)
    header = read_header(path)
    assert header["version"] == [3, 0] and header["note"] == {"from": "a book"}
    assert header["ratio"] == header["kept"] / header["total"] and header["library"] == kvzip.__version__
    assert header["method"] == {"dense": "", "scored": "kvzip-chunk"}.get(
        kind, "kvzip-chunk/pair" + "+fold" * (kind == "folded")
    )
    assert header["tokens"] == len(caches[kind].token_ids) and header["fingerprint"] == model.fingerprint
    assert [p.name for p in tmp_path.iterdir()] == ["doc.kvz"]


def test_a_crash_leaves_the_old_file(caches, tmp_path, monkeypatch):
    path = tmp_path / "doc.kvz"
    kvzip.save(caches["dense"], path)
    before = path.read_bytes()

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        kvzip.save(caches["ragged"], path, overwrite=True)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_files_that_do_not_belong_are_named(model, caches, tmp_path):
    path = tmp_path / "doc.kvz"
    kvzip.save(caches["ragged"], path)
    other = random_model.make(model.config, seed=9)
    with pytest.raises(ValueError, match=r"cache of this model, got doc\.kvz of another.*take the model that made it"):
        kvzip.load_cache(path, model=other)
    with pytest.raises(FileNotFoundError, match="no file"):
        kvzip.load_cache(tmp_path / "absent.kvz")
    rewrite(path, lambda header: header.update(version=[4, 0]))
    with pytest.raises(ValueError, match=r"version 3\.x, got 4\.0 in doc\.kvz: read it with the version of kvzip that"):
        kvzip.load_cache(path)
    for older in ([2, 0], [1, 1]):
        rewrite(path, lambda header, older=older: header.update(version=older))
        with pytest.raises(
            ValueError, match=r"got \d\.\d in doc\.kvz: made by an older kvzip, compress the document again"
        ):
            kvzip.load_cache(path)
    path.write_bytes(b"not a cache")
    with pytest.raises(ValueError, match="none of kvzip's"):
        kvzip.load_cache(path)


def test_a_checkout_that_is_not_installed_saves(caches, tmp_path, monkeypatch):
    def unknown(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", unknown)
    kvzip.save(caches["ragged"], tmp_path / "doc.kvz")
    assert read_header(tmp_path / "doc.kvz")["library"] == kvzip.__version__


def refused_or_sound(model, path):
    """A changed file raises ValueError, or gives a cache that generation reads within bounds."""
    try:
        cache = kvzip.load_cache(path, model=model)
    except ValueError:
        return
    pieces = read_pieces(path)
    assert not pieces or set(pieces) == set(cache.token_ids.tolist())
    assert cache.scores is None or not cache.scores.values.isnan().any() or "bits" not in read_header(path)["scores"]
    layers = cache.context if isinstance(cache, RaggedCache) else ()
    for layer in layers:
        if isinstance(layer, RaggedKV):
            offsets = layer.offsets.tolist()
            assert offsets == sorted(offsets) and offsets[0] == 0 and offsets[-1] == len(layer.positions)
            assert ((layer.positions >= 0) & (layer.positions < cache.context_length)).all()


@settings(max_examples=1500)
@given(kind=st.sampled_from(KINDS), data=st.data())
def test_flipped_and_missing_bytes_never_read_out_of_bounds(model, files, tmp_path_factory, kind, data):
    path = tmp_path_factory.getbasetemp() / "mutated.kvz"
    raw = bytearray(files[kind])
    (size,) = struct.unpack("<Q", raw[:8])
    if data.draw(st.booleans()):  # a shorter or a longer file
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))] if data.draw(st.booleans()) else raw + b"\0" * 8
        put(path, raw)
        with pytest.raises(ValueError, match="truncated or tampered"):
            kvzip.load_cache(path)
        return
    limit = 8 + size if data.draw(st.booleans()) else len(raw)  # half of the changes hit the headers
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, limit - 1))] = data.draw(st.integers(0, 255))
    put(path, raw)
    refused_or_sound(model, path)


@settings(max_examples=600)
@given(kind=st.sampled_from(KINDS), data=st.data())
def test_headers_that_lie_are_refused(model, files, tmp_path_factory, kind, data):
    path = tmp_path_factory.getbasetemp() / "lying.kvz"
    put(path, files[kind])
    true = read_header(path)
    keys = ["length", "start", "tokens", "kept", "total", "ratio", "layers", "tail", "scores", "cache"]
    keys += ["pieces", "model"] if kind == "named" else []
    key = data.draw(st.sampled_from(keys))
    values = st.one_of(st.none(), st.integers(-3, 400), st.text(max_size=3), st.lists(st.integers(), max_size=3))
    value = data.draw(values)
    rewrite(path, lambda header: header.update({key: value}))
    if value == true[key] or (key in ("scores", "pieces", "model") and value is None):
        refused_or_sound(model, path)
        return
    with pytest.raises(ValueError):
        kvzip.load_cache(path, model=model)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("layers.0.offsets", lambda x: x.add_(1)),
        ("layers.0.offsets", lambda x: x[1].neg_()),
        ("layers.0.positions", lambda x: x[0].fill_(10_000)),
        ("layers.0.positions", lambda x: x[0].fill_(-1)),
        ("layers.0.positions", lambda x: x.copy_(x.flip(0))),
        ("layers.0.positions", lambda x: x[0].fill_(1)),
        ("layers.2.offsets", lambda x: x[1].copy_(x[2])),
        ("token_ids", lambda x: x[0].fill_(-5)),
        ("pieces.ids", lambda x: x[0].add_(1)),
        ("pieces.ids", lambda x: x.copy_(x.flip(0))),
        ("pieces.offsets", lambda x: x[1].fill_(100)),
        ("pieces.offsets", lambda x: x[0].fill_(-1)),
        ("pieces.offsets", lambda x: x[-1].add_(1)),
        ("scores.codes", lambda x: x[0, 0, 0].fill_(255)),
        ("scores.levels", lambda x: x.copy_(x.flip(0))),
        ("scores.levels", lambda x: x[0].fill_(torch.nan)),
    ],
)
def test_tensors_that_lie_are_refused(model, caches, tmp_path, name, change):
    path = tmp_path / "doc.kvz"
    kvzip.save(caches["named"], path, **options("named", model))
    retouch(path, lambda tensors: change(tensors[name]))
    with pytest.raises(ValueError, match="truncated or tampered"):
        kvzip.load_cache(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors["layers.0.bias"][0].fill_(torch.nan),
        lambda tensors: tensors["layers.0.bias"][3].fill_(-torch.inf),
        lambda tensors: tensors.update({"layers.0.bias": tensors["layers.0.bias"][1:].clone()}),
        lambda tensors: tensors.update({"layers.0.bias": tensors["layers.0.bias"].bfloat16()}),
        lambda tensors: tensors.pop("layers.0.bias"),
    ],
    ids=["nan", "infinite", "short", "bfloat16", "missing"],
)
def test_biases_that_lie_are_refused(caches, tmp_path, change):
    path = tmp_path / "doc.kvz"
    kvzip.save(caches["biased"], path)
    retouch(path, change)
    with pytest.raises(ValueError, match=r"truncated or tampered.*layers\.0\.bias"):
        kvzip.load_cache(path)


def test_biases_are_not_read_past_silently(caches, tmp_path):
    """A header that does not speak of them would let a reader attend as if there were none."""
    path = tmp_path / "doc.kvz"
    kvzip.save(caches["biased"], path)
    rewrite(path, lambda header: header["layers"][0].pop("bias"))
    with pytest.raises(ValueError, match="of which the header says otherwise"):
        kvzip.load_cache(path)


def test_a_head_without_the_prefix_is_refused(caches, tmp_path):
    """The first head is empty, so that the next one's prefix stands where its own should."""
    path, cache = tmp_path / "doc.kvz", caches["ragged"]
    rows = int(cache.context[0].offsets[1])

    def drop(tensors):
        for name in ("k", "v", "positions"):
            tensors[f"layers.0.{name}"] = tensors[f"layers.0.{name}"][rows:].clone()
        tensors["layers.0.offsets"] -= rows
        tensors["layers.0.offsets"][0] = 0

    kvzip.save(cache, path)
    retouch(path, drop)
    kept = cache.kept - rows
    rewrite(path, lambda header: header.update(kept=kept, ratio=kept / cache.total))
    with pytest.raises(ValueError, match=r"a head of layers\.0 without the 1 tokens of the prefix"):
        kvzip.load_cache(path)


@pytest.mark.parametrize("part", ["scale", "zero"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_scales_that_are_not_finite_are_refused(caches, tmp_path, part, value):
    path = tmp_path / "doc.kvz"
    kvzip.save(caches["int4"], path)
    retouch(path, lambda tensors: tensors[f"layers.2.k.{part}"][-1].fill_(value))
    with pytest.raises(ValueError, match=r"scales of layers\.2\.k that are not finite"):
        kvzip.load_cache(path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"version": [1, 2], "note": ' + "[" * 100_000 + "]" * 100_000 + "}"])
def test_a_header_too_deep_to_read_is_refused(tmp_path, text):
    save_file({"token_ids": torch.zeros(1)}, tmp_path / "deep.kvz", metadata={"kvzip": text})
    with pytest.raises(ValueError, match="without its header"):
        kvzip.load_cache(tmp_path / "deep.kvz")


def cut_window(tensors):
    tensors |= {name: tensors[name][:, :, -2:].clone() for name in ("layers.1.k", "layers.1.v")}


UNFIT = {
    "a token of another vocabulary": (lambda t: t["token_ids"][-1].fill_(260), {}, "token 260 of a vocabulary of 260"),
    "narrow heads": (lambda t: t.update({n: x[..., :4].clone() for n, x in pairs_of(t)}), {}, "2 heads of width 4"),
    "another dtype": (lambda t: t.update({n: x.half() for n, x in pairs_of(t)}), {}, r"not in torch\.float32"),
    "another dtype in one": (lambda t: t.update({"layers.2.v": t["layers.2.v"].half()}), {}, r"not in torch\.float32"),
    "a short window": (cut_window, {1: {"kind": "WindowKV", "start": 76}}, "2 rows in a window of 6"),
}


def pairs_of(tensors):
    return [(name, tensor) for name, tensor in tensors.items() if name.endswith((".k", ".v"))]


@pytest.mark.parametrize("case", UNFIT)
def test_a_file_that_its_model_could_not_read_is_refused(model, caches, tmp_path, case):
    """Its fingerprint is the model's, its tensors fit together, but not with the model."""
    path = tmp_path / "doc.kvz"
    change, layers, reason = UNFIT[case]
    kvzip.save(caches["ragged"], path)
    retouch(path, change)
    rewrite(path, lambda header: [header["layers"].__setitem__(n, layer) for n, layer in layers.items()])
    assert kvzip.load_cache(path).kept == caches["ragged"].kept
    with pytest.raises(ValueError, match=rf"truncated or tampered with \(.*{reason}"):
        kvzip.load_cache(path, model=model)


def test_layers_of_another_kind_than_the_models_are_refused(model, caches, tmp_path):
    path = tmp_path / "doc.kvz"
    other = random_model.make(random_model.config(windows=(None, None, None)))
    for kind in ("dense", "ragged"):
        kvzip.save(caches[kind], path, overwrite=True)
        rewrite(path, lambda header: header.update(fingerprint=other.fingerprint))
        with pytest.raises(ValueError, match="other layers than the model's"):
            kvzip.load_cache(path, model=other)


def test_a_device_that_is_not_there_is_no_fault_of_the_file(caches, tmp_path):
    kvzip.save(caches["ragged"], tmp_path / "doc.kvz")
    with pytest.raises(RuntimeError, match="device string: nonsense"):
        kvzip.load_cache(tmp_path / "doc.kvz", device="nonsense")


def test_out_of_memory_is_no_fault_of_the_file(caches, tmp_path, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    kvzip.save(caches["ragged"], tmp_path / "doc.kvz")
    monkeypatch.setattr(kvzip.cache.reading, "decode_schedule", fail)
    with pytest.raises(torch.OutOfMemoryError):
        kvzip.load_cache(tmp_path / "doc.kvz")


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_goes_to_another_device_but_for_its_tokens(caches, kind):
    """On torch's meta device, which has shapes and no values: heads are cut anew, for the SMs of the device."""
    cache = caches[kind]
    assert kvzip.to(cache, "cpu") is cache

    fresh = []

    def cut(offsets):
        assert offsets.is_meta
        fresh.append(decode_schedule(cache.context[0].offsets))
        return fresh[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kvzip.cache.memory, "decode_schedule", cut)
        moved = kvzip.to(cache, "meta")
    assert moved.token_ids is cache.token_ids
    pairs = [
        x for layer in (moved.layers if kind in ("dense", "scored") else moved.context) for x in (layer.k, layer.v)
    ]
    assert all((x if isinstance(x, torch.Tensor) else x.codes).is_meta for x in pairs)
    assert not moved.scores or moved.scores.values.is_meta
    if isinstance(moved, RaggedCache):
        assert [kv.schedule for kv in moved.context if isinstance(kv, RaggedKV)] == fresh


def test_layers_that_do_not_belong_together_are_refused(caches, tmp_path):
    """Decoding reads all layers of a kind by the shape of one."""
    path = tmp_path / "doc.kvz"
    for layer, kind in ((2, "dense"), (1, "ragged")):
        kvzip.save(caches[kind], path, overwrite=True)
        names = [f"layers.{layer}.{part}" for part in ("k", "v")]
        retouch(path, lambda tensors, names=names: tensors.update({n: tensors[n][:, :1].clone() for n in names}))
        with pytest.raises(ValueError, match="other numbers of heads"):
            kvzip.load_cache(path)


def test_a_file_names_its_model_and_its_text(model, caches, tmp_path):
    path = tmp_path / "doc.kvz"
    cache = caches["ragged"]
    with pytest.raises(ValueError, match=r"the model that made the cache.*got another"):
        kvzip.save(cache, path, model=random_model.make(model.config, seed=9))
    kvzip.save(cache, path, model=replace(model, source=str(tmp_path)))
    how = {"max_length": None, "rope": None}
    assert read_header(path)["model"] == {"source": str(tmp_path), "dtype": "float32", **how}
    pieces = read_pieces(path)
    text = b"".join(pieces[i] for i in cache.token_ids.tolist()).decode()
    assert text == "<|user|>" + TEXT and len(pieces) == len(set(cache.token_ids.tolist()))
    kvzip.save(cache, path, model=replace(model, tokenizer=None), overwrite=True)
    assert read_pieces(path) == {} and read_header(path)["model"]["source"] == "random"
    assert os.listdir(tmp_path) == ["doc.kvz"]


def test_scores_in_8_bits_select_almost_as_the_exact_ones(model, caches, tmp_path):
    path = tmp_path / "doc.kvz"
    values = torch.randn(4, 3, 2_000, generator=torch.Generator().manual_seed(0)).exp()
    codes, levels = encode_levels(values)
    below = levels[codes.long()]
    above = torch.cat([levels, levels.new_tensor([torch.inf])])[codes.long() + 1]
    assert (below <= values).all() and (values < above).all() and len(levels) == 256
    assert codes.flatten().bincount().max() <= 1.1 * values.numel() / 255
    for few in (torch.tensor([[[0.0, -1.0, torch.inf, 0.5]]]), torch.zeros(1, 2, 0), torch.ones(2, 1, 7)):
        codes, levels = encode_levels(few)
        assert torch.equal(levels[codes.long()], few)
    scored = caches["scored"]
    kvzip.save(scored, path, score_bits=8)
    back = kvzip.load_cache(path, model=model)
    exact, rounded = (kvzip.keep_mask(cache.scores, 0.3) for cache in (scored, back))
    assert 0 < (exact != rounded).float().mean() < 0.01 or torch.equal(exact, rounded)
    kvzip.save(scored, path, overwrite=True)
    assert torch.equal(kvzip.load_cache(path).scores.values, scored.scores.values)
    broken = replace(scored, scores=replace(scored.scores, values=torch.full_like(scored.scores.values, torch.nan)))
    with pytest.raises(ValueError, match="without NaN"):
        kvzip.save(broken, path, score_bits=8)
    with pytest.raises(ValueError, match="32 or 8, got 4"):
        kvzip.save(scored, path, score_bits=4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_is_read_without_the_pairs(model, caches, kind, tmp_path):
    path = tmp_path / "doc.kvz"
    kvzip.save(caches[kind], path)
    whole, outline = kvzip.load_cache(path), kvzip.load_cache(path, pairs=False)
    for x, y in zip(tensors_of(whole), tensors_of(outline), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype) and (y.is_meta or torch.equal(x, y))
    assert sum(x.is_meta for x in tensors_of(outline)) >= 2 * len(model.config.layers)
    assert outline.kept == whole.kept and torch.equal(outline.token_ids, whole.token_ids)


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_file_has_the_mode_of_any_new_file(caches, tmp_path, umask, mode):
    path = tmp_path / "doc.kvz"
    before = os.umask(umask)
    try:
        kvzip.save(caches["ragged"], path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("family", ["bytes", "metaspace"])
def test_tokens_are_the_bytes_of_their_part_of_a_text(family):
    """A byte-level vocabulary, and one that writes spaces as U+2581 and unknown characters as bytes, as Gemma's."""
    text = " é 日本 \ufffd a  b\n\n🎉<|end|>"
    if family == "bytes":
        tokenizer = random_model.tokenizer()
        added = "<|end|>"
    else:
        names = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", "é", "a", "▁b"]
        raw = Tokenizer(
            models.BPE(
                vocab={n: i for i, n in enumerate(names)},
                merges=[],
                byte_fallback=True,
                unk_token=None,
            )
        )
        raw.normalizer = normalizers.Replace(" ", "▁")
        raw.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        raw.add_special_tokens(["<|end|>", "é€"])
        raw.add_tokens(["▁▁", "▁\ufffd"])
        tokenizer, added = prompts.make_tokenizer(raw), "<|end|>"
    ids = tokenizer.control.encode(text, add_special_tokens=False).ids
    parts = prompts.token_bytes(tokenizer, ids)
    assert b"".join(parts).decode() == text and parts[-1] == added.encode()
    assert any("\ufffd" in part.decode(errors="replace") for part in parts)
