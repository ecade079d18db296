"""Functions of Python's standard library and their descriptions, which the code tasks are made of."""

import ast
import random
import sysconfig
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from .base import Request, fit

CODE_LINES = range(4, 41)  # of a function of repoqa
DOC_LETTERS = 60  # of its description, at least
_MODULES = """
argparse ast bisect calendar colorsys configparser copy csv dataclasses datetime difflib dis email/utils enum
fileinput filecmp fnmatch fractions ftplib functools getopt gettext glob graphlib gzip heapq hmac html/parser
http/client imaplib inspect ipaddress json/decoder linecache locale logging/handlers mailbox mimetypes numbers
operator optparse os pathlib pdb pickletools platform plistlib poplib pprint pstats random re/_parser reprlib sched
secrets selectors shelve shlex shutil smtplib socket socketserver statistics string subprocess tarfile tempfile
textwrap threading timeit tokenize trace traceback turtle types typing unittest/case unittest/mock urllib/parse
urllib/request uuid warnings wave weakref webbrowser xml/dom/minidom zipfile zipapp
"""
MODULES = _MODULES.split()
_STDLIB = Path(sysconfig.get_path("stdlib"))
_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "ensurepip", "encodings"}

_BLOCKS = (ast.stmt, ast.ExceptHandler, ast.match_case)  # expressions hold no functions with docstrings

Function = tuple[str, str]
"""A function's code without its docstring, and the docstring."""


def fitting(
    known: list[Function], build: Callable[[list[Function]], str], request: Request, rng: random.Random
) -> list[Function]:
    """Returns the functions whose text is as long as fits: the first of those known, then others in a drawn order.

    Raises: ValueError if there are not enough, or one is too long.
    """

    def most() -> int:
        """How many functions fit, estimated by repeating the known ones without end."""
        return fit(lambda n: build([known[i % len(known)] for i in range(n)]), request.length, request.count)

    count = most()
    if count > len(known):
        others = list(other_functions())
        rng.shuffle(others)
        known = known + others
        count = most()
    if count <= len(known):
        return known[:count]
    raise ValueError(
        f"expected a length of at most {request.count(build(known))} tokens for this task, got {request.length}: "
        "the standard library has no more functions"
    )


@cache
def library_functions() -> tuple[Function, ...]:
    """Returns the documented functions of 4 to 40 lines of common modules of Python's standard library."""
    return tuple(_functions(_common()).values())


@cache
def other_functions() -> tuple[Function, ...]:
    """Returns such functions of the library's other modules, but for tests and those with a name that is known."""
    paths = [path for path in sorted(_STDLIB.rglob("*.py")) if not set(path.relative_to(_STDLIB).parts) & _LEFT_OUT]
    known = _functions(_common())
    return tuple(function for name, function in _functions(paths).items() if name not in known)


def _common() -> list[Path]:
    return [path for module in MODULES if (path := _STDLIB / f"{module}.py").exists()]


def _functions(paths: Sequence[Path]) -> dict[str, Function]:
    """The documented functions in files by their names, the first of each."""
    found: dict[str, Function] = {}
    for path in paths:
        source = path.read_text(encoding="utf-8")
        lines = source.split("\n")
        nodes: list[ast.AST] = [ast.parse(source)]
        for node in nodes:  # which grow: breadth first
            nodes += [child for child in ast.iter_child_nodes(node) if isinstance(child, _BLOCKS)]
            if not isinstance(node, ast.FunctionDef) or len(node.body) < 2:
                continue
            doc = ast.get_docstring(node)
            if doc is None:
                continue
            about = " ".join(doc.split("\n\n")[0].split()).replace(node.name, "it")
            code = lines[node.lineno - 1 : node.body[0].lineno - 1] + lines[node.body[0].end_lineno : node.end_lineno]
            if len(about) >= DOC_LETTERS and len(code) in CODE_LINES:
                text = "\n".join(line[node.col_offset :] for line in code if line[node.col_offset :].strip())
                found.setdefault(node.name, (text, about))
    return found
