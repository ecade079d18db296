"""Tasks: generated contexts have the length asked for and hold the reference answers; data is read as laid out."""

import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvzip.evals.metrics import check_metric, evaluate
from kvzip.evals.tasks import GROUPS, TASKS, Example, Request, data, examples, expand, functions, synthetic
from kvzip.evals.tasks.base import fit, insert

GENERATED = [
    "needle",
    "needles",
    "kv",
    "prefix_suffix",
    "multihop",
    "math_find",
    "repoqa",
    "repoqa_kv",
    *(name for name in GROUPS["ruler"] if not name.startswith("ruler_qa")),
]
LENGTH = 3000
PARAGRAPHS = [
    {"context": f"Paragraph {i} is about {word}. " * 12, "question": [f"What is {i} about?"], "answers": [word]}
    for i, word in enumerate(["cats", "dogs", "cows", "goats", "geese", "sheep"])
]
ESSAYS = [
    {"name": str(i), "context": " ".join(f"Essay {i} says {j} wise things." for j in range(200))} for i in range(3)
]


def count(text: str) -> int:
    return -(-len(text) // 3)


def write(directory: Path, name: str, rows: list[dict[str, Any]]) -> None:
    (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("data")
    write(directory, "pg_essays", ESSAYS)
    write(directory, "squad_paragraph", PARAGRAPHS)
    return str(directory)


def make(name: str, files: str | None = None, **changes: Any) -> list[Example]:
    settings = {"examples": 2, "questions": 4, "length": 0, "seed": 0, "data": files, "count": count}
    return list(examples(name, Request(**{**settings, **changes})))


@pytest.mark.parametrize("name", GENERATED)
def test_a_generated_context_is_as_long_as_fits(name: str, files: str) -> None:
    for example in make(f"{name}@{LENGTH}", files):
        assert 0.85 * LENGTH < count(example.context) <= LENGTH  # a function may have 40 lines
        assert example.questions


@pytest.mark.parametrize("name", GENERATED)
def test_an_example_depends_on_seed_and_number_only(name: str, files: str) -> None:
    two = make(f"{name}@{LENGTH}", files)
    if name != "needle":  # whose number of contexts is that of its depths
        assert make(f"{name}@{LENGTH}", files, examples=1) == two[:1]
        assert two[0] != two[1]
    assert make(f"{name}@{LENGTH}", files) == two
    assert make(f"{name}@{LENGTH}", files, seed=1)[0] != two[0]


@pytest.mark.parametrize("name", GENERATED)
def test_every_question_can_be_marked_and_differs_from_the_others(name: str, files: str) -> None:
    for example in make(f"{name}@{LENGTH}", files):
        for question in example.questions:
            check_metric(question.metric, question.answers, question.choices)
        for form in ("query", "cloze"):
            texts = [getattr(question, form) for question in example.questions]
            assert len(set(texts)) == len(texts)


def test_keys_have_the_values_asked_for() -> None:
    (example, _) = make("kv@3000")
    pairs = json.loads(example.context)
    for question in example.questions:
        (key,) = [key for key in pairs if key in question.query and key in question.cloze]
        assert question.answers == (pairs[key],)


def test_one_string_has_the_prefix_and_the_suffix_and_others_have_one_of_them() -> None:
    (example, _) = make("prefix_suffix@3000")
    strings = example.context.split("\n")
    for question in example.questions:
        start, end = re.findall(r"with (\w+)", question.cloze)
        assert [s for s in strings if s.startswith(start) and s.endswith(end)] == list(question.answers)
        assert sum(s.startswith(start) or s.endswith(end) for s in strings) > 3


@pytest.mark.parametrize("name", ["multihop", "ruler_vt"])
def test_variables_with_a_value_are_those_that_assignments_lead_to(name: str) -> None:
    (example, _) = make(f"{name}@3000")
    values: dict[str, str] = {}
    for variable, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", example.context):
        values[variable] = values.get(source, source)
    for question in example.questions:
        (wanted,) = set(re.findall(r"\d{5}", question.query))
        assert {name for name, value in values.items() if value == wanted} == set(question.answers[0].split(", "))
        assert len(question.answers[0].split(", ")) == 5


def test_numbers_asked_for_are_those_of_the_sorted_list() -> None:
    (example, _) = make("math_find@3000", questions=7)
    order = sorted(map(int, example.context.split(", ")))
    expected = [order[-1], order[0], order[-2], order[1], order[-3], order[2], order[len(order) // 2]]
    assert [question.answers for question in example.questions] == [(str(value),) for value in expected]


def test_functions_lose_their_docstrings_and_keep_their_code() -> None:
    (example, _) = make("repoqa@3000")
    for question in example.questions:
        code, about = question.answers[0], question.query.split("this? ")[1].split("\n")[0]
        assert code in example.context
        assert about not in example.context
        assert code in question.choices and len(question.choices) > 3
        compile(code.removeprefix("@"), "function", "exec")


@pytest.mark.parametrize("name", ["repoqa", "repoqa_kv"])
def test_long_contexts_take_functions_of_other_modules_and_none_twice(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, more = ([(f"def {kind}_{i}():\n    return {i}", f"{kind} {i}") for i in range(40)] for kind in ("few", "more"))
    monkeypatch.setattr(synthetic, "library_functions", lambda: tuple(few))
    monkeypatch.setattr(functions, "other_functions", lambda: tuple(more))
    (short, _), (long, _) = make(f"{name}@200"), make(f"{name}@700")
    assert "more_" not in short.context and all(code in long.context for code, _ in few)
    assert 0 < long.context.count("more_") < 40
    assert max(Counter(re.findall(r"def (\w+)", long.context)).values()) == 1
    with pytest.raises(ValueError, match=r"expected a length of at most \d+ tokens for this task, got 5000: the stand"):
        make(f"{name}@5000")


def test_other_functions_are_of_other_modules_with_names_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    doc = '    """Finds what is asked for in the list that is given, or says why it cannot."""\n'
    body = "    for x in range(3):\n        pass\n    return None\n"
    for module, names in {"bisect": "ab", "test/case": "c", "deep/other": "ad"}.items():
        path = tmp_path / f"{module}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(f"def {name}():\n{doc}{body}" for name in names), encoding="utf-8")
    monkeypatch.setattr(functions, "_STDLIB", tmp_path)
    found = (functions.library_functions.__wrapped__(), functions.other_functions.__wrapped__())
    assert [[code.split("(")[0] for code, _ in own] for own in found] == [["def a", "def b"], ["def d"]]


def test_mixed_tasks_ask_their_parts_in_turn(files: str) -> None:
    (example, _) = make("repoqa_kv@3000", files)
    assert [question.facts["subtask"] for question in example.questions] == ["repoqa", "kv", "repoqa", "kv"]
    assert [question.metric for question in example.questions] == ["repoqa", "include", "repoqa", "include"]
    for question in example.questions:
        assert question.answers[0] in example.context


def test_reports_hold_their_needles(tmp_path: Path) -> None:
    report = {"context": "A line.\n" * 50, "question": ["Summarize."], "answers": ["Short."]}
    write(tmp_path, "leval_gov_report_summ", [report])
    (example,) = make("sum_needles", str(tmp_path))
    assert [question.facts["subtask"] for question in example.questions] == ["summary"] + ["needle"] * 3
    for question in example.questions[1:]:
        assert f"{question.cloze} {question.answers[0]}." in example.context


@pytest.mark.parametrize("name", ["needle", "needles"])
def test_a_needle_lies_at_its_depth_between_sentences(name: str, files: str) -> None:
    for example in make(f"{name}@{LENGTH}", files, examples=11, questions=11):
        for question in example.questions:
            line = question.cloze if name == "needles" else "The best thing to do in San Francisco is"
            before, after = example.context.split(line)
            assert before == "" or before.endswith(". " if name == "needles" else ".\n")
            assert name == "needles" or after == "" or " day.\n" in after or after.endswith(" day.")
            assert after.split(".")[0].strip().lower() == question.answers[0].lower().rstrip(".")
            share = 100 * len(before) / len(example.context)
            assert abs(share - question.facts["depth"]) < (3 if name == "needle" else 7)


def test_needles_fill_the_grid_of_lengths_and_depths(files: str) -> None:
    (own,) = {tuple(q.facts.items()) for q in make("needle@900", files, examples=1)[0].questions}
    assert own == (("length", 900), ("depth", 0))
    grid = [tuple(e.questions[0].facts.values()) for e in make("needle", files, examples=99)]
    assert grid == [(length, depth) for length in (500, 2000, 8000) for depth in range(0, 101, 10)]
    assert [e.questions[0].facts["depth"] for e in make("needle@900", files, examples=3)] == [0, 50, 100]


@pytest.mark.parametrize(
    ("name", "values", "keys"),
    [
        ("ruler_niah_single_1", 1, 1),
        ("ruler_niah_single_3", 1, 1),
        ("ruler_niah_multikey_1", 1, 4),
        ("ruler_niah_multikey_3", 1, 30),
        ("ruler_niah_multivalue", 4, 1),
        ("ruler_niah_multiquery", 4, 4),
    ],
)
def test_magic_values_are_those_of_the_keys_asked_for(name: str, values: int, keys: int, files: str) -> None:
    (example, _) = make(f"{name}@6000", files)
    hidden = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", example.context)
    assert len({key for key, _ in hidden}) >= keys
    for question in example.questions:
        asked = {value for key, value in hidden if key in question.query}
        assert set(question.answers[0].split(", ")) == asked
        assert len(asked) == values


def test_common_words_are_the_most_common() -> None:
    (example, _) = make("ruler_cwe@6000")
    words = Counter(re.findall(r"\d+\. (\S+)", example.context)).most_common()
    assert {word for word, _ in words[:10]} == set(example.questions[0].answers[0].split(", "))
    assert {times for _, times in words[:10]} == {30}
    assert {times for _, times in words[10:]} == {3}


def test_frequent_words_are_the_most_frequent_after_the_dots() -> None:
    (example, _) = make("ruler_fwe@6000")
    words = [word for word, _ in Counter(example.context.split()).most_common(4)]
    assert words == ["...", *example.questions[0].answers[0].split(", ")]


def test_documents_hold_the_answers_among_distractors(files: str) -> None:
    for example in make("ruler_qa_1@600", files, questions=2):
        assert example.context.count("Document ") > 2
        for question in example.questions:
            assert question.answers[0] in example.context
            assert question.metric == "part"


def test_a_length_beyond_the_documents_is_refused(files: str) -> None:
    with pytest.raises(ValueError, match=r"expected a length of at most .* which has 6 rows, got 9000"):
        make("ruler_qa_1@9000", files)


def test_paragraphs_stay_apart_or_are_joined_to_the_length(files: str) -> None:
    apart = make("squad", files, examples=9)
    assert [e.context for e in apart] == [row["context"] for row in PARAGRAPHS]
    joined = make("squad@400", files, examples=9)
    assert [e.context.count("\n\n") + 1 for e in joined] == [3, 3]
    assert [q.answers for q in joined[1].questions] == [("goats",), ("geese",), ("sheep",)]
    assert len(make("squad@400", files, examples=9, questions=2)[0].questions) == 2


def test_short_problems_are_left_out_and_the_answer_is_the_number(tmp_path: Path) -> None:
    long = {"context": "Tom has 3 apples. " * 20, "question": ["How many?"], "answers": ["3\n#### 3"]}
    write(tmp_path, "gsm8k_test", [{**long, "context": "Tom has 3."}, long])
    (example,) = make("gsm8k", str(tmp_path))
    (question,) = example.questions
    assert example.context == long["context"]
    assert evaluate(question.metric, "So the answer is 3.", question.answers) == 1


def test_an_option_letter_becomes_its_line(tmp_path: Path) -> None:
    asked = "When?\nOptions:\n(A) now\n(B) later"
    write(tmp_path, "bbh_manyshot", [{"context": "Q: a\nA: (A)", "question": [asked], "answers": ["(B)"]}])
    (example,) = make("many_shot", str(tmp_path))
    assert example.questions[0].answers == ("(B) later",)


def test_a_conversation_is_cut_after_whole_topics(tmp_path: Path) -> None:
    turn = "USER: I would like to discuss the topic of the {}. \n ASSISTANT: Sure. " + "Well. " * 40
    row = {
        "context": "".join(turn.format(topic) for topic in ("sea", "sky", "sun", "sand")),
        "question": [f"What is the {n} topic we discussed? Only the name." for n in ("first", "second", "third")],
        "answers": ["The sea", "The sky", "The sun"],
    }
    write(tmp_path, "leval_topic_retrieval_longchat", [row])
    (whole,) = make("topic", str(tmp_path))
    assert [question.answers[0] for question in whole.questions] == [*row["answers"], "The sand"]
    assert whole.questions[3].query == "Q: What is the fourth topic we discussed? Only the name."
    assert whole.questions[3].cloze.endswith("The fourth topic we discussed was")
    (cut,) = make("topic@250", str(tmp_path))
    assert [question.answers[0] for question in cut.questions] == ["The sea", "The sky"]
    assert count(cut.context) <= 250 and cut.context.endswith("Well.")
    with pytest.raises(ValueError, match="expected a length of at least"):
        make("topic@20", str(tmp_path))


def test_contexts_longer_than_the_length_are_left_out(tmp_path: Path) -> None:
    rows = [{"context": "word " * n, "question": ["Q?"], "answers": ["A"]} for n in (100, 10)]
    write(tmp_path, "leval_quality", rows)
    assert [e.context for e in make("quality@50", str(tmp_path))] == ["word " * 10]
    with pytest.raises(ValueError, match="expected a length of at least 17 tokens for this task, got 5"):
        make("quality@5", str(tmp_path))


def test_benchmark_files_are_read_with_the_metric_of_each_part(tmp_path: Path) -> None:
    row = {"context": "c", "question": ["a", "b"], "answers": ["x", "y"]}
    write(tmp_path, "scbench_vt", [row])
    write(tmp_path, "scbench_repoqa_and_kv_tiny", [{**row, "task": ["scbench_repoqa", "scbench_kv"]}])
    write(tmp_path, "scbench_summary_with_needles", [{**row, "task": ["scbench_summary", "scbench_passkey"]}])
    (plain,), (code,) = make("scbench_vt", str(tmp_path)), make("scbench_repoqa_and_kv_tiny", str(tmp_path))
    (report,) = make("scbench_summary_with_needles", str(tmp_path))
    assert [question.metric for question in plain.questions] == ["fraction", "fraction"]
    assert [(q.metric, q.max_tokens) for q in code.questions] == [("repoqa", 512), ("include", 512)]
    assert [(q.metric, q.max_tokens) for q in report.questions] == [("rouge_l", 256), ("include", 256)]
    assert [q.facts["subtask"] for q in report.questions] == ["scbench_summary", "scbench_passkey"]
    write(tmp_path, "scbench_repoqa_and_kv", [{**row, "task": ["scbench_repoqa", "scbench_else"]}])
    with pytest.raises(ValueError, match=r"expected a task of repoqa, kv, .* got 'scbench_else'"):
        make("scbench_repoqa_and_kv", str(tmp_path))


def test_the_authors_shortened_sets_are_tasks_of_their_own() -> None:
    assert len(GROUPS["scbench"]) == 11
    assert [len(GROUPS[f"scbench_{size}"]) for size in ("tiny", "short", "mid")] == [8, 8, 8]
    assert "scbench_kv_short" in GROUPS["scbench_short"] and "scbench_vt_short" not in TASKS


def test_the_hub_is_read_as_the_authors_do(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = {
        "rajpurkar/squad": [
            {"context": f"c{i // 2}", "question": f"q{i}", "answers": {"text": [f"a{i}", "other"]}} for i in range(300)
        ],
        "openai/gsm8k": [{"question": "Tom has 3.5 kg. He eats 1. How much is left?", "answer": "2.5\n#### 2.5"}],
        "hotpotqa/hotpot_qa": [
            {
                "question": f"Who is tall, of {n}?",
                "answer": "Ann",
                "context": {"title": ["Ann", "Bob"], "sentences": [["Ann is tall.", " She runs."], ["Bob is small."]]},
            }
            for n in range(9)
        ],
        "Jang-Hyun/SCBench-preprocessed": [{"prompts": ["c", "q1", "q2"], "ground_truth": [["x", "y"], "z"]}],
    }
    fake = SimpleNamespace(load_dataset=lambda name, *_, **__: tables[name])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    squad = data.rows("hub", "squad_paragraph")
    assert len(squad) == 101
    assert squad[1] == {"context": "c1", "question": ["q2", "q3"], "answers": ["a2", "a3"]}
    assert data.rows("hub", "gsm8k_test")[0]["context"] == "Tom has 3.5 kg. He eats 1."
    hops = data.rows("hub", "hotpotqa")
    assert hops[0]["documents"] == ["Ann\nAnn is tall. She runs.", "Bob\nBob is small."] and hops[0]["answers"] == [
        "Ann"
    ]
    (row,) = data.rows("hub", "scbench_vt")
    assert (row["context"], row["question"], row["answers"]) == ("c", ["q1", "q2"], ["x, y", "z"])
    (example, _) = make("ruler_qa_2@100", "hub", questions=2)
    numbers = list(map(int, re.findall(r"Document (\d+):", example.context)))
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) % 2 == 0
    assert len(re.findall(r"Document \d+:\nAnn\nAnn is tall. She runs.", example.context)) == len(numbers) // 2
    assert [q.answers for q in example.questions] == [("Ann",), ("Ann",)]
    with pytest.raises(ValueError, match="expected a task whose data is on the hub, got pg_essays"):
        data.rows("hub", "pg_essays")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install datasets"):
        data.rows("hub", "gsm8k_test")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"expected a directory with squad_paragraph\.jsonl, got .*: pass data= \(--data\)"
    ):
        make("squad", str(tmp_path))
    with pytest.raises(ValueError, match=r"expected a directory with pg_essays\.jsonl, got None"):
        make("needle@900")


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "3",
        '{"question": ["Q"], "answers": ["A"]}',
        '{"context": "c", "question": "Q", "answers": "A"}',
        '{"context": "c", "question": ["Q", "R"], "answers": ["A"]}',
        '{"context": "c", "question": ["Q"], "answers": [["A", "B"]]}',
    ],
)
def test_a_line_of_another_layout_is_named(tmp_path: Path, line: str) -> None:
    good = json.dumps({"context": "c\u2028d", "question": ["Q"], "answers": ["A"]}, ensure_ascii=False)
    (tmp_path / "squad_paragraph.jsonl").write_text(f"{good}\n\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r'expected \{"context".* in line 3 of .*squad_paragraph\.jsonl, got '):
        make("squad", str(tmp_path))
    (tmp_path / "squad_paragraph.jsonl").write_text(f"{good}\n", encoding="utf-8")
    assert [e.context for e in make("squad", str(tmp_path))] == ["c\u2028d"]


def test_names_may_carry_a_length_and_groups_stand_for_their_tasks() -> None:
    assert expand(["kv@512", "ruler@4096", "kv@512"]) == ["kv@512", *(f"{name}@4096" for name in GROUPS["ruler"])]
    assert len(GROUPS["ruler"]) == 13
    assert all(name in TASKS for members in GROUPS.values() for name in members)
    with pytest.raises(ValueError, match="expected tasks or groups among"):
        expand(["kw"])
    with pytest.raises(ValueError, match="expected a length in tokens after @"):
        expand(["kv@4K"])


@given(st.integers(0, 30), st.integers(1, 9), st.integers(1, 400), st.integers(1, 100))
def test_fit_finds_the_largest_number_of_units(overhead: int, unit: int, length: int, start: int) -> None:
    def build(n: int) -> str:
        return "x" * (overhead + n * unit + n // 7)

    fitting = [n for n in range(1, length + 1) if len(build(n)) <= length]
    if fitting:
        assert fit(build, length, len, start=start) == fitting[-1]
    else:
        with pytest.raises(ValueError, match="expected a length of at least"):
            fit(build, length, len, start=start)


def test_lines_are_put_in_front_of_their_parts() -> None:
    assert insert(["a", "b", "c"], ["x", "y", "z"], [0, 2, 3], joint=" ") == "x a b y c z"
    assert insert(["a"], ["x", "y"], [1, 1], joint=" ") == "a x y"
