"""The examples, run on SmolLM2 with the beginning of their document; left out where the model cannot be had."""

import re
from pathlib import Path

import pytest

import chat
import custom_scorer
import head_scores
import kvzip
import many_documents
import many_questions
import museum
import quickstart
import save_and_reload
import streaming
import transformers_cache

FIRST = (
    museum.QUESTIONS[0],
    museum.Question("The town of Port Selden stands at the mouth of the", "River Arden"),
)
"""Questions that the first paragraph answers."""


@pytest.fixture(scope="module")
def model(smollm2: Path) -> kvzip.Model:
    return museum.load(str(smollm2))


@pytest.fixture(scope="module")
def made() -> dict[tuple[object, ...], kvzip.DenseCache]:
    """Caches by what they were made of: caches never change, so examples that read the same text share them."""
    return {}


@pytest.fixture
def paragraphs(
    model: kvzip.Model,
    made: dict[tuple[object, ...], kvzip.DenseCache],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    unchecked: None,
):
    """A function that writes the first paragraphs of the examples' document, and gives an example's arguments."""
    prefill, score = kvzip.prefill, kvzip.score

    def prefill_once(model: kvzip.Model, context: str, **options: object) -> kvzip.DenseCache:
        key = ("prefill", context, *sorted(options.items()))
        made[key] = made[key] if key in made else prefill(model, context, **options)
        return made[key]

    def score_once(model: kvzip.Model, cache: kvzip.DenseCache, **options: object) -> kvzip.DenseCache:
        key = ("score", *cache.token_ids.tolist(), *sorted(options.items()))
        if not any(cache is known for known in made.values()):  # one that Transformers made
            return score(model, cache, **options)
        made[key] = made[key] if key in made else score(model, cache, **options)
        return made[key]

    monkeypatch.setattr(kvzip, "prefill", prefill_once)
    monkeypatch.setattr(kvzip, "score", score_once)
    monkeypatch.setattr(museum, "load", lambda _: model)
    monkeypatch.setattr(museum, "FIVE", FIRST)

    def write(count: int) -> list[str]:
        path = tmp_path / "short.txt"
        parts = museum.DOCUMENT.read_text(encoding="utf-8").split("\n\n")
        path.write_text("\n\n".join(parts[:count]), encoding="utf-8")
        return ["--document", str(path), "--ratio", "0.5", "--tokens", "4"]

    return write


def right(printed: str) -> int:
    """How many answers are marked as right."""
    return printed.count("\u2713")


def pairs(printed: str) -> tuple[int, int]:
    """Kept and total, as in `kept 1,234 of 5,678 pairs`."""
    kept, total = re.findall(r"([\d,]+) of ([\d,]+) pairs", printed)[0]
    return int(kept.replace(",", "")), int(total.replace(",", ""))


def test_the_quickstart_answers_from_half_as_from_all(paragraphs, capsys: pytest.CaptureFixture[str]) -> None:
    assert quickstart.main(paragraphs(2)) == 0
    printed = capsys.readouterr().out
    kept, total = pairs(printed)
    assert kept == int(0.5 * total)
    whole, half = printed.split("from 50% of them:")
    assert right(whole) == right(half) == 2 and "The architect of the rope factory was ... Henrik Vale" in half


