"""The direction of imports: what a module may import, read from the source without running it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvzip

PACKAGE = Path(kvzip.__file__).parent

ALLOWED = {
    "kvzip.version": set(),
    "kvzip.ratios": set(),
    "kvzip.checks": {"kvzip.ratios"},
    "kvzip.display": set(),
    "kvzip.small": set(),
    "kvzip.hub": {"kvzip.small"},
    "kvzip.options": {"kvzip.checks"},
    "kvzip.machine": set(),
    "kvzip.ops": set(),
    "kvzip.parallel": {"kvzip.ops"},
    "kvzip.files": {"kvzip.version", "kvzip.checks", "kvzip.display", "kvzip.parallel"},
    "kvzip.cache": {"kvzip.parallel", "kvzip.ops", "kvzip.prompts", "kvzip.checks", "kvzip.display", "kvzip.files"},
    "kvzip.templates": set(),
    "kvzip.prompts": {"kvzip.templates"},
    "kvzip.models": {"kvzip.parallel", "kvzip.checks", "kvzip.hub", "kvzip.ops", "kvzip.prompts"},
    "kvzip.attention": {"kvzip.ops", "kvzip.cache", "kvzip.models"},
}
_STAGES = (
    "opening",
    "inputs",
    "prefilling",
    "scoring",
    "choosing",
    "compression",
    "refitting",
    "streaming",
    "scores",
    "sources",
    "answers",
    "decoding",
    "serving",
    "generation",
    "conversation",
    "head_scores",
)
STAGES = [f"kvzip.{name}" for name in _STAGES]
TOPS = [
    "kvzip.interop",
    "kvzip.evals",
    "kvzip.tuning",
    "kvzip.report",
    "kvzip.server",
    "kvzip.vllm",
    "kvzip.cli",
    "kvzip.__main__",
]
"""Each stage may import the lower layers and the stages before it; the tops may import all of these."""


def layer_of(module: str) -> str:
    """The layer that a module belongs to: its first two names, or `kvzip` for the package's own."""
    return ".".join(module.split(".")[:2])


def allowed_imports(layer: str) -> set[str]:
    """The layers that `layer` may import. Raises ValueError for a layer nobody has placed."""
    if layer in ALLOWED:
        return ALLOWED[layer]
    order = STAGES + TOPS
    if layer not in order:
        raise ValueError(f"expected a known layer, got {layer}: place it in tests/test_layering.py")
    return set(ALLOWED) | set(order[: order.index(layer)])


