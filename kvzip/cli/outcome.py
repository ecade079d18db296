"""What `kvzip compress` prints of its file, some lines of which `kvzip info` prints too."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..display import visible_line
from .output import echo, hint, put_json, say, size

if TYPE_CHECKING:
    from ..cache import RaggedCache


def show(output: Path, cache: "RaggedCache", note: dict[str, Any], *, as_json: bool) -> None:
    """Prints facts of a file that was written: those of its cache and its note."""
    from ..cache import WindowKV, full_nbytes, nbytes

    ratio = cache.kept / cache.total
    windows = sum(isinstance(layer, WindowKV) for layer in cache.context)
    facts = {
        "file": str(output),
        "title": note["title"],
        "tokens": cache.context_length,
        "kept": cache.kept,
        "total": cache.total,
        "ratio": ratio,
        "method": cache.method,
        "layers": len(cache.context),
        "window_layers": windows,
        "full_bytes": full_nbytes(cache),
        "cache_bytes": nbytes(cache),
        "file_bytes": output.stat().st_size,
        "seconds": note["seconds"],
    }
    if "heads" in note:
        facts["heads"] = note["heads"]
    put_json(facts) if as_json else _show(facts)
    if f"{ratio:.1%}" == "0.0%":
        say(f"warning: {cache.kept:,} of {cache.total:,} pairs are kept, answers cannot know the document: keep more")
    hint(f'ask it:  kvzip ask {shlex.quote(str(output))} "..."')


def _show(facts: dict[str, Any]) -> None:
    took = ", ".join(f"{name} {value:.1f} s" for name, value in facts["seconds"].items())
    echo(
        f"{visible_line(facts['file'])}: {facts['tokens']:,} tokens, {facts['ratio']:.1%} of {facts['total']:,} pairs "
        f"kept, cache {size(facts['full_bytes'])} -> {size(facts['cache_bytes'])} ({took})"
    )
    if "heads" in facts:
        echo(whole_heads_line(facts["heads"]))
    if facts["window_layers"]:
        echo(windows_line(facts["window_layers"], facts["layers"]))


def windows_line(windows: int, layers: int) -> str:
    """Returns what to say of a model that has window layers."""
    return (
        f"windows  {windows} of {layers} layers see their last tokens only and stay as they are: "
        f"only the pairs of the other {layers - windows} are counted and dropped"
    )


def whole_heads_line(heads: dict[str, int]) -> str:
    """Returns what to say of a file whose heads are kept or dropped whole; `heads` is its note's."""
    if heads["whole"] == heads["heads"]:
        return f"heads    all {heads['heads']} are whole"
    return (
        f"heads    {heads['whole']} of {heads['heads']} are whole, the others keep the first {heads['sink']} and the "
        f"last {heads['recent']} tokens, which the ratio includes"
    )
