"""What the published evaluation asks of each model, see `evaluation.py`: its tasks, methods and ratios."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks import studies
from kvzip.evals.methods import METHODS
from kvzip.evals.plan import FULL

RATIOS = (0.1, 0.2, 0.3, 0.5, 0.7)


@dataclass(frozen=True)
class Asked:
    """A task and how it is asked: the form, contexts, questions about each, tokens of an answer."""

    task: str
    form: str
    count: int
    questions: int
    max_tokens: int


@dataclass(frozen=True)
class Plan:
    """What is asked of one model."""

    methods: tuple[str, ...]
    ratios: tuple[float, ...]
    tasks: tuple[Asked, ...]


def tells_apart(task: str) -> bool:
    """Whether a task tells methods apart: with random pairs `many_shot` scores as with the full cache."""
    return not task.startswith("many_shot")


FEW = (FULL, "kvzip", "kvzip-chunk", "snapkv", "random")
TOPIC = Asked("topic", "chat", 20, 5, 32)
NEEDLES = Asked("needles", "cloze", 4, 11, 32)
UUIDS = (  # 128 tokens, as a Qwen repeats the UUID that it is asked for first
    Asked("kv@4096", "chat", 10, 10, 128),
    Asked("ruler_niah_multikey_3@4096", "chat", 10, 10, 128),
)
TEXTS = (Asked("ruler_qa_1@4096", "chat", 10, 10, 32), Asked("squad@2000", "chat", 10, 12, 48))
BASE_NEEDLES = Asked("needles@2000", "cloze", 6, 11, 32)
BASE_KEYS = Asked("ruler_niah_multikey_1@2000", "cloze", 12, 20, 64)
BASE_KV = Asked("kv@2000", "cloze", 12, 20, 64)
BASE_SQUAD = Asked("squad@1000", "cloze", 10, 12, 48)
BASE = (Asked("needles@700", "cloze", 6, 11, 32), BASE_NEEDLES, BASE_KEYS, BASE_SQUAD)


def instructed(shots: int, lookups: int, questions: int) -> tuple[Asked, ...]:
    """The tasks of a model with a chat template; the longest contexts, which take longest, come first."""
    return (
        TOPIC,
        Asked("many_shot@9000", "chat", shots, 20, 64),
        NEEDLES,
        *UUIDS,
        Asked("ruler_niah_multikey_2@4096", "chat", lookups, questions, 64),
        Asked("multihop@4096", "chat", lookups, questions, 64),
        *TEXTS,
    )


PLANS = {
    "qwen2.5-coder-1.5b-instruct": Plan((FULL, *METHODS), RATIOS, instructed(6, 10, 10)),
    "qwen2.5-coder-0.5b-instruct": Plan(FEW, (0.3,), instructed(5, 5, 20)),
    "gemma-3-270m": Plan(
        FEW,
        (0.3,),
        (
            Asked("topic", "cloze", 20, 5, 32),
            Asked("many_shot@9000", "cloze", 6, 20, 32),
            BASE_KV,
            Asked("multihop@2000", "cloze", 12, 20, 64),
            *BASE,
        ),
    ),
    "smollm2-135m-instruct": Plan(
        FEW,
        (0.3,),
        (
            Asked("topic@5500", "cloze", 20, 5, 32),
            Asked("many_shot@5500", "cloze", 6, 20, 32),
            Asked("kv@1000", "cloze", 12, 20, 64),
            Asked("multihop@1000", "cloze", 12, 20, 64),
            *BASE,
        ),
    ),
}
"""By the name of a model's directory."""
CHUNKS = ("chunk-500", "chunk-125", "context-125")
OTHERS = (FULL, "kvzip-chunk", "kvzip+", "snapkv", "adakv", "expected-attention", "random", *CHUNKS)
STUDIES = {
    "qwen2.5-coder-1.5b-instruct": (
        Plan(tuple(studies.STUDY), (0.1, 0.2, 0.3, 0.5), UUIDS),
        Plan(CHUNKS, (0.1, 0.2, 0.3, 0.5), (NEEDLES, *TEXTS)),
    ),
    "gemma-3-270m": (
        Plan((*OTHERS, "lookups"), (0.3, 0.5, 0.7, 0.9), (BASE_KV,)),
        Plan(OTHERS, (0.3, 0.5, 0.7, 0.9), (BASE_NEEDLES, BASE_SQUAD, BASE_KEYS)),
    ),
}
"""What is asked in addition, to find out why something is lost."""


def scoring_plans(form: str, tokens: int, count: int, questions: int = 100, methods: Sequence[str] = ()) -> list[Plan]:
    """Likelihoods of all methods at nine ratios and of streams at four, and answers of both at two."""
    gold, short = (Asked(f"{task}@{tokens}", form, count, questions, 16) for task in ("gold", "short"))
    methods, streams = tuple(methods or studies.SCORING), tuple(studies.STREAMS)
    tenths = tuple(n / 10 for n in range(1, 10))
    return [
        Plan((FULL, *methods), tenths, (gold,)),
        Plan(streams, (0.1, 0.2, 0.3, 0.5), (gold,)),
        Plan((FULL, *methods, *streams), (0.1, 0.3), (short,)),
    ]


def bits_plans(form: str, tokens: int, count: int) -> list[Plan]:
    """Likelihoods and answers of pairs in 16, 8 and 4 bits, and of whole heads."""
    asked = tuple(Asked(f"{task}@{tokens}", form, count, 50, 16) for task in ("gold", "short"))
    ratios = (1.0, 0.5, 0.3)
    bits = Plan((FULL, *studies.BITS), ratios, asked)
    return [bits, Plan(("16 bits", *studies.HEADS), (0.6,), asked)]


