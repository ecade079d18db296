"""Head scores: the largest of a text's, attached without a pass, heads whole or dropped, files that come back."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvzip
import random_model
from accuracy import same_fields
from kvzip import head_scores
from kvzip.cache import RaggedKV, read_header
from kvzip.hub import SHIPPED
from kvzip.models import RopeSpec
from rewritten import rewrite

TEXTS = ("It was a bright cold day in April.", "def f(x):\n    return x + 1\n", "The clocks were striking thirteen.")
DOCUMENT = "All happy families are alike; every unhappy family is unhappy in its own way."


@pytest.fixture(scope="module")
def model():
    return random_model.make(random_model.config(windows=(None, 6, None), num_kv_heads=2))


@pytest.fixture(scope="module")
def plain():
    return random_model.make(random_model.config(windows=(None,) * 3, num_heads=8, num_kv_heads=4))


@pytest.fixture(scope="module")
def made(plain):
    return head_scores.make(plain, TEXTS, names=["novel", "code", "more"])


@pytest.fixture(scope="module")
def stored(made, tmp_path_factory):
    path = tmp_path_factory.mktemp("heads") / "stored.safetensors"
    head_scores.save(made, path)
    return path.read_bytes()


def kept_rows(small):
    """The context tokens that each scored layer and head keeps, in order: a list of lists of lists."""
    layers = [kv for kv in small.context if isinstance(kv, RaggedKV)]
    bounds = [kv.offsets.tolist() for kv in layers]
    return [
        [[p - small.start for p in kv.positions[a:b].tolist() if p >= small.start] for a, b in itertools.pairwise(x)]
        for kv, x in zip(layers, bounds, strict=True)
    ]


@pytest.mark.parametrize("scope", ["context", "chunk"])
def test_a_head_scores_the_most_that_any_token_of_any_text_does(model, scope):
    caches = [kvzip.score(model, kvzip.prefill(model, text), scope=scope, chunk=10) for text in TEXTS]
    want = torch.stack([cache.scores.values.amax(-1) for cache in caches])
    scores = head_scores.make(model, TEXTS, scope=scope, chunk=10)
    assert torch.equal(scores.values, want.amax(0)) and not torch.equal(want[0], want.amax(0))
    assert scores.layers == (0, 2) and scores.method == f"kvzip-{scope}" and scores.family == "random"
    one = head_scores.make(model, TEXTS[0], scope=scope, chunk=10)
    assert torch.equal(one.values, want[0])
    ids = kvzip.prompts.encode_text(model.tokenizer, TEXTS[0])
    assert head_scores.make(model, torch.tensor(ids), scope=scope, chunk=10).sources == one.sources
    assert [source.tokens for source in scores.sources] == [cache.length - cache.start for cache in caches]


def test_progress_counts_every_token_twice(model):
    calls = []
    head_scores.make(model, TEXTS, chunk=7, progress=lambda done, total: calls.append((done, total)))
    total = 2 * sum(map(len, TEXTS))  # a byte is a token
    done = [n for n, _ in calls]
    assert {t for _, t in calls} == {total} and done == sorted(done) and done[-1] == total and len(done) > 9
    assert set(done) >= {len(TEXTS[0]), 2 * len(TEXTS[0]), 2 * len(TEXTS[0]) + len(TEXTS[1])}


def test_attached_scores_are_one_number_for_each_head(model):
    scores = head_scores.make(model, TEXTS)
    dense = kvzip.prefill(model, DOCUMENT)
    cache = head_scores.attach(dense, scores)
    assert cache.scores.source == "heads" and cache.layers is dense.layers
    assert cache.scores.values.shape == (2, 2, len(DOCUMENT))
    assert (cache.scores.values == scores.values[:, :, None]).all()
    assert cache.scores.values.untyped_storage().nbytes() == scores.values.nbytes
    assert (cache.scores.layers, cache.scores.start, cache.scores.stop) == ((0, 2), dense.start, dense.length)


@settings(max_examples=40)
@given(ratio=st.floats(0.01, 1.0), sink=st.integers(0, 90), recent=st.integers(0, 90), ties=st.booleans())
def test_heads_keep_all_or_only_sink_and_recent(plain, made, ratio, sink, recent, ties):
    scores = replace(made, values=(made.values * 2).round()) if ties else made
    cache = head_scores.attach(kvzip.prefill(plain, DOCUMENT), scores)
    small = kvzip.compress(cache, ratio, level="head", sink=sink, recent=recent)
    layers, heads, length = cache.scores.values.shape
    whole = int(ratio * (layers * heads))
    order = scores.values.flatten().sort(descending=True, stable=True).indices[:whole].tolist()
    streaming = [n for n in range(length) if n < sink or n >= length - recent]
    want = [list(range(length)) if n in order else streaming for n in range(layers * heads)]
    assert [rows for layer in kept_rows(small) for rows in layer] == want
    assert small.kept == whole * length + (layers * heads - whole) * min(length, sink + recent)
    assert small.total == layers * heads * length


def test_protected_and_minimum_rows_of_dropped_heads_stay_beside_the_ends(plain, made):
    cache = head_scores.attach(kvzip.prefill(plain, DOCUMENT), made)
    small = kvzip.compress(cache, 0.5, level="head", sink=2, recent=3, protect=[(10, 14)], min_rows=1)
    length, rows = len(DOCUMENT), [rows for layer in kept_rows(small) for rows in layer]
    dropped = [row for row in rows if len(row) < length]
    assert len(dropped) == 6 and small.kept == 6 * length + sum(map(len, dropped))
    assert all(row == [0, 1, *range(10, 14), *range(length - 3, length)] for row in dropped)  # equal scores: the first


@pytest.mark.parametrize("heads", [10, 90, 100])
@pytest.mark.parametrize("percent", [29, 57, 70])
def test_the_number_of_heads_does_not_depend_on_the_context(heads, percent):
    """int(0.7 * 90) is 62 heads, though 0.7 * (90 * 73) is 63 heads of 73 tokens."""
    model = random_model.make(random_model.config(windows=(None,), num_heads=heads, num_kv_heads=heads, head_dim=2))
    values = torch.rand(1, heads, generator=torch.Generator().manual_seed(0))
    scores = head_scores.HeadScores(values, (0,), "", "", "test", ())
    cache = head_scores.attach(kvzip.prefill(model, DOCUMENT[:73]), scores)
    assert kvzip.compress(cache, percent / 100, level="head").kept == int(percent / 100 * heads) * 73


def test_answers_read_attached_heads(plain, made):
    """At ratio 1 nothing is lost; below it the questions' answers are those of scores spread by hand."""
    cache = kvzip.prefill(plain, DOCUMENT)
    attached = head_scores.attach(cache, made)
    assert kvzip.generate(plain, kvzip.compress(attached, 1.0, level="head"), "Who?", max_tokens=8) == kvzip.generate(
        plain, cache, "Who?", max_tokens=8
    )
    spread = replace(attached.scores, values=made.values[:, :, None].repeat(1, 1, len(DOCUMENT)))
    for level in ("head", "pair"):
        ours, theirs = (kvzip.compress(x, 0.6, level=level) for x in (attached, replace(cache, scores=spread)))
        for a, b in zip(ours.context, theirs.context, strict=True):
            assert torch.equal(a.k, b.k) and torch.equal(a.positions, b.positions)


