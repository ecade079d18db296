"""Metrics against answers marked by hand, and against the packages that the authors' evaluation uses."""

import random

import pytest

from kvzip.evals.metrics import METRICS, bleu, check_metric, evaluate, extract_code, normalize

ADD = "def add(a, b):\n    total = a + b\n    return total"
SUB = "def sub(a, b):\n    rest = a - b\n    return rest"
MAX = "def top(values):\n    best = values[0]\n    for v in values:\n        best = max(best, v)\n    return best"

CASES = [
    # metric, prediction, reference, score
    ("include", "It was the Broncos.", "the Broncos", 1),
    ("include", "broncos", "The  Broncos!", 1),
    ("include", "The Bron cos", "Broncos", 0),
    ("include", "There were four of them", "4", 1),
    ("include", "There were fourteen of them", "4", 0),
    ("include", "20\u201318", "2018", 0),  # the dash is no ASCII punctuation, so it stays
    ("include", "20-18", "2018", 1),
    (
        "include",
        "\u201cthe\u2013fox\u201d",
        "\u201c \u2013fox\u201d",
        1,
    ),  # words end where letters do, as for a regular expression
    ("include", "\u201cone\u201d", "\u201c1\u201d", 1),
    ("include", "", "anything", 0),
    ("include", "four</s>", "4", 1),
    ("first_line", "Paris\nLondon", "Paris", 1),
    ("first_line", "Paris\nLondon", "London", 0),
    ("exact", "42", "42", 1),
    ("exact", "42.", "42", 0),
    ("exact", "Forty", "forty", 0),
    ("fraction", "ABC and DEF", "ABC, DEF, GHI, JKL", 0.5),
    ("fraction", "abc", "ABC", 0),
    ("ruler", "abc and Def", "ABC, DEF, GHI, JKL", 0.5),
    ("part", "It is in Paris, France.", "paris, france", 1),
    ("part", "It is in Paris", "Paris, France", 0),
    ("gsm", "First 3 + 4 = 7. The answer is 7.", "3 + 4 = 7\n#### 7", 1),
    ("gsm", "The answer is 7. No, the answer is 8.", "#### 7", 0),
    ("gsm", "The answer is 7. No, the answer is 8.", "#### 8", 1),
    ("gsm", "There are 7 of them. The answer is 9.", "#### 7", 0),
    ("gsm", "The answer is $1,200", "#### 1200", 0),  # nothing is normalized
    ("gsm", "70", "#### 7", 1),  # a substring, and no "the answer is"
    ("option", "(B) or so", "(B) 06/02/2021", 1),
    ("option", "I say (C).", "(B) 06/02/2021", 0),
    ("option", "06/02/2021 it is", "(B) 06/02/2021", 1),
    ("option", "B", "(B) 06/02/2021", 0),
    ("option", "I think it is (B).", "(B) 06/02/2021", 1),
    ("option", "the CAPITAL, Paris!", "(B) Capital Paris", 1),  # the text is normalized
    ("option", "f(x) is it", "(B) f(x)", 0),  # the parentheses are compared
    ("option", "yes", "Yes", 1),
    ("option", "( B )", "(B) 06/02/2021", 1),
    ("token_f1", "the red fox ran", "a red fox", 2 * (2 / 3) * 1 / (2 / 3 + 1)),
    ("token_f1", "red red fox", "red fox fox", 2 / 3),
    ("token_f1", "blue", "red", 0),
    ("qa", "The red fox", "fox", 1),
    ("qa", "the red fox ran", "a red fox sat", 2 / 3),
    ("rouge_l", "a b c", "a b c", 1),
    ("rouge_l", "a b", "a c b d", 2 * 1 * 0.5 / 1.5),
    # each sentence of the prediction shares one word with the reference: 2 of its 3 words, 2 of 2
    ("rouge_l", "x y. z", "z x", 2 * (2 / 2) * (2 / 3) / (5 / 3)),
    ("repoqa", f"Here it is:\n```python\n{ADD}\n```\nDone.", ADD, 1),
    ("repoqa", ADD.replace("total", "sum"), ADD, 0),  # BLEU below 0.8
    ("repoqa", SUB, ADD, 0),
    ("repoqa", "", ADD, 0),
]


