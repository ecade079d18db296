"""Quantized checkpoints as makers write them, written here from the formats' definitions, with the weights they mean.

Nothing here shares code with the readers: values are placed one field at a time, in float64.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, INNER, VOCAB, LAYERS = 64, 96, 40, 2
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
AWQ = [0, 2, 4, 6, 1, 3, 5, 7]


@dataclass
class Made:
    """A format's tensors of one layer, by suffix, and the float64 weight that they mean."""

    tensors: dict[str, Tensor]
    meant: Tensor


@dataclass
class Format:
    """How a maker's directory is written."""

    config: dict[str, Any]
    make: Callable[[int, int, torch.Generator], Made]
    key: str = "quantization_config"
    extra: dict[str, Tensor] = field(default_factory=dict)


def _codes(low: int, high: int, n: int, k: int, generator: torch.Generator) -> Tensor:
    return torch.randint(low, high + 1, (n, k), generator=generator)


def _scales(*shape: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    return (0.01 + 0.02 * torch.rand(shape, generator=generator)).to(dtype)


def _spread(x: Tensor, rows: int, columns: int, n: int, k: int) -> Tensor:
    return x.double().repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k]


def _e4m3(n: int, k: int, generator: torch.Generator) -> Tensor:
    """Random finite bit patterns, subnormals and both zeros included."""
    bits = torch.randint(0, 256, (n, k), generator=generator, dtype=torch.uint8)
    return torch.where(bits & 127 == 127, 5, bits).view(torch.float8_e4m3fn)


def e4m3_value(codes: Tensor) -> Tensor:
    """The numbers by their definition: sign, 4 bits of exponent with bias 7, 3 bits of mantissa."""
    bits = codes.view(torch.uint8).long()
    exponent, mantissa = bits >> 3 & 15, bits & 7
    size = torch.where(
        exponent == 0, mantissa.double() / 8 * 2.0**-6, (1 + mantissa.double() / 8) * 2.0 ** (exponent.double() - 7)
    )
    return torch.where(bits >= 128, -size, size)


