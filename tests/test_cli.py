"""The `kvzip` command on a tiny model in a directory: what it prints, writes and leaves, and how it fails."""

import errno
import json
import os
import pty
import re
import resource
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

import kvzip
import random_model
from kvzip import head_scores
from kvzip.cache import nbytes, read_header
from kvzip.cli import documents, main
from kvzip.cli.ask import _in_order
from kvzip.cli.output import put_json, size, stages
from kvzip.cli.plumbing import IN_THE_LIBRARY
from kvzip.display import visible, visible_line
from kvzip.evals.run import append as append_answer
from kvzip.hub import SHIPPED
from kvzip.models.llama import LAYER_NAMES
from kvzip.models.weights import slots
from kvzip.prefilling import dense_bytes
from rewritten import rewrite

TEXT = "The lighthouse at Cape Rouen was built in 1871. Its keeper, Ines Vautier, counted 312 steps. " * 4
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(kvzip.__file__).parents[1])}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers in Hugging Face's format, one token a byte."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


def write_model(directory: Path, *, seed: int = 0, qkv_bias: bool = False, **changes: Any) -> Path:
    directory.mkdir()
    config = random_model.config(qkv_bias=qkv_bias)
    model = random_model.make(config, seed=seed)
    tensors = {
        name if name.startswith("lm_head") else f"model.{name}": tensor.clone()
        for name, tensor in slots(config, model.weights, LAYER_NAMES).items()
    }
    save_file(tensors, directory / "model.safetensors")
    described = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "num_hidden_layers": len(config.layers),
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.layers[0].rope.theta,
        "max_position_embeddings": config.max_length,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "eos_token_id": random_model.END,
        **changes,
    }
    (directory / "config.json").write_text(json.dumps(described), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": random_model.TEMPLATE}), encoding="utf-8"
    )
    model.tokenizer.control.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def model(model_dir: Path) -> kvzip.Model:
    return kvzip.load(model_dir, device="cpu")  # in its default dtype, as the command loads it


@pytest.fixture(scope="module")
def small(model: kvzip.Model) -> kvzip.RaggedCache:
    """What `compress` should hold of TEXT."""
    return kvzip.compress(kvzip.score(model, kvzip.prefill(model, TEXT)), 0.3)


@pytest.fixture(scope="module")
def kvz(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """TEXT compressed by the command. Tests read it and do not write to it."""
    directory = tmp_path_factory.mktemp("made")
    (directory / "light.txt").write_text(TEXT, encoding="utf-8")
    path = directory / "light.kvz"
    result = call("compress", directory / "light.txt", "-m", model_dir, "--device", "cpu", "-o", path)
    assert result.exit_code == 0, result.stderr
    return path


@pytest.fixture
def document(tmp_path: Path) -> Path:
    (tmp_path / "doc.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "doc.txt"


def call(*arguments: object, text: str | None = None) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], input=text)


def one_line(result: Result, code: int = 1) -> str:
    """The only line on standard error of a command that failed, with nothing on standard output."""
    assert result.exit_code == code, (result.stderr, result.exception)
    assert result.stdout == "" and result.stderr.count("\n") == 1 and "Traceback" not in result.stderr, result.output
    return result.stderr.strip()


def same_pairs(a: kvzip.RaggedCache, b: kvzip.RaggedCache) -> bool:
    if (a.kept, a.total, a.method, a.chat, a.start) != (b.kept, b.total, b.method, b.chat, b.start):
        return False
    return torch.equal(a.token_ids, b.token_ids) and all(
        torch.equal(getattr(x, name), getattr(y, name))
        for x, y in zip(a.context, b.context, strict=True)
        for name in ("k", "v", "offsets", "positions")
    )


# --- compress


def test_compress_writes_what_the_library_makes(kvz: Path, small: kvzip.RaggedCache, model_dir: Path) -> None:
    cache = kvzip.load_cache(kvz)
    assert isinstance(cache, kvzip.RaggedCache) and same_pairs(cache, small)
    assert cache.kept == int(0.3 * cache.total)
    note = read_header(kvz)["note"]
    assert note["title"] == "light.txt"
    how = {"dtype": "bfloat16", "max_length": None, "rope": None}
    assert read_header(kvz)["model"] == {"source": str(model_dir), **how} and "load" not in note


def test_a_file_opens_with_the_rope_and_length_that_its_model_was_loaded_with(tmp_path: Path, model_dir: Path) -> None:
    rope = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096}
    for n, how in enumerate([{"rope": rope, "max_length": 5000}, {"max_length": 5000}, {"rope": rope}]):
        made, path = kvzip.load(model_dir, device="cpu", **how), tmp_path / f"{n}.kvz"
        kvzip.save(kvzip.prefill(made, TEXT), path, model=made)
        opened, cache = kvzip.open(path, device="cpu")
        assert (opened.config, opened.rope, opened.max_length) == (made.config, made.rope, made.max_length)
        kvzip.save(cache, path, model=opened, overwrite=True)
        assert read_header(path)["model"] == {"dtype": "bfloat16", "source": str(model_dir), **_NO_HOW, **how}


_NO_HOW = {"rope": None, "max_length": None}


def test_compress_prints_facts_as_json(document: Path, model_dir: Path, model: kvzip.Model) -> None:
    out = document.with_name("out.kvz")
    options = ("--level", "uniform", "--budget", 50, "--bits", 8, "--scope", "chunk", "--chunk", 100)
    result = call("compress", document, "-m", model_dir, "-o", out, *options, "--system", "Be brief.", "--json")
    facts = json.loads(result.stdout)
    full = kvzip.prefill(model, TEXT, system="Be brief.")
    scored = kvzip.score(model, full, scope="chunk", chunk=100)
    expected = kvzip.compress(scored, level="uniform", budget=50.0, bits=8)
    assert (facts["kept"], facts["total"], facts["tokens"]) == (expected.kept, expected.total, full.length)
    assert facts["cache_bytes"] == nbytes(expected) and facts["full_bytes"] == nbytes(full)
    assert facts["file_bytes"] == out.stat().st_size and set(facts["seconds"]) == {"prefill", "score", "compress"}
    cache = kvzip.load_cache(out, model=model)
    assert torch.equal(cache.context[1].k.codes, expected.context[1].k.codes)  # pyright: ignore


def test_compress_to_a_budget_of_bytes_in_two_numbers_of_bits(
    document: Path, model_dir: Path, model: kvzip.Model
) -> None:
    out = document.with_name("bytes.kvz")
    full = nbytes(kvzip.prefill(model, TEXT))
    size = full // 3
    made = ("compress", document, "-m", model_dir, "-o", out, "--bits", "8,4", "--chunk", 100)
    facts = json.loads(call(*made, "--budget-bytes", f"{size / 1000}kB", "--json").stdout)
    cache = kvzip.load_cache(out, model=model)
    assert isinstance(cache, kvzip.RaggedCache) and cache.kept == facts["kept"] > 0
    scored = kvzip.score(model, kvzip.prefill(model, TEXT), chunk=100)
    assert cache.kept == kvzip.compress(scored, budget_bytes=size, bits=(8, 4)).kept
    assert facts["cache_bytes"] <= size and json.loads(call("info", out, "--json").stdout)["bits"] == [8, 4]
    assert "packed into 8 and 4 bits" in call("info", out).stdout
    fitted = json.loads(call(*made, "--budget-bytes", f"{size / 1000}kB", "--json", "--refit", "--force").stdout)
    assert fitted["cache_bytes"] <= size and fitted["kept"] < facts["kept"]
    said = one_line(call(*made, "--budget-bytes", "1kB", "--force"))
    assert "expected a budget of at least" in said and "raise --budget-bytes" in said


