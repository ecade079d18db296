"""The examples, run on SmolLM2 with the beginning of their document; left out where the model cannot be had."""

import re
from pathlib import Path

import pytest

import many_questions
import save_and_reload
import small_models
from demo import DOCUMENT


@pytest.fixture
def paragraphs(tmp_path: Path):
    """A function that writes the first paragraphs of the examples' document to a file of their own."""
    try:
        small_models.model_dir(many_questions.DEFAULT_MODEL)
    except small_models.Unavailable as missing:
        pytest.skip(f"left out, {many_questions.DEFAULT_MODEL} cannot be had here: {missing}")

    def write(count: int) -> str:
        path = tmp_path / "short.txt"
        path.write_text("\n\n".join(DOCUMENT.read_text(encoding="utf-8").split("\n\n")[:count]), encoding="utf-8")
        return str(path)

    return write


def test_one_process_compresses_and_another_answers(paragraphs, capfd: pytest.CaptureFixture[str]) -> None:
    document = paragraphs(2)
    opening = "The architect of the rope factory was"
    openings = [opening, "The town of Port Selden stands at the mouth of the"]
    file = Path(document).with_suffix(".kvz")
    arguments = ["both", str(file), *openings, "--document", document, "--ratio", "0.5", "--tokens", "4"]
    assert save_and_reload.main(arguments) == 0
    printed = capfd.readouterr().out
    kept, total = (
        int(n.replace(",", "")) for n in re.findall(r"holds ([\d,]+) of ([\d,]+) pairs of short.txt", printed)[0]
    )
    assert kept == int(0.5 * total) and "chosen by kvzip-context/pair" in printed
    assert f"{opening} ... Henrik Vale" in printed and "at the mouth of the ... River Arden" in printed
    sizes = re.search(r"([\d.]+) MB of cache, ([\d.]+) MB in short.kvz", printed)
    assert sizes and float(sizes[2]) < 0.55 * float(sizes[1]) and file.exists()


def test_a_batch_of_32_questions_is_answered_as_one_by_one(paragraphs, capsys: pytest.CaptureFixture[str]) -> None:
    assert many_questions.main(["--document", paragraphs(5), "--ratio", "0.5", "--tokens", "4"]) == 0
    printed = capsys.readouterr().out
    marks = re.findall(r"^│ \d+ +│ .*?([✓✗])", printed, re.MULTILINE)
    assert len(marks) == 32
    assert marks[:4].count("✓") >= 3 and marks[4:].count("✓") <= 3, "the text answers the first four questions only"
    assert "4 of the 4 that were asked alone too got the same answer" in printed
