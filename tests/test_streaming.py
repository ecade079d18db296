"""prefill_compressed: what stays, what a segment attends to, pieces, interruptions."""

import gc
import re
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from itertools import count, pairwise
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import kvzip
import random_model
from accuracy import assert_as_accurate
from interruptions import interrupted
from kvzip import ops, prompts
from kvzip.cache import RaggedKV, WindowKV, as_ragged, load_cache, read_header
from kvzip.models import run_attention
from kvzip.models.vocabulary import read_vocabulary
from kvzip.options import Scoring
from kvzip.scoring import score_chunks
from kvzip.small import packages as small_models
from kvzip.streaming import checkpoints, pieces, plan, prefill, segments
from rewritten import rewrite

TEXT = "The quick brown fox jumps over the lazy dog, twice. Nobody knows why. "
LONG = "".join(f"{n}: {TEXT}" for n in range(4))
FAMILIES = {
    "plain": {},
    "window": {"windows": (None, 9, None)},
    "softcap": {"windows": (9, None, None), "attn_softcap": 2.0},
    "capped": {"attn_softcap": 2.0},
}
SHARES = ("segment", "running", "final")


def model_of(family, dtype=torch.float64, **options):
    return random_model.make(random_model.config(**FAMILIES[family]), dtype=dtype, **options)


def kept_mask(cache):
    """Which pairs a ragged cache holds: [L H S], prefix included."""
    masks = []
    for layer in cache.context:
        if isinstance(layer, RaggedKV):
            mask = torch.zeros(len(layer.offsets) - 1, cache.context_length, dtype=torch.bool)
            for head, (start, stop) in enumerate(pairwise(layer.offsets.tolist())):
                mask[head, layer.positions[start:stop].long()] = True
            masks.append(mask)
    return torch.stack(masks)


@pytest.mark.parametrize(
    ("family", "scope", "share"),
    [("plain", "context", "segment"), ("window", "chunk", "running"), ("softcap", "context", "final")],
)
def test_one_segment_is_compress_after_prefill(family, scope, share):
    model = model_of(family)
    want = kvzip.compress(kvzip.score(model, kvzip.prefill(model, LONG), chunk=90, scope=scope), 0.3)
    got = kvzip.prefill_compressed(model, LONG, 0.3, segment=999, share=share, scope=scope, chunk=90)
    assert (got.kept, got.total, got.context_length) == (want.kept, want.total, want.context_length)
    torch.testing.assert_close(got.scores.values, want.scores.values)
    for x, y in zip(got.context, want.context, strict=True):
        torch.testing.assert_close((x.k, x.v), (y.k, y.v))
        if isinstance(x, RaggedKV):
            assert torch.equal(x.positions, y.positions) and torch.equal(x.offsets, y.offsets)


@pytest.mark.parametrize(("family", "template"), [("plain", False), ("window", True), ("softcap", False)])
def test_keeping_all_is_prefill(family, template):
    model = model_of(family)
    got = kvzip.prefill_compressed(model, LONG, 1.0, segment=70, template=template)
    want = as_ragged(kvzip.prefill(model, LONG, template=template))
    assert got.kept == want.kept
    for x, y in zip(got.context, want.context, strict=True):
        torch.testing.assert_close((x.k, x.v), (y.k, y.v))
    question = {"template": False, "max_tokens": 6}
    assert kvzip.generate(model, got, "Why?", **question) == kvzip.generate(model, want, "Why?", **question)


@pytest.mark.parametrize("scope", ["chunk", "context"])
@pytest.mark.parametrize("family", ["plain", "window", "softcap"])
def test_a_segment_is_scored_as_the_end_of_a_context(family, scope):
    """Where all is kept and no end is known, its scores are those of `score` for a context that ends with it."""
    model = model_of(family)
    got = kvzip.prefill_compressed(model, iter([LONG]), 1.0, segment=180, scope=scope, chunk=60).scores.values
    for start in range(0, len(LONG), 180):
        stop = min(start + 180, len(LONG))
        want = kvzip.score(model, kvzip.prefill(model, LONG[:stop]), scope=scope, chunk=60).scores.values
        torch.testing.assert_close(got[..., start:stop], want[..., start:])


@pytest.mark.parametrize("context", [LONG, (LONG, len(LONG))], ids=["known", "guessed"])
def test_where_the_end_is_known_scope_chunk_gives_the_scores_of_score(context):
    model = model_of("capped")
    pieces, length = (iter([context[0]]), context[1]) if isinstance(context, tuple) else (context, None)
    got = kvzip.prefill_compressed(model, pieces, 1.0, segment=120, length=length, chunk=60).scores.values
    want = kvzip.score(model, kvzip.prefill(model, LONG), scope="chunk", chunk=60).scores.values
    torch.testing.assert_close(got, want)
    other = kvzip.prefill_compressed(model, iter([LONG]), 1.0, segment=120, chunk=60).scores.values
    assert (other[..., :240] - want[..., :240]).abs().max() > 1e-3


