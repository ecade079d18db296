"""Talks about a compressed document: turns are remembered, a conversation is forked, and folded into the context.

    python examples/chat.py [MODEL] [--ratio 0.3] [--document FILE]

A cache is one state of a conversation: every turn returns another, and the old one can still be asked.
"""

import sys
from collections.abc import Sequence

import kvzip
import museum

FIRST = "Who is the director of the museum?"
FORKS = ("Which day is the museum closed?", "What is the violin insured for?")
LAST = "Who is the mayor of Port Selden?"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example; returns the exit status."""
    arguments = museum.parser(__doc__, tokens=48).parse_args(argv)
    model = museum.load(arguments.model)
    document = arguments.document.read_text(encoding="utf-8").strip()
    chat = model.template is not None  # a base model continues the text instead
    small = kvzip.compress(kvzip.score(model, kvzip.prefill(model, document, template=chat)), arguments.ratio)
    print(f"{small.kept / small.total:.0%} of {len(small.token_ids):,} tokens' pairs kept: {museum.megabytes(small)}")

    def turn(cache: kvzip.RaggedCache, query: str) -> kvzip.RaggedCache:
        """Asks, prints, and returns the cache that remembers the turn. `cache` itself stays as it is."""
        print(f"\n> {query}")
        query = query if chat else f"\n\nQuestion: {query}\nAnswer:"
        answer, after = kvzip.ask(model, cache, query, max_tokens=arguments.tokens, template=chat)
        print(f"{answer.text.strip()}\n  [{len(after.token_ids) - after.context_length} tokens in the tail]")
        return after

    told = turn(small, FIRST)
    branches = [turn(kvzip.fork(told), query) for query in FORKS]  # two conversations that share the first turn
    longest = max(branches, key=lambda cache: len(cache.token_ids))
    folded = kvzip.fold(model, longest, 0.5)
    print(f"\nfolded: {longest.kept:,} pairs and a tail of {len(longest.token_ids) - longest.context_length} tokens")
    print(f"became {folded.kept:,} pairs and no tail: half of the tail's pairs stay")
    turn(folded, LAST)
    return 0


if __name__ == "__main__":
    sys.exit(main())
