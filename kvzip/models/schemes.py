"""How a linear layer of a quantized checkpoint is stored, which layers are, and how their inputs are rounded."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..ops import Activations

FIELDS = (
    "num_bits type symmetric group_size strategy block_structure dynamic actorder observer observer_kwargs "
    "scale_dtype zp_dtype"
)
"""What compressed-tensors may say of weights, and of inputs."""


@dataclass(frozen=True)
class Scheme:
    """How a linear layer is stored. `layout` says how codes lie, `models.packed` reads it."""

    layout: str  # "plain": codes [out, in]; "packed", "awq", "gptq": several in an int32
    kind: str
    strategy: str  # where a scale is shared: "tensor", "channel", "group" or "block"
    group: int | None = None  # inputs that share a scale
    rows: int = 1  # outputs that do, of a block
    zeros: bool = False  # whether there are zero points
    offset: int = 0  # added to stored zero points (gptq)
    ordered: bool = False  # groups may be of any inputs, which a stored g_idx says
    inputs: Mapping[str, Any] | Activations | None = None  # how activations are rounded; a config's, not checked yet
    static: bool = False  # whether their scale is stored

    @property
    def form(self) -> str:
        """What stored shapes do not tell: sizes of groups that are no power of two, of which several fit a shape."""
        sizes = [x for x in (self.group, self.rows) if x is not None]
        return "" if all(x & (x - 1) == 0 for x in sizes) else "x".join(map(str, sizes))


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint is quantized: the scheme of each group of layers, and the layers that have none."""

    method: str
    groups: tuple[tuple[tuple[str, ...], Scheme], ...]  # targets, as compressed-tensors has them
    ignored: tuple[str, ...] = ()
    version: str = ""  # of the format, if another than the usual one

    def form(self, *, rounds_inputs: bool) -> str:
        """What stored tensors do not say, for the model's fingerprint; how inputs are rounded, if they are."""
        schemes = [scheme for _, scheme in self.groups]
        found = [self.version, *(scheme.form for scheme in schemes)]
        if rounds_inputs:
            for scheme in schemes:
                how = activations_of(scheme)
                told = () if how is None else (how.kind, how.steps, how.group, how.bound, how.symmetric, scheme.static)
                found.append("/".join(map(str, told)))
        return " ".join(dict.fromkeys(x for x in found if x))

    def of(self, name: str) -> Scheme | None:
        """The scheme of the linear layer `name`, as `model.layers.0.mlp.up_proj`; None if no group has it.

        compressed-tensors lists whole names and expressions, the others names or parts of them, as `mlp.down_proj`.
        """
        if self.method == "compressed-tensors":
            left_out = any(_matches(name, target) for target in self.ignored)
        else:
            left_out = any(f".{part}." in f".{name}." for part in self.ignored)
        if left_out:
            return None
        named = (scheme for targets, scheme in self.groups if any(_matches(name, target) for target in targets))
        of_class = (scheme for targets, scheme in self.groups if "Linear" in targets)
        return next(named, None) or next(of_class, None)


QSERVE = Quantization("w8a8", ((("Linear",), Scheme("plain", "int8", "channel", inputs=Activations("int8", 127.0))),))
"""QServe's W8A8 directories, which say nothing of it in config.json: int8 rows with `dequant_scale`."""


def activations_of(scheme: Scheme) -> Activations | None:
    """Returns how a scheme rounds activations, a static scale still missing; None if it does not.

    Raises: ValueError for one that is not understood.
    """
    given = scheme.inputs
    if given is None or isinstance(given, Activations):
        return given
    kind, size = given.get("type"), given.get("group_size")
    fits = kind in ("int", "float") and given.get("num_bits") == 8 and type(given.get("dynamic")) is bool
    strategy, symmetric = given.get("strategy"), given.get("symmetric", True)
    fits = fits and strategy in (("token", "group") if given["dynamic"] else ("tensor",))
    fits = fits and (strategy != "group" or (type(size) is int and size > 0)) and not set(given) - set(FIELDS.split())
    if not fits or type(symmetric) is not bool or (kind == "float" and not symmetric):
        raise ValueError(
            "expected input_activations of 8 bits, dynamic for each token or group or static for all, got "
            f"{str(dict(given))[:200]}: load without activations='checkpoint'"
        )
    steps = 448.0 if kind == "float" else 127.5  # of 255 steps from -128 to 127
    group = size if strategy == "group" else None
    return Activations("e4m3" if kind == "float" else "int8", steps, group=group, symmetric=symmetric)


def _matches(name: str, target: str) -> bool:
    """Whether a layer's name is what compressed-tensors calls a target: the name itself, or `re:` and an expression."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return name == target
