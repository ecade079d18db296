"""Files as data: damage is found and named, nothing a file says is obeyed, nothing of others is overwritten."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvzip
import rewritten
from kvzip import head_scores
from kvzip import scores as scores_of
from kvzip.cache import is_kvzip_file, read_header, read_pieces
from kvzip.cache.reading import read_cache
from kvzip.files import tensors
from kvzip.files.damage import Damaged
from kvzip.files.header import open_file
from kvzip.files.writing import check_writable
from rewritten import retouch, rewrite

TEXT = "Happy families are all alike; every unhappy family is unhappy in its own way."


@pytest.fixture(scope="module")
def small(scored):
    return kvzip.compress(scored, 0.3)


@pytest.fixture(scope="module")
def written(model, small, tmp_path_factory):
    path = tmp_path_factory.mktemp("written") / "doc.kvz"
    kvzip.save(small, path, model=model, score_bits=8, note={"title": "Anna"})
    return path.read_bytes()


@pytest.fixture
def path(written, tmp_path):
    (tmp_path / "doc.kvz").write_bytes(written)
    return tmp_path / "doc.kvz"


def refusal(call):
    """The message of the ValueError that a call raises: one line, short, nothing in it that a terminal obeys."""
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert message.isprintable() and len(message) < 700, message
    return message


def places(data):
    """Where each tensor of a file lies, by name."""
    size = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + size])
    table.pop("__metadata__")
    return {name: [8 + size + n for n in entry["data_offsets"]] for name, entry in table.items()}


@settings(max_examples=100)
@given(data=st.data())
def test_a_byte_flipped_in_a_tensor_is_found_and_the_tensor_named(written, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "flipped.kvz"
    name, (start, stop) = data.draw(st.sampled_from(sorted(places(written).items())))
    raw = bytearray(written)
    raw[data.draw(st.integers(start, stop - 1))] ^= data.draw(st.integers(1, 255))
    rewritten.put(path, raw)
    assert f"({name} differs from its checksum)" in refusal(lambda: kvzip.load_cache(path))


def test_no_byte_of_a_file_can_change_unseen(model, tmp_path):
    path = tmp_path / "heads.safetensors"
    made = head_scores.make(model, "It was a bright cold day in April.")
    head_scores.save(made, path, note={"title": "April"})
    data = path.read_bytes()
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        rewritten.put(path, changed)
        refusal(lambda: head_scores.load(path))
    path.write_bytes(data)
    assert torch.equal(head_scores.load(path).values, made.values)


def swapped(x, distance):
    x[[0, distance]] = x[[distance, 0]]


@pytest.mark.parametrize(
    "damage",
    [
        lambda x: swapped(x, 1),
        lambda x: swapped(x, 16),
        lambda x: swapped(x, 5000),
        lambda x: x[1].copy_(x[1].flip(0)),
        lambda x: x[100:200].zero_(),
        lambda x: x[-1, -1].zero_(),
        lambda x: x[0, 0].neg_(),
        lambda x: x.copy_(x.roll(8, 0)),
        lambda x: x[16384:32768].copy_(x[:16384].clone()),
    ],
)
def test_damage_beyond_one_byte_is_found(tmp_path, damage):
    """Rows that changed places, zeros, blocks written twice, in a tensor of more than one block."""
    path = tmp_path / "doc.scores"
    x = torch.randn(40_000, 64, generator=torch.Generator().manual_seed(0))
    tensors.write_file(path, {"values": x}, {"cache": "Other"})
    assert x.nbytes > 2 * tensors._BLOCK
    outer, header, _ = rewritten.parts(path)
    damage(x)
    data = x.numpy().tobytes()
    assert header["checksums"]["values"] != rewritten.checksum(data)
    path.write_bytes(rewritten.join(outer, json.dumps(header), data))
    with open_file(path) as file, pytest.raises(Damaged, match="values differs from its checksum"):
        tensors.read_tensor(file, "values")


def test_any_reader_can_compute_the_checksums(written, path):
    """Those of docs/file_format.md, by other code, tensor by tensor; the header's by `rewrite`."""
    _, header, _ = rewritten.parts(path)
    for name, (start, stop) in places(written).items():
        assert header["checksums"][name] == rewritten.checksum(written[start:stop])
    rewrite(path, lambda header: header["note"].update(title="Karenina"))
    assert read_header(path)["note"]["title"] == "Karenina" and kvzip.load_cache(path).kept


