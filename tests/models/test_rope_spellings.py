"""One RoPE fact in every spelling, family and kind: frequencies, logits and lengths as Transformers makes of it."""

import copy
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_against_transformers import AGREES, BROKEN, IDS, error, relative
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.gemma2.modeling_gemma2 import Gemma2RotaryEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

import kvzip
import random_model
import tiny_models
from kvzip.models import Model, ModelConfig, RopeSpec, translate_config
from kvzip.models.load import FAMILIES
from kvzip.models.rope import cos_sin, inverse_frequencies

MADE = {
    "llama": (tiny_models.llama, LlamaRotaryEmbedding),
    "mistral": (tiny_models.mistral, MistralRotaryEmbedding),
    "qwen2": (tiny_models.qwen2, Qwen2RotaryEmbedding),
    "qwen3": (tiny_models.qwen3, Qwen3RotaryEmbedding),
    "gemma2": (tiny_models.gemma2, Gemma2RotaryEmbedding),
    "gemma3_text": (tiny_models.gemma3, Gemma3RotaryEmbedding),
    "gemma3": (tiny_models.gemma3_multimodal, Gemma3RotaryEmbedding),
}
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {k: v for k, v in tiny_models.LLAMA3_SCALING.items() if k not in ("rope_type", "rope_theta")},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
}
SPELLINGS = ("rope_scaling", "flat", "nested")
BASES = ("inside", "beside", "both", "absent")
TYPES = (("rope_type",), ("type",), ("type", "rope_type"))
EXTRA = {"finetuned": True, "attn_factor": 3.0, "short_factor": [1.0]}  # which Transformers leaves unused
ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq")


@cache
def bare(family: str) -> str:
    """A config.json of the family without a word on RoPE, as text."""
    raw = MADE[family][0]().to_dict()
    for level in (raw, raw.get("text_config", {})):
        for key in ROPE_FIELDS:
            level.pop(key, None)
    return json.dumps({**raw, "architectures": [FAMILIES[family][2][0]]}, default=str)