def test_without_a_name_the_file_is_named_after_the_document(
    document: Path, model_dir: Path, model: kvzip.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(document.parent)
    result = call("compress", "doc.txt", "-m", model_dir, "--plain", "-r", 0.5)
    assert result.stdout.startswith("doc.kvz: 372 tokens, 50.0% of 1,488 pairs kept, cache 50.6 kB -> "), result.stdout
    assert result.stderr == ""  # no progress where nobody looks
    cache = kvzip.load_cache("doc.kvz")
    assert cache.chat is False
    continued = visible(kvzip.generate(model, cache, "\n\nThe keeper", max_tokens=5, template=False).text)
    assert call("ask", "doc.kvz", "The keeper", "-n", 5).stdout == continued + "\n"


def test_standard_input_is_a_document(tmp_path: Path, model_dir: Path, small: kvzip.RaggedCache) -> None:
    out = tmp_path / "in.kvz"
    result = call("compress", "-", "-m", model_dir, "-o", out, "--title", "mine", text=TEXT)
    assert result.exit_code == 0
    cache = kvzip.load_cache(out)
    assert isinstance(cache, kvzip.RaggedCache) and same_pairs(cache, small)
    assert read_header(out)["note"]["title"] == "mine"


def test_an_interrupted_run_in_segments_goes_on_and_ends_with_the_same_bits(
    document: Path, model_dir: Path, model: kvzip.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, partial = document.with_name("out.kvz"), document.with_name("out.kvz.partial")
    command = ("compress", document, "-m", model_dir, "-o", out, "--segment", 150)
    whole = kvzip.streaming.prefill.extend
    calls = []

    def stop_at_the_second(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*arguments, **options)

    monkeypatch.setattr("kvzip.streaming.prefill.extend", stop_at_the_second)
    line = one_line(call(*command), 130)
    assert line == f"kvzip: interrupted: what is done is in {partial}: the same command goes on from there"
    assert not out.exists() and partial.exists()
    assert "delete" in one_line(call(*command, "-r", 0.4))  # other arguments than the run was begun with
    assert call(*command).exit_code == 0
    assert len(calls) == 4  # the first segment was not done again
    expected = kvzip.prefill_compressed(model, TEXT, 0.3, segment=150)
    cache = kvzip.load_cache(out)
    assert isinstance(cache, kvzip.RaggedCache) and same_pairs(cache, expected)
    assert not partial.exists()


# --- documents


def test_a_directory_is_one_context_with_its_paths(tmp_path: Path) -> None:
    project = tmp_path / "project"
    (project / "src").mkdir(parents=True)
    (project / ".hidden").mkdir()
    (project / "__pycache__").mkdir()
    (project / "src" / "b.py").write_text("b = 2\n", encoding="utf-8")
    (project / "a.md").write_text("# A\n", encoding="utf-8")
    (project / "picture.png").write_bytes(b"\x89PNG\0\xff")
    for hidden in (".hidden/x", "__pycache__/y", ".z"):
        (project / hidden).write_text("no\n", encoding="utf-8")
    expected = "===== a.md =====\n# A\n\n\n===== src/b.py =====\nb = 2\n"
    assert documents.read([str(project)]) == (expected, "project")
    subprocess.run(["git", "init", "-q", project], check=True)
    (project / ".gitignore").write_text("src\n.*\n__pycache__\n", encoding="utf-8")
    assert documents.read([str(project)])[0] == "# A\n"


def test_of_a_directory_only_its_own_text_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, outside = tmp_path / "project", tmp_path / "outside.txt"
    (project / "sub").mkdir(parents=True)
    outside.write_text("secret", encoding="utf-8")
    (project / "a.py").write_text("a = 1\n", encoding="utf-8")
    for n in range(4):
        (project / f"latin{n}.txt").write_bytes("caf\xe9".encode("latin-1"))
    for name, target in [("loop", ".."), ("twice.py", "../a.py"), ("gone", "nowhere"), ("self", "self")]:
        (project / "sub" / name).symlink_to(target)
    (project / "secret.txt").symlink_to(outside)
    os.mkfifo(project / "pipe")
    told: list[str] = []
    monkeypatch.setattr(documents, "say", told.append)
    assert documents.read([str(project)])[0] == "a = 1\n"
    assert told == [f"{project}: left out being no text in UTF-8: latin0.txt, latin1.txt, latin2.txt, latin3.txt"]
    subprocess.run(["git", "init", "-q", project], check=True)
    assert documents.read([str(project)])[0] == "a = 1\n"
    (project / "a.py").unlink()
    with pytest.raises(ValueError, match="without any: its 4 files are left out"):
        documents.read([str(project)])
    for left in sorted(project.glob("*.txt"))[1:]:
        left.unlink()
    with pytest.raises(ValueError, match="without any: its 1 file is left out"):
        documents.read([str(project)])


def test_a_pipe_is_read_once_and_standard_input_may_be_no_text(tmp_path: Path) -> None:
    out = tmp_path / "out.kvz"
    end, beginning = os.pipe()
    os.write(beginning, b"# Notes")
    os.close(beginning)
    assert documents.read([f"/dev/fd/{end}"]) == ("# Notes", "pipe")
    os.close(end)
    for junk in (b"\xff\xfe\0", b"a\0b"):
        result = CliRunner().invoke(main, ["compress", "-", "-m", "x", "-o", str(out)], input=junk)
        formats = "text in UTF-8, HTML, a PDF or a Word document (.docx)"
        assert one_line(result) == f"kvzip: expected {formats}, got standard input that is none: convert it first"


def test_several_documents_are_told_apart(document: Path) -> None:
    other = document.with_name("other.md")
    other.write_text("\ufeff# Other", encoding="utf-8")
    text, title = documents.read([str(other), str(document)])
    assert text == f"===== {other} =====\n# Other\n\n===== {document} =====\n{TEXT}"
    assert title == "other.md, doc.txt"


def test_a_pdf_is_read_with_the_extra_and_asks_for_it_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "doc.pdf"
    write_pdf(path, "Three hundred and twelve steps")
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "pypdf", None)
        line = one_line(call("compress", path, "-m", "nowhere", "-o", tmp_path / "out.kvz"))
    advice = "pip install pypdf (in a checkout pip install -e '.[pdf]')"
    assert line == f"kvzip: expected pypdf to read doc.pdf, got no such package: {advice}"
    pytest.importorskip("pypdf")
    assert documents.read([str(path)]) == ("Three hundred and twelve steps", "doc.pdf")
    write_pdf(path, "")
    with pytest.raises(ValueError, match=r"expected text in doc\.pdf, got 1 page without any"):
        documents.read([str(path)])
    for content in (b"%PDF-1.4\nnonsense", b"  \n%PDF-1.4\nnonsense"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="expected a PDF that can be read"):
            documents.read([str(path)])


def test_pdfs_of_a_directory_are_read_and_what_is_left_out_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pypdf = pytest.importorskip("pypdf")
    write_pdf(tmp_path / "a.pdf", "Three hundred")
    (tmp_path / "b.pdf").write_bytes(b"%PDF-1.4\nnonsense")
    (tmp_path / "c\x1b\n.bin").write_bytes(b"\xff")
    (tmp_path / "d.md").write_text("# D", encoding="utf-8")
    text, _ = documents.read([str(tmp_path)])
    assert text == "===== a.pdf =====\nThree hundred\n\n===== d.md =====\n# D"
    broken, binary = capsys.readouterr().err.splitlines()  # no terminal, and said all the same
    assert "left out (expected a PDF that can be read, got b.pdf" in broken
    assert binary == rf"{tmp_path}: left out being no text in UTF-8: c\x1b\n.bin"
    halves = "a \ud800 b \ud83d\ude00 \ufffd"
    monkeypatch.setattr(pypdf.PageObject, "extract_text", lambda page: halves)
    assert documents.read([str(tmp_path / "a.pdf")])[0] == "a \ufffd b \U0001f600 \ufffd"
    assert capsys.readouterr().err == "a.pdf: 1 halves of characters, which are no text, became \ufffd\n"
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "pypdf", None)
        assert documents.read([str(tmp_path)])[0] == "# D"
    assert "left out as pypdf is missing (pip install pypdf): a.pdf, b.pdf" in capsys.readouterr().err


def write_pdf(path: Path, text: str) -> None:
    """The smallest PDF with a line of text on a page."""
    drawn = f"BT /F1 12 Tf 20 100 Td ({text}) Tj ET".encode()
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 400 200]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
        b"<</Length %d>>\nstream\n%s\nendstream" % (len(drawn), drawn),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    content, places = b"%PDF-1.4\n", []
    for number, each in enumerate(objects, start=1):
        places.append(len(content))
        content += b"%d 0 obj\n%s\nendobj\n" % (number, each)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    trailer = b"trailer\n<</Size 6/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF\n" % len(content)
    path.write_bytes(content + b"xref\n0 6\n0000000000 65535 f \n" + table + trailer)


# --- ask and chat


def test_ask_prints_what_generate_answers(kvz: Path, model: kvzip.Model, small: kvzip.RaggedCache) -> None:
    questions = ["How many steps?", "Who?"]
    first, second = (visible(a.text) for a in kvzip.generate(model, small, questions, max_tokens=6))
    assert call("ask", kvz, questions[0], "-n", 6).stdout == first + "\n"
    expected = f"> {questions[0]}\n{first}\n\n> {questions[1]}\n{second}\n"
    assert call("ask", kvz, *questions, "-n", 6).stdout == expected
    assert call("ask", kvz, "-", "-n", 6, text="How many steps?\n\nWho?\n").stdout == expected
    sampled = kvzip.generate(model, small, questions[0], max_tokens=6, temperature=2.0, top_p=0.9, seed=3)
    sampled = visible(sampled.text)
    assert sampled != first
    assert call("ask", kvz, questions[0], "-n", 6, "-t", 2, "--top-p", 0.9, "--seed", 3).stdout == sampled + "\n"


def test_ask_prints_json(kvz: Path, model: kvzip.Model, model_dir: Path, small: kvzip.RaggedCache) -> None:
    shown = json.loads(call("ask", kvz, "How many?", "-n", 5, "--json").stdout)
    answer = kvzip.generate(model, small, "How many?", max_tokens=5)
    assert shown["answers"] == [
        {"question": "How many?", "answer": answer.text, "tokens": len(answer.token_ids), "stopped": answer.stopped}
    ]
    assert shown["model"] == str(model_dir) and shown["answer_s"] > 0


def test_pieces_are_shown_as_they_come(capsys: pytest.CaptureFixture[str]) -> None:
    on_token, finish = _in_order(["a?", "b?"])
    on_token("on", 0)
    assert capsys.readouterr().out == "> a?\non"
    on_token("two", 1)
    assert capsys.readouterr().out == ""  # in its turn
    on_token("e", 0)
    assert capsys.readouterr().out == "e"
    finish(["one", "two"], ["", "\n    from there"])
    assert capsys.readouterr().out == "\n\n> b?\ntwo\n    from there\n"


