"""Questions asked of a cache: answers that are generated, and reference answers that the model is given."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from .. import prompts
from ..cache import DenseCache, RaggedCache
from ..cache.rows import kept_mask
from ..decoding import Decoder
from ..generation import Answer, generate, query_ids
from ..inputs import check_length, context_ids, tokenizer_of
from ..models import Model, logits
from ..ops import select
from ..prefilling import prefill
from .tasks import Example, Question

INSTRUCTION = "Given the context, answer to the following question or request without explanation."


@dataclass(frozen=True)
class Gold:
    """How likely a reference answer is: the log-probability of its tokens, each given those before it, in nats.

    `exact` says whether each of them is the most likely one, so that greedy decoding gives the answer.
    """

    loglik: float
    exact: bool


def prefill_example(model: Model, example: Example, *, form: str) -> DenseCache:
    """Returns the cache of a context: in a user turn that its instruction opens, or as plain text after it."""
    if form == "chat":
        instruction = INSTRUCTION if example.instruction is None else example.instruction
        return prefill(model, example.context, instruction=instruction or None)
    lead = example.instruction + prompts.QUERY_SEPARATOR if example.instruction else ""
    return prefill(model, lead + example.context, template=False)


def ask(model: Model, cache: DenseCache | RaggedCache, questions: Sequence[Question], *, form: str) -> list[Answer]:
    """Returns the greedy answers to questions with the same max_tokens and stop texts, as one batch.

    A continuation that begins with its stop text, as some models begin a new line, is continued once after it.
    """
    limit, stop = questions[0].max_tokens, questions[0].cloze_stop
    texts = _texts(questions, form)
    if form == "chat":
        return generate(model, cache, texts, max_tokens=limit)
    answers = generate(model, cache, texts, max_tokens=limit, stop=stop, template=False)
    begun = [n for n, answer in enumerate(answers) if answer.token_ids and not answer.text.strip()]
    longer = [texts[n] + prompts.decode(tokenizer_of(model), answers[n].token_ids) for n in begun]
    again = dict(zip(begun, generate(model, cache, longer, max_tokens=limit, stop=stop, template=False), strict=True))
    return [again.get(n, answer) for n, answer in enumerate(answers)]


def gold(model: Model, cache: DenseCache | RaggedCache, questions: Sequence[Question], *, form: str) -> list[Gold]:
    """Returns how likely the first reference answer to each question is, all in one pass."""
    found = []
    for target, scores in gold_logits(model, cache, questions, form=form):
        taken = scores.log_softmax(-1).gather(1, target[:, None]).double().sum()
        found.append(Gold(float(taken), bool((scores.argmax(-1) == target).all())))
    return found


def gold_logits(
    model: Model, cache: DenseCache | RaggedCache, questions: Sequence[Question], *, form: str
) -> list[tuple[Int64[Tensor, " T"], Float[Tensor, "T V"]]]:
    """Returns the ids of each question's first reference answer, and float32 logits at the position of each id."""
    asked = query_ids(model, cache, _texts(questions, form), template=form == "chat")
    space = "" if form == "chat" else " "
    wanted = [prompts.encode_text(tokenizer_of(model), space + question.answers[0]) for question in questions]
    targets = [torch.tensor(ids, device=model.device) for ids in wanted]
    return list(zip(targets, answer_logits(model, cache, asked, wanted), strict=True))


def answer_logits(
    model: Model, cache: DenseCache | RaggedCache, asked: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> list[Float[Tensor, "T V"]]:
    """Returns float32 logits for each question's answer, at the position of each of its T tokens.

    Question and answer are read after the cache and its tail; the cache is not changed.

    Raises: ValueError for a cache of another model, ids beyond the vocabulary, or more positions than the model was
        made for.
    """
    rows = [[*question, *answer] for question, answer in zip(asked, answers, strict=True)]
    longest, used = max(map(len, rows)), len(cache.token_ids)
    check_length(model, used + longest, f"a cache of {used} tokens, and {longest} of a question and its answer")
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    context_ids(model, padded.flatten())  # raises for ids beyond the vocabulary, which would end a process with a GPU
    hidden = Decoder(model, cache, batch=len(rows), tail=longest).hidden(padded.to(model.device))
    places = [slice(len(question) - 1, len(row) - 1) for question, row in zip(asked, rows, strict=True)]
    with torch.no_grad():
        return [logits(model, own[place]).float() for own, place in zip(hidden, places, strict=True)]


def agreement(cache: DenseCache | RaggedCache, values: Float[Tensor, "L H E"], ratio: float) -> float:
    """Returns which share of the pairs with the highest scores, as many as `ratio` keeps, is in this cache."""
    wanted = select(values, ratio=ratio)
    assert isinstance(wanted, Tensor)
    wanted = wanted.cpu()
    return ((kept_mask(cache) & wanted).sum() / wanted.sum()).item()


def _texts(questions: Sequence[Question], form: str) -> list[str]:
    if form == "chat":
        return [question.query for question in questions]
    return [prompts.QUERY_SEPARATOR + question.cloze for question in questions]
