"""Loading: config.json in both spellings, weights strict both ways, damaged files, host memory."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import kvzip
from kvzip.models import translate_config

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def tensors(config=LLAMA):
    generator = torch.Generator().manual_seed(0)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    width = hidden // config["num_attention_heads"]
    kv = width * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (64, hidden), "model.norm.weight": (hidden,), "lm_head.weight": (64, hidden)}
    for n in range(config["num_hidden_layers"]):
        layer = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        shapes |= {f"model.layers.{n}.{name}.weight": shape for name, shape in layer.items()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def checkpoint(tmp_path):
    def write(*, config=LLAMA, weights=None):
        (tmp_path / "config.json").write_text(json.dumps(config))
        save_file(tensors() if weights is None else weights, tmp_path / "model.safetensors")
        return tmp_path

    return write


def load(path, **options):
    return kvzip.load(path, dtype=torch.float32, device="cpu", **options)


def test_every_tensor_lands_in_its_place(checkpoint):
    weights, want = load(checkpoint()).weights, tensors()
    layer = weights.layers[1]
    stacked = [want[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv"]
    assert torch.equal(layer.qkv, torch.cat(stacked))
    assert torch.equal(layer.gate_up, torch.cat([want[f"model.layers.1.mlp.{x}_proj.weight"] for x in ("gate", "up")]))
    assert torch.equal(layer.o, want["model.layers.1.self_attn.o_proj.weight"])
    assert torch.equal(layer.down, want["model.layers.1.mlp.down_proj.weight"])
    assert torch.equal(layer.attn_norm, want["model.layers.1.input_layernorm.weight"])
    assert torch.equal(layer.mlp_norm, want["model.layers.1.post_attention_layernorm.weight"])
    assert torch.equal(weights.unembed, want["lm_head.weight"]) and torch.equal(
        weights.embed, want["model.embed_tokens.weight"]
    )


def test_shards_and_one_file_load_alike(checkpoint):
    path = checkpoint()
    whole = load(path)
    names = sorted(tensors())
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({k: tensors()[k] for k in keys}, path / file)
    (path / "model.safetensors").unlink()
    index = {"weight_map": {k: file for file, keys in parts.items() for k in keys}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load(path).fingerprint == whole.fingerprint
    (path / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 shards.*got no b\.safetensors"):
        load(path)


def test_a_tied_embedding_is_one_tensor(checkpoint):
    weights = tensors()
    del weights["lm_head.weight"]
    model = load(checkpoint(config={**LLAMA, "tie_word_embeddings": True}, weights=weights))
    assert model.weights.unembed is model.weights.embed


def test_the_fingerprint_tells_models_and_dtypes_apart(checkpoint):
    first = load(checkpoint())
    assert load(checkpoint()).fingerprint == first.fingerprint
    assert kvzip.load(checkpoint(), dtype=torch.float16, device="cpu").fingerprint != first.fingerprint
    changed = tensors()
    changed["model.layers.1.mlp.down_proj.weight"] += 1
    assert load(checkpoint(weights=changed)).fingerprint != first.fingerprint


UP, Q_NORM = "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(UP), r"expected 21 tensors, got 20: 'layers\.1\.mlp\.up_proj\.weight' is missing"),
        (lambda w: w.update({Q_NORM: torch.ones(4)}), rf"does not read: '{Q_NORM}'"),
        (lambda w: w.update({"model.norm.weight": torch.ones(8)}), r"'model\.norm\.weight' of shape \[16\], got \[8\]"),
        (lambda w: w.update({"norm.weight": torch.ones(16)}), r"given once, got it twice: '(model\.)?norm\.weight'"),
    ],
)
def test_unknown_missing_and_misshapen_tensors_are_named(checkpoint, change, message):
    weights = tensors()
    change(weights)
    with pytest.raises(ValueError, match=message):
        load(checkpoint(weights=weights))


@pytest.mark.parametrize("keep", [0, 5, 100, 1500, -1])
def test_a_truncated_file_is_named(checkpoint, keep):
    path = checkpoint()
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"whole safetensors file, got model\.safetensors of .* truncated or damaged"):
        load(path)


def test_directories_that_are_no_checkpoints_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected config\.json in"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(FileNotFoundError, match=r"\*\.safetensors"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such directory"):
        load(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"aliases are small, llama3\.1-8b.*qwen2\.5-7b.*qwen3-8b.*gemma3-12b"):
        load("no-such-model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"an architecture of .*LlamaForCausalLM.*got \['GPT2LMHeadModel'\]"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type .* got 'dynamic'"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_type .* got 'longrope'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'factor'"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1]}}, "mrope_section"),
        ({"hidden_act": "relu"}, "hidden_act .* got 'relu'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "got 'chunked_attention'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_config_values_that_change_the_arithmetic_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        translate_config({**LLAMA, **change})


def test_both_spellings_of_config_mean_the_same():
    old = {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    new = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}}
    assert translate_config({**LLAMA, **old}) == translate_config({**LLAMA, **new})
    gemma = {"architectures": ["Gemma3ForCausalLM"], "num_hidden_layers": 6, "sliding_window": 8}
    old = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    new = {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    }
    assert translate_config({**gemma, **old}) == translate_config({**gemma, **new})


def test_absent_fields_take_the_defaults_of_their_class():
    from transformers import Gemma2Config, Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    for cls, name in (
        (LlamaConfig, "LlamaForCausalLM"),
        (MistralConfig, "MistralForCausalLM"),
        (Qwen2Config, "Qwen2ForCausalLM"),
        (Qwen3Config, "Qwen3ForCausalLM"),
        (Gemma2Config, "Gemma2ForCausalLM"),
        (Gemma3TextConfig, "Gemma3ForCausalLM"),
    ):
        bare, full = {"architectures": [name]}, {**cls().to_dict(), "architectures": [name]}
        assert translate_config(bare) == translate_config(full), name


def test_rope_and_max_length_are_the_callers_to_change(checkpoint):
    path = checkpoint(config={**LLAMA, "max_position_embeddings": 32, "rope_theta": 7.0})
    assert load(path).config.max_length == 32
    assert load(path, max_length=99).config.max_length == 99
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    config = load(path, rope=yarn).config
    assert config.max_length == 128
    assert (config.layers[0].rope.kind, config.layers[0].rope.theta) == ("yarn", 7.0)


MEASURE = """
import re, sys, torch, kvzip
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = peak()
model = kvzip.load(sys.argv[1], dtype=torch.bfloat16, device="cpu")
tensors = [model.weights.embed, model.weights.norm, model.weights.unembed]
tensors += [t for layer in model.weights.layers for t in vars(layer).values() if t is not None]
print(peak() - before - sum(t.nbytes for t in tensors))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_host_memory_holds_one_shard_beside_the_model(tmp_path):
    config = {**LLAMA, "vocab_size": 64, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4}
    config |= {"num_attention_heads": 16, "num_key_value_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors(config).items():
        shards.setdefault(name.split(".")[2] if "layers" in name else "rest", {})[name] = tensor
    for name, part in shards.items():
        save_file(part, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {k: f"{name}.safetensors" for name, part in shards.items() for k in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    largest = max(p.stat().st_size for p in tmp_path.glob("*.safetensors"))
    assert sum(p.stat().st_size for p in tmp_path.glob("*.safetensors")) > largest + 600e6  # or the bound would be idle
    out = subprocess.run([sys.executable, "-c", MEASURE, tmp_path], capture_output=True, text=True, check=True)
    assert int(out.stdout) <= largest + 500e6


def test_weights_are_read_in_any_stored_dtype(checkpoint):
    path = checkpoint()
    half = {k: v.half() for k, v in load_file(path / "model.safetensors").items()}
    model = load(checkpoint(weights=half))
    assert torch.equal(model.weights.embed, half["model.embed_tokens.weight"].float())
