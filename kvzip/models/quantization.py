"""Reads `quantization_config` of config.json, or refuses it by name: which linear layers are quantized, and how."""

import re
from collections.abc import Mapping
from typing import Any, NoReturn

from ..ops import Activations
from .schemes import FIELDS, Quantization, Scheme

METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors", "awq", "gptq")
NOT_READ = "kvzip does not implement it, so its results would be wrong"

_COMMON = "quant_method modules_to_not_convert"
_AUTO_ROUND = (  # how AutoRound found the codes, which it writes in the formats of awq and gptq
    "data_type autoround_version provider to_quant_block_names enable_quanted_input enable_minmax_tuning iters lr amp "
    "enable_norm_bias_tuning minmax_lr nsamples seqlen scale_dtype low_gpu_mem_usage gradient_accumulate_steps "
)
_KNOWN = {  # what a method's configuration may say; each field is checked, or does not change what stored tensors mean
    "fp8": "fmt activation_scheme weight_block_size ignored_layers scale_fmt dequantize",
    "fbgemm_fp8": "activation_scale_ub",
    "awq": _AUTO_ROUND + "bits group_size zero_point sym version backend do_fuse fuse_max_seq_len batch_size",
    "gptq": _AUTO_ROUND
    + (
        "bits group_size sym desc_act checkpoint_format format damp_percent damp_auto_increment static_groups "
        "true_sequential model_name_or_path model_file_base_name is_marlin_format lm_head pack_dtype meta dynamic "
        "dataset tokenizer batch_size block_name_to_quantize module_name_preceding_first_block pad_token_id "
        "modules_in_block_to_quantize use_cuda_fp16 model_seqlen max_input_length cache_block_outputs use_exllama "
        "exllama_config disable_exllama backend mse act_group_aware hyb_act"
    ),
    "compressed-tensors": (
        "config_groups format ignore kv_cache_scheme quantization_status global_compression_ratio version "
        "sparsity_config transform_config run_compressed"
    ),
}


def read_quantization(raw: Mapping[str, Any]) -> Quantization | None:
    """Returns how config.json says that weights are quantized, None if it says nothing.

    Raises: ValueError that names a field of `quantization_config` that is not understood.
    """
    found = raw.get("quantization_config")
    key = "quantization_config"
    if found is None and raw.get("compression_config") is not None:  # as it was spelled once
        key, found = "compression_config", raw["compression_config"]
        if isinstance(found, Mapping) and isinstance(found.get(key := "quantization_config"), Mapping):
            _empty(found, "sparsity_config", allowed={"format": "dense"})
            found = found[key]
        if isinstance(found, Mapping):
            found = {**found, "quant_method": "compressed-tensors"}
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, Mapping) else None
    if method not in METHODS:
        raise ValueError(
            f"expected {key} in config.json to have quant_method of {list(METHODS)}, got {str(method)[:80]!r}: take "
            "another checkpoint, or one of 16 bits with load(..., weights='int8')"
        )
    others = set(found) - {*_COMMON.split(), *_KNOWN[method].split()}
    unknown = sorted(name for name in others if found[name] not in (None, False, [], {}))
    if unknown:
        raise ValueError(
            f"expected fields of {key} that kvzip knows of {method}, got {unknown[0]}={str(found[unknown[0]])[:80]}: "
            + NOT_READ
        )
    return _READERS[method](found)


def _fp8(found: Mapping[str, Any]) -> Quantization:
    _only(found, "fmt", (None, "e4m3"))
    _only(found, "scale_fmt", (None, "ue8m0", "float"))
    _only(found, "activation_scheme", (None, "dynamic", "static"))
    block = found.get("weight_block_size")
    sizes = isinstance(block, list) and len(block) == 2 and all(type(x) is int and x > 0 for x in block)
    if block is not None and not sizes:
        _refuse("weight_block_size", block, "two sizes or null")
    static = found.get("activation_scheme") == "static"
    inputs = Activations("e4m3", 448.0, group=block[1] if block and not static else None)
    if block is None:
        scheme = Scheme("plain", "e4m3", "any", inputs=inputs, static=static)
    else:
        scheme = Scheme("plain", "e4m3", "block", group=block[1], rows=block[0], inputs=inputs, static=static)
    return Quantization("fp8", ((("Linear",), scheme),), _names(found, "modules_to_not_convert", "ignored_layers"))


