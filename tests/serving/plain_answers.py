"""The oracle of the engine: a question answered by a plain loop of the forward pass and the reference of attention."""

import torch
from torch import Tensor

import kvzip
from kvzip.cache import all_ragged, as_ragged
from kvzip.models import forward, logits
from kvzip.ops.decode import decode_reference

APART = 1e-4  # of the largest logit: two tokens closer than this may be taken for each other


def answer(model, cache, ids: list[int], tokens: int) -> tuple[list[int], list[bool]]:
    """Returns the likeliest tokens one after the other, and whether each is clearly likelier than the second."""
    if cache is None:
        width, heads = model.config.head_dim, model.config.num_kv_heads
        none = torch.zeros(heads + 1, dtype=torch.int32)
        layers = [(torch.empty(0, width, dtype=model.dtype),) * 2 + (none,) for _ in model.config.layers]
        biases = [None for _ in layers]
        start, past = 0, 0
    else:
        cache = as_ragged(cache)
        given_layers = all_ragged(cache.context)
        layers = [(layer.k, layer.v, layer.offsets) for layer in given_layers]
        biases = [layer.bias for layer in given_layers]
        start, past = cache.context_length, len(cache.token_ids) - cache.context_length
    shape = (1, model.config.num_kv_heads, 0, model.config.head_dim)
    k = [torch.empty(shape, dtype=model.dtype) for _ in layers]
    v = [torch.empty(shape, dtype=model.dtype) for _ in layers]
    if cache is not None and cache.tail is not None:
        k, v = ([x[:, :, :past] for x in part] for part in (cache.tail.k, cache.tail.v))

    def attend(layer: int, q: Tensor, new_k: Tensor, new_v: Tensor) -> Tensor:
        k[layer], v[layer] = torch.cat([k[layer], new_k], dim=2), torch.cat([v[layer], new_v], dim=2)
        seen = torch.tensor([k[layer].shape[2]], dtype=torch.int32)
        config = model.config
        return decode_reference(
            q, *layers[layer], scale=config.attn_scale, softcap=config.attn_softcap,
            window=config.layers[layer].window, bias=biases[layer], tail=(k[layer], v[layer], seen),
        )[0]  # fmt: skip

    said, clear, given, at = [], [], list(ids), start + past
    for _ in range(tokens):
        positions = torch.arange(at, at + len(given))
        with torch.no_grad():
            scores = logits(model, forward(model, torch.tensor([given]), positions, attend)[0, -1])
        top = scores.topk(2).values
        said.append(int(scores.argmax()))
        clear.append(float(top[0] - top[1]) > APART * float(scores.abs().max()))
        at += len(given)
        given = said[-1:]
    return said, clear


def assert_said(got: kvzip.Answer, expected: tuple[list[int], list[bool]]) -> int:
    """An answer is the expected one, up to the first token that is not clearly the likeliest; how many that are."""
    said, clear = expected
    certain = clear.index(False) if False in clear else len(clear)
    assert got.token_ids[:certain] == said[:certain]
    assert len(got.token_ids) == len(said)
    return certain