LONG = ("context", "chunk", "chunk:512", "chunk:8192")
SCORINGS = {
    **{
        f"qwen2.5-coder-{size}-instruct": (
            *scoring_plans("chat", 5_000, count),
            *scoring_plans("chat", 20_000, 1, 200, LONG),
        )
        for size, count in (("1.5b", 2), ("0.5b", 1))
    },
    "gemma-3-270m": scoring_plans("cloze", 5_000, 2),
    "smollm2-135m-instruct": scoring_plans("cloze", 5_000, 3),
}
BITS = {
    **{f"qwen2.5-coder-{size}-instruct": bits_plans("chat", 4_000, 3) for size in ("1.5b", "0.5b")},
    "gemma-3-270m": bits_plans("cloze", 2_000, 4),
    "smollm2-135m-instruct": bits_plans("cloze", 1_500, 4),
}
REFITS = {
    name: (Plan((FULL,), (1.0,), plan.tasks), Plan(tuple(studies.REFITS), ratios, plan.tasks))
    for name, plan in PLANS.items()
    for ratios in [(0.3, 0.5) if name.startswith("gemma") else (0.1, 0.2, 0.3, 0.5)]
    if not name.startswith("smollm")
}
"""The published tasks, by pairs that are fitted and by as many bytes of pairs that are not."""
FEWER = {
    name: (Plan((FULL,), (1.0,), tasks), Plan(tuple(studies.FEWER), (1.0, 0.3), tasks))
    for name, plan in PLANS.items()
    if name.startswith("qwen")
    for tasks in [tuple(task for task in plan.tasks if tells_apart(task.task))]
}
"""The published tasks in few bits, all pairs and 0.3 of them."""
LONG_TEXTS = (Asked("gold@20000", "chat", 1, 200, 16),)
MANY = 20  # contexts of text tasks


def tasks_by_bytes(name: str) -> tuple[Asked, ...]:
    """The published tasks without many_shot, more contexts of texts, and RULER's aggregation."""
    tasks = [task for task in PLANS[name].tasks if tells_apart(task.task)]
    tasks = [task for task in tasks if not task.task.startswith("squad")]
    tasks = [replace(task, count=MANY) if task.task.startswith("ruler_qa") else task for task in tasks]
    form, length = ("chat", 4096) if name.startswith("qwen") else ("cloze", 2000)
    more = [Asked(f"ruler_{task}@{length}", form, MANY, 1, 64) for task in ("vt", "cwe", "fwe")]
    more.append(Asked("squad@1000", form, MANY, 12, 48))
    if name.startswith("gemma"):  # its windows alone are 0.6 of the bytes at 1,700 tokens, and more at fewer
        tasks = [task for task in tasks if task.task.partition("@")[2] not in ("700", "1000")]
        more.pop()  # and more than all of the bytes of a short paragraph
    return (*(LONG_TEXTS if name == "qwen2.5-coder-1.5b-instruct" else ()), *tasks, *more)


def plans_by_bytes(name: str) -> tuple[Plan, ...]:
    """Methods at parts of the full cache's bytes; beyond a third all pairs fit in 4 bits.

    Windows and their bytes are always kept: more than half of Gemma's at these lengths.
    """
    tasks = tasks_by_bytes(name)
    if name == "qwen2.5-coder-1.5b-instruct":
        small, more, parts = (0.05, 0.1, 0.2), (0.3, 0.5, 0.7), (0.1, 0.3, 0.5)
    elif name.startswith("gemma"):
        small, more, parts = (0.6,), (0.7,), (0.7,)
    else:
        small, more, parts = (0.1,), (0.3,), (0.3,)
    return (
        Plan((FULL,), (1.0,), tasks),
        Plan(tuple(studies.OWN), small + more, tasks),
        Plan((studies.FEW_BITS[8].name,), small + more[:1], tasks),
        Plan(tuple(studies.FEW_BITS[bits].name for bits in (4, 2)), small, tasks),
        Plan(tuple(studies.OTHERS), parts, tasks),
    )


BYTES = {name: plans_by_bytes(name) for name in PLANS}
"""The published tasks by bytes of the cache."""
ALL = {
    "eval": {name: (plan,) for name, plan in PLANS.items()},
    "study": STUDIES,
    "scoring": SCORINGS,
    "bits": BITS,
    "refit": REFITS,
    "fewer": FEWER,
    "bytes": BYTES,
}
"""The plans of each kind of evaluation, by model."""
KNOWN = {
    "eval": METHODS,
    "study": METHODS | studies.STUDY,
    "scoring": studies.SCORING | studies.STREAMS,
    "bits": studies.BITS | studies.HEADS,
    "refit": studies.REFITS,
    "fewer": studies.FEWER,
    "bytes": studies.BYTES,
}
"""The methods of each kind, by name."""
FILES = {
    "eval": "eval-{}.jsonl.gz",
    "study": "study-{}.jsonl.gz",
    "scoring": "scoring-quality.jsonl.gz",
    "bits": "quality-bits.jsonl.gz",
    "refit": "refit-{}.jsonl.gz",
    "fewer": "fewer-{}.jsonl.gz",
    "bytes": "bytes-{}.jsonl.gz",
}
"""The results of each kind; {} is the name of the model."""
