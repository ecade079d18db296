"""Which layers of a quantized checkpoint are quantized, what its config may say of it, and inputs in 8 bits."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import quantized_files as files
import torch
from safetensors.torch import load_file, save_file
from test_quantized_checkpoints import STACKS, check_weights, load
from torch import Tensor

from kvzip import ops
from kvzip.models.quantization import read_quantization
from kvzip.ops import QuantizedWeight
from kvzip.ops.weights import expand

DOWN = tuple(f"layers.{n}.mlp.down_proj" for n in range(files.LAYERS))


def told(form: files.Format, **fields: Any) -> files.Format:
    """The format, whose config says more."""
    return replace(form, config={**form.config, **fields})


@pytest.mark.parametrize(
    ("name", "field", "names"),
    [
        ("float, channel", "ignore", ["lm_head", "re:.*down_proj"]),
        ("packed 4, group", "ignore", ["lm_head", *(f"model.{name}" for name in DOWN)]),
        ("fp8 block", "modules_to_not_convert", ["lm_head", *(f"model.{name}" for name in DOWN)]),
        ("fp8 block", "modules_to_not_convert", ["model.layers.0.mlp.gate", "model.norm", "down_proj"]),
        ("fp8 tensor", "ignored_layers", [f"model.{name}" for name in DOWN]),
        ("fbgemm", "modules_to_not_convert", [f"model.{name}" for name in DOWN]),
        ("awq", "modules_to_not_convert", ["down_proj", "visual"]),
    ],
)
def test_lists_of_layers_in_16_bits_are_believed_and_checked(
    name: str, field: str, names: list[str], tmp_path: Path
) -> None:
    form = told(files.FORMATS[name], **{field: names})
    form.config.update({} if field != "ignored_layers" else {"modules_to_not_convert": None})
    meant = files.write(tmp_path, form, plain=DOWN)
    model = load(tmp_path)
    assert all(
        isinstance(layer.down, Tensor) and isinstance(layer.o, QuantizedWeight) for layer in model.weights.layers
    )
    check_weights(model, meant)
    files.write(tmp_path, form)
    with pytest.raises(ValueError, match=r"down_proj\.\w+' of a floating type.*says that it is not quantized"):
        load(tmp_path)


def test_layers_of_one_model_in_several_forms(tmp_path: Path) -> None:
    """As compressed-tensors writes it: a group of layers each, with a format of its own."""
    packed, rows = files.FORMATS["packed 4, group, zeros"], files.FORMATS["int8, channel"]
    attention = {**rows.config["config_groups"]["group_0"], "targets": ["re:.*self_attn.*"], "format": "int-quantized"}
    both = {"group_0": {**packed.config["config_groups"]["group_0"], "format": "pack-quantized"}, "group_1": attention}
    form = told(packed, format="mixed-precision", config_groups=both)
    meant = files.write(tmp_path, form, others={"self_attn": rows})
    model = load(tmp_path)
    for layer in model.weights.layers:
        assert [getattr(layer, field).kind for field in STACKS] == ["int8", "int8", "int4", "int4"]
    check_weights(model, meant)


@pytest.mark.parametrize("name", ["fp8 block", "packed 4, group, zeros", "int8, channel", "awq", "gptq 4", "qserve"])
def test_a_tied_head_is_the_embedding(name: str, tmp_path: Path) -> None:
    form = files.FORMATS[name]
    meant = files.write(tmp_path, form, head="tied")
    model = load(tmp_path)
    assert model.weights.unembed is model.weights.embed and model.config.tied
    check_weights(model, meant)


@pytest.mark.parametrize("name", ["fp8 uneven block", "int8, channel", "packed 4, group, zeros", "awq", "gptq 8"])
def test_a_head_may_be_quantized_beside_an_embedding_in_16_bits(name: str, tmp_path: Path) -> None:
    form = files.FORMATS[name]
    listed = "ignore" if "ignore" in form.config else "modules_to_not_convert"
    meant = files.write(tmp_path, told(form, **{listed: []}), head="quantized")
    model = load(tmp_path)
    own = model.weights.unembed
    assert isinstance(own, QuantizedWeight) and not model.config.tied
    torch.testing.assert_close(expand(own, torch.float64), meant["lm_head.weight"], rtol=1e-15, atol=0)
    check_weights(model, meant)


def test_a_head_of_16_bits_may_be_rounded_beside_quantized_layers(tmp_path: Path) -> None:
    form = files.FORMATS["packed 4, group"]
    files.write(tmp_path, form)
    model = load(tmp_path, head_weights="int8")
    own, plain = model.weights.unembed, load(tmp_path).weights.unembed
    assert isinstance(own, QuantizedWeight) and isinstance(plain, Tensor) and isinstance(model.weights.embed, Tensor)
    assert torch.equal(expand(own, torch.float64), expand(ops.quantize_weight(plain, "int8"), torch.float64))
    files.write(tmp_path, told(form, ignore=[]), head="quantized")
    with pytest.raises(ValueError, match="a head of 16 bits to quantize, got one that is quantized"):
        load(tmp_path, head_weights="int8")


def test_an_embedding_in_codes_is_refused(tmp_path: Path) -> None:
    form = replace(files.FORMATS["int8, channel"])
    files.write(tmp_path, form)
    form.extra = {"model.embed_tokens.weight": torch.ones(files.VOCAB, files.HIDDEN, dtype=torch.int8)}
    files.write(tmp_path, form)
    with pytest.raises(ValueError, match=r"'model\.embed_tokens\.weight' of a floating type, got I8"):
        load(tmp_path)


METHODS = {
    "fp8": "fp8 block",
    "fbgemm_fp8": "fbgemm",
    "awq": "awq",
    "gptq": "gptq 4",
    "compressed-tensors": "packed 4, group",
}


@pytest.mark.parametrize("method", METHODS)
def test_a_field_that_is_not_known_is_named_unless_it_says_nothing(method: str) -> None:
    config = files.FORMATS[METHODS[method]].config
    for nothing in (None, False, [], {}):
        assert read_quantization({"quantization_config": {**config, "rotated": nothing}}) is not None
    for value in (True, 3, "hadamard", {"size": 4}):
        with pytest.raises(ValueError, match=rf"that kvzip knows of {method}, got rotated="):
            read_quantization({"quantization_config": {**config, "rotated": value}})


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_what_auto_round_adds_is_known(method: str) -> None:
    config = {
        **files.FORMATS[METHODS[method]].config,
        "provider": "auto-round",
        "autoround_version": "0.16.1",
        "iters": 200,
    }
    want = read_quantization({"quantization_config": files.FORMATS[METHODS[method]].config})
    assert read_quantization({"quantization_config": {**config, "data_type": "int"}}) == want
    for field, value in (("data_type", "mx_fp"), ("regex_config", {".*down.*": {"bits": 8}})):
        with pytest.raises(ValueError, match=field):
            read_quantization({"quantization_config": {**config, field: value}})


def test_early_spellings_of_compressed_tensors() -> None:
    config = files.FORMATS["int8, channel"].config
    want = read_quantization({"quantization_config": config})
    bare = {name: value for name, value in config.items() if name != "quant_method"}
    assert read_quantization({"compression_config": bare}) == want
    assert read_quantization({"compression_config": {"quantization_config": bare, "sparsity_config": {}}}) == want
    assert read_quantization({"quantization_config": None}) is None is read_quantization({})
    block = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": "128x64"}
    group = {"config_groups": {"a": {"targets": ["Linear"], "weights": block}}, "format": "float-quantized"}
    read = read_quantization({"compression_config": group})
    assert read is not None and (scheme := read.of("model.layers.0.mlp.up_proj")) is not None
    assert (scheme.rows, scheme.group) == (128, 64)
    sparse = {"quantization_config": bare, "sparsity_config": {"format": "sparse-24-bitmask"}}
    with pytest.raises(ValueError, match=r"sparsity_config\.format"):
        read_quantization({"compression_config": sparse})


# --- inputs in 8 bits, by each format's definition


def to_e4m3(x: Tensor) -> Tensor:
    """The nearest of the numbers that e4m3 has, ties to the even mantissa."""
    numbers = files.e4m3_value(torch.arange(127, dtype=torch.uint8)).double()  # 0 to 448, ascending
    size = x.abs().clamp(max=448)
    above = torch.searchsorted(numbers, size).clamp(1, 126)
    low, high = numbers[above - 1], numbers[above]
    up = (size - low > high - size) | ((size - low == high - size) & (above % 2 == 0))
    return torch.where(up, high, low) * x.sign()


def floats(scale: Tensor, x: Tensor) -> Tensor:
    return to_e4m3(x / torch.where(scale > 0, scale, 1)) * scale


def by_token(x: Tensor) -> Tensor:
    return floats(x.abs().amax(-1, keepdim=True) / 448, x)


def by_groups_of_16(x: Tensor) -> Tensor:
    return by_token(x.unflatten(-1, (-1, 16))).flatten(-2)


def integers(x: Tensor, half: float) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / half
    return (x / torch.where(scale > 0, scale, 1)).round().clamp(-128, 127) * scale


def between(x: Tensor) -> Tensor:
    """255 steps from the least to the largest, 0 among them."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / 255
    zero = (-128 - low / scale).round()
    return ((x / scale + zero).round().clamp(-128, 127) - zero) * scale


