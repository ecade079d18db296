"""Each family's logits against Transformers' on tiny random models, and one test per feature that breaks it.

Inputs are longer than the windows and the original RoPE lengths, so that every feature has something to do.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig

import kvzip
import tiny_models
from kvzip.models import LayerSpec, Model, ModelConfig, RopeSpec
from kvzip.models.weights import LayerWeights

AGREES = 1e-4  # worst error of correct logits, of the largest
BROKEN = 1e-2  # least error that a missing feature must cause

IDS = tiny_models.token_ids(2, tiny_models.LENGTH)
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 500.0}
GEMMA_TWO_BASES = {
    "full_attention": {"rope_type": "default", "rope_theta": 5000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}


@dataclass(frozen=True)
class Case:
    """A Transformers config, and what `kvzip.load` is told besides the directory."""

    config: PreTrainedConfig
    options: Mapping[str, Any] = field(default_factory=dict)


CASES = {
    "llama": Case(tiny_models.llama()),
    "llama-tied": Case(tiny_models.llama(tie_word_embeddings=True)),
    "llama-bias": Case(tiny_models.llama(attention_bias=True)),
    "llama-head_dim": Case(tiny_models.llama(head_dim=12)),
    "llama-llama3": Case(tiny_models.llama(rope_parameters=tiny_models.LLAMA3_SCALING)),
    "llama-linear": Case(tiny_models.llama(rope_parameters=tiny_models.LINEAR_SCALING)),
    "llama-yarn": Case(tiny_models.llama(rope_parameters=tiny_models.YARN_SCALING)),
    "llama-yarn-all-fields": Case(
        tiny_models.llama(
            head_dim=16,
            rope_parameters={
                **tiny_models.YARN_SCALING,
                "original_max_position_embeddings": 32,
                "beta_fast": 2.0,
                "beta_slow": 0.25,
                "mscale": 0.8,
                "mscale_all_dim": 0.4,
                "truncate": False,
            },
        )
    ),
    "qwen2": Case(tiny_models.qwen2(tie_word_embeddings=False)),
    "qwen2-tied": Case(tiny_models.qwen2(tie_word_embeddings=True)),
    "qwen2-window": Case(
        tiny_models.qwen2(use_sliding_window=True, sliding_window=tiny_models.WINDOW, max_window_layers=1)
    ),
    "qwen3": Case(tiny_models.qwen3()),
    "qwen3-tied": Case(tiny_models.qwen3(tie_word_embeddings=True)),
    "qwen3-bias": Case(tiny_models.qwen3(attention_bias=True)),
    "qwen3-yarn": Case(tiny_models.qwen3(rope_parameters=tiny_models.YARN_SCALING)),
    "gemma2": Case(tiny_models.gemma2()),
    "gemma2-untied": Case(tiny_models.gemma2(tie_word_embeddings=False)),
    "gemma3": Case(tiny_models.gemma3()),
    "gemma3-unscaled": Case(tiny_models.gemma3(rope_parameters=GEMMA_TWO_BASES)),
    "gemma3-softcapped-logits": Case(tiny_models.gemma3(final_logit_softcapping=4.0)),
    "gemma3-multimodal": Case(tiny_models.gemma3_multimodal()),
    "mistral": Case(tiny_models.mistral()),
}

Saved = tuple[Path, Tensor]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    """A case's directory as Transformers writes it, and the logits [B T V] of IDS; each is made once."""
    made: dict[str, Saved] = {}

    def get(name: str) -> Saved:
        if name not in made:
            reference = tiny_models.build(CASES[name].config)
            path = tmp_path_factory.mktemp(name)
            reference.save_pretrained(path)
            with torch.no_grad():
                made[name] = path, reference(IDS, use_cache=False).logits
        return made[name]

    return get


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_transformers(name: str, saved: Callable[[str], Saved]) -> None:
    path, expected = saved(name)
    assert error(load(path, **CASES[name].options), expected) <= AGREES


@pytest.mark.parametrize("name", CASES)
def test_rows_of_a_batch_do_not_mix_and_order_matters(name: str, saved: Callable[[str], Saved]) -> None:
    """Guards the oracle: equal logits prove nothing if they hardly depend on the input."""
    expected = saved(name)[1]
    assert relative(expected[0], expected[1]) > 0.1
    with torch.no_grad():
        swapped = IDS.clone()
        swapped[:, [-3, -2]] = swapped[:, [-2, -3]]
        changed = tiny_models.build(CASES[name].config)(swapped, use_cache=False).logits
    assert relative(changed[:, -1], expected[:, -1]) > BROKEN