def _fbgemm(found: Mapping[str, Any]) -> Quantization:
    bound = found.get("activation_scale_ub", 1200.0)
    if not isinstance(bound, (int, float)) or bound <= 0:
        _refuse("activation_scale_ub", bound, "a number above 0")
    scheme = Scheme("plain", "e4m3", "channel", inputs=Activations("e4m3", 448.0, bound=float(bound)))
    return Quantization("fbgemm_fp8", ((("Linear",), scheme),), _names(found, "modules_to_not_convert"))


def _awq(found: Mapping[str, Any]) -> Quantization:
    _only(found, "bits", (4,))
    _only(found, "zero_point", (True,))
    _only(found, "sym", (None, False))
    _only(found, "data_type", (None, "int"))
    version = found.get("version", "gemm")
    if str(version).lower() != "gemm":
        _refuse("version", version, "'gemm'")
    scheme = Scheme("awq", "int4", "group", group=_group(found), zeros=True)
    return Quantization("awq", ((("Linear",), scheme),), _names(found, "modules_to_not_convert"))


def _gptq(found: Mapping[str, Any]) -> Quantization:
    _only(found, "bits", (4, 8))
    _only(found, "data_type", (None, "int"))
    _only(found, "pack_dtype", (None, "int32"))
    _only(found, "is_marlin_format", (None, False))
    _only(found, "dynamic", (None, {}, []))
    form = found.get("checkpoint_format") or found.get("format") or "gptq"
    if form not in ("gptq", "gptq_v2"):
        _refuse("checkpoint_format", form, "'gptq' or 'gptq_v2'")
    symmetric = found.get("sym", True)
    if type(symmetric) is not bool:
        _refuse("sym", symmetric, "true or false")
    kind = "int4" if found["bits"] == 4 else "int8"
    offset = 1 if form == "gptq" else 0  # one less is stored in the first format
    ordered = bool(found.get("desc_act")) and not found.get("static_groups")
    scheme = Scheme("gptq", kind, "group", group=_group(found), zeros=not symmetric, offset=offset, ordered=ordered)
    names = _names(found, "modules_to_not_convert")
    return Quantization("gptq", ((("Linear",), scheme),), names, version="" if form == "gptq" else form)


def _compressed(found: Mapping[str, Any]) -> Quantization:
    _empty(found, "sparsity_config", allowed={"format": "dense"})
    _empty(found, "transform_config", allowed={"config_groups": {}})
    _only(found, "quantization_status", (None, "compressed", "frozen"))
    groups = found.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        _refuse("config_groups", groups, "an object with a group of layers each")
    read = []
    for name, group in groups.items():
        if not isinstance(group, Mapping):
            _refuse(f"config_groups.{name}", group, "an object")
        unknown = set(group) - {"targets", "weights", "input_activations", "output_activations", "format"}
        if unknown:
            _refuse(f"config_groups.{name}.{min(unknown)}", group[min(unknown)], "no such field")
        _only(group, "output_activations", (None,))
        targets = group.get("targets")
        form = group.get("format") or found.get("format")
        read.append((_expressions(f"config_groups.{name}.targets", targets), _group_scheme(group, form)))
    ignored = found.get("ignore")
    return Quantization("compressed-tensors", tuple(read), _expressions("ignore", [] if ignored is None else ignored))


def _expressions(key: str, names: Any) -> tuple[str, ...]:
    """A list of names of layers, and of expressions for them."""
    if not isinstance(names, list) or not all(isinstance(x, str) for x in names):
        _refuse(key, names, "a list of names")
    for name in names:
        try:
            re.compile(name.removeprefix("re:") if name.startswith("re:") else "")
        except re.error as error:
            _refuse(key, name, f"names and regular expressions ({error})")
    return tuple(names)


