"""Identity is arithmetic: what changes a model's fingerprint and what does not, from a checkpoint's stored tensors."""

import json
from collections.abc import Callable
from dataclasses import field, make_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import kvzip
import random_model
import tiny_models
from kvzip.models import (
    Model,
    ModelConfig,
    RopeSpec,
    StoredTensor,
    checkpoint_digest,
    identity,
    identity_of,
    stored_tensor,
)
from kvzip.models.weights import short_name

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_models.build(tiny_models.qwen2(tie_word_embeddings=True)).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(source: Path) -> Model:
    return load(source)


def load(path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Model:
    return kvzip.load(path, dtype=dtype, device="cpu", **options)


Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], None]


@pytest.fixture
def changed(source: Path, tmp_path: Path) -> Callable[[Change], Path]:
    """A copy of the directory with its config and tensors changed in place."""

    def write(change: Change) -> Path:
        raw = json.loads((source / "config.json").read_text())
        tensors = load_file(source / "model.safetensors")
        change(raw, tensors)
        (tmp_path / "config.json").write_text(json.dumps(raw))
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "model.safetensors", {"format": "pt"})
        return tmp_path

    return write


def head(kind: str) -> Change:
    def change(raw: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        embed = tensors["model.embed_tokens.weight"]
        if kind != "absent":
            tensors["lm_head.weight"] = embed.clone()
        if kind == "instead":
            del tensors["model.embed_tokens.weight"]
        if kind == "untied":
            raw["tie_word_embeddings"] = False

    return change


def without_wrapper(raw: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def with_skipped(raw: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    raw |= {"max_position_embeddings": 128, "use_cache": False, "torch_dtype": "float16", "bos_token_id": 7}


@pytest.mark.parametrize(
    "change", [*map(head, ("absent", "equal", "instead", "untied")), without_wrapper, with_skipped]
)
def test_what_is_the_same_arithmetic_has_the_same_fingerprint(
    change: Change, changed: Callable[[Change], Path], model: Model
) -> None:
    assert load(changed(change)).fingerprint == model.fingerprint


def test_shards_in_any_order_have_the_same_fingerprint(source: Path, tmp_path: Path, model: Model) -> None:
    tensors = load_file(source / "model.safetensors")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    names = sorted(tensors, reverse=True)
    weight_map = {}
    for n, part in enumerate((names[::3], names[1::3], names[2::3])):
        save_file({name: tensors[name] for name in part}, tmp_path / f"{n}.safetensors", {"format": "pt"})
        weight_map |= dict.fromkeys(part, f"{n}.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert load(tmp_path).fingerprint == model.fingerprint


def rope_base(raw: dict[str, Any], _: Any) -> None:
    raw["rope_parameters"] = {"rope_type": "default", "rope_theta": 501.0}


def epsilon(raw: dict[str, Any], _: Any) -> None:
    raw["rms_norm_eps"] = 2e-6


def last_element(_: Any, tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.down_proj.weight"][-1, -1] += 1


def norm_element(_: Any, tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"][5] += 1


def stored_type(_: Any, tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()


def other_head(_: Any, tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2


def swapped(_: Any, tensors: dict[str, torch.Tensor]) -> None:
    a, b = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    tensors[a], tensors[b] = tensors[b], tensors[a]


@pytest.mark.parametrize("change", [rope_base, epsilon, last_element, norm_element, stored_type, other_head, swapped])
def test_what_is_another_arithmetic_has_another_fingerprint(
    change: Change, changed: Callable[[Change], Path], model: Model
) -> None:
    other = load(changed(change))
    assert other.fingerprint != model.fingerprint
    assert (other.identity == model.identity) is (change is rope_base)


def test_the_dtype_stands_behind_the_dash_and_nothing_else_of_it(source: Path, model: Model) -> None:
    half = load(source, torch.float16)
    assert half.identity == model.identity and len(model.identity) == 32
    (ours, kind), (theirs, other) = (x.fingerprint.split("-") for x in (model, half))
    assert ours == theirs and (kind, other) == ("float32", "float16")
    assert load(source, max_length=9).fingerprint == model.fingerprint
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    stretched = load(source, rope=yarn)
    assert stretched.identity == model.identity and stretched.fingerprint != model.fingerprint


def test_a_head_that_only_some_dtypes_tell_from_the_embedding_counts_in_all_of_them(
    changed: Callable[[Change], Path],
) -> None:
    def almost(_: Any, tensors: dict[str, torch.Tensor]) -> None:
        embed = tensors["model.embed_tokens.weight"].float()
        tensors["model.embed_tokens.weight"], tensors["lm_head.weight"] = embed, embed * (1 + 1e-5)

    path = changed(almost)
    wide, half = load(path), load(path, torch.bfloat16)
    assert (wide.config.tied, half.config.tied) == (False, True)
    assert wide.identity == half.identity


ARITHMETIC: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 50,
    "num_heads": 8,
    "num_kv_heads": 1,
    "head_dim": 16,
    "norm_eps": 1e-5,
    "norm_offset": 1,
    "activation": "gelu_tanh",
    "embed_scale": 2.0,
    "attn_scale": 0.5,
    "attn_softcap": 50.0,
    "logit_softcap": 30.0,
    "qkv_bias": True,
    "o_bias": True,
    "qk_norm": True,
    "post_norms": True,
}


def test_every_field_is_either_arithmetic_or_is_not() -> None:
    """A field that is added must be put in one of both lists here."""
    config = random_model.config()
    base = identity_of(config, "digest")
    for name, value in ARITHMETIC.items():
        assert identity_of(replace(config, **{name: value}), "digest") != base, name
    layers = {"layers": (*config.layers, config.layers[0])}
    windowed = {"layers": tuple(replace(spec, window=9) for spec in config.layers)}
    assert len({base, *(identity_of(replace(config, **x), "digest") for x in (layers, windowed))}) == 3
    idle = {"max_length": 9, "warn_length": 9, "family": "other", "tied": True}
    assert all(identity_of(replace(config, **{name: value}), "digest") == base for name, value in idle.items())
    assert {*ARITHMETIC, *idle, "layers"} == set(ModelConfig.__dataclass_fields__)
    assert identity_of(config, "other") != base


def test_a_new_field_with_its_default_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another value counts, unless the field is listed as one that does not change the arithmetic."""
    config = random_model.config()
    wider = make_dataclass("Wider", [("new", int, field(default=3))], bases=(ModelConfig,), frozen=True)(**vars(config))
    assert identity_of(wider, "digest") == identity_of(config, "digest")
    model = random_model.make(config)
    assert replace(model, config=wider).fingerprint == model.fingerprint
    assert identity_of(replace(wider, new=4), "digest") != identity_of(wider, "digest")
    before = identity_of(config, "digest")
    monkeypatch.setattr(identity, "_LEFT_OUT", (*identity._LEFT_OUT, "new"))
    assert identity_of(config, "digest") == identity_of(replace(wider, new=4), "digest") == before


def test_rope_counts_by_what_its_kind_uses() -> None:
    model = random_model.make(random_model.config())

    def with_rope(**changes: Any) -> str:
        rope = RopeSpec(**{"theta": 1000.0, **changes})
        layers = tuple(replace(spec, rope=rope) for spec in model.config.layers)
        return replace(model, config=replace(model.config, layers=layers)).fingerprint

    assert with_rope() == model.fingerprint == with_rope(factor=4.0, beta_fast=9.0)
    yarn = {"kind": "yarn", "factor": 4.0, "original_length": 64}
    kinds = [{"kind": "linear", "factor": 4.0}, {**yarn, "kind": "llama3"}, yarn]
    others = {"beta_fast": 9.0, "beta_slow": 0.5, "truncate": False, "attention_factor": 1.5, "original_length": 32}
    found = [with_rope(**x) for x in kinds]
    found += [with_rope(**{**yarn, name: value}) for name, value in others.items()]
    assert len({model.fingerprint, *found}) == 1 + len(kinds) + len(others)


def test_whoever_has_the_stored_tensors_gets_the_digest(source: Path, model: Model) -> None:
    """From bytes alone, in any order: no torch, no shape of ours, as a shard or another engine would."""
    raw = (source / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    stored = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, stop = entry["data_offsets"]
        own = data[start:stop]
        short = short_name(name)
        assert short is not None
        stored.append(
            StoredTensor(short, entry["dtype"], tuple(entry["shape"]), len(own), lambda a, b, own=own: own[a:b])
        )
    assert checkpoint_digest(stored) == checkpoint_digest(reversed(stored)) == model.checkpoint


@given(place=st.integers(0, 63), bit=st.integers(0, 63), size=st.sampled_from([8, 64, 65, 1000, 4096]))
def test_a_bit_at_any_of_the_places_changes_the_digest(place: int, bit: int, size: int) -> None:
    tensor = torch.arange(size, dtype=torch.float32)
    before = checkpoint_digest([stored_tensor("a", tensor)])
    bytes_ = tensor.view(torch.uint8)
    start = (len(bytes_) - 8) * place // 63
    bytes_[start + bit // 8] ^= 1 << (bit % 8)
    assert checkpoint_digest([stored_tensor("a", tensor)]) != before


def test_name_type_and_shape_count_where_the_bytes_are_equal() -> None:
    tensor = stored_tensor("a", torch.arange(1000.0).reshape(10, 100))
    others = [replace(tensor, name="b"), replace(tensor, dtype="I32"), replace(tensor, shape=(100, 10))]
    assert len({checkpoint_digest([one]) for one in (tensor, *others)}) == 4
