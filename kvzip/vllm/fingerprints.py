"""The fingerprints of the model that a server runs, to compare with those of documents."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from kvzip.hub import config_of, resolve
from kvzip.models import (
    ModelConfig,
    StoredTensor,
    checkpoint_digest,
    identity_of,
    stored_checkpoint,
    stored_tensor,
    translate_config,
)
from kvzip.models.files import read_json
from kvzip.models.identity import fingerprint_of
from kvzip.models.quantization import read_quantization
from kvzip.models.schemes import Quantization

_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True)
class Served:
    """A served model as kvzip sees it: its config.json, overrides in it, read, and how that quantizes weights."""

    source: str
    raw: Mapping[str, Any]
    config: ModelConfig
    quantization: Quantization | None


def describe(source: str, overrides: Any = None) -> Served:
    """Returns what a served model's config.json says.

    Args:
        overrides: vLLM's `hf_overrides`, whose fields replace those of the file.

    Raises: FileNotFoundError if the model is not on this machine; ValueError for a config that is not understood.
    """
    raw = read_json(config_of(resolve(source, local_only=True)))
    raw |= overrides if isinstance(overrides, Mapping) else {}
    return Served(source, raw, translate_config(raw), read_quantization(raw))


def fingerprints(model: torch.nn.Module, served: Served, *, dtype: torch.dtype) -> tuple[str, ...]:
    """Returns the fingerprints that `kvzip.load` may give the model that vLLM runs, from vLLM's parameters.

    A tensor is looked at in the dtype in which the checkpoint stores it. Where the parameters are narrower than that or
    were packed for a processor, and of quantized weights, the checkpoint's files are read instead: 512 bytes of each
    tensor. Where a checkpoint says how activations are rounded there are two: kvzip's may be rounded or not.

    Raises: FileNotFoundError for quantized weights without such files.
    """
    how = served.quantization

    def stored() -> Iterator[StoredTensor]:
        return stored_checkpoint(resolve(served.source, local_only=True), served.raw)

    if how is not None:
        digest = checkpoint_digest(stored())
    else:
        try:
            kept = {x.name: x.dtype for x in stored()}
        except FileNotFoundError:  # weights that were not loaded from safetensors files, such as random ones
            kept = {}
        digest = checkpoint_digest(chain(stored() if kept else (), _seen(model, served.config, kept)))
    identity = identity_of(served.config, digest)
    ways = [[] if how is None else [how.form(rounds_inputs=False)]]
    if how is not None and any(scheme.inputs is not None for _, scheme in how.groups):
        with suppress(ValueError):  # of what kvzip does not round as the checkpoint says
            ways.append([how.form(rounds_inputs=True), "checkpoint"])
    return tuple(fingerprint_of(served.config, identity, dtype, rounding=[x for x in way if x]) for way in ways)


def _seen(model: torch.nn.Module, config: ModelConfig, dtypes: Mapping[str, str]) -> Iterator[StoredTensor]:
    """The parameters that can be seen as the checkpoint stores them."""
    for name, tensor in _named(model, config):
        kept = dtypes.get(name)
        dtype = tensor.dtype if kept is None else _FLOATS.get(kept, tensor.dtype)
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
