"""Times long documents served to many users by vLLM: its own prefix caching beside kvzip's plugin, on one GPU.

    python benchmarks/vllm_serving.py [--shape llama-3.1-8b] [--tokens 32768] [--loads 1x32 8x4 8x16]
                                      [--ways prefix prefix-fp8 kvzip-0.3 kvzip-1.0]

A load is documents x users of each. Every way and load has a process of its own, in which answers are checked before
times are reported: with kvzip, log-probabilities of vLLM's answers are compared with those of kvzip's own decoder over
the same weights and documents; with prefix caching, every document must come from the cache and answers must be those
that the same users get when they are asked one document after the other. Weights are random. In a step every user gets
a token; figures are the median of steps, and their 99th percentile, from a run without prefills. Each is one JSON line
appended to benchmarks/results/vllm.jsonl.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

from benchmarks import harness  # noqa: E402
from benchmarks.shapes import CONFIGS, shapes  # noqa: E402
from kvzip.cache import RaggedCache, RaggedKV  # noqa: E402
from kvzip.decoding import Decoder  # noqa: E402
from kvzip.models import LayerWeights, Model, Weights, logits, translate_config  # noqa: E402
from kvzip.ops import decode_schedule  # noqa: E402

RESULTS = harness.RESULTS / "vllm.jsonl"
WAYS = ("prefix", "prefix-fp8", "kvzip-0.3", "kvzip-1.0")
QUESTION, CHECKED, TIMED = 32, 8, 96  # tokens: of a question, of answers that are checked, of those that are timed
NATS = 0.05  # how far vLLM's choices may be below the best of kvzip's decoder, both in bfloat16
MEMORY = 0.9  # of the GPU


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=shapes(), default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has, to try this out")
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--loads", nargs="+", default=["1x32", "8x4", "8x16"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--commit", help="named in the results, where git cannot be asked")
    parser.add_argument("--alone", action="store_true", help="one way and one load, in this process, printed")
    given = parser.parse_args()
    if given.alone:
        documents, users = map(int, given.loads[0].split("x"))
        print("RESULT", json.dumps(run(given, given.ways[0], documents, users)), flush=True)
        return
    facts = harness.facts("cuda", given.commit)
    for load in given.loads:
        for way in given.ways:
            command = [sys.executable, __file__, "--alone", "--shape", given.shape, "--tokens", str(given.tokens)]
            command += ["--loads", load, "--ways", way]
            command += [] if given.layers is None else ["--layers", str(given.layers)]
            told = subprocess.run(command, capture_output=True, text=True, check=False)
            lines = [line.removeprefix("RESULT ") for line in told.stdout.splitlines() if line.startswith("RESULT ")]
            if told.returncode or not lines:
                print(f"{way} {load}: not timed\n{told.stdout[-2000:]}\n{told.stderr[-4000:]}", flush=True)
                continue
            harness.record(RESULTS, [json.loads(lines[0])], facts)


def run(given: argparse.Namespace, way: str, documents: int, users: int) -> dict[str, Any]:
    """The figures of one way and load. Raises AssertionError if answers are wrong."""
    with tempfile.TemporaryDirectory() as directory:
        engine = start(Path(directory), given, way, documents * users)
    names = [f"d{n}" for n in range(documents)]
    draw = torch.Generator().manual_seed(0)
    questions = torch.randint(100, 30_000, (documents * users, QUESTION), generator=draw).tolist()
    asked = [(names[n // users], ids) for n, ids in enumerate(questions)]
    if way.startswith("kvzip"):
        model = weights_of(engine, given)
        caches = {
            n: document(model, given.tokens, float(way.removeprefix("kvzip-")), seed) for seed, n in enumerate(names)
        }
        held = documents_of(engine)
        for name, cache in caches.items():
            held.put(name, cache, file=name, key=name)
        size = held.list()[0]["size_bytes"]
        requests: list[Any] = asked
        checked = check_documents(engine, model, caches, asked, users)
    else:
        weights_of(engine, given)
        texts = torch.randint(100, 30_000, (documents, given.tokens), generator=draw).tolist()
        requests = [(None, [*texts[n // users], *ids]) for n, (_, ids) in enumerate(asked)]
        size = page_bytes(engine) * given.tokens
        checked = check_prefixes(engine, requests, users)
    steps, wall = decode(engine, requests)
    median = statistics.median(steps)
    return {
        "way": way,
        "shape": given.shape,
        "layers": given.layers,
        "tokens": given.tokens,
        "documents": documents,
        "users": users,
        "document_bytes": size,
        "documents_that_fit": int(torch.cuda.mem_get_info()[1] * MEMORY - weight_bytes(engine)) // size,
        "tokens_per_second": round(documents * users / median, 1),
        "step_ms": round(median * 1000, 3),
        "p99_ms": round(sorted(steps)[int(len(steps) * 0.99)] * 1000, 3),
        "wall_s": round(wall, 2),
        "steps": len(steps),
        "checked": checked,
    }


def start(directory: Path, given: argparse.Namespace, way: str, sequences: int) -> Any:
    """vLLM with the shape's config and no files of weights, in this process."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "1", "HF_HUB_OFFLINE": "1"}
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    from vllm import LLM

    raw = json.loads((CONFIGS / f"{given.shape}.json").read_text(encoding="utf-8"))
    raw |= {} if given.layers is None else {"num_hidden_layers": given.layers}
    (directory / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    room = QUESTION + TIMED + 32
    options: dict[str, Any] = {"max_model_len": room + (0 if way.startswith("kvzip") else given.tokens)}
    if way.startswith("kvzip"):
        options["attention_backend"] = "CUSTOM"
        options["kv_cache_memory_bytes"] = 4 << 30
    else:
        options["gpu_memory_utilization"] = MEMORY
        options["kv_cache_dtype"] = "fp8" if way.endswith("fp8") else "auto"
    return LLM(
        model=str(directory), skip_tokenizer_init=True, load_format="dummy", dtype="bfloat16", seed=0,
        max_num_seqs=sequences, max_num_batched_tokens=8192, enable_prefix_caching=True, disable_log_stats=False,
        **options,
    )  # fmt: skip


def runner(engine: Any) -> Any:
    """The model runner of an engine in this process."""
    return engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def documents_of(engine: Any) -> Any:
    """kvzip's documents of an engine."""
    return runner(engine).model_state.documents


def page_bytes(engine: Any) -> int:
    """Bytes of one token in vLLM's pages."""
    config = engine.llm_engine.vllm_config
    spec = runner(engine).kv_cache_config.kv_cache_groups[0]
    layers = len(spec.layer_names)
    return spec.kv_cache_spec.page_size_bytes * layers // config.cache_config.block_size


def weight_bytes(engine: Any) -> int:
    """Bytes of the model's parameters."""
    return sum(x.numel() * x.element_size() for x in runner(engine).model.parameters())


def weights_of(engine: Any, given: argparse.Namespace) -> Model:
    """Fills vLLM's parameters with normal weights, and returns kvzip's model of the same memory."""
    model = runner(engine).model
    draw = torch.Generator(device=next(model.parameters()).device).manual_seed(0)
    for name, x in model.named_parameters():
        if x.ndim == 1:
            x.data.fill_(1.0 if "norm" in name else 0.0)
        else:
            spread = 1.0 if "embed" in name else x.shape[-1] ** -0.5
            x.data.normal_(0.0, spread, generator=draw)
    raw = json.loads((CONFIGS / f"{given.shape}.json").read_text(encoding="utf-8"))
    raw |= {} if given.layers is None else {"num_hidden_layers": given.layers}
    config = translate_config(raw)
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
        config=config, weights=weights, tokenizer=None, device=embed.device, dtype=torch.bfloat16, template=None,
        stop_ids=(), checkpoint="random", source="random",
    )  # fmt: skip