def test_across_a_gap_window_layers_see_the_repeat_alone():
    """Their last tokens are then too far away to be told apart from others, so they must not matter."""
    model = model_of("window")
    cache = kvzip.prefill(model, TEXT)
    blank = [WindowKV(kv.k * 0, kv.v * 0, kv.start) if isinstance(kv, WindowKV) else kv for kv in cache.layers]
    scoring = Scoring(chunk=60)
    for end, same in ((500, True), (0, False)):
        one, other = (score_chunks(model, c, scoring, end=end) for c in (cache, replace(cache, layers=blank)))
        assert torch.equal(one, other) == same


@settings(max_examples=3)
@pytest.mark.parametrize("share", SHARES)
@given(ratio=st.floats(0.001, 1.0), segment=st.integers(40, 130))
def test_exactly_the_budget_stays_and_it_is_the_highest_scored(share, ratio, segment):
    model = model_of("plain", torch.float32)
    cache = kvzip.prefill_compressed(model, LONG, ratio, segment=segment, share=share)
    values, mask = cache.scores.values, kept_mask(cache)
    assert mask[:, :, : cache.start].all()
    assert cache.kept == mask[:, :, cache.start :].sum() == int(ratio * cache.total)
    assert values.shape[2] == len(LONG) and (values > 0).all()
    pairs = values.shape[0] * values.shape[1]
    expected = torch.zeros_like(mask[:, :, cache.start :])
    for start in range(0, len(LONG), segment):
        stop = min(start + segment, len(LONG))
        budget = int(ratio * (pairs * (len(LONG) if share == "final" else stop)))
        part = values.clone()
        part[:, :, stop:] = -1
        if share == "segment":
            part[:, :, :start] = -1
            new = ops.select_count(part, count=budget - int(ratio * (pairs * start)))
            expected |= new
        else:
            seen = expected.clone()
            seen[:, :, start:stop] = True
            part[~seen] = -1
            expected = ops.select_count(part, count=min(budget, int(seen.sum())))
    assert torch.equal(mask[:, :, cache.start :], expected)
    if share == "final":
        assert torch.equal(expected, ops.select(values, ratio=ratio))


@settings(max_examples=6)
@pytest.mark.parametrize("share", SHARES)
@given(
    ratio=st.floats(0.05, 1.0),
    segment=st.integers(60, 130),
    spans=st.lists(st.tuples(st.integers(0, len(LONG)), st.integers(0, 30)), max_size=3),
    floor=st.sampled_from([0.0, 0.2, 1.0]),
)
def test_what_is_protected_stays_within_the_budget_and_floors_come_next(share, ratio, segment, spans, floor):
    model, length = model_of("plain", torch.float32), len(LONG)
    spans = [(start, min(start + count, length)) for start, count in spans]
    protected = torch.zeros(length, dtype=torch.bool)
    for start, stop in spans:
        protected[start:stop] = True
    steps = [(start, min(start + segment, length)) for start in range(0, length, segment)]
    options = {"segment": segment, "share": share, "protect": spans, "floor": floor}
    heads, too_much = 4, 4 * int(protected.sum()) > int(ratio * (4 * length))
    if share == "segment":
        too_much |= any(
            heads * int(protected[a:b].sum()) > int(ratio * (heads * b)) - int(ratio * (heads * a)) for a, b in steps
        )
    if too_much:
        read = []
        with pytest.raises(ValueError, match=r"expected at most \d+ protected tokens.*got \d+"):
            kvzip.prefill_compressed(model, LONG, ratio, **options, progress=lambda *step: read.append(step))
        assert not read, "it is refused before anything is read"
        return
    cache = kvzip.prefill_compressed(model, LONG, ratio, **options)
    mask = kept_mask(cache)[:, :, cache.start :]
    assert mask[:, :, protected].all()
    assert cache.kept == mask.sum() == int(ratio * cache.total)
    expected, least = torch.zeros_like(mask), torch.zeros_like(mask)
    for start, stop in steps:
        best = cache.scores.values[:, :, start:stop].sort(dim=-1, descending=True, stable=True).indices
        least[:, :, start:stop].scatter_(-1, best[:, :, : int(floor * ratio * (stop - start))], True)
        new = torch.zeros_like(mask)
        new[:, :, start:stop] = True
        part = cache.scores.values.masked_fill(least, 9.0).masked_fill(protected, torch.inf)
        budget = int(ratio * (heads * (length if share == "final" else stop)))
        if share == "segment":
            count = budget - int(ratio * (heads * start))
            expected |= ops.select_count(part.masked_fill(~new, -1), count=count)
        else:
            held = int((expected | new).sum())
            count = min(max(budget, heads * int(protected[:stop].sum())), held)
            expected = ops.select_count(part.masked_fill(~(expected | new), -1), count=count)
    assert torch.equal(mask, expected)


def test_what_a_segment_cannot_protect_is_refused_before_anything_is_read():
    read = []
    options = {"segment": 90, "share": "segment", "progress": lambda *step: read.append(step)}
    with pytest.raises(ValueError, match=r"at most 45 protected tokens among 90 to 180.*got 70: take share='running'"):
        kvzip.prefill_compressed(model_of("plain"), LONG, 0.5, **options, protect=[(100, 170)])
    assert not read


