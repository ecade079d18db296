"""Asks 32 questions of one compressed document in one batch.

    python examples/many_questions.py [MODEL] [--ratio 0.3] [--document FILE]

The document is read, scored and compressed once; the questions share the one frozen context, and each has a small tail
of its own. MODEL is a local Hugging Face directory or a hub id; by default SmolLM2-135M-Instruct out of a registry
package, for which the questions, beginnings of sentences, are made.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import kvzip
from demo import DEFAULT_MODEL, DOCUMENT, Question, default_dtype, is_right, marked
from small_models import Unavailable, model_dir

ALONE = 4  # questions that are also asked one at a time, for comparison

QUESTIONS = (
    Question("The architect of the rope factory was", "Henrik Vale"),
    Question("The museum was founded by", "Elena Marsh"),
    Question("The present director of the museum is", "Thomas Okafor"),
    Question("The map of the river was painted by the surveyor", "Lucas Brandt"),
    Question("The last ferryman was", "Peter Quill"),
    Question("The bridge was paid for by a tax on", "salt"),
    Question("The boats were painted", "blue"),
    Question("The song that the packers sang is called", "The Silver Morning"),
    Question("The fishing boat Margaret was built in the yard of the brothers", "Dunn"),
    Question("The restoration of the boat was led by the boatbuilder", "Ana Ferreira"),
    Question("The herring left the coast in the year", "1911"),
    Question("When the herring had left, many families moved to", "Canada"),
    Question("The lighthouse at Cape Tallow was designed by the engineer", "Robert Lindqvist"),
    Question("The lighthouse at Cape Tallow is built of white", "granite"),
    Question("The lens of the lighthouse was made in", "Paris"),
    Question("The most famous keeper of the lighthouse was", "Martha Bell"),
    Question("The dog of Martha Bell was named", "Biscuit"),
    Question("The great storm began on the second of", "November"),
    Question("The only ship that was lost in the great storm was the", "Northern Star"),
    Question("The Northern Star was carrying a cargo of", "oranges"),
    Question("The captain of the Northern Star was", "Daniel Roark"),
    Question("The Selden Expedition was led by Captain", "Victor Holm"),
    Question("The ships of the expedition were named", "Patience"),
    Question("The doctor of the expedition was", "Clara Weiss"),
    Question("The diary of Clara Weiss is written in", "green ink"),
    Question("The violin is insured for", "two million dollars"),
    Question("The mineral was named", "holmite"),
    Question("The largest employer in Port Selden is the", "wind turbine factory"),
    Question("The mayor of Port Selden is", "Julia Castellano"),
    Question("The record for the rowing race is held by the", "bakers"),
    Question("The most popular item in the museum shop is a", "tin whistle"),
    Question("The museum is closed on", "Mondays"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example; returns the exit status."""
    parser = argparse.ArgumentParser(description="Ask 32 questions of one compressed document in one batch.")
    parser.add_argument("model", nargs="?", help="local Hugging Face directory or hub id (default: SmolLM2-135M)")
    parser.add_argument("--ratio", type=float, default=0.3, help="fraction of the document's pairs that is kept")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    parser.add_argument("--tokens", type=int, default=8, help="tokens of an answer")
    arguments = parser.parse_args(argv)
    console = Console()
    try:
        source = arguments.model or model_dir(DEFAULT_MODEL)
    except Unavailable as error:
        print(f"{DEFAULT_MODEL}: {error}", file=sys.stderr)
        return 1
    model = kvzip.load(source, dtype=getattr(torch, default_dtype()))
    document = arguments.document.read_text(encoding="utf-8").strip()
    full = kvzip.score(model, kvzip.prefill(model, document, template=False))
    small = kvzip.compress(full, arguments.ratio)
    console.print(
        f"{full.length:,} tokens: {kvzip.nbytes(full) / 1e6:.1f} MB of cache, "
        f"{kvzip.nbytes(small) / 1e6:.1f} MB of it kept"
    )
    del full  # all questions are answered from what is left
    openings = [f"\n\n{question.opening}" for question in QUESTIONS]

    def ask(queries: list[str]) -> tuple[list[str], float]:
        start = time.perf_counter()
        answers = kvzip.generate(model, small, queries, max_tokens=arguments.tokens, stop=["\n"], template=False)
        return [answer.text for answer in answers], time.perf_counter() - start

    answers, together = ask(openings)
    alone = [ask([opening]) for opening in openings[:ALONE]]
    table = Table("", "document, continued")
    for number, (question, answer) in enumerate(zip(QUESTIONS, answers, strict=True), 1):
        table.add_row(str(number), f"{question.opening} {marked(question, answer)}")
    console.print(table)
    right = sum(is_right(question, answer) for question, answer in zip(QUESTIONS, answers, strict=True))
    same = sum(answer == text[0] for answer, (text, _) in zip(answers, alone, strict=False))
    one = sum(seconds for _, seconds in alone) / ALONE
    count = len(QUESTIONS)
    console.print(f"{right} of {count} right; {same} of the {ALONE} that were asked alone too got the same answer.")
    console.print(
        f"One batch took {together:.2f} s; one by one they take {one:.2f} s each, {one * count:.1f} s in all."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