# ---- RoPE given to load


YARN_GIVEN = {key: value for key, value in tiny_models.YARN_SCALING.items() if key != "rope_theta"}


@pytest.mark.parametrize("make", [tiny_models.qwen3, tiny_models.qwen2, tiny_models.llama])
@pytest.mark.parametrize("spelling", [4, 5])
def test_rope_given_to_load_replaces_the_scaling_and_keeps_the_base(
    make: Callable[..., PreTrainedConfig], spelling: int, tmp_path: Path
) -> None:
    reference = tiny_models.build(make(rope_parameters=tiny_models.YARN_SCALING))
    reference.save_pretrained(tmp_path)
    with edited_config(tmp_path) as raw:
        raw["rope_parameters"] = dict(DEFAULT_ROPE)
        if spelling == 4:
            spell_as_transformers_4(raw)
    with torch.no_grad():
        expected = reference(IDS, use_cache=False).logits
    assert error(load(tmp_path, rope=YARN_GIVEN), expected) <= AGREES
    assert error(load(tmp_path), expected) > BROKEN


def test_rope_given_to_load_reaches_only_the_global_layers_of_gemma3(tmp_path: Path) -> None:
    reference = tiny_models.build(tiny_models.gemma3())
    reference.save_pretrained(tmp_path)
    with edited_config(tmp_path) as raw:
        raw["rope_parameters"] = GEMMA_TWO_BASES
    with torch.no_grad():
        expected = reference(IDS, use_cache=False).logits
    assert error(load(tmp_path, rope={"rope_type": "linear", "factor": 8.0}), expected) <= AGREES
    assert error(load(tmp_path), expected) > BROKEN


def test_rope_given_with_a_base_replaces_the_base_too(tmp_path: Path) -> None:
    reference = tiny_models.build(tiny_models.llama(rope_parameters=tiny_models.LLAMA3_SCALING))
    reference.save_pretrained(tmp_path)
    with edited_config(tmp_path) as raw:
        raw["rope_parameters"] = {"rope_type": "linear", "rope_theta": 7.0, "factor": 2.0}
    with torch.no_grad():
        expected = reference(IDS, use_cache=False).logits
    assert error(load(tmp_path, rope=tiny_models.LLAMA3_SCALING), expected) <= AGREES


def test_max_length_given_to_load_changes_the_limit_and_not_the_logits(saved: Callable[[str], Saved]) -> None:
    path, expected = saved("llama-llama3")
    model = load(path, max_length=5000)
    assert model.config.max_length == 5000
    assert error(model, expected) <= AGREES


# ---- both spellings of config.json, absent fields, names of tensors


@pytest.mark.parametrize("name", [name for name in CASES if name != "gemma3-multimodal"])
def test_the_older_spelling_of_a_config_means_the_same(
    name: str, saved: Callable[[str], Saved], tmp_path: Path
) -> None:
    path, expected = saved(name)
    copy(path, tmp_path)
    with edited_config(tmp_path) as raw:
        spell_as_transformers_4(raw)
    assert load(tmp_path).config == load(path).config
    assert error(load(tmp_path), expected) <= AGREES


def test_the_older_spelling_of_a_multimodal_config_means_the_same(
    saved: Callable[[str], Saved], tmp_path: Path
) -> None:
    path, _ = saved("gemma3-multimodal")
    copy(path, tmp_path)
    with edited_config(tmp_path) as raw:
        spell_as_transformers_4(raw["text_config"])
    assert load(tmp_path).config == load(path).config


@pytest.mark.parametrize(
    ("make", "architecture"),
    [
        (tiny_models.llama, "LlamaForCausalLM"),
        (tiny_models.mistral, "MistralForCausalLM"),
        (tiny_models.qwen2, "Qwen2ForCausalLM"),
        (tiny_models.qwen3, "Qwen3ForCausalLM"),
        (tiny_models.gemma2, "Gemma2ForCausalLM"),
        (tiny_models.gemma3, "Gemma3ForCausalLM"),
    ],
)
def test_an_absent_field_has_the_default_of_its_class(make: Callable[..., PreTrainedConfig], architecture: str) -> None:
    """A config with no fields at all, in the reading of Transformers and in ours."""
    theirs = type(make())()
    bare = {"architectures": [architecture], "model_type": theirs.model_type}
    full = {**json.loads(theirs.to_json_string(use_diff=False)), "architectures": [architecture]}
    ours = kvzip.models.translate_config(bare)
    assert ours == kvzip.models.translate_config(full)
    assert (ours.hidden_size, ours.intermediate_size, ours.vocab_size, ours.num_heads, ours.num_kv_heads) == (
        theirs.hidden_size,
        theirs.intermediate_size,
        theirs.vocab_size,
        theirs.num_attention_heads,
        theirs.num_key_value_heads,
    )
    assert (len(ours.layers), ours.max_length, ours.norm_eps, ours.tied) == (
        theirs.num_hidden_layers,
        theirs.max_position_embeddings,
        theirs.rms_norm_eps,
        theirs.tie_word_embeddings,
    )