def test_what_is_protected_survives_an_interruption(tmp_path):
    model, path = model_of("window", torch.float32), tmp_path / "state.kvz"
    options = {"segment": 60, "protect": [(3, 20), (100, 130)], "checkpoint": path}
    want = kvzip.prefill_compressed(model, LONG, 0.25, **options)

    def interrupt(done, _):
        if done == 120:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kvzip.prefill_compressed(model, LONG, 0.25, **options, progress=interrupt)
    with pytest.raises(ValueError, match=r"protect=\[\[3, 20\]\], got \[\[3, 20\], \[100, 130\]\]"):
        kvzip.prefill_compressed(model, LONG, 0.25, **{**options, "protect": [(3, 20)]})
    assert same_bits(kvzip.prefill_compressed(model, LONG, 0.25, **options), want, tmp_path)


def test_spans_may_reach_beyond_pieces_whose_end_is_unknown():
    model = model_of("plain", torch.float32)
    cache = kvzip.prefill_compressed(model, iter([LONG]), 0.3, segment=90, protect=[(len(LONG) - 9, 10_000)])
    assert kept_mask(cache)[:, :, -9:].all() and cache.kept == int(0.3 * cache.total)
    with pytest.raises(ValueError, match=rf"protected spans within \[0, {len(LONG)}\]"):
        kvzip.prefill_compressed(model, LONG, 0.3, protect=[(0, 10_000)])
    with pytest.raises(ValueError, match="protected spans within 0 and up"):
        kvzip.prefill_compressed(model, iter([LONG]), 0.3, protect=[(-2, 4)])
    with pytest.raises(ValueError, match=r"at most 58 protected tokens, what ratio 0\.2 keeps of 292, got 292"):
        kvzip.prefill_compressed(model, iter([LONG]), 0.2, segment=90, protect=[(0, 10_000)])


@pytest.mark.parametrize("family", ["plain", "window", "capped"])
def test_a_segment_attends_to_what_is_kept_of_those_before_it(family, monkeypatch):
    """The keys and values of every segment, from one pass with a mask for each layer and head."""
    monkeypatch.setattr(segments, "_PASS", 33)
    model = model_of(family)
    cache = kvzip.prefill_compressed(model, LONG, 0.3, segment=80, share="segment", chunk=50)
    length, config = cache.context_length, model.config
    place = torch.arange(length)
    segment = (place - cache.start).div(80, rounding_mode="floor")
    causal = place <= place[:, None]
    kept = iter(kept_mask(cache))
    pairs = []

    def attend(layer, q, k, v):
        window, kv = config.layers[layer].window, cache.context[layer]
        if window is None:
            own = next(kept)
            seen = causal & ((segment == segment[:, None]) | own[:, None])  # [H S S]
            rows = [x[0][own] for x in (k, v)]
        else:
            seen = (causal & (place[:, None] - place < window)).expand(k.shape[1], -1, -1)
            rows = [x[:, :, -window:] for x in (k, v)]
        pairs.append((rows, [kv.k, kv.v]))
        group = q.shape[1] // k.shape[1]
        logits = config.attn_scale * q @ k.repeat_interleave(group, 1).mT
        if config.attn_softcap is not None:
            logits = config.attn_softcap * torch.tanh(logits / config.attn_softcap)
        weights = logits.masked_fill(~seen.repeat_interleave(group, 0), -torch.inf).softmax(-1)
        return weights @ v.repeat_interleave(group, 1)

    run_attention(model, cache.token_ids[None], place, attend)
    for want, got in pairs:
        torch.testing.assert_close(got, want)


def same_bits(a, b, tmp_path):
    files = []
    for name, cache in (("a", a), ("b", b)):
        kvzip.save(cache, tmp_path / name, overwrite=True)
        files.append((tmp_path / name).read_bytes())
    return files[0] == files[1]


@pytest.mark.parametrize(
    ("share", "scope", "stop", "floor"),
    [("running", "chunk", 1, 0.5), ("running", "context", 2, 0), ("segment", "context", 2, 0.5),
     ("final", "chunk", 2, 0), ("final", "context", 4, 0.5)],
)  # fmt: skip
def test_an_interrupted_run_goes_on_with_the_same_bits(share, scope, stop, floor, tmp_path):
    model, path = model_of("window", torch.float32), tmp_path / "state.kvz"
    options = {"segment": 80, "share": share, "scope": scope, "chunk": 50, "floor": floor}
    want = kvzip.prefill_compressed(model, LONG, 0.3, **options)
    steps = []

    def interrupt(done, total):
        steps.append((done, total))
        if len(steps) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kvzip.prefill_compressed(model, LONG, 0.3, **options, checkpoint=path, progress=interrupt)
    partial = load_cache(path, model=model)
    assert partial.context_length - partial.start == steps[-1][0] == min(80 * stop, len(LONG))
    again = []
    got = kvzip.prefill_compressed(
        model, LONG, 0.3, **options, checkpoint=path, progress=lambda *step: again.append(step)
    )
    assert again[0] == steps[-1], "a resumed run begins with what is done"
    assert steps + again[1:] == [(n, len(LONG)) for n in (80, 160, 240, len(LONG))]
    assert same_bits(got, want, tmp_path) and not path.exists()


