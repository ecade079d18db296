"""Scores a document's pairs by a rule of one's own, and compares what it keeps with what kvzip's scores keep.

    python examples/custom_scorer.py [MODEL] [--ratio 0.3] [--document FILE]

A scorer is any function that makes `kvzip.Scores`: one number for each pair, the larger ones kept first. Everything
after it (levels, budgets, quantization, saving, reports) works as with kvzip's own.
"""

import sys
from collections.abc import Sequence

import torch

import kvzip
import museum
from kvzip.cache import DenseKV, global_layers


def by_key_norm(cache: kvzip.DenseCache) -> kvzip.Scores:
    """Scores a pair by how short its key is: short keys tend to draw attention (arXiv 2406.11430)."""
    keys = [kv.k[0, :, cache.start :].float() for kv in cache.layers if isinstance(kv, DenseKV)]  # [H E D] each
    values = -torch.stack(keys).norm(dim=-1)  # [L H E]
    return kvzip.Scores(values, global_layers(cache), cache.start, cache.length, "short-keys")


def at_random(cache: kvzip.DenseCache) -> kvzip.Scores:
    """Scores a pair by a draw, which is what any rule has to beat."""
    like = by_key_norm(cache).values
    values = torch.rand(like.shape, generator=torch.Generator().manual_seed(0)).to(like.device)
    return kvzip.Scores(values, global_layers(cache), cache.start, cache.length, "random")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example; returns the exit status."""
    arguments = museum.parser(__doc__).parse_args(argv)
    model = museum.load(arguments.model)
    document = arguments.document.read_text(encoding="utf-8").strip()
    full = kvzip.score(model, kvzip.prefill(model, document, template=False))
    ours = kvzip.keep_mask(full.scores, arguments.ratio)
    for scores in (full.scores, by_key_norm(full), at_random(full)):
        shared = (kvzip.keep_mask(scores, arguments.ratio) & ours).sum() / ours.sum()
        small = kvzip.compress(kvzip.scores.attach(full, scores), arguments.ratio)
        print(f"{small.method}: {small.kept:,} of {small.total:,} pairs, {shared:.0%} of them those of kvzip's scores")
        museum.ask_five(model, small, arguments.tokens)
    return 0


if __name__ == "__main__":
    sys.exit(main())
