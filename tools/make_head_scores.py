"""Makes the head scores that come with the library, from essays, encyclopedia articles and source code.

    python tools/make_head_scores.py MODEL --essays pg_essays.jsonl --articles squad_article.jsonl

MODEL is a local Hugging Face directory; the file is named after it. The JSON lines have a `context` each. The code is
that of Python's standard library. Each kind of text is read up to --tokens tokens. What was read, and by which version
of the library, is in the file's header: `kvzip.cache.read_header(path)`.
"""

import argparse
import importlib
import json
import platform
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from rich.progress import Progress

import kvzip
from kvzip import head_scores
from kvzip.prefilling import context_ids

MODULES = ("heapq", "textwrap", "json.decoder", "statistics", "argparse")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="local Hugging Face directory")
    parser.add_argument("--essays", type=Path, required=True)
    parser.add_argument("--articles", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=2_000, help="of each kind of text")
    parser.add_argument("--out", type=Path, default=head_scores.SHIPPED, help="directory of the file")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=None)
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    dtype = arguments.dtype or ("bfloat16" if cuda else "float32")
    model = kvzip.load(arguments.model, dtype=getattr(torch, dtype))
    texts = {
        "essays by Paul Graham": contexts(arguments.essays),
        "Wikipedia paragraphs of XQuAD, English": contexts(arguments.articles),
        f"CPython {platform.python_version()}: {', '.join(MODULES)}": map(source_of, MODULES),
    }
    ids = [beginning(model, parts, arguments.tokens) for parts in texts.values()]
    with Progress() as bars:
        task = bars.add_task(arguments.model.name, total=None)
        scores = head_scores.make(
            model,
            ids,
            names=list(texts),
            template=model.template is not None,
            progress=lambda done, total: bars.update(task, completed=done, total=total),
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    note = {"model": arguments.model.name, "dtype": dtype, "template": model.template is not None}
    note |= {"torch": torch.__version__, "device": torch.cuda.get_device_name() if cuda else "cpu"}
    head_scores.save(scores, arguments.out / f"{arguments.model.name}.safetensors", note=note)


def contexts(path: Path) -> Iterator[str]:
    """Yields the documents of a file."""
    for line in path.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)["context"]


def source_of(module: str) -> str:
    """Returns a module's source code."""
    path = importlib.import_module(module).__file__
    assert path is not None
    return Path(path).read_text(encoding="utf-8")


def beginning(model: kvzip.Model, parts: Iterable[str], tokens: int) -> torch.Tensor:
    """Returns the first token ids of texts that follow each other as paragraphs."""
    ids = torch.empty(0, dtype=torch.long)
    for part in parts:
        ids = torch.cat([ids, context_ids(model, part + "\n\n")])
        if len(ids) >= tokens:
            break
    return ids[:tokens]


if __name__ == "__main__":
    main()
