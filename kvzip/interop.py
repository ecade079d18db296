"""Converts caches from Transformers (a prefilled context) and to it (dense or uniform); needs the extra `transformers`.

Both keep rotated keys in the same layout, so tensors need no conversion. A window layer of Transformers holds one row
less than ours, window - 1, all that the next token attends to.
"""

from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor

from . import checks, ops
from .cache import DenseCache, DenseKV, RaggedCache, RaggedKV, WindowKV, as_ragged
from .checks import check_kind, check_text_or_ids
from .inputs import check_belongs, check_length, check_whole_model, context_ids, prefix_ids
from .models import Model
from .options import Turn

if TYPE_CHECKING:
    from transformers import DynamicCache


def from_transformers(
    model: Model, cache: Any, token_ids: Int64[Tensor, " S"], *, template: bool = True, start: int | None = None
) -> DenseCache:
    """Returns a DynamicCache of the same weights as a dense cache, to be scored, compressed, extended or asked.

    Tensors are shared where device and layout allow; decoding in Transformers replaces its own and leaves ours.

    Args:
        cache: a `transformers.DynamicCache` of one sequence, made with or without a config.
        token_ids: all the tokens that it holds, system prefix included.
        template: whether they begin with the chat template's prefix and leave the user turn open, as `prefill`'s do.
        start: how many tokens at the beginning are always kept and never scored; None takes those that `prefill` puts
            in front of a context, and expects to find them.

    Where the cache ends with an answer that Transformers generated (it holds all of its tokens but the last), the user
    turn is not open: `extend` it by that token and by what closes the answer's turn and opens the next, before asking.

        said = kvzip.prompts.text_of(model.tokenizer, [*ids, last])  # ids: the cache's
        end = kvzip.prompts.turn_close(prompt_of(model))
        close = kvzip.prompts.encode_control(model.tokenizer, end, before=said)
        cache = kvzip.extend(model, cache, torch.tensor([last, *close]))  # prompt_of: kvzip.inputs

    Raises: TypeError for another kind of cache; ValueError if its layers, heads, widths, dtype or length are not the
        model's and the tokens', or the tokens do not begin with the prefix.
    """
    check_kind(model, Model)
    check_text_or_ids(token_ids, "token_ids")
    check_whole_model(model, "from_transformers")
    transformers = _library()
    if not isinstance(cache, transformers.DynamicCache):
        raise TypeError(f"expected a transformers.DynamicCache, got {type(cache).__name__}: prefill with that kind")
    ids = context_ids(model, token_ids)
    check_length(model, len(ids), "the tokens of the cache")
    if start is None:
        prefix = prefix_ids(model, Turn(template=bool(template)))
        if template and ids[: len(prefix)].tolist() != prefix:  # its last space may be in the context's first token
            prefix = prefix_ids(model, context="a")
        start = len(prefix)
        if ids[:start].tolist() != prefix:
            raise ValueError(
                f"expected tokens that begin with the {'chat' if template else 'plain'} prefix {prefix}, got "
                f"{ids[:start].tolist()}: pass start= (tokens always kept), or template=False for plain text"
            )
    start = checks.whole(start, "start")
    if not 0 <= start < len(ids):
        raise ValueError(f"expected 0 <= start < {len(ids)} (tokens of the cache), got {start}")
    if len(cache.layers) != len(model.config.layers):
        raise ValueError(
            f"expected a cache of {len(model.config.layers)} layers, as the model has, got {len(cache.layers)}: "
            "was it made by this model?"
        )
    return DenseCache(
        layers=[_layer(model, n, layer, len(ids)) for n, layer in enumerate(cache.layers)],
        length=len(ids),
        start=start,
        chat=bool(template),
        token_ids=ids,
        fingerprint=model.fingerprint,
    )


