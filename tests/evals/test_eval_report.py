"""The report: a table with the numbers of the results, pictures, and a page that needs no other file."""

import html
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvzip.evals.plots import _styles, figures
from kvzip.evals.report import means, overview, page, story, table, write_report
from kvzip.evals.results import append, read, relative, relative_intervals

RUN = {
    "kind": "run",
    "run": "r",
    "fingerprint": "f",
    "form": "chat",
    "seed": 0,
    "count": 2,
    "questions": 9,
    "max_tokens": None,
    "model": "small-model",
    "commit": "abc123",
    "versions": {"torch": "2.9"},
    "dtype": "bfloat16",
    "device": "GPU",
    "date": "2026-01-02T03:04:05+00:00",
}
SCORES = {  # of two contexts with two questions each
    ("kv", "full", 1.0): [1, 1, 1, 1],
    ("kv", "kvzip", 0.3): [1, 1, 1, 0],
    ("kv", "random", 0.3): [0, 0, 0, 0],
    ("needles", "full", 1.0): [1, 0, 1, 0],
    ("needles", "kvzip", 0.3): [0, 0, 1, 0],
    ("needles", "random", 0.3): [0, 0, 1, 0],
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("results") / "x.jsonl"
    lines: list[dict[str, Any]] = [RUN]
    for (task, method, ratio), scores in SCORES.items():
        for n, score in enumerate(scores):
            facts = {"length": 500 * (1 + n // 2), "depth": 50 * (n % 2)} if task == "needles" else {}
            own = {"task": task, "example": n // 2, "number": n % 2, "context": f"{task}{n // 2}", "facts": facts}
            lines.append({"kind": "question", "id": f"{task}{n}", "run": "r", **own})
            fields = {"method": method, "ratio": ratio, "kept": ratio, "score": score, "prediction": "<b>|"}
            lines.append({"kind": "answer", "run": "r", "question": f"{task}{n}", **fields})
    append(path, lines)
    return path


def test_the_table_has_each_score_with_its_interval_and_difference(results: Path) -> None:
    rows = table(read(results)).split("\n")
    assert "| kv | full | 1 | 100.0 | 100.0 to 100.0 | 4 (2) |  |  |" in rows
    assert "| kv | kvzip | 0.3 | 75.0 | 50.0 to 100.0 | 4 (2) | -25.0 |  |" in rows
    assert "| kv | random | 0.3 | 0.0 | 0.0 to 0.0 | 4 (2) | **-100.0** | **-75.0** |" in rows
    assert "| needles | random | 0.3 | 25.0 | 0.0 to 50.0 | 4 (2) | -25.0 | +0.0 |" in rows


def test_the_overview_has_methods_down_and_tasks_across(results: Path) -> None:
    assert overview(read(results)).split("\n") == [
        "### 0.3 kept",
        "",
        "| method | kv | needles | relative |",
        "|---|---|---|---|",
        "| full | 100.0 | 50.0 | 100.0 |",
        "| kvzip | 75.0 | 25.0 | 62.5 |",
        "| random | 0.0 | 25.0 | 25.0 |",
    ]


def test_the_mean_over_tasks_is_relative_to_the_full_cache(results: Path) -> None:
    assert relative(read(results)) == {
        ("full", 1.0): 1.0,
        ("kvzip", 0.3): (0.75 / 1 + 0.25 / 0.5) / 2,
        ("random", 0.3): (0 + 0.5) / 2,
    }
    partly = [a for a in read(results) if (a.question["task"], a.method) != ("kv", "random")]
    assert ("random", 0.3) not in relative(partly)


def test_intervals_of_the_mean_draw_contexts_with_the_full_cache(results: Path) -> None:
    answers = read(results)
    found = relative_intervals(answers)
    assert found.keys() == relative(answers).keys() and found["full", 1.0] == (1.0, 1.0)
    # kvzip has 1 and 0.5 of the two contexts of kv, 0 and 1 of the needles': a sixteenth of draws is the worst of both
    assert found["kvzip", 0.3] == ((0.5 + 0) / 2, (1 + 1) / 2)
    alike = [replace(a, score=1.0) for a in answers]
    assert set(relative_intervals(alike).values()) == {(1.0, 1.0)}


@pytest.mark.filterwarnings("error")
def test_intervals_of_runs_that_were_stopped_and_of_one_context(results: Path) -> None:
    answers = read(results)
    stopped = [a for a in answers if (a.method, a.question["context"]) != ("kvzip", "kv1")]
    low, high = relative_intervals(stopped)["kvzip", 0.3]
    assert (low, high) == ((1 + 0) / 2, (1 + 1) / 2)  # of kv the one context that is there
    without = [a for a in answers if (a.method, a.question["context"]) != ("full", "kv0")]
    assert relative_intervals(without)["kvzip", 0.3] == (0.25, 0.75)
    one = [a for a in answers if a.question["context"] == "needles1"]
    assert relative_intervals(one)["kvzip", 0.3] == (1, 1)  # its two questions are drawn, and scored alike


def test_means_have_methods_down_and_ratios_across(results: Path) -> None:
    rows = means(read(results)).split("\n")
    assert rows[0] == "| method | 0.3 kept |" and len(rows) == 4
    assert rows[2] == "| kvzip | 62 (25 to 100) |"


def test_a_report_is_a_table_pictures_and_a_page_of_its_own(results: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    written = write_report([results], tmp_path / "report")
    names = {path.name for path in written}
    stem = "small-model-chat"
    assert names == {"table.md", "index.html", f"{stem}-tasks.png", f"{stem}-mean.png", f"{stem}-heat.png"}
    for path in written:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert text.count("data:image/png;base64,") == 3
    assert re.findall(r'(?:src|href)="(?!data:)', text) == []
    assert "<td>kv</td><td>random</td><td>0.3</td><td>0.0</td>" in text and "<td><b>-75.0</b></td>" in text
    assert "commit abc123; torch 2.9; dtype bfloat16; device GPU; seed 0; date 2026-01-02" in text


def test_pictures_show_what_changed(results: Path) -> None:
    pytest.importorskip("matplotlib")
    answers = read(results)
    whole = figures(answers, "title")
    assert set(whole) == {"tasks", "mean", "heat"}
    fewer = [a for a in answers if not (a.question["task"] == "needles" and a.method == "random")]
    assert all(png != whole[name] for name, png in figures(fewer, "title").items())
    assert set(figures([a for a in answers if a.method != "full"], "title")) == {"tasks", "heat"}


def test_ours_is_thick_five_others_have_colors_of_their_own_and_the_rest_is_grey(results: Path) -> None:
    answers = [a for a in read(results) if a.method == "kvzip"]
    many = [replace(a, method=name) for name in ("kvzip", *"abcdefgh") for a in answers]
    styles = _styles(many, "kvzip", ())
    colored = [style for style in styles.values() if "marker" in style]
    assert len(colored) == 6 == len({style["color"] for style in colored} & {s["color"] for s in colored})
    assert len({style["marker"] for style in colored}) == 6
    assert styles["kvzip"]["linewidth"] == max(style["linewidth"] for style in styles.values()) > 2
    assert len({style["color"] for style in styles.values() if "marker" not in style}) == 1 and len(styles) == 9
    asked = _styles(many, "kvzip", ("h", "c", "not run"))
    assert [name for name, style in asked.items() if "marker" in style] == ["h", "c", "kvzip"] and len(asked) == 9


def test_the_page_begins_with_what_was_found_and_fits_a_phone_and_the_dark(results: Path) -> None:
    answers = read(results)
    told = story(answers, "small")
    kept = relative(answers)
    best = max(ratio for method, ratio in kept if method == "kvzip")
    assert told.startswith(f"small: kvzip keeps {kept['kvzip', best]:.0%} of the full cache's score with {best:.0%} of")
    text = page("## A\n\n| task | x |\n|---|---|\n| a | 1 |\n\nend", [], story=[told])
    assert 'name="viewport"' in text and "prefers-color-scheme:dark" in text and html.escape(told) in text
    assert "<table><tr><th>task</th><th>x</th></tr><tr><td>a</td><td>1</td></tr></table>" in text
    assert story([a for a in answers if a.method != "full"], "t") == (
        "t: no method was run beside the full cache on all tasks."
    )


def test_names_on_the_page_are_text(results: Path) -> None:
    assert "<script>" not in page("## <script>\n\n| <script> |", [("<script>", b"")])


def test_without_answers_or_matplotlib_it_says_what_to_do(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(tmp_path / "empty.jsonl", [RUN])
    with pytest.raises(ValueError, match=r"expected answers in .*empty\.jsonl, got none"):
        write_report([tmp_path / "empty.jsonl"], tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install matplotlib"):
        write_report([results], tmp_path)
