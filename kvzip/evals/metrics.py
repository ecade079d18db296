"""Metrics: how well a prediction matches a reference, from 0 to 1, as the authors' evaluation computes it.

Every metric is a function (prediction, reference, choices) -> float. `choices` are the options or functions among which
the reference is; most metrics ignore them. An empty prediction scores 0 in all metrics.

Source: KVzip, arXiv 2505.23416, and the rules of its evaluation (SCBench, arXiv 2412.10319; RULER, arXiv 2404.06654;
RepoQA, arXiv 2406.06025). Where we differ, the function says so.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

Metric = Callable[[str, str, Sequence[str]], float]

_NUMERALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_DIGITS = {word: str(n) for n, word in enumerate(_NUMERALS)}
_NUMERAL = re.compile(rf"\b(?:{'|'.join(_NUMERALS)})\b")
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
_FUNCTION = re.compile(
    r"^[ \t]*(?:async |export |public |private |static |pub )*(?:def|func|function|fn)\b", re.MULTILINE
)
GOLD = "gold"
"""The metric of questions whose reference answer is given to the model, see `asking.gold`: no text is compared."""
MATCHING_BLEU = 0.8
"""The least BLEU with which an answer counts as the function that was asked for."""


def evaluate(metric: str, prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Returns the best score of a prediction over the reference answers; a trailing "</s>" is not part of it.

    Raises: ValueError for an unknown metric.
    """
    if metric not in METRICS:
        raise ValueError(f"expected a metric of {sorted([GOLD, *METRICS])}, got {metric!r}")
    prediction = prediction.strip().removesuffix("</s>").strip()
    return max(METRICS[metric](prediction, answer, choices) for answer in answers) if prediction else 0.0


def check_metric(metric: str, answers: Sequence[str], choices: Sequence[str] = ()) -> None:
    """Checks that a metric can tell right from wrong on one question, before a model is asked it.

    Raises: ValueError if a reference answer scores below 1, or nonsense or nothing scores above 0.
    """
    if metric == GOLD:
        if not answers[0].strip():
            raise ValueError(
                "expected a reference answer with text in it, got an empty one: its likelihood is asked for"
            )
        return
    # ROUGE and BLEU come to within 1e-8 of 1 for the reference itself
    for prediction, expected in [(answers[0], 1.0), ("", 0.0), ("@@@ ###", 0.0)]:
        got = evaluate(metric, prediction, answers, choices)
        if abs(got - expected) > 1e-6:
            raise ValueError(
                f"expected metric {metric!r} to score {prediction!r} with {expected} where {list(answers)} are right, "
                f"got {got}: the metric is broken, or the reference has nothing in it that it compares"
            )


def normalize(text: str) -> str:
    """Returns the text in lower case without punctuation and articles, single spaces, zero to nine as digits."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return _NUMERAL.sub(lambda word: _DIGITS[word.group()], " ".join(_ARTICLE.sub(" ", bare).split()))


def include(prediction: str, reference: str, choices: Sequence[str] = ()) -> float:
    """1 if the normalized reference is a substring of the normalized prediction."""
    return float(bool(prediction) and normalize(reference) in normalize(prediction))


def first_line(prediction: str, reference: str, choices: Sequence[str] = ()) -> float:
    """`include` on the first line of the prediction."""
    return include(prediction.strip().split("\n")[0], reference)


def exact(prediction: str, reference: str, choices: Sequence[str] = ()) -> float:
    """1 if prediction and reference are the same, character by character."""
    return float(bool(prediction) and prediction == reference)


def fraction(prediction: str, reference: str, choices: Sequence[str] = ()) -> float:
    """The fraction of the reference's items, separated by ", ", that the prediction contains; nothing is normalized."""
    items = reference.split(", ")
    return sum(item in prediction for item in items) / len(items) if prediction else 0.0


def ruler(prediction: str, reference: str, choices: Sequence[str] = ()) -> float:
    """`fraction` in lower case. Source: RULER's match for all tasks but questions."""
    return fraction(prediction.lower(), reference.lower())


def part(prediction: str, reference: str, choices: Sequence[str] = ()) -> float:
    """1 if the prediction contains the reference, in lower case. Source: RULER's match for its question tasks."""
    return float(bool(prediction) and reference.lower() in prediction.lower())


def gsm(prediction: str, reference: str, choices: Sequence[str] = ()) -> float:
    """1 if what follows the last "the answer is " contains the number after "#### " of the reference.

    The whole prediction is searched where it does not say "the answer is "; nothing is normalized but the case.
    """
    number = reference.split("#### ")[-1].strip().lower()
    return float(bool(prediction) and number in prediction.lower().split("the answer is ")[-1])