@pytest.mark.parametrize("at", [0, 1, 2, 7])  # keys and values of two layers of each segment
def test_an_interruption_while_a_segment_is_packed_loses_nothing(at, tmp_path, monkeypatch):
    model, path = model_of("window", torch.float32), tmp_path / "state.kvz"
    want = kvzip.prefill_compressed(model, LONG, 0.3, segment=80)
    gather, calls = segments.gather, []

    def interrupted(*arguments):
        calls.append(0)
        if len(calls) == 1 + at:
            raise KeyboardInterrupt
        return gather(*arguments)

    monkeypatch.setattr(segments, "gather", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kvzip.prefill_compressed(model, LONG, 0.3, segment=80, checkpoint=path)
    assert load_cache(path).context_length == want.start + 80 * (1 + at // 4)
    got = kvzip.prefill_compressed(model, LONG, 0.3, segment=80, checkpoint=path)
    assert same_bits(got, want, tmp_path)


def test_a_checkpoint_is_written_every_so_often_and_belongs_to_its_run(tmp_path):
    model, path = model_of("plain", torch.float32), tmp_path / "state.kvz"
    lengths = []

    def look(done, total):
        lengths.append(read_header(path)["length"] if path.exists() else 0)
        if done == 240:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        kvzip.prefill_compressed(
            model, LONG, 0.3, segment=60, checkpoint=path, save_every=2, progress=look, template=False
        )
    assert lengths == [0, 120, 120, 240]
    options = {"segment": 60, "template": False, "checkpoint": path}
    with pytest.raises(ValueError, match=r"expected a checkpoint of a run with ratio=0.4, got 0.3"):
        kvzip.prefill_compressed(model, LONG, 0.4, **options)
    tokens = len(kvzip.inputs.context_ids(model, LONG))
    with pytest.raises(ValueError, match=rf"of a run over {tokens - 9:,} tokens, got one over {tokens:,} in state.kvz"):
        kvzip.prefill_compressed(model, LONG[:-9], 0.3, **options)
    with pytest.raises(ValueError, match="got other tokens"):
        kvzip.prefill_compressed(model, LONG.replace("3: The", "3: Thy").replace("0", "1"), 0.3, **options)
    assert read_header(path)["length"] == 240, "a run that fails before it gets further leaves the file as it was"


def split(text, lengths):
    pieces, at = [], 0
    while at < len(text):
        pieces.append(text[at : at + lengths[len(pieces) % len(lengths)]])
        at += len(pieces[-1])
    return pieces


@pytest.mark.parametrize("kind", ["text", "ids"])
def test_pieces_are_the_whole(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "_BLOCK", 100)
    model = model_of("plain", torch.float32)
    want = kvzip.prefill_compressed(model, LONG, 0.3, segment=80)
    guess = {"segment": 80, "length": len(LONG)}
    pieces = split(LONG, [1, 50, 3])
    if kind == "ids":
        pieces = [torch.tensor(prompts.encode_text(model.tokenizer, piece)) for piece in pieces]
    steps = []

    def interrupt(done, total):
        steps.append((done, total))
        if done == 160:
            raise KeyboardInterrupt

    path = tmp_path / "state.kvz"
    with pytest.raises(KeyboardInterrupt):
        kvzip.prefill_compressed(model, iter(pieces), 0.3, **guess, checkpoint=path, progress=interrupt)
    got = kvzip.prefill_compressed(model, iter(pieces), 0.3, **guess, checkpoint=path)
    assert steps == [(80, None), (160, None)] and same_bits(got, want, tmp_path)


def trained(kind):
    raw = Tokenizer(models.BPE())
    if kind == "byte level":
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if kind == "metaspace" else "never")
        alphabet = []
    raw.train_from_iterator([LONG * 3], trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    return prompts.make_tokenizer(raw)


@pytest.mark.parametrize("kind", ["byte level", "metaspace", "no prefix"])
@settings(max_examples=15)
@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=4), block=st.integers(1, 200))
def test_text_in_pieces_has_the_tokens_of_the_whole(kind, lengths, block):
    tokenizer = trained(kind)
    text = (LONG + "a  b\n\n c\t\td é 漢字 " * 3) * 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts, "_BLOCK", block)
        encoded = list(prompts.encode_pieces(tokenizer, split(text, lengths)))
    assert [i for ids in encoded for i in ids] == prompts.encode_text(tokenizer, text)
    assert len(encoded) >= len(text) // (2 * block + 200)


def test_a_real_tokenizer_reads_pieces_as_the_whole(monkeypatch):
    name = "smollm2-135m-instruct"
    try:
        tokenizer = read_vocabulary(small_models.model_dir(name), {}).tokenizer
    except small_models.Unavailable as missing:
        pytest.skip(f"left out, {name} cannot be had here: {missing}")
    monkeypatch.setattr(prompts, "_BLOCK", 500)
    source = Path(small_models.__file__)
    text = source.read_text(encoding="utf-8") + (source.parents[1] / "data" / "museum.txt").read_text(encoding="utf-8")
    encoded = list(prompts.encode_pieces(tokenizer, split(text, [1, 700, 33])))
    assert [i for ids in encoded for i in ids] == prompts.encode_text(tokenizer, text)
    assert len(encoded) > len(text) // 1500


