"""The packages: what they hold, what they ask for, and that they run where nothing else is; what an import costs."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import kvzip
import random_model
from kvzip.cli import documents, serve
from kvzip.evals import plots, tasks
from kvzip.small import packages as small_models
from kvzip.vllm import versions
from test_cli import TEXT, write_model
from test_layering import imports_of, modules_of

ROOT = Path(__file__).parents[1]
HEAVY = (
    *("bs4", "datasets", "docx", "fastapi", "huggingface_hub", "matplotlib", "pandas", "pydantic", "pypdf"),
    *("starlette", "transformers", "uvicorn"),
)
IMPORTED = {"beautifulsoup4": "bs4", "python-docx": "docx"}
"""Packages whose modules have another name."""
IMPORT_SECONDS = 1.5


@dataclass(frozen=True)
class Built:
    """The two packages, made from a copy of the checkout, and what the wheel says of itself."""

    sdist: Path
    wheel: Path
    described: metadata.Distribution

    @property
    def requirements(self) -> list[Requirement]:
        return [Requirement(line) for line in self.described.requires or ()]

    @property
    def core(self) -> list[Requirement]:
        return [r for r in self.requirements if r.marker is None or r.marker.evaluate({"extra": ""})]

    def extra(self, name: str) -> set[str]:
        """The packages that an extra brings by itself, extras within it not counted."""
        asked = (r for r in self.requirements if r.marker is not None and r.marker.evaluate({"extra": name}))
        return {r.name for r in asked if r not in self.core and r.name != "kvzip"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    directory = tmp_path_factory.mktemp("packages")
    left_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "shared", "results")
    shutil.copytree(ROOT, directory / "checkout", ignore=left_out)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(directory), str(directory / "checkout")]
    subprocess.run(command, check=True, capture_output=True, env=_environment())  # the wheel is made from the sdist
    (sdist,), (wheel,) = directory.glob("*.tar.gz"), directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory / "unpacked")
    (described,) = metadata.distributions(path=[str(directory / "unpacked")])
    return Built(sdist, wheel, described)


def test_the_packages_hold_the_library_and_nothing_else(built: Built) -> None:
    package = {
        path.relative_to(ROOT).as_posix()
        for pattern in (
            "*.py",
            "py.typed",
            "data/*.html",
            "data/*.json",
            "data/*.txt",
            "data/head_scores/*.safetensors",
        )
        for path in (ROOT / "kvzip").rglob(pattern)
    }
    data = {"report.html", "words.json", "museum.txt", "head_scores/gemma-3-270m.safetensors"}
    assert {"kvzip/py.typed", *(f"kvzip/data/{name}" for name in data)} <= package
    with zipfile.ZipFile(built.wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        licenses = {Path(name).name: archive.read(name) for name in archive.namelist() if "/licenses/" in name}
    assert licenses == {name: (ROOT / name).read_bytes() for name in ("LICENSE", "NOTICE")}
    assert names == package
    with tarfile.open(built.sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames() if not archive.getmember(name).isdir()}
    made = {"PKG-INFO", "setup.cfg", *(name for name in inside if name.startswith("kvzip.egg-info/"))}
    assert inside - made == package | {
        "CHANGELOG.md",
        "LICENSE",
        "NOTICE",
        "MANIFEST.in",
        "README.md",
        "pyproject.toml",
    }


def test_the_version_is_one(built: Built) -> None:
    version = kvzip.__version__
    assert built.described.version == version and f"kvzip-{version}" in built.sdist.name
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[1] == version  # pyright: ignore
    assert version not in (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project.optional", 1)[0]


def test_what_the_library_imports_is_declared(built: Built) -> None:
    modules = modules_of(ROOT / "kvzip")
    found = {name.split(".")[0] for module, path in modules.items() for name in imports_of(module, path, set(modules))}
    declared = {r.name for r in built.core}.union(*(built.extra(name) for name in EXTRAS))
    assert found - {"kvzip", *sys.stdlib_module_names} == {IMPORTED.get(name, name) for name in declared}
    others = {module: path for module, path in modules.items() if not module.startswith("kvzip.server")}
    at_once = [
        node
        for path in others.values()
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    always = {
        node.module.split(".")[0] if isinstance(node, ast.ImportFrom) and node.module else node.names[0].name
        for node in at_once
        if not getattr(node, "level", 0)
    }
    assert not always & set(HEAVY), "an extra must be imported where it is used"
    rooms = {node.module or "" for node in at_once if isinstance(node, ast.ImportFrom) and node.level}
    assert not {name for name in rooms if name.split(".")[0] == "server"}, "the server's room needs its extra"


def test_the_wheel_runs_where_only_its_dependencies_are(built: Built, tmp_path: Path) -> None:
    """A new environment sees the wheel, and links to exactly what the wheel requires: nothing is downloaded."""
    venv.create(tmp_path / "env", symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, str(built.wheel)], check=True, env=_environment())
    (packages,) = (tmp_path / "env").glob("lib/python*/site-packages")
    for name, path in _files_of(built.core).items():
        (packages / name).symlink_to(path)
    model = write_model(tmp_path / "tiny")
    (tmp_path / "doc.txt").write_text(TEXT, encoding="utf-8")

    def run(*command: object) -> str:
        environment = _environment() | {"PATH": f"{python.parent}:{os.environ['PATH']}"}
        done = subprocess.run(
            [str(a) for a in command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert run("kvzip", "--version") == f"kvzip, version {kvzip.__version__}"
    run("kvzip", "compress", "doc.txt", "-m", model, "-r", "0.4", "-o", "doc.kvz", "--device", "cpu")
    where, facts, _, heavy = run(python, "-c", USE).splitlines()
    assert Path(where) == packages / "kvzip" / "__init__.py"
    assert facts == f"True 3 3 {kvzip.__version__}" and heavy == "[]"
    assert "<title>doc.txt · kvzip</title>" in (tmp_path / "doc.html").read_text(encoding="utf-8")


USE = f"""
import sys, kvzip, torch
model = kvzip.load("tiny", device="cpu")  # in the dtype that the command takes
cache = kvzip.load_cache("doc.kvz", model=model)
answer = kvzip.generate(model, cache, "When?", max_tokens=3)
print(kvzip.__file__)
shipped = kvzip.head_scores.shipped("gemma-3-270m")
print(cache.kept == int(0.4 * cache.total), len(answer.token_ids), len(shipped.layers), kvzip.__version__)
from kvzip.cli import main
main(["report", "doc.kvz", "-o", "doc.html"], standalone_mode=False)
print([name for name in {HEAVY} if name in sys.modules])
"""


# --- extras


def _pdf(directory: Path) -> None:
    (directory / "a.pdf").write_bytes(b"%PDF-1.4")
    documents.read([str(directory / "a.pdf")])


def _html(directory: Path) -> None:
    (directory / "a.html").write_bytes(b"<!doctype html><p>text")
    documents.read([str(directory / "a.html")])


def _docx(directory: Path) -> None:
    (directory / "a.docx").write_bytes(b"PK\x03\x04 word/document.xml")
    documents.read([str(directory / "a.docx")])


def _plot(_: Path) -> None:
    kvzip.scores.plot(kvzip.Scores(torch.rand(1, 1, 4), (0,), 0, 4, "any"))


def _eval(_: Path) -> None:
    next(tasks.examples("squad", tasks.Request(1, 1, 100, 0, "hub", len)))


def _transformers(_: Path) -> None:
    model = random_model.make(random_model.config())
    kvzip.to_transformers(model, kvzip.prefill(model, "text"))


def _demo(directory: Path) -> None:
    small_models.model_dir("smollm2-135m-instruct", directory)


def _serve(_: Path) -> None:
    serve._uvicorn()


EXTRAS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "hub": ("huggingface_hub", lambda _: kvzip.load("someone/some-model")),
    "pdf": ("pypdf", _pdf),
    "html": ("beautifulsoup4", _html),
    "docx": ("python-docx", _docx),
    "plot": ("matplotlib", _plot),
    "eval": ("datasets", _eval),
    "transformers": ("transformers", _transformers),
    "demo": ("gguf", _demo),
    "serve": ("fastapi", _serve),
    "vllm": ("vllm", lambda _: versions.version()),
}
"""Each extra, a package that it brings, and something that needs it."""


@pytest.mark.parametrize("extra", EXTRAS)
def test_what_needs_an_extra_names_it(extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, use = EXTRAS[extra]
    monkeypatch.delenv("KVZIP_TEST_MODELS", raising=False)
    package = IMPORTED.get(package, package)
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises((ImportError, small_models.Unavailable), match=rf"pip install .*\[{extra}\]"):
        use(tmp_path)


def test_an_eval_report_names_the_plot_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install matplotlib \(in a checkout pip install -e '\.\[plot\]'\)"):
        plots._canvas(1, 1, "title")


def test_every_extra_is_for_something(built: Built) -> None:
    named = set(built.described.metadata.get_all("Provides-Extra") or ())
    assert named == {*EXTRAS, "dev"}
    for extra, (package, _) in EXTRAS.items():
        assert package in built.extra(extra)


# --- imports


def test_the_import_is_quick_and_takes_no_more_than_it_needs() -> None:
    bare = "from time import process_time as now; t = now(); import kvzip; print(now() - t)"
    assert any(float(_python(bare)) < IMPORT_SECONDS for _ in range(3))
    unwanted = (*HEAVY, "numpy", "rich", "torch", "triton")
    assert _python(f"import sys, kvzip; print([name for name in {unwanted} if name in sys.modules])") == "[]"
    whole = (
        "import torch, sys; from time import process_time as now; t = now(); from kvzip import *; "
        f"print(now() - t, not any(name in sys.modules for name in {(*HEAVY, 'rich', 'triton')}))"
    )
    printed = (_python(whole).split() for _ in range(3))
    assert any(float(seconds) < IMPORT_SECONDS and light == "True" for seconds, light in printed)


WITHOUT_TRITON = """
import os, sys
sys.modules["triton"] = None
sys.path.insert(0, sys.argv[1])
import kvzip, random_model
model = random_model.make(random_model.config())
def answer():
    full = kvzip.score(model, kvzip.prefill(model, "The keeper counted 312 steps, and wrote them down."))
    small = kvzip.compress(full, 0.5, bits=8)
    return small.kept == full.total // 2, len(kvzip.generate(model, small, "How many?", max_tokens=3).token_ids)