def test_loaded_tensors_outlive_their_file(model, small, path):
    back = kvzip.load_cache(path, model=model)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(bytes([255]) * size)
    os.truncate(path, 0)
    for ours, theirs in zip(back.context, small.context, strict=True):
        assert torch.equal(ours.k, theirs.k) and torch.equal(ours.v, theirs.v)
    assert torch.equal(back.token_ids, small.token_ids)


def test_header_and_tensors_come_from_one_file(scored, small, path, tmp_path):
    """Another file takes the place of this one after its header was read."""
    other = tmp_path / "other.kvz"
    kvzip.save(kvzip.compress(scored, 0.9), other)
    with open_file(path) as file:
        os.replace(other, path)
        assert read_cache(file).kept == file.header["kept"] == small.kept != read_header(path)["kept"]


def test_one_open_serves_a_load(path, monkeypatch):
    opened = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda name, *rest: opened.append(name) or real(name, *rest))
    kvzip.load_cache(path)
    assert opened == [path]


def test_a_file_that_ends_while_it_is_read_is_refused(path):
    with open_file(path) as file:
        os.truncate(path, path.stat().st_size - 8)
        with pytest.raises(Damaged, match="ends too early"):
            for name in file.tensors:
                tensors.read_tensor(file, name)


@pytest.mark.skipif(os.name != "posix", reason="special files are POSIX's")
@pytest.mark.parametrize("read", [read_header, kvzip.load_cache, read_pieces, head_scores.load, kvzip.open])
def test_special_files_are_refused_and_never_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "pipe.kvz")
    for special in (tmp_path / "pipe.kvz", "/dev/zero", "/dev/null"):
        assert "a pipe or a device" in refusal(lambda special=special: read(special))
    assert "a directory" in refusal(lambda: read(tmp_path))
    with pytest.raises(FileNotFoundError, match="no file"):
        read(tmp_path / "absent.kvz")


def test_pairs_that_are_not_wanted_are_not_read(written, path):
    raw = bytearray(written)
    for name, (start, stop) in places(written).items():
        if name.endswith((".k", ".v")):
            raw[start:stop] = bytes(stop - start)
    path.write_bytes(raw)
    assert kvzip.load_cache(path, pairs=False).kept and read_header(path) and read_pieces(path)
    refusal(lambda: kvzip.load_cache(path))


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 400),
        st.sampled_from(
            [2**31, 2**63, 2**64, -(2**63), 10**400, 1e308, -0.0, "\x1b[31m\n", "\ud800", "é" * 999, "a/b"]
        ),
        st.text(max_size=4),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def spots(value, at=()):
    """Every place in a JSON value."""
    yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in inner:
        yield from spots(entry, (*at, key))


def changed(value, at, new):
    if not at:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[at[0]] = changed(value[at[0]], at[1:], new)
    return copy


def without(value, at):
    if len(at) > 1:
        return changed(value, at[:1], without(value[at[0]], at[1:]))
    return {k: v for k, v in value.items() if k != at[0]} if isinstance(value, dict) else value


