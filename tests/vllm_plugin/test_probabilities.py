"""Log-probabilities of answers from documents, by the accuracy rule: on a CPU, and on a GPU with CUDA graphs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import kvzip
import small_checkpoint
from accuracy import assert_as_accurate
from kvzip.attention import decode_attend
from kvzip.cache import RaggedCache, all_ragged, empty_tail, load_cache, read_header
from kvzip.inputs import query_ids
from kvzip.models import forward, logits
from vllm_engines import running

GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if GPU else torch.float32
TEXTS = {name: " ".join(f"{name}{n} is {n * n % 97}." for n in range(60)) for name in "ab"}
QUESTIONS = ("What is a7?", "And which of all these numbers are squares of others?")
TOKENS = 24
GRAPHS: dict[str, dict[str, Any]] = {"eager": {"enforce_eager": True}}
if GPU:
    for mode in ("PIECEWISE", "FULL_AND_PIECEWISE", "FULL"):
        GRAPHS[mode] = {"enforce_eager": False, "compilation_config": {"cudagraph_mode": mode}}


def log_probabilities(model: Any, cache: RaggedCache, ids: list[int]) -> torch.Tensor:
    """Those of the token behind each of `ids`, which follow the context, by kvzip on the CPU in the model's dtype."""
    tail = empty_tail(cache.context, 1, len(ids), dtype=model.dtype)
    positions = torch.arange(cache.context_length, cache.context_length + len(ids))
    with torch.no_grad():
        attend = decode_attend(model.config, all_ragged(cache.context), tail)
        hidden = forward(model, torch.tensor([ids]), positions, attend)
        return logits(model, hidden)[0].log_softmax(-1)


def widened(cache: RaggedCache) -> RaggedCache:
    """The same pairs in float64."""
    layers = [replace(x, k=_wide(x, "k"), v=_wide(x, "v")) for x in cache.context]
    return replace(cache, context=tuple(layers))


def _wide(layer: Any, name: str) -> torch.Tensor:
    """Keys or values in float64; quantized rows stand for their value in exact arithmetic."""
    x = getattr(layer, name)
    if isinstance(x, torch.Tensor):
        return x.double()
    codes = x.codes if x.bits == 8 else torch.stack([x.codes >> 4, x.codes & 15], dim=2).flatten(1)
    steps = codes.double().unflatten(1, (-1, x.group))
    rest = (steps * x.scale.double()[..., None] + x.zero.double()[..., None]).flatten(1)
    if x.channels is None:
        return rest
    counts = layer.offsets.diff().long()
    spread, center = (t.double().repeat_interleave(counts, 0) for t in (x.channels.spread, x.channels.center))
    return rest * spread + center


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("graphs", GRAPHS)
def test_answers_obey_the_accuracy_rule(tmp_path: Path, graphs: str, bits: int | None) -> None:
    """Two documents and two questions each, asked together; a fifth request has no document.

    vLLM's most likely tokens are followed: each distribution is compared with that of the same model and the same pairs
    in float64, and each token is as likely there as the best but for those errors.
    """
    directory = small_checkpoint.write(tmp_path / "model", dtype=DTYPE)
    model = kvzip.load(directory, dtype=DTYPE)
    documents = {}
    for name, ratio in (("a", 0.3), ("b", 0.5)):
        cache = kvzip.compress(kvzip.score(model, kvzip.prefill(model, TEXTS[name])), ratio=ratio, bits=bits)
        documents[name] = str(tmp_path / f"{name}.kvz")
        kvzip.save(cache, documents[name], model=model)
    plain, exact = (kvzip.load(directory, dtype=dtype, device="cpu") for dtype in (DTYPE, torch.float64))
    caches = {name: load_cache(path, model=plain) for name, path in documents.items()}
    asked = [(n, ids) for n, c in caches.items() for ids in query_ids(plain, c, list(QUESTIONS), template=True)]
    with running(directory, {"documents": documents, "bits": bits}, **_options(graphs)) as engine:
        assert engine.collective_rpc("kvzip_list")[0]["answer"][0]["tokens"] == read_header(documents["a"])["tokens"]
        mode = engine.llm_engine.vllm_config.compilation_config.cudagraph_mode
        assert graphs == "eager" or mode.name == graphs  # vLLM lowers what a backend does not support
        from vllm import SamplingParams

        params = [
            SamplingParams(
                max_tokens=TOKENS, temperature=0, ignore_eos=True, detokenize=False, logprobs=-1,
                extra_args={"kvzip": name} if name else None,
            )
            for name in [*(n for n, _ in asked), None]
        ]  # fmt: skip
        prompts = [{"prompt_token_ids": ids} for ids in [*(ids for _, ids in asked), asked[0][1]]]
        outputs = engine.generate(prompts, params, use_tqdm=False)
    found, plainly, exactly = [], [], []
    for (name, ids), output in zip(asked, outputs, strict=False):
        answer = output.outputs[0]
        tokens = list(answer.token_ids)
        vocabulary = range(small_checkpoint.WORDS)
        found.append(torch.tensor([[step[token].logprob for token in vocabulary] for step in answer.logprobs]))
        followed = [*ids, *tokens[:-1]]
        plainly.append(log_probabilities(plain, caches[name], followed)[len(ids) - 1 :])
        exactly.append(log_probabilities(exact, widened(caches[name]), followed)[len(ids) - 1 :])
        worst = (plainly[-1].double() - exactly[-1]).abs().max()
        chosen = exactly[-1].gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert bool((exactly[-1].max(-1).values - chosen <= 4 * worst + 1e-6).all())
    assert_as_accurate(torch.stack(found).to(DTYPE), torch.stack(exactly), torch.stack(plainly))
    assert outputs[-1].outputs[0].token_ids != outputs[0].outputs[0].token_ids


def _options(graphs: str) -> dict[str, Any]:
    return {"dtype": str(DTYPE).removeprefix("torch."), "max_logprobs": -1, **GRAPHS[graphs]}
