"""Tasks whose contexts and questions are data: read from JSONL files, or from the Hugging Face hub.

A line of a file is `{"context": str, "question": [str, ...], "answers": [str, ...], ...}`, one answer to a question.
`hotpotqa` may also have `"documents"`, the parts of its context; mixed SCBench sets have `"task"`, one for a question.
"""

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..metrics import GOLD
from .base import Example, Question, Request, Task, draws

Row = dict[str, Any]

_LAYOUT = '{"context": "...", "question": ["..."], "answers": ["..."]}'

GSM_INSTRUCTION = "Given the context, answer to the following reasoning question."
GSM_QUERY = (
    "Reason and answer the question. You must say the answer in the last sentence beginning with 'The answer is'. Q: "
)
GSM_TOKENS = 72  # the authors leave out shorter contexts
PARAGRAPHS = {  # files, of which the first that is there is read, the words of a question, the instruction
    "squad": (("squad_paragraph",), "Q: {}", None),
    "gold": (("squad_article", "squad_paragraph"), "{} Answer with a few words of the text.", ""),
}
ORDINALS = ("first", "second", "third", "fourth", "fifth")
TOPIC = "USER: I would like to discuss the topic of"
OPTION = re.compile(r"^[ \t]*\(([A-Z])\).*$", re.MULTILINE)
SCBENCH_HUB = "Jang-Hyun/SCBench-preprocessed"
SQUAD_CONTEXTS = 101
REPORTS = "leval_gov_report_summ"


def rows(data: str | None, *names: str) -> list[Row]:
    """Returns the rows of the first of the named files that the directory has, or of the first name on the hub.

    Raises: ValueError without data or such a file, or for a line of another layout; ImportError for the hub without
    the package datasets.
    """
    if data == "hub":
        return _hub_rows(names[0])
    paths = [Path(data or "") / f"{name}.jsonl" for name in names]
    found = next((path for path in paths if data and path.is_file()), None)
    if found is None:
        wanted = " or ".join(path.name for path in paths)
        raise ValueError(
            f"expected a directory with {wanted}, got {data}: pass data= (--data), a directory of JSONL files with "
            f'{_LAYOUT} in a line, or "hub"'
        )
    # not splitlines, which also cuts at characters that JSON leaves as they are
    lines = enumerate(found.read_text(encoding="utf-8").split("\n"), start=1)
    return [_row(line, f"line {number} of {found}") for number, line in lines if line.strip()]


def paragraphs(name: str, metric: str, max_tokens: int) -> Callable[[Request], Iterator[Example]]:
    """Returns a task of SQuAD paragraphs, joined while they fit in the length; a length of 0 takes one a context."""
    files, query, instruction = PARAGRAPHS[name]

    def make(request: Request) -> Iterator[Example]:
        found = [row for row in rows(request.data, *files) if row["context"].strip()]
        for n, group in enumerate(_joined(request, found)):
            asked = [
                Question(query.format(q), f"Question: {q}\nAnswer:", (a,), metric, max_tokens)
                for row in group
                for q, a in zip(row["question"], row["answers"], strict=True)
            ]
            context = "\n\n".join(row["context"] for row in group)
            yield Example(context, _some(request, asked, draws(request, name, n)), instruction)

    return make


def gsm8k(request: Request) -> Iterator[Example]:
    """GSM8K: the sentences of a problem but the last are the context, the last one is the question."""
    found = (row for row in rows(request.data, "gsm8k_test") if request.count(row["context"]) >= GSM_TOKENS)
    for _, row in zip(range(request.examples), found, strict=False):
        text = GSM_QUERY + row["question"][0]
        cloze = f"Question: {row['question'][0]}\nReasoning, and a last sentence that begins with 'The answer is':"
        question = Question(text, cloze, (row["answers"][0],), "gsm", 512, cloze_stop=("\n\n",))
        yield Example(row["context"], (question,), instruction=GSM_INSTRUCTION)


def whole_rows(name: str, file: str, ask: Callable[[str, str], Question]) -> Callable[[Request], Iterator[Example]]:
    """Returns a task whose contexts are the rows of a file that fit in the length, unchanged."""

    def make(request: Request) -> Iterator[Example]:
        for n, row in enumerate(_short(request, rows(request.data, file))[: request.examples]):
            asked = [ask(q, a) for q, a in zip(row["question"], row["answers"], strict=True)]
            yield Example(row["context"], _some(request, asked, draws(request, name, n)))

    return make


def summary(query: str, answer: str) -> Question:
    """Returns the question for a summary of the context."""
    return Question(f"Q: {query}", "Summary:", (answer,), "rouge_l", 256, cloze_stop=("\n\n",))


