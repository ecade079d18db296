"""Compresses a document in one process, and answers questions about it in another that has never seen it.

    python examples/save_and_reload.py [MODEL] [--ratio 0.3] [--document FILE] [--bits 8] [--file museum.kvz]

The file between them goes to another machine, or to the next day: without --file it is deleted at the end.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import kvzip
import museum
from kvzip.cache import read_header


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example, or its second half; returns the exit status."""
    parser = museum.parser(__doc__)
    parser.add_argument("--file", type=Path, help="where to leave the compressed cache; an older one is replaced")
    parser.add_argument("--bits", type=int, choices=(8, 4), help="bits of a kept value (default: as they are)")
    parser.add_argument("--answer", action="store_true", help="the second half: answer from --file")
    arguments = parser.parse_args(argv)
    model = museum.load(arguments.model)
    if arguments.answer:
        answer(model, arguments.file, arguments.tokens)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        file = arguments.file or Path(scratch) / "museum.kvz"
        full = kvzip.prefill(model, arguments.document.read_text(encoding="utf-8").strip(), template=False)
        small = kvzip.compress(kvzip.score(model, full), arguments.ratio, bits=arguments.bits)
        kvzip.save(small, file, note={"document": arguments.document.name}, overwrite=True)
        print(f"{museum.megabytes(full)} of cache, {file.stat().st_size / 1e6:.1f} MB in {file.name}", flush=True)
        command = [sys.executable, __file__, "--answer", "--file", str(file), "--tokens", str(arguments.tokens)]
        return subprocess.run([*command, *filter(None, [arguments.model])], check=False).returncode


def answer(model: kvzip.Model, file: Path, tokens: int) -> None:
    """Loads the file and lets the model go on from it; the document is not read again."""
    header, start = read_header(file), time.perf_counter()
    cache = kvzip.load_cache(file, model=model)
    print(f"another process: {file.name} loaded in {(time.perf_counter() - start) * 1e3:.0f} ms")
    print(f"it holds {cache.kept:,} of {cache.total:,} pairs of {header['note']['document']}, by {header['method']}")
    museum.ask_five(model, cache, tokens)


if __name__ == "__main__":
    sys.exit(main())