def test_vision_tensors_are_in_the_multimodal_file_and_are_skipped(saved: Callable[[str], Saved]) -> None:
    path, _ = saved("gemma3-multimodal")
    with safe_open(path / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
    assert any("vision_tower" in name for name in names) and any("multi_modal_projector" in name for name in names)


@pytest.mark.parametrize(
    ("text", "rest"), [("model.language_model.", "model."), ("language_model.model.", "")], ids=["new", "hub"]
)
def test_multimodal_tensors_are_found_under_either_naming(
    text: str, rest: str, saved: Callable[[str], Saved], tmp_path: Path
) -> None:
    path, expected = saved("gemma3-multimodal")
    copy(path, tmp_path)
    renamed = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        for old in ("model.language_model.", "language_model.model."):
            name = name.replace(old, "TEXT.")
        name = name.removeprefix("model.")
        renamed[name.replace("TEXT.", text) if name.startswith("TEXT.") else rest + name] = tensor
    save_file(renamed, tmp_path / "model.safetensors")
    assert error(load(tmp_path), expected) <= AGREES


def test_a_model_without_tokenizer_files_loads_without_a_tokenizer(saved: Callable[[str], Saved]) -> None:
    assert load(saved("llama")[0]).tokenizer is None


# ---- one test per feature that breaks it

Break = Callable[[Model], Model]


def configured(**changes: Any) -> Break:
    return lambda model: replace(model, config=replace(model.config, **changes))


def layered(change: Callable[[LayerSpec], LayerSpec]) -> Break:
    return lambda model: configured(layers=tuple(change(spec) for spec in model.config.layers))(model)


def roped(change: Callable[[RopeSpec], RopeSpec]) -> Break:
    return layered(lambda spec: replace(spec, rope=change(spec.rope)))


def weighted(change: Callable[[LayerWeights], LayerWeights]) -> Break:
    def apply(model: Model) -> Model:
        layers = tuple(change(layer) for layer in model.weights.layers)
        return replace(model, weights=replace(model.weights, layers=layers))

    return apply


def untied(model: Model) -> Model:
    shuffled = model.weights.embed.roll(1, dims=0)
    return replace(model, weights=replace(model.weights, unembed=shuffled))


def tied(model: Model) -> Model:
    return replace(model, weights=replace(model.weights, unembed=model.weights.embed))


def without_final_norm_weight(model: Model) -> Model:
    neutral = torch.full_like(model.weights.norm, 1.0 - model.config.norm_offset)
    return replace(model, weights=replace(model.weights, norm=neutral))


def swapped_bases(model: Model) -> Model:
    first, second = dict.fromkeys(spec.rope.theta for spec in model.config.layers)
    other = {first: second, second: first}
    return roped(lambda rope: replace(rope, theta=other[rope.theta]))(model)


def scaled_in_window_layers(model: Model) -> Model:
    (wide,) = {spec.rope for spec in model.config.layers if spec.window is None}
    return layered(
        lambda s: s if s.window is None else replace(s, rope=replace(s.rope, kind=wide.kind, factor=wide.factor))
    )(model)


def shifted_layers(model: Model) -> Model:
    layers = model.config.layers
    return configured(layers=(*layers[1:], layers[0]))(model)


def rolled(name: str) -> Break:
    """The biases or norm weights of a neighbour: a field that is read, but into the wrong place."""
    return weighted(lambda layer: replace(layer, **{name: getattr(layer, name).roll(1, dims=0)}))


no_window = layered(lambda spec: replace(spec, window=None))
wider_window = layered(lambda spec: replace(spec, window=spec.window and spec.window + 1))
other_base = roped(lambda rope: replace(rope, theta=rope.theta * 10))
no_scaling = roped(lambda rope: RopeSpec(theta=rope.theta))
no_qk_norm = weighted(lambda layer: replace(layer, q_norm=None, k_norm=None))
no_qkv_bias = weighted(lambda layer: replace(layer, qkv_bias=None))
no_o_bias = weighted(lambda layer: replace(layer, o_bias=None))
no_post_norms = weighted(lambda layer: replace(layer, attn_post_norm=None, mlp_post_norm=None))


def scale_of_head_dim(model: Model) -> Model:
    return configured(attn_scale=model.config.head_dim**-0.5)(model)


def scale_of_hidden_over_heads(model: Model) -> Model:
    return configured(attn_scale=(model.config.hidden_size / model.config.num_heads) ** -0.5)(model)


BREAKS: list[tuple[str, str, Break]] = [
    ("llama", "RoPE base", other_base),
    ("llama", "untied embedding", tied),
    ("llama", "activation", configured(activation="gelu_tanh")),
    ("llama", "final norm weight", without_final_norm_weight),
    ("llama", "norm offset", configured(norm_offset=1)),
    ("llama", "embedding scale", configured(embed_scale=48**0.5)),
    ("llama", "norm epsilon", configured(norm_eps=0.3)),
    ("llama", "attention norm weight", rolled("attn_norm")),
    ("llama", "MLP norm weight", rolled("mlp_norm")),
    ("llama-tied", "tied embedding", untied),
    ("llama-bias", "bias on q, k, v", no_qkv_bias),
    ("llama-bias", "order of the biases", rolled("qkv_bias")),
    ("llama-bias", "bias on o", no_o_bias),
    ("llama-head_dim", "scale of head_dim", scale_of_hidden_over_heads),
    ("llama-llama3", "RoPE scaling", no_scaling),
    ("llama-llama3", "kind of scaling", roped(lambda rope: replace(rope, kind="linear"))),
    ("llama-llama3", "low frequency factor", roped(lambda rope: replace(rope, low_freq_factor=0.3))),
    ("llama-llama3", "high frequency factor", roped(lambda rope: replace(rope, high_freq_factor=8.0))),
    ("llama-llama3", "original length", roped(lambda rope: replace(rope, original_length=64))),
    ("llama-linear", "RoPE scaling", no_scaling),
    ("llama-yarn", "RoPE scaling", no_scaling),
    ("llama-yarn", "attention factor", roped(lambda rope: replace(rope, attention_factor=1.0))),
    ("llama-yarn", "original length", roped(lambda rope: replace(rope, original_length=64))),
    ("llama-yarn-all-fields", "beta_fast, beta_slow", roped(lambda rope: replace(rope, beta_fast=32.0, beta_slow=1.0))),
    ("llama-yarn-all-fields", "truncate", roped(lambda rope: replace(rope, truncate=True))),
    ("llama-yarn-all-fields", "mscale", roped(lambda rope: replace(rope, attention_factor=1.0))),
    ("qwen2", "bias on q, k, v", no_qkv_bias),
    ("qwen2", "untied embedding", tied),
    ("qwen2-tied", "tied embedding", untied),
    ("qwen2-window", "window", no_window),
    ("qwen2-window", "first layer with a window", layered(lambda spec: replace(spec, window=tiny_models.WINDOW))),
    ("qwen3", "qk-norm", no_qk_norm),
    ("qwen3", "q-norm weight", rolled("q_norm")),
    ("qwen3", "k-norm weight", rolled("k_norm")),
    ("qwen3", "scale of head_dim", scale_of_hidden_over_heads),
    ("qwen3-bias", "bias on q, k, v", no_qkv_bias),
    ("qwen3-yarn", "RoPE scaling", no_scaling),
    ("qwen3-yarn", "attention factor", roped(lambda rope: replace(rope, attention_factor=1.0))),
    ("gemma2", "window", no_window),
    ("gemma2", "window by one", wider_window),
    ("gemma2", "which layers have it", shifted_layers),
    ("gemma2", "softcap of attention", configured(attn_softcap=None)),
    ("gemma2", "softcap of logits", configured(logit_softcap=None)),
    ("gemma2", "post norms", no_post_norms),
    ("gemma2", "post norm of attention", rolled("attn_post_norm")),
    ("gemma2", "post norm of MLP", rolled("mlp_post_norm")),
    ("gemma2", "norm offset", configured(norm_offset=0)),
    ("gemma2", "embedding scale", configured(embed_scale=1.0)),
    ("gemma2", "scale of query_pre_attn_scalar", scale_of_head_dim),
    ("gemma2", "activation", configured(activation="silu")),
    ("gemma2-untied", "untied embedding", tied),
    ("gemma3", "window", no_window),
    ("gemma3", "window by one", wider_window),
    ("gemma3", "which layers are global", shifted_layers),
    ("gemma3", "two RoPE bases", swapped_bases),
    ("gemma3", "RoPE scaling", no_scaling),
    ("gemma3", "scaling on global layers only", scaled_in_window_layers),
    ("gemma3", "qk-norm", no_qk_norm),
    ("gemma3", "post norms", no_post_norms),
    ("gemma3", "norm offset", configured(norm_offset=0)),
    ("gemma3", "embedding scale", configured(embed_scale=1.0)),
    ("gemma3", "scale of query_pre_attn_scalar", scale_of_head_dim),
    ("gemma3", "activation", configured(activation="silu")),
    ("gemma3", "tied embedding", untied),
    ("gemma3-softcapped-logits", "softcap of logits", configured(logit_softcap=None)),
    ("gemma3-multimodal", "window", no_window),
    ("gemma3-multimodal", "RoPE scaling", no_scaling),
    ("gemma3-multimodal", "scale of query_pre_attn_scalar", scale_of_head_dim),
    ("mistral", "no window where none is set", layered(lambda spec: replace(spec, window=tiny_models.WINDOW))),
]


@pytest.mark.parametrize(("name", "breaks"), [(n, b) for n, _, b in BREAKS], ids=[f"{n}: {f}" for n, f, _ in BREAKS])
def test_a_model_without_this_feature_is_far_off(name: str, breaks: Break, saved: Callable[[str], Saved]) -> None:
    path, expected = saved(name)
    model = load(path, **CASES[name].options)
    assert error(model, expected) <= AGREES
    assert error(breaks(model), expected) > BROKEN


def test_the_windows_of_mistral_are_those_of_transformers_and_load_refuses_a_model_of_them_alone(
    tmp_path: Path,
) -> None:
    reference = tiny_models.build(tiny_models.mistral(sliding_window=tiny_models.WINDOW))
    reference.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = reference(IDS, use_cache=False).logits
    with edited_config(tmp_path) as raw:
        windows = kvzip.models.translate_config(raw).layers
        with pytest.raises(ValueError, match=r"layer without a window, got sliding_window 7 in all 3 .*config\.json"):
            load(tmp_path)
        raw["sliding_window"] = None
    model = configured(layers=windows)(load(tmp_path))
    assert error(model, expected) <= AGREES
    assert error(no_window(model), expected) > BROKEN and error(wider_window(model), expected) > BROKEN


# ---- helpers


def load(path: Path, **options: Any) -> Model:
    return kvzip.load(path, dtype=torch.float32, device="cpu", **options)


@torch.no_grad()
def error(model: Model, expected: Tensor) -> float:
    """Returns the worst error of the model's logits of IDS, of the largest expected one."""
    hidden = kvzip.models.forward(model, IDS, torch.arange(IDS.shape[1]), dense_attend(model.config))
    return relative(kvzip.models.logits(model, hidden), expected)


def relative(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def dense_attend(config: ModelConfig) -> Callable[[int, Tensor, Tensor, Tensor], Tensor]:
    """Returns attention over everything at once, with a mask: no cache, no chunks."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores = q @ k.mT * config.attn_scale
        if config.attn_softcap is not None:
            scores = config.attn_softcap * torch.tanh(scores / config.attn_softcap)
        index = torch.arange(q.shape[2])
        distance = index[:, None] - index
        window = config.layers[layer].window
        seen = (distance >= 0) & (distance < (window or len(index)))
        return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v

    return attend


@contextmanager
def edited_config(directory: Path) -> Iterator[dict[str, Any]]:
    """Yields the parsed config.json of a directory and writes it back."""
    path = directory / "config.json"
    raw = json.loads(path.read_text())
    yield raw
    path.write_text(json.dumps(raw))


def spell_as_transformers_4(raw: dict[str, Any]) -> None:
    """Rewrites RoPE, layer types and dtype of a config in place, as the checkpoints on the hub have them."""
    rope = raw.pop("rope_parameters")
    if "sliding_attention" in rope:
        raw["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    rope = dict(rope)
    raw["rope_theta"] = rope.pop("rope_theta")
    raw["rope_scaling"] = None if rope.get("rope_type") in (None, "default") else rope
    raw["torch_dtype"] = raw.pop("dtype", "float32")


def copy(source: Path, target: Path) -> None:
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