def _solved(query: str, answer: str) -> Question:
    return Question(f"Q: {query}", f"Q: {query}\nA:", (option_line(query, answer),), "option")


def _story(query: str, answer: str) -> Question:
    query = re.sub(r"\n[ \t]+", "\n", query)
    return Question(f"Q: {query}", f"Question: {query}\nAnswer:", (answer,), "option")


def topic(request: Request) -> Iterator[Example]:
    """Topic retrieval of L-Eval: the first topics of a long conversation, cut after whole topics to the length.

    L-Eval asks for the first three; the fourth and the fifth are asked for in the same words, and named as they are.
    """
    found = rows(request.data, "leval_topic_retrieval_longchat")
    for row in found[: request.examples]:
        topics = [TOPIC + part for part in row["context"].split(TOPIC)[1:]]
        counts = [request.count("".join(topics[: n + 1])) for n in range(len(topics))]
        held = sum(count <= request.length for count in counts)
        if not held:
            raise ValueError(f"expected a length of at least {counts[0]} tokens for this task, got {request.length}")
        asked = []
        for n, (ordinal, turn) in enumerate(zip(ORDINALS, topics[:held], strict=False)):
            if n < len(row["question"]):
                question, answer = row["question"][n], row["answers"][n]
            else:
                question = row["question"][0].replace(ORDINALS[0], ordinal)
                name = turn.removeprefix(TOPIC).split("\n")[0].strip().rstrip(".")
                answer = name[:1].upper() + name[1:]
            lead = f"USER: {question.split('?')[0]}? \n ASSISTANT: The {ordinal} topic we discussed was"
            asked.append(Question(f"Q: {question}", lead, (answer,), "include", cloze_stop=("\n", "USER:")))
        yield Example("".join(topics[:held]).strip(), tuple(asked[: request.questions]))


def scbench(name: str, metric: str, max_tokens: int) -> Callable[[Request], Iterator[Example]]:
    """Returns a task of the preprocessed SCBench data; `task` lists of the mixed ones choose each question's metric."""

    def ask(kind: str, query: str, answer: str, functions: list[str]) -> Question:
        how = next((how for word, how in _MIXED.items() if word in kind), "") if metric == "mixed" else metric
        if not how:
            raise ValueError(f"expected a task of {', '.join(_MIXED)} in each question of a mixed set, got {kind!r}")
        return Question(
            f"Q: {query}",
            f"Question: {query}\nAnswer:",
            (option_line(query, answer) if how == "option" else answer,),
            how,
            max_tokens,
            choices=tuple(functions) if how == "repoqa" else (),
            facts={"subtask": kind} if metric == "mixed" else {},
        )

    def make(request: Request) -> Iterator[Example]:
        for row in _short(request, rows(request.data, name))[: request.examples]:
            kinds, answers = row.get("task") or [name] * len(row["question"]), row["answers"]
            asked = [ask(*own, answers) for own in zip(kinds, row["question"], answers, strict=True)]
            yield Example(row["context"], tuple(asked[: request.questions]))

    return make


def option_line(question: str, answer: str) -> str:
    """Returns the line of the question's options that an answer such as "(B)" names, or the answer itself."""
    letter = answer.strip().strip("()")
    lines = [line.group(0).strip() for line in OPTION.finditer(question) if line.group(1) == letter]
    return lines[0] if lines else answer


def _short(request: Request, found: Sequence[Row]) -> list[Row]:
    counts = [request.count(row["context"]) for row in found]
    if not any(count <= request.length for count in counts):
        raise ValueError(f"expected a length of at least {min(counts)} tokens for this task, got {request.length}")
    return [row for row, count in zip(found, counts, strict=True) if count <= request.length]