@pytest.mark.parametrize(("metric", "prediction", "reference", "score"), CASES)
def test_answers_marked_by_hand(metric: str, prediction: str, reference: str, score: float) -> None:
    assert evaluate(metric, prediction, [reference], [ADD, SUB, MAX]) == pytest.approx(score, abs=1e-7)


def test_the_best_of_several_references_counts() -> None:
    assert evaluate("include", "It was 4", ["five", "four"]) == 1
    assert evaluate("include", "It was 3", ["five", "four"]) == 0


def test_a_function_close_to_another_is_not_the_one_asked_for() -> None:
    long = "\n".join(f"    step_{i} = work(step_{i - 1})" for i in range(1, 20))
    one, two = f"def one(step_0):\n{long}\n    return 1", f"def two(step_0):\n{long}\n    return 2"
    assert bleu(two, one) > 0.8
    assert evaluate("repoqa", two, [one], [one, two]) == 0
    assert evaluate("repoqa", two, [one], [one]) == 1


def test_code_is_found_in_an_answer() -> None:
    assert extract_code("Sure:\n```python\nx = 1\n```\nand\n```\ny\n```") == "x = 1\n"
    assert extract_code("Sure:\ndef f():\n    pass\n```\nBye") == "def f():\n    pass\n"
    assert extract_code("Sure:\n```\nunfinished") == "unfinished"
    assert extract_code("no code") == "no code"


def test_normalization_drops_case_punctuation_articles_and_spells_digits() -> None:
    assert normalize("The  Nine, o'clock a-b An apple!") == "9 oclock ab apple"


def test_rouge_l_equals_the_package_of_the_authors() -> None:
    # rouge 1.0.1: Rouge(metrics=["rouge-l"]).get_scores(prediction, reference)[0]["rouge-l"]["f"]
    got = evaluate("rouge_l", "The cat sat. It was red", ["The cat was red. It sat on it."])
    assert got == pytest.approx(0.8571428522448981, abs=1e-12)


def test_bleu_equals_the_package_of_the_authors() -> None:
    # nltk 3.10.4: sentence_bleu([reference], prediction, smoothing_function=SmoothingFunction().method4)
    right = "def add ( a , b ) : return a + b"
    assert bleu("def add ( a , c ) : return a - c", right) == pytest.approx(0.53107253497887, abs=1e-12)
    assert bleu("a x c", "a b c d e f") == pytest.approx(0.03171655779267419, abs=1e-12)
    assert bleu("nothing shared", "a b c d") == 0


def test_packages_of_the_authors_agree_on_random_texts() -> None:
    rouge = pytest.importorskip("rouge")
    score = pytest.importorskip("nltk.translate.bleu_score")
    rng, words = random.Random(0), ["the", "cat", "dog", "ran", "on", "a", "mat", "x", "y", "."]
    smooth = score.SmoothingFunction().method4
    for _ in range(300):
        left, right = (" ".join(rng.choices(words, k=rng.randint(2, 25))).replace(" .", ".") for _ in range(2))
        if left.replace(".", "").strip() and right.replace(".", "").strip():
            expected = rouge.Rouge(metrics=["rouge-l"]).get_scores(left, right)[0]["rouge-l"]["f"]
            assert METRICS["rouge_l"](left, right, ()) == pytest.approx(expected, abs=1e-12)
            if len(left.split()) > 1:
                expected = score.sentence_bleu([right.split()], left.split(), smoothing_function=smooth)
                assert bleu(left, right) == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_every_metric_passes_its_own_check(metric: str) -> None:
    reference = {"repoqa": ADD, "gsm": "#### 7"}.get(metric, "alpha, beta")
    check_metric(metric, [reference], [ADD, SUB])


@pytest.mark.parametrize("broken", [lambda p, r, c: 1.0, lambda p, r, c: 0.0, lambda p, r, c: float(not p)])
def test_a_broken_metric_is_noticed(monkeypatch: pytest.MonkeyPatch, broken: object) -> None:
    monkeypatch.setitem(METRICS, "include", broken)
    with pytest.raises(ValueError, match="expected metric 'include' to score"):
        check_metric("include", ["fox"])


def test_a_reference_with_nothing_to_compare_is_noticed() -> None:
    with pytest.raises(ValueError, match="the reference has nothing in it that it compares"):
        check_metric("include", ["The!"])


def test_an_unknown_metric_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"expected a metric of \['exact', .*\], got 'bertscore'"):
        evaluate("bertscore", "a", ["a"])
