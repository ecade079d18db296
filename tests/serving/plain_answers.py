"""The oracle of the engine: a question answered by a plain loop of the forward pass and the reference of attention."""

from dataclasses import replace

import torch
from torch import Tensor

import kvzip
from kvzip.cache import all_ragged, as_ragged
from kvzip.cache.caches import map_tensors
from kvzip.models import forward, logits
from kvzip.ops.decode import decode_reference

APART = 1e-4  # of the largest logit: two tokens closer than this may be taken for each other


def answer(model, cache, ids: list[int], tokens: int) -> tuple[list[int], list[bool]]:
    """Returns the likeliest tokens one after the other, and whether each is clearly likelier than the second."""
    say = reader(model, cache)
    said, clear, given = [], [], list(ids)
    for _ in range(tokens):
        scores = say(given)
        top = scores.topk(2).values
        said.append(int(scores.argmax()))
        clear.append(float(top[0] - top[1]) > APART * float(scores.abs().max()))
        given = said[-1:]
    return said, clear


def reader(model, cache):
    """Returns a function that reads ids, after the cache and what it has read so far, to the logits of the last."""
    if cache is None:
        width, heads = model.config.head_dim, model.config.num_kv_heads
        none = torch.zeros(heads + 1, dtype=torch.int32, device=model.device)
        rows = torch.empty(0, width, dtype=model.dtype, device=model.device)
        layers = [(rows, rows, none) for _ in model.config.layers]
        biases = [None for _ in layers]
        at, past = 0, 0
    else:
        cache = as_ragged(cache)
        given_layers = all_ragged(cache.context)
        layers = [(layer.k, layer.v, layer.offsets) for layer in given_layers]
        biases = [layer.bias for layer in given_layers]
        at, past = len(cache.token_ids), len(cache.token_ids) - cache.context_length
    shape, device = (1, model.config.num_kv_heads, 0, model.config.head_dim), model.device
    k = [torch.empty(shape, dtype=model.dtype, device=device) for _ in layers]
    v = [torch.empty(shape, dtype=model.dtype, device=device) for _ in layers]
    if cache is not None and cache.tail is not None:
        k, v = ([x[:, :, :past] for x in part] for part in (cache.tail.k, cache.tail.v))

    def attend(layer: int, q: Tensor, new_k: Tensor, new_v: Tensor) -> Tensor:
        k[layer], v[layer] = torch.cat([k[layer], new_k], dim=2), torch.cat([v[layer], new_v], dim=2)
        seen = torch.tensor([k[layer].shape[2]], dtype=torch.int32, device=device)
        config = model.config
        return decode_reference(
            q, *layers[layer], scale=config.attn_scale, softcap=config.attn_softcap,
            window=config.layers[layer].window, bias=biases[layer], tail=(k[layer], v[layer], seen),
        )[0]  # fmt: skip

    def say(ids: list[int]) -> Tensor:
        nonlocal at
        positions = torch.arange(at, at + len(ids), device=device)
        at += len(ids)
        with torch.no_grad():
            return logits(model, forward(model, torch.tensor([ids], device=device), positions, attend)[0, -1])

    return say


def assert_as_likely_as_rounding_allows(model, cache, ids: list[int], said: list[int]) -> None:
    """Each token of an answer is the likeliest, but for what the accuracy rule lets logits of a dtype differ by.

    If they are wrong by at most twice the worst error of the reference in that dtype plus one ulp of the largest, then
    the exact logit of the token that was chosen is within twice that of the largest.
    """
    wide = map_tensors(
        (model.weights, None if cache is None else as_ragged(cache).context),
        lambda x: x.double() if x.is_floating_point() else x,
    )
    exact = reader(
        replace(model, weights=wide[0], dtype=torch.float64),
        None if cache is None else replace(as_ragged(cache), context=wide[1]),
    )
    plain, given = reader(model, cache), list(ids)
    for token in said:
        right, rounded = exact(given), plain(given).double()
        ulp = torch.finfo(model.dtype).eps * 2 ** right.abs().max().log2().floor()
        allowed = 2 * (2 * (rounded - right).abs().max() + ulp)
        assert right.max() - right[token] <= allowed
        given = [token]


def assert_said(got: kvzip.Answer, expected: tuple[list[int], list[bool]]) -> int:
    """An answer is the expected one, up to the first token that is not clearly the likeliest; how many that are."""
    said, clear = expected
    certain = clear.index(False) if False in clear else len(clear)
    assert got.token_ids[:certain] == said[:certain]
    assert len(got.token_ids) == len(said)
    return certain
