"""Times decoding on the CPU beside Transformers' own generate, on real weights, taking turns.

    python benchmarks/cpu.py MODEL_DIRECTORY [--tokens 2000] [--steps 32] [--rounds 5] [--threads 2] [--no-transformers]

Milliseconds a token after the first: our full cache, our cache at ratio 0.3, and Transformers with its full cache, all
greedy in float32 over the same random context. Lines are appended to benchmarks/results/cpu.jsonl.
"""

import argparse
import copy
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import kvzip
from benchmarks import harness
from benchmarks.shapes import with_scores
from kvzip.machine import timed

RESULTS = harness.RESULTS / "cpu.jsonl"
CPU = torch.device("cpu")
QUESTION = list(range(1000, 1012))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=2_000)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--commit", help="commit to write down, where git cannot be asked")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    facts = {"model": options.model.name, "tokens": options.tokens, **harness.facts("cpu", options.commit)}
    model = kvzip.load(options.model, dtype=torch.float32, device="cpu")
    model = replace(model, stop_ids=())
    ids = torch.randint(1000, 30_000, (options.tokens,), generator=torch.Generator().manual_seed(0))
    cache = with_scores(kvzip.prefill(model, ids), model)
    variants = {
        "kvzip, full cache": ours(model, cache, options.steps),
        "kvzip, ratio 0.3": ours(model, kvzip.compress(cache, 0.3), options.steps),
    }
    if not options.no_transformers:
        variants["transformers, full cache"] = theirs(options.model, cache.token_ids, options.steps)
    times = harness.in_turns(variants, options.rounds)
    for name, found in times.items():
        line = {"what": name, "ms": statistics.median(found), "least_ms": min(found), "most_ms": max(found)}
        print(f"{name:26} {line['ms']:7.1f} ms/token ({line['least_ms']:.1f} to {line['most_ms']:.1f})", flush=True)
        harness.record(options.results, [line], facts, show=False)


def ours(model: kvzip.Model, cache: kvzip.DenseCache | kvzip.RaggedCache, steps: int) -> Callable[[], float]:
    """Milliseconds a step, the question read before the clock starts."""
    decoder = kvzip.Decoder(model, cache, tail=steps + 64)

    def answer() -> None:
        for _ in range(steps):
            decoder.step()
            decoder.fetch()()

    def run() -> float:
        decoder.read([QUESTION])
        return 1e3 * timed(CPU, answer)[1] / steps

    return run


def theirs(directory: Path, token_ids: torch.Tensor, steps: int) -> Callable[[], float]:
    """The same of Transformers' generate, as the difference of a long answer and one token."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        past = model(token_ids[None], use_cache=True, logits_to_keep=1).past_key_values
    prompt = torch.cat([token_ids, torch.tensor(QUESTION)])[None]

    def answer(count: int) -> float:
        greedy = partial(model.generate, prompt, do_sample=False, pad_token_id=0, past_key_values=copy.deepcopy(past))
        return timed(CPU, partial(greedy, max_new_tokens=count, min_new_tokens=count))[1]

    return lambda: 1e3 * (answer(steps + 1) - answer(1)) / steps


if __name__ == "__main__":
    main()
