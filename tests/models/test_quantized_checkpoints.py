"""Quantized checkpoints: what each format means, what is refused by name, memory, identity."""

import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import quantized_files as files
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import kvzip
from kvzip.cli.info import model_facts
from kvzip.models import forward, logits
from kvzip.models.weights import named_weights
from kvzip.ops import QuantizedWeight
from kvzip.ops.weights import expand

STACKS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


def load(path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> kvzip.Model:
    return kvzip.load(path, dtype=dtype, device="cpu", **options)


def check_weights(model: kvzip.Model, meant: dict[str, Tensor]) -> None:
    for n, layer in enumerate(model.weights.layers):
        for field, names in STACKS.items():
            own, want = getattr(layer, field), torch.cat([meant[f"model.layers.{n}.{x}.weight"] for x in names])
            if isinstance(own, QuantizedWeight):
                torch.testing.assert_close(expand(own, torch.float64), want, rtol=1e-15, atol=0)
            else:
                assert torch.equal(own.double(), want)
    assert torch.equal(model.weights.embed.double(), meant["model.embed_tokens.weight"])


@pytest.mark.parametrize("name", files.FORMATS)
def test_a_format_means_what_its_definition_says(name: str, tmp_path: Path) -> None:
    meant = files.write(tmp_path, files.FORMATS[name], shards=3 if name in ("awq", "fp8 block") else 1)
    model = load(tmp_path)
    assert all(isinstance(getattr(layer, field), QuantizedWeight) for layer in model.weights.layers for field in STACKS)
    check_weights(model, meant)


def test_layers_that_stay_in_16_bits(tmp_path: Path) -> None:
    plain = tuple(f"layers.1.{name}" for name in STACKS["qkv"] + STACKS["down"])
    meant = files.write(tmp_path, files.FORMATS["packed 4, group, zeros"], plain=plain)
    model = load(tmp_path)
    assert isinstance(model.weights.layers[1].down, Tensor) and isinstance(model.weights.layers[1].qkv, Tensor)
    check_weights(model, meant)


def test_a_product_of_layers_in_two_forms_is_refused(tmp_path: Path) -> None:
    files.write(tmp_path, files.FORMATS["awq"], plain=("layers.1.mlp.up_proj",))
    with pytest.raises(ValueError, match=r"quantized alike, got 'layers\.1\.mlp\.up_proj\.weight' in 16 bits"):
        load(tmp_path)


def test_zero_biases_and_scales_of_caches_are_left_out(tmp_path: Path) -> None:
    form = files.gptq(4, symmetric=True)
    form.extra = {
        "model.layers.0.mlp.up_proj.bias": torch.zeros(files.INNER),
        "model.layers.0.self_attn.k_scale": torch.ones(1),
    }
    meant = files.write(tmp_path, form)
    check_weights(load(tmp_path), meant)
    form.extra["model.layers.0.mlp.up_proj.bias"][3] = 1
    files.write(tmp_path, form)
    with pytest.raises(ValueError, match=r"does not read: 'model\.layers\.0\.mlp\.up_proj\.bias'"):
        load(tmp_path)


CHANGES: list[tuple[str, Callable[[dict], Any], str]] = [
    ("awq", lambda c: c.update(bits=3), "bits .* got '3'"),
    ("awq", lambda c: c.update(version="gemv"), "version .* got 'gemv'"),
    ("awq", lambda c: c.update(zero_point=False), "zero_point"),
    ("awq", lambda c: c.update(rotation="hadamard"), "rotation=hadamard"),
    ("awq", lambda c: c.update(quant_method="marlin"), r"quant_method .*got 'marlin'"),
    ("gptq 4", lambda c: c.update(checkpoint_format="marlin"), "checkpoint_format .* got 'marlin'"),
    ("gptq 4", lambda c: c.update(dynamic={"-:.*mlp.*": {}}), "dynamic"),
    ("gptq 4", lambda c: c.update(group_size=0), "group_size"),
    ("gptq 4", lambda c: c.update(sym=True), r"zero points of layers\.0\..*_proj to be 0 for symmetric"),
    ("fp8 block", lambda c: c.update(fmt="e5m2"), "fmt .* got 'e5m2'"),
    (
        "fp8 block",
        lambda c: c.update(weight_block_size=[32, 16]),
        r"weight_scale_inv .*shape \[\[2, 6\]\], got .*\[4, 6\]",
    ),
    ("fbgemm", lambda c: c.update(activation_scale_ub=-1), "activation_scale_ub"),
    ("float, channel", lambda c: c.update(format="nvfp4-pack-quantized"), "format .* got 'nvfp4"),
    ("float, channel", lambda c: c.update(sparsity_config={"format": "sparse-24"}), r"sparsity_config\.format"),
    ("float, channel", lambda c: c.update(transform_config={"config_groups": {"R1": {}}}), r"transform_config"),
    ("float, channel", lambda c: c["config_groups"]["group_0"].update(output_activations={}), "output_activations"),
    ("float, channel", lambda c: c["config_groups"]["group_0"]["weights"].update(num_bits=4), "float of 4 bits"),
    ("float, channel", lambda c: c["config_groups"]["group_0"]["weights"].update(block_scale=1), "block_scale"),
    ("float, channel", lambda c: c["config_groups"]["group_0"].update(targets=["re:.*mlp.*"]), "is not quantized"),
    ("float, channel", lambda c: c.update(ignore=["re:.*down_proj"]), r"down_proj\.weight' of a floating type"),
    ("packed 4, group", lambda c: c["config_groups"]["group_0"]["weights"].update(group_size=16), "weight_scale"),
    ("awq", lambda c: c.update(aaa=None, rotation="hadamard"), "rotation=hadamard"),
    ("float, channel", lambda c: c.update(ignore=["re:*foo"]), r"ignore .*regular expressions \(nothing to repeat"),
    (
        "float, channel",
        lambda c: c["config_groups"]["group_0"].update(targets=["re:("]),
        r"group_0\.targets .*expressions",
    ),
    ("float, channel", lambda c: c.update(format=["x"]), "format .* got .*x"),
    ("float, channel", lambda c: c["config_groups"]["group_0"].update(format={"a": 1}), "format .* got .*a"),
    ("float, channel", lambda c: c.update(sparsity_config="dense"), "sparsity_config .*an object or null, got 'dense'"),
    ("float, channel", lambda c: c.update(sparsity_config=["x"]), "sparsity_config .*an object or null"),
    ("float, channel", lambda c: c.update(transform_config=["x"]), "transform_config .*an object or null"),
]


@pytest.mark.parametrize(("name", "change", "message"), CHANGES)
def test_what_is_not_understood_is_named(name: str, change: Callable, message: str, tmp_path: Path) -> None:
    files.write(tmp_path, files.FORMATS[name])
    raw = json.loads((tmp_path / "config.json").read_text())
    change(raw["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    files.write(tmp_path, files.gptq(4, symmetric=True, shuffled=True))
    with pytest.raises(ValueError, match=r"_proj\.g_idx .* neighbouring inputs"):
        load(tmp_path)
    path, base = tmp_path / "model.safetensors", "model.layers.0.mlp.down_proj"
    files.write(tmp_path, files.FORMATS["fp8 tensor"])
    good = load_file(path)
    for change, message in (
        ({f"{base}.weight_scale_inv": None}, r"layers\.0\.mlp\.down_proj\.weight_scale"),
        ({f"{base}.weight_scale_inv": torch.tensor(torch.inf)}, "scales of layers"),
        ({f"{base}.weight": torch.full((64, 96), torch.nan).to(torch.float8_e4m3fn)}, "got NaN"),
        ({f"{base}.qzeros": torch.ones(1)}, r"down_proj\.qzeros"),
    ):
        save_file({key: x for key, x in {**good, **change}.items() if x is not None}, path)
        with pytest.raises(ValueError, match=message):
            load(tmp_path)
    save_file(good, path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"quantization_config": None}))
    with pytest.raises(ValueError, match=r"of a floating type, got F8_E4M3 .* says nothing of quantization"):
        load(tmp_path)


PART = "model.layers.0.mlp.down_proj."
ORDERED = files.compressed("pack-quantized", 4, "int", "group", group=32)
ORDERED.config["config_groups"]["group_0"]["weights"]["actorder"] = "group"
OF_TENSORS: list[tuple[files.Format, dict[str, Any], str]] = [
    (files.gptq(4, symmetric=False, shuffled=True), {"g_idx": None}, r"g_idx .*neighbouring inputs.*, got None"),
    (ORDERED, {}, r"weight_g_idx .*neighbouring inputs.*, got None"),
    (files.FORMATS["gptq 4"], {"g_idx": torch.arange(96) / 32}, "g_idx .*neighbouring inputs"),
    (files.FORMATS["int8, channel, zeros"], {"weight_zero_point": None}, "weight_zero_point .*not symmetric, got None"),
    *(
        (files.FORMATS["int8, channel, zeros"], {"weight_zero_point": zero}, r"weight_zero_point .*-128 to 127 .*64, 1")
        for zero in (
            torch.full((64, 1), 300, dtype=torch.int32),
            torch.full((64, 1), 200, dtype=torch.uint8),
            torch.full((64, 1), 0.5),
            torch.full((64, 1), torch.nan),
            torch.zeros(3, dtype=torch.int8),
        )
    ),
    *(
        (files.FORMATS["packed 4, group, zeros"], {"weight_zero_point": zero}, f"weight_zero_point .*{shape}")
        for zero, shape in (
            (torch.zeros(3, 64, dtype=torch.int8), r"-8 to 7 of shape \[64, 3\]"),
            (torch.full((64, 3), 100, dtype=torch.int8), r"-8 to 7 of shape \[64, 3\]"),
            (torch.zeros(3, 8, dtype=torch.int32), r"int32 \[8, 3\]"),
        )
    ),
    (
        files.FORMATS["fp8 block"],
        {"weight_scale": torch.ones(4, 6)},
        "weight_scale_inv to be absent beside weight_scale",
    ),
    (files.FORMATS["awq"], {"scales": torch.ones(3, 64).to(torch.float8_e4m3fn)}, r"scales.* got torch\.float8_e4m3fn"),
    (files.FORMATS["fp8 tensor"], {"weight_scale_inv": torch.ones(1).to(torch.float8_e5m2)}, "got torch.float8_e5m2"),
]


@pytest.mark.parametrize(("form", "change", "message"), OF_TENSORS)
def test_tensors_that_say_something_else_are_named(form: files.Format, change: dict, message: str, tmp_path: Path):
    files.write(tmp_path, form)
    path = tmp_path / "model.safetensors"
    stored = {**load_file(path), **{PART + suffix: x for suffix, x in change.items()}}
    save_file({name: x for name, x in stored.items() if x is not None}, path)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_zero_points_of_any_integers_are_read(dtype: torch.dtype, tmp_path: Path) -> None:
    meant = files.write(tmp_path, files.FORMATS["int8, channel, zeros"])
    path, name = tmp_path / "model.safetensors", PART + "weight_zero_point"
    stored = load_file(path)
    values = stored[name].abs().clamp(max=127)
    scale = stored[PART + "weight_scale"].double()
    codes = stored[PART + "weight"].double()
    save_file(stored | {name: values.to(dtype)}, path)
    check_weights(load(tmp_path), meant | {PART + "weight": (codes - values.double()) * scale})


def test_groups_without_an_order_are_of_neighbours(tmp_path: Path) -> None:
    """compressed-tensors stores -1 where it never set an order."""
    meant = files.write(tmp_path, files.FORMATS["packed 4, group"])
    path = tmp_path / "model.safetensors"
    stored = load_file(path)
    owners = {f"{name.removesuffix('packed')}g_idx": x for name, x in stored.items() if name.endswith("weight_packed")}
    save_file(stored | {name: torch.full((x.shape[1] * 8,), -1, dtype=torch.int32) for name, x in owners.items()}, path)
    check_weights(load(tmp_path), meant)


STATIC = files.compressed(
    "int-quantized", 8, "int", "channel",
    inputs={"num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor", "dynamic": False},
)  # fmt: skip


@pytest.mark.parametrize("value", [0.0, -0.5, torch.inf, torch.nan, [], [0.1, 0.1]])
def test_static_scales_of_inputs_are_one_finite_number_above_0(value: Any, tmp_path: Path) -> None:
    files.write(tmp_path, files.FORMATS["float, tensor, static"])
    path, name = tmp_path / "model.safetensors", "model.layers.1.self_attn.o_proj.input_scale"
    load(tmp_path, activations="checkpoint")
    save_file(load_file(path) | {name: torch.tensor(value)}, path)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.o_proj\.input_scale"):
        load(tmp_path, activations="checkpoint")


@pytest.mark.parametrize("value", [None, 300.0, 0.5, torch.nan])
def test_zero_points_of_inputs_are_stored_and_integers(value: float | None, tmp_path: Path) -> None:
    files.write(tmp_path, STATIC)
    path = tmp_path / "model.safetensors"
    stored = load_file(path)
    zeros = {name.replace("input_scale", "input_zero_point"): 5.0 for name in stored if name.endswith("input_scale")}

    def write(zeros: dict[str, float]) -> None:
        save_file(stored | {name: torch.tensor([zero]) for name, zero in zeros.items()}, path)

    write(zeros)
    load(tmp_path, activations="checkpoint")
    name = PART + "input_zero_point"
    write({key: x for key, x in zeros.items() if key != name} | ({} if value is None else {name: value}))
    with pytest.raises(ValueError, match=r"down_proj\.input_zero_point"):
        load(tmp_path, activations="checkpoint")


OF_INPUTS: list[tuple[str, Callable[[dict], Any]]] = [
    ("unknown", lambda x: x.update(rotation="hadamard")),
    ("not a truth", lambda x: x.update(symmetric="no")),
    ("no size", lambda x: x.update(strategy="group")),
    ("a wrong size", lambda x: x.update(strategy="group", group_size="x")),
    ("none of it", lambda x: x.update(strategy="group", group_size=-1)),
    ("not a checkpoint's", lambda x: (x.clear(), x.update(type="fp8"))),
]


@pytest.mark.parametrize("change", [change for _, change in OF_INPUTS], ids=[name for name, _ in OF_INPUTS])
def test_what_rounds_inputs_is_understood_or_named(change: Callable, tmp_path: Path) -> None:
    files.write(tmp_path, files.FORMATS["float, channel"])
    raw = json.loads((tmp_path / "config.json").read_text())
    change(raw["quantization_config"]["config_groups"]["group_0"]["input_activations"])
    (tmp_path / "config.json").write_text(json.dumps(raw))
    load(tmp_path)
    with pytest.raises(ValueError, match=r"expected input_activations of 8 bits.*load without activations"):
        load(tmp_path, activations="checkpoint")


def test_layers_of_one_input_round_it_alike(tmp_path: Path) -> None:
    files.write(tmp_path, files.FORMATS["float, channel"])
    raw = json.loads((tmp_path / "config.json").read_text())
    group = raw["quantization_config"]["config_groups"]["group_0"]
    other = {**group, "targets": ["re:.*gate_proj"], "input_activations": None}
    raw["quantization_config"]["config_groups"] = {"group_0": group, "group_1": other}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    load(tmp_path)
    with pytest.raises(ValueError, match=r"the inputs of layers\.0\.mlp\.gate_proj to be rounded as those"):
        load(tmp_path, activations="checkpoint")


@pytest.mark.parametrize(
    ("form", "change", "rounds"),
    [
        (files.compressed("pack-quantized", 4, "int", "group", group=40), {"group_size": 36}, False),
        (files.FORMATS["fp8 uneven block"], {"weight_block_size": [36, 36]}, False),
        (files.FORMATS["fbgemm"], {"activation_scale_ub": 0.1}, True),
        (files.FORMATS["int8, channel"], {"symmetric": False}, True),
        (files.FORMATS["int8, channel"], {"strategy": "group", "group_size": 16}, True),
    ],
)
def test_fingerprints_tell_what_only_the_config_says(form: files.Format, change: dict, rounds: bool, tmp_path: Path):
    files.write(tmp_path, form)
    how = {"activations": "checkpoint"} if rounds else {}
    first = load(tmp_path, **how)
    raw = json.loads((tmp_path / "config.json").read_text())
    place = raw["quantization_config"]
    if "config_groups" in place:
        place = place["config_groups"]["group_0"]["input_activations" if rounds else "weights"]
    place.update(change)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    second = load(tmp_path, **how)
    assert first.identity == second.identity and first.fingerprint != second.fingerprint


@pytest.mark.parametrize("name", ["fp8 block", "packed 4, group, zeros", "awq", "gptq 4, sym", "gptq 8", "qserve"])
def test_the_model_is_hardly_larger_than_its_file(name: str, tmp_path: Path) -> None:
    files.write(tmp_path, files.FORMATS[name])
    weights = [weight for _, weight in named_weights(load(tmp_path, torch.bfloat16).weights)]
    held = sum(x.nbytes for x in weights if isinstance(x, QuantizedWeight))
    stored = load_file(tmp_path / "model.safetensors")
    packed = sum(x.nbytes for key, x in stored.items() if "_proj" in key)
    assert held <= 1.05 * packed, (held, packed)


def nothing_left_out(form: files.Format) -> files.Format:
    """The form with no layers in its config's list of those in 16 bits."""
    config = json.loads(json.dumps(form.config))
    for place in (config, config.get("quantization_config", {})):
        place |= {key: [] for key in ("ignore", "modules_to_not_convert") if place.get(key)}
    return replace(form, config=config)


@pytest.mark.parametrize("name", files.FORMATS)
def test_info_says_what_the_weights_take(name: str, tmp_path: Path) -> None:
    """From headers alone: layers in 16 bits, short groups, zero points and QServe's directories too."""
    for plain, head in ((), "plain"), (("layers.1.self_attn.o_proj",), "plain"), ((), "quantized"):
        if head == "quantized" and name == "qserve":
            continue
        files.write(tmp_path, nothing_left_out(files.FORMATS[name]), plain=plain, head=head)
        facts = model_facts(str(tmp_path), 10**9)
        held = sum(weight.nbytes for _, weight in named_weights(load(tmp_path, torch.bfloat16).weights))
        assert abs(facts["weight_bytes"] - held) <= 0.05 * held
        assert list(facts["weight_bytes_by_form"]) == [facts["weights"]] and facts["weights"] != "bfloat16"
        assert bool(facts["head_weights_save"]) == (head == "plain")
    (tmp_path / "model.safetensors").unlink()
    assert model_facts(str(tmp_path), 10**9)["weight_bytes"] > 0.5 * held  # by the config alone


def test_a_tied_head_that_is_quantized_does_not_stand_for_the_embedding(tmp_path: Path) -> None:
    files.write(tmp_path, nothing_left_out(files.FORMATS["int8, channel"]), head="quantized")
    path = tmp_path / "model.safetensors"
    save_file({name: x for name, x in load_file(path).items() if "embed_tokens" not in name}, path)
    with pytest.raises(ValueError, match=r"'embed_tokens\.weight' is missing"):
        load(tmp_path)


def test_fingerprints_differ_by_form(tmp_path: Path) -> None:
    files.write(tmp_path, files.FORMATS["int8, channel"])
    one, rounded = load(tmp_path), load(tmp_path, activations="checkpoint")
    assert (one.identity, one.checkpoint) == (rounded.identity, rounded.checkpoint)
    assert one.fingerprint != rounded.fingerprint
    changed = load_file(tmp_path / "model.safetensors")
    changed["model.layers.1.mlp.down_proj.weight_scale"] *= 2
    save_file(changed, tmp_path / "model.safetensors")
    assert load(tmp_path).identity != one.identity
    files.write(tmp_path, files.FORMATS["gptq 4"])
    first = load(tmp_path).fingerprint
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert load(tmp_path).fingerprint != first


def run(model: kvzip.Model, ids: Tensor) -> Tensor:
    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return logits(model, forward(model, ids, torch.arange(ids.shape[1]), attend))


@pytest.mark.parametrize("name", ["fp8 block", "packed 4, group, zeros", "awq", "gptq 8", "qserve"])
def test_logits_are_those_of_the_weights_meant(name: str, tmp_path: Path) -> None:
    """Transformers runs the model that the checkpoint means, in float32 in norms and rotation whatever the dtype."""
    from transformers import LlamaConfig, LlamaForCausalLM

    meant = files.write(tmp_path, files.FORMATS[name])
    reference = LlamaForCausalLM(LlamaConfig(**files.CONFIG)).double().eval()
    reference.load_state_dict(meant)
    ids = torch.randint(0, files.VOCAB, (1, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = reference(ids).logits
        reference.model.layers[1].mlp.down_proj.weight *= 1.01
        changed = reference(ids).logits
    got = run(load(tmp_path, torch.float64), ids)
    assert (got - want).norm() <= 1e-5 * want.norm() < 1e-2 * (changed - want).norm()


ZIP = Path(__file__).parents[1] / "data" / "quantized.zip"
with zipfile.ZipFile(ZIP) as archive:
    MADE = sorted({name.split("/")[0] for name in archive.namelist()})


@pytest.mark.parametrize("name", MADE)
def test_files_of_makers_own_libraries(name: str, tmp_path: Path) -> None:
    """Written by compressed-tensors, autoawq and auto-gptq; logits are Transformers' (tests/data/make_quantized.py)."""
    with zipfile.ZipFile(ZIP) as archive:
        archive.extractall(tmp_path, [x for x in archive.namelist() if x.startswith(f"{name}/")])
    want = load_file(tmp_path / name / "logits.safetensors")
    ids = torch.randint(0, 12, (1, 8), generator=torch.Generator().manual_seed(1))
    spread = want["logits"].abs().max()
    error = (run(load(tmp_path / name), ids) - want["logits"]).abs().max() / spread
    assert error < 1e-5
    if "rounded_inputs" in want and not torch.equal(want["rounded_inputs"], want["logits"]):
        rounded = run(load(tmp_path / name, activations="checkpoint"), ids)
        without = (want["rounded_inputs"] - want["logits"]).abs().max() / spread
        error = (rounded - want["rounded_inputs"]).abs().max() / spread
        assert error < 1e-5 and without > 1e-3, "inputs are rounded as the library rounds them"
