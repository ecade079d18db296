"""Every code block of README.md and docs/, run as it stands, in the order of its page, on small models.

The language of a block says what becomes of it:

    python    runs; the blocks of a page share one namespace
    bash      runs a line at a time through the real command line; every line must end with 0
    console   runs what follows "$ ", and compares what is printed with the lines below; "..." stands for any lines
    json      must be JSON
    text      is shown, not run

A block that cannot run here has a comment in front of it, <!-- not run: why -->, and stands in NOT_RUN.
"""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner
from markdown_it import MarkdownIt

import kvzip
import make_api_reference
import make_pictures
from kvzip.cli import main
from kvzip.small import packages as small_models
from test_cli import write_model

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = ("python", "bash", "console")

MODELS = ("Qwen/Qwen2.5-7B-Instruct-1M", "qwen2.5-7b")
"""Names of large models in the blocks, in whose place a tiny random one is put."""
REAL = "smollm2-135m-instruct"
"""The real model whose output console blocks show; it is in the working directory under this name."""
PARAGRAPH = "The contract was signed by Ines Vautier in 1871. The keeper counts 312 steps, and is paid for each. "
FILES = {"contract.txt": PARAGRAPH * 4, "book.txt": PARAGRAPH * 8, "huge.txt": PARAGRAPH * 8}
"""Documents that blocks read from the working directory, besides what a page makes itself."""

NOT_RUN = {
    ("README.md", "pip install -e '.[demo]'"),
    ("README.md", "kvzip demo"),
    ("docs/start.md", "$ kvzip demo"),
    ("README.md", "make demo    # the demo, in an environment of its own"),
    ("docs/start.md", "pip install -e '.[demo]'            # from a checkout, with what the demo needs"),
    ("docs/evals.md", "pip install matplotlib datasets"),
    ("docs/bytes.md", "python benchmarks/evaluation.py MODEL_DIR... --bytes --data DATA --work .bytes --workers 24"),
    ("docs/gpu_tests.md", "python tools/install_torch.py && pip install -e '.[dev,hub]'"),
    ("docs/gpu_tests.md", "pytest -o addopts= -rs tests/ops/test_sanitizer.py"),
    (
        "docs/parallel.md",
        "torchrun --nproc-per-node 4 -m kvzip compress book.txt -m meta-llama/Llama-3.1-70B-Instruct -o book.kvz",
    ),
    ("docs/parallel.md", "import os, torch, kvzip"),
    ("docs/parallel.md", "torchrun --nproc-per-node 4 benchmarks/parallel.py --shape llama-3.1-70b"),
    ("docs/gpu_tests.md", 'OMP_NUM_THREADS=1 pytest -m "slow and not gpu" -n 15 tests/ops'),
    ("docs/gpu_tests.md", "wheels='flashinfer-python==0.6.13 apache-tvm-ffi==0.1.15.post2'"),
    ("docs/gpu_tests.md", "python -m pytest -q -o addopts= -m gpu tests/ops/test_devices.py"),
    ("docs/serving.md", "pip install -e '.[serve,demo]' openai"),
    ("docs/serving.md", "$ head -n 6 kvzip/data/museum.txt > guide.txt"),
    ("docs/serving.md", "import openai"),
    (
        "docs/serving.md",
        "curl --data-binary @contract.txt -H 'Content-Type: text/plain' "
        "'http://127.0.0.1:8000/v1/documents?ratio=0.3&title=Contract'",
    ),
    ("docs/serving.md", "KVZIP_API_KEY=secret kvzip serve small guide.kvz --host 0.0.0.0"),
    ("docs/vllm.md", "pip install -e '.[vllm]'"),
    ("docs/vllm.md", "VLLM_PLUGINS=kvzip vllm serve meta-llama/Llama-3.1-8B-Instruct --attention-backend CUSTOM \\"),
    ("docs/vllm.md", "curl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{"),
    ("docs/vllm.md", "python -m pytest -o addopts= -p no:logging tests/vllm_plugin/test_probabilities.py"),
}
"""Page and first line of every block that is not run."""


@dataclass(frozen=True)
class Block:
    """A fenced block; `line` is that of its first line of code, `reason` why it is not run, or None."""

    page: str
    line: int
    language: str
    source: str
    reason: str | None


