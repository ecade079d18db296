"""Documents as text: files of text and Markdown, PDF, HTML, Word, standard input, directories of code."""

import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..display import visible_line
from .output import say

STDIN = "standard input"
_NAMED = 20  # files that are left out for one reason

_BLOCKS = {
    *("p", "div", "section", "article", "header", "footer", "main", "aside", "nav", "blockquote", "pre", "figure"),
    *("h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li", "dl", "dt", "dd", "table", "tr", "form", "hr"),
}
_UNREAD = {"script", "style", "template", "noscript", "head"}

SKIPPED = ("__pycache__", "node_modules", "venv", "build", "dist")
"""Directories that are left out where git does not say what belongs to a project, as hidden ones are."""


def read(sources: Sequence[str]) -> tuple[str, str]:
    """Returns the text of documents and its title.

    One file is its text. Several, or a directory, are one context in which each file's text follows its path.
    Files of a directory that are neither text nor PDFs are left out; standard error says which.

    Args:
        sources: paths, or "-" for standard input.

    A page of HTML that is named is read as its text; in a directory it is source code like any other.

    Raises: FileNotFoundError; ValueError for a file that is no text, or no text at all; ImportError for a PDF without
        pypdf, HTML without Beautiful Soup, or a Word document without python-docx.
    """
    parts: list[tuple[str, str]] = []
    for source in sources:
        path = Path(source)
        if not source:
            raise ValueError("expected a document, got an empty name: name a file, a directory or -")
        if source == "-":
            parts.append((STDIN, _decoded(sys.stdin.buffer.read(), STDIN)))
        elif path.is_dir():
            parts += _directory(path)
        elif path.exists():
            parts.append((source, _decoded(path.read_bytes(), source)))  # read once: it may be a pipe
        else:
            raise FileNotFoundError(f"expected a document, got no file or directory {source}")
    title = ", ".join(map(name_of, sources))
    text = parts[0][1]
    if len(parts) > 1:
        text = "\n\n".join(f"===== {visible_line(name)} =====\n{own}" for name, own in parts)
    if not text.strip():
        raise ValueError(f"expected a document with text in it, got none in {title}")
    return text, title


def name_of(source: str) -> str:
    """Returns what a document is called: the name of its file, without a directory."""
    path = Path(source)
    if source == "-" or path.is_fifo():
        return STDIN if source == "-" else "pipe"
    return path.resolve().name if path.is_dir() else path.name


def _decoded(content: bytes, name: str) -> str:
    short = Path(name).name
    if Path(name).suffix.lower() in (".html", ".htm", ".xhtml") or _is_html(content):
        return _html(content, short)
    text = _text(content, short)
    if text is None:
        raise ValueError(
            f"expected text in UTF-8, HTML, a PDF or a Word document (.docx), got {name} that is none: convert it first"
        )
    return text


def _text(content: bytes, name: str) -> str | None:
    """The text of a file, PDFs and Word documents included; None for a file of something else."""
    if content[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"%PDF-"):
        return _pdf(content, name)
    if content.startswith(b"PK\x03\x04") and b"word/" in content:
        return _docx(content, name)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    other = "\0" in text or text.startswith(("{\\rtf", "%!PS"))  # text to a machine only
    return None if other else text


def _is_html(content: bytes) -> bool:
    """Whether a file begins as a page of HTML does, after comments."""
    begin = content[:4096].removeprefix(b"\xef\xbb\xbf").lower()
    begin = re.sub(rb"\A(\s*<!--.*?-->)*\s*", b"", begin, flags=re.DOTALL)
    return begin.startswith((b"<!doctype html", b"<html")) or (begin.startswith(b"<?xml") and b"<html" in begin)


def _html(content: bytes, name: str) -> str:
    """The text of a page, a line for each block: without scripts, styles and what is hidden in its head."""
    try:
        from bs4 import BeautifulSoup  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise _missing("beautifulsoup4", "html", name) from error
    try:
        text = "".join(_pieces(BeautifulSoup(content, "html.parser")))  # finds the encoding that the page declares
    except RecursionError:
        raise ValueError(f"expected a page whose parts are nested less deeply, got {name}: convert it first") from None
    text = re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", re.sub(r"\n (?=\S)", "\n", text))).strip("\n")
    if not text.strip():
        raise ValueError(f"expected text in {name}, got a page without any: a browser's copy of it may have some")
    return text.lstrip(" ") + "\n"