def test_saved_scores_come_back_bit_for_bit(model, tmp_path):
    scores = replace(head_scores.make(model, TEXTS, names=["a", "b", "ü"]), sink=4, recent=9)
    path = tmp_path / "heads.safetensors"
    head_scores.save(scores, path, note={"commit": "abc"})
    back = head_scores.load(path, model=model)
    assert torch.equal(back.values, scores.values)
    assert same_fields(replace(back, values=scores.values), scores)
    assert read_header(path)["note"] == {"commit": "abc"} and [p.name for p in tmp_path.iterdir()] == [path.name]
    with pytest.raises(ValueError, match=r"made by this model.*got those of another"):
        head_scores.load(path, model=random_model.make(model.config, seed=1))
    with pytest.raises(ValueError, match=r"expected a cache, got 'HeadScores'.*use kvzip.head_scores.load"):
        kvzip.load_cache(path)
    kvzip.save(kvzip.prefill(model, "abc"), path, overwrite=True)
    with pytest.raises(ValueError, match="expected head scores, got a file of 'DenseCache'"):
        head_scores.load(path)


def test_a_fingerprint_survives_the_dtype_the_length_and_the_scaling_but_not_another_model(model):
    same = [random_model.make(model.config, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    config = model.config
    same.append(replace(model, config=replace(config, max_length=9_999)))
    scaled = RopeSpec(theta=1000.0, kind="linear", factor=2.0)
    same.append(replace(model, config=replace(config, layers=tuple(replace(x, rope=scaled) for x in config.layers))))
    assert {head_scores.fingerprint_of(x) for x in same} == {model.identity}
    windows = tuple(replace(spec, window=5) for spec in config.layers)
    other = [random_model.make(config, seed=1), replace(model, config=replace(config, layers=windows))]
    assert len({head_scores.fingerprint_of(x) for x in [model, *other]}) == 3


@settings(max_examples=400)
@given(data=st.data())
def test_changed_files_are_refused_or_sound(stored, tmp_path_factory, data):
    path, raw = tmp_path_factory.getbasetemp() / "mutated.safetensors", bytearray(stored)
    if data.draw(st.booleans()):  # a shorter or a longer file
        cut = data.draw(st.booleans())
        path.write_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))] if cut else raw + b"\0" * 8)
        with pytest.raises(ValueError):
            head_scores.load(path)
        return
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        back = head_scores.load(path)
    except ValueError:
        return
    assert len(back.layers) == back.values.shape[0] and not back.values.isnan().any()
    assert list(back.layers) == sorted(set(back.layers)) and min(back.layers) >= 0
    assert back.sink >= 0 and back.recent >= 0 and all(source.tokens >= 0 for source in back.sources)