def test_one_process_compresses_and_another_answers(paragraphs, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = paragraphs(2)
    file = Path(arguments[1]).with_suffix(".kvz")
    assert save_and_reload.main([*arguments, "--file", str(file)]) == 0
    printed = capfd.readouterr().out
    kept, total = pairs(printed)
    assert kept == int(0.5 * total) and "pairs of short.txt, by kvzip-chunk/pair" in printed
    sizes = re.search(r"([\d.]+) MB of cache, ([\d.]+) MB in short.kvz", printed)
    assert sizes and float(sizes[2]) < 0.55 * float(sizes[1]) and file.exists()
    assert printed.count(" ... ") == 5 and "another process: short.kvz loaded" in printed


def test_a_batch_of_32_questions_is_answered_as_one_by_one(paragraphs, capsys: pytest.CaptureFixture[str]) -> None:
    assert many_questions.main(paragraphs(5)) == 0
    printed = capsys.readouterr().out
    marks = re.findall(r"^ *\d+ ([\u2713\u2717])", printed, re.MULTILINE)
    assert len(marks) == 32
    assert right("".join(marks[:4])) >= 3 and right("".join(marks[4:])) <= 3, (
        "the text answers the first questions only"
    )
    assert "4 of the 4 that were asked alone too got the same answer" in printed


def test_two_documents_are_asked_at_once(paragraphs, capsys: pytest.CaptureFixture[str]) -> None:
    assert many_documents.main(paragraphs(3)) == 0
    lines = capsys.readouterr().out.splitlines()
    first, second = ([line for line in lines if line.startswith(name)] for name in ("first ", "second "))
    assert first[0].startswith("first half: ") and len(first) == len(second) == 3
    assert right("".join(first)) == 2 and right("".join(second)) == 0, "each half answers what it has"


def test_heads_chosen_ahead_answer_without_a_scoring_pass(capsys: pytest.CaptureFixture[str], paragraphs) -> None:
    ratio = ["--ratio", "0.6"]
    assert head_scores.main([*paragraphs(2), *ratio]) == 0
    printed = capsys.readouterr().out
    heads = re.findall(r"^head \d +([\u2588\u2591]+)$", printed, re.MULTILINE)
    assert [len(row) for row in heads] == [30] * 3 and "".join(heads).count("\u2588") == int(0.6 * 90)
    assert "scores from 2,000 tokens of essays" in printed and right(printed) >= 1


def test_a_book_is_read_on_after_an_interruption(paragraphs, capsys: pytest.CaptureFixture[str]) -> None:
    assert streaming.main([*paragraphs(2), "--segment", "40", "--stop", "80"]) == 0
    printed = capsys.readouterr().out
    before, after = printed.split("interrupted, ")
    steps = [[int(n) for n in re.findall(r"(\d+) tokens read", part)] for part in (before, after)]
    assert steps[0] == [40, 80] and steps[1][:2] == [80, 120], "what was read is not read again"
    kept, total = pairs(printed)
    assert kept == int(0.5 * total) and total == 90 * steps[1][-1]


def test_a_conversation_is_forked_and_folded(paragraphs, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat.main(paragraphs(2)) == 0
    printed = capsys.readouterr().out
    tails = [int(n) for n in re.findall(r"\[(\d+) tokens in the tail\]", printed)]
    assert re.findall("^> (.*)$", printed, re.MULTILINE) == [chat.FIRST, *chat.FORKS, chat.LAST]
    assert len(tails) == 4 and min(tails[1:3]) > tails[0] > 0, "both forks remember the first turn"
    held, tail, became = (
        int(n.replace(",", ""))
        for n in re.findall(r"folded: ([\d,]+) pairs and a tail of (\d+).*\nbecame ([\d,]+)", printed)[0]
    )
    assert tail == max(tails[1:3]) and became == held + int(0.5 * 90 * tail)


def test_own_scores_are_compared_with_those_of_kvzip(paragraphs, capsys: pytest.CaptureFixture[str]) -> None:
    assert custom_scorer.main(paragraphs(2)) == 0
    printed = capsys.readouterr().out
    found = re.findall(r"^(\S+)/pair: ([\d,]+) of [\d,]+ pairs, (\d+)%", printed, re.MULTILINE)
    assert [name for name, _, _ in found] == ["kvzip-chunk", "short-keys", "random"]
    assert len({kept for _, kept, _ in found}) == 1
    shared = [int(percent) for _, _, percent in found]
    assert shared[0] == 100 and abs(shared[2] - 50) <= 2, "a draw shares what chance gives"
    assert right(printed.split("/pair: ")[1]) == 2, "kvzip's scores answer"


def test_transformers_answers_alike_from_the_compressed_cache(paragraphs, capsys: pytest.CaptureFixture[str]) -> None:
    assert transformers_cache.main(paragraphs(2)) == 0
    printed = capsys.readouterr().out
    assert printed.count("the same tokens") == 2 and right(printed) >= 1
    sizes = re.search(r"([\d.]+) MB -> ([\d.]+) MB", printed)
    assert sizes and float(sizes[2]) < 0.55 * float(sizes[1])


def test_an_example_is_short() -> None:
    examples = (quickstart, many_questions, save_and_reload, head_scores, streaming, chat, custom_scorer)
    for example in (*examples, transformers_cache):
        assert len(Path(str(example.__file__)).read_text(encoding="utf-8").splitlines()) < 60, example.__name__