def _pieces(node: Any, *, whole: bool = False) -> Iterator[str]:
    """The text of a part of a page, with line ends around blocks; `whole` keeps spaces and lines as they are."""
    for child in node.children:
        name = getattr(child, "name", None)
        if name is None:
            if type(child).__name__ in ("NavigableString", "CData"):  # no comment, no declaration
                yield str(child) if whole else re.sub(r"\s+", " ", str(child))
        elif name not in _UNREAD:
            around = "\n" if name in _BLOCKS else ""
            yield around
            yield from _pieces(child, whole=whole or name == "pre")
            yield {"br": "\n", "td": "\t", "th": "\t"}.get(name, around)


def _docx(content: bytes, name: str) -> str:
    """The text of a Word document: paragraphs and tables in their order, a line for each row, cells apart by tabs."""
    try:
        from docx import Document  # pyright: ignore[reportMissingImports]
        from docx.table import Table  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise _missing("python-docx", "docx", name) from error
    try:
        parts = [
            "\n".join("\t".join(cell.text.strip() for cell in row.cells) for row in part.rows)
            if isinstance(part, Table)
            else part.text
            for part in Document(io.BytesIO(content)).iter_inner_content()
        ]
    except Exception as error:  # a damaged one fails anywhere
        raise ValueError(
            f"expected a Word document that can be read, got {name}: {error or type(error).__name__}"
        ) from error
    if not any(part.strip() for part in parts):
        raise ValueError(f"expected text in {name}, got {_counted(parts, 'paragraph')} without any")
    return "\n\n".join(part for part in parts if part.strip())


def _missing(package: str, extra: str, name: str) -> ImportError:
    return ImportError(
        f"expected {package} to read {name}, got no such package: pip install {package} "
        f"(in a checkout pip install -e '.[{extra}]')"
    )


def _pdf(content: bytes, name: str) -> str:
    try:
        from pypdf import PdfReader  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise _missing("pypdf", "pdf", name) from error
    try:
        pages = [page.extract_text() for page in PdfReader(io.BytesIO(content)).pages]
    except Exception as error:  # a damaged one fails anywhere
        raise ValueError(f"expected a PDF that can be read, got {name}: {error or type(error).__name__}") from error
    text = "\n\n".join(page.strip() for page in pages)
    # two surrogates that form a pair become its character; a lone one is no text
    whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if broken := whole.count("\ufffd") - text.count("\ufffd"):
        say(f"{name}: {broken} halves of characters, which are no text, became \ufffd")
    if not whole.strip():
        raise ValueError(
            f"expected text in {name}, got {_counted(pages, 'page')} without any: recognise its letters first"
        )
    return whole


def _directory(path: Path) -> list[tuple[str, str]]:
    """The text files and PDFs of a directory, by their paths in it. Says which other files it leaves out."""
    parts: list[tuple[str, str]] = []
    left: dict[str, list[str]] = {}
    for name in sorted(_names(path)):
        try:
            text = _text((path / name).read_bytes(), str(name))
        except (ImportError, ValueError, OSError) as error:
            why = f"({error})"
            if isinstance(error, ImportError):  # the same for every file that needs the package
                package = "pypdf" if str(name).lower().endswith(".pdf") else "python-docx"
                why = f"as {package} is missing (pip install {package})"
            left.setdefault(why, []).append(str(name))
            continue
        if text is None:
            left.setdefault("being no text in UTF-8", []).append(str(name))
        elif text.strip():
            parts.append((str(name), text))
    for why, names in left.items():
        named = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
        say(f"{path}: left out {why}: {named}")
    if not parts:
        names = [name for each in left.values() for name in each]
        out = f": its {_counted(names, 'file')} {'is' if len(names) == 1 else 'are'} left out" if names else ""
        raise ValueError(f"expected a directory with text files or PDFs, got {path} without any{out}")
    return parts


def _counted(things: Sequence[str], what: str) -> str:
    return f"{len(things)} {what}" + "s" * (len(things) != 1)


def _names(path: Path) -> Iterator[Path]:
    """The files that git tracks or would track; without git all files but hidden ones and those of SKIPPED.

    Links are not followed: what they point to is read where it lies, or does not belong to the directory.
    """
    command = ["git", "-C", str(path), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "."]
    try:
        listed = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        listed = None
    if listed is not None and listed.returncode == 0:
        names = {Path(os.fsdecode(name)) for name in listed.stdout.split(b"\0") if name}
        yield from (name for name in names if _is_regular(path / name))
        return
    for directory, inner, files in os.walk(path):
        inner[:] = [name for name in inner if not name.startswith(".") and name not in SKIPPED]
        for name in files:
            if not name.startswith(".") and _is_regular(Path(directory, name)):
                yield Path(directory, name).relative_to(path)


def _is_regular(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()
