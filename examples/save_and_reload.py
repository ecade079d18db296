"""Compresses a document in one process, and answers questions about it in another that has never seen it.

    python examples/save_and_reload.py [--model MODEL] [--ratio 0.3] [--document FILE]

does both, with a file in between that is deleted at the end. By hand, on two machines or two days apart:

    python examples/save_and_reload.py compress museum.kvz
    python examples/save_and_reload.py answer museum.kvz "The museum was founded by"

MODEL is a local Hugging Face directory or a hub id; by default SmolLM2-135M-Instruct out of a registry package.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import kvzip
from demo import DEFAULT_MODEL, DOCUMENT, QUESTIONS, default_dtype
from kvzip.cache import read_header
from small_models import Unavailable, model_dir


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example, or one half of it; returns the exit status."""
    parser = argparse.ArgumentParser(description="Compress a document in one process and ask it in another.")
    parser.add_argument("step", nargs="?", choices=("both", "compress", "answer"), default="both")
    parser.add_argument("file", nargs="?", type=Path, help="the saved cache (default: one that is deleted again)")
    parser.add_argument("openings", nargs="*", help="beginnings of sentences for the model to continue")
    parser.add_argument("--model", help="local Hugging Face directory or hub id (default: SmolLM2-135M)")
    parser.add_argument("--ratio", type=float, default=0.3, help="fraction of the document's pairs that is kept")
    parser.add_argument("--bits", type=int, choices=(8, 4), help="bits of a kept value (default: as they are)")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    parser.add_argument("--tokens", type=int, default=12, help="tokens of an answer")
    arguments = parser.parse_args(argv)
    if arguments.step != "both" and arguments.file is None:
        parser.error(f"{arguments.step} needs the name of a file")
    try:
        source = str(arguments.model or model_dir(DEFAULT_MODEL))
    except Unavailable as error:
        print(f"{DEFAULT_MODEL}: {error}", file=sys.stderr)
        return 1
    openings = arguments.openings or [question.opening for question in QUESTIONS]
    if arguments.step == "compress":
        compress(source, arguments)
        return 0
    if arguments.step == "answer":
        answer(source, arguments.file, openings, arguments.tokens)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        arguments.file = arguments.file or Path(scratch) / "document.kvz"
        compress(source, arguments)
        options = ["--model", source, "--tokens", str(arguments.tokens)]
        command = [sys.executable, __file__, "answer", str(arguments.file), *openings, *options]
        return subprocess.run(command, check=False).returncode


def compress(source: str, arguments: argparse.Namespace) -> None:
    """Reads the document and leaves what is kept of it in a file."""
    model = kvzip.load(source, dtype=getattr(torch, default_dtype()))
    start = time.perf_counter()
    document = arguments.document.read_text(encoding="utf-8").strip()
    full = kvzip.score(model, kvzip.prefill(model, document, template=False))
    small = kvzip.compress(full, arguments.ratio, bits=arguments.bits)
    kvzip.save(small, arguments.file, note={"document": arguments.document.name})
    print(
        f"compressed {full.length:,} tokens in {time.perf_counter() - start:.1f} s: {kvzip.nbytes(full) / 1e6:.1f} MB "
        f"of cache, {arguments.file.stat().st_size / 1e6:.1f} MB in {arguments.file.name}",
        flush=True,
    )


def answer(source: str, file: Path, openings: list[str], tokens: int) -> None:
    """Loads the file and lets the model go on from it; the document is not read again."""
    header = read_header(file)
    print(
        f"{file.name} holds {header['kept']:,} of {header['total']:,} pairs of {header['note']['document']}, chosen by "
        f"{header['method']}, written by kvzip {header['library']}"
    )
    model = kvzip.load(source, dtype=getattr(torch, default_dtype()))
    start = time.perf_counter()
    cache = kvzip.load_cache(file, model=model)
    loaded = time.perf_counter()
    answers = kvzip.generate(
        model, cache, [f"\n\n{opening}" for opening in openings], max_tokens=tokens, stop=["\n"], template=False
    )
    print(f"loaded in {(loaded - start) * 1e3:.0f} ms, answered in {time.perf_counter() - loaded:.1f} s:")
    for opening, found in zip(openings, answers, strict=True):
        print(f"  {opening} ... {found.text.strip()}")


if __name__ == "__main__":
    sys.exit(main())