@settings(max_examples=250)
@given(data=st.data())
def test_whatever_a_header_says_is_refused_in_one_line_or_sound(written, model, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "header.kvz"
    rewritten.put(path, written)
    outer, header, tensors = rewritten.parts(path)
    whole = {**outer, "__metadata__": {"checksum": "0" * 16, "kvzip": header}}
    at = data.draw(st.sampled_from(list(spots(whole))[1:]))
    whole = without(whole, at) if data.draw(st.booleans()) else changed(whole, at, data.draw(JSON))
    metadata = whole.get("__metadata__")
    if isinstance(metadata, dict) and "kvzip" in metadata:
        whole = changed(whole, ("__metadata__", "kvzip"), json.dumps(metadata["kvzip"]))
    head = json.dumps(whole).encode()
    rewritten.put(path, len(head).to_bytes(8, "little") + rewritten.stamp(head) + tensors)
    try:
        found = read_header(path)
        _, cache = kvzip.open(path, model=model)
    except ValueError as error:
        assert str(error).isprintable() and len(str(error)) < 700, str(error)
    else:
        assert (cache.kept, cache.total) == (found["kept"], found["total"]) and isinstance(found["note"], dict)


HEAD = '{"__metadata__":{"checksum":"0000000000000000","kvzip":"{\\"version\\":[3,0]%s}"}%s}'
HOSTILE = {
    "deep": HEAD % (',\\"note\\":' + "[" * 90_000, ""),
    "deeper": "[" * 1_000_000,
    "twice": HEAD % (',\\"version\\":[3,0]', ""),
    "no number": HEAD % (',\\"kept\\":NaN', ""),
    "infinite": HEAD % (',\\"kept\\":-Infinity', ""),
    "long number": HEAD % (',\\"kept\\":' + "9" * 100_000, ""),
    "a list": "[]",
    "nothing": "",
    "a tensor twice": HEAD % ("", ',"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' * 2),
    "huge": HEAD % ("", ',"a":{"dtype":"U8","shape":[1099511627775],"data_offsets":[0,1099511627775]}'),
    "huge product": HEAD
    % ("", ',"a":{"dtype":"U8","shape":[' + ",".join(["9" * 4000] * 9) + '],"data_offsets":[0,0]}'),
    "negative": HEAD % ("", ',"a":{"dtype":"U8","shape":[-1],"data_offsets":[1,0]}'),
    "boolean": HEAD % ("", ',"a":{"dtype":"U8","shape":[true],"data_offsets":[false,true]}'),
    "escape": HEAD % (',\\"library\\":\\"\\\\u001b[2J\\",\\"cache\\":\\"\\\\u001b[2J\\"', ""),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused_in_one_line(tmp_path, case):
    path = tmp_path / "hostile.kvz"
    head = HOSTILE[case].encode()
    path.write_bytes(len(head).to_bytes(8, "little") + rewritten.stamp(head))
    for read in (read_header, kvzip.load_cache, head_scores.load, kvzip.open):
        assert "hostile.kvz" in refusal(lambda read=read: read(path))


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9])
@pytest.mark.parametrize("length", [0, 1, 2**24, 2**24 + 1, 2**63, 2**64 - 1])
def test_files_of_a_few_bytes_are_refused(tmp_path, size, length):
    path = tmp_path / "short.kvz"
    path.write_bytes((length.to_bytes(8, "little") + b"{")[:size])
    assert "short.kvz" in refusal(lambda: kvzip.load_cache(path))
    assert not is_kvzip_file(path)


@pytest.mark.parametrize(
    "change",
    [
        {"total": 1000, "ratio": 0.132},
        {"chat": 1},
        {"fingerprint": None},
        {"method": ["pair"]},
        {"note": []},
        {"model": {"source": "a", "dtype": "int8"}},
        {"model": {"source": 3, "dtype": "float32"}},
        {"library": None},
        {"checksums": {}},
    ],
    ids=str,
)
def test_entries_that_lie_are_refused(path, change):
    kept = read_header(path)["kept"]
    if "ratio" in change:
        change = {**change, "ratio": kept / change["total"]}
    rewrite(path, lambda header: header.update(change))
    assert "doc.kvz" in refusal(lambda: kvzip.load_cache(path))


def test_rows_of_codes_are_what_the_header_says(scored, tmp_path):
    """What is optional may be null, and what the header does not tell is not stored beside it."""
    cache = scored
    path, small = tmp_path / "codes.kvz", kvzip.compress(cache, 0.5, bits=8)

    def says(change, name=None):
        kvzip.save(small, path, overwrite=True)
        if name is None:
            rewrite(path, lambda header: [change(spec) for spec in header["layers"]])
        else:
            rewritten.retouch(path, change)
        return lambda: kvzip.load_cache(path)

    assert torch.equal(says(lambda spec: spec.update(value_bits=None))().context[0].v.codes, small.context[0].v.codes)
    for change in (
        lambda spec: spec.pop("channels", None),
        lambda spec: "bits" in spec and spec.update(channels=False),
    ):
        assert "center of layers.0.k" in refusal(says(change))
    codes = "layers.0.v.codes"
    both = says(lambda tensors: tensors.update({"layers.0.v.turned": tensors[codes].clone()}), codes)
    assert "layers.0.v as codes and turned" in refusal(both)
    turned = says(lambda tensors: tensors.update({"layers.0.v.turned": tensors.pop(codes)}), codes)
    assert "layers.0.v of 8 bits turned" in refusal(turned)


