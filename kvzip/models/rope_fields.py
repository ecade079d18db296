"""RoPE in its several spellings, in config.json and in `load(rope=)`, read as Transformers reads them.

Transformers 4 wrote `rope_theta` beside `rope_scaling`; Transformers 5 writes `rope_parameters` with the base inside,
for Gemma 3 one object for each layer type. Files have any mixture. A key that a RoPE type does not use is logged and
ignored, as in Transformers.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

from .config import ROPE, ROPE_FIELDS, RopeSpec, check_integer, check_number
from .fields import read_mapping, reject

logger = logging.getLogger(__name__)

FULL, SLIDING = "full_attention", "sliding_attention"
Parameters = dict[str, Any]

_ORIGINAL = "original_max_position_embeddings"
_SPELLED = {  # fields of RopeSpec that are not spelled as here
    "theta": ("rope_theta",),
    "original_length": (_ORIGINAL,),
    "attention_factor": ("attention_factor", "mscale", "mscale_all_dim"),
}


def shared_rope(
    raw: Mapping[str, Any], rope: Mapping[str, Any] | None, *, by_layer_type: bool
) -> dict[str, Parameters]:
    """Returns the RoPE parameters of each layer type, in a family whose layer types share one set by default.

    If the config has both, `rope_scaling` is read and `rope_parameters` is not. A `rope_theta` inside either
    is preferred to one beside it.

    Args:
        rope: replaces the config's scaling (`load(rope=)`). The config's base stays unless `rope` has one.
        by_layer_type: the family has layer types, so that the parameters may be an object for each.
    """
    given = read_mapping(raw, "rope_scaling") or read_mapping(raw, "rope_parameters")
    reject(raw, partial_rotary_factor=(None, 1))
    base = {"rope_theta": _first(raw.get("rope_theta"), 10_000.0)}
    beside = {} if raw.get(_ORIGINAL) is None else {_ORIGINAL: raw[_ORIGINAL]}
    parts = {kind: read_mapping(given, kind) for kind in (FULL, SLIDING) if by_layer_type and kind in given}
    if parts:
        found = {kind: {**base, **_present(parts.get(kind, parts.get(FULL, {})))} for kind in (FULL, SLIDING)}
    else:
        found = {kind: {**base, **_present(given), **beside} for kind in (FULL, SLIDING)}
    return found if rope is None else _replaced(found, rope, beside, kinds=(FULL, SLIDING))


def gemma3_rope(raw: Mapping[str, Any], rope: Mapping[str, Any] | None) -> dict[str, Parameters]:
    """Returns the RoPE parameters of each layer type of Gemma 3, whose window layers have a base of their own.

    Keys of `rope_scaling` replace those of the global layers' parameters. Parameters that are not by layer type are not
    read. The caller's `rope` replaces the scaling of the global layers.
    """
    nested = read_mapping(raw, "rope_parameters")
    if set(nested) - {FULL, SLIDING}:
        logger.warning(
            "rope_parameters in config.json has %s, which are not by layer type and go unread, as in Transformers",
            sorted(set(nested) - {FULL, SLIDING}),
        )
    wide, narrow = (
        {"rope_type": "default"} if nested.get(kind) is None else read_mapping(nested, kind) for kind in (FULL, SLIDING)
    )
    wide = {**wide, **read_mapping(raw, "rope_scaling")}
    reject(raw, partial_rotary_factor=(None, 1))
    beside = {"truncate": nested.get("truncate", True)}  # Transformers reads it beside the layer types' objects
    found = {
        FULL: {"rope_theta": _first(raw.get("rope_theta"), 1_000_000.0), **_present(wide), **beside},
        SLIDING: {"rope_theta": _first(raw.get("rope_local_base_freq"), 10_000.0), **_present(narrow), **beside},
    }
    return found if rope is None else _replaced(found, rope, {}, kinds=(FULL,))


def read_ropes(parameters: Mapping[str, Mapping[str, Any]], *, max_length: int) -> tuple[dict[str, RopeSpec], int]:
    """Returns the RopeSpec of each layer type, and the model's length, which the global layers' scaling may stretch.

    `max_length` is `max_position_embeddings`. In Llama 3.1's config that field is the stretched length already; in the
    config that Qwen's pages ask for it is the original one. So it is stretched only if it does not exceed the original
    length. With YaRN the larger of the field and the stretched length counts: Qwen3's field is 40,960 with an original
    length of 32,768. Without an original length the field stays.
    """
    wide = _read_rope(parameters[FULL], max_length=max_length)
    same = parameters[SLIDING] == parameters[FULL]
    specs = {FULL: wide, SLIDING: wide if same else _read_rope(parameters[SLIDING], max_length=max_length)}
    original = parameters[FULL].get(_ORIGINAL)
    if wide.kind != "default" and original is not None:
        longer = int(check_integer(_ORIGINAL, original, where=ROPE) * wide.factor)
        if wide.kind == "yarn" or max_length <= original:
            max_length = max(max_length, longer)
    return specs, max_length


def _replaced(
    found: dict[str, Parameters], rope: Mapping[str, Any], beside: Parameters, *, kinds: tuple[str, ...]
) -> dict[str, Parameters]:
    """The parameters, with the caller's in place of those of the layer types that it names, or else of `kinds`."""
    named = {kind: read_mapping(rope, kind) for kind in (FULL, SLIDING) if kind in rope} or dict.fromkeys(kinds, rope)
    new = {kind: {**beside, "rope_theta": found[kind]["rope_theta"], **_present(x)} for kind, x in named.items()}
    return {**found, **new}