def into_words(values: Tensor, bits: int, axis: int, order: list[int] | None = None) -> Tensor:
    """Puts unsigned fields into int32, the first in the lowest bits; `order` says which value each place has."""
    each = 32 // bits
    values = values if axis == 1 else values.T
    values = torch.nn.functional.pad(values, (0, -values.shape[1] % each))
    words = torch.zeros(values.shape[0], values.shape[1] // each, dtype=torch.int64)
    for word in range(words.shape[1]):
        for place in range(each):
            value = values[:, word * each + (order[place] if order else place)]
            words[:, word] |= value.long() << (bits * place)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    return (words if axis == 1 else words.T).contiguous()


def fp8(
    block: list[int] | None, *, static: bool = False, scale: str = "weight_scale_inv", dtype=torch.float32
) -> Format:
    config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "static" if static else "dynamic"}
    config |= {"weight_block_size": block, "modules_to_not_convert": ["lm_head"]}

    def make(n: int, k: int, generator: torch.Generator) -> Made:
        codes = _e4m3(n, k, generator)
        size = block or [n, k]
        scales = _scales(-(-n // size[0]), -(-k // size[1]), generator=generator, dtype=dtype)
        meant = e4m3_value(codes) * _spread(scales, *size, n, k)
        tensors = {"weight": codes, scale: scales if block else scales[0, 0]}
        if static:
            tensors["activation_scale" if scale == "weight_scale_inv" else "input_scale"] = torch.tensor(0.03)
        return Made(tensors, meant)

    return Format(config, make)


def fbgemm() -> Format:
    def make(n: int, k: int, generator: torch.Generator) -> Made:
        codes, scales = _e4m3(n, k, generator), _scales(n, 1, generator=generator)
        return Made({"weight": codes, "weight_scale": scales}, e4m3_value(codes) * scales.double())

    config = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
    return Format(config, make)


def compressed(
    form: str,
    bits: int,
    kind: str,
    strategy: str,
    *,
    group: int | None = None,
    block: list[int] | None = None,
    symmetric: bool = True,
    inputs: dict[str, Any] | None = None,
    key: str = "quantization_config",
) -> Format:
    weights = {"num_bits": bits, "type": kind, "symmetric": symmetric, "strategy": strategy, "group_size": group}
    weights |= {"block_structure": block, "dynamic": False, "actorder": None, "observer": "minmax"}
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": scheme},
    }
    config |= {"ignore": ["lm_head"], "kv_cache_scheme": None, "quantization_status": "compressed"}
    if key == "compression_config":
        del config["quant_method"]
        config = {"quantization_config": config, "sparsity_config": {"format": "dense"}}

    def make(n: int, k: int, generator: torch.Generator) -> Made:
        rows, columns = {"tensor": (n, k), "channel": (1, k), "group": (1, group or k)}.get(strategy, block)
        shape = -(-n // rows), -(-k // columns)
        scales, half = _scales(*shape, generator=generator, dtype=torch.bfloat16), 2 ** (bits - 1)
        tensors: dict[str, Tensor] = {"weight_scale": scales[0, 0][None] if strategy == "tensor" else scales}
        if kind == "float":
            codes = _e4m3(n, k, generator)
            values = e4m3_value(codes)
        else:
            codes = _codes(-half, half - 1, n, k, generator)
            values = codes.double()
        zeros = torch.zeros(shape, dtype=torch.int64)
        if not symmetric:
            zeros = _codes(-half, half - 1, *shape, generator)
        if form == "pack-quantized":
            tensors["weight_packed"] = into_words(codes + half, bits, 1)
            tensors["weight_shape"] = torch.tensor([n, k])
            if not symmetric:
                tensors["weight_zero_point"] = into_words(zeros + half, bits, 0)
        else:
            tensors["weight"] = codes if kind == "float" else codes.to(torch.int8)
            if not symmetric:
                tensors["weight_zero_point"] = zeros.to(torch.int8)
        if inputs is not None and not inputs["dynamic"]:
            tensors["input_scale"] = torch.tensor([0.03])
        return Made(tensors, (values - _spread(zeros, rows, columns, n, k)) * _spread(scales, rows, columns, n, k))

    return Format(config, make, key)


def awq(group: int = 32) -> Format:
    def make(n: int, k: int, generator: torch.Generator) -> Made:
        codes, zeros = _codes(0, 15, n, k, generator), _codes(0, 15, n, k // group, generator)
        scales = _scales(n, k // group, generator=generator, dtype=torch.float16)
        tensors = {
            "qweight": into_words(codes.T, 4, 1, AWQ),
            "qzeros": into_words(zeros.T, 4, 1, AWQ),
            "scales": scales.T.contiguous(),
        }
        meant = (codes.double() - _spread(zeros, 1, group, n, k)) * _spread(scales, 1, group, n, k)
        return Made(tensors, meant)

    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return Format({**config, "modules_to_not_convert": None}, make)


def gptq(bits: int, *, symmetric: bool, group: int = 32, version: str | None = None, shuffled: bool = False) -> Format:
    def make(n: int, k: int, generator: torch.Generator) -> Made:
        size = k if group == -1 else group
        top, half = 2**bits - 1, 2 ** (bits - 1)
        codes, zeros = _codes(0, top, n, k, generator), _codes(1, top, n, k // size, generator)
        if symmetric:
            zeros = torch.full_like(zeros, half)
        scales = _scales(n, k // size, generator=generator, dtype=torch.float16)
        owner = torch.arange(k) // size
        owner = owner.flip(0) if shuffled else owner
        tensors = {
            "qweight": into_words(codes.T, bits, 0),
            "qzeros": into_words(zeros.T - int(version != "gptq_v2"), bits, 1),
            "scales": scales.T.contiguous(),
            "g_idx": owner.int(),
        }
        return Made(tensors, (codes.double() - zeros.double()[:, owner]) * scales.double()[:, owner])

    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": shuffled, "sym": symmetric}
    config |= {"damp_percent": 0.01, "true_sequential": True, "model_name_or_path": None, "static_groups": False}
    return Format({**config, **({} if version is None else {"checkpoint_format": version})}, make)


def qserve() -> Format:
    def make(n: int, k: int, generator: torch.Generator) -> Made:
        codes = _codes(-127, 127, n, k, generator).to(torch.int8)
        scales = _scales(n, generator=generator, dtype=torch.float16)
        return Made({"weight": codes, "dequant_scale": scales}, codes.double() * scales.double()[:, None])

    return Format({}, make)


TOKEN = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
FORMATS: dict[str, Format] = {
    "fp8 block": fp8([16, 16], dtype=torch.bfloat16),
    "fp8 uneven block": fp8([40, 40]),
    "fp8 block, scales of powers of 2": fp8([16, 32], dtype=torch.float8_e8m0fnu),
    "fp8 tensor": fp8(None),
    "fp8 tensor, static": fp8(None, static=True),
    "fp8 tensor, static, other names": fp8(None, static=True, scale="weight_scale"),
    "fbgemm": fbgemm(),
    "float, channel": compressed("float-quantized", 8, "float", "channel", inputs=TOKEN),
    "float, tensor, static": compressed(
        "float-quantized", 8, "float", "tensor", inputs={**TOKEN, "strategy": "tensor", "dynamic": False}
    ),
    "float, block": compressed("float-quantized", 8, "float", "block", block=[16, 32]),
    "int8, channel": compressed("int-quantized", 8, "int", "channel", inputs={**TOKEN, "type": "int"}),
    "int8, tensor": compressed("int-quantized", 8, "int", "tensor"),
    "int8, channel, zeros": compressed("int-quantized", 8, "int", "channel", symmetric=False),
    "packed 4, group": compressed("pack-quantized", 4, "int", "group", group=32),
    "packed 4, group, zeros": compressed("pack-quantized", 4, "int", "group", group=32, symmetric=False),
    "packed 4, a short last group": compressed("pack-quantized", 4, "int", "group", group=64, symmetric=False),
    "packed 4, channel, zeros": compressed("pack-quantized", 4, "int", "channel", symmetric=False),
    "packed 8, group": compressed("pack-quantized", 8, "int", "group", group=16),
    "packed 8, channel, zeros": compressed("pack-quantized", 8, "int", "channel", symmetric=False),
    "packed 4, early": compressed("pack-quantized", 4, "int", "group", group=32, key="compression_config"),
    "awq": awq(),
    "gptq 4, sym": gptq(4, symmetric=True),
    "gptq 4": gptq(4, symmetric=False),
    "gptq 4, one group": gptq(4, symmetric=False, group=-1),
    "gptq 4, v2": gptq(4, symmetric=False, version="gptq_v2"),
    "gptq 8, sym": gptq(8, symmetric=True),
    "gptq 8": gptq(8, symmetric=False),
    "qserve": qserve(),
}


def write(
    directory: Path,
    form: Format,
    *,
    plain: tuple[str, ...] = (),
    shards: int = 1,
    others: Mapping[str, Format] | None = None,
    head: str = "plain",
) -> dict[str, Tensor]:
    """Writes a checkpoint; returns the tensors of the 16-bit model that it means, in float64.

    Args:
        plain: layers that stay in 16 bits, as `layers.1.mlp.up_proj`.
        shards: files, among which the tensors of a layer are spread.
        others: formats of layers whose name has the key in it, in place of `form`.
        head: "plain", "tied" (the file has none) or "quantized".
    """
    generator = torch.Generator().manual_seed(0)
    stored: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    names = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "lm_head.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        names |= {f"model.layers.{layer}.{x}_layernorm.weight": (HIDDEN,) for x in ("input", "post_attention")}
    if head != "plain":
        del names["lm_head.weight"]
    for name, shape in names.items():
        stored[name] = torch.randn(shape, generator=generator).to(torch.bfloat16)
        meant[name] = stored[name].double()
    linear = {f"model.layers.{n}.{name}": shape for n in range(LAYERS) for name, shape in SHAPES.items()}
    for full, shape in (linear | ({"lm_head": (VOCAB, HIDDEN)} if head == "quantized" else {})).items():
        if full.removeprefix("model.") in plain:
            stored[f"{full}.weight"] = (torch.randn(shape, generator=generator) * 0.1).to(torch.bfloat16)
            meant[f"{full}.weight"] = stored[f"{full}.weight"].double()
            continue
        own = next((other for part, other in (others or {}).items() if part in full), form)
        made = own.make(*shape, generator)
        stored |= {f"{full}.{suffix}": tensor for suffix, tensor in made.tensors.items()}
        meant[f"{full}.weight"] = made.meant
    if head == "tied":
        meant["lm_head.weight"] = meant["model.embed_tokens.weight"]
    stored |= form.extra
    config = {**CONFIG, **({form.key: form.config} if form.config else {}), "tie_word_embeddings": head != "plain"}
    (directory / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(stored, directory / "model.safetensors")
        return meant
    order = sorted(stored)
    files = {f"part-{n}.safetensors": order[n::shards] for n in range(shards)}
    for file, keys in files.items():
        save_file({key: stored[key] for key in keys}, directory / file)
    index = {"weight_map": {key: file for file, keys in files.items() for key in keys}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return meant