def test_a_file_of_something_else_is_not_called_damaged(path):
    path.write_text("A text of more than a few bytes.", encoding="utf-8")
    assert "which is none of kvzip's" in refusal(lambda: kvzip.load_cache(path))
    assert "which is none of kvzip's" in refusal(lambda: head_scores.load(path))


def test_a_key_that_is_there_twice_is_refused(path):
    """Two readers would read two files: the checksum is right, both entries are of the right type."""
    outer, header, data = rewritten.parts(path)
    text = json.dumps(header)
    path.write_bytes(rewritten.join(outer, text[:-1] + ', "kept": 0}', data))
    assert "without its header" in refusal(lambda: kvzip.load_cache(path))


@pytest.mark.parametrize("start", [0, 8])
def test_tensors_that_overlap_or_leave_bytes_between_them_are_refused(path, start):
    outer, header, data = rewritten.parts(path)
    data += bytes(16)
    place = [start, start + 8] if start == 0 else [len(data) - 8, len(data)]
    outer["more"] = {"dtype": "U8", "shape": [8], "data_offsets": place}
    header["checksums"]["more"] = rewritten.checksum(data[place[0] : place[1]])
    data = data if start else data[:-16]
    path.write_bytes(rewritten.join(outer, json.dumps(header), data))
    assert "overlap, or bytes between them" in refusal(lambda: kvzip.load_cache(path))


def test_a_file_named_like_an_escape_sequence_is_named_escaped(written, tmp_path):
    path = tmp_path / "\x1b[2J\n.kvz"
    path.write_bytes(written[:-1])
    assert r"\x1b[2J\n.kvz" in refusal(lambda: kvzip.load_cache(path))


def test_four_bits_in_an_odd_group_are_refused(scored, tmp_path):
    path = tmp_path / "doc.kvz"
    kvzip.save(kvzip.compress(scored, 0.5, bits=4), path)
    rewrite(path, lambda header: header["layers"][0].update(group=1))

    def stretch(tensors):
        for name in ("k.scale", "k.zero", "v.scale", "v.zero"):
            tensors[f"layers.0.{name}"] = tensors[f"layers.0.{name}"].repeat_interleave(8, 1)

    retouch(path, stretch)
    assert "4 bits in groups of 1" in refusal(lambda: kvzip.load_cache(path))


def savers(scored):
    made = head_scores.HeadScores(torch.rand(2, 2), (0, 2), "", "", "", ())
    return {
        "cache": lambda path, **how: kvzip.save(scored, path, **how),
        "scores": lambda path, **how: scores_of.save(scored, path, **how),
        "heads": lambda path, **how: head_scores.save(made, path, **how),
    }


@pytest.mark.parametrize("kind", ["cache", "scores", "heads"])
def test_only_files_of_kvzip_are_replaced_and_only_when_told(scored, tmp_path, kind):
    save, path = savers(scored)[kind], tmp_path / "out.kvz"
    save(path)
    before = path.read_bytes()
    with pytest.raises(
        FileExistsError, match=r"a new file to write, got out\.kvz, which is there: pass overwrite=True"
    ):
        save(path)
    assert path.read_bytes() == before
    for other in savers(scored).values():  # whichever kind it is
        other(path, overwrite=True)
    assert path.read_bytes() != before or kind == "heads"
    path.write_bytes(before[:-9])  # a damaged one is ours too
    save(path, overwrite=True)
    rewrite(path, lambda header: header.update(version=[2, 0]))  # and an older one
    save(path, overwrite=True)
    assert path.read_bytes() == before
    link = tmp_path / "link.kvz"
    link.symlink_to(tmp_path / "nowhere.kvz")
    precious = tmp_path / "precious.txt"
    precious.write_text("a text")
    (tmp_path / "directory").mkdir()
    (tmp_path / "model.safetensors").write_bytes(before.replace(b'"kvzip"', b'"other"'))
    for name in ("precious.txt", "directory", "link.kvz", "model.safetensors"):
        for overwrite in (False, True):
            with pytest.raises(FileExistsError, match=rf"got {name}, which kvzip did not write: .*choose another name"):
                save(tmp_path / name, overwrite=overwrite)
    assert precious.read_text() == "a text" and link.is_symlink() and not list(tmp_path.glob(".*"))