def _read_rope(parameters: Mapping[str, Any], *, max_length: int) -> RopeSpec:
    """Returns the RopeSpec of one set of parameters in HF's form.

    Raises: ValueError for an unknown type, a partial rotation, a missing factor or a value that cannot be.
    Source: YaRN, arXiv 2309.00071; the llama3 rule is Llama 3.1's. Defaults are those of Transformers.
    """
    kind = _first(parameters.get("rope_type"), parameters.get("type"), "default")
    reject(parameters, partial_rotary_factor=(None, 1), mrope_section=(None,))
    theta = _number(parameters, "rope_theta")
    if not isinstance(kind, str) or kind not in ROPE_FIELDS:
        raise ValueError(
            f"expected rope_type in {ROPE} to be one of {sorted(ROPE_FIELDS)}, got {kind!r}: not supported"
        )
    used = ROPE_FIELDS[kind]
    known = {key for name in used for key in _SPELLED.get(name, (name,))}
    unused = set(parameters) - known - {"rope_type", "type", "truncate", "partial_rotary_factor"}
    if unused:
        logger.warning("%s in %s: unused by rope_type %r, as in Transformers", sorted(unused), ROPE, kind)
    values: dict[str, Any] = {"kind": kind, "theta": theta}
    if "original_length" in used:
        length = _first(parameters.get(_ORIGINAL), max_length)
        values["original_length"] = length = check_integer(_ORIGINAL, length, where=ROPE)
        if kind == "yarn" and parameters.get("factor", 0) is None:  # null means the ratio of the lengths
            parameters = {**parameters, "factor": max_length / length}
    values |= {
        key: _number(parameters, key) for key in ("factor", "low_freq_factor", "high_freq_factor") if key in used
    }
    if kind == "yarn":
        values["beta_fast"] = _number(parameters, "beta_fast", 32.0) or 32.0
        values["beta_slow"] = _number(parameters, "beta_slow", 1.0) or 1.0
        values["truncate"] = bool(parameters.get("truncate", True))
        values["attention_factor"] = _attention_factor(parameters, values["factor"])
    return RopeSpec(**values)


def _attention_factor(parameters: Mapping[str, Any], factor: float) -> float:
    if parameters.get("attention_factor") is not None:
        return _number(parameters, "attention_factor")
    mscale, all_dim = (_number(parameters, key, 0.0) for key in ("mscale", "mscale_all_dim"))

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if not (mscale and all_dim):
        return magnitude(1.0)
    below = magnitude(all_dim)
    return check_number("mscale / mscale_all_dim", magnitude(mscale) / below if below else math.nan, above=0.0)


def _number(parameters: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = _first(parameters.get(key), default)
    if value is None:
        raise ValueError(f"expected {key!r} in {ROPE}, got no such field: is config.json complete?")
    return check_number(key, value, where=ROPE)


def _present(given: Mapping[str, Any]) -> Parameters:
    """The keys that are not null, and YaRN's factor and truncate, where null means something to Transformers."""
    return {key: value for key, value in given.items() if value is not None or key in ("factor", "truncate")}


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
