"""Makes the head scores that come with the library, from essays and source code.

    python tools/make_head_scores.py MODEL --essays pg_essays.jsonl

MODEL is a local Hugging Face directory; the file is named after it. Each JSON line has a `name` and a `context`. The
code is that of Python's standard library. Each kind of text is read up to --tokens tokens. Which parts were read, and
by which version of the library, is in the file's header: `kvzip.cache.read_header(path)`.
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
from kvzip import head_scores, machine
from kvzip.hub import SHIPPED
from kvzip.inputs import context_ids

MODULES = ("copy", "bisect", "csv", "queue")

Part = tuple[str, str]  # what a text is called, and the text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="local Hugging Face directory")
    parser.add_argument("--essays", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=2_000, help="of each kind of text")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="directory of the file")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=None)
    arguments = parser.parse_args()
    dtype = arguments.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    model = kvzip.load(arguments.model, dtype=getattr(torch, dtype))
    code = f"source code of CPython {platform.python_version()}"
    kinds = {"essays by Paul Graham": essays(arguments.essays), code: modules()}
    texts = {}
    for kind, parts in kinds.items():
        used, ids = beginning(model, parts, arguments.tokens)
        texts[f"{kind}: {', '.join(used)}"] = ids
    chat = model.template is not None
    with Progress() as bars:
        task = bars.add_task(arguments.model.name, total=None)
        scores = head_scores.make(
            model,
            list(texts.values()),
            names=list(texts),
            template=chat,
            progress=lambda done, total: bars.update(task, completed=done, total=total),
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    note = {"model": arguments.model.name, "dtype": dtype, "template": chat}
    note |= {"torch": machine.versions()["torch"], "device": machine.device_name(model.device)}
    head_scores.save(scores, arguments.out / f"{arguments.model.name}.safetensors", note=note, overwrite=True)


def essays(path: Path) -> Iterator[Part]:
    """Yields the documents of a file."""
    for line in path.read_text(encoding="utf-8").splitlines():
        essay = json.loads(line)
        yield essay["name"], essay["context"]


def modules() -> Iterator[Part]:
    """Yields the source code of modules."""
    for name in MODULES:
        path = importlib.import_module(name).__file__
        assert path is not None
        yield name, Path(path).read_text(encoding="utf-8")


def beginning(model: kvzip.Model, parts: Iterable[Part], tokens: int) -> tuple[list[str], torch.Tensor]:
    """Returns the first token ids of texts that follow each other as paragraphs, and what the texts are called."""
    used, ids = [], torch.empty(0, dtype=torch.long)
    for name, text in parts:
        used.append(name)
        ids = torch.cat([ids, context_ids(model, text.strip() + "\n\n")])
        if len(ids) >= tokens:
            break
    return used, ids[:tokens]


if __name__ == "__main__":
    main()