def _joined(request: Request, found: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows in order, joined while they fit in the length; a length of 0 keeps each by itself."""
    group, used, made = [], 0, 0
    for row in found:
        tokens = request.count(row["context"] + "\n\n")
        if group and used + tokens > request.length:
            yield group
            made, group, used = made + 1, [], 0
        if made == request.examples:
            return
        group, used = [*group, row], used + tokens
    yield group


def _some(request: Request, asked: list[Question], rng: random.Random) -> tuple[Question, ...]:
    """At most so many of the questions, drawn, in their order."""
    picks = sorted(rng.sample(range(len(asked)), min(request.questions, len(asked))))
    return tuple(asked[i] for i in picks)


def _row(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        row = None
    fields = row if isinstance(row, dict) else {}
    asked, answers = (fields.get(key, []) for key in ("question", "answers"))
    lists = isinstance(asked, list) and isinstance(answers, list) and len(asked) == len(answers)
    if not lists or not all(isinstance(text, str) for text in (fields.get("context"), *asked, *answers)):
        raise ValueError(f"expected {_LAYOUT} with as many answers as questions in {where}, got {line[:80]!r}")
    return fields


def _hub_rows(name: str) -> list[Row]:
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "expected the package datasets to read data from the hub, got none: pip install datasets "
            "(in a checkout pip install -e '.[eval]'), or pass a directory of JSONL files"
        ) from error
    if name == "squad_paragraph":
        groups: dict[str, Row] = {}
        for row in load_dataset("rajpurkar/squad", split="train"):
            if row["context"] not in groups and len(groups) == SQUAD_CONTEXTS:
                break
            group = groups.setdefault(row["context"], {"context": row["context"], "question": [], "answers": []})
            group["question"].append(row["question"])
            group["answers"].append(row["answers"]["text"][0])
        return list(groups.values())
    if name == "gsm8k_test":
        return [_gsm_row(row) for row in load_dataset("openai/gsm8k", "main", split="test")]
    if name == "hotpotqa":
        return [_hotpot_row(row) for row in load_dataset("hotpotqa/hotpot_qa", "distractor", split="validation")]
    if name.startswith("scbench_"):
        return [_scbench_row(row) for row in load_dataset(SCBENCH_HUB, data_files=f"{name}.parquet", split="train")]
    raise ValueError(f"expected a task whose data is on the hub, got {name}: pass data=, a directory with {name}.jsonl")


def _gsm_row(row: Row) -> Row:
    *context, question = row["question"].split(". ")
    return {"context": ". ".join(context).strip() + ".", "question": [question.strip()], "answers": [row["answer"]]}


def _hotpot_row(row: Row) -> Row:
    paragraphs = zip(row["context"]["title"], row["context"]["sentences"], strict=True)
    documents = [f"{title}\n{''.join(sentences)}" for title, sentences in paragraphs]
    asked = {"question": [row["question"]], "answers": [row["answer"]]}
    return {"context": "\n\n".join(documents), "documents": documents, **asked}


def _scbench_row(row: Row) -> Row:
    answers = [", ".join(map(str, a)) if isinstance(a, list) else str(a) for a in row["ground_truth"]]
    return {**row, "context": row["prompts"][0], "question": list(row["prompts"][1:]), "answers": answers}


_MIXED = {"repoqa": "repoqa", "kv": "include", "summary": "rouge_l", "passkey": "include", "needle": "include"}
"""Metrics of the parts of mixed sets; SCBench calls a needle a passkey."""

SCBENCH = {  # metric, tokens of an answer
    "kv": ("include", 96),
    "prefix_suffix": ("include", 96),
    "vt": ("fraction", 96),
    "mf": ("exact", 32),
    "many_shot": ("option", 96),
    "summary": ("rouge_l", 256),
    "qa_eng": ("qa", 96),
    "choice_eng": ("first_line", 96),
    "repoqa": ("repoqa", 512),
    "summary_with_needles": ("mixed", 256),
    "repoqa_and_kv": ("mixed", 512),
}

SIZES = {"": "its own data", "_tiny": "8K tokens", "_short": "20K tokens", "_mid": "60K tokens"}
"""The authors' shortened sets."""

TASKS = (
    Task("squad", paragraphs("squad", "include", 256), 0, "SQuAD paragraphs, one a context, or joined to the length"),
    Task("gold", paragraphs("gold", GOLD, 16), 0, "likelihood of the reference answers to questions about SQuAD"),
    Task("short", paragraphs("gold", "part", 16), 0, "the questions of gold, answered in at most 16 tokens"),
    Task("gsm8k", gsm8k, 100_000, "GSM8K, all but the last sentence as context"),
    Task(
        "many_shot",
        whole_rows("many_shot", "bbh_manyshot", _solved),
        100_000,
        "BIG-Bench-Hard with 20 or 100 solved examples (ICL.ManyShot)",
    ),
    Task(
        "quality", whole_rows("quality", "leval_quality", _story), 100_000, "QuALITY, multiple choice (En.MultiChoice)"
    ),
    Task("summary", whole_rows("summary", REPORTS, summary), 100_000, "government reports, ROUGE-L (En.Summary)"),
    Task("topic", topic, 100_000, "first topics of a long conversation (L-Eval)"),
    *(
        Task(f"scbench_{name}{size}", scbench(f"scbench_{name}{size}", *how), 125_000, f"SCBench {name}, {about}")
        for size, about in SIZES.items()
        for name, how in SCBENCH.items()
        if not size or name not in ("vt", "qa_eng", "choice_eng")
    ),
)
