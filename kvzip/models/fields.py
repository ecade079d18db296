"""How fields of an HF `config.json` are read: as Transformers reads them, or refused by name."""

from collections.abc import Mapping, Sequence
from typing import Any

from .config import LARGEST, Activation, check_integer, check_number

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


def with_defaults(
    raw: Mapping[str, Any], defaults: Mapping[str, Any], *, nullable: Sequence[str] = ()
) -> dict[str, Any]:
    """Returns a class's defaults, replaced by the config's fields. Null counts only in `nullable` fields."""
    return {**defaults, **{key: value for key, value in raw.items() if value is not None or key in nullable}}


def reject(raw: Mapping[str, Any], **harmless: tuple[Any, ...]) -> None:
    """Raises ValueError for a field that changes the arithmetic and has a value other than the harmless ones."""
    for key, allowed in harmless.items():
        if key in raw and raw[key] not in allowed:
            raise ValueError(
                f"expected config.json to have {key} in {list(allowed)}, got {str(raw[key])[:80]!r}: "
                "kvzip does not implement it, so its results would be wrong"
            )


def read_integer(raw: Mapping[str, Any], key: str, *, low: int = 1, high: int = LARGEST) -> int:
    """Returns the integer `raw[key]`. Raises ValueError that names the key if it is absent or anything else."""
    if raw.get(key) is None:
        raise ValueError(f"expected {key!r} in config.json, got no such field: is this a complete HF config?")
    return check_integer(key, raw[key], low=low, high=high)


def optional_integer(raw: Mapping[str, Any], key: str) -> int | None:
    """Returns the positive integer `raw[key]`, None if it is absent or null."""
    return None if raw.get(key) is None else check_integer(key, raw[key])


def read_flag(raw: Mapping[str, Any], key: str) -> bool:
    """Returns the truth value `raw[key]`, False if it is absent or null."""
    return _read(raw, key, bool, "true or false") or False


def read_cap(raw: Mapping[str, Any], key: str) -> float | None:
    """Returns the softcap `raw[key]`, None if it is absent or null."""
    return None if raw.get(key) is None else check_number(key, raw[key], above=0.0)


def read_mapping(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Returns the object `raw[key]`, an empty one if it is absent or null."""
    return _read(raw, key, Mapping, "an object") or {}


def read_activation(raw: Mapping[str, Any], key: str, default: str) -> Activation:
    """Returns the activation named by `raw[key]`. Raises ValueError if it is unknown."""
    name = default if raw.get(key) is None else raw[key]
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(
            f"expected {key} in config.json to be one of {sorted(ACTIVATIONS)}, got {str(name)[:80]!r}: not supported"
        )
    return ACTIVATIONS[name]


def read_windows(
    raw: Mapping[str, Any], *, default: list[str], window: int | None, fixed: bool = False
) -> list[int | None]:
    """Returns each layer's window from `layer_types`, or from `default` where the file has none.

    Args:
        window: the tokens of a sliding layer, None if the file gives none.
        fixed: the class in Transformers ignores `layer_types`, so that a file must agree with `default`.

    Raises: ValueError for an unknown layer type, a list of another length, or one that disagrees with a fixed default.
    """
    types = default if raw.get("layer_types") is None else raw["layer_types"]
    if not isinstance(types, list) or len(types) != len(default):
        got = len(types) if isinstance(types, list) else repr(types)[:80]
        raise ValueError(f"expected {len(default)} layer_types in config.json, one per layer, got {got}")
    types = ["full_attention" if kind == "attention" else kind for kind in types]  # an older name
    unknown = [kind for kind in types if kind not in ("full_attention", "sliding_attention")]
    if unknown:
        raise ValueError(
            f"expected layer_types in config.json of 'full_attention' or 'sliding_attention', got {unknown[0]!r}"
        )
    if fixed and types != default:
        raise ValueError(
            f"expected layer_types in config.json to be {default[0]!r} for every layer, as this architecture has it, "
            f"got {next(kind for kind in types if kind != default[0])!r}: name the architecture that has both"
        )
    if "sliding_attention" in types and window is None:
        raise ValueError("expected a sliding_window for the sliding layers, got none: config.json is inconsistent")
    return [window if kind == "sliding_attention" else None for kind in types]


def _read(raw: Mapping[str, Any], key: str, kind: type, expected: str) -> Any:
    value = raw.get(key)
    if value is not None and not isinstance(value, kind):
        raise ValueError(f"expected {key} in config.json to be {expected}, got {str(value)[:80]!r}: correct it")
    return value
