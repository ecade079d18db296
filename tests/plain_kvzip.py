"""KVzip's scores, computed the slow and obvious way on top of Transformers' own model. An oracle: it imports no kvzip.

The cache keeps every token of every layer, and Transformers' masks hide what a sliding layer must not see, so that
dropping the repeat again is a plain crop. Written from the paper (arXiv 2505.23416) and its published algorithm.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb  # the same rotation in every family

FIRST_PROMPT = "\n\nRepeat the previous context exactly."
LATER_PROMPT = "\n\nRepeat the part of the previous context exactly, starting with "


@dataclass(frozen=True)
class Repeat:
    """One teacher-forced repetition: context tokens [start, stop), and the ids that repeat them."""

    start: int
    stop: int
    token_ids: list[int]


@dataclass(frozen=True)
class PlainScores:
    """Scores [L H C] of the scored layers, the final hidden states [T M] of each repeat pass, the cache left over."""

    values: Tensor
    layers: list[int]
    repeats: list[Repeat]
    hidden: list[Tensor] = field(repr=False)
    cache: DynamicCache = field(repr=False)


def repeats(
    context_ids: Sequence[int],
    postfix_ids: Sequence[int],
    encode: Callable[[str], list[int]],
    *,
    chunk: int,
    hint: int = 8,
) -> list[Repeat]:
    """Returns the repetitions that cover the context: prompt, end of the previous chunk, postfix, the chunk itself."""
    context_ids, found = list(context_ids), []
    for start in range(0, len(context_ids), chunk):
        own = context_ids[start : start + chunk]
        if start == 0:
            asked = encode(FIRST_PROMPT)
        else:
            previous = context_ids[start - chunk : start]
            asked = encode(LATER_PROMPT) + previous[-hint:]
        found.append(Repeat(start, start + len(own), asked + list(postfix_ids) + own))
    return found


@torch.no_grad()
def score(
    model: PreTrainedModel,
    prefix_ids: Sequence[int],
    context_ids: Sequence[int],
    postfix_ids: Sequence[int],
    encode: Callable[[str], list[int]],
    *,
    chunk: int,
    hint: int = 8,
    method: str = "kvzip",
) -> PlainScores:
    """Returns each context pair's largest attention while the model repeats the chunk that holds it.

    Args:
        model: a causal model of Transformers. Only its full-attention layers are scored.
        method: "logit" for the largest scaled (and softcapped) product instead; "kvzip+" for the attention times the
            norm of what the pair's value becomes by the query head's part of the output projection, over the norm of
            the hidden state that enters the layer at the repeat's token (KVzap, arXiv 2601.07891, equation 3).
        encode: text to ids, without special tokens.
    """
    sink, end = len(prefix_ids), len(prefix_ids) + len(context_ids)
    layers = full_attention_layers(model)
    values = [torch.full((model.config.num_key_value_heads, len(context_ids)), float("nan")) for _ in layers]
    found, hidden = repeats(context_ids, postfix_ids, encode, chunk=chunk, hint=hint), []
    cache = DynamicCache()  # made without a config, every layer keeps every token
    run(model, [*prefix_ids, *context_ids], cache)
    for repeat in found:
        with captured_queries(model, layers) as queries, captured_inputs(model, layers) as inputs:
            hidden.append(run(model, repeat.token_ids, cache))
        columns = slice(sink + repeat.start, sink + repeat.stop)
        for row, layer in zip(values, layers, strict=True):
            keys = cache.layers[layer].keys[0]  # [H, end + T, D]
            seen = torch.cat([keys[:, :sink], keys[:, columns], keys[:, end:]], dim=1)
            module = model.model.layers[layer].self_attn
            logits = attention_logits(module, queries[layer], seen)  # [Hq, T, A + C + T]
            weights = logits if method == "logit" else logits.softmax(dim=-1)
            chunk_weights = weights[:, :, sink : sink + repeat.stop - repeat.start]
            if method == "kvzip+":
                group = len(queries[layer]) // len(keys)
                values_of = cache.layers[layer].values[0][:, columns].repeat_interleave(group, dim=0)  # [Hq, C, D]
                projections = module.o_proj.weight.unflatten(1, (len(values_of), -1)).transpose(0, 1)  # [Hq, M, D]
                sizes = (values_of @ projections.mT).norm(dim=-1)  # [Hq, C]
                chunk_weights = chunk_weights * sizes[:, None] / inputs[layer].norm(dim=-1)[:, None]
            largest = chunk_weights.unflatten(0, (keys.shape[0], -1)).amax(dim=(1, 2))
            row[:, repeat.start : repeat.stop] = largest
        cache.crop(-len(repeat.token_ids))
        assert cache.get_seq_length() == end
    return PlainScores(torch.stack(values), layers, found, hidden, cache)


def select(scores: Tensor, ratio: float) -> Tensor:
    """Returns the mask of the int(ratio * all) highest scores of all layers and heads, ties in index order."""
    order = torch.argsort(scores.flatten(), descending=True, stable=True)
    keep = torch.zeros(scores.numel(), dtype=torch.bool)
    keep[order[: int(ratio * scores.numel())]] = True
    return keep.view(scores.shape)


def full_attention_layers(model: PreTrainedModel) -> list[int]:
    """Returns the indices of the layers without a window."""
    types = getattr(model.config, "layer_types", None) or ["full_attention"] * model.config.num_hidden_layers
    return [index for index, kind in enumerate(types) if kind == "full_attention"]


def cache_argument(model: PreTrainedModel) -> str:
    """Returns what this version of Transformers calls the cache: `cache`, or `past_key_values` as 5.20 does."""
    names = inspect.signature(model.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


@torch.no_grad()
def run(model: PreTrainedModel, token_ids: Sequence[int], cache: DynamicCache) -> Tensor:
    """Returns the final hidden states [T M] of ids that follow what the cache holds, which grows by them."""
    past = cache.get_seq_length()
    positions = torch.arange(past, past + len(token_ids))[None]
    ids = torch.tensor([list(token_ids)])
    past_rows = {cache_argument(model): cache}
    return model.model(ids, position_ids=positions, use_cache=True, **past_rows).last_hidden_state[0]


@contextmanager
def captured_queries(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Yields a dict that a forward pass fills with each layer's queries [Hq T D], normed and rotated."""
    queries: dict[int, Tensor] = {}

    def capture(layer: int) -> Callable[[nn.Module, tuple, dict], None]:
        def hook(module: nn.Module, _: tuple, inputs: dict) -> None:
            q = module.q_proj(inputs["hidden_states"]).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
            if hasattr(module, "q_norm"):
                q = module.q_norm(q)
            q, _ = apply_rotary_pos_emb(q, q, *inputs["position_embeddings"])
            queries[layer] = q[0]

        return hook

    handles = [
        model.model.layers[layer].self_attn.register_forward_pre_hook(capture(layer), with_kwargs=True)
        for layer in layers
    ]
    try:
        yield queries
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def captured_inputs(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Yields a dict that a forward pass fills with the hidden states [T M] that enter each layer."""
    inputs: dict[int, Tensor] = {}

    def capture(layer: int) -> Callable[[nn.Module, tuple], None]:
        def hook(module: nn.Module, arguments: tuple) -> None:
            inputs[layer] = arguments[0][0]

        return hook

    handles = [model.model.layers[layer].register_forward_pre_hook(capture(layer)) for layer in layers]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def attention_logits(module: nn.Module, queries: Tensor, keys: Tensor) -> Tensor:
    """Returns masked logits [Hq T N]; the last T keys are the queries' own tokens, all others are older."""
    keys = keys.repeat_interleave(queries.shape[0] // keys.shape[0], dim=0)
    logits = (queries.float() @ keys.float().mT) * module.scaling
    softcap = getattr(module, "attn_logit_softcapping", None)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    own = queries.shape[1]
    future = torch.ones(own, own, dtype=torch.bool).triu(1)
    logits[:, :, -own:] = logits[:, :, -own:].masked_fill(future, float("-inf"))
    return logits
