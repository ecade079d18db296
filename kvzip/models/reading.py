"""Safetensors files read into weights, tensor by tensor: those of 16 bits into place, quantized ones into one form."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ops import QuantizedWeight
from ..parallel import together
from ..parallel.reduction import head_rows
from .config import ModelConfig
from .division import HEAD_UNIT, Part, check_units, divided, parts_of
from .identity import StoredTensor, checkpoint_digest
from .packed import MAIN, OF_CACHES, OTHERS
from .schemes import QSERVE, Quantization, Scheme
from .shards import Place, copy_, opened, same, shards, stored
from .stacks import COMPANIONS, Files, Reading, index_of, on_device, read_stack, rounded_stack
from .weights import EMBED, HEAD, LINEAR, LayerWeights, Weights, empty_weights, short_name, slots

_CODES = ("F8_E4M3", "I8")  # of a `weight` that is quantized


def read_weights(
    files: Iterable[Path],
    config: ModelConfig,
    layer_names: Mapping[str, tuple[str, ...]],
    *,
    reading: Reading,
    quantization: Quantization | None = None,
) -> tuple[Weights, str]:
    """Returns the weights in safetensors files, on a device, and the digest of the checkpoint.

    With a share, the weights are a rank's, and only its parts of the files are read; a tied head is whole.

    Names and shapes are checked before anything is allocated; those of quantized layers as they are read. Besides the
    weights, memory holds some hundred MB of mapped files and the matrices of one product. If config.json ties the head
    to the embedding, they are one tensor where the files have only one of them or two equal ones; two different ones
    are kept apart, as in Transformers.

    Args:
        quantization: how config.json says that linear layers are stored.

    Raises: ValueError that names a damaged file, or a tensor that is unknown, missing, given twice or of the wrong
    shape or type.
    """
    shapes, linear = _expected(config, layer_names, reading.dtype)
    found = _located(files, shapes, linear, quantization)
    schemes = _schemes(found, sorted(linear), quantization)
    present = set(found) | set(schemes)
    if config.tied:
        if EMBED not in present and HEAD in found and HEAD not in schemes:
            found[EMBED] = found.pop(HEAD)
            present = set(found) | set(schemes)
        if {EMBED, HEAD} <= present:
            config = replace(config, tied=HEAD not in schemes and same(found[EMBED], found[HEAD], reading.dtype))
        if config.tied:
            shapes.pop(HEAD)
    missing = sorted(set(shapes) - present)
    if missing:
        raise ValueError(
            f"expected {len(shapes)} tensors, got {len(shapes) - len(missing)}: {missing[0]!r} is missing "
            "from the safetensors files; is the checkpoint complete, and config.json its own?"
        )
    if schemes and reading.kind is not None:
        raise ValueError(
            f"expected a checkpoint of 16 bits to quantize, got {min(schemes)!r} that is quantized: leave out weights="
        )
    if reading.head is not None and HEAD in schemes:
        raise ValueError("expected a head of 16 bits to quantize, got one that is quantized: leave out head_weights=")
    if reading.round_inputs and not schemes:
        raise ValueError(
            "expected a checkpoint that says how activations are rounded, got one of 16 bits: leave out activations="
        )
    if reading.round_inputs and reading.share is not None:
        raise ValueError(
            "expected one process to round activations, got several ranks: the largest input of o and down would be "
            "another on each; leave out activations="
        )
    return _assembled(found, schemes, config, layer_names, reading)


def stored_tensors(
    files: Iterable[Path],
    config: ModelConfig,
    layer_names: Mapping[str, tuple[str, ...]],
    *,
    quantization: Quantization | None = None,
) -> Iterator[StoredTensor]:
    """Yields the tensors that a checkpoint's digest is made of; each can be read until the next is asked for.

    Raises: ValueError for tensors that `read_weights` refuses by name, shape or type.
    """
    return stored(_located(files, *_expected(config, layer_names, torch.float32), quantization))


def stored_weights(
    files: Iterable[Path],
    config: ModelConfig,
    layer_names: Mapping[str, tuple[str, ...]],
    dtype: torch.dtype,
    *,
    quantization: Quantization | None = None,
) -> tuple[dict[str, Scheme], int]:
    """Returns the schemes of the matrices that are stored quantized, by name, and the bytes of all weights.

    What is stored quantized counts as it is stored, the rest in `dtype`. Only headers are read. Raises as
    `stored_tensors`.
    """
    shapes, linear = _expected(config, layer_names, dtype)
    found = _located(files, shapes, linear, quantization)
    schemes = _schemes(found, sorted(linear), quantization)
    size = 0
    for name, place in found.items():
        if name.rpartition(".")[2] in ("g_idx", "weight_g_idx", "weight_shape"):
            continue  # checked, and not kept
        coded = name not in shapes or name in schemes
        each = int(place.dtype.split("_")[0].strip("FIUB")) // 8 if coded else dtype.itemsize
        size += math.prod(place.shape) * each
    if config.tied and {EMBED, HEAD} <= set(found) and HEAD not in schemes:
        size -= shapes[HEAD].nbytes
    return schemes, size


def _expected(
    config: ModelConfig, layer_names: Mapping[str, tuple[str, ...]], dtype: torch.dtype
) -> tuple[dict[str, Tensor], set[str]]:
    """The tensors of a checkpoint of 16 bits, on the meta device, by name, and which of them may be quantized."""
    untied = replace(config, tied=False)
    linear = {f"layers.{n}.{x}" for n in range(len(config.layers)) for field in LINEAR for x in layer_names[field]}
    return slots(untied, empty_weights(untied, dtype=dtype, device="meta"), layer_names), linear | {HEAD}


def _located(
    files: Iterable[Path], shapes: Mapping[str, Tensor], linear: set[str], quantization: Quantization | None
) -> dict[str, Place]:
    """The place of each tensor by its name below the wrapper, in the order of the files."""
    found: dict[str, Place] = {}
    stems = {name.removesuffix(".weight") for name in linear}
    for path in files:
        with opened(path) as shard:
            for name in shard.keys():  # noqa: SIM118 (not a dict)
                short = short_name(name)
                stem, _, suffix = (short or "").rpartition(".")
                if short is None or (quantization and suffix in OF_CACHES):
                    continue
                stored_as = shard.get_slice(name)
                place = Place(path, name, stored_as.get_dtype(), tuple(stored_as.get_shape()))
                coded = suffix == "weight" and stem in stems and place.dtype in _CODES
                known = short in shapes or (stem in stems and suffix in COMPANIONS)
                if not known and suffix == "bias" and stem in stems and not bool(shard.get_tensor(name).any()):
                    continue  # GPTQ's programs write biases of zeros where the layer has none
                if not known or short in found:
                    unread = "only tensors of the model, got one it does not read"
                    what = "a tensor given once, got it twice" if short in found else unread
                    raise ValueError(f"expected {what}: {name!r} in {path.name}; is config.json this checkpoint's?")
                if short in shapes and place.shape != tuple(shapes[short].shape):
                    raise ValueError(
                        f"expected {name!r} of shape {list(shapes[short].shape)}, got {list(place.shape)} in "
                        f"{path.name}: config.json and the weights do not belong together"
                    )
                if short in shapes and not coded and place.dtype not in ("F64", "F32", "F16", "BF16"):
                    raise ValueError(
                        f"expected {name!r} of a floating type, got {place.dtype} in {path.name}: "
                        "kvzip does not know what its values mean, take another checkpoint"
                    )
                found[short] = place
    return found


def _schemes(found: Mapping[str, Place], linear: Sequence[str], quantization: Quantization | None) -> dict[str, Scheme]:
    """The scheme of each linear layer that is stored quantized, by the name of its weight.

    Stored tensors decide which layers are; config.json says what they mean. Raises ValueError where the two disagree.
    """
    schemes = {}
    for name in linear:
        stem = name.removesuffix(".weight")
        own = {suffix: place for suffix in COMPANIONS if (place := found.get(f"{stem}.{suffix}"))}
        if not set(own) - {"weight"} and (not own or own["weight"].dtype not in _CODES):
            continue
        main = next((own[x] for x in ("weight", "weight_packed", "qweight") if x in own), next(iter(own.values())))
        full = main.name.rpartition(".")[0]
        rule = quantization or (QSERVE if "dequant_scale" in own else None)
        scheme = None if rule is None else rule.of(full)
        if scheme is None:
            told = "nothing of quantization" if rule is None else "that it is not quantized"
            raise ValueError(
                f"expected {main.name!r} of a floating type, got {main.dtype} in {main.path.name}: config.json says "
                f"{told}, so kvzip does not know what its values mean"
            )
        unread = set(own) - {MAIN[scheme.layout], *OTHERS[scheme.layout]}
        coded = MAIN[scheme.layout] in own and (scheme.layout != "plain" or own["weight"].dtype in _CODES)
        if unread or not coded:
            got = f"{full}.{min(unread)}" if unread else f"{main.name} in {main.dtype}"
            raise ValueError(
                f"expected {full}.{MAIN[scheme.layout]} with quantized values and what belongs to it, got {got}: "
                "config.json and the weights do not belong together"
            )
        schemes[name] = scheme
    return schemes


def _assembled(
    found: Mapping[str, Place],
    schemes: Mapping[str, Scheme],
    config: ModelConfig,
    layer_names: Mapping[str, tuple[str, ...]],
    reading: Reading,
) -> tuple[Weights, str]:
    """The weights and the checkpoint's digest."""
    stacks: dict[str, tuple[str, ...]] = {}  # the stored layers of each matrix that will be quantized
    for index in range(len(config.layers)):
        for field in LINEAR:
            names = tuple(f"layers.{index}.{name}" for name in layer_names[field])
            if reading.kind is not None or any(name in schemes for name in names):
                stacks[f"layers.{index}.{field}"] = names
    head = ("embed", EMBED) if config.tied else ("unembed", HEAD)
    if HEAD in schemes or reading.head is not None:
        stacks[head[0]] = (head[1],)
    kinds = {stack: reading.head if stack == head[0] else reading.kind for stack in stacks}
    for stack, names in stacks.items():
        plain = [name for name in names if kinds[stack] is None and name not in schemes]
        if plain:
            raise ValueError(
                f"expected the layers of one product quantized alike, got {plain[0]!r} in 16 bits beside "
                f"{next(name for name in names if name in schemes)!r}: take another checkpoint"
            )
    share, unit = reading.share, 1 if HEAD not in schemes and reading.head is None else HEAD_UNIT
    parts: Mapping[str, Part] = {}
    if share is not None:
        check_units(config, layer_names, share, schemes=schemes, kind=reading.kind)
        parts = parts_of(config, layer_names, share, unit=unit)
    own = divided(config, share)
    with together(share):
        head_part = head_rows(share, config.vocab_size, unit=unit)
        weights = _allocated(own, set(stacks), reading, head_part.stop - head_part.start)
        files = Files(found, slots(own, weights, layer_names), schemes, parts, reading)
        made = _filled(files, stacks, kinds)
    layers = [
        replace(layer, **{field: made[name] for field in LINEAR if (name := f"layers.{n}.{field}") in made})
        for n, layer in enumerate(weights.layers)
    ]
    embed = made.get("embed", weights.embed)
    unembed = embed if config.tied else made.get("unembed", weights.unembed)
    weights = replace(weights, embed=embed, layers=tuple(layers), unembed=unembed)
    # a head tied to the embedding is stored too: in the checkpoint's dtype the two may differ, and the digest must not
    # depend on the dtype of the weights
    with together(share):
        digest = checkpoint_digest(stored(found))
    return weights, digest


