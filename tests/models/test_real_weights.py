"""Real weights in float32: the same greedy tokens as Transformers, the same scores and pairs as the plain KVzip.

The context is longer than the window of Gemma, and is scored in three chunks. Models come from registry packages
(kvzip/small) and are cached outside the checkout; one that cannot be had is skipped, and says so.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import kvzip
import plain_kvzip
from kvzip.cache import WindowKV
from kvzip.small import packages as small_models

MODELS = [
    "smollm2-135m-instruct",
    "gemma-3-270m",
    "qwen2.5-coder-0.5b-instruct",
    pytest.param("qwen2.5-coder-1.5b-instruct", marks=pytest.mark.slow),
]
DOCUMENT = Path(__file__).parents[2] / "kvzip" / "data" / "museum.txt"
TOKENS, STEPS, RATIO = 192, 16, 0.3
WINDOWED = {"gemma-3-270m": (600, 32)}  # tokens and steps where layers have windows: fewer steps miss a lost window
QUERIES = ["\n\nIn short, this text is about", " The list of names that follows:\n1."]
MARK = "<<here>>"


@dataclass(frozen=True)
class Pair:
    """One checkpoint read twice, by Transformers and by kvzip, with the same context scored by both."""

    reference: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    plain: plain_kvzip.PlainScores
    prefix_ids: list[int]
    context_ids: list[int]
    model: kvzip.Model
    cache: kvzip.DenseCache
    steps: int

    def encode(self, text: str) -> list[int]:
        """Returns the ids of plain text by Transformers' tokenizer."""
        return self.tokenizer.encode(text, add_special_tokens=False)


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    try:
        path = small_models.model_dir(request.param)
    except small_models.Unavailable as missing:
        pytest.skip(f"left out, {request.param} cannot be had here: {missing}")
    tokenizer = AutoTokenizer.from_pretrained(path)
    turn = [{"role": "user", "content": MARK}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    prefix_ids, postfix_ids = (encode(part) for part in text.split(MARK))
    tokens, steps = WINDOWED.get(request.param, (TOKENS, STEPS))
    chunk = tokens * 3 // 8
    context_ids = encode(DOCUMENT.read_text(encoding="utf-8"))[:tokens]
    assert len(context_ids) == tokens
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").eval()
    plain = plain_kvzip.score(reference, prefix_ids, context_ids, postfix_ids, encode, chunk=chunk)
    model = kvzip.load(path, dtype=torch.float32, device="cpu")
    cache = kvzip.score(model, kvzip.prefill(model, torch.tensor(context_ids)), scope="context", chunk=chunk)
    yield Pair(reference, tokenizer, plain, prefix_ids, context_ids, model, cache, steps)


def scores_of(pair: Pair) -> kvzip.Scores:
    assert pair.cache.scores is not None
    return pair.cache.scores


def test_the_prefix_is_the_one_that_the_chat_template_renders(pair: Pair) -> None:
    assert pair.cache.token_ids.tolist() == pair.prefix_ids + pair.context_ids
    assert (scores_of(pair).start, scores_of(pair).stop) == (len(pair.prefix_ids), pair.cache.length)


def test_scores_equal_those_of_the_plain_implementation(pair: Pair) -> None:
    scores, plain = scores_of(pair), pair.plain.values
    assert list(scores.layers) == pair.plain.layers
    assert scores.values.shape == plain.shape
    assert (scores.values - plain).abs().max() <= 1e-3 * (plain.max() - plain.min())


def test_the_same_pairs_are_kept(pair: Pair) -> None:
    expected = plain_kvzip.select(pair.plain.values, RATIO)
    small = kvzip.compress(pair.cache, ratio=RATIO)
    kept = kept_pairs(small, scores_of(pair))
    assert kept.sum() == expected.sum() == small.kept == int(RATIO * expected.numel())
    assert (kept & expected).sum() >= 0.999 * expected.sum()
    assert torch.equal(kept, kvzip.ops.select(scores_of(pair).values, ratio=RATIO))


def kept_pairs(small: kvzip.RaggedCache, scores: kvzip.Scores) -> Tensor:
    """Returns the mask [L H E] of the context pairs that a ragged cache holds; its prefix must be whole."""
    masks = []
    for layer in scores.layers:
        kv = small.context[layer]
        heads = len(kv.offsets) - 1
        mask = torch.zeros(heads, scores.stop, dtype=torch.bool)
        for head in range(heads):
            mask[head, kv.positions[kv.offsets[head] : kv.offsets[head + 1]].long()] = True
        assert mask[:, : scores.start].all()
        masks.append(mask[:, scores.start :])
    return torch.stack(masks)


def test_window_layers_hold_their_last_tokens_and_no_more(pair: Pair) -> None:
    windows = [spec.window for spec in pair.model.config.layers]
    if not any(windows):
        assert scores_of(pair).values.shape[0] == len(windows)
        return
    small = kvzip.compress(pair.cache, ratio=RATIO)
    for index, window in enumerate(windows):
        if window is not None:
            for kv in (pair.cache.layers[index], small.context[index]):
                assert isinstance(kv, WindowKV) and kv.k.shape[2] == window
                keys = pair.plain.cache.layers[index].keys[:, :, -window:]
                assert (kv.k - keys).abs().max() <= 1e-4 * keys.abs().max()


def test_greedy_tokens_are_those_of_transformers(pair: Pair) -> None:
    """After every beginning of our answer, the token that Transformers finds most likely is the next one of ours.

    That is greedy decoding by Transformers, step by step, at the cost of one forward pass. Stop tokens are off, so
    that no answer ends early.
    """
    free = replace(pair.model, stop_ids=())
    answers = kvzip.generate(free, pair.cache, QUERIES, template=False, max_tokens=pair.steps)
    assert [len(answer.token_ids) for answer in answers] == [pair.steps] * len(QUERIES)
    for query, answer in zip(QUERIES, answers, strict=True):
        asked = pair.encode(query)
        hidden = plain_kvzip.run(pair.reference, asked + answer.token_ids, pair.plain.cache)
        pair.plain.cache.crop(-len(asked + answer.token_ids))
        with torch.no_grad():
            best = pair.reference.lm_head(hidden[len(asked) - 1 : -1]).argmax(-1)
        assert best.tolist() == answer.token_ids


def test_transformers_continues_a_uniform_cache(pair: Pair) -> None:
    """Its rows are half as many as its tokens, so Transformers is told the positions."""
    small = kvzip.compress(pair.cache, 0.5, level="uniform")
    asked, length = pair.encode(QUERIES[0]), len(small.token_ids)
    theirs = pair.reference.generate(
        torch.tensor([asked]),
        **{plain_kvzip.cache_argument(pair.reference): kvzip.to_transformers(pair.model, small)},
        position_ids=torch.arange(length, length + len(asked))[None],
        attention_mask=torch.ones(1, length + len(asked), dtype=torch.long),
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
    )
    free = replace(pair.model, stop_ids=())
    ours = kvzip.generate(free, small, QUERIES[0], template=False, max_tokens=8)
    assert theirs[0, len(asked) :].tolist() == ours.token_ids


def test_a_cache_of_transformers_is_continued_by_us(pair: Pair) -> None:
    taken = kvzip.from_transformers(pair.model, pair.plain.cache, pair.cache.token_ids)
    assert (taken.start, taken.chat) == (pair.cache.start, True)
    options = {"template": False, "max_tokens": 8}
    ours = kvzip.generate(pair.model, pair.cache, QUERIES[1], **options)
    assert kvzip.generate(pair.model, taken, QUERIES[1], **options) == ours


def test_turns_are_those_that_the_chat_template_renders(pair: Pair) -> None:
    """A conversation of two turns: the text of its tail is the template's, answers at their places; a fold keeps it."""
    queries, answers = ["What is this text about?", "And who wrote it?"], []
    cache = kvzip.compress(pair.cache, 0.5)
    for query in queries:
        before = kvzip.fold(pair.model, cache)
        answer, cache = kvzip.ask(pair.model, cache, query, max_tokens=6)
        answers.append(answer)
    assert kvzip.generate(pair.model, before, queries[1], max_tokens=6) == answers[1]
    turns = [
        {"role": "user", "content": f"{MARK}\n\n{queries[0]}"},
        {"role": "assistant", "content": "<<0>>"},  # templates trim what stands here
        {"role": "user", "content": queries[1]},
        {"role": "assistant", "content": "<<1>>"},
        {"role": "user", "content": f"next {MARK}"},
    ]
    _, expected, _ = pair.tokenizer.apply_chat_template(turns, tokenize=False).split(MARK)
    for n, answer in enumerate(answers):
        expected = expected.replace(f"<<{n}>>", pair.tokenizer.decode(answer.token_ids))
    tail = pair.tokenizer.decode(cache.token_ids[cache.context_length :])
    assert tail == expected.removesuffix("next ")
