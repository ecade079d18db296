"""Reads a book in pieces, never holding its full cache; is interrupted, and goes on from a checkpoint.

    python examples/streaming.py [MODEL] [--ratio 0.3] [--document FILE] [--segment 512]

The pieces are the lines of an open file; a generator, a socket or a list of token ids would do as well.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kvzip
import museum


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example; returns the exit status."""
    parser = museum.parser(__doc__)
    parser.add_argument("--segment", type=int, default=512, help="tokens that are held uncompressed at a time")
    parser.add_argument("--stop", type=int, default=1000, help="tokens after which something happens")
    arguments = parser.parse_args(argv)
    model = museum.load(arguments.model)
    options: dict[str, Any] = {"segment": arguments.segment, "chunk": arguments.segment, "template": False}

    def tell(done: int, _: int | None) -> None:
        print(f"  {done:,} tokens read and compressed")

    def tell_and_stop(done: int, _: int | None) -> None:
        tell(done, _)
        if done >= arguments.stop:
            raise KeyboardInterrupt  # what Ctrl-C does; any other exception would do the same

    with tempfile.TemporaryDirectory() as scratch, arguments.document.open(encoding="utf-8") as book:
        options["checkpoint"] = checkpoint = Path(scratch) / "half-read.kvz"
        try:
            small = kvzip.prefill_compressed(model, book, arguments.ratio, progress=tell_and_stop, **options)
        except KeyboardInterrupt:
            print(f"interrupted, with {checkpoint.stat().st_size / 1e6:.1f} MB in {checkpoint.name}; and on it goes")
            book.seek(0)  # from the beginning: what was read is compared, and skipped
            small = kvzip.prefill_compressed(model, book, arguments.ratio, progress=tell, **options)
    print(f"kept {small.kept:,} of {small.total:,} pairs, {museum.megabytes(small)}")
    museum.ask_five(model, small, arguments.tokens)
    return 0


if __name__ == "__main__":
    sys.exit(main())