def test_text_without_a_place_to_cut_is_held(monkeypatch):
    monkeypatch.setattr(prompts, "_BLOCK", 10)
    tokenizer = random_model.tokenizer()
    assert len(list(prompts.encode_pieces(tokenizer, ["x" * 500]))) == 1
    assert len(list(prompts.encode_pieces(tokenizer, ["x " * 250]))) > 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": 0.0}, "0 < ratio <= 1"),
        ({"share": "fair"}, "expected share to be one of"),
        ({"scope": "all"}, "scope 'context' or 'chunk'"),
        ({"segment": 0}, "expected segment to be at least 1"),
        ({"save_every": 0}, "expected save_every to be at least 1"),
        ({"context": ""}, "at least one token"),
        ({"context": iter([])}, "at least one token"),
        ({"context": iter([TEXT]), "share": "final"}, "its end is unknown"),
        ({"context": TEXT * 100}, "expected at most 4096 positions"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"context": TEXT, "ratio": 0.5} | change
    with pytest.raises(ValueError, match=message):
        kvzip.prefill_compressed(model_of("plain"), **arguments)


def test_mixed_pieces_are_refused():
    with pytest.raises(TypeError, match=r"pieces that are all str, got Tensor"):
        kvzip.prefill_compressed(model_of("plain"), iter([TEXT, torch.tensor([1])]), 0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("scope", ["chunk", "context"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["plain", "window", "softcap"])
def test_a_stream_on_the_gpu_is_as_accurate_as_on_the_cpu(family, dtype, scope):
    """All pairs are kept, so that near ties do not decide what later segments see."""

    def stream(dtype, device):
        sizes = {"head_dim": 64, "hidden_size": 128, "attn_scale": 0.125}
        model = random_model.make(random_model.config(**FAMILIES[family], **sizes), dtype=dtype, device=device)
        cache = kvzip.prefill_compressed(model, LONG, 1.0, segment=130, chunk=70, scope=scope)
        pairs = torch.cat([x.flatten() for kv in cache.context for x in (kv.k, kv.v)])
        return {"pairs": pairs.cpu(), "scores": cache.scores.values.cpu()}

    exact, plain, got = stream(torch.float64, "cpu"), stream(dtype, "cpu"), stream(dtype, "cuda")
    for name in exact:
        assert_as_accurate(got[name], exact[name].double(), plain[name])


@pytest.mark.gpu
def test_a_stream_on_the_gpu_keeps_the_pairs_of_the_cpu():
    masks, caches = [], []
    for device in ("cpu", "cuda"):
        sizes = {"head_dim": 64, "hidden_size": 128, "attn_scale": 0.125}
        model = random_model.make(random_model.config(**FAMILIES["window"], **sizes), device=device)
        caches.append(kvzip.prefill_compressed(model, LONG, 0.3, segment=80, chunk=50))
        masks.append(kept_mask(kvzip.to(caches[-1], "cpu")))
    assert caches[0].kept == caches[1].kept == masks[1][:, :, caches[0].start :].sum()
    assert (masks[0] & masks[1]).sum() > 0.99 * masks[0].sum()


@pytest.mark.gpu
@pytest.mark.parametrize("share", SHARES)
def test_memory_stays_at_what_is_kept_and_a_segment(share):
    sizes = {"head_dim": 64, "hidden_size": 128, "attn_scale": 0.125, "windows": (None,) * 6, "max_length": 1 << 20}
    model = random_model.make(random_model.config(**sizes), dtype=torch.bfloat16, device="cuda")
    ids = torch.randint(256, (300_000,), generator=torch.Generator().manual_seed(0))
    pair = 6 * 2 * 2 * 64 * 2  # bytes of a token: layers, k and v, heads, width, bytes
    kvzip.prefill_compressed(model, ids[:20_000], 0.2, segment=8_000)  # compiles
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    cache = kvzip.prefill_compressed(model, ids, 0.2, segment=8_000, share=share)
    peak = torch.cuda.max_memory_allocated() - before
    kept = int(0.2 * len(ids) * pair)
    layer = kept // 6  # the layer that is being packed, and scores of 4 bytes a pair beside its 256
    assert kvzip.nbytes(cache) < 1.05 * kept
    assert peak < kept + 8_000 * pair + 2 * layer + 120e6


class Counted:
    """A module whose functions of some names count their calls, and raise `error` at call `at`, or from then on."""

    def __init__(self, real, names, *state):
        self._real, self._names, self._state = real, names, state

    def __getattr__(self, name):
        found = getattr(self._real, name)
        return counted(found, *self._state) if name in self._names else found


class Host(torch.Tensor):
    """What `.cpu()` returned, and what is made of it until `.to`: a device without memory is not asked for it."""


def on_host(value):
    return isinstance(value, Host) or (isinstance(value, (list, tuple)) and any(map(on_host, value)))


def counted(function, calls, at, error, lasting):
    def call(*arguments, **options):
        if on_host(arguments):
            return function(*arguments, **options)
        calls.append(function.__name__)
        if len(calls) == at or (lasting and len(calls) > at):
            raise error(f"in {function.__name__}")
        return function(*arguments, **options)

    return call


def failing(patch, names, *state):
    """Lets functions that a run calls fail: streaming's own, those of torch and those of ops."""
    for module in STREAMING:
        for library in ("torch", "ops"):
            if hasattr(module, library):
                patch.setattr(module, library, Counted(getattr(module, library), names, *state))
        for name in names:
            if hasattr(module, name):
                patch.setattr(module, name, counted(getattr(module, name), *state))


STREAMING = (prefill, plan, segments, checkpoints, pieces)
SHORT = {"context": LONG[:120], "ratio": 0.3, "segment": 50, "template": False}
STEPS = (
    *("begin", "extend", "run_attention", "score_chunks", "_choose", "select_count", "pack_", "save"),
    *("gather", "decode_schedule", "cache_of", "cat", "tensor", "of_rows", "ranked"),
)


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """The checkpoint after no, one, two and all three segments of a run that nothing interrupts; the first is None."""
    path, found = tmp_path_factory.mktemp("states") / "state.kvz", [None]
    model = model_of("window", torch.float32)
    kvzip.prefill_compressed(
        model, **SHORT, checkpoint=path, save_every=1, progress=lambda *_: found.append(path.read_bytes())
    )
    assert len(found) == 4
    return found


def fail(model, path, names, *, at, error, lasting):
    """How many segments a run told that it had finished before it failed; None if it did not."""
    told = []
    with pytest.MonkeyPatch.context() as patch:
        failing(patch, names, [], at, error, lasting)
        device = torch.Tensor.to
        patch.setattr(torch.Tensor, "cpu", lambda x: x.as_subclass(Host))
        patch.setattr(torch.Tensor, "to", lambda x, *a, **b: device(x, *a, **b).as_subclass(torch.Tensor))
        try:
            kvzip.prefill_compressed(model, **SHORT, checkpoint=path, progress=lambda done, _: told.append(done))
        except error:
            return len([done for done in told if done])
    return None


def test_whatever_interrupts_a_run_leaves_the_last_segment_that_was_finished(states, tmp_path):
    """At every call of the run's steps: the file is that of a run that nothing interrupts."""
    model, path = model_of("window", torch.float32), tmp_path / "state.kvz"
    seen, at = set(), 0
    while (told := fail(model, path, STEPS, at=(at := at + 1), error=KeyboardInterrupt, lasting=False)) is not None:
        state = path.read_bytes() if path.exists() else None
        assert state in states[told:], f"call {at}"
        assert [p.name for p in tmp_path.iterdir()] == ([path.name] if state else [])
        seen.add(states.index(state))
        path.unlink(missing_ok=True)
    assert at > 60 and seen == {0, 1, 2, 3} and not path.exists()


def test_a_run_may_be_interrupted_at_any_line(states, tmp_path):
    model, path = model_of("window", torch.float32), tmp_path / "state.kvz"
    seen = set()
    for line in count(5, step=29):
        told = []
        options = SHORT | {"checkpoint": path, "progress": lambda done, _, told=told: told.append(done)}
        if not interrupted(STREAMING, line, lambda options=options: kvzip.prefill_compressed(model, **options)):
            break
        state = path.read_bytes() if path.exists() else None
        assert state in states[len(told) :], f"line {line}"
        seen.add(states.index(state))
        path.unlink(missing_ok=True)
    assert seen == {0, 1, 2, 3}


def test_an_interruption_as_the_checkpoint_is_removed_loses_nothing(states, tmp_path, monkeypatch):
    model, path = model_of("window", torch.float32), tmp_path / "state.kvz"
    unlink = Path.unlink

    def interrupted(self, **options):
        unlink(self, **options)
        if self == path:
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "unlink", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kvzip.prefill_compressed(model, **SHORT, checkpoint=path, save_every=1)
    assert path.read_bytes() == states[3]


@pytest.mark.parametrize("done", [0, 2])
def test_memory_that_stays_out_loses_no_finished_segment(done, states, tmp_path):
    """Everything that packs fails from some call on, also while the checkpoint is written."""
    model, path = model_of("window", torch.float32), tmp_path / "state.kvz"
    names = ("gather", "decode_schedule", "cat", "select_count", "run_attention")
    at, seen = 0, set()
    while True:
        if done:
            path.write_bytes(states[done])
        told = fail(model, path, names, at=(at := at + 1), error=torch.OutOfMemoryError, lasting=True)
        if told is None:
            break
        state = path.read_bytes() if path.exists() else None
        assert state in states[max(done, told) :], f"call {at}"
        seen.add(states.index(state))
        path.unlink(missing_ok=True)
    assert at > 10 and seen == {*range(done, 4)}


def test_the_states_that_interruptions_leave_go_on_to_the_same_end(states, tmp_path):
    model, path = model_of("window", torch.float32), tmp_path / "state.kvz"
    want = kvzip.prefill_compressed(model, **SHORT)
    for done, state in enumerate(states[1:], start=1):
        path.write_bytes(state)
        told = []
        got = kvzip.prefill_compressed(model, **SHORT, checkpoint=path, progress=lambda *step, t=told: t.append(step))
        assert told == [(min(50 * n, 120), 120) for n in range(done, 4)]
        assert same_bits(got, want, tmp_path) and not path.exists()


def test_packing_frees_more_than_it_takes(monkeypatch):
    """What the keys or the values of a layer are gathered from is gone before the next: the first is the peak."""
    model = random_model.make(random_model.config(windows=(None, None, None)))
    held, gather = [], segments.gather

    def weighed(*arguments):
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors_of(8)}
        held.append(sum(storage.nbytes() for storage in storages.values()))
        return gather(*arguments)

    monkeypatch.setattr(segments, "gather", weighed)
    kvzip.prefill_compressed(model, LONG, 0.3, segment=100)
    assert len(held) == 18 and all(a > b for n in (0, 6, 12) for a, b in pairwise(held[n : n + 6]))


def tensors_of(width):
    """All keys and values of heads of this width that are held anywhere."""
    found = [x for x in gc.get_objects() if type(x) is torch.Tensor]
    return [x for x in found if x.ndim in (2, 3, 4) and x.shape[-1] == width and x.device.type == "cpu"]


def test_out_of_memory_says_where_what_is_done_is_only_if_it_is_there(states, tmp_path):
    model, path = model_of("window", torch.float32), tmp_path / "state.kvz"
    for at, said in ((1, False), (2, True)):
        with pytest.MonkeyPatch.context() as patch:
            failing(patch, ("score_chunks",), [], at, torch.OutOfMemoryError, True)
            with pytest.raises(torch.OutOfMemoryError, match="expected room for the pairs and activations") as caught:
                kvzip.prefill_compressed(model, **SHORT, checkpoint=path)
        assert ("what is done is in state.kvz" in str(caught.value)) == said == path.exists()


def test_a_checkpoint_that_cannot_be_written_hides_no_error_and_leaves_the_older_one(
    states, tmp_path, monkeypatch, caplog
):
    model, path = model_of("window", torch.float32), tmp_path / "state.kvz"
    path.write_bytes(states[1])

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    def interrupt(done, _):
        if done == 100:
            raise KeyboardInterrupt

    monkeypatch.setattr("kvzip.files.tensors._write", full)
    with pytest.raises(KeyboardInterrupt):
        kvzip.prefill_compressed(model, **SHORT, checkpoint=path, progress=interrupt)
    assert path.read_bytes() == states[1] and [p.name for p in tmp_path.iterdir()] == [path.name]
    assert "state.kvz could not be written and is as it was before: [Errno 28]" in caplog.text


@pytest.mark.parametrize(
    ("place", "error", "message"),
    [
        ("", ValueError, "expected a file for the checkpoint, got .*, which is none: name a file"),
        (
            "none/state.kvz",
            FileNotFoundError,
            r"expected a directory to write the checkpoint state.kvz in, got no .*none",
        ),
        ("file/state.kvz", FileNotFoundError, "expected a directory to write the checkpoint state.kvz in"),
        (".", ValueError, "expected a file for the checkpoint, got .*, which is none: name a file"),
        ("n" * 250, OSError, "expected a checkpoint that can be written, got 'File name too long'"),
        ("/proc/state.kvz", OSError, "expected a checkpoint that can be written, got '"),
        ("/dev/null", ValueError, "expected a file for the checkpoint, got /dev/null"),
        ("link", ValueError, "expected a file for the checkpoint, got .*link, which is none: name a file"),
        ("file", ValueError, "expected a checkpoint of prefill_compressed, got file, which is left as it is"),
        ("cache.kvz", ValueError, r"got cache.kvz, which is left as it is \(its note holds no settings of a run\)"),
        ("heads", ValueError, r"got heads, which is left as it is \(its note holds no settings of a run\)"),
    ],
)
def test_a_place_for_a_checkpoint_is_refused_before_any_work(place, error, message, tmp_path, monkeypatch):
    if place.startswith("/proc") and not Path("/proc").is_dir():
        pytest.skip("no /proc to be refused by")
    model = model_of("plain", torch.float32)
    (tmp_path / "file").write_text("a note of mine")
    kvzip.save(as_ragged(kvzip.prefill(model, TEXT)), tmp_path / "cache.kvz")
    made = kvzip.head_scores.HeadScores(torch.ones(2, 2), (0, 1), "", "", "", ())
    kvzip.head_scores.save(made, tmp_path / "heads", note={"ratio": 0.5})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "state.kvz")
    monkeypatch.setattr(segments, "run_attention", lambda *_: pytest.fail("it went to work"))
    with pytest.raises(error, match=message):
        kvzip.prefill_compressed(model, TEXT, 0.5, checkpoint=tmp_path / place)
    (tmp_path / "link").unlink()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.pop("note"), "expected a checkpoint of prefill_compressed, got state.kvz.*note is None"),
        *(
            (lambda h, note=note: h.update(note=note), rf"got state.kvz.*note is {re.escape(repr(note))}")
            for note in (None, [], "x", 3)
        ),
        (lambda h: h.update(note={}), "got state.kvz.*no settings of a run"),
        (lambda h: h["note"].pop("hint"), "got state.kvz.*no settings of a run"),
        (lambda h: h["note"].update(ratio="0.3"), r"a run with ratio=0.3, got '0.3' in state.kvz"),
        (lambda h: h["note"].update(ratio=[0.3]), r"a run with ratio=0.3, got \[0.3\] in state.kvz"),
        (lambda h: h["note"].update(template=0), "a run with template=False, got 0 in state.kvz"),
        (lambda h: h["note"].update(scope="\x1b[2J" * 99), r"a run with scope=chunk, got '.x1b\[.{1,40}' in state.kvz"),
        (lambda h: h["note"].update(prefix=None), r"a run with prefix=\[\], got None in state.kvz"),
        (lambda h: h["note"].update(expected={}), "a run with expected=120, got {} in state.kvz"),
        (lambda h: h.update(start=3), "state.kvz"),
        (lambda h: h.update(chat=True), "state.kvz.*its pairs are not those of its settings"),
        (lambda h: h.update(scores=None), "state.kvz.*another kind of cache"),
        (lambda h: h.update(cache="DenseCache"), "state.kvz"),
        (lambda h: h.update(layers=None), "state.kvz"),
        (lambda h: h.update(kept=[1]), "state.kvz"),
        (lambda h: h.update(version=None), "state.kvz"),
    ],
)
def test_a_checkpoint_whose_header_has_another_shape_is_named(change, message, states, tmp_path):
    model, path = model_of("window", torch.float32), tmp_path / "state.kvz"
    path.write_bytes(states[2])
    rewrite(path, change)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        kvzip.prefill_compressed(model, **SHORT, checkpoint=path)
    assert path.read_bytes() == before


