"""The shape and arithmetic of a decoder-only transformer, as data that checks itself."""

import math
from dataclasses import dataclass
from typing import Any, Literal

RopeKind = Literal["default", "linear", "llama3", "yarn"]
Activation = Literal["silu", "gelu_tanh"]

ROPE_FIELDS = {
    "default": ("theta",),
    "linear": ("theta", "factor"),
    "llama3": ("theta", "factor", "original_length", "low_freq_factor", "high_freq_factor"),
    "yarn": ("theta", "factor", "original_length", "beta_fast", "beta_slow", "truncate", "attention_factor"),
}
"""The fields of RopeSpec that each kind uses."""

LARGEST = 2**31 - 1
"""The largest size or length: rows and positions are counted in 32 bits."""
MOST_LAYERS = 10_000
ROPE = "the RoPE parameters (of config.json, or rope=)"

_HF_KEYS = {  # fields of ModelConfig with another name in config.json
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "attn_softcap": "attn_logit_softcapping",
    "logit_softcap": "final_logit_softcapping",
    "max_length": "max_position_embeddings, as RoPE scaling stretches it,",
}


def check_integer(key: str, value: Any, *, low: int = 1, high: int = LARGEST, where: str = "config.json") -> int:
    """Returns the value. Raises ValueError that names the key unless it is an int (not a bool) from low to high."""
    if type(value) is not int or not low <= value <= high:
        raise ValueError(
            f"expected {key} in {where} to be a whole number from {low} to {high}, got {_shown(value)}: correct it"
        )
    return value


def check_number(key: str, value: Any, *, above: float = -math.inf, where: str = "config.json") -> float:
    """Returns the value as a float. Raises ValueError that names the key unless it is finite and above the limit."""
    try:
        number = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number <= above:
        limit = "" if above == -math.inf else f" above {above:g}"
        raise ValueError(f"expected {key} in {where} to be a finite number{limit}, got {_shown(value)}: correct it")
    return number


def _shown(value: Any) -> str:
    """A value of a file in a few characters. Python refuses to print an int of thousands of digits."""
    if type(value) is int and abs(value) > LARGEST**2:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding of one layer. `models/rope.py` turns it into inverse frequencies.

    Lengths are in tokens. `attention_factor` multiplies cos and sin (YaRN; 1 otherwise).

    Raises: ValueError for an impossible value; it names the field as config.json does.
    """

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    original_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("default", "linear", "llama3", "yarn"):
            raise ValueError(
                f"expected rope_type 'default', 'linear', 'llama3' or 'yarn' in {ROPE}, got {_shown(self.kind)}: "
                "not supported"
            )
        # YaRN divides by the base's logarithm
        check_number("rope_theta", self.theta, above=1.0 if self.kind == "yarn" else 0.0, where=ROPE)
        for key in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"):
            check_number(key, getattr(self, key), above=0.0, where=ROPE)
        if type(self.truncate) is not bool:
            raise ValueError(f"expected truncate in {ROPE} to be true or false, got {_shown(self.truncate)}")
        low = 1 if self.kind in ("llama3", "yarn") else 0
        check_integer("original_max_position_embeddings", self.original_length, low=low, where=ROPE)
        for smaller, larger in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            a, b = getattr(self, smaller), getattr(self, larger)
            if a > b or (a == b and smaller == "low_freq_factor"):  # llama3 divides by their difference
                raise ValueError(f"expected {smaller} in {ROPE} to be less than {larger}, got {a:g} and {b:g}")


@dataclass(frozen=True)
class LayerSpec:
    """What differs from layer to layer. With a window, query i sees key j iff 0 <= i - j < window."""

    window: int | None
    rope: RopeSpec

    def __post_init__(self) -> None:
        if self.window is not None:
            check_integer("sliding_window", self.window)


@dataclass(frozen=True)
class ModelConfig:
    """Everything the forward pass needs to know besides weights.

    `max_length` is the number of positions that the model was made for. Positions beyond `warn_length` need dual chunk
    attention, which kvzip does not implement; a warning is logged once for them.

    Raises: ValueError for an impossible value; it names the field as config.json does.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerSpec, ...]
    norm_eps: float
    norm_offset: int
    activation: Activation
    embed_scale: float
    attn_scale: float
    attn_softcap: float | None
    logit_softcap: float | None
    max_length: int
    tied: bool
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    warn_length: int | None = None

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim")
        for name in (*sizes, "max_length", *(() if self.warn_length is None else ("warn_length",))):
            check_integer(_HF_KEYS.get(name, name), getattr(self, name))
        caps = [name for name in ("attn_softcap", "logit_softcap") if getattr(self, name) is not None]
        for name in ("norm_eps", "embed_scale", "attn_scale", *caps):
            check_number(_HF_KEYS.get(name, name), getattr(self, name), above=0.0)
        for name in ("tied", "qkv_bias", "o_bias", "qk_norm", "post_norms"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"expected {name} to be True or False, got {_shown(getattr(self, name))}")
        if type(self.family) is not str or self.activation not in ("silu", "gelu_tanh"):
            raise ValueError(
                "expected a family's name and activation 'silu' or 'gelu_tanh', got "
                f"{_shown(self.family)} and {_shown(self.activation)}"
            )
        if type(self.norm_offset) is not int or self.norm_offset not in (0, 1):
            raise ValueError(f"expected norm_offset 0 or 1, got {_shown(self.norm_offset)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"expected num_attention_heads in config.json to be a multiple of num_key_value_heads, got "
                f"{self.num_heads} and {self.num_kv_heads}: each KV head serves as many query heads as the others"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"expected head_dim in config.json to be even, got {self.head_dim}: RoPE rotates its halves"
            )
        if type(self.layers) is not tuple or not all(isinstance(layer, LayerSpec) for layer in self.layers):
            raise ValueError(f"expected layers to be a tuple of LayerSpec, got {_shown(self.layers)}")
        check_integer("num_hidden_layers", len(self.layers), high=MOST_LAYERS)