def document(model: Model, tokens: int, ratio: float, seed: int) -> RaggedCache:
    """A document of random rows whose heads keep unequal parts, as scored ones do; a share of `ratio` in all."""
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
    for row in shares:
        counts = (row * tokens).int().clamp(min=1)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
        total = int(offsets[-1])
        k, v = (
            torch.randn(total, config.head_dim, dtype=model.dtype, device=device, generator=on_device) for _ in "kv"
        )
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


def sampling(name: str | None, count: int, **given: Any) -> Any:
    """Parameters of a greedy request."""
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=count, temperature=0, ignore_eos=True, detokenize=False,
        extra_args=None if name is None else {"kvzip": name}, **given,
    )  # fmt: skip


def ask(engine: Any, requests: Sequence[Any], count: int) -> list[Any]:
    """The requests' outputs."""
    prompts = [{"prompt_token_ids": ids} for _, ids in requests]
    return engine.generate(prompts, [sampling(name, count) for name, _ in requests], use_tqdm=False)


@torch.no_grad()
def check_documents(
    engine: Any, model: Model, caches: dict[str, RaggedCache], asked: Sequence[Any], users: int
) -> dict[str, Any]:
    """Follows vLLM's answers, of one user of each document, all asked in one batch, with kvzip's own decoder."""
    outputs = ask(engine, asked, CHECKED)
    worst, same, count = 0.0, 0, 0
    for (name, ids), output in list(zip(asked, outputs, strict=True))[::users]:
        tokens = list(output.outputs[0].token_ids)
        decoder = Decoder(model, caches[name], batch=1, tail=QUESTION + CHECKED)
        decoder._replays = False  # the logits are looked at, and a graph has none
        hidden = decoder._forward(torch.tensor([[*ids, *tokens[:-1]]], device=model.device))
        found = logits(model, hidden)[0, QUESTION - 1 :].float().log_softmax(-1).cpu()
        chosen = found.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        worst = max(worst, float((found.max(-1).values - chosen).max()))
        same += int((found.argmax(-1) == torch.tensor(tokens)).sum())
        count += len(tokens)
        assert float(found.std(-1).mean()) > 0.5, "the weights give flat distributions: nothing would be checked"
    assert worst <= NATS, f"vLLM chose a token {worst:.3f} nats below kvzip's best, allowed {NATS}"
    answers = {tuple(x.outputs[0].token_ids) for x in outputs}
    assert len(answers) > len(outputs) // 2, "answers do not depend on their questions"
    return {"tokens": count, "same": same, "worst_nats": round(worst, 4)}