def modules_of(package: Path) -> dict[str, Path]:
    """The modules of a package by name, found by their files."""
    names = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports_of(module: str, path: Path, known: set[str]) -> set[str]:
    """The absolute names of what a module imports anywhere in it, functions included, but for type checking."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in _running(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            members = {f"{source}.{alias.name}" for alias in node.names}
            submodules = members & known
            found |= submodules or {source}
            if submodules and members - known:
                found.add(source)
    return found


def _running(node: ast.AST) -> Iterator[ast.AST]:
    """A node and all below it, without the bodies of `if TYPE_CHECKING`."""
    yield node
    checked = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    for child in node.orelse if checked else ast.iter_child_nodes(node):
        yield from _running(child)


def circles(package: Path) -> list[list[str]]:
    """The modules that import each other, directly or by way of others, each group sorted."""
    modules = modules_of(package)
    graph = {m: imports_of(m, path, set(modules)) & set(modules) for m, path in modules.items()}
    reached = {}
    for module in modules:
        seen: set[str] = set()
        ahead = [module]
        while ahead:
            new = graph[ahead.pop()] - seen
            seen |= new
            ahead += new
        reached[module] = seen
    groups = {tuple(sorted(o for o in reached[m] if m in reached[o])) for m in modules if m in reached[m]}
    return [list(group) for group in sorted(groups)]


def violations(package: Path) -> list[str]:
    """Every import that goes upward, as `importer imports imported`."""
    modules = modules_of(package)
    wrong = []
    for module, path in modules.items():
        layer = layer_of(module)
        for imported in imports_of(module, path, set(modules)):
            if imported.split(".")[0] != package.name:
                if imported.split(".")[0] == "triton" and not module.startswith("kvzip.ops.triton"):
                    wrong.append(f"{module} imports {imported}")
            elif layer != "kvzip" and layer_of(imported) not in {layer} | allowed_imports(layer):
                wrong.append(f"{module} imports {imported}")
    return sorted(wrong)


def test_no_import_goes_upward() -> None:
    assert violations(PACKAGE) == []


def test_no_modules_import_each_other() -> None:
    assert circles(PACKAGE) == []


def test_ranks_talk_in_one_room() -> None:
    modules = modules_of(PACKAGE)
    users = {m for m, path in modules.items() if "torch.distributed" in " ".join(imports_of(m, path, set(modules)))}
    assert "kvzip.files.shared" in users
    assert {layer_of(module) for module in users - {"kvzip.files.shared"}} == {"kvzip.parallel"}


def test_a_circle_is_caught_in_functions_too(tmp_path: Path) -> None:
    package = _small_package(tmp_path)
    assert circles(package) == []
    kernel, op = package / "ops/triton/select.py", package / "ops/select.py"
    kernel.write_text("def f():\n    from kvzip.ops.select import select\n", encoding="utf-8")
    assert circles(package) == []
    op.write_text("def g():\n    from .triton.select import f\n", encoding="utf-8")
    assert circles(package) == [["kvzip.ops.select", "kvzip.ops.triton.select"]]
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .triton.select import f\n"
    op.write_text(typed, encoding="utf-8")
    assert circles(package) == []


def test_few_rooms_are_large() -> None:
    sizes = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules_of(PACKAGE).items()}
    assert len([name for name, lines in sizes.items() if lines > 330]) <= 3, max(sizes, key=sizes.__getitem__)


def test_no_operation_has_more_parameters_than_can_be_read() -> None:
    counts = {}
    for path in (PACKAGE / "ops").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                given = node.args
                counts[path.name, node.name] = len(given.posonlyargs + given.args + given.kwonlyargs)
    assert counts["select.py", "select"] > 1
    assert max(counts.values()) <= 45, max(counts, key=counts.__getitem__)


def test_every_layer_of_the_package_is_found() -> None:
    layers = {layer_of(module) for module in modules_of(PACKAGE)}
    assert layers >= {"kvzip", "kvzip.ops", "kvzip.cache", "kvzip.models", "kvzip.attention", "kvzip.scoring"}


@pytest.mark.parametrize(
    ("file", "line", "imported"),
    [
        ("ops/select.py", "from kvzip.cache import DenseCache", "kvzip.cache"),
        ("ops/select.py", "import kvzip.scoring", "kvzip.scoring"),
        ("ops/select.py", "import kvzip", "kvzip"),
        ("ops/select.py", "import triton.language as tl", "triton.language"),
        ("cache/dense.py", "from ..models.config import ModelConfig", "kvzip.models.config"),
        ("models/load.py", "from .. import cache, prompts", "kvzip.cache"),
        ("models/load.py", "def f():\n    from ..cache import DenseCache", "kvzip.cache"),
        ("models/__init__.py", "from ..attention import attend", "kvzip.attention"),
        ("prompts.py", "from . import models", "kvzip.models"),
        ("attention.py", "from .prefilling import prefill", "kvzip.prefilling"),
        ("scoring.py", "from .compression import compress", "kvzip.compression"),
        ("head_scores.py", "from . import cli", "kvzip.cli"),
    ],
)
def test_an_upward_import_is_caught(tmp_path: Path, file: str, line: str, imported: str) -> None:
    package = _small_package(tmp_path)
    assert violations(package) == []
    (package / file).write_text(line + "\n", encoding="utf-8")
    module = "kvzip." + file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    assert violations(package) == [f"{module} imports {imported}"]


def test_a_layer_without_a_place_is_an_error(tmp_path: Path) -> None:
    package = _small_package(tmp_path)
    (package / "misc.py").write_text("from . import ops\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"expected a known layer, got kvzip\.misc"):
        violations(package)


def test_kvzip_imports_without_triton() -> None:
    program = "import sys; sys.modules['triton'] = None; from kvzip import *; import kvzip; print(min(kvzip.__all__))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout.strip()) == (0, sorted(kvzip.__all__)[0]), result.stderr


def _small_package(directory: Path) -> Path:
    """A package shaped like kvzip whose imports all go downward."""
    package = directory / "kvzip"
    files = {
        "__init__.py": "from .scoring import score",
        "ops/__init__.py": "from kvzip.ops.select import select",
        "ops/select.py": "import torch",
        "ops/triton/select.py": "import triton",
        "cache/__init__.py": "from .dense import DenseCache",
        "cache/dense.py": "from .. import ops",
        "prompts.py": "import json",
        "models/__init__.py": "from .load import load",
        "models/load.py": "from .. import prompts",
        "attention.py": "from . import ops\nfrom .cache import DenseCache\nfrom .models import load",
        "prefilling.py": "from .attention import attend",
        "scoring.py": "from . import prompts\nfrom .prefilling import prefill",
        "compression.py": "from .scoring import score",
        "generation.py": "from .compression import compress",
        "head_scores.py": "from .generation import generate",
        "cli.py": "from . import head_scores",
    }
    for name, source in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(source + "\n", encoding="utf-8")
    return package
