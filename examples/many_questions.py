"""Asks 32 questions of one compressed document in one batch.

    python examples/many_questions.py [MODEL] [--ratio 0.3] [--document FILE]

The document is read, scored and compressed once; the questions share the one frozen context, and each has a small tail
of its own.
"""

import sys
import time
from collections.abc import Sequence

import kvzip
import museum
from museum import QUESTIONS

ALONE = 4  # questions that are also asked one at a time, for comparison


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example; returns the exit status."""
    arguments = museum.parser(__doc__, tokens=8).parse_args(argv)
    model = museum.load(arguments.model)
    document = arguments.document.read_text(encoding="utf-8").strip()
    full = kvzip.score(model, kvzip.prefill(model, document, template=False))
    small = kvzip.compress(full, arguments.ratio)
    print(f"{full.length:,} tokens: {museum.megabytes(full)} of cache, {museum.megabytes(small)} of it kept")
    del full  # all questions are answered from what is left

    def ask(openings: list[str]) -> tuple[list[str], float]:
        start = time.perf_counter()
        answers = kvzip.generate(model, small, openings, max_tokens=arguments.tokens, stop=["\n"], template=False)
        return [answer.text for answer in answers], time.perf_counter() - start

    openings = [f"\n\n{question.opening}" for question in QUESTIONS]
    answers, together = ask(openings)
    alone = [ask([opening]) for opening in openings[:ALONE]]
    for number, (question, answer) in enumerate(zip(QUESTIONS, answers, strict=True), 1):
        print(f"{number:4} {museum.mark(question, answer)} {question.opening} ...{answer}")
    right = sum(map(museum.is_right, QUESTIONS, answers))
    same = sum(answer == text[0] for answer, (text, _) in zip(answers, alone, strict=False))
    one = sum(seconds for _, seconds in alone) / ALONE
    count = len(QUESTIONS)
    print(f"{right} of {count} right; {same} of the {ALONE} that were asked alone too got the same answer.")
    print(f"One batch took {together:.2f} s; one by one they take {one:.2f} s each, {one * count:.1f} s in all.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