def check_prefixes(engine: Any, requests: Sequence[Any], users: int) -> dict[str, Any]:
    """Reads the documents, and sees that later requests take them from the cache and are answered as before."""
    first = [output for n in range(0, len(requests), users) for output in ask(engine, requests[n : n + 1], CHECKED)]
    again = ask(engine, requests, CHECKED)
    cached = [x.num_cached_tokens for x in again]
    tokens = len(requests[0][1]) - QUESTION
    assert min(cached) >= tokens - 256, f"only {min(cached)} of {tokens} tokens came from the cache"
    pairs = zip(first, again[::users], strict=True)
    same = sum(a.outputs[0].token_ids[0] == b.outputs[0].token_ids[0] for a, b in pairs)
    assert same >= 0.7 * len(first), f"{same} of {len(first)} first tokens are those of the request alone"
    return {"tokens": len(first), "same": same, "cached": min(cached)}


def decode(engine: Any, requests: Sequence[Any]) -> tuple[list[float], float]:
    """Seconds of each step in which all requests got a token and none was read, and of the whole."""
    inner = engine.llm_engine
    begin = time.perf_counter()
    for n, (name, ids) in enumerate(requests):
        inner.add_request(str(n), {"prompt_token_ids": ids}, sampling(name, TIMED))
    ended, lengths = [], []
    while inner.has_unfinished_requests():
        outputs = inner.step()
        ended.append(time.perf_counter())
        lengths.append(
            min((len(x.outputs[0].token_ids) for x in outputs), default=0) if len(outputs) == len(requests) else 0
        )
    steps = [
        ended[n] - ended[n - 1]
        for n in range(1, len(ended))
        if lengths[n - 1] >= 4 and lengths[n] == lengths[n - 1] + 1  # past the first, when all decode
    ]
    assert len(steps) > TIMED // 2, f"only {len(steps)} steps were of decoding alone"
    return steps, ended[-1] - begin


if __name__ == "__main__":
    main()