def blocks_of(text: str, page: str) -> list[Block]:
    """The blocks of a page. Raises ValueError for an indented one, which says nothing of its language."""
    found = []
    tokens = MarkdownIt("commonmark").parse(text)
    for before, token in zip([None, *tokens], tokens, strict=False):
        line = token.map[0] + 1 if token.map else 0
        if token.type == "code_block":
            raise ValueError(f"expected fenced blocks, got an indented one at {page}:{line}: fence it")
        if token.type == "fence":
            comment = before.content if before is not None and before.type == "html_block" else ""
            reason = re.fullmatch(r"<!-- not run: (.+?) -->\n", comment, re.DOTALL)
            found.append(Block(page, line + 1, token.info, token.content, reason[1] if reason else None))
    return found


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


BLOCKS = [block for page in PAGES for block in blocks_of(page.read_text(encoding="utf-8"), name_of(page))]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that stands for large ones: one token a byte, random weights, and many tokens that end an answer."""
    stops = list(range(0, 256, 3))
    return write_model(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=32_768, eos_token_id=stops)


@pytest.fixture(scope="module")
def loaded_once() -> Callable[..., kvzip.Model]:
    """`kvzip.load`, by which a model of the same options is loaded once for all blocks. Models never change."""
    load, known = kvzip.load, {}

    def once(source: str | Path, **options: Any) -> kvzip.Model:
        key = (str(Path(source).resolve()), repr(sorted(options.items())))
        if key not in known:
            known[key] = load(source, **options)
        return replace(known[key], source=str(source))

    return once


@pytest.fixture
def workplace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded_once: Callable[..., kvzip.Model], unchecked: None
) -> Path:
    """The current directory of blocks: documents, the checkout's examples and package, and commands on the path."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    for name in ("examples", "kvzip"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "bin").mkdir()
    python = shlex.quote(sys.executable)
    for name, command in (("kvzip", f"{python} -m kvzip"), ("python", python)):
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # pages show what a CPU prints
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("kvzip.load", "kvzip.models.load", "kvzip.opening.load"):
        monkeypatch.setattr(name, loaded_once)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_blocks(blocks: list[Block], model: Path, directory: Path) -> None:
    """Runs the blocks of one page. Raises AssertionError, or what a python block raises, for the first that fails."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    if any(REAL in block.source for block in blocks) and not (directory / REAL).exists():
        try:
            (directory / REAL).symlink_to(small_models.model_dir(REAL))
        except small_models.Unavailable as missing:
            pytest.skip(f"left out, {REAL} cannot be had here: {missing}")
    if any(re.search(r"-m small\b", block.source) for block in blocks):
        try:
            small_models.model_dir(REAL)
        except small_models.Unavailable as missing:
            pytest.skip(f"left out, {REAL} cannot be had here: {missing}")
    for block in blocks:
        source = block.source
        for name in MODELS:
            source = re.sub(rf"(?<![\w/.-]){re.escape(name)}(?![\w/.-])", str(model), source)
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + source, str(ROOT / block.page), "exec"), namespace)
        elif block.language == "bash":
            for line in source.replace("\\\n", " ").splitlines():
                run_line(line, block)
        elif block.language == "console":
            for command, expected in sessions(source):
                printed = run_line(command, block)
                assert matches(printed, expected), f"{block.page}:{block.line}: {command}\nprints\n{printed}"


def run_line(line: str, block: Block) -> str:
    """What one line of shell prints, on both streams.

    `kvzip` runs in this process, alone or at the end of a pipe; all else runs in bash.
    """
    before, pipe, last = line.rpartition(" | ")
    parts = words_of(last)
    if not parts:
        return ""
    status, printed, piped = 0, "", b""
    ours = parts[0] == "kvzip" and "$" not in last and not any(set(part) <= set("();<>|&") for part in parts)
    if not ours or pipe:
        shell = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", before if ours else line],
            stdout=subprocess.PIPE,
            stderr=None if ours else subprocess.STDOUT,
            check=False,
        )
        status, piped = shell.returncode, shell.stdout
        printed = piped.decode()
    if ours and status == 0:
        result = CliRunner().invoke(main, parts[1:], prog_name="kvzip", input=piped)
        status, printed = result.exit_code, result.output
    assert status == 0, f"{block.page}:{block.line}: {line}\nended with {status}\n{printed}"
    return printed


def words_of(line: str) -> list[str]:
    """The words and operators of a line of shell."""
    words = shlex.shlex(line, posix=True, punctuation_chars=True)
    words.whitespace_split = True
    return list(words)


def sessions(source: str) -> list[tuple[str, str]]:
    """The commands of a console block, each with what it prints."""
    parts = re.split(r"(?m)^\$ ", source.replace("\\\n", " "))
    assert not parts[0].strip(), "a console block begins with a command"
    return [(command, printed) for command, _, printed in (part.partition("\n") for part in parts[1:])]


def matches(printed: str, expected: str) -> bool:
    """Whether a program printed what a page shows, but for times and the ends of lines; `...` is any lines."""

    def plain(text: str) -> list[str]:
        return [re.sub(r"\d[\d.,]* (m?s)\b", r"N \1", line.rstrip()) for line in text.rstrip().splitlines()]

    lines = [r"(?:.*\n)*?" if line == "..." else re.escape(line) + "\n" for line in plain(expected)]
    return re.fullmatch("".join(lines), "".join(f"{line}\n" for line in plain(printed))) is not None


@pytest.mark.parametrize("page", dict.fromkeys(block.page for block in BLOCKS if block.language in RUN))
def test_the_blocks_of_a_page_run(page: str, tiny: Path, workplace: Path) -> None:
    run_blocks([block for block in BLOCKS if block.page == page and block.reason is None], tiny, workplace)


def test_only_the_listed_blocks_are_not_run() -> None:
    assert {(block.page, block.source.split("\n")[0]) for block in BLOCKS if block.reason} == NOT_RUN
    assert sum(block.reason is not None for block in BLOCKS) == len(NOT_RUN)


def test_every_block_names_its_language() -> None:
    unknown = [f"{b.page}:{b.line} {b.language!r}" for b in BLOCKS if b.language not in (*RUN, "json", "text")]
    assert not unknown
    for block in BLOCKS:
        if block.language == "json":
            json.loads(block.source)


@pytest.mark.parametrize(
    ("language", "source", "error"),
    [
        (
            "python",
            "import kvzip\nassert kvzip.load('Qwen/Qwen2.5-7B-Instruct-1M').config.num_heads == 5",
            AssertionError,
        ),
        ("python", "kvzip.prefil(None, '')", NameError),
        ("bash", "kvzip compress contract.txt -m nowhere/at/all -o c.kvz", AssertionError),
        ("bash", "cat contract.txt | kvzip compress - --ratio 2 -m qwen2.5-7b", AssertionError),
        ("console", "$ head -c 12 contract.txt\nthe contract", AssertionError),
        ("console", "$ echo one; echo two; echo three\none\n...\nfour", AssertionError),
    ],
)
def test_a_block_that_is_wrong_fails(
    language: str, source: str, error: type[Exception], tiny: Path, workplace: Path
) -> None:
    (block,) = blocks_of(f"# A page\n\n```{language}\n{source}\n```\n", "page.md")
    with pytest.raises(error):
        run_blocks([block], tiny, workplace)


def test_a_page_is_read_as_it_is_shown() -> None:
    with pytest.raises(ValueError, match=r"expected fenced blocks, got an indented one at page\.md:3"):
        blocks_of("text\n\n    make demo\n", "page.md")
    (block,) = blocks_of("<!-- not run: takes hours -->\n```bash\nmake\n```\n", "page.md")
    assert (block.line, block.language, block.source, block.reason) == (3, "bash", "make\n", "takes hours")
    (block,) = blocks_of("<!-- not run: takes hours -->\n\ntext\n\n```bash\nmake\n```\n", "page.md")
    assert block.reason is None, "a comment speaks for the block right behind it"
    assert matches("took 12.5 s \na\nb\n", "took 9 s\n...\nb") and not matches("took 12.5 s\na\n", "took 9 s\n...\nb")


def test_the_api_page_is_made_from_the_docstrings() -> None:
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == make_api_reference.reference(), (
        "docs/api.md is not what the docstrings say: run  python tools/make_api_reference.py"
    )


@pytest.mark.parametrize("name", make_pictures.PICTURES)
def test_pictures_are_drawn_by_their_script_and_can_be_read(name: str) -> None:
    picture = make_pictures.PICTURES[name]()
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == picture.svg(), (
        f"docs/{name} is not what its script draws: run  python tools/make_pictures.py"
    )
    words = ElementTree.fromstring(picture.svg()).findall("{http://www.w3.org/2000/svg}text")
    assert len(words) > 5 and all(float(word.attrib["font-size"]) >= 12 for word in words)
    left = {"start": 0.0, "middle": 0.5, "end": 1.0}
    for word in words:
        width = 0.62 * float(word.attrib["font-size"]) * len(word.text or "")  # a letter is narrower in any usual font
        start = float(word.attrib["x"]) - left[word.attrib["text-anchor"]] * width
        assert start >= 0 and start + width <= picture.width and float(word.attrib["y"]) <= picture.height - 8, (
            word.text
        )
    assert (ROOT / "docs" / name).name in "".join(page.read_text(encoding="utf-8") for page in PAGES)


def test_readme_is_short_and_tables_of_speed_have_one_place() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150 and text.count("![") == 1, (
        "the README is one screen, then depth: move it to docs/"
    )
    for name in ("ops", "end-to-end"):
        assert f"<!-- {name}:start -->" in (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")


def test_cited_lines_say_what_code_and_day_they_are_of() -> None:
    cited = 0
    for page in PAGES:
        for target in links_of(page):
            if (line := re.fullmatch(r"(.*\.jsonl)#L(\d+)", target)) is not None:
                record = json.loads((page.parent / line[1]).read_text(encoding="utf-8").splitlines()[int(line[2]) - 1])
                assert record.get("commit") and record.get("date"), f"{page.name}: {target} has no commit or date"
                cited += 1
    assert cited > 100


def links_of(page: Path) -> list[str]:
    tokens = MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))
    inline = [child for token in tokens if token.type == "inline" for child in token.children or []]
    targets = [child.attrGet("href" if child.type == "link_open" else "src") for child in inline]
    return [str(target) for target in targets if target]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    wrong = []
    for target in links_of(page):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        if not file.exists():
            wrong.append(target)
        elif line := re.fullmatch(r"L(\d+)", anchor):
            if int(line[1]) > len(file.read_text(encoding="utf-8").splitlines()):
                wrong.append(target)
        elif anchor and anchor not in headings(file):
            wrong.append(target)
    assert not wrong


def headings(page: Path) -> set[str]:
    """The anchors that headings of a page get."""
    found = re.findall(r"(?m)^#+ (.+)$", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_names_that_pages_mention_exist(page: Path) -> None:
    spans = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", page.read_text(encoding="utf-8"))
    files = [span for span in spans if re.fullmatch(r"(kvzip|tests|tools|benchmarks|examples|docs)/[\w./-]+", span)]
    names = [span.partition("(")[0] for span in spans if re.match(r"kvzip(\.\w+)+(\(|$)", span)]
    missing = [file for file in files if not (ROOT / file).exists()] + [name for name in names if not exists(name)]
    assert not missing


def test_the_map_names_every_room_and_no_other() -> None:
    page = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    named = {span.rstrip("/") for span in re.findall(r"`([\w./]+(?:\.py|/))`", page)}
    missing = [name for name in named if not any((ROOT / part / name).exists() for part in ("", "kvzip"))]
    assert not missing, "the page names files that are not there"
    files = {path.relative_to(ROOT / "kvzip").parts[0] for path in (ROOT / "kvzip").rglob("*.py")}
    rooms = {name for name in files if not name.startswith("__")}
    assert not rooms - {name.removeprefix("kvzip/").split("/")[0] for name in named}, "rooms that are not on the page"
    picture = re.search(r"```text\n(.*?)```", page, re.DOTALL)
    assert picture is not None
    modules = {path.stem for path in (ROOT / "kvzip").rglob("*.py")} | rooms
    drawn = re.findall(r"(?<=-> )\w+|\w+(?= ->)", picture[1])
    assert len(drawn) > 8 and set(drawn) <= modules, "stages of the picture"
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "kvzip").rglob("*.py"))
    words = {word for word in re.findall(r"`([A-Za-z_]+)(?:\(.*?\))?`", page) if word not in modules}
    assert words and not [word for word in words if not re.search(rf"(def|class) {word}\b|\b{word} = ", source)]


def exists(name: str) -> bool:
    """Whether a dotted name is that of a module, or of something in one."""
    value: Any = kvzip
    for part in name.split(".")[1:]:
        try:
            value = getattr(value, part)
        except AttributeError:
            try:
                value = importlib.import_module(f"{value.__name__}.{part}")
            except (AttributeError, ImportError):
                return part in getattr(value, "__annotations__", {})
    return True
