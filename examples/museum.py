"""What the examples share: a guide through a museum, questions about it, and the small model that answers them."""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import kvzip

DEFAULT_MODEL = "smollm2-135m-instruct"
DOCUMENT = Path(kvzip.__file__).parent / "data" / "museum.txt"


@dataclass(frozen=True)
class Question:
    """The beginning of a sentence and the text that its continuation must contain."""

    opening: str
    expected: str


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
FIVE = tuple(QUESTIONS[i] for i in (3, 17, 21, 25, 29))
"""Questions that the small model answers, and whose answers stand far apart in the document."""


def parser(description: str | None, *, tokens: int = 12) -> argparse.ArgumentParser:
    """Returns a parser of what most examples take: a model, a document, a ratio, and how long an answer may be."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model", nargs="?", help=f"local Hugging Face directory or hub id (default: {DEFAULT_MODEL})")
    made.add_argument("--ratio", type=float, default=0.3, help="fraction of the document's pairs that is kept")
    made.add_argument("--document", type=Path, default=DOCUMENT)
    made.add_argument("--tokens", type=int, default=tokens, help="tokens of an answer, at most")
    return made


def load(source: str | None, dtype: torch.dtype | None = None) -> kvzip.Model:
    """Returns the model, by default the small one; ends the program where that cannot be had."""
    try:
        return kvzip.load(source or "small", dtype=dtype or default_dtype())
    except OSError as missing:
        sys.exit(str(missing))


def default_dtype() -> torch.dtype:
    """Returns bfloat16 with a GPU, else float32: most CPUs run bfloat16 several times slower."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def is_right(question: Question, answer: str) -> bool:
    """Whether the answer contains the expected text, case and spacing apart."""
    return " ".join(question.expected.lower().split()) in " ".join(answer.lower().split())


def mark(question: Question, answer: str) -> str:
    """Returns a mark for right or wrong."""
    return "\u2713" if is_right(question, answer) else "\u2717"


def megabytes(cache: kvzip.DenseCache | kvzip.RaggedCache) -> str:
    """Returns the size of a cache, as in `12.3 MB`."""
    return f"{kvzip.nbytes(cache) / 1e6:.1f} MB"


def ask_five(model: kvzip.Model, cache: kvzip.DenseCache | kvzip.RaggedCache, tokens: int) -> None:
    """Asks the five questions of a cache as one batch, each as a new paragraph after the document, and prints them."""
    openings = [f"\n\n{question.opening}" for question in FIVE]
    answers = kvzip.generate(model, cache, openings, max_tokens=tokens, stop=["\n"], template=False)
    for question, answer in zip(FIVE, answers, strict=True):
        print(f"  {mark(question, answer.text)} {question.opening} ...{answer.text}")
