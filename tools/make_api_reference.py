"""Writes docs/api.md, the reference of what a caller may use, from the docstrings and signatures of the package.

    python tools/make_api_reference.py

tests/test_docs.py fails when the page is not what this makes.
"""

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"
WIDTH = 100  # of a signature on one line

STAGES = (
    ("Models and contexts", ("load", "prefill", "prefill_compressed", "Model", "ModelConfig")),
    ("Scores and compression", ("score", "compress", "tune", "keep_mask", "refit", "Scores")),
    (
        "Answers and conversations",
        ("generate", "Answer", "Source", "Decoder", "ask", "extend", "fork", "fold", "append"),
    ),
    ("Caches", ("DenseCache", "RaggedCache", "save", "load_cache", "open", "to", "nbytes")),
    ("Transformers", ("from_transformers", "to_transformers")),
)
"""The public names of `kvzip`, in the order in which they are used."""

MODULES = ("scores", "head_scores", "sources", "tuning", "cache", "models", "attention", "prompts", "ops", "evals")

HEAD = """\
# API reference

<!-- Made by tools/make_api_reference.py from the docstrings: change those, not this page. -->

The names under "kvzip" are the package's own, `kvzip.load` and so on, in the order in which they are used; most
programs need no others but those of `kvzip.scores`, `kvzip.head_scores` and `kvzip.evals`. The modules after them are
what they are made of, for [a scorer of your own](adding_a_scorer.md) or [another family](adding_a_family.md).

Axes mean the same everywhere: L scored layers, Hq query heads, H KV heads, T new tokens, S cached tokens, E evictable
tokens, C tokens of one scoring chunk, A tokens of the prefix, R rows reserved, W window, N kept pairs of one layer, D
head width, M hidden width, V vocabulary, B questions that share a context. Sizes are in tokens unless a name says
otherwise. `ratio` is always the fraction of evictable pairs that is KEPT.
"""


def main() -> int:
    """Writes the page."""
    PAGE.write_text(reference(), encoding="utf-8")
    print(PAGE.relative_to(ROOT))
    return 0


def reference() -> str:
    """Returns the page. Raises ValueError if a public name of `kvzip` is in no section."""
    package = import_module("kvzip")
    listed = {name for _, names in STAGES for name in names}
    modules = {name for name in package.__all__ if isinstance(getattr(package, name), ModuleType)}
    if listed | modules != set(package.__all__):
        raise ValueError(
            f"expected sections for all public names, got none for {sorted(set(package.__all__) - listed - modules)} "
            f"and unknown {sorted(listed - set(package.__all__))}: correct STAGES"
        )
    parts = [HEAD, "## kvzip\n", "| name | what it is |\n|---|---|"]
    for name in (name for _, names in STAGES for name in names):
        parts.append(f"| [`{name}`](#{name.lower()}) | {summary(description(home_of(package, name), name))} |")
    parts.append("")
    for title, names in STAGES:
        parts.append(f"### {title}\n")
        parts += [entry(package, name, level=4) for name in names]
    known = {id(getattr(package, name)) for name in listed}
    for module in (import_module(f"kvzip.{name}") for name in MODULES):
        parts.append(f"## {module.__name__}\n\n{prose(module.__doc__)}")
        parts += [entry(module, name, level=3) for name in names_of(module) if id(getattr(module, name)) not in known]
        known |= {id(getattr(module, name)) for name in names_of(module)}
    return "\n".join(parts)


def names_of(module: ModuleType) -> list[str]:
    """Returns what a module offers: its `__all__`, or the public functions and classes that it defines, in order."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__, key=lambda name: (name.isupper(), name.lower()))
    return [name for name, node in definitions(module).items() if not isinstance(node, (ast.Assign, ast.AnnAssign))]


def entry(module: ModuleType, name: str, *, level: int) -> str:
    """Returns the heading, signature and description of one name of a module."""
    home = home_of(module, name)
    node = definitions(home)[name]
    source = inspect.getsource(home)
    parts = ["#" * level + f" {name}\n", fence(signature(source, node)), prose(description(home, name))]
    if isinstance(node, ast.ClassDef):
        for member in node.body:
            if isinstance(member, ast.FunctionDef) and not member.name.startswith("_"):
                about = prose(ast.get_docstring(member))
                parts += [f"`{name}.{member.name}`:\n", fence(signature(source, member)), about]
    return "\n".join(part for part in parts if part)


def home_of(module: ModuleType, name: str) -> ModuleType:
    """Returns the module whose source defines a name that another may only pass on."""
    value = getattr(module, name)
    home = getattr(inspect.unwrap(value) if callable(value) else value, "__module__", None)
    candidates = [module] if home is None or not home.startswith("kvzip") else [import_module(home)]
    while candidates:
        candidate = candidates.pop(0)
        if name in definitions(candidate):
            return candidate
        candidates += [sys.modules[path] for path in imported_from(candidate, name) if path in sys.modules]
    raise ValueError(f"expected {name} to be defined in {module.__name__} or where it is imported from, got neither")


def imported_from(module: ModuleType, name: str) -> Iterator[str]:
    """Yields the module that another imports a name from."""
    for node in ast.walk(ast.Module(tree(module), [])):  # what types alone import too
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            package = (module.__package__ or "").split(".")
            base = package[: len(package) - node.level + 1] if node.level else []
            yield ".".join([*base, *([node.module] if node.module else [])])


@cache
def tree(module: ModuleType) -> list[ast.stmt]:
    """Returns the statements of a module."""
    return ast.parse(inspect.getsource(module)).body


@cache
def definitions(module: ModuleType) -> dict[str, ast.stmt]:
    """Returns the statements that define a module's public names; of overloads the last, which is the function."""
    found: dict[str, ast.stmt] = {}
    for node in tree(module):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        else:
            continue
        found |= {name: node for name in names if not name.startswith("_")}
    return found