def configured(family: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    raw = json.loads(bare(family))
    (raw["text_config"] if family == "gemma3" else raw).update(copy.deepcopy(dict(fields)))
    return raw


def spelled(kind: str, spelling: str, base: str, types: tuple[str, ...], extra: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of one spelling. A base beside is another than one inside, so that which one counts shows."""
    given = {**dict.fromkeys(types, kind), **KINDS[kind], **extra}
    given |= {"rope_theta": 500.0} if base in ("inside", "both") else {}
    beside = {"rope_theta": 70.0, "rope_local_base_freq": 30.0} if base in ("beside", "both") else {}
    if spelling == "rope_scaling":
        return {"rope_scaling": given, **beside}
    if spelling == "flat":
        return {"rope_parameters": given, **beside}
    narrow = {"rope_type": "default", **({"rope_theta": 20.0} if base in ("inside", "both") else {})}
    return {"rope_parameters": {"full_attention": given, "sliding_attention": narrow}, **beside}


def grid() -> Iterator[dict[str, Any]]:
    for kind, spelling, base, types in itertools.product(KINDS, SPELLINGS, BASES, TYPES):
        yield spelled(kind, spelling, base, types, {} if types == ("rope_type",) else EXTRA)


def theirs(family: str, raw: Mapping[str, Any]) -> PreTrainedConfig:
    """Transformers' config of a parsed config.json, the text part of it."""
    config = CONFIG_MAPPING[family].from_dict(copy.deepcopy(dict(raw)))
    return config.text_config if family == "gemma3" else config


def their_frequencies(family: str, config: PreTrainedConfig) -> dict[str, tuple[torch.Tensor, float]]:
    """Inverse frequencies and the factor of cos and sin, by layer type."""
    rotary: Any = MADE[family][1](config)
    if not hasattr(rotary, "layer_types"):
        return dict.fromkeys(("full_attention", "sliding_attention"), (rotary.inv_freq, rotary.attention_scaling))
    kinds = rotary.layer_types
    return {k: (getattr(rotary, f"{k}_inv_freq"), getattr(rotary, f"{k}_attention_scaling")) for k in kinds}


def assert_same_frequencies(family: str, ours: ModelConfig, config: PreTrainedConfig) -> None:
    expected = their_frequencies(family, config)
    for spec in ours.layers:
        inverse, factor = expected["full_attention" if spec.window is None else "sliding_attention"]
        got = inverse_frequencies(spec.rope, ours.head_dim, "cpu")
        apart = (got - inverse).abs() / inverse  # a few units of the last place: products in another order
        assert (apart <= 8 * torch.finfo(torch.float32).eps).all(), (spec.rope, got, inverse)
        assert spec.rope.attention_factor == factor


def reads_by_layer_type(family: str, fields: Mapping[str, Any]) -> bool:
    """Whether Transformers knows the layer types of a nested spelling but cannot build the model."""
    nested = "full_attention" in (fields.get("rope_parameters") or {}) and not fields.get("rope_scaling")
    return nested and family in ("qwen2", "qwen3", "gemma2")


@pytest.mark.parametrize("family", MADE)
def test_every_spelling_gives_the_frequencies_of_transformers(family: str) -> None:
    for fields in grid():
        raw = configured(family, fields)
        if reads_by_layer_type(family, fields):  # what the global layers' object says, which is flat elsewhere
            with pytest.raises(KeyError, match="rope_type"):
                their_frequencies(family, theirs(family, raw))
            ours = translate_config(raw)
            flat = fields | {"rope_parameters": fields["rope_parameters"]["full_attention"]}
            wide = next(spec.rope for spec in translate_config(configured(family, flat)).layers if spec.window is None)
            assert all(spec.rope == wide for spec in ours.layers if spec.window is None)
            continue
        assert_same_frequencies(family, translate_config(raw), theirs(family, raw))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Transformers' model and ours, of the same weights, for each family."""
    made: dict[str, tuple[PreTrainedModel, Model]] = {}

    def get(family: str) -> tuple[PreTrainedModel, Model]:
        if family not in made:
            path = tmp_path_factory.mktemp(family)
            reference = tiny_models.build(MADE[family][0]())
            reference.save_pretrained(path)
            made[family] = reference, kvzip.load(path, dtype=torch.float32, device="cpu")
        return made[family]

    return get


@torch.no_grad()
def logits_with(reference: PreTrainedModel, family: str, config: PreTrainedConfig) -> torch.Tensor:
    decoder: Any = reference.model.language_model if family == "gemma3" else reference.model
    decoder.rotary_emb = MADE[family][1](config)
    return reference(IDS, use_cache=False).logits


@pytest.mark.parametrize("family", MADE)
def test_every_spelling_gives_the_logits_of_transformers(family: str, pairs: Any) -> None:
    reference, model = pairs(family)
    seen = []
    for kind, spelling, base in itertools.product(KINDS, SPELLINGS, ("inside", "beside")):
        fields = spelled(kind, spelling, base, ("rope_type",), {})
        if reads_by_layer_type(family, fields):
            continue
        raw = configured(family, fields)
        expected = logits_with(reference, family, theirs(family, raw))
        assert error(replace(model, config=translate_config(raw)), expected) <= AGREES
        seen.append(expected)
    assert max(relative(seen[0], other) for other in seen) > BROKEN  # spellings do change the logits


@pytest.mark.parametrize("family", MADE)
def test_the_caller_s_rope_is_read_as_the_file_s(family: str) -> None:
    """Whatever the file says, its base stays unless the caller gives one."""
    for (kind, scaling), inside, types in itertools.product(KINDS.items(), (False, True), TYPES[:2]):
        rope = {**dict.fromkeys(types, kind), **scaling, **({"rope_theta": 7.0} if inside else {})}
        theta = 7.0 if inside else 500.0
        for own in ("rope_scaling", "rope_parameters"):
            full = {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}
            fields = {own: full}
            wanted: dict[str, Any] = {"rope_parameters": {"rope_type": kind, **scaling, "rope_theta": theta}}
            if "gemma3" in family:
                narrow = {"rope_type": "default", "rope_theta": 10_000.0}
                if own == "rope_parameters":
                    fields = {own: {"full_attention": full, "sliding_attention": narrow}}
                wanted = {"rope_parameters": {"full_attention": wanted["rope_parameters"], "sliding_attention": narrow}}
            config = FAMILIES[family][0](configured(family, fields), rope)
            assert_same_frequencies(family, config, theirs(family, configured(family, wanted)))


# ---- whatever a file says

NUMBERS = st.sampled_from([None, 1.0, 2.0, 4, 8.0])
PARAMETERS = st.fixed_dictionaries(
    {},
    optional={
        "rope_type": st.sampled_from(["default", "linear", "llama3", "yarn", None]),
        "type": st.sampled_from(["default", "linear", "llama3", "yarn"]),
        "rope_theta": st.sampled_from([None, 500.0, 10, 1e6]),
        "factor": NUMBERS,
        "low_freq_factor": st.sampled_from([1, 1.0, 0.5]),
        "high_freq_factor": st.sampled_from([4, 4.0, 8.0]),
        "original_max_position_embeddings": st.sampled_from([None, 16, 64]),
        "beta_fast": st.sampled_from([None, 0, 32, 4.0]),
        "beta_slow": st.sampled_from([None, 0, 1, 0.25]),
        "truncate": st.sampled_from([None, True, False]),
        "attention_factor": st.sampled_from([None, 0.7, 2.0]),
        "mscale": st.sampled_from([None, 0, 1.0, 0.7]),
        "mscale_all_dim": st.sampled_from([None, 0, 1.0, 0.3]),
        "partial_rotary_factor": st.sampled_from([None, 1.0, 1]),
        "finetuned": st.booleans(),
    },
)
BY_TYPE = st.fixed_dictionaries(
    {}, optional={"full_attention": st.none() | PARAMETERS, "sliding_attention": st.none() | PARAMETERS}
)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "rope_scaling": st.none() | PARAMETERS,
        "rope_parameters": st.none() | PARAMETERS | BY_TYPE,
        "rope_theta": st.sampled_from([None, 700.0, 9]),
        "rope_local_base_freq": st.sampled_from([None, 30.0, 9]),
        "original_max_position_embeddings": st.sampled_from([None, 16, 32]),
        "partial_rotary_factor": st.sampled_from([None, 1.0]),
    },
)