def test_a_place_can_be_written_if_every_name_that_is_needed_there_fits(tmp_path):
    path = tmp_path / ("n" * 230)  # of 255 characters that a name may have
    check_writable(path)
    with pytest.raises(OSError, match="File name too long"):
        check_writable(path, suffix=".partial")
    with pytest.raises(OSError, match="expected a checkpoint that can be written, got 'File name too long'"):
        check_writable(path, suffix=".partial", kind="checkpoint")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_file_that_appears_meanwhile_is_left_as_it_is(scored, tmp_path, monkeypatch, links, overwrite):
    path = tmp_path / "out.kvz"
    real = tensors._write

    def write(out, tensor):
        path.write_text("precious")
        return real(out, tensor)

    def fail(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr(tensors, "_write", write)
    if not links:
        monkeypatch.setattr(os, "link", fail)
    with pytest.raises(FileExistsError, match="kvzip did not write"):
        kvzip.save(scored, path, overwrite=overwrite)
    assert path.read_text() == "precious" and os.listdir(tmp_path) == ["out.kvz"]
    path.unlink()
    monkeypatch.setattr(tensors, "_write", real)
    kvzip.save(scored, path)
    assert kvzip.load_cache(path).kept == scored.kept and os.listdir(tmp_path) == ["out.kvz"]


@pytest.mark.parametrize(
    ("note", "error"),
    [
        ({"x": float("nan")}, TypeError),
        ({"x": torch.ones(1)}, TypeError),
        ({1: 0, "1": 0}, TypeError),
        ({"x": "a" * 2**24}, ValueError),
    ],
    ids=["nan", "tensor", "twice", "long"],
)
def test_a_note_that_could_not_be_read_is_not_written(scored, tmp_path, note, error):
    with pytest.raises(error, match="note"):
        kvzip.save(scored, tmp_path / "doc.kvz", note=note)
    assert not list(tmp_path.iterdir())


def test_a_dtype_that_differs_is_named_as_that(model, small, tmp_path):
    path = tmp_path / "doc.kvz"
    kvzip.save(replace(small, fingerprint=f"{model.fingerprint.removesuffix('float32')}bfloat16"), path)
    message = r"its pairs are bfloat16, the model is float32: load the model in bfloat16"
    with pytest.raises(ValueError, match=message):
        kvzip.load_cache(path, model=model)
    with pytest.raises(ValueError, match=message):
        kvzip.save(kvzip.load_cache(path), tmp_path / "no.kvz", model=model)
    other = replace(model, checkpoint="another")
    with pytest.raises(
        ValueError, match=rf"its fingerprint is '.*-bfloat16', the model's '{other.fingerprint}': take the model"
    ):
        kvzip.load_cache(path, model=other)
    assert refusal(lambda: kvzip.load_cache(path, model=model))


def test_sizes_are_the_same_wherever_they_come_from(model, scored, tmp_path):
    path = tmp_path / "doc.kvz"
    turn = kvzip.ask(model, kvzip.compress(scored, 0.5), "Who?", max_tokens=4)[1]
    for cache in (scored, kvzip.compress(scored, 0.3), kvzip.compress(scored, 0.3, bits=8), turn):
        kvzip.save(cache, path, overwrite=True)
        sizes = {kvzip.nbytes(kvzip.load_cache(path, pairs=pairs)) for pairs in (True, False)}
        assert len(sizes) == 1
        if cache is not turn:  # whose tail shares its rows' memory with earlier turns
            assert sizes == {kvzip.nbytes(cache)}
        if cache.kept == scored.total or cache is turn or not hasattr(cache.context[0].k, "codes"):
            assert kvzip.cache.full_nbytes(cache) == kvzip.nbytes(scored)
    segments = kvzip.prefill_compressed(model, TEXT, 0.3, segment=20)
    assert kvzip.cache.full_nbytes(segments) == kvzip.nbytes(scored)


def test_full_bytes_of_packed_rows_come_from_the_fingerprint(scored):
    layers = scored.layers[::2]
    unwindowed = replace(scored, layers=layers, layer_count=len(layers))
    plain = kvzip.compress(replace(unwindowed, fingerprint="ab"), 0.3, bits=8)
    assert kvzip.cache.full_nbytes(plain) is None
    assert kvzip.cache.full_nbytes(replace(plain, fingerprint="ab-float32")) == kvzip.nbytes(unwindowed)


def test_a_cache_is_one_line(model, scored, path):
    assert repr(
        scored
    ) == f"DenseCache(78 tokens, 308 of 308 pairs (100.0%), {kvzip.nbytes(scored) / 1e6:,.2f} MB, " + (
        "float32, cpu, scored by kvzip-chunk)"
    )
    packed = repr(kvzip.compress(scored, 0.5, bits=4))
    assert packed.startswith("RaggedCache(78 tokens, 154 of 308 pairs (50.0%), ") and ", 4 bits, cpu, " in packed
    outline = repr(kvzip.load_cache(path, pairs=False))
    assert ", float32, cpu, keys and values left in the file, scored by kvzip-chunk)" in outline
    half = replace(scored, layers=[*scored.layers])
    half.layers[0] = None
    assert repr(half) == repr(replace(scored, layers=[])) == "DenseCache(78 tokens, consumed)"
    assert repr(scored.scores) == "Scores(2 layers of 2 heads, 77 tokens, by kvzip-chunk, float32, cpu)"
    made = head_scores.make(model, "abc")
    assert repr(made) == (
        "HeadScores(2 layers of 2 heads, by kvzip-context from 1 texts, sink 128, recent 256, float32, cpu)"
    )


def test_what_is_no_cache_or_model_is_said(path, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # types are checked in tests only
    cache = kvzip.load_cache(path)
    with pytest.raises(TypeError, match=r"^expected a DenseCache or a RaggedCache, got str 'doc\.kvz': "):
        kvzip.save("doc.kvz", cache)
    with pytest.raises(TypeError, match=r"^expected a model that kvzip\.load made, got str: kvzip\.open"):
        kvzip.load_cache(path, model="a/b")
    with pytest.raises(TypeError, match=r"^expected a DenseCache or a RaggedCache, got Scores: "):
        kvzip.nbytes(cache.scores)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_a_load_takes_no_more_memory_than_its_tensors(tmp_path):
    path = tmp_path / "doc.scores"
    tensors.write_file(path, {"values": torch.ones(1 << 24)}, {"cache": "Other"})
    code = f"""
import re, torch
from kvzip.files import tensors
from kvzip.files.header import open_file
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
torch.ones(9).sum()
before = peak()
with open_file({str(path)!r}) as file:
    assert tensors.read_tensor(file, "values").view(torch.int32)[0] == 0x3F800000
print((peak() - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 60 < float(done.stdout) < 64 + 20


@pytest.mark.parametrize("words", [0, 1, 508 * 1024, 509 * 1024, 5 * 509 * 1024 + 7])
def test_a_tensor_that_is_read_through_staging_memory_is_the_same(words, tmp_path):
    """As those that go to a GPU are, through fewer slots than it has blocks."""
    value = torch.randint(-(2**62), 2**62, (words,), generator=torch.Generator().manual_seed(1))
    path = tmp_path / "x.kvz"
    tensors.write_file(path, {"x": value, "y": value[:3].clone()}, {"cache": "Other"})
    staged = torch.empty(4, tensors._BLOCK, dtype=torch.uint8)
    with open_file(path) as file:
        for name in ("x", "y", "x"):
            assert torch.equal(tensors.read_tensor(file, name, scratch=staged), tensors.read_tensor(file, name))
    if words > 1:
        data = bytearray(path.read_bytes())
        data[-9] ^= 4
        path.write_bytes(data)
        with open_file(path) as file, pytest.raises(Damaged, match="differs from its checksum"):
            for name in ("x", "y"):
                tensors.read_tensor(file, name, scratch=staged)