def description(module: ModuleType, name: str) -> str | None:
    """Returns the docstring of a function or class, or the string that follows the assignment of a name."""
    node = definitions(module)[name]
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return ast.get_docstring(node)
    after = next((two for one, two in pairwise(tree(module)) if one.lineno == node.lineno), None)
    if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
        return inspect.cleandoc(after.value.value)
    return None


def signature(source: str, node: ast.stmt) -> str:
    """Returns a definition as it is written, without its body: a call, a class with its fields, or a name's type."""

    def text(part: ast.AST) -> str:
        return " ".join((ast.get_source_segment(source, part) or "").split())

    if isinstance(node, ast.FunctionDef):
        returned = "" if node.returns is None else f" -> {text(node.returns)}"
        if any(isinstance(one, ast.Name) and one.id == "property" for one in node.decorator_list):
            return f"{node.name}: {returned.removeprefix(' -> ')}"
        return call(node.name, [*arguments(node.args, text)], returned)
    if isinstance(node, ast.ClassDef):
        maker = [one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"]
        if maker:
            return call(f"class {node.name}", [*arguments(maker[0].args, text)], "")
        fields = [text(one) for one in node.body if isinstance(one, ast.AnnAssign)]
        bases = ", ".join(map(text, node.bases))
        return "\n    ".join([f"class {node.name}" + (f"({bases})" if bases else ""), *fields])
    if isinstance(node, ast.AnnAssign):
        return f"{text(node.target)}: {text(node.annotation)}"
    assert isinstance(node, ast.Assign)
    value = text(node.value)
    return f"{text(node.targets[0])} = {value if len(value) <= WIDTH else '...'}"


def call(name: str, arguments: list[str], returned: str) -> str:
    """Returns a signature on one line, or a line for each argument if that is too long."""
    line = f"{name}({', '.join(arguments)}){returned}"
    if len(line) <= WIDTH:
        return line
    return "\n".join([f"{name}(", *(f"    {one}," for one in arguments), f"){returned}"])


def arguments(node: ast.arguments, text: Callable[[ast.AST], str]) -> Iterator[str]:
    """Yields each argument of a function as it is written, but for `self`."""
    plain = [*node.posonlyargs, *node.args]
    defaults = [None] * (len(plain) - len(node.defaults)) + list(node.defaults)
    pairs = [(one, default) for one, default in zip(plain, defaults, strict=True) if one.arg != "self"]
    for one, default in pairs:
        yield text(one) + ("" if default is None else f" = {text(default)}")
    if node.vararg is not None:
        yield f"*{text(node.vararg)}"
    elif node.kwonlyargs:
        yield "*"
    for one, default in zip(node.kwonlyargs, node.kw_defaults, strict=True):
        yield text(one) + ("" if default is None else f" = {text(default)}")


def fence(text: str) -> str:
    """Returns text as a block that is shown as it is."""
    return f"```text\n{text}\n```\n"


def prose(docstring: str | None) -> str:
    """Returns a docstring as Markdown: arguments as a list, what is indented as a block, Raises and Source set off."""
    parts = []
    for block in re.split(r"\n\n+|\n(?=(?:Args|Raises|Source):)", inspect.cleandoc(docstring or "")):
        if block.startswith("    "):
            parts.append(fence(textwrap.dedent(block)))
        elif block.startswith("Args:\n"):
            items = textwrap.dedent(block.removeprefix("Args:\n"))
            parts.append(re.sub(r"(?m)^(\w[\w, ]*):", r"- `\1`:", items).replace("\n    ", "\n  ") + "\n")
        elif block:
            text = re.sub(r"(?m)^ +", "", block)
            parts.append(re.sub(r"\A(Raises|Source):", r"**\1**", text) + "\n")
    return "\n".join(parts)


def summary(docstring: str | None) -> str:
    """Returns the first sentence of a docstring."""
    first = " ".join(inspect.cleandoc(docstring or "").split("\n\n")[0].split())
    return re.split(r"(?<=[a-z`)\]])[.:;] ", first)[0].rstrip(".:").replace("|", "\\|")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
