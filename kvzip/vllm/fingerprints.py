"""The fingerprint of the model that a server runs, to compare with that of the model that made a document."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvzip.hub import config_of, resolve
from kvzip.models import ModelConfig, StoredTensor, checkpoint_digest, identity_of, stored_tensor, translate_config
from kvzip.models.files import read_json, weight_files
from kvzip.models.identity import fingerprint_of
from kvzip.models.weights import SKIPPED, WRAPPERS

_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def describe(source: str, overrides: Any = None) -> tuple[ModelConfig, bool]:
    """Returns kvzip's form of a served model's config.json, and whether its weights are quantized.

    Args:
        overrides: vLLM's `hf_overrides`, whose fields replace those of the file.

    Raises: FileNotFoundError if the model is not on this machine; ValueError for a config that is not understood.
    """
    raw = read_json(config_of(resolve(source, local_only=True)))
    raw |= overrides if isinstance(overrides, Mapping) else {}
    quantized = raw.pop("quantization_config", None) is not None
    return translate_config(raw), quantized


def fingerprint(model: torch.nn.Module, config: ModelConfig, *, source: str, dtype: torch.dtype, files: bool) -> str:
    """Returns the fingerprint that `kvzip.load` gives the model that vLLM runs, from vLLM's parameters.

    A tensor is looked at in the dtype in which the checkpoint stores it. Where the parameters are narrower than that or
    were packed for a processor, and with `files` (quantized weights), the checkpoint's files are read instead: 512
    bytes of each tensor.

    Raises: FileNotFoundError if files are asked for and not there.
    """
    try:
        stored = _stored(source)
    except FileNotFoundError:  # weights that were not loaded from safetensors files, such as random ones
        if files:
            raise
        stored = {}
    found = list(stored.values()) if files else [*(stored | {x.name: x for x in _seen(model, config, stored)}).values()]
    return fingerprint_of(config, identity_of(config, checkpoint_digest(found)), dtype)


def _seen(model: torch.nn.Module, config: ModelConfig, stored: Mapping[str, StoredTensor]) -> Iterator[StoredTensor]:
    """The parameters that can be seen as the checkpoint stores them."""
    for name, tensor in _named(model, config):
        kept = stored.get(name)
        dtype = tensor.dtype if kept is None else _FLOATS.get(kept.dtype, tensor.dtype)
        if kept is None or dtype.itemsize <= tensor.dtype.itemsize:
            yield stored_tensor(name, tensor.to(dtype))


def _named(model: torch.nn.Module, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """vLLM's parameters as the checkpoint names and splits them."""
    q_rows, kv_rows = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    stacked = {
        "self_attn.qkv_proj": (("q_proj", "k_proj", "v_proj"), (q_rows, kv_rows, kv_rows)),
        "mlp.gate_up_proj": (("gate_proj", "up_proj"), (config.intermediate_size,) * 2),
    }
    for full, parameter in model.named_parameters():
        if not parameter.numel():  # packed by vLLM for a CPU
            continue
        name = full.removeprefix("model.")
        block, field = name.rpartition(".")[::2]
        joined = next((key for key in stacked if block.endswith(key)), None)
        if joined is not None:
            parts, rows = stacked[joined]
            room = block.removesuffix(joined.rpartition(".")[2])
            for part, values in zip(parts, parameter.detach().split(rows), strict=True):
                yield f"{room}{part}.{field}", values
        elif name in ("embed_tokens.weight", "lm_head.weight"):  # padded with rows of no token
            yield name, parameter.detach()[: config.vocab_size]
        else:
            yield name, parameter.detach()


def _stored(source: str) -> dict[str, StoredTensor]:
    """The tensors in the checkpoint's safetensors files, by their names below the decoder's wrapper."""
    directory = resolve(source, local_only=True)
    found = {}
    for path in weight_files(directory, read_json(config_of(directory)).get("transformers_weights")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        for full, entry in header.items():
            if full == "__metadata__" or full.startswith(SKIPPED) or full.endswith(".rotary_emb.inv_freq"):
                continue
            name = next((full.removeprefix(x) for x in WRAPPERS if full.startswith(x)), full)
            begin, end = (8 + size + at for at in entry["data_offsets"])
            found[name] = StoredTensor(name, entry["dtype"], tuple(entry["shape"]), end - begin, _reader(path, begin))
    return found


def _reader(path: Path, begin: int) -> Any:
    def read(start: int, stop: int) -> bytes:
        with path.open("rb") as file:
            file.seek(begin + start)
            return file.read(stop - start)

    return read