def _allocated(config: ModelConfig, left_out: set[str], reading: Reading, head: int) -> Weights:
    """Uninitialised weights on the device; those left out stay on the meta device."""
    if not left_out:
        return empty_weights(config, dtype=reading.dtype, device=reading.device, head=head)
    meta = empty_weights(config, dtype=reading.dtype, device="meta", head=head)

    def real(name: str, tensor: Any) -> Any:
        known = isinstance(tensor, Tensor) and name not in left_out
        return torch.empty_like(tensor, device=reading.device) if known else tensor

    layers = [
        LayerWeights(**{field: real(f"layers.{n}.{field}", x) for field, x in vars(layer).items()})
        for n, layer in enumerate(meta.layers)
    ]
    embed = real("embed", meta.embed)
    unembed = embed if meta.unembed is meta.embed else real("unembed", meta.unembed)
    return Weights(embed=embed, layers=tuple(layers), norm=real("norm", meta.norm), unembed=unembed)


def _filled(
    files: Files, stacks: Mapping[str, tuple[str, ...]], kinds: Mapping[str, str | None]
) -> dict[str, QuantizedWeight]:
    """Copies every tensor into its place, file by file, and returns the stacks that are quantized.

    `kinds`: to what those of 16 bits are.
    """
    stack_of = {
        f"{name.removesuffix('.weight')}.{suffix}": stack
        for stack, names in stacks.items()
        for name in names
        for suffix in COMPANIONS
    }
    made: dict[str, QuantizedWeight] = {}
    with shards() as read:
        for short, place in files.found.items():
            stack = stack_of.get(short)
            if stack is None and short in files.places:
                copy_(files.places[short], read, place, index_of(files.parts.get(short)))
            elif stack is not None and stack not in made:
                names, kind = stacks[stack], kinds[stack]
                weight = read_stack(names, files, read) if kind is None else rounded_stack(names, files, read, kind)
                made[stack] = on_device(weight, files.reading.device)
    return made
