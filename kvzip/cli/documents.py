"""Documents as text: files of text and Markdown, PDF, standard input, directories of code."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

SKIPPED = ("__pycache__", "node_modules", "venv", "build", "dist")
"""Directories that are not read where git does not say what belongs to a project; nor are hidden ones."""


def read(sources: Sequence[str]) -> tuple[str, str]:
    """Returns the text of documents and its title.

    One file is its text. Several, or a directory, are one context in which the path stands before each file's text.

    Args:
        sources: paths, or "-" for standard input.

    Raises: FileNotFoundError; ValueError for a file that is no text, or no text at all; ImportError for a PDF without
        the extra `pdf`.
    """
    parts: list[tuple[str, str]] = []
    for source in sources:
        if source == "-":
            parts.append(("standard input", sys.stdin.read()))
            continue
        path = Path(source)
        if path.is_dir():
            parts += _directory(path)
        elif path.exists():
            parts.append((source, read_file(path)))
        else:
            raise FileNotFoundError(f"expected a document, got no file or directory {source}")
    title = ", ".join("standard input" if s == "-" else Path(s).resolve().name for s in sources)
    text = parts[0][1] if len(parts) == 1 else "\n\n".join(f"===== {name} =====\n{own}" for name, own in parts)
    if not text.strip():
        raise ValueError(f"expected a document with text in it, got none in {title}")
    return text, title


def read_file(path: Path) -> str:
    """Returns the text of one file. Raises ValueError for one that is no text in UTF-8."""
    with path.open("rb") as file:
        start = file.read(5)
    if start == b"%PDF-":
        return _pdf(path)
    text = _text(path)
    if text is None:
        raise ValueError(f"expected text in UTF-8 or a PDF, got {path} that is neither: convert it first")
    return text


def _text(path: Path) -> str | None:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def _pdf(path: Path) -> str:
    try:
        from pypdf import PdfReader  # pyright: ignore[reportMissingImports]
        from pypdf.errors import PyPdfError  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"expected the pdf extra to read {path.name}, got no pypdf: pip install 'kvzip[pdf]'"
        ) from error
    try:
        pages = [page.extract_text() for page in PdfReader(path).pages]
    except PyPdfError as error:
        raise ValueError(f"expected a PDF that can be read, got {path.name}: {error}") from error
    text = "\n\n".join(page.strip() for page in pages)
    if not text.strip():
        raise ValueError(
            f"expected text in {path.name}, got {len(pages)} pages without any: recognise its letters first"
        )
    return text


def _directory(path: Path) -> list[tuple[str, str]]:
    """The text files of a directory, by their paths in it; binary files are left out."""
    found = [(str(name), _text(path / name)) for name in sorted(_names(path))]
    parts = [(name, text) for name, text in found if text is not None and text.strip()]
    if not parts:
        raise ValueError(f"expected a directory with text files, got {path} without any")
    return parts


def _names(path: Path) -> Iterator[Path]:
    """What git tracks or would; where there is no git, all but hidden files and what tools put there."""
    command = ["git", "-C", str(path), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "."]
    try:
        listed = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        listed = None
    if listed is not None and listed.returncode == 0:
        names = {Path(os.fsdecode(name)) for name in listed.stdout.split(b"\0") if name}
        yield from (name for name in names if (path / name).is_file())
        return
    for directory, inner, files in os.walk(path):
        inner[:] = [name for name in inner if not name.startswith(".") and name not in SKIPPED]
        yield from (Path(directory, name).relative_to(path) for name in files if not name.startswith("."))
