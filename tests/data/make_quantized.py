"""Makes tests/data/quantized.zip: tiny checkpoints that makers' own libraries wrote, and Transformers' logits of each.

    python tests/data/make_quantized.py

It needs compressed-tensors 0.20, and the packages autoawq 0.2.9 and auto-gptq 0.7.1 unpacked (pip install --no-deps):
of these two only the layers are imported, as the packages themselves no longer fit today's Transformers. Logits are in
float32: `logits` with weights rounded, `rounded_inputs` with inputs rounded too, where the format says so.
"""

import copy
import importlib
import importlib.util
import json
import sys
import tempfile
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

OUT = Path(__file__).with_name("quantized.zip")
SIZES: dict[str, Any] = {
    "vocab_size": 12,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
IDS = torch.randint(0, 12, (1, 8), generator=torch.Generator().manual_seed(1))
GROUP = 32
INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
TOKEN = {"strategy": "token", "dynamic": True}
COMPRESSED: dict[str, tuple[dict[str, Any], dict[str, Any] | None, str]] = {
    "int-quantized": ({**INT8, "strategy": "channel"}, {**INT8, **TOKEN}, "int-quantized"),
    "int-quantized, asymmetric inputs": (
        {**INT8, "strategy": "channel"},
        {**INT8, **TOKEN, "symmetric": False},
        "int-quantized",
    ),
    "float-quantized": ({**FP8, "strategy": "channel"}, {**FP8, **TOKEN}, "float-quantized"),
    "float-quantized, static": ({**FP8, "strategy": "tensor"}, {**FP8, "strategy": "tensor"}, "float-quantized"),
    "float, block": ({**FP8, "strategy": "block", "block_structure": [16, 32]}, None, "float-quantized"),
    "pack-quantized": ({**INT4, "symmetric": True}, None, "pack-quantized"),
    "pack-quantized, zero points": ({**INT4, "symmetric": False}, None, "pack-quantized"),
}


def main() -> None:
    with zipfile.ZipFile(OUT, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, (weights, inputs, form) in COMPRESSED.items():
            put(archive, name, lambda at, w=weights, i=inputs, f=form: by_compressed_tensors(at, w, i, f))
        put(archive, "awq", by_autoawq)
        for bits, symmetric in ((4, True), (4, False), (8, True)):
            put(
                archive,
                f"gptq {bits}{' sym' if symmetric else ''}",
                lambda at, b=bits, s=symmetric: by_auto_gptq(at, b, s),
            )
    print(OUT, OUT.stat().st_size, "bytes")


def put(archive: zipfile.ZipFile, name: str, write: Callable[[Path], dict[str, Tensor]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        logits = write(Path(directory))
        save_file(logits, Path(directory) / "logits.safetensors")
        for file in ("config.json", "model.safetensors", "logits.safetensors"):
            entry = zipfile.ZipInfo(f"{name}/{file}")  # without a date: the same bytes every time
            archive.writestr(entry, (Path(directory) / file).read_bytes(), zipfile.ZIP_DEFLATED, 9)


def model() -> LlamaForCausalLM:
    made = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_((noise * 0.2 if parameter.ndim > 1 else 1 + 0.3 * noise).to(torch.bfloat16))
    return made  # in float32, as in bfloat16 the rotation's frequencies would be rounded too


@torch.no_grad()
def logits_of(made: LlamaForCausalLM) -> Tensor:
    return copy.deepcopy(made).float()(IDS).logits


def by_compressed_tensors(
    directory: Path, weights: dict[str, Any], inputs: dict[str, Any] | None, form: str
) -> dict[str, Tensor]:
    made = model()
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**weights),
        input_activations=None if inputs is None else QuantizationArgs(**inputs),
    )
    groups = {"group_0": scheme}
    config = QuantizationConfig(config_groups=groups, ignore=["lm_head"], format=form, quantization_status="frozen")
    apply_quantization_config(made, config)
    for layer in made.modules():
        if hasattr(layer, "weight_scale"):
            calibrate(layer, layer.quantization_scheme.weights)
    told = {"rounded_inputs": logits_of(made)}
    only_weights = copy.deepcopy(made)
    for layer in only_weights.modules():
        if hasattr(layer, "quantization_scheme"):
            layer.quantization_scheme = layer.quantization_scheme.model_copy(update={"input_activations": None})
    told["logits"] = logits_of(only_weights)
    compressor = ModelCompressor.from_pretrained_model(made)
    compressor.compress_model(made)
    made.save_pretrained(directory)
    compressor.update_config(directory)
    stored = load_file(directory / "model.safetensors")
    narrow = {k: v.to(torch.bfloat16) if v.dtype == torch.float32 else v for k, v in stored.items()}
    assert all(torch.equal(v.to(stored[k].dtype).float(), stored[k].float()) for k, v in narrow.items())
    save_file(narrow, directory / "model.safetensors")
    return told


def calibrate(layer: nn.Module, how: QuantizationArgs) -> None:
    """Scales by the least and largest weight, as the library's own observer finds them."""
    wide = layer.weight.data.float()
    if how.strategy == "tensor":
        low, high = wide.min().view(1), wide.max().view(1)
    elif how.strategy == "channel":
        low, high = wide.amin(1, keepdim=True), wide.amax(1, keepdim=True)
    elif how.strategy == "group":
        low, high = (f(wide.unflatten(1, (-1, how.group_size)), 2) for f in (torch.amin, torch.amax))
    else:
        rows, columns = how.block_structure
        parts = wide.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        low, high = parts.amin((1, 3)), parts.amax((1, 3))
    scale, zero = calculate_qparams(low, high, how)
    scale = scale.to(torch.bfloat16).float()  # as it is stored in most files
    layer.weight_scale.data.copy_(scale.view_as(layer.weight_scale))
    if hasattr(layer, "weight_zero_point"):
        layer.weight_zero_point.data.copy_(zero.view_as(layer.weight_zero_point))
    if hasattr(layer, "input_scale"):
        layer.input_scale.data.fill_(0.0234375)


def part_of(package: str, name: str) -> Any:
    """A module of a package whose own __init__ is not run."""
    sys.modules.pop(package, None)
    found = importlib.util.find_spec(package)
    assert found is not None and found.submodule_search_locations
    root, parts = Path(found.submodule_search_locations[0]), name.split(".")
    for depth in range(len(parts)):
        holder = types.ModuleType(".".join([package, *parts[:depth]]))
        holder.__path__ = [str(root.joinpath(*parts[:depth]))]
        sys.modules[holder.__name__] = holder
    return importlib.import_module(f"{package}.{name}")


def quantized(weight: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales and zero points of groups, [out, groups], float16."""
    parts = weight.float().unflatten(1, (-1, GROUP))
    low, high = parts.amin(2).clamp(max=0), parts.amax(2).clamp(min=0)
    top = 2**bits - 1
    if symmetric:
        return (2 * torch.maximum(-low, high) / top).half(), torch.full_like(low, 2 ** (bits - 1))
    scale = ((high - low) / top).half()
    return scale, (-low / scale.float()).round().clamp(1, top)


def replaced(
    made: LlamaForCausalLM, pack: Callable[[nn.Linear], tuple[dict[str, Tensor], Tensor]]
) -> dict[str, Tensor]:
    """Packs every linear layer but the head, puts what it then means into the model, and returns what is stored."""
    stored = {}
    for name, layer in made.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            tensors, meant = pack(layer)
            layer.weight.data = meant
            stored |= {f"{name}.{suffix}": tensor.contiguous() for suffix, tensor in tensors.items()}
    return stored


def write(directory: Path, made: LlamaForCausalLM, stored: dict[str, Tensor], how: dict[str, Any]) -> None:
    made.save_pretrained(directory)
    kept = {
        k: v
        for k, v in load_file(directory / "model.safetensors").items()
        if f"{k.rpartition('.')[0]}.qweight" not in stored
    }
    save_file({**kept, **stored}, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": how}))


def by_autoawq(directory: Path) -> dict[str, Tensor]:
    made, awq = model(), part_of("awq", "modules.linear.gemm")
    unpack = importlib.import_module("awq.utils.packing_utils").dequantize_gemm

    def pack(layer: nn.Linear) -> tuple[dict[str, Tensor], Tensor]:
        scale, zero = quantized(layer.weight.data, 4, False)
        layer.half()
        own = awq.WQLinear_GEMM.from_linear(layer, 4, GROUP, scales=scale.T.contiguous(), zeros=zero.T.contiguous())
        layer.float()
        meant = unpack(own.qweight, own.qzeros, own.scales.float(), 4, GROUP).T.contiguous()
        return {"qweight": own.qweight, "qzeros": own.qzeros, "scales": own.scales}, meant

    stored = replaced(made, pack)
    told = {"logits": logits_of(made)}
    how = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    write(directory, made.to(torch.bfloat16), stored, {**how, "modules_to_not_convert": None})
    return told


def by_auto_gptq(directory: Path, bits: int, symmetric: bool) -> dict[str, Tensor]:
    made, gptq = model(), part_of("auto_gptq", "nn_modules.qlinear.qlinear_cuda_old")

    def pack(layer: nn.Linear) -> tuple[dict[str, Tensor], Tensor]:
        scale, zero = quantized(layer.weight.data, bits, symmetric)
        own = gptq.QuantLinear(bits, GROUP, layer.in_features, layer.out_features, False, weight_dtype=torch.float16)
        owner = torch.arange(layer.in_features, dtype=torch.int32) // GROUP
        own.pack(layer, scale.float(), zero, owner)
        own.scales = own.scales.float()
        own.kernel_switch_threshold = 0  # its way without its CUDA kernels
        own.use_cuda_fp16 = False
        meant = own.eval()(torch.eye(layer.in_features)).T.contiguous()
        tensors = {"qweight": own.qweight, "qzeros": own.qzeros, "scales": own.scales.half(), "g_idx": owner}
        return tensors, meant.detach()

    stored = replaced(made, pack)
    told = {"logits": logits_of(made)}
    how = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": False, "sym": symmetric}
    how |= {"damp_percent": 0.01, "true_sequential": True, "static_groups": False, "model_name_or_path": None}
    write(directory, made.to(torch.bfloat16), stored, how)
    return told


if __name__ == "__main__":
    main()
