"""A config cannot lie: what ModelConfig refuses, and every size and window as Transformers reads it from any fields."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING

import kvzip
import random_model
import tiny_models
from kvzip.models import LayerSpec, RopeSpec, translate_config
from kvzip.models.load import FAMILIES

MADE: dict[str, Any] = {
    "llama": tiny_models.llama,
    "mistral": tiny_models.mistral,
    "qwen2": tiny_models.qwen2,
    "qwen3": tiny_models.qwen3,
    "gemma2": tiny_models.gemma2,
    "gemma3_text": tiny_models.gemma3,
    "gemma3": tiny_models.gemma3_multimodal,
}


def raw_of(family: str, **changes: Any) -> dict[str, Any]:
    raw = json.loads(MADE[family]().to_json_string(use_diff=False)) | {"architectures": [FAMILIES[family][2][0]]}
    (raw["text_config"] if family == "gemma3" else raw).update(changes)
    return raw


# ---- what ModelConfig refuses


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 6, "num_kv_heads": 4}, r"num_attention_heads .* multiple of num_key_value_heads, got 6 and 4"),
        ({"num_heads": 2, "num_kv_heads": 4}, "multiple of num_key_value_heads, got 2 and 4"),
        ({"head_dim": 7}, "head_dim in config.json to be even, got 7"),
        ({"layers": ()}, "num_hidden_layers .* from 1 to 10000, got 0"),
        ({"layers": ("layer",)}, "layers|LayerSpec"),
        *[
            ({name: bad}, key)
            for name, key in [
                ("vocab_size", "vocab_size"),
                ("hidden_size", "hidden_size"),
                ("intermediate_size", "intermediate_size"),
                ("num_heads", "num_attention_heads"),
                ("num_kv_heads", "num_key_value_heads"),
                ("head_dim", "head_dim"),
                ("max_length", "max_position_embeddings"),
            ]
            for bad in (0, -4, 2**31)
        ],
        *[
            ({name: bad}, key)
            for name, key in [
                ("norm_eps", "rms_norm_eps"),
                ("embed_scale", "embed_scale"),
                ("attn_scale", "attn_scale"),
                ("attn_softcap", "attn_logit_softcapping"),
                ("logit_softcap", "final_logit_softcapping"),
            ]
            for bad in (0.0, -1.0, float("nan"), float("inf"))
        ],
        ({"norm_offset": 2}, "norm_offset 0 or 1, got 2"),
        ({"warn_length": 0}, "warn_length"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        random_model.config(**changes)


@pytest.mark.parametrize("window", [0, -1, 2**31])
def test_a_window_that_cannot_be_is_refused(window: int) -> None:
    with pytest.raises(ValueError, match="sliding_window"):
        LayerSpec(window=window, rope=RopeSpec(theta=10.0))


def test_values_of_other_types_are_refused() -> None:
    """By ours or, with types checked as here, before it."""
    for name in ("vocab_size", "num_heads", "max_length", "norm_eps", "tied", "attn_softcap", "layers"):
        for bad in ("8", [8], object()):
            with pytest.raises((ValueError, TypeError)):
                random_model.config(**{name: bad})


# ---- what load refuses of config.json, by the key's name

INTEGERS = [
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings"),
]


@pytest.mark.parametrize("family", MADE)
def test_a_field_that_cannot_be_is_named(family: str) -> None:
    windowed = {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 7}
    if family == "llama":
        windowed = {}
    keys = INTEGERS + ["sliding_window"] * bool(windowed) + ["max_window_layers"] * ("qwen" in family)
    for key in keys:
        for bad in ("8", 8.5, 8.0, True, [8], {}, -8, 2**40, 10**5000):
            with pytest.raises(ValueError, match=rf"{key} in config\.json"):
                translate_config(raw_of(family, layer_types=None, **{**windowed, key: bad}))
        if key != "max_window_layers":
            with pytest.raises(ValueError, match=rf"{key} in config\.json"):
                translate_config(raw_of(family, layer_types=None, **{**windowed, key: 0}))
    for bad in ("1e-6", True, 0.0, -1e-6, float("nan"), [1e-6], 10**400):
        with pytest.raises(ValueError, match="rms_norm_eps"):
            translate_config(raw_of(family, rms_norm_eps=bad))
    for key in ("attention_bias",) * (family not in ("mistral", "qwen2")) + ("tie_word_embeddings",):
        for bad in ("false", 1, 0, [], 1.0):
            raw = raw_of(family, **{key: bad})
            (raw if key == "tie_word_embeddings" else {})[key] = bad  # the multimodal model's stands outside
            with pytest.raises(ValueError, match=rf"{key} in config\.json to be true or false"):
                translate_config(raw)
    for bad in (["full_attention"], "full_attention", {"0": "full_attention"}, [], [3] * 3, ["chunked_attention"] * 4):
        with pytest.raises(ValueError, match="layer_types"):
            translate_config(raw_of(family, layer_types=bad))
    for key, bad in (("quantization_config", {"bits": 4}), ("quantization_config", {})):
        with pytest.raises(ValueError, match="quantization_config"):
            translate_config(raw_of(family, **{key: bad}))
    for bad in ("relu", 3, ["silu"]):
        with pytest.raises(ValueError, match="hidden_act"):
            translate_config(raw_of(family, hidden_act=bad, hidden_activation=bad))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, r"architectures of config\.json, got None"),
        ({"architectures": []}, r"architectures of config\.json, got None"),
        ({"architectures": "GPT2LMHeadModel"}, r"architectures of config\.json, got \['GPT2LMHeadModel'\]"),
        ({"architectures": ["PhiForCausalLM"], "model_type": "llama"}, "architectures of config.json"),
        ({"architectures": [{"a": 1}]}, "architectures of config.json"),
        ({"model_type": "phi3"}, r"model_type in config\.json .* got 'phi3'"),
        ({"model_type": ["llama"]}, "model_type in config.json"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "mamba"}, r"model_type in config\.json .* got 'mamba'"),
        ({"model_type": "gemma3", "text_config": ["hidden_size"]}, "text_config in config.json to be an object"),
        ({"model_type": "gemma3", "text_config": {"quantization_config": {}}}, "quantization_config"),
        ({"model_type": "qwen2", "dual_chunk_attention_config": "yes"}, "dual_chunk_attention_config"),
        ({"model_type": "llama", "per_layer_config": {"0": {"head_dim": 4}}}, "per_layer_config"),
        (
            {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 16},
            "hidden_size in config.json of at least",
        ),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 0}, "sliding_window_pattern in config.json"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": "256"}, "query_pre_attn_scalar in config.json"),
        ({"model_type": "gemma2", "attn_logit_softcapping": 0}, "attn_logit_softcapping in config.json"),
        ({"model_type": "gemma2", "sliding_window": None}, "expected a sliding_window"),
        ({"model_type": "llama", "layer_types": ["sliding_attention"] * 32}, "layer_types in config.json"),
        ({"model_type": "mistral", "sliding_window": None, "layer_types": ["sliding_attention"] * 32}, "layer_types"),
    ],
)
def test_what_is_not_understood_is_named(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        translate_config(raw)


def test_six_query_heads_over_four_kv_heads_do_not_load(tmp_path: Path) -> None:
    tiny_models.build(tiny_models.llama()).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text()) | {"num_key_value_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="multiple of num_key_value_heads, got 6 and 4"):
        kvzip.load(tmp_path, device="cpu")


# ---- whatever a file says

TYPES = st.sampled_from(["full_attention", "sliding_attention", "attention"])
OPTIONAL: dict[str, st.SearchStrategy[Any]] = {
    "hidden_size": st.sampled_from([48, 96, None]),
    "intermediate_size": st.sampled_from([80, None]),
    "num_hidden_layers": st.sampled_from([3, 4, None]),
    "num_attention_heads": st.sampled_from([4, 6, None]),
    "num_key_value_heads": st.sampled_from([1, 2, None]),
    "head_dim": st.sampled_from([8, 12, None]),
    "vocab_size": st.sampled_from([97, None]),
    "max_position_embeddings": st.sampled_from([64, None]),
    "rms_norm_eps": st.sampled_from([1e-5, None]),
    "layer_types": st.none() | st.lists(TYPES, min_size=3, max_size=4),
    "sliding_window": st.sampled_from([7, None]),
    "use_sliding_window": st.sampled_from([True, False, None]),
    "max_window_layers": st.sampled_from([0, 1, 2, None]),
    "sliding_window_pattern": st.sampled_from([2, 3, None]),
    "_sliding_window_pattern": st.sampled_from([2]),
    "query_pre_attn_scalar": st.sampled_from([30, None]),
    "attn_logit_softcapping": st.sampled_from([2.0, None]),
    "final_logit_softcapping": st.sampled_from([4.0, None]),
    "tie_word_embeddings": st.sampled_from([True, False, None]),
    "attention_bias": st.sampled_from([True, False, None]),
    "hidden_act": st.sampled_from(["silu", "gelu_new", None]),
    "hidden_activation": st.sampled_from(["silu", "gelu_pytorch_tanh", None]),
    "dtype": st.sampled_from(["float16", None]),
    "torch_dtype": st.sampled_from(["bfloat16", None]),
    "unknown": st.sampled_from([3, None, [1]]),
}


def windows_of(family: str, config: Any) -> list[int | None]:
    """The window of each layer as the classes of Transformers take it from their config."""
    if family == "llama":
        return [None] * config.num_hidden_layers
    if family == "mistral":
        return [config.sliding_window] * config.num_hidden_layers
    assert "sliding_attention" not in config.layer_types or config.sliding_window is not None  # they refuse later
    return [config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types]


@pytest.mark.parametrize("family", MADE)
@settings(max_examples=60)
@given(fields=st.fixed_dictionaries({}, optional=OPTIONAL), outer=st.sampled_from([{}, {"tie_word_embeddings": False}]))
@example(fields={"num_key_value_heads": None, "num_attention_heads": 6, "hidden_size": 48}, outer={})
@example(
    fields={"layer_types": None, "sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1}, outer={}
)
@example(fields={}, outer={"tie_word_embeddings": None})
def test_sizes_and_windows_are_those_of_transformers(
    family: str, fields: dict[str, Any], outer: dict[str, Any]
) -> None:
    raw = {"model_type": family, **fields}
    if family == "gemma3":
        raw = {"model_type": family, "text_config": fields, **outer}
    try:
        whole = CONFIG_MAPPING[family].from_dict(copy.deepcopy(raw))
        theirs = whole.text_config if family == "gemma3" else whole
        windows = windows_of(family, theirs)
    except Exception:  # a null that Transformers refuses: here it is absent, or refused by name
        theirs = None
    try:
        ours = translate_config(raw)
    except ValueError as refused:
        if theirs is not None:  # it would build nonsense of these, or it ignores the field
            head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
            odd = head_dim % 2 or theirs.num_attention_heads % theirs.num_key_value_heads
            ignored = "layer_types" in str(refused) or "attn_logit_softcapping" in str(refused)
            assert odd or ignored, (str(refused), fields)
        return
    if theirs is None:
        return
    assert [spec.window for spec in ours.layers] == windows
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert (ours.vocab_size, ours.hidden_size, ours.intermediate_size, ours.max_length, ours.head_dim) == (
        theirs.vocab_size,
        theirs.hidden_size,
        theirs.intermediate_size,
        theirs.max_position_embeddings,
        head_dim,
    )
    assert (ours.num_heads, ours.num_kv_heads) == (theirs.num_attention_heads, theirs.num_key_value_heads)
    assert (ours.norm_eps, ours.tied) == (theirs.rms_norm_eps, bool(whole.tie_word_embeddings))
    acts = {"silu": "silu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
    assert ours.activation == acts[getattr(theirs, "hidden_activation" if "gemma" in family else "hidden_act")]
    scale = theirs.query_pre_attn_scalar if "gemma" in family else head_dim
    assert ours.attn_scale == pytest.approx(scale**-0.5)
    caps = ("attn_logit_softcapping", "final_logit_softcapping") if "gemma" in family else ()
    assert [ours.attn_softcap, ours.logit_softcap][: len(caps)] == [getattr(theirs, cap) for cap in caps]
    assert ours.o_bias == (family not in ("mistral", "qwen2") and theirs.attention_bias)


def test_the_older_name_of_a_layer_type_is_read() -> None:
    types = ["attention", "sliding_attention", "full_attention"]
    raw = raw_of("qwen2", layer_types=types, use_sliding_window=True, sliding_window=7)
    assert [spec.window for spec in translate_config(raw).layers] == [None, 7, None]


# ---- one line


def test_a_model_says_what_it_is_in_one_line() -> None:
    model = replace(random_model.make(random_model.config()), dtype=torch.bfloat16)
    assert repr(model) == "Model(random, 32,160 parameters, 2 layers, bfloat16 on cpu, from 'random')"