def option(prediction: str, reference: str, choices: Sequence[str] = ()) -> float:
    """1 if prediction and an option line such as "(B) Paris" name the same option.

    They are compared by what their first parentheses hold if both have some, else by the option's text: `include`. The
    authors' code looks at parentheses only where both begin with them, so that "I say (B)" is wrong there.
    """
    if not prediction:
        return 0.0
    if "(" in prediction and "(" in reference:
        return float(_parenthesized(prediction) == _parenthesized(reference))
    return include(prediction, reference.split(")", 1)[1] if reference.startswith("(") else reference)


def token_f1(prediction: str, reference: str, choices: Sequence[str] = ()) -> float:
    """The harmonic mean of precision and recall of the normalized words, each as often as it occurs."""
    predicted, expected = normalize(prediction).split(), normalize(reference).split()
    shared = sum((Counter(predicted) & Counter(expected)).values())
    return 2 * shared / (len(predicted) + len(expected)) if shared else 0.0


def qa(prediction: str, reference: str, choices: Sequence[str] = ()) -> float:
    """The larger of `token_f1` and `include`."""
    return max(token_f1(prediction, reference), include(prediction, reference))


def rouge_l(prediction: str, reference: str, choices: Sequence[str] = ()) -> float:
    """ROUGE-L F of summaries: distinct words in the union of the longest common subsequences of sentence pairs.

    Sentences end at "."; words are split at spaces, with their case and other punctuation. Recall is over the distinct
    words of the reference, precision over those of the prediction.

    Source: Lin 2004; the counting is that of the Python package `rouge` 1.0.1, which the authors use.
    """
    predicted, expected = _sentences(prediction), _sentences(reference)
    common = {word for right in expected for left in predicted for word in _common_subsequence(right, left)}
    recall, precision = (len(common) / max(1, len(set().union(*words))) for words in (expected, predicted))
    return 2.0 * recall * precision / (recall + precision + 1e-8)


def repoqa(prediction: str, reference: str, choices: Sequence[str] = ()) -> float:
    """1 if the function in the prediction is closest to the reference among all choices, with a BLEU of at least 0.8.

    The function is what `extract_code` finds; the authors parse with tree-sitter. They leave empty predictions out of
    the mean, which raises it; here they score 0.
    """
    code = extract_code(prediction)
    own = bleu(code, reference)
    return float(own >= MATCHING_BLEU and all(bleu(code, other) < own for other in choices if other != reference))


def extract_code(text: str) -> str:
    """Returns the first function or fenced block of an answer, whichever comes first, up to the end of its fence."""
    fenced, function = _FENCE.search(text), _FUNCTION.search(text)
    if function and (fenced is None or function.start() < fenced.start()):
        return text[function.start() :].split("```")[0]
    return fenced.group(1) if fenced else text


def bleu(prediction: str, reference: str) -> float:
    """Returns BLEU-4 of words split at white space, counts of 0 smoothed by method 4 of Chen and Cherry (2014).

    It is `sentence_bleu` of nltk: the k-th n-gram order without a match counts as ln(length) / (5 * 2^k) matches. A
    prediction of one word scores 0 here, below 0.02 in nltk.
    """
    predicted, expected = prediction.split(), reference.split()
    if not predicted or not set(predicted) & set(expected):
        return 0.0
    misses, total = 0, 0.0
    for n in range(1, 5):
        grams, known = (_ngrams(words, n) for words in (predicted, expected))
        matches: float = sum((grams & known).values())
        if matches == 0 and len(predicted) > 1:
            misses += 1
            matches = math.log(len(predicted)) / (5 * 2**misses)
        if matches == 0:
            return 0.0
        total += math.log(matches / max(1, sum(grams.values())))
    brevity = min(0.0, 1 - len(expected) / len(predicted))
    return math.exp(brevity + total / 4)


METRICS: dict[str, Metric] = {
    metric.__name__: metric
    for metric in (include, first_line, exact, fraction, ruler, part, gsm, option, token_f1, qa, rouge_l, repoqa)
}


def _parenthesized(text: str) -> str:
    return text.split("(", 1)[1].split(")", 1)[0].strip()


def _ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _sentences(text: str) -> list[list[str]]:
    return [" ".join(sentence.split()).split(" ") for sentence in text.split(".") if sentence]


def _common_subsequence(left: Sequence[str], right: Sequence[str]) -> list[str]:
    """A longest common subsequence; among several, the one that drops words of the right from the end first."""
    lengths = [[0] * (len(right) + 1)]
    for a in left:
        row = [0]
        for j, b in enumerate(right):
            row.append(lengths[-1][j] + 1 if a == b else max(lengths[-1][j + 1], row[j]))
        lengths.append(row)
    common, i, j = [], len(left), len(right)
    while i and j:
        if left[i - 1] == right[j - 1]:
            common.append(left[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return common[::-1]