def to_transformers(model: Model, cache: DenseCache | RaggedCache) -> "DynamicCache":
    """Returns a DynamicCache of the same pairs, tail included. `cache` is dense, or compressed with level="uniform".

    A DynamicCache stores no positions, so Transformers takes the number of rows for that of tokens. Pass it the
    positions of the new tokens `ids` [1, T], with length = len(cache.token_ids):

        positions = torch.arange(length, length + T)[None]
        seen = torch.ones(1, length + T, dtype=torch.long)
        theirs.generate(ids, cache=converted, position_ids=positions, attention_mask=seen)

    (Some versions call it `past_key_values=`.) The same `position_ids` serve a plain forward pass. Quantized rows
    are dequantized to the model's dtype. The pairs are copied.

    Raises: ValueError for a cache of another model, with heads that differ in length, or with biases (`refit`).
    """
    check_kind(model, Model)
    check_kind(cache, DenseCache, RaggedCache)
    _library()
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    check_belongs(model, cache)
    check_whole_model(model, "to_transformers")
    cache = as_ragged(cache)
    if any(isinstance(kv, RaggedKV) and kv.bias is not None for kv in cache.context):
        raise ValueError(
            "expected a cache without biases, got a refitted one: attention in Transformers has no bias for a row, and "
            "without it the values are wrong; convert the cache that compress returned"
        )
    counts = {count for kv in cache.context if isinstance(kv, RaggedKV) for count in kv.offsets.diff().tolist()}
    if len(counts) > 1:
        raise ValueError(
            f"expected heads of one length in all layers, got {min(counts)} to {max(counts)} rows, which Transformers "
            "cannot hold: compress with level='uniform'"
        )
    length = len(cache.token_ids)
    converted = DynamicCache()
    for index, (kv, spec) in enumerate(zip(cache.context, model.config.layers, strict=True)):
        layer: Any = DynamicLayer() if spec.window is None else DynamicSlidingWindowLayer(sliding_window=spec.window)
        layer.update(_rows(cache, kv, index, "k", model.dtype), _rows(cache, kv, index, "v", model.dtype))
        if spec.window is not None:
            layer.cumulative_length = length
        converted.layers.append(layer)
    return converted


def _layer(model: Model, index: int, layer: Any, length: int) -> DenseKV | WindowKV:
    """Checks one layer of a Transformers cache and returns it as ours."""
    config, window = model.config, model.config.layers[index].window
    rows: list[Any] = [getattr(layer, name, None) for name in ("keys", "values")]
    found = [list(x.shape) if isinstance(x, Tensor) else None for x in rows]
    fewest = length if window is None else min(length, window - 1)
    fits = all(
        isinstance(x, Tensor)
        and x.dtype == model.dtype
        and x.ndim == 4
        and (x.shape[0], x.shape[1], x.shape[3]) == (1, config.num_kv_heads, config.head_dim)
        and (x.shape[2] == length if window is None else x.shape[2] >= fewest)
        for x in rows
    )
    if not fits or found[0] != found[1] or layer.get_seq_length() != length:
        raise ValueError(
            f"expected keys and values [1, {config.num_kv_heads}, {fewest}, {config.head_dim}] in {model.dtype} of "
            f"{length} tokens in layer {index}, got {found[0]} and {found[1]}: pass all token ids of a cache of this "
            "model, in its dtype"
        )
    k, v = (x[:, :, -(window or length) :].to(model.device).contiguous() for x in rows)
    return DenseKV(k, v) if window is None else WindowKV(k, v, length - k.shape[2])


def _rows(
    cache: RaggedCache, kv: RaggedKV | WindowKV, index: int, name: str, dtype: torch.dtype
) -> Float[Tensor, "1 H S D"]:
    """Keys or values of one uniform layer, followed by those of its tail."""
    rows = getattr(kv, name)
    if isinstance(kv, RaggedKV):
        rows = rows if isinstance(rows, Tensor) else ops.dequantize(rows, dtype=dtype, offsets=kv.offsets)
        rows = rearrange(rows, "(h s) d -> 1 h s d", h=kv.heads)
    if cache.tail is None:
        return rows
    return torch.cat([rows, getattr(cache.tail, name)[index][:, :, : len(cache.token_ids) - cache.context_length]], 2)


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "expected Transformers, got no such package: pip install 'transformers>=5,<6' "
            "(in a checkout pip install -e '.[transformers]')"
        ) from error
    return transformers