@settings(max_examples=150)
@given(data=st.data())
def test_headers_that_lie_are_refused(stored, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "lying.safetensors"
    path.write_bytes(stored)
    true = read_header(path)
    key = data.draw(st.sampled_from(["layers", "sources", "sink", "recent", "cache", "family", "fingerprint"]))
    junk = st.one_of(st.none(), st.integers(-3, -1), st.booleans(), st.lists(st.integers(-2, 4), max_size=4))
    value = data.draw(junk)
    rewrite(path, lambda header: header.update({key: value}))
    if value == true[key] or (key == "sources" and value == []):
        head_scores.load(path)
        return
    if (
        key == "layers"
        and isinstance(value, list)
        and len(value) == 3
        and value == sorted({n for n in value if n >= 0})
    ):
        assert list(head_scores.load(path).layers) == value  # another model's layers: refused where they are attached
        return
    with pytest.raises(ValueError):
        head_scores.load(path)


@given(values=st.lists(st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3), min_size=1, max_size=4))
def test_duo_attention_files_come_back_bit_for_bit(tmp_path_factory, values):
    directory = tmp_path_factory.mktemp("duo")
    scores = head_scores.HeadScores(
        torch.tensor(values), tuple(range(len(values))), "", "", "duo-attention", (), sink=64, recent=300
    )
    head_scores.to_duo_attention(scores, directory / "new")
    back = head_scores.from_duo_attention(directory / "new")
    assert torch.equal(back.values, scores.values) and same_fields(replace(back, values=scores.values), scores)


def test_duo_attention_files_are_in_its_format(tmp_path):
    """A row of tab-separated numbers for each layer, which numpy reads; sizes that its loader asks for."""
    numpy = pytest.importorskip("numpy")
    scores = head_scores.HeadScores(torch.tensor([[0.25, 1.0], [0.0, 0.1]]), (0, 1), "", "", "test", ())
    head_scores.to_duo_attention(scores, tmp_path)
    table = numpy.loadtxt(tmp_path / "full_attention_heads.tsv", dtype=float, delimiter="\t")
    assert (table == scores.values.double().numpy()).all()
    lines = (tmp_path / "full_attention_heads.tsv").read_text().splitlines()
    assert [line.count("\t") for line in lines] == [1, 1]
    assert json.loads((tmp_path / "config.json").read_text()) == {"sink_size": 128, "recent_size": 256}
    numpy.savetxt(tmp_path / "full_attention_heads.tsv", numpy.array([[1.5, 0.5], [-0.5, 1e-3]]), delimiter="\t")
    assert torch.equal(head_scores.from_duo_attention(tmp_path).values, torch.tensor([[1.0, 0.5], [0.0, 1e-3]]))


def test_files_that_are_not_duo_attentions_stay_as_they_are(tmp_path):
    old = head_scores.HeadScores(torch.tensor([[0.25, 1.0]]), (0,), "", "", "test", ())
    new = replace(old, values=torch.tensor([[0.5, 0.0]]), sink=7)
    for name, text in [
        ("config.json", "{}"),
        ("config.json", '{"sink_size": 1, "recent_size": 2, "model_type": "llama"}'),
        ("config.json", "nothing"),
        ("full_attention_heads.tsv", "0.5\t0.5\n"),
    ]:
        (tmp_path / name).write_text(text)
        for overwrite in (False, True):
            with pytest.raises(FileExistsError, match=rf"expected .*, got .* with another {name}: it is left as it is"):
                head_scores.to_duo_attention(new, tmp_path, overwrite=overwrite)
        assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(name, text)]
        (tmp_path / name).unlink()
    head_scores.to_duo_attention(old, tmp_path)
    with pytest.raises(FileExistsError, match=r"expected .*, got .*: pass overwrite=True"):
        head_scores.to_duo_attention(new, tmp_path)
    assert torch.equal(head_scores.from_duo_attention(tmp_path).values, old.values)
    head_scores.to_duo_attention(new, tmp_path, overwrite=True)
    back = head_scores.from_duo_attention(tmp_path)
    assert torch.equal(back.values, new.values) and back.sink == 7 and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("full_attention_heads.tsv", "0.1\t0.2\n0.3\n", r"as many finite numbers.*\[2, 1\]"),
        ("full_attention_heads.tsv", "0.1\tnan\n", "finite"),
        ("full_attention_heads.tsv", "", "finite numbers"),
        ("full_attention_heads.tsv", "0.1 0.2\n", "tab-separated"),
        ("config.json", "{}", "sink_size and recent_size"),
        ("config.json", '{"sink_size": -1, "recent_size": 2}', "sink_size"),
        ("config.json", "[1, 2]", "sink_size and recent_size"),
        ("config.json", "nothing", "sink_size and recent_size"),
    ],
)
def test_damaged_duo_attention_files_are_refused(tmp_path, name, text, error):
    scores = head_scores.HeadScores(torch.rand(2, 2), (0, 1), "", "", "test", ())
    head_scores.to_duo_attention(scores, tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=error):
        head_scores.from_duo_attention(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"no {name}"):
        head_scores.from_duo_attention(tmp_path)