INPUTS: dict[str, tuple[files.Format, Callable[[Tensor], Tensor]]] = {
    "fp8 block": (files.FORMATS["fp8 block"], by_groups_of_16),
    "fp8 tensor": (files.FORMATS["fp8 tensor"], by_token),
    "fp8 tensor, static": (files.fp8(None, static=True), lambda x: floats(torch.tensor(0.03).double(), x)),
    "fbgemm": (files.FORMATS["fbgemm"], by_token),
    "fbgemm, bound": (
        told(files.fbgemm(), activation_scale_ub=0.7),
        lambda x: floats(x.abs().amax(-1, keepdim=True).clamp(max=0.7) / 448, x),
    ),
    "float, channel": (files.FORMATS["float, channel"], by_token),
    "float, tensor, static": (
        files.FORMATS["float, tensor, static"],
        lambda x: floats(torch.tensor(0.03).double(), x),
    ),
    "int8, channel": (files.FORMATS["int8, channel"], lambda x: integers(x, 127.5)),
    "int8, asymmetric inputs": (
        files.compressed(
            "int-quantized", 8, "int", "channel", inputs={**files.TOKEN, "type": "int", "symmetric": False}
        ),
        between,
    ),
    "qserve": (files.FORMATS["qserve"], lambda x: integers(x, 127.0)),
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_are_rounded_as_the_format_says(name: str, tmp_path: Path) -> None:
    """Layer by layer: an input that lies between two codes would come out of whole models on either side."""
    form, rounding = INPUTS[name]
    meant = files.write(tmp_path, form)
    model, plain = load(tmp_path, torch.float64, activations="checkpoint"), load(tmp_path, torch.float64)
    for n, (layer, whole) in enumerate(zip(model.weights.layers, plain.weights.layers, strict=True)):
        for field, names in STACKS.items():
            weight = torch.cat([meant[f"model.layers.{n}.{x}.weight"] for x in names])
            x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(n), dtype=torch.float64)
            want = rounding(x) @ weight.T
            torch.testing.assert_close(ops.linear(x, getattr(layer, field)), want, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(ops.linear(x, getattr(whole, field)), x @ weight.T, rtol=1e-12, atol=1e-12)
            assert (x @ weight.T - want).norm() > 1e-3 * want.norm()


@pytest.mark.parametrize("change", [{"num_bits": 4}, {"strategy": "channel"}, {"dynamic": "local"}, {"type": "int4"}])
def test_inputs_that_are_not_understood_are_refused_when_asked_for(change: dict[str, Any], tmp_path: Path) -> None:
    form = files.compressed("float-quantized", 8, "float", "channel", inputs={**files.TOKEN, **change})
    files.write(tmp_path, form)
    load(tmp_path)
    with pytest.raises(ValueError, match=r"input_activations of 8 bits.*load without activations"):
        load(tmp_path, activations="checkpoint")


def test_static_scales_that_are_missing_or_differ_are_named(tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.input_scale"
    form = files.fp8(None, static=True, scale="weight_scale")
    for changed, message in ((torch.tensor(0.05), r"q_proj\.input_scale to be one number"), (None, "input_scale")):
        files.write(tmp_path, form)
        path = tmp_path / "model.safetensors"
        stored = load_file(path)
        stored = {key: x for key, x in stored.items() if changed is not None or not key.endswith("input_scale")}
        save_file(stored | ({} if changed is None else {name: changed}), path)
        load(tmp_path)
        with pytest.raises(ValueError, match=message):
            load(tmp_path, activations="checkpoint")


@pytest.mark.parametrize("names", ["lm_head", {"lm_head": 1}, [1]])
def test_lists_that_are_none_are_refused(names: Any) -> None:
    config = {**files.FORMATS["fp8 block"].config, "modules_to_not_convert": names}
    with pytest.raises(ValueError, match=r"modules_to_not_convert in quantization_config of .* to be a list"):
        read_quantization({"quantization_config": config})