@pytest.mark.parametrize("family", MADE)
@settings(max_examples=50)
@given(fields=FIELDS)
@example(fields={"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": {"full_attention": {}}})
@example(fields={"rope_scaling": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16}})
@example(fields={"original_max_position_embeddings": 16, "rope_scaling": {**KINDS["yarn"], "type": "yarn"}})
@example(fields={"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 4.0, "truncate": False}}})
def test_what_transformers_can_read_means_the_same_here(family: str, fields: dict[str, Any]) -> None:
    raw = configured(family, fields)
    try:
        config = theirs(family, raw)
        expected = their_frequencies(family, config)
    except Exception:  # of many types, none meant for us: it may be read here, or refused by name
        expected = None
    try:
        ours = translate_config(raw)
    except ValueError as refused:
        assert "expected" in str(refused)
        assert expected is None, (str(refused), expected)
        return
    if expected is not None:
        assert_same_frequencies(family, ours, config)


# ---- what is not implemented, and what cannot be


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type .* got 'dynamic'"),
        ({"type": "longrope", "factor": 2.0}, "rope_type .* got 'longrope'"),
        ({"rope_type": 3}, "rope_type .* got 3"),
        ({"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, "partial_rotary_factor .* got '0.5'"),
        ({"rope_type": "default", "mrope_section": [16, 24, 24]}, "mrope_section"),
        ({"rope_type": "linear"}, "'factor'"),
        ({"rope_type": "linear", "factor": None}, "'factor'"),
        ({"rope_type": "yarn", "original_max_position_embeddings": 16}, "'factor'"),
        ({"rope_type": "llama3", "factor": 2.0, "high_freq_factor": 4.0}, "'low_freq_factor'"),
        ({"rope_type": "llama3", **KINDS["llama3"], "low_freq_factor": 4.0}, "low_freq_factor .* less than"),
        ({"rope_type": "yarn", **KINDS["yarn"], "beta_fast": 1, "beta_slow": 32}, "beta_slow .* less than beta_fast"),
        ({"rope_type": "yarn", **KINDS["yarn"], "rope_theta": 1}, "rope_theta .* above 1, got 1"),
        ({"rope_type": "yarn", **KINDS["yarn"], "mscale": 1.0, "mscale_all_dim": -10 / 1.3862943611198906}, "mscale"),
        *[
            ({"rope_type": "yarn", **KINDS["yarn"], key: bad}, key)
            for key in ("rope_theta", "factor", "beta_fast", "attention_factor", "original_max_position_embeddings")
            for bad in ("4", True, -1, float("nan"), float("inf"), [4], {}, 10**400)
        ],
        *[({"rope_type": "linear", "factor": bad}, "factor") for bad in (0, -2.0)],
        *[({"rope_theta": bad}, "rope_theta") for bad in (0, -1e4)],
    ],
)
def test_a_rope_that_is_not_understood_is_named_at_either_door(rope: Any, message: str, pairs: Any) -> None:
    _, model = pairs("llama")
    with pytest.raises(ValueError, match=message):
        kvzip.load(model.source, device="cpu", rope=rope)
    with pytest.raises(ValueError, match=message):
        translate_config(configured("llama", {"rope_scaling": rope}))


@pytest.mark.parametrize("bad", ["yarn", 4.0, ["yarn"], {1: 2}, True])
def test_a_rope_that_is_no_dict_is_named(bad: Any, pairs: Any) -> None:
    with pytest.raises(ValueError, match="rope to be None or a dict"):
        kvzip.load(pairs("llama")[1].source, device="cpu", rope=bad)


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("family", MADE)
def test_parameters_that_are_no_object_are_named(family: str, field: str) -> None:
    with pytest.raises(ValueError, match=field):
        translate_config(configured(family, {field: "linear"}))


# ---- the model's length

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("said", "scaling", "length"),
    [
        (32_768, None, 32_768),
        (32_768, YARN, 131_072),  # what the Qwen pages say to write
        (32_768, {**YARN, "type": "yarn"}, 131_072),
        (131_072, YARN, 131_072),  # already stretched, as Transformers 5 wants it
        (40_960, YARN, 131_072),  # Qwen3
        (32_768, {**YARN, "factor": None}, 32_768),
        (32_768, {"rope_type": "yarn", "factor": 4.0}, 32_768),  # nothing says which length this is
        (131_072, {**LLAMA3, "original_max_position_embeddings": 8192}, 131_072),
        (131_072, {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192}, 131_072),  # Llama 3.2
        (8192, {**LLAMA3, "original_max_position_embeddings": 8192}, 65_536),  # Llama 3 given Llama 3.1's
        (131_072, {"rope_type": "linear", "factor": 8.0}, 131_072),  # Gemma 3
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "gemma3"])
def test_scaling_stretches_the_length_once_by_either_door(
    family: str, said: int, scaling: dict[str, Any] | None, length: int
) -> None:
    rope = {"rope_type": "default"} if scaling is None else scaling
    raw = configured(family, {"max_position_embeddings": said, "rope_scaling": rope})
    assert translate_config(raw).max_length == length
    assert FAMILIES[family][0](configured(family, {"max_position_embeddings": said}), rope).max_length == length


def test_the_caller_s_length_counts_before_any_other(pairs: Any) -> None:
    source = pairs("llama")[1].source
    assert kvzip.load(source, device="cpu", rope=KINDS["yarn"] | {"type": "yarn"}).config.max_length == 64
    assert kvzip.load(source, device="cpu", rope={**YARN}).config.max_length == 131_072
    assert kvzip.load(source, device="cpu", rope={**YARN}, max_length=99).config.max_length == 99


@pytest.mark.parametrize("family", ["gemma3_text", "gemma3"])
def test_the_caller_may_name_layer_types(family: str) -> None:
    rope = {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}
    before = FAMILIES[family][0](configured(family, {}), None).layers
    for old, new in zip(before, FAMILIES[family][0](configured(family, {}), rope).layers, strict=True):
        assert new.rope == (old.rope if old.window is None else replace(old.rope, kind="linear", factor=2.0))


def test_an_original_length_beside_the_scaling_counts() -> None:
    fields = {
        "max_position_embeddings": 64,
        "original_max_position_embeddings": 32,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
    }
    config = translate_config(configured("llama", fields))
    assert config.max_length == 128 and config.layers[0].rope.original_length == 32


@pytest.mark.parametrize("bad", [0, -1, 1.5, "4096", True, float("nan"), 2**40, 10**400, [1]])
def test_a_length_that_cannot_be_is_named(bad: Any, pairs: Any) -> None:
    with pytest.raises(ValueError, match="max_length in load to be a whole number"):
        kvzip.load(pairs("llama")[1].source, device="cpu", max_length=bad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5,), (2, 3), (1, 1)])
@pytest.mark.parametrize("factor", [1.0, 1.25])
def test_tables_are_cos_and_sin_of_every_angle(factor: float, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Computed in float32 and rounded once more; both halves of a head alike."""
    rope = RopeSpec(theta=10_000.0, attention_factor=factor)
    positions = torch.arange(math.prod(shape), dtype=torch.int32).view(shape) * 9_999
    frequencies = inverse_frequencies(rope, 16, "cpu")
    angles = (positions[..., None].float() * frequencies).repeat(*[1] * len(shape), 2)
    for got, of in zip(cos_sin(rope, positions, frequencies, dtype), (torch.cos, torch.sin), strict=True):
        assert got.shape == (*shape, 16) and torch.equal(got, (of(angles) * factor).to(dtype))


def test_a_model_has_its_frequencies_before_its_first_pass() -> None:
    """A graph is captured without one: what a capture would make first is not there when another graph reads it."""
    config = random_model.config(windows=(6, None))
    made = random_model.make(config)
    ropes = {spec.rope for spec in config.layers}
    assert set(made.frequencies) == ropes
    for rope in ropes:
        assert torch.equal(made.frequencies[rope], inverse_frequencies(rope, config.head_dim, "cpu"))