print(*answer())
os.environ["KVZIP_BACKEND"] = "triton"
for interpret in "01":
    os.environ["TRITON_INTERPRET"] = interpret
    try:
        answer()
    except (ImportError, ValueError) as error:
        print(type(error).__name__, error)
"""


def test_a_cpu_needs_no_triton_and_forcing_it_is_a_clear_error() -> None:
    worked, on_cpu, interpreted = _python(WITHOUT_TRITON, str(ROOT / "tests")).splitlines()
    assert worked == "True 3"
    assert on_cpu.startswith("ValueError expected CUDA tensors for KVZIP_BACKEND=triton, got cpu: set TRITON_INTERPRET")
    assert interpreted == (
        "ImportError expected Triton for the kernels, got no such package: pip install triton, or set "
        "KVZIP_BACKEND=reference, which is plain PyTorch on any device"
    )


def test_a_triton_too_old_for_the_kernels_is_named() -> None:
    program = (
        "import triton; triton.__version__ = '3.3.1'\ntry:\n    import kvzip.ops.triton.norm\n"
        "except ImportError as error: print(error)"
    )
    assert _python(program).startswith("expected Triton 3.5 or newer (torch 2.9) for the kernels, got 3.3.1, which ")


def _python(program: str, *arguments: str) -> str:
    command = [sys.executable, "-c", program, *arguments]
    environment = _environment(PYTHONPATH=str(ROOT))
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()


def _environment(**more: str) -> dict[str, str]:
    """The variables of a fresh shell: the tests' own backend and paths are left out."""
    ours = ("PYTHONPATH", "PYTHONHOME", "TRITON_INTERPRET", "KVZIP_BACKEND")
    return {name: value for name, value in os.environ.items() if name not in ours} | {"PYTHONNOUSERSITE": "1"} | more


def _files_of(requirements: list[Requirement]) -> dict[str, Path]:
    """What the requirements, and theirs in turn, have in site-packages: name there to path here."""
    found: dict[str, Path] = {}
    todo, seen = list(requirements), set()
    while todo:
        wanted = todo.pop()
        installed = metadata.distribution(wanted.name)
        assert wanted.specifier.contains(installed.version, prereleases=True), f"expected {wanted}, got {installed}"
        if (key := (wanted.name.lower(), *sorted(wanted.extras))) in seen:
            continue
        seen.add(key)
        for name in {file.parts[0] for file in installed.files or ()} - {"..", "__pycache__"}:
            found[name] = Path(str(installed.locate_file(name)))
        for further in map(Requirement, installed.requires or ()):
            extras = wanted.extras or {""}
            if further.marker is None or any(further.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(further)
    return found
