"""Asks two documents at once, several readers of each, with one engine.

    python examples/many_documents.py [MODEL] [--ratio 0.3] [--document FILE]

The document is cut into two, and each half is compressed. Every question goes to both: only one half has the answer.
All answers grow in the same steps of the model, and each half is read once a step for all of its readers.
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
    paragraphs = arguments.document.read_text(encoding="utf-8").strip().split("\n\n")
    middle = (len(paragraphs) + 1) // 2
    halves = {"first": "\n\n".join(paragraphs[:middle]), "second": "\n\n".join(paragraphs[middle:])}
    with kvzip.Engine(model) as engine:
        contexts = {}
        for name, text in halves.items():
            full = kvzip.score(model, kvzip.prefill(model, text, template=False))
            contexts[name] = engine.add(kvzip.compress(full, arguments.ratio))
            print(f"{name} half: {full.length:,} tokens, {contexts[name].nbytes / 1e6:.1f} MB kept")
        start, before = time.perf_counter(), engine.facts["steps"]
        how = {"max_tokens": arguments.tokens, "stop": "\n", "template": False}
        asked = [
            (question, name, engine.submit(context, f"\n\n{question.opening}", **how))
            for question in museum.FIVE
            for name, context in contexts.items()
        ]
        for question, name, handle in asked:
            text = handle.result().text
            print(f"{name:6} {museum.mark(question, text)} {question.opening} ...{text}")
        steps = engine.facts["steps"] - before
        print(f"{len(asked)} answers in {steps} steps and {time.perf_counter() - start:.2f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