def test_a_softmax_rounded_above_one_is_one_for_duo_attention(tmp_path):
    above = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)).item()
    scores = head_scores.HeadScores(torch.tensor([[above, 0.5]]), (0,), "", "", "test", ())
    head_scores.to_duo_attention(scores, tmp_path)
    assert (tmp_path / "full_attention_heads.tsv").read_text().startswith("1.000000000000000000e+00\t")


def test_shipped_scores_are_whole_and_say_what_they_were_made_from():
    names = head_scores.shipped_names()
    assert set(names) >= {"smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct", "gemma-3-270m"}
    for name in names:
        scores, header = head_scores.shipped(name), read_header(SHIPPED / f"{name}.safetensors")
        assert header["note"]["model"] == name and header["library"] and scores.method == "kvzip-context"
        assert (scores.values > 0).all() and (scores.values <= 1 + 1e-6).all() and len(scores.fingerprint) == 32
        assert all(source.name and source.tokens >= 1000 for source in scores.sources)
        assert str(Path.home()) not in json.dumps(header)
    assert len({head_scores.shipped(name).fingerprint for name in names}) == len(names)


def test_what_duo_attention_has_no_room_for_is_refused(model, tmp_path):
    scores = head_scores.make(model, TEXTS[0])
    with pytest.raises(ValueError, match=r"scores of all layers.*got layers \(0, 2\)"):
        head_scores.to_duo_attention(scores, tmp_path)
    with pytest.raises(ValueError, match=r"in \[0, 1\].*rescale"):
        head_scores.to_duo_attention(replace(scores, layers=(0, 1), values=scores.values * 3), tmp_path)


def test_bad_input_is_named(model, plain, made):
    with pytest.raises(ValueError, match="at least one text"):
        head_scores.make(model, [])
    with pytest.raises(ValueError, match="names for each of 3 texts, got 1"):
        head_scores.make(model, TEXTS, names=["one"])
    with pytest.raises(ValueError, match="at least one token"):
        head_scores.make(model, [TEXTS[0], ""])
    with pytest.raises(ValueError, match=r"layers \(0, 2\) with 2 KV heads.*got \[3, 4\]"):
        head_scores.attach(kvzip.prefill(model, DOCUMENT), made)
    consumed = head_scores.attach(kvzip.prefill(plain, DOCUMENT), made)
    kvzip.compress(consumed, 0.5, level="head", consume=True)
    with pytest.raises(ValueError, match="consume"):
        head_scores.attach(consumed, made)
    with pytest.raises(ValueError, match="expected head scores to combine"):
        head_scores.combine()
    with pytest.raises(ValueError, match="of one model and method"):
        head_scores.combine(made, replace(made, fingerprint="other"))
    cache = head_scores.attach(kvzip.prefill(plain, DOCUMENT), made)
    with pytest.raises(ValueError, match="level 'head' with sink and recent, got 'pair'"):
        kvzip.compress(cache, 0.5, sink=4)
    with pytest.raises(ValueError, match="recent to be at least 0, got -1: pass"):
        kvzip.compress(cache, 0.5, level="head", sink=4, recent=-1)
    broken = replace(made, values=made.values.clone().fill_(torch.nan))
    with pytest.raises(ValueError, match="without NaN"):
        kvzip.compress(head_scores.attach(cache, broken), 0.5, level="head")
    with pytest.raises(ValueError, match="without NaN"):
        head_scores.save(broken, "unused")
    with pytest.raises(ValueError, match=r"expected a model with shipped head scores.*got 'gpt-2'"):
        head_scores.shipped("gpt-2")


def test_scores_that_overflowed_are_refused(plain):
    huge = replace(plain.weights, embed=plain.weights.embed * torch.inf)
    with pytest.raises(ValueError, match="without NaN"):
        head_scores.make(replace(plain, weights=huge), TEXTS[0])