def test_settings_and_pairs_are_of_one_file(states, tmp_path, monkeypatch):
    """A checkpoint that another run replaces after the first look is refused by its settings."""
    model, path = model_of("window", torch.float32), tmp_path / "state.kvz"
    path.write_bytes(states[1])
    other = tmp_path / "other.kvz"

    def stopped(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kvzip.prefill_compressed(model, **SHORT | {"ratio": 0.1}, checkpoint=other, progress=stopped)
    look = prefill.is_begun

    def looked(place):
        begun = look(place)
        other.replace(path)
        return begun

    monkeypatch.setattr(prefill, "is_begun", looked)
    with pytest.raises(ValueError, match=r"a run with ratio=0\.3, got 0\.1 in state\.kvz"):
        kvzip.prefill_compressed(model, **SHORT, checkpoint=path)


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({"ratio": np.float32(0.3)}, {"ratio": float(np.float32(0.3))}),
        ({"ratio": Fraction(3, 10)}, {}),
        ({"ratio": Decimal("0.3")}, {}),
        ({"ratio": torch.tensor(0.3, dtype=torch.float64)}, {}),
        ({"ratio": 1, "segment": np.int64(50)}, {"ratio": 1.0}),
        ({"segment": torch.tensor(50), "hint": np.uint8(8), "chunk": np.int32(2_000), "template": np.False_}, {}),
        ({"save_every": np.int16(1)}, {}),
    ],
)
def test_numbers_of_any_type_give_the_same_run_and_a_note_that_json_holds(options, plain, tmp_path, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # np.bool_ is no bool
    model, path = model_of("plain", torch.float32), tmp_path / "state.kvz"

    def interrupt(done, _):
        if done == 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kvzip.prefill_compressed(model, **SHORT | options, checkpoint=path, progress=interrupt)
    want = kvzip.prefill_compressed(model, **SHORT | plain)
    assert same_bits(kvzip.prefill_compressed(model, **SHORT | plain, checkpoint=path), want, tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ratio": "0.3"}, TypeError, "expected ratio to be a number, got str '0.3'"),
        ({"ratio": True}, TypeError, "expected ratio to be a number, got bool True"),
        ({"ratio": float("nan")}, ValueError, "0 < ratio <= 1.*got nan"),
        ({"ratio": 30}, ValueError, "got 30: 0.3 keeps 30%"),
        (
            {"segment": 16e3},
            TypeError,
            r"expected segment to be a whole number, got float 16000\.0: pass an int of 1 or more",
        ),
        ({"hint": -1}, ValueError, "expected hint to be at least 0, got -1"),
        ({"length": 0}, ValueError, "expected length to be at least 1, got 0"),
        ({"save_every": np.True_}, TypeError, "expected save_every to be a whole number"),
        ({"chunk": torch.tensor([3])}, TypeError, "expected chunk to be a whole number"),
    ],
)
def test_numbers_that_are_none_are_named(change, error, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users have no check of types
    with pytest.raises(error, match=message):
        kvzip.prefill_compressed(model_of("plain"), **SHORT | change)


@pytest.mark.parametrize("share", ["segment", "running", "final"])
def test_an_infinite_score_does_not_crowd_out_what_is_protected(share, monkeypatch):
    model = random_model.make(random_model.config())
    monkeypatch.setattr(
        segments,
        "score_chunks",
        lambda model, cache, *_, **__: torch.full((2, 2, cache.length - cache.start), torch.inf),
    )
    small = kvzip.prefill_compressed(model, "x" * 60, 0.2, segment=30, share=share, protect=[(25, 28), (55, 58)])
    assert small.kept == int(0.2 * 2 * 2 * 60)
    for kv in small.context:
        for start, stop in pairwise(kv.offsets.tolist()):
            assert {25, 26, 27, 55, 56, 57} <= set((kv.positions[start:stop] - small.start).tolist())