def _group_scheme(group: Mapping[str, Any], form: Any) -> Scheme:
    weights = group.get("weights")
    known = FIELDS.split()
    if not isinstance(weights, Mapping) or set(weights) - set(known):
        extra = sorted(set(weights) - set(known)) if isinstance(weights, Mapping) else weights
        _refuse("weights", extra, f"an object with fields of {known}")
    _only(weights, "dynamic", (None, False))
    _only(weights, "actorder", (None, False, "weight", "static", "group", "dynamic"))
    bits, kind = weights.get("num_bits"), weights.get("type", "int")
    layouts = {
        "float-quantized": ("plain", [(8, "float")]),
        "int-quantized": ("plain", [(8, "int")]),
        "naive-quantized": ("plain", [(8, "float"), (8, "int")]),
        "pack-quantized": ("packed", [(4, "int"), (8, "int")]),
    }
    if not isinstance(form, str) or form not in layouts:
        _refuse("format", form, f"one of {list(layouts)}")
    layout, kinds = layouts[form]
    if (bits, kind) not in kinds:
        _refuse("weights", f"{kind} of {bits} bits", f"weights that fit the format {form}")
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "tensor")
    if strategy not in ("tensor", "channel", "group", "block"):
        _refuse("strategy", strategy, "'tensor', 'channel', 'group' or 'block'")
    symmetric = weights.get("symmetric", True)
    if type(symmetric) is not bool:
        _refuse("symmetric", symmetric, "true or false")
    size, rows = weights.get("group_size"), 1
    if strategy == "block":
        block = weights.get("block_structure")
        if isinstance(block, str):  # "128x128", as early files have it
            block = [int(x) for x in re.findall(r"\d+", block)]
        if not isinstance(block, list) or len(block) != 2 or not all(type(x) is int and x > 0 for x in block):
            _refuse("block_structure", block, "two sizes")
        rows, size = block
    elif strategy == "group" and size != -1 and (type(size) is not int or size < 1):
        _refuse("group_size", size, "a number of inputs")
    group_size = size if strategy in ("group", "block") and size != -1 else None
    name = "int4" if bits == 4 else "int8" if kind == "int" else "e4m3"
    inputs = group.get("input_activations")
    if inputs is not None and not isinstance(inputs, Mapping):
        _refuse("input_activations", inputs, "an object or null")
    ordered, static = weights.get("actorder") in ("group", "dynamic"), bool(inputs) and inputs.get("dynamic") is False
    return Scheme(
        layout, name, strategy, group_size, rows, zeros=not symmetric, ordered=ordered, inputs=inputs, static=static
    )


_READERS = {"fp8": _fp8, "fbgemm_fp8": _fbgemm, "awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed}


def _group(found: Mapping[str, Any]) -> int | None:
    size = found.get("group_size", 128)
    if type(size) is not int or (size < 1 and size != -1):
        _refuse("group_size", size, "a number of inputs, or -1 for all")
    return None if size == -1 else size


def _names(found: Mapping[str, Any], *keys: str) -> tuple[str, ...]:
    """The names in the lists of layers that are not quantized; stored tensors decide, this is checked against them."""
    for key in keys:
        names = found.get(key)
        if names is not None:
            if not isinstance(names, list) or not all(isinstance(x, str) for x in names):
                _refuse(key, names, "a list of names")
            return tuple(names)
    return ()


def _only(found: Mapping[str, Any], key: str, allowed: tuple[Any, ...]) -> None:
    if found.get(key) not in allowed:
        _refuse(key, found.get(key), f"one of {list(allowed)}")


def _empty(found: Mapping[str, Any], key: str, *, allowed: Mapping[str, Any]) -> None:
    """Refuses an object that says more than the allowed fields, which change nothing."""
    value = found.get(key) or {}
    if not isinstance(value, Mapping):
        _refuse(key, value, "an object or null")
    told = {k: v for k, v in value.items() if v not in (None, [], {}) and allowed.get(k) != v} if value else {}
    names = set(told) - {"registry_requires_subclass", "global_sparsity", "sparsity_structure", "ignore", "targets"}
    if names:
        _refuse(f"{key}.{min(names)}", value[min(names)], "nothing there")


def _refuse(key: str, got: Any, expected: str) -> NoReturn:
    raise ValueError(
        f"expected {key} in quantization_config of config.json to be {expected}, got {str(got)[:120]!r}: {NOT_READ}"
    )
