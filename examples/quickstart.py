"""Compresses a document's cache to 30%, and answers five questions from the whole cache and from what is left.

    python examples/quickstart.py [MODEL] [--ratio 0.3] [--document FILE]

MODEL is a local Hugging Face directory or a hub id; by default SmolLM2-135M-Instruct out of a registry package.
"""

import sys
import time
from collections.abc import Sequence

import kvzip
import museum


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example; returns the exit status."""
    arguments = museum.parser(__doc__).parse_args(argv)
    model = museum.load(arguments.model)
    document = arguments.document.read_text(encoding="utf-8").strip()

    start = time.perf_counter()
    full = kvzip.prefill(model, document, template=False)  # False: plain text, which the questions continue
    read = time.perf_counter()
    full = kvzip.score(model, full)
    scored = time.perf_counter()
    small = kvzip.compress(full, arguments.ratio)
    print(f"read {full.length:,} tokens in {read - start:.1f} s, scored their pairs in {scored - read:.1f} s")
    print(f"kept {small.kept:,} of {small.total:,} pairs: {museum.megabytes(full)} -> {museum.megabytes(small)}\n")

    openings = [f"\n\n{question.opening}" for question in museum.FIVE]
    for title, cache in (("all pairs", full), (f"{arguments.ratio:.0%} of them", small)):
        answers = kvzip.generate(model, cache, openings, max_tokens=arguments.tokens, stop=["\n"], template=False)
        print(f"from {title}:")
        for question, answer in zip(museum.FIVE, answers, strict=True):
            print(f"  {museum.mark(question, answer.text)} {question.opening} ...{answer.text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