def test_chat_keeps_forks_and_folds_its_turns(
    kvz: Path, model: kvzip.Model, small: kvzip.RaggedCache, tmp_path: Path
) -> None:
    saved = tmp_path / "talk.kvz"
    first, one = kvzip.ask(model, small, "How many?", max_tokens=6)
    second, two = kvzip.ask(model, one, "Who?", max_tokens=6)
    folded = kvzip.fold(model, two, 0.5)
    lines = ["How many?", "/fork b", "Who?", "/fold 0.5", f"/save {saved}", "/undo", "/switch 1", "/stats", "/nope"]
    result = call("chat", kvz, "-n", 6, text="\n".join([*lines, "/fold x", "/quit", "never asked"]))
    kept = f"{folded.kept - two.kept:,} of {folded.total - two.total:,} pairs kept"
    turns = len(two.token_ids) - small.context_length
    expected = [
        *visible(first.text).split("\n"),
        "branch b, from 1",
        *visible(second.text).split("\n"),
        f"{turns} tokens folded: {kept}",
        f"{saved}, {size(saved.stat().st_size)}",
        "forgotten",
        "branch 1",
        f"context  {small.context_length} tokens, 30.0% of {small.total:,} pairs kept",
        f"turns    {len(one.token_ids) - small.context_length} tokens, whole, after the context",
        f"room     {4096 - len(one.token_ids):,} of 4,096 positions",
        f"memory   {size(nbytes(one))}",
        "branch   1 of 1, b",
    ]
    assert result.stdout.split("\n") == [*expected, ""]
    known = "/stats, /fork, /switch, /undo, /fold, /save, /help, /quit"
    assert result.stderr.splitlines() == [f"expected one of {known}, got /nope", "expected a ratio as 0.3, got x"]
    assert result.exit_code == 1  # a script's lines went wrong
    cache = kvzip.load_cache(saved, model=model)
    assert isinstance(cache, kvzip.RaggedCache) and same_pairs(cache, folded)
    answer = visible(kvzip.generate(model, folded, "And?", max_tokens=4).text)
    assert call("ask", saved, "And?", "-n", 4).stdout == answer + "\n"


def test_a_new_branch_has_a_name_that_is_free(kvz: Path) -> None:
    result = call("chat", kvz, text="/fork 3\n/fork\n/fork\n/stats\n")
    assert result.stdout.splitlines()[:3] == ["branch 3, from 1", "branch 4, from 3", "branch 5, from 4"]


