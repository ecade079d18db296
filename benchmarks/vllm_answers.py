"""Answers of vLLM in benchmarks: random weights that it shares with kvzip, random documents, and the checks of both."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from kvzip.attention import decode_attend
from kvzip.cache import RaggedCache, RaggedKV, empty_tail
from kvzip.models import Attend, LayerWeights, Model, ModelConfig, Weights, forward, logits
from kvzip.ops import decode_schedule

QUESTION, CHECKED = 32, 8  # tokens of a question, and of answers that are checked


@torch.no_grad()
def check_documents(
    engine: Any, model: Model, caches: dict[str, RaggedCache], asked: Sequence[Any], users: int
) -> dict[str, Any]:
    """Asks all users' questions in one batch, and follows vLLM's answers to one user of each document.

    The log-probability that vLLM gives to each token that it chose is compared with that of plain float32 attention
    over the same weights and rows: it may be as far from it as twice the worst that kvzip's own decoder is, in vLLM's
    dtype. Another document must be further from it, or nothing would be checked.
    """
    outputs = ask(engine, asked, CHECKED)
    found, exact, other, allowed, same = [], [], [], 0.0, 0
    names = list(caches)
    for (name, ids), output in list(zip(asked, outputs, strict=True))[::users]:
        answer = output.outputs[0]
        tokens = torch.tensor(answer.token_ids)
        followed = [*ids, *answer.token_ids[:-1]]
        found.append(torch.tensor([step[int(t)].logprob for step, t in zip(answer.logprobs, tokens, strict=True)]))
        own, truth = (log_probabilities(model, caches[name], followed, plainly=x) for x in (False, True))
        allowed = max(allowed, float((own - truth).abs().max()))
        exact.append(truth.gather(1, tokens[:, None])[:, 0])
        same += int((own.argmax(-1) == tokens).sum())
        wrong = caches[names[names.index(name) - 1]] if len(names) > 1 else replace(caches[name], context_length=0)
        other.append(log_probabilities(model, wrong, followed, plainly=False).gather(1, tokens[:, None])[:, 0])
    vllm, truth, wrong = (torch.stack(x).float() for x in (found, exact, other))
    worst, elsewhere = (float((x - truth).abs().max()) for x in (vllm, wrong))
    told = {"tokens": vllm.numel(), "same": same, "worst": worst, "kvzip_worst": allowed, "other_document": elsewhere}
    bound = 2 * allowed + torch.finfo(model.dtype).eps * float(truth.abs().max())
    assert worst <= bound < elsewhere, f"expected log-probabilities within {bound:.4f} of the truth, got {told}"
    answers = {tuple(x.outputs[0].token_ids) for x in outputs}
    assert len(answers) > len(outputs) // 2, "answers do not depend on their questions"
    return {name: round(value, 4) for name, value in told.items()}


def check_prefixes(engine: Any, requests: Sequence[Any], users: int) -> dict[str, Any]:
    """Reads the documents one after the other, then asks all in one batch, which must take them from the cache.

    Each answer of the batch must begin with a token that is among the five likeliest of the same request alone.
    """
    first = [output for n in range(0, len(requests), users) for output in ask(engine, requests[n : n + 1], CHECKED)]
    again = ask(engine, requests, CHECKED)
    cached = [x.num_cached_tokens for x in again]
    tokens = len(requests[0][1]) - QUESTION
    assert min(cached) >= tokens - 256, f"only {min(cached)} of {tokens} tokens came from the cache"
    alone, batch = ([x.outputs[0] for x in outputs] for outputs in (first, again[::users]))
    assert all(b.token_ids[0] in a.logprobs[0] for a, b in zip(alone, batch, strict=True)), "other answers in a batch"
    same = sum(a.token_ids[0] == b.token_ids[0] for a, b in zip(alone, batch, strict=True))
    return {"tokens": len(first), "same": same, "cached": min(cached)}


def ask(engine: Any, requests: Sequence[Any], count: int) -> list[Any]:
    """The requests' answers, with the five likeliest tokens of each step."""
    prompts = [{"prompt_token_ids": ids} for _, ids in requests]
    return engine.generate(prompts, [sampling(name, count, logprobs=5) for name, _ in requests], use_tqdm=False)


def sampling(name: str | None, count: int, **given: Any) -> Any:
    """Parameters of a greedy request."""
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=count, temperature=0, ignore_eos=True, detokenize=False,
        extra_args=None if name is None else {"kvzip": name}, **given,
    )  # fmt: skip


def log_probabilities(model: Model, cache: RaggedCache, ids: Sequence[int], *, plainly: bool) -> torch.Tensor:
    """Those of the tokens behind a question, [tokens, V] in float32: by kvzip's decoder, or plainly in float32."""
    start, weights = cache.context_length, model.weights
    token_ids = torch.tensor([ids], device=model.device)
    positions = torch.arange(start, start + len(ids), device=model.device)
    if plainly:
        wide = replace(weights, embed=weights.embed.float(), norm=weights.norm.float(), unembed=weights.unembed.float(),
                       layers=(widened(layer) for layer in weights.layers))  # fmt: skip
        model = replace(model, weights=wide, dtype=torch.float32)
        attend = plain_attend(cache, model.config.attn_scale)
    else:
        attend = decode_attend(model.config, cache.context, empty_tail(cache.context, 1, len(ids), dtype=model.dtype))
    hidden = forward(model, token_ids, positions, attend)
    return logits(model, hidden)[0, QUESTION - 1 :].float().log_softmax(-1).cpu()


