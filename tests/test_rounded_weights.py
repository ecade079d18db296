"""Weights rounded while they are loaded: what is kept, what files say, and that caches are never mixed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import kvzip
import tiny_models
from kvzip import ops
from kvzip.cache.io import read_header
from kvzip.cli.main import main
from kvzip.models import logits
from kvzip.models.weights import LINEAR, named_tensors, weight_bytes
from kvzip.ops import QuantizedWeight
from kvzip.ops.weights import expand, quantize_weight

FORMS = {"fp8": "e4m3", "int8": "int8", "int4": "int4"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_models.build(tiny_models.qwen2(tie_word_embeddings=True)).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("untied")
    tiny_models.build(tiny_models.qwen2(tie_word_embeddings=False)).to(torch.bfloat16).save_pretrained(path)
    return path


def load(path: Path, **options) -> kvzip.Model:
    return kvzip.load(path, dtype=torch.float32, device="cpu", **options)


@pytest.mark.parametrize("form", FORMS)
def test_linear_layers_are_rounded_and_nothing_else(source: Path, form: str) -> None:
    plain, model = load(source), load(source, weights=form)
    for whole, rounded in zip(plain.weights.layers, model.weights.layers, strict=True):
        for field, weight in vars(rounded).items():
            own = getattr(whole, field)
            if field in LINEAR:
                assert isinstance(weight, QuantizedWeight) and weight.kind == FORMS[form]
                assert torch.equal(
                    expand(weight, torch.float32), expand(quantize_weight(own, FORMS[form]), torch.float32)
                )
            else:
                assert (own is None and weight is None) or torch.equal(own, weight)
    assert torch.equal(plain.weights.embed, model.weights.embed) and model.weights.unembed is model.weights.embed
    assert model.identity == plain.identity, "head scores of the 16-bit model are the rounded one's too"
    held = sum(tensor.nbytes for _, tensor in named_tensors(model.weights))
    assert held == weight_bytes(model.config, torch.float32, kind=FORMS[form])
    assert repr(model).split(",")[1:3] == repr(plain).split(",")[1:3]


def test_fingerprints_differ_by_form_and_caches_are_not_mixed(source: Path, tmp_path: Path) -> None:
    models = {form: load(source, weights=form) for form in (None, *FORMS)}
    assert len({model.fingerprint for model in models.values()}) == 4
    cache = kvzip.prefill(models["int8"], torch.arange(3, 40), template=False)
    for form, model in models.items():
        if form != "int8":
            with pytest.raises(ValueError, match="model"):
                kvzip.score(model, cache)
    kvzip.save(cache, tmp_path / "a.kvz", model=models["int8"])
    assert read_header(tmp_path / "a.kvz")["model"]["weights"] == "int8"
    opened, again = kvzip.open(tmp_path / "a.kvz", device="cpu")
    assert opened.fingerprint == models["int8"].fingerprint and again.length == cache.length
    with pytest.raises(ValueError, match="the model that made"):
        kvzip.open(tmp_path / "a.kvz", device="cpu", weights="int4")
    kvzip.save(kvzip.prefill(models[None], torch.arange(3, 40), template=False), tmp_path / "b.kvz", model=models[None])
    assert "weights" not in read_header(tmp_path / "b.kvz")["model"]


def rounded(model: kvzip.Model, kind: str) -> kvzip.Model:
    layers = [
        replace(x, **{field: quantize_weight(getattr(x, field), kind) for field in LINEAR})
        for x in model.weights.layers
    ]
    return replace(model, weights=replace(model.weights, layers=tuple(layers)), quantized=kind)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("form", "head"), [(None, "int8"), ("int4", "int8"), ("int8", "fp8"), ("fp8", "int4")])
def test_the_head_is_rounded_where_it_is_asked_for(
    tied: bool, form: str | None, head: str, source: Path, untied: Path
) -> None:
    path = source if tied else untied
    plain, without = load(path), load(path, weights=form)
    model = load(path, weights=form, head_weights=head)
    own = model.weights.unembed
    assert isinstance(own, QuantizedWeight) and own.kind == FORMS[head]
    want = expand(quantize_weight(plain.weights.unembed, FORMS[head]), torch.float64)
    assert torch.equal(expand(own, torch.float64), want)
    assert (model.weights.embed is own) is tied is model.config.tied
    if not tied:
        assert torch.equal(model.weights.embed, plain.weights.embed)
    changed = {name for name, _ in named_tensors(model.weights)} ^ {name for name, _ in named_tensors(without.weights)}
    assert {name.partition(".")[0] for name in changed} == {"embed" if tied else "unembed"}
    assert model.identity == plain.identity and model.fingerprint not in (plain.fingerprint, without.fingerprint)
    held = sum(tensor.nbytes for _, tensor in named_tensors(model.weights))
    assert held == weight_bytes(model.config, torch.float32, kind=FORMS.get(form or ""), head=FORMS[head])
    table = want if tied else plain.weights.embed.double()
    ids = torch.tensor([[3, 0, 3, 96], [7, 8, 9, 10]])
    assert torch.equal(ops.embedding(ids, model.weights.embed, torch.float64), table[ids].to(torch.float64))
    hidden = torch.randn(2, 4, table.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(logits(model, hidden), hidden @ want.T, rtol=1e-12, atol=1e-12)


def test_files_and_the_command_know_the_head_s_form(source: Path, tmp_path: Path) -> None:
    model = load(source, weights="int4", head_weights="int8")
    cache = kvzip.prefill(model, torch.arange(3, 40), template=False)
    kvzip.save(cache, tmp_path / "a.kvz", model=model)
    told = read_header(tmp_path / "a.kvz")["model"]
    assert (told["weights"], told["head_weights"]) == ("int4", "int8")
    opened, _ = kvzip.open(tmp_path / "a.kvz", device="cpu")
    assert opened.fingerprint == model.fingerprint and opened.quantized_head == "int8"
    said = r"the model that made a\.kvz, .*weights=int4, head_weights=int8, got .*weights=int4, head_weights=fp8"
    with pytest.raises(ValueError, match=said):
        kvzip.open(tmp_path / "a.kvz", device="cpu", head_weights="fp8")
    shown = CliRunner().invoke(main, ["info", str(tmp_path / "a.kvz")]).output
    assert " in float32, weights=int4, head_weights=int8" in shown
    with pytest.raises(ValueError, match="got a Model and head_weights"):
        kvzip.open(tmp_path / "a.kvz", model=model, head_weights="int8")
    with pytest.raises(ValueError, match=r"head_weights to be one of .*got str 'int3'"):
        load(source, head_weights="int3")
    assert "--head-weights" in CliRunner().invoke(main, ["compress", "--help"]).output


def test_every_stage_takes_rounded_weights(model: kvzip.Model) -> None:
    """8-bit weights are near enough that the same pairs stay; formula kvzip+ reads a weight itself."""
    text = "Anna keeps seven bees and a small boat in the barn behind her house. " * 3
    kept = {}
    for kind in (None, "int8", "e4m3"):
        own = model if kind is None else rounded(model, kind)
        cache = kvzip.score(own, kvzip.prefill(own, text), method="kvzip+")
        assert cache.scores is not None
        kept[kind] = torch.stack([*kvzip.keep_mask(cache.scores, 0.3)])
        small = kvzip.compress(cache, 0.3)
        assert kvzip.generate(own, small, ["Who?", "What does she keep?"], max_tokens=4)
    share = {kind: float((kept[kind] & kept[None]).sum() / kept[None].sum()) for kind in ("int8", "e4m3")}
    assert 0.95 < share["int8"] < 1 and 0.8 < share["e4m3"] < 1, share


def test_wrong_forms_are_refused(source: Path) -> None:
    for name in ("weights", "activations"):
        with pytest.raises(ValueError, match=rf"{name} to be one of .*got str 'int3'"):
            load(source, **{name: "int3"})
    with pytest.raises(ValueError, match="how activations are rounded, got one of 16 bits"):
        load(source, activations="checkpoint")


def test_info_says_what_each_form_takes(source: Path) -> None:
    config = load(source).config
    run = CliRunner().invoke(main, ["info", str(source), "--json"])
    facts = json.loads(run.stdout)
    want = {name: weight_bytes(config, torch.bfloat16, kind=kind) for name, kind in {"bfloat16": None, **FORMS}.items()}
    assert facts["weight_bytes_by_form"] == want and facts["weight_bytes"] == want["bfloat16"]
    heads = {form: want["bfloat16"] - weight_bytes(config, torch.bfloat16, head=kind) for form, kind in FORMS.items()}
    assert facts["head_weights_save"] == heads and 0 < heads["int8"] < heads["int4"]
    assert len(set(want.values())) == 3 and want["int4"] < want["int8"] == want["fp8"] < want["bfloat16"]


def test_the_command_takes_the_form(source: Path, tmp_path: Path) -> None:
    document, out = tmp_path / "a.txt", tmp_path / "a.kvz"
    document.write_text("one two")
    run = CliRunner().invoke(main, ["compress", str(document), "-m", str(source), "--weights", "int5", "-o", str(out)])
    assert run.exit_code == 2 and "fp8" in run.output
    for name in ("compress", "ask", "chat", "bench", "compare"):
        assert "--weights" in CliRunner().invoke(main, [name, "--help"]).output
    assert "--weights" in CliRunner().invoke(main, ["eval", "run", "--help"]).output