def test_an_interrupted_turn_is_forgotten(kvz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = kvzip.ask

    def stopped(model: Any, cache: Any, query: str, **options: Any) -> Any:
        if query == "stop":
            raise KeyboardInterrupt
        return ask(model, cache, query, **options)

    monkeypatch.setattr("kvzip.conversation.ask", stopped)
    result = call("chat", kvz, "-n", 4, text="stop\n/stats\n")
    assert result.exit_code == 0 and result.stderr == "stopped; this turn is forgotten\n"
    assert "turns    0 tokens" in result.stdout


def test_a_line_that_is_no_text_ends_neither_chat_nor_in_a_traceback(kvz: Path) -> None:
    result = CliRunner().invoke(main, ["chat", str(kvz), "-n", "3"], input=b"a\xff\n/stats\n")
    assert result.stderr == "expected text in UTF-8, got b'a\\xff'\n" and "turns    0 tokens" in result.stdout
    result = CliRunner().invoke(main, ["ask", str(kvz), "-"], input=b"a\xff\n")
    assert one_line(result) == "kvzip: expected text in UTF-8, got b'a\\xff'"


# --- info


def test_info_says_what_a_file_holds(kvz: Path, small: kvzip.RaggedCache, model: kvzip.Model) -> None:
    facts = json.loads(call("info", kvz, "--json").stdout)
    assert (facts["kept"], facts["total"], facts["bytes"]) == (small.kept, small.total, kvz.stat().st_size)
    assert facts["full_bytes"] == nbytes(kvzip.prefill(model, TEXT))
    for layer, held in zip(facts["layers"], small.context, strict=True):
        assert isinstance(held, kvzip.cache.RaggedKV)
        assert layer["heads"] == [int(n) - small.start for n in held.offsets.diff()]
    assert sum(sum(layer["heads"]) for layer in facts["layers"]) == small.kept
    text = call("info", kvz).stdout
    assert f"kept     {small.kept:,} of {small.total:,} pairs (30.0%) by kvzip-chunk/pair" in text


def test_info_says_what_fits_in_memory(model_dir: Path, model: kvzip.Model) -> None:
    half = replace(model, dtype=torch.bfloat16)
    facts = json.loads(call("info", model_dir, "--memory", "1GB", "--json").stdout)
    assert facts["bytes_per_token"] == dense_bytes(half, 1) == 2 * 2 * 2 * 8 * 2  # K and V, layers, heads, width, bytes
    room = 0.9e9 - facts["weight_bytes"]
    assert facts["fits"][0]["16_bits"]["tokens"] == int(room / 128)
    third = facts["fits"][2]
    assert (third["ratio"], third["16_bits"]["tokens"]) == (0.3, int(room / (0.3 * 4 * (32 + 4))))
    assert third["4_bits"]["tokens"] > third["8_bits"]["tokens"] > third["16_bits"]["tokens"]
    assert f"30%   {third['16_bits']['tokens']:,}" in call("info", model_dir, "--memory", "1GB").stdout

    for given, expected in [("1g", 10**9), ("1.5 GiB", 3 * 2**29), ("900MB", 9 * 10**8)]:
        assert json.loads(call("info", model_dir, "--memory", given, "--json").stdout)["memory_bytes"] == expected
    for given in ("24", "inf", "nan", "-1GB", "0GB", "much", "9" * 400 + "B", "9e99GB", "2000000TB"):
        assert call("info", model_dir, "--memory", given).exit_code == 2, given


# --- the rest


def test_refit_fits_what_is_kept_and_says_what_it_gave(
    document: Path, model_dir: Path, model: kvzip.Model, tmp_path: Path
) -> None:
    path, dense = tmp_path / "fitted.kvz", kvzip.score(model, kvzip.prefill(model, TEXT))
    wanted = kvzip.refit(model, dense, kvzip.compress(dense, 0.3))
    how = ("-m", model_dir, "--device", "cpu", "--refit")
    facts = json.loads(call("compress", document, *how, "-o", path, "--json").stdout)
    assert [*facts["seconds"]] == ["prefill", "score", "compress", "refit"] and facts["method"] == wanted.method
    assert 0 < facts["mass_kept"]["before"] < facts["mass_kept"]["after"] < 1.2
    back = kvzip.load_cache(path)
    for ours, theirs in zip(back.context, wanted.context, strict=True):
        assert torch.equal(ours.bias, theirs.bias) and torch.equal(ours.v, theirs.v)
    shape = dense.scores.values.shape[:2]
    held = read_header(path)["note"]["mass_kept"]
    assert {name: torch.tensor(part).shape for name, part in held.items()} == {"before": shape, "after": shape}
    said = call("compress", document, *how, "-o", path, "--force", "-r", 0.5, "--bits", 8).stdout
    assert re.search(
        r"refitted \d+% of the repeat's attention in the mean head \(\d+% in the least\), \d+% \(\d+%\)", said
    )
    info = json.loads(call("info", path, "--json").stdout)
    assert info["refitted"] and "packed into 8 bits, with a bias for each row" in call("info", path).stdout
    streamed = tmp_path / "streamed.kvz"
    assert call("compress", document, *how, "-o", streamed, "--segment", 150).exit_code == 0
    assert read_header(streamed)["method"] == "kvzip-chunk/stream-segment+refit"
    shown = json.loads(call("compare", document, "Who?", "-m", model_dir, "-n", 2, "--refit", "--json").stdout)
    assert shown["fit"]["layers"] == [0, 1] and shown["fit"]["seconds"] > 0


def test_compare_bench_and_tasks(
    document: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = json.loads(call("compare", document, "Who?", "-m", model_dir, "-r", 0.4, "-n", 3, "--json").stdout)
    assert shown["kept"] == int(0.4 * shown["total"]) and shown["answers"][0]["query"] == "Who?"
    tasks = json.loads(call("eval", "tasks", "--json").stdout)
    assert "kv" in tasks["tasks"] and "kvzip" in tasks["methods"]
    assert "ops " in call("bench").stdout
    (tmp_path / "benchmarks").mkdir()
    script = '"""Ends with a number."""\nimport sys\nif __name__ == "__main__":\n    sys.exit(int(sys.argv[-1]))\n'
    (tmp_path / "benchmarks" / "ends.py").write_text(script, encoding="utf-8")
    monkeypatch.setattr(sys.modules["kvzip.cli.bench"], "CHECKOUT", tmp_path)
    assert call("bench").stdout.split(maxsplit=1) == ["ends", "Ends with a number.\n"]
    assert call("bench", "ends", "--flag", 3).exit_code == 3
    assert call("bench", "other").exit_code == 2
    monkeypatch.setattr(sys.modules["kvzip.cli.bench"], "CHECKOUT", tmp_path / "installed")
    assert "expected -m MODEL to time, or a checkout of kvzip" in one_line(call("bench"))


def test_bench_times_a_model_without_a_checkout(
    model_dir: Path, model: kvzip.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, answered = kvzip.generate, []

    def noted(model: Any, cache: Any, query: str, **options: Any) -> Any:
        answered.append(cache.kept / cache.total)
        return generate(model, cache, query, **options)

    monkeypatch.setattr("kvzip.generation.generate", noted)
    facts = json.loads(call("bench", "-m", model_dir, "--tokens", 300, "-r", 0.5, "-r", 0.1, "-n", 3, "--json").stdout)
    dense = kvzip.prefill(model, torch.randint(0, 100, (300,)))
    assert facts["tokens"] == dense.length and facts["prefill_s"] > 0 and facts["score_s"] > 0
    full, half, tenth = facts["answers"]
    assert full["cache_bytes"] == nbytes(dense) > half["cache_bytes"] > tenth["cache_bytes"]
    assert [row["ratio"] for row in facts["answers"]] == [1.0, 0.5, 0.1]
    assert list(map(round, answered, [2] * 9)) == [1.0] * 3 + [0.5] * 3 + [0.1] * 3
    assert full["first_token_s"] > 0 and half["compress_s"] > 0
    shown = call("bench", "-m", model_dir, "--tokens", 300, "-n", 2).stdout
    assert shown.startswith("tiny in bfloat16 on CPU") and "\n30%   " in shown
    assert call("bench", "-m", model_dir, "ops").exit_code == 2
    line = one_line(call("bench", "-m", model_dir, "--tokens", 100_000))
    assert "expected at most 4,096 tokens (the model's length), got 100,000: lower --tokens" in line


def test_lists_of_eval_are_written_as_one_likes_and_run_goes_without_saying(model_dir: Path, tmp_path: Path) -> None:
    tail = ("--count", 1, "--questions", 1, "--max-tokens", 2, "--task", "kv@600", "-m", model_dir)
    ways = [
        ("eval", "run", "--ratio", "0.5", "1.0", "--method", "full,random", "-o", tmp_path / "a.jsonl", *tail),
        ("eval", "--ratio=0.5,1", "--method", "full", "--method", "random", *tail, "-o", tmp_path / "b.jsonl"),
    ]
    answers = []
    for way, name in zip(ways, ("a", "b"), strict=True):
        result = call(*way)
        assert result.exit_code == 0, result.stderr
        lines = map(json.loads, (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines())
        answers.append([(x["method"], x["ratio"], x["prediction"]) for x in lines if x["kind"] == "answer"])
    assert [x[:2] for x in answers[0]] == [("full", 1.0), ("random", 0.5), ("random", 1.0)] and answers[0] == answers[1]
    assert call("eval", "--help").stdout.startswith("Usage: main eval [OPTIONS] COMMAND")
    assert call("eval", "run", "--seed", "-1", "x", *tail).exit_code == 2


def eval_run(model_dir: Path, out: Path) -> Result:
    tasks = ("--task", "kv@600", "--count", 1, "--questions", 2, "--ratio", 0.5, "--max-tokens", 2)
    return call("eval", "run", "-m", model_dir, "-o", out, *tasks)


def test_eval_runs_and_goes_on(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "results.jsonl"
    calls = []

    def stop_at_the_third(*arguments: Any) -> None:
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        append_answer(*arguments)

    monkeypatch.setattr("kvzip.evals.run.append", stop_at_the_third)
    line = one_line(eval_run(model_dir, out), 130)
    assert line == f"kvzip: interrupted: answers so far are in {out}: the same command goes on from there"
    assert eval_run(model_dir, out).stdout == f"{out}: all answered\n"
    kinds = [json.loads(line)["kind"] for line in out.read_text(encoding="utf-8").splitlines()]
    assert kinds.count("answer") == 4 and kinds.count("question") == 2
    pytest.importorskip("matplotlib")
    result = call("eval", "report", out, "-o", tmp_path / "page")
    assert sorted(result.stdout.split()) == sorted(map(str, (tmp_path / "page").iterdir()))
    assert str(tmp_path / "page" / "index.html") in result.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page", "results.jsonl"]


def test_head_scores_are_made_shown_and_used(tmp_path: Path, model_dir: Path, model: kvzip.Model) -> None:
    document, out, small = (tmp_path / name for name in ("long.txt", "heads.safetensors", "out.kvz"))
    document.write_text(TEXT * 2, encoding="utf-8")
    assert call("heads", "make", document, "-m", model_dir, "-o", out).stdout == f"{out}: 2 layers x 2 heads of tiny\n"
    made = head_scores.make(model, TEXT * 2)
    shown = json.loads(call("heads", "show", out, "--json").stdout)
    assert torch.equal(torch.tensor(shown["values"]), made.values)
    assert "scores   of 2 layers of llama by" in call("info", out).stdout
    ends = ("--sink", 20, "--recent", 30)
    assert call("compress", document, "-m", model_dir, "-o", small, "--heads", out, *ends, "-r", 0.5).exit_code == 0
    attached = head_scores.attach(kvzip.prefill(model, TEXT * 2), made)
    expected = kvzip.compress(attached, 0.4, level="head", sink=20, recent=30)
    assert 0.25 * expected.total < expected.kept <= 0.5 * expected.total  # one head whole, and the ends of the others
    cache = kvzip.load_cache(small)
    assert isinstance(cache, kvzip.RaggedCache) and same_pairs(cache, expected)


def test_report_writes_a_page(kvz: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert call("report", kvz, "-o", page).stdout == f"{page}, {size(page.stat().st_size)}\n"
    assert "<title>light.txt" in page.read_text(encoding="utf-8")


# --- what goes wrong


def test_errors_are_one_line(document: Path, model_dir: Path, kvz: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.kvz"
    before = sorted(tmp_path.iterdir())
    binary, empty, bare = tmp_path / "x.bin", tmp_path / "empty.txt", tmp_path / "bare.kvz"
    compress = ("compress", document, "-m", model_dir, "-o")
    other = write_model(tmp_path / "other", seed=1)
    binary.write_bytes(b"\0\1\2\xff")
    empty.write_text(" \n", encoding="utf-8")
    kvzip.save(kvzip.load_cache(kvz), bare)
    for command, expected in [
        (
            ("compress", "none.txt", "-m", model_dir, "-o", out),
            "expected a document, got no file or directory none.txt",
        ),
        (("compress", binary, "-m", model_dir, "-o", out), "that is none: convert it first"),
        (("compress", empty, "-m", model_dir, "-o", out), "with text in it, got none in empty.txt"),
        (("compress", document, "-m", "no-model", "-o", out), "got 'no-model': no such directory"),
        (("compress", document, "-m", tmp_path, "-o", out), "expected config.json in"),
        ((*compress, document), "it is left as it is"),
        ((*compress, tmp_path / "none" / "x.kvz"), "expected a directory to write x.kvz in"),
        ((*compress, out, "--max-length", 500), "expected a document that fits in 500 positions"),
        ((*compress, out, "--max-length", 500, "--segment", 90), "expected a document that fits in 500 positions"),
        (("ask", tmp_path / "none.kvz", "hi"), "got no file"),
        (("ask", document, "hi"), f"expected a file that kvzip wrote, got {document} that is none"),
        (("ask", bare, "hi"), "expected bare.kvz to say which model made it, got none: pass --model"),
        (("ask", kvz, "hi", "-m", other), "light.kvz, tiny in bfloat16, got other in bfloat16"),
        (("ask", kvz, "hi", "--dtype", "float32"), "light.kvz, tiny in bfloat16, got tiny in float32"),
        (("info", tmp_path / "none.kvz"), "got no file"),
        (("chat", kvz, "-m", tmp_path / "gone"), "no such directory"),
        (("ask", tmp_path, "hi"), "expected a file that kvzip wrote, got the directory"),
        (("ask", kvz, "hi", "--device", "mps"), "expected a device of cpu"),
        (("ask", kvz, "a" * 5000), "shorten it, or pass RoPE scaling (--rope, and --max-length)"),
        (("compress", "", "-m", model_dir, "-o", out), "expected a document, got an empty name"),
        (("compress", document, "-m", "", "-o", out), "expected a directory, a hub id or an alias, got an empty name"),
        (("info", ""), "expected a directory, a hub id or an alias, got an empty name"),
        (("heads", "show", document), f"got {document} that is none: kvzip heads make makes one"),
        ((*compress, out, "--max-length", 500), "--max-length, or none: the model was made for 4,096"),
        (("compress", document, "-m", model_dir, "-o", "-"), "expected the name of a file to write, got -"),
    ]:
        assert expected in one_line(call(*command)), command
    assert sorted(p for p in tmp_path.iterdir() if p not in {binary, empty, bare, other}) == before
    assert call("ask", bare, "hi", "-m", model_dir, "-n", 2).exit_code == 0


def test_wrong_calls_end_with_2(document: Path, kvz: Path) -> None:
    for command in [
        ("compress", document),
        ("compress", document, "-m", "x", "-r", 1.5),
        ("compress", document, "-m", "x", "-r", 0.5, "--budget", 3),
        ("compress", document, "-m", "x", "--segment", 5, "--bits", 8),
        *(("compress", document, "-m", "x", "--bits", wrong) for wrong in ("16", "8,", "4,4,4", "8,3")),
        *(("compress", document, "-m", "x", "--budget-bytes", wrong) for wrong in ("12", "0MB", "much")),
        ("compress", document, "-m", "x", "--budget-bytes", "1MB", "-r", 0.5),
        ("compress", document, "-m", "x", "--budget-bytes", "1MB", "--segment", 5),
        ("compress", document, "-m", "x", "--budget-bytes", "1MB", "--heads", "x"),
        ("compress", document, "-m", "x", "--rope", "{"),
        ("ask", kvz),
        ("ask", kvz, " "),
        *(("ask", kvz, "hi", *wrong) for wrong in (("-t", "nan"), ("--top-p", "nan"), ("--stop", ""))),
        ("ask", kvz, "hi", "--seed", 10**23),
        *(("compress", document, "-m", "x", "--threshold", wrong) for wrong in ("nan", "inf")),
        ("compress", document, "-m", "x", "--budget", "nan"),
        ("compress", document, "-m", "x", "--threshold", 0.1, "--level", "layer"),
        ("compress", document, "-m", "x", "-o", ""),
        ("ask", "", "hi"),
        ("ask", kvz, "hi", "--device", "a b"),
        ("compare", document, "hi", " ", "-m", "x"),
        ("info", "x", "--memory", "much"),
        ("nothing",),
    ]:
        result = call(*command)
        assert result.exit_code == 2 and result.stderr.startswith("Usage: "), command


def test_out_of_memory_is_one_line_and_debug_shows_more(
    document: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("expected room for 9 bytes,\n  got out of memory: lower chunk")

    monkeypatch.setattr("kvzip.scoring.score", full)
    command = ("compress", document, "-m", model_dir, "-o", document.with_name("out.kvz"))
    assert one_line(call(*command)) == "kvzip: expected room for 9 bytes, got out of memory: lower chunk"
    assert isinstance(call(*command, "--debug").exception, torch.OutOfMemoryError)
    monkeypatch.setattr("kvzip.scoring.score", lambda *a, **o: {}["x"])
    assert one_line(call(*command)) == "kvzip: unexpected KeyError: 'x' (--debug shows where)"


def test_what_the_hub_cannot_give_is_one_line(document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def fetch(name: str, **options: Any) -> str:
        raise hub.errors.LocalEntryNotFoundError("Got: no network\nAn error happened while trying to locate the files")

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    why = "on the hub, there being no such directory here, got no network: check the name, the network and the login"
    for command, name in [
        (("info", "some/model"), "some/model"),
        (("compress", document, "-m", "qwen3-4b", "-o", document.with_suffix(".kvz")), "Qwen/Qwen3-4B"),
    ]:
        assert one_line(call(*command)) == f"kvzip: expected {name} {why} (hf auth login)"


def test_the_hub_is_asked_once_and_the_file_says_what_was_asked_for(
    document: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked: list[str] = []
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **_: asked.append(name) or str(model_dir))
    out = document.with_suffix(".kvz")
    assert call("compress", document, "-m", "some/model", "-o", out).exit_code == 0
    assert asked == ["some/model"] and read_header(out)["model"]["source"] == "some/model"


def test_a_document_too_long_for_memory_is_known_before_it_is_read(
    document: Path, model_dir: Path, model: kvzip.Model, small: kvzip.RaggedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = size(nbytes(kvzip.prefill(model, TEXT)))
    monkeypatch.setattr("kvzip.cache.free_bytes", lambda device: 40_000)
    monkeypatch.setattr("kvzip.prefilling.prefill", lambda *a, **o: pytest.fail("was read"))
    line = one_line(call("compress", document, "-m", model_dir, "-o", document.with_suffix(".kvz")))
    got = f"got 372 tokens that take {needed} of 40.0 kB free: a shorter document takes less"
    assert line.startswith(f"kvzip: expected a document whose cache fits in memory, {got}")


def test_files_of_others_are_left_as_they_are(document: Path, kvz: Path, model_dir: Path, tmp_path: Path) -> None:
    made = ("eval", "run", "-m", model_dir, "--task", "kv@600", "-o")
    mine = {name: tmp_path / name for name in ("a.kvz", "a.safetensors", "a.html", "a.jsonl", "report/index.html")}
    mine["table"] = tmp_path / "report" / "table.md"  # beside the page, as in a report
    for path in mine.values():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(
            (model_dir / "model.safetensors").read_bytes() if path.suffix == ".safetensors" else b"a\nmine"
        )
    before = {path: path.read_bytes() for path in mine.values()}
    for command in [
        ("compress", document, "-m", model_dir, "-o", mine["a.kvz"]),
        ("heads", "make", document, "-m", model_dir, "-o", mine["a.safetensors"]),
        ("report", kvz, "-o", mine["a.html"]),
        (*made, mine["a.jsonl"]),
        ("eval", "report", mine["a.jsonl"], "-o", tmp_path / "report"),
        ("eval", "report", mine["a.jsonl"], "-o", tmp_path / "report", "--force"),
    ]:
        assert one_line(call(*command)).endswith("it is left as it is"), command
    assert {path: path.read_bytes() for path in mine.values()} == before


Writer = Callable[[Path], Result]


@pytest.fixture(params=["compress", "segments", "chat", "heads", "eval", "eval report", "report"])
def writer(
    request: pytest.FixtureRequest, kvz: Path, model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Writer:
    """Runs a command that writes into a directory."""
    document = kvz.with_name("light.txt")
    results = tmp_path_factory.mktemp("results") / "results.jsonl"
    name = request.param
    if name == "eval report":
        pytest.importorskip("matplotlib")
        assert eval_run(model_dir, results).exit_code == 0

    def run(directory: Path) -> Result:
        compress = ("compress", document, "-m", model_dir, "--force", "-o", directory / "out.kvz")
        heads, page = directory / "out.safetensors", directory / "out.html"
        return {
            "compress": lambda: call(*compress),
            "segments": lambda: call(*compress, "--segment", 500),
            "chat": lambda: call("chat", kvz, text=f"/save --force {directory / 'out.kvz'}"),
            "heads": lambda: call("heads", "make", document, "-m", model_dir, "--force", "-o", heads),
            "eval": lambda: eval_run(model_dir, directory / "out.jsonl"),
            "eval report": lambda: call("eval", "report", results, "--force", "-o", directory / "out"),
            "report": lambda: call("report", kvz, "--force", "-o", page),
        }[name]()

    run.__name__ = name
    return run


@pytest.mark.parametrize("stop", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_nothing_half_written_is_left(
    writer: Writer, stop: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise stop

    def half(path: Path, *arguments: Any, **options: Any) -> None:
        with open(path, "wb") as file:
            file.write(b"half")
        raise stop

    monkeypatch.setattr("kvzip.files.tensors._write", lambda out, tensor: half(Path(out.name)))
    monkeypatch.setattr("kvzip.evals.run.append", fail)
    if writer.__name__ == "report":
        monkeypatch.setattr("os.fsync", fail)
    if writer.__name__ == "eval report":
        monkeypatch.setattr(Path, "write_text", half)
    result = writer(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert result.stderr.count("\n") == 1, result.output
    if isinstance(stop, OSError):
        assert "No space left on device" in result.stderr
    if writer.__name__ != "chat":  # which goes on
        assert result.exit_code == (1 if isinstance(stop, OSError) else 130)


def test_control_c_at_any_point_leaves_the_old_file_and_says_how_to_go_on(
    writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    assert writer(tmp_path).exit_code == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert before
    for point in {
        "compress": ["models.load", "prefilling.run_attention", "scoring.score_chunks", "compression.compress"],
        "segments": ["models.load", "inputs.context_ids", "streaming.prefill.extend"],
        "chat": ["files.tensors._write"],
        "heads": ["models.load", "head_scores.prefill", "head_scores.save"],
        "eval": ["models.load", "evals.run_eval"],
        "eval report": ["evals.write_report"],
        "report": ["report.read_cache", "report.render"],
    }[writer.__name__]:
        with monkeypatch.context() as patched:
            patched.setattr(f"kvzip.{point}", stop)
            result = writer(tmp_path)
        if writer.__name__ == "chat":
            assert result.stderr == "stopped; nothing has changed\n"
        else:
            line = one_line(result, 130)
            assert re.search("(is as it was: run it again|the same command goes on)", line), (point, line)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before, point


def test_a_disk_that_fills_up_leaves_nothing_half_written(writer: Writer, tmp_path: Path) -> None:
    """No file may grow beyond some bytes, which the system refuses as it does on a full disk, in the middle of it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        result = writer(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.stderr.count("\n") == 1 and "File too large" in result.stderr, result.output
    assert result.exit_code == 1
    left = list(tmp_path.iterdir())
    if writer.__name__ == "eval":  # what was answered before stays
        assert left == [tmp_path / "out.jsonl"] and left[0].stat().st_size == 500
        result = writer(tmp_path)
        assert result.stdout == f"{left[0]}: all answered\n"
    else:
        assert left == [], result.output


def test_a_read_only_directory_is_noticed(writer: Writer, tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        directory = Path("/sys") if os.access(tmp_path, os.W_OK) else tmp_path  # root may write anywhere else
        if os.access(directory, os.W_OK) and os.geteuid() != 0:
            pytest.skip("no directory here is read-only")
        result = writer(directory)
        assert result.stderr.count("\n") == 1 and "denied" in result.stderr, result.output
        assert list(tmp_path.iterdir()) == []
    finally:
        tmp_path.chmod(0o755)


# --- processes


def test_help_is_quick_and_importing_kvzip_imports_no_command() -> None:
    program = (
        "import sys, kvzip.cli; heavy = {'torch', 'rich', 'transformers'} & set(sys.modules); assert not heavy, heavy\n"
        "del sys.modules['kvzip.cli']\n"
        "from kvzip import *; assert 'torch' in sys.modules and 'kvzip.cli' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=ENVIRONMENT)
    shown = subprocess.run(
        [sys.executable, "-m", "kvzip", "compress", "--help"], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert "cat log.txt | kvzip compress - -m DIR --bits 8 -o log.kvz\n" in shown.stdout, shown.stderr
    completed = subprocess.run(
        [sys.executable, "-m", "kvzip"],
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, "_KVZIP_COMPLETE": "bash_complete", "COMP_WORDS": "kvzip com", "COMP_CWORD": "1"},
    )
    assert completed.stdout.splitlines() == ["plain,compress", "plain,compare"]


def test_every_public_name_has_a_home() -> None:
    homes = {name: home for home, names in kvzip._HOMES.items() for name in names}
    for name in kvzip.__all__:
        value = getattr(kvzip, name)
        assert value is getattr(sys.modules[f"kvzip.{homes[name]}"], name) if name in homes else value.__spec__, name
    assert set(homes) <= set(kvzip.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = kvzip.nothing  # pyright: ignore


def test_help_of_every_command_has_examples_and_every_shell_has_completion() -> None:
    names = [(name,) for name in main.commands]
    names += [(group, name) for group in ("heads", "eval") for name in main.commands[group].commands]  # pyright: ignore
    for name in [(), *names]:
        result = call(*name, "--help")
        examples = result.stdout.partition("\nExamples:\n")[2].splitlines()
        assert result.exit_code == 0 and examples, name
        assert all(line.startswith(("  kvzip ", "  cat ", "  eval ")) for line in examples), name
        for line in examples:
            if line.startswith("  kvzip ") and "DIR" not in line:
                assert line.split()[1] in main.commands, line
        assert "..." not in "".join(result.stdout.partition("Commands:")[2].partition("Examples:")[0]), name
    for shell, begins in [("bash", "_kvzip_completion() {"), ("zsh", "#compdef kvzip"), ("fish", "function _kvzip")]:
        found = CliRunner().invoke(main, env={"_KVZIP_COMPLETE": f"{shell}_source"}, prog_name="kvzip")
        assert found.exit_code == 0 and found.stdout.lstrip().startswith(begins), shell


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a pipe that keeps writes apart is Linux's")
def test_answers_stream_through_a_pipe_while_they_are_made(kvz: Path) -> None:
    """Each piece is written to the pipe by itself; were they held back there would be one read.

    The pipe keeps writes apart (O_DIRECT, Linux only), however late they are read.
    """
    command = [sys.executable, "-m", "kvzip", "ask", str(kvz), "How many?", "-n", "40"]
    buffered = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONUNBUFFERED"}
    read, write = os.pipe2(os.O_DIRECT | os.O_CLOEXEC)
    with subprocess.Popen(command, stdout=write, stderr=subprocess.PIPE, env=buffered) as process:
        os.close(write)
        reads = list(iter(lambda: os.read(read, 4096), b""))
        assert process.wait(timeout=60) == 0 and process.stderr and process.stderr.read() == b""
    os.close(read)
    assert len(reads) > 4 and reads[-1].endswith(b"\n")


def on_a_terminal(*arguments: object, answers: dict[str, bytes], prompt: str = "") -> tuple[int, str]:
    """The exit code and output of a command on a terminal of its own, which types an answer after each text seen, and
    after the prompt that follows it: what reads is set up then."""
    child, terminal = pty.fork()
    if child == 0:
        _run_here(*arguments)
    output, seen, waiting = "", 0, list(answers.items())
    with suppress(OSError):  # the terminal goes with the process
        while part := os.read(terminal, 4096):
            output += part.decode(errors="replace")
            text = f"{re.escape(waiting[0][0])}.*?{prompt}" if waiting else ""
            if text and (found := re.compile(text, re.DOTALL).search(output, seen)):
                seen = found.end()
                time.sleep(0.1)
                os.write(terminal, waiting.pop(0)[1])
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output


def test_on_a_terminal_there_is_progress_and_a_slip_does_not_end_a_chat(
    document: Path, model_dir: Path, kvz: Path
) -> None:
    document.write_text(TEXT * 4, encoding="utf-8")
    out = document.with_suffix(".kvz")
    code, shown = on_a_terminal("compress", document, "-m", model_dir, "-o", out, answers={})
    assert code == 0 and "reading the document" in shown and "scoring pairs" in shown and "0 of 1," in shown
    code, shown = on_a_terminal(
        "chat",
        kvz,
        "-n",
        "4",
        answers={"/help": b"\x03", "ends this talk": b"/stats\r", "branch   1": b"\x03", "ends": b"\x03"},
        prompt="> ",
    )
    assert code == 130 and shown.count("/quit or Ctrl-C again ends this talk, /save FILE keeps it") == 2
    assert shown.count("turns    0 tokens") == 1 and shown.count("kvzip: interrupted") == 1


def _run_here(*arguments: object) -> None:
    """Runs a command on the standard streams of a forked process, which has torch already, and ends the process."""
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(1)  # threads of the parent are not there
        sys.stdin, sys.stdout, sys.stderr = (_stream(n) for n in range(3))  # pyright: ignore
        main([str(a) for a in arguments], prog_name="kvzip")
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        os._exit(code)


def _stream(number: int) -> IO[str] | None:
    """A standard stream as a new interpreter has it: None if it is closed."""
    try:
        return open(number, "r" if number == 0 else "w", encoding="utf-8")
    except OSError:
        return None


def without_stream(closed: int, *arguments: object, scratch: Path) -> tuple[int, str, str]:
    """The exit code, output and errors of a command that runs with one of its standard streams closed."""
    files = [scratch / name for name in ("stdout", "stderr")]
    child = os.fork()
    if child == 0:
        for number, path in enumerate(files, start=1):
            os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
        os.close(closed)
        _run_here(*arguments)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    out, err = (path.read_text(encoding="utf-8") for path in files)
    return code, out, err


def test_control_c_ends_a_chat_with_130(kvz: Path, model: kvzip.Model, small: kvzip.RaggedCache) -> None:
    command = [sys.executable, "-m", "kvzip", "chat", str(kvz), "-n", "5"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # what runs in the background of a shell ignores SIGINT, and so would its children
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, **pipes, env=ENVIRONMENT, preexec_fn=heed) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(b"/switch 1\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"branch 1\n"  # the pipe is read line by line, and nothing is held back
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert process.stderr.read() == b"kvzip: interrupted\n"


# --- nothing is replaced unasked


def test_a_file_is_replaced_only_when_asked_and_then_it_is_said_what_it_was(
    document: Path, kvz: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(document.parent)
    other = document.with_suffix(".md")
    other.write_text(TEXT * 2, encoding="utf-8")
    assert call("compress", "doc.txt", "-m", model_dir).exit_code == 0
    first = Path("doc.kvz").read_bytes()
    held = f"doc.kvz (doc.txt, by tiny, 30.0% kept, {size(len(first))})"
    line = one_line(call("compress", "doc.md", "-m", model_dir, "-r", 0.5))
    assert line == f"kvzip: expected a name that is free, got {held}: it is left as it is; pass --force to replace it"
    assert Path("doc.kvz").read_bytes() == first
    result = call("compress", "doc.md", "-m", model_dir, "-r", 0.5, "--force")
    assert result.exit_code == 0 and result.stderr == f"replaced {held}\n"
    assert read_header(Path("doc.kvz"))["note"]["title"] == "doc.md"

    saved = document.with_name("talk.kvz")
    saved.write_bytes(kvz.read_bytes())
    result = call("chat", saved, text=f"/save {saved}\n/save --force {saved}\n")
    refused, replaced = result.stderr.splitlines()
    assert refused.startswith("expected a name that is free, got ") and refused.endswith(
        f"it is left as it is; /save --force {saved} to replace it"
    )
    assert replaced.startswith(f"replaced {saved} (light.txt, by tiny, 30.0% kept, ")


def test_every_command_that_writes_asks_first(writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if writer.__name__ == "eval":
        pytest.skip("goes on with its file")
    forced = call

    def unforced(*arguments: object, text: str | None = None) -> Result:
        return forced(*(word for word in arguments if word != "--force"), text=text and text.replace("--force ", ""))

    assert writer(tmp_path).exit_code == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(sys.modules[__name__], "call", unforced)
    result = writer(tmp_path)
    assert "expected a name that is free" in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_on_a_terminal_a_person_is_asked(document: Path, model_dir: Path) -> None:
    out = document.with_suffix(".kvz")
    command = ("compress", document, "-m", model_dir, "-o", out, "--title", "a\x1b[31m[red]b")
    assert call(*command).exit_code == 0
    before = out.read_bytes()
    code, shown = on_a_terminal(*command, "-r", "0.5", answers={"Replace it? [y/N]": b"n\r"})
    assert code == 1 and "it is left as it is" in shown and out.read_bytes() == before
    code, shown = on_a_terminal(*command, "-r", "0.5", answers={"Replace it? [y/N]": b"y\r"})
    assert code == 0 and r"(a\x1b[31m[red]b, by tiny, 30.0% kept" in shown and "\x1b[31m[red]" not in shown
    assert out.read_bytes() != before


# --- nothing steers a terminal

HOSTILE = "a\x1b[31m\x9b31m\u202e[red]b\n\tc\rd\ud800\x7f"
SHOWN = r"a\x1b[31m\x9b31m\u202e[red]b" + "\n\t" + r"c\rd\ud800\x7f"


def test_what_steers_a_terminal_is_shown_as_its_escape(capsys: pytest.CaptureFixture[str]) -> None:
    assert visible(HOSTILE) == SHOWN and visible("a\r\nb") == "a\nb"
    assert visible_line(HOSTILE) == SHOWN.replace("\n\t", r"\n\t")
    every = "".join(map(chr, range(0x3000)))
    put_json(every)
    written = capsys.readouterr().out
    assert json.loads(written) == every and written.isascii() and "\x7f" not in written
    left = {*visible(every + "\ufeff\ufff9\ufffa\ufffb"), *visible_line(every)}
    assert {unicodedata.category(c) for c in left - {"\n", "\t"}}.isdisjoint({"Cc", "Zl", "Zp", "Cs"})
    turning = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    assert {unicodedata.bidirectional(c) for c in left}.isdisjoint(turning)
    assert left.isdisjoint("\u061c\u200e\u200f\ufeff\ufff9\ufffa\ufffb")  # marks of a direction, and no letters


def test_no_text_of_an_answer_a_file_or_a_name_steers_the_terminal(
    kvz: Path, document: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = kvzip.Answer(HOSTILE, [1, 2], "stop")

    def generate(model: Any, cache: Any, query: Any, *, on_token: Any = None, **options: Any) -> Any:
        for n, piece in enumerate([HOSTILE] * len(query)):
            _ = on_token and on_token(piece, n)
        return [answer] * len(query)

    monkeypatch.setattr("kvzip.generation.generate", generate)
    monkeypatch.setattr("kvzip.conversation.ask", lambda model, cache, q, **o: (o["on_token"](HOSTILE), cache))
    asked = "q\x1b[2J"
    assert call("ask", kvz, asked).stdout == SHOWN + "\n"
    assert call("ask", kvz, asked, "r").stdout.split("\n> r\n") == [f"> q\\x1b[2J\n{SHOWN}\n", f"{SHOWN}\n"]
    result = call("ask", kvz, asked, "--json")
    assert json.loads(result.stdout)["answers"][0]["answer"] == HOSTILE
    assert call("chat", kvz, text="hi\n").stdout == SHOWN + "\n"
    out = document.with_name("o\x1b[31m[b]\n.kvz")
    results = [result, call("compress", document, "-m", model_dir, "-o", out, "--title", "t\x1b[31m\x9b")]
    results += [call("info", out), call("info", out, "--json"), call("ask", "no\x1b[31m\x9b", "q"), call("report", out)]
    results += [call("compress", document, "-m", "m\x1b[31m/\x9b"), call("info", document, "--no\x1b[31m")]
    results += [call("compress", document, "-m", model_dir, "-o", out), call("heads", "show", "\x1b[31m")]
    for result in results:
        assert not re.search("[\x1b\x9b\u202e\x7f]", result.output), result.output
    assert r"o\x1b[31m[b]\n.kvz: t\x1b[31m\x9b, " in results[2].stdout


def test_what_is_saved_in_a_chat_is_named_as_in_a_shell(kvz: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a b.kvz", tmp_path / "b.kvz"
    lines = [f"/save '{first}'", f"/save {second}", f"/save {second} --force", f"/save --force {second}"]
    result = call("chat", kvz, text="\n".join(lines))
    assert result.stderr.count(f"replaced {second}") == 2 and {*tmp_path.iterdir()} == {first, second}
    for wrong in ("", "--force", "''", "a b", "'a"):
        result = call("chat", kvz, text=f"/save {wrong}\n")
        assert result.stderr.startswith("expected a file to write, got ") and not result.stdout, wrong
    result = call("chat", kvz, text=f"/save '{first}'\n")
    assert f"/save --force '{first}' to replace it" in result.stderr


@pytest.mark.parametrize("key", [b"\x03", b"\x04"])
def test_leaving_a_question_in_a_chat_is_a_no(kvz: Path, tmp_path: Path, key: bytes) -> None:
    out = tmp_path / "own.kvz"
    out.write_bytes(kvz.read_bytes())
    answers = {"or /help": f"/save {out}\r".encode(), "Replace it? [y/N]": key, "nothing has changed": b"/quit\r"}
    code, shown = on_a_terminal("chat", kvz, answers=answers)
    assert code == 0 and "stopped; nothing has changed" in shown and "unexpected" not in shown
    assert out.read_bytes() == kvz.read_bytes()


def test_a_closed_standard_stream_is_an_empty_one(kvz: Path, document: Path, model_dir: Path, tmp_path: Path) -> None:
    def shell(words: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
        command = ["sh", "-c", f'exec "$0" -m kvzip "$@" {words}', sys.executable, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)

    result = shell("<&-", "compress", "-", "-m", model_dir, "-o", document.with_name("out.kvz"))
    assert result.stderr == "kvzip: expected a document with text in it, got none in standard input\n"
    assert "expected a question, got none" in shell("<&-", "ask", kvz, "-").stderr
    assert without_stream(0, "chat", kvz, scratch=tmp_path) == (0, "", "")
    result = shell("<&-", "compress", document, "-m", model_dir, "-o", kvz)
    assert result.returncode == 1 and "expected a name that is free" in result.stderr
    assert without_stream(2, "ask", kvz, "hi", "-n", 1, scratch=tmp_path)[0] == 0


def test_progress_shows_names_as_they_are(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with stages() as stage:
        progress = stage("reading [red]a\x1b[5m\nb")
        progress(40, 100)
        progress(60, 100)
    shown = capsys.readouterr().err
    assert r"reading [red]a\x1b[5m\nb" in shown and "\x1b[5m" not in shown and "40 of 100" in shown


# --- heads


def test_the_ratio_of_whole_heads_includes_what_the_others_keep(
    document: Path, model_dir: Path, model: kvzip.Model
) -> None:
    heads, out = document.with_name("heads.safetensors"), document.with_name("out.kvz")
    assert call("heads", "make", document, "-m", model_dir, "-o", heads).exit_code == 0
    base = ("compress", document, "-m", model_dir, "--heads", heads, "-o", out, "--force")
    evictable = len(TEXT.encode())
    for ratio in (0.1, 0.26, 0.5, 0.75, 1.0):
        facts = json.loads(call(*base, "-r", ratio, "--sink", 3, "--recent", 5, "--json").stdout)
        whole = facts["heads"]["whole"]
        assert facts["kept"] == whole * evictable + (4 - whole) * 8 <= ratio * facts["total"]
        assert whole == 4 or (whole + 1) * evictable + (3 - whole) * 8 > ratio * facts["total"]
    facts = json.loads(call(*base, "--budget", evictable / 2, "--sink", 3, "--recent", 5, "--json").stdout)
    assert facts["heads"] == {"whole": 1, "heads": 4, "sink": 3, "recent": 5}
    shown = "heads    1 of 4 are whole, the others keep the first 3 and the last 5 tokens, which the ratio includes"
    assert shown in call(*base, "--budget", evictable / 2, "--sink", 3, "--recent", 5).stdout
    assert shown in call("info", out).stdout
    assert "\nheads    all 4 are whole\n" in call(*base, "-r", 1).stdout
    before = out.read_bytes()
    line = one_line(call(*base, "-r", 0.5))  # 128 and 256 in the file of scores
    assert f"the first 128 and the last 256 tokens in every head, which are 100.0% of {evictable} tokens" in line
    assert "got room for 50.0%: keep more (-r), or lower --sink and --recent" in line
    assert out.read_bytes() == before
    for wrong in (("--sink", 3), ("--heads", heads, "--level", "pair"), ("--heads", heads, "--threshold", 0.1)):
        assert call("compress", document, "-m", model_dir, "-o", out, *wrong).exit_code == 2, wrong


def test_one_name_of_head_scores_means_the_same_everywhere(document: Path, model_dir: Path) -> None:
    name = "smollm2-135m-instruct"
    shown = json.loads(call("heads", "show", name, "--json").stdout)
    scores = head_scores.shipped(name)
    assert torch.equal(torch.tensor(shown["values"]), scores.values) and shown["layers"] == list(scores.layers)
    assert (shown["sink"], shown["recent"]) == (scores.sink, scores.recent)
    out = document.with_name("out.kvz")
    for spelled in (name, name.upper(), f"HuggingFaceTB/{name}", f"/models/{name}/"):
        line = one_line(call("compress", document, "-m", model_dir, "--heads", spelled, "-o", out))
        assert "expected head scores made by this model" in line and line.endswith("kvzip heads make makes them")
        assert json.loads(call("heads", "show", spelled, "--json").stdout) == shown
    damaged, older = document.with_name("damaged.safetensors"), document.with_name("older.safetensors")
    data = (SHIPPED / f"{name}.safetensors").read_bytes()
    damaged.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "tampered with (values differs from its checksum)" in one_line(call("heads", "show", damaged))
    older.write_bytes(data)
    rewrite(older, lambda header: header.update(version=[2, 0]))
    assert "expected version 3.x, got 2.0 in older.safetensors" in one_line(call("heads", "show", older))
    for command in (("heads", "show", "nope"), ("compress", document, "-m", model_dir, "--heads", "nope", "-o", out)):
        assert "or one of the names gemma-3-270m, " in one_line(call(*command)), command


# --- said before, or at once


def test_a_length_beyond_the_models_is_warned_of_before_the_work(
    document: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = document.with_name("out.kvz")
    base = ("compress", document, "-m", model_dir, "-o", out, "--force", "--max-length")
    warning = "warning: 5,000 positions are asked for (--max-length), the model was made for 4,096"
    assert call(*base, 4096).stderr == ""
    scaled = ("--rope", '{"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096}')
    assert warning not in call(*base, 5000, *scaled).stderr

    def load(*arguments: Any, **options: Any) -> None:
        raise ValueError("expected the warning first")

    monkeypatch.setattr("kvzip.models.load", load)
    told, failed = call(*base, 5000).stderr.splitlines()
    assert told.startswith(warning) and failed == "kvzip: expected the warning first"


def test_advice_is_what_the_command_can_do(document: Path, kvz: Path, model_dir: Path, tmp_path: Path) -> None:
    bare = write_model(tmp_path / "bare")
    (bare / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    base = ("compress", document, "-o", tmp_path / "out.kvz", "-m")
    for command, advice in [
        ((*base, bare), "for a base model pass --plain"),
        ((*base, model_dir, "--plain", "--system", "x"), "expected no --system or --instruction with --plain, got one"),
        (("ask", kvz, "hi", "--dtype", "float32"), "the model is float32: load the model in bfloat16"),
    ]:
        line = one_line(call(*command))
        assert advice in line and not re.search(r"[a-z_]=|torch\.|False", line), line
    source = " ".join(
        re.sub(r'" *\n *f?"', "", path.read_text("utf-8")) for path in Path(kvzip.__file__).parent.rglob("*.py")
    )
    for advice in IN_THE_LIBRARY:
        assert source.count(advice) >= 2, advice  # in the library and in the list


def test_a_scaling_that_is_no_number_and_a_config_that_is_no_object_are_one_line(
    document: Path, model_dir: Path, tmp_path: Path
) -> None:
    base = ("compress", document, "-m", model_dir, "-o", tmp_path / "out.kvz", "--max-length", 300, "--rope")
    for factor in ("1e999", "NaN", "-1e999", "1" + "0" * 400):
        line = one_line(call(*base, f'{{"rope_type": "linear", "factor": {factor}}}'))
        assert line.startswith("kvzip: expected ") and "factor" in line, line
    for scaling in ("[" * 100_000, f'{{"factor": 1{"0" * 5000}}}', "[1]"):
        assert "expected an object as" in call(*base, scaling).stderr
    (tmp_path / "model").mkdir()
    for content in (b'{"a": }', b"[1]", b"\xff", b"[" * 100_000, b'{"rope_theta": NaN}'):
        (tmp_path / "model" / "config.json").write_bytes(content)
        line = one_line(call("info", tmp_path / "model"))
        assert re.match("kvzip: expected .*config.json", line) and ", got " in line, line
        assert "config.json" in one_line(call(*base[:3], tmp_path / "model", *base[4:-1]))


def test_a_fraction_that_is_a_percentage_is_understood_and_refused(document: Path, model_dir: Path) -> None:
    for command in (("compress", document), ("compare", document, "q"), ("bench",)):
        for given, meant in [("30", "0.3 keeps 30%"), ("1.5", "0.015 keeps 1.5%"), ("nan", "0.3 keeps"), ("x", "0.3")]:
            result = call(*command, "-m", model_dir, "-r", given)
            assert result.exit_code == 2 and f"that is KEPT, got {given}: {meant}" in result.stderr, result.stderr
    assert "0.3 keeps 30%" in call("eval", "-m", model_dir, "--task", "kv", "--ratio", "30").stderr


def test_a_document_that_is_gone_is_warned_of(document: Path, model_dir: Path) -> None:
    base = ("compress", document, "-m", model_dir, "--force", "-o", document.with_name("out.kvz"))
    for how in (("--threshold", 2), ("-r", 0.0001)):
        assert call(*base, *how, "--json").stderr.splitlines()[-1].startswith("warning: 0 of 1,488 pairs are kept"), how
    assert call(*base, "-r", 0.01).stderr.count("warning") == 0


def test_windows_are_said_to_stay(document: Path, tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention"]
    changes = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 8, "layer_types": kinds}
    windowed = write_model(tmp_path / "windowed", qkv_bias=True, use_sliding_window=True, **changes)
    out = tmp_path / "out.kvz"
    line = "windows  1 of 2 layers see their last tokens only and stay as they are: only the pairs of the other 1"
    assert line in call("compress", document, "-m", windowed, "-o", out).stdout
    assert line in call("info", out).stdout
    assert json.loads(call("info", out, "--json").stdout)["window_layers"] == 1


def test_sizes_are_the_same_by_every_way(document: Path, model_dir: Path, model: kvzip.Model) -> None:
    ways = {"whole": (), "segments": ("--segment", 150)}
    full = nbytes(kvzip.prefill(model, TEXT))
    for name, options in ways.items():
        out = document.with_name(f"{name}.kvz")
        facts = json.loads(call("compress", document, "-m", model_dir, "-o", out, *options, "--json").stdout)
        told = json.loads(call("info", out, "--json").stdout)
        assert facts["full_bytes"] == told["full_bytes"] == full, name
        assert facts["cache_bytes"] == told["cache_bytes"] == nbytes(kvzip.load_cache(out)), name
    assert call("info", document.with_name("whole.kvz"), "--memory", "1GB").exit_code == 2


def test_advice_to_go_in_segments_is_of_use_or_not_given(
    document: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    out = document.with_name("out.kvz")
    monkeypatch.setattr("kvzip.prefilling.run_attention", stop)
    for copies, advice in [(1, ""), (8, ", or with --segment 1000, which can go on where it stopped")]:
        document.write_text(TEXT * copies, encoding="utf-8")
        line = one_line(call("compress", document, "-m", model_dir, "-o", out, "--chunk", 500), 130)
        assert line == f"kvzip: interrupted: {out} was not written: run it again{advice}"


def test_what_needs_no_torch_is_quick(tmp_path: Path, model_dir: Path, kvz: Path) -> None:
    (tmp_path / "doc.txt").write_text("a document", encoding="utf-8")
    (tmp_path / "doc.kvz").write_bytes(kvz.read_bytes())
    commands = [
        ["info", "none.kvz"],
        ["ask", "none.kvz", "q"],
        ["ask", "doc.kvz", "q", "-m", "none"],
        ["ask", "doc.txt", "q"],
        ["chat", "none.kvz"],
        ["report", "none.kvz"],
        ["eval", "tasks"],
        ["eval", "report", "none.jsonl"],
        ["heads", "show", "smollm2-135m-instruct"],
        ["heads", "show", "none"],
        ["info", "none"],
        ["bench", "-m", "none"],
        ["compare", "doc.txt", "q", "-m", "none"],
        ["eval", "--task", "kv", "-m", "none"],
        ["heads", "make", "doc.txt", "-m", "none", "-o", "heads.safetensors"],
        ["compress", "doc.txt", "-m", "none", "-o", "other.kvz"],
        ["compress", "doc.txt", "-m", str(tmp_path), "-o", "other.kvz"],
        ["compress", "doc.txt", "-m", str(model_dir)],  # doc.kvz is there
        ["compress", "none.txt", "-m", str(model_dir)],
    ]
    program = (
        "import sys, time\nfrom kvzip.cli import main\n"
        f"for words in {commands!r}:\n"
        "    begun = time.process_time()\n"
        "    try:\n        main(words)\n    except SystemExit:\n        pass\n"
        "    assert 'torch' not in sys.modules and time.process_time() - begun < 0.5, words\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("kvzip: expected") == len(commands) - 2


def test_advice_names_packages_that_exist() -> None:
    """kvzip is on no index, so its extras cannot be had by name."""
    root = Path(kvzip.__file__).parents[1]
    pages = [*root.glob("kvzip/**/*.py"), *root.glob("docs/*.md"), root / "README.md", *root.glob("examples/*.py")]
    assert len(pages) > 50
    assert [path for path in pages if re.search(r"install '?\"?kvzip", path.read_text(encoding="utf-8"))] == []


def test_a_document_and_its_prefix_are_encoded_as_one_text(document: Path, tmp_path: Path) -> None:
    """With a vocabulary that joins the space before a word with it, also where that is the prefix's last."""
    directory = write_model(tmp_path / "spaced", vocab_size=260)
    vocabulary = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    first, second = "\u0120", document.read_text(encoding="utf-8").lstrip()[0]  # a space, as this vocabulary writes it
    free = next(name for name in vocabulary["model"]["vocab"] if name not in {first, second} and name >= "\u0130")
    names = vocabulary["model"]["vocab"]
    names[first + second] = names.pop(free)
    vocabulary["model"]["merges"] = [[first, second]]
    (directory / "tokenizer.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    template = random_model.TEMPLATE.replace("'|>' + m['content']", "'|> ' + m['content']")
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}), encoding="utf-8")
    model = kvzip.load(directory, device="cpu")
    whole = kvzip.prefill(model, document.read_text(encoding="utf-8"))
    assert whole.token_ids[whole.start] == names[first + second]
    for words in ([], ["--segment", 100]):
        out = tmp_path / f"{len(words)}.kvz"
        assert call("compress", document, "-m", directory, "--device", "cpu", "-o", out, *words).exit_code == 0
        made = kvzip.load_cache(out)
        assert made.start == whole.start and made.token_ids.tolist() == whole.token_ids.tolist()