def widened(layer: LayerWeights) -> LayerWeights:
    """A layer's weights in float32."""
    return replace(layer, **{name: x.float() for name, x in vars(layer).items() if x is not None})


def plain_attend(cache: RaggedCache, scale: float) -> Attend:
    """Attention of new tokens to a document and to each other, head by head."""

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        context, tokens = cache.context[layer], q.shape[2]
        bounds = context.offsets.tolist()
        later = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)
        out = []
        for head, queries in enumerate(q[0].unflatten(0, (k.shape[1], -1))):
            rows = slice(bounds[head], bounds[head + 1])
            keys, values = (torch.cat([a[rows].to(q.dtype), b[0, head]]) for a, b in ((context.k, k), (context.v, v)))
            weights = queries @ keys.T * scale
            weights[..., -tokens:].masked_fill_(later, -torch.inf)
            out.append(weights.softmax(-1) @ values)
        return torch.cat(out)[None]

    return attend


def weights_of(engine: Any, config: ModelConfig) -> Model:
    """Fills vLLM's parameters with normal weights, and returns kvzip's model of the same memory."""
    model = runner(engine).model
    draw = torch.Generator(device=next(model.parameters()).device).manual_seed(0)
    for name, x in model.named_parameters():
        if x.ndim == 1:
            x.data.fill_(1.0 if "norm" in name else 0.0)
        else:
            spread = 1.0 if "embed" in name else x.shape[-1] ** -0.5
            x.data.normal_(0.0, spread, generator=draw)
    found = {name.removeprefix("model."): x.data for name, x in model.named_parameters()}

    def layer(n: int) -> LayerWeights:
        def of(name: str) -> Any:
            return found.get(f"layers.{n}.{name}")

        return LayerWeights(
            attn_norm=of("input_layernorm.weight"),
            qkv=of("self_attn.qkv_proj.weight"),
            qkv_bias=of("self_attn.qkv_proj.bias"),
            q_norm=of("self_attn.q_norm.weight"),
            k_norm=of("self_attn.k_norm.weight"),
            o=of("self_attn.o_proj.weight"),
            o_bias=None,
            attn_post_norm=None,
            mlp_norm=of("post_attention_layernorm.weight"),
            gate_up=of("mlp.gate_up_proj.weight"),
            down=of("mlp.down_proj.weight"),
            mlp_post_norm=None,
        )

    embed = found["embed_tokens.weight"][: config.vocab_size]
    head = found.get("lm_head.weight")
    weights = Weights(
        embed=embed,
        layers=tuple(layer(n) for n in range(len(config.layers))),
        norm=found["norm.weight"],
        unembed=embed if head is None else head[: config.vocab_size],
    )
    return Model(
        config=config, weights=weights, tokenizer=None, device=embed.device, dtype=embed.dtype, template=None,
        stop_ids=(), checkpoint="random", source="random",
    )  # fmt: skip


def document(model: Model, tokens: int, ratio: float, *, seed: int) -> RaggedCache:
    """A document of random rows whose heads keep unequal parts, as scored ones do; a share of `ratio` in all.

    The values of a head have a mean of their own, so that which document is attended to changes what comes out: that of
    many rows with none is nearly 0.
    """
    config, device = model.config, model.device
    draw = torch.Generator().manual_seed(seed)
    layers, heads = len(config.layers), config.num_kv_heads
    shares = torch.rand(layers, heads, generator=draw) ** 2 + 0.05
    if ratio < 1:
        for _ in range(20):  # heads that would keep more than all keep all
            shares = (shares * ratio / shares.mean()).clamp(max=1)
    else:
        shares = torch.ones_like(shares)
    context = []
    on_device = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, config.head_dim, dtype=model.dtype, device=device, generator=on_device)

    for row in shares:
        counts = (row * tokens).int().clamp(min=1)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
        k, v = normal(int(offsets[-1])), normal(int(offsets[-1]))
        v += normal(heads).repeat_interleave(counts.to(device), 0)
        positions = torch.cat([torch.arange(int(n), dtype=torch.int32) for n in counts]).to(device)
        bounds = offsets.tolist()
        offsets = offsets.to(device)
        context.append(RaggedKV(k, v, offsets, positions, decode_schedule(offsets, bounds=bounds)))
    kept = sum(len(x.positions) for x in context)
    return RaggedCache(
        context=tuple(context), tail=None, context_length=tokens, start=0, chat=False,
        token_ids=torch.zeros(tokens, dtype=torch.long), fingerprint=model.fingerprint, kept=kept,
        total=layers * heads * tokens,
    )  # fmt: skip


def runner(engine: Any) -> Any:
    """The model runner of an engine in this process."""
    return engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def documents_of(engine: Any) -> Any:
    """kvzip's documents of an engine."""
    return runner(engine).model_state.documents
