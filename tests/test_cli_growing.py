"""`kvzip append` and `kvzip ls`, documents of HTML and Word, and the demo on a tiny model."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

import kvzip
from kvzip.cache import read_header
from kvzip.cli import demo, documents
from test_cli import TEXT, call, one_line, write_model

MORE = "In 1902 a second keeper came, Anselm Roy, who counted 311."

PAGE = b"""<!DOCTYPE html><html><head><meta charset="iso-8859-1"><title>no</title><style>p{}</style></head><body>
<!-- unseen --><h1>The  lighthouse</h1><p>Built in <b>1871</b>,<br>by In\xe8s.</p><script>alert(1)</script>
<ul><li>one</li><li>two</li></ul><pre>a  b
  c</pre><table><tr><th>steps</th><td>312</td></tr></table></body></html>"""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def kvz(tmp_path: Path, model_dir: Path) -> Path:
    (tmp_path / "light.txt").write_text(TEXT, encoding="utf-8")
    result = call("compress", tmp_path / "light.txt", "-m", model_dir, "--device", "cpu", "-o", tmp_path / "light.kvz")
    assert result.exit_code == 0, result.stderr
    return tmp_path / "light.kvz"


def test_a_file_grows_by_what_the_library_appends(kvz: Path, model_dir: Path, tmp_path: Path) -> None:
    model, before = kvzip.open(kvz, device="cpu")
    (tmp_path / "more.txt").write_text(MORE, encoding="utf-8")
    longer = tmp_path / "longer.kvz"
    result = call("append", kvz, tmp_path / "more.txt", "--device", "cpu", "-o", longer, "--json")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["new_tokens"] == len(model.tokenizer.text.encode(f"\n\n{MORE}").ids)  # pyright: ignore
    _, grown = kvzip.open(longer, device="cpu")
    expected = kvzip.append(model, before, f"\n\n{MORE}")
    assert torch.equal(grown.token_ids, expected.token_ids) and (grown.kept, grown.total) == (
        expected.kept,
        expected.total,
    )
    note = read_header(longer)["note"]
    assert note["title"] == "light.txt" and note["documents"][1:] == [str(tmp_path / "more.txt")]
    line = one_line(call("append", kvz, tmp_path / "more.txt", "--device", "cpu", "-o", longer))
    assert "is left as it is; pass --force to replace it" in line
    held = kvz.read_bytes()
    one_line(call("append", kvz, tmp_path / "absent.txt"))
    assert kvz.read_bytes() == held
    result = call("append", kvz, tmp_path / "more.txt", "-r", "1", "--device", "cpu")
    assert result.exit_code == 0 and f"{facts['new_tokens']} tokens more" in result.stdout
    assert read_header(kvz)["kept"] - before.kept == facts["total"] - before.total, "all of the new pairs"
    assert call("ask", kvz, "Who?", "-n", "2", "--device", "cpu", "--repetition-penalty", "1.2").exit_code == 0


def test_files_are_listed_with_what_their_headers_say(kvz: Path, tmp_path: Path) -> None:
    (tmp_path / "other.kvz").write_text("no such file", encoding="utf-8")
    header = read_header(kvz)
    (listed,) = json.loads(call("ls", tmp_path, "--json").stdout)
    assert listed == {
        "file": str(kvz),
        "document": "light.txt",
        "model": "tiny",
        "tokens": header["length"],
        "ratio": header["ratio"],
        "bits": None,
        "file_bytes": kvz.stat().st_size,
    }
    shown = call("ls", tmp_path).stdout.splitlines()
    assert len(shown) == 2 and "light.txt" in shown[1] and f"{header['ratio']:.1%}" in shown[1]
    assert call("ls", tmp_path / "..").stdout.startswith("no .kvz files in ")
    assert "got" in one_line(call("ls", tmp_path / "other.kvz")) and "no such thing" in one_line(call("ls", "nowhere"))


def test_html_is_read_as_text_with_the_extra_and_asks_for_it_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "page.html"
    path.write_bytes(PAGE)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "bs4", None)
        with pytest.raises(ImportError, match=r"pip install beautifulsoup4 \(in a checkout pip install -e '\.\[html\]"):
            documents.read([str(path)])
    pytest.importorskip("bs4")
    text, title = documents.read([str(path)])
    lines = [line for line in text.splitlines() if line]
    assert title == "page.html"
    assert lines == ["The lighthouse", "Built in 1871,", "by In\u00e8s.", "one", "two", "a  b", "  c", "steps\t312"]
    comment = b"<!-- saved from url=(0022)http://example.com/ -->\n"
    for saved, name in ((comment + PAGE, "saved"), (comment + b"<p>Hi <b>there</b></p>", "part.htm")):
        (tmp_path / name).write_bytes(saved)
        text, _ = documents.read([str(tmp_path / name)])
        assert "<" not in text and "saved from" not in text
    path.write_text("<html><head><title>x</title></head></html>", encoding="utf-8")
    with pytest.raises(ValueError, match="a page without any"):
        documents.read([str(path)])
    path.write_text("<html>" + "<b>" * 5_000 + "x", encoding="utf-8")
    with pytest.raises(ValueError, match="nested less deeply"):
        documents.read([str(path)])


@pytest.mark.parametrize("content", [b"{\\rtf1\\ansi Hello}", b"%!PS-Adobe-3.0\n(Hello) show", b"a\0b"])
def test_text_that_only_programs_read_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "document"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"expected text in UTF-8, HTML, a PDF or a Word document .* convert it first"):
        documents.read([str(path)])


def test_word_documents_are_read_with_the_extra_and_ask_for_it_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docx = pytest.importorskip("docx")
    path = tmp_path / "letter.docx"
    made = docx.Document()
    made.add_heading("The contract")
    table = made.add_table(rows=1, cols=2)
    table.cell(0, 0).text, table.cell(0, 1).text = "steps", "312"
    made.add_paragraph("Signed by Ines Vautier.")
    made.save(str(path))
    assert documents.read([str(path)])[0] == "The contract\n\nsteps\t312\n\nSigned by Ines Vautier."
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "docx", None)
        with pytest.raises(ImportError, match=r"pip install python-docx"):
            documents.read([str(path)])
    path.write_bytes(path.read_bytes()[:600] + b"word/")
    with pytest.raises(ValueError, match=r"expected a Word document that can be read, got letter\.docx"):
        documents.read([str(path)])


def test_answers_are_shown_with_their_sources_in_words_json_and_on_the_page(kvz: Path) -> None:
    model, cache = kvzip.open(kvz, device="cpu")
    answer = kvzip.generate(model, cache, "Who?", max_tokens=4, sources=3)
    options = ("--device", "cpu", "-n", "4")
    lines = call("ask", kvz, "Who?", "--sources", *options).stdout.splitlines()
    assert len([line for line in lines if "of its attention, tokens" in line]) == len(answer.sources) > 1
    assert f"tokens {answer.sources[0].start:,} to {answer.sources[0].stop:,}: " in "\n".join(lines)
    (told,) = json.loads(call("ask", kvz, "Who?", "--sources", "--json", *options).stdout)["answers"]
    assert told["sources"] == [vars(source) for source in answer.sources]
    page = kvz.with_suffix(".html")
    assert call("report", kvz, "--ask", "Who?", *options).exit_code == 0
    found = re.findall(r'id="facts">(.*?)</script>', page.read_text(encoding="utf-8"))
    (shown,) = json.loads(found[0])["answers"]
    assert (shown["question"], shown["small"], shown["sources"]) == ("Who?", answer.text, told["sources"])
    whole = kvzip.generate(model, kvzip.prefill(model, TEXT), "Who?", max_tokens=4)
    assert shown["full"] == whole.text
    assert "an empty one" in call("report", kvz, "--ask", " ", "--force").stderr


def test_the_demo_leaves_what_it_speaks_of(tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "guide.txt").write_text(f"{TEXT}\n", encoding="utf-8")
    monkeypatch.setattr(demo, "DOCUMENT", tmp_path / "guide.txt")
    there = tmp_path / "there"
    for _ in range(2):  # the second replaces the files of the first
        result = call("demo", "-m", model_dir, "--device", "cpu", "-o", there)
        assert result.exit_code == 0, result.stderr
    assert {path.name for path in there.iterdir()} == {"museum.txt", "museum.kvz", "museum.html"}
    model, small = kvzip.open(there / "museum.kvz", device="cpu")
    full = kvzip.score(model, kvzip.prefill(model, TEXT.strip(), template=False), chunk=512)
    assert small.kept == kvzip.compress(full, 0.3).kept and model.dtype == torch.float32
    shown = result.stdout
    assert shown.count(" ...\n") >= 5 and "best 30%    0 of 5 right, " in shown and "read by" not in shown
    (timing,) = [line for line in shown.splitlines() if line.startswith("It took ")]
    assert len(timing) < 80 and timing.endswith(" s to answer.")
    for name in ("museum.html", "museum.kvz", "museum.txt"):
        assert str(there / name) in shown.partition("What to try next:")[2]
    (there / "museum.txt").write_text("mine", encoding="utf-8")
    assert "is left as it is" in one_line(call("demo", "-m", model_dir, "--device", "cpu", "-o", there))
    assert (there / "museum.txt").read_text(encoding="utf-8") == "mine"
