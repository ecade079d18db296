"""`kvzip eval` as it is typed: lists, ranges, and no command."""

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

import kvzip.evals
from kvzip.cli import evaluate, main


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """What `run_eval` is called with."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(kvzip.evals, "run_eval", lambda model, **given: found.update(given) or True)
    monkeypatch.setattr(evaluate, "load_model", lambda stage, name, **given: SimpleNamespace(name=name))
    monkeypatch.setattr(evaluate, "find_model", lambda name: tmp_path)
    monkeypatch.chdir(tmp_path)
    yield found


def typed(line: str) -> Any:
    return CliRunner().invoke(main, line.split())


@pytest.mark.parametrize(
    "line",
    [
        "eval --model M --task kv@300 squad --ratio 0.1 ... 0.5 --method kvzip,snapkv",
        "eval run -m M --task kv@300,squad --ratio 0.1,0.2,0.3,0.4,0.5 --method=kvzip,snapkv",
        "eval --method kvzip --method snapkv --ratio 0.1:0.5:0.1 --task kv@300 --task squad -m M",
        "eval --ratio .1 .2 ... .5 --method kvzip, snapkv --task kv@300 squad --model M",
    ],
)
def test_lists_may_be_typed_in_every_usual_way(taken: dict[str, Any], line: str) -> None:
    result = typed(line)
    assert (result.exit_code, result.stdout) == (0, "kvzip-eval.jsonl: all answered\n")
    assert taken["tasks"] == ("kv@300", "squad") and taken["methods"] == ("kvzip", "snapkv")
    assert taken["ratios"] == (0.1, 0.2, 0.3, 0.4, 0.5)


@pytest.mark.parametrize(
    ("words", "ratios"),
    [
        ("0.1 ... 1.0", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
        ("0.1 0.3 ... 1", [0.1, 0.3, 0.5, 0.7, 0.9]),
        ("0.5 0.3 0.3", [0.3, 0.5]),
        ("0.25:0.5:0.125 1", [0.25, 0.375, 0.5, 1.0]),
    ],
)
def test_ratios_worked_by_hand(words: str, ratios: list[float]) -> None:
    assert list(evaluate.ratios_of(words.split())) == ratios


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--ratio 0.1 ...", r"expected ratios in \(0, 1\], the fraction of pairs that is KEPT, got '0.1 ...'"),
        ("--ratio 0.1,1.2", r"expected ratios in \(0, 1\], .* got '0.1 1.2'"),
        ("--ratio 0", "expected ratios in"),
        ("--ratio -0.1", "expected ratios in"),
        ("--ratio 0.5 ... 0.1", "expected ratios such as 0.3, 0.1:0.5:0.1 or 0.1 ... 1.0, got '0.5 ... 0.1'"),
        ("--ratio 0.1:0.5", "expected ratios such as"),
        ("--ratio 0.1:0.5:0", "expected ratios such as"),
        ("--ratio nan", "expected ratios such as"),
        ("--ratio", "'--ratio' requires an argument"),
        ("--method --ratio 0.1", "'--method' requires an argument"),
        ("--count 3 4", r"unexpected extra argument"),
    ],
)
def test_what_cannot_be_meant_is_refused(taken: dict[str, Any], line: str, message: str) -> None:
    result = typed(f"eval --model M --task kv {line}")
    assert result.exit_code == 2 and not taken
    assert re.search(message, result.stderr), result.stderr


@pytest.mark.parametrize("line", ["--method kvzap", "--task kw", "--task kv@4K"])
def test_names_are_checked_before_a_model_is_loaded(taken: dict[str, Any], line: str) -> None:
    result = typed(f"eval --model M --task kv {line}")
    assert result.exit_code == 1 and "expected" in result.stderr and not taken


def test_a_log_gets_a_line_of_progress_with_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(evaluate.time, "monotonic", lambda: clock[0])
    progress = evaluate._line_of_progress()
    for finished, now in [(100, 1010.0), (110, 1020.0), (120, 1040.0), (125, 1041.0)]:
        clock[0] = now
        progress(finished, 400, "kv 3, snapkv at 0.3")
    # 20 answers in 30 s, 280 to come
    assert capsys.readouterr().err == "120 of 400 answers, kv 3, snapkv at 0.3, 7 min left\n"


def test_help_is_of_the_group_and_commands_are_found(taken: dict[str, Any]) -> None:
    assert "report" in typed("eval --help").stdout
    assert "kv" in typed("eval tasks").stdout and not taken
