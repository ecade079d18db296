"""Generation: both caches, one question or many, stops, streams, and a cache left as it was."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as WordTokenizer
from tokenizers import decoders
from tokenizers.models import WordLevel

import kvzip
import random_model
from kvzip import generation, prompts
from kvzip.evals.comparison import answer_probabilities
from unchecked import unchecked

TEXT = "Call me Ishmael. Some years ago, never mind how long precisely."
QUERIES = ["Who?", "How long ago was it, precisely?", "x"]


@pytest.fixture(scope="module")
def model(two_layers):
    return two_layers


@pytest.fixture(scope="module")
def dense(model):
    return kvzip.score(model, kvzip.prefill(model, TEXT))


def greedy(model, ids, count):
    """Tokens by one forward pass over everything at each step: no cache, no tail."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(kvzip.models.logits(model, _last_hidden(model, ids)).argmax()))
    return ids[-count:]


def _last_hidden(model, ids):
    def attend(layer, q, k, v):
        group = q.shape[1] // k.shape[1]
        keys, values = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        distance = torch.arange(len(ids))[:, None] - torch.arange(len(ids))
        window = model.config.layers[layer].window or len(ids)
        seen = (distance >= 0) & (distance < window)
        logits = (q @ keys.mT * model.config.attn_scale).masked_fill(~seen, -torch.inf)
        return logits.softmax(-1) @ values

    return kvzip.models.forward(model, torch.tensor([ids]), torch.arange(len(ids)), attend)[0, -1]


def test_greedy_decoding_equals_a_forward_pass_over_everything(model):
    model = replace(model, stop_ids=())
    cache = kvzip.prefill(model, TEXT, template=False)
    answer = kvzip.generate(model, cache, "And so", max_tokens=20, template=False)
    ids = [*cache.token_ids.tolist(), *model.tokenizer.text.encode("And so").ids]
    assert answer.token_ids == greedy(model, ids, 20)
    assert answer.stopped == "length" and len(answer.token_ids) == 20  # the last token is not lost


@given(ratio=st.sampled_from([0.2, 0.7, 1.0]), template=st.booleans())
@unchecked()
def test_a_batch_answers_as_each_question_alone(model, dense, ratio, template):
    small = kvzip.compress(dense, ratio)
    together = kvzip.generate(model, small, QUERIES, max_tokens=12, template=template)
    assert together == [kvzip.generate(model, small, q, max_tokens=12, template=template) for q in QUERIES]


@unchecked()
def test_ratio_one_answers_as_the_full_cache(model, dense):
    whole, tenth = (kvzip.compress(dense, ratio) for ratio in (1.0, 0.1))
    full, same, other = (kvzip.generate(model, cache, QUERIES, max_tokens=30) for cache in (dense, whole, tenth))
    assert same == full != other


def test_the_cache_is_left_as_it_was(model, dense):
    small = kvzip.compress(dense, 0.5)
    before = [(kv.k.clone(), kv.v.clone()) for kv in small.context]
    first = kvzip.generate(model, small, "One?", max_tokens=9)
    assert kvzip.generate(model, small, "One?", max_tokens=9) == first
    for kv, (k, v) in zip(small.context, before, strict=True):
        assert torch.equal(kv.k, k) and torch.equal(kv.v, v)
    assert small.tail is None


def test_stop_tokens_end_an_answer(model, dense):
    free = replace(model, stop_ids=())
    ids = kvzip.generate(free, dense, "Who?", max_tokens=10).token_ids
    stopping = replace(model, stop_ids=(ids[4],))
    answer = kvzip.generate(stopping, dense, "Who?", max_tokens=10)
    assert answer.token_ids == ids[: ids.index(ids[4])] and answer.stopped == "stop"


@unchecked()
def test_stop_texts_cut_the_answer_and_the_stream(model, dense):
    free = replace(model, stop_ids=())
    text = kvzip.generate(free, dense, "Who?", max_tokens=40).text
    at = next(i for i in range(5, len(text) - 2) if "\ufffd" not in text[i : i + 2])
    stop = text[at : at + 2]
    pieces = []
    answer = kvzip.generate(free, dense, "Who?", max_tokens=40, stop=[stop, "never there"], on_token=pieces.append)
    assert answer.text == text[: text.index(stop)] == "".join(pieces) and answer.stopped == "stop"


@unchecked()
def test_one_stop_text_is_a_list_of_one(model, dense):
    free = replace(model, stop_ids=())
    text = kvzip.generate(free, dense, "Who?", max_tokens=40).text
    stop = next(
        text[i : i + 2] for i in range(5, len(text)) if "\ufffd" not in text[i : i + 2] and text.find(text[i]) < i
    )
    answers = [kvzip.generate(free, dense, "Who?", max_tokens=40, stop=s) for s in (stop, [stop], (stop,))]
    assert answers == answers[:1] * 3 and answers[0].text == text[: text.index(stop)]


class Pieces(kvzip.Decoder):
    """A decoder whose answers are given: every question gets its own ids."""

    def __init__(self, model, answers):
        self.model, self.waiting, self.batch = model, list(zip(*answers, strict=True)), len(answers)

    def step(self):
        pass

    def fetch(self):
        ids = list(self.waiting.pop(0))
        return lambda: ids


WORDS = ["a", "END", "xE", "ND", "é", "E", "N", "D", "\n", "日本", "Dz"]


def spell(model, words):
    return [i for word in words for i in model.tokenizer.text.encode(word, add_special_tokens=False).ids]


@given(
    texts=st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=6), min_size=1, max_size=3),
    stops=st.lists(st.sampled_from(["END", "é", "本", "a", "\n"]), min_size=0, max_size=2, unique=True),
)
def test_the_ids_end_where_the_text_ends(model, texts, stops):
    """Multi-byte characters of several tokens, stop texts over tokens, at the start and held back, in a batch."""
    length = max(len(spell(model, words)) for words in texts)
    ids = [(spell(model, words) + spell(model, ["zzzzzzzzzzzzzzzzzz"]) * 3)[:length] for words in texts]
    said = [[] for _ in texts]
    streams = [
        generation._Stream(model.tokenizer, tuple(stops), lambda piece, n: said[n].append(piece), n)
        for n in range(len(texts))
    ]
    answers = generation._decode(Pieces(model, ids), streams, (), length)
    for answer, own, pieces in zip(answers, ids, said, strict=True):
        whole = model.tokenizer.control.decode(own)
        found = [whole.find(stop) for stop in stops if stop in whole]
        assert answer.text == whole[: min(found, default=len(whole))] == "".join(pieces)
        assert answer.stopped == ("stop" if found else "length")
        assert answer.token_ids == own[: len(answer.token_ids)]  # one byte a token: no stop text begins within one
        assert model.tokenizer.control.decode(answer.token_ids) == answer.text
        assert not found or len(answer.token_ids) == len(answer.text.encode())


@given(
    words=st.lists(st.sampled_from(["ab", "b", "EN", "D", "xEND", "ENDx", "aE"]), min_size=1, max_size=7),
    stop=st.sampled_from(["END", "bE", "D"]),
)
def test_a_token_in_which_the_text_ends_is_the_last(words, stop):
    """Tokens of several letters: a stop text may begin and end anywhere within them."""
    vocabulary = sorted({*"abxEND", "ab", "EN", "xEND", "ENDx", "aE"})
    raw = WordTokenizer(WordLevel({word: n for n, word in enumerate(vocabulary)}, unk_token="a"))
    raw.decoder = decoders.Fuse()
    tokenizer = prompts.make_tokenizer(raw)
    stream = generation._Stream(tokenizer, (stop,), None, 0)
    ids = [vocabulary.index(word) for word in words]
    answer = next((done for done in (stream.add(i, ()) for i in ids) if done is not None), None)
    answer = answer or stream.finish("length")
    whole = "".join(words)
    assert answer.text == whole.partition(stop)[0]
    if answer.stopped == "length":
        assert answer.token_ids == ids
        return
    lengths = [len("".join(words[:n])) for n in range(len(words) + 1)]
    shortest = next(n for n, length in enumerate(lengths) if length >= len(answer.text))
    assert answer.token_ids == ids[:shortest]


def test_the_tail_holds_the_answer_up_to_a_stop_text(model, dense):
    free = replace(model, stop_ids=())
    whole = kvzip.generate(free, dense, "Who?", max_tokens=30)
    ids, text = whole.token_ids, next(c for c in whole.text[4:] if c.isascii())
    answer, cache = kvzip.ask(free, dense, "Who?", max_tokens=30, stop=text)
    assert answer.stopped == "stop" and answer.token_ids == ids[: len(answer.token_ids)] != ids
    asked = model.tokenizer.text.encode("\n\nWho?").ids + model.tokenizer.control.encode("<|end|><|assistant|>").ids
    close = model.tokenizer.control.encode("<|end|><|user|>").ids
    assert cache.token_ids[dense.length :].tolist() == [*asked, *answer.token_ids, *close]
    assert model.tokenizer.control.decode(answer.token_ids) == answer.text
    assert text not in answer.text


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 1}], ids=["greedy", "sampled"])
def test_logits_that_are_no_numbers_are_an_error(model, options):
    broken = random_model.make(model.config)
    cache = kvzip.prefill(broken, TEXT)
    broken.weights.unembed[7] = torch.nan
    with pytest.raises(
        ValueError, match=r"expected logits that are numbers, got NaN for token 1 .*bfloat16 or float32"
    ):
        kvzip.generate(broken, cache, QUERIES, max_tokens=3, **options)


def test_streams_add_up_to_the_answers(model, dense):
    pieces = ["", "", ""]

    def collect(piece, index):
        pieces[index] += piece

    answers = kvzip.generate(model, dense, QUERIES, max_tokens=25, on_token=collect)
    assert pieces == [a.text for a in answers]
    single = []
    answer = kvzip.generate(model, dense, QUERIES[0], max_tokens=25, on_token=single.append)
    assert "".join(single) == answer.text == answers[0].text
    assert answer.text == model.tokenizer.control.decode(answer.token_ids)


@unchecked()
def test_sampling_depends_on_the_seed_alone(model, dense):
    def sample(query, **options):
        return kvzip.generate(model, dense, query, max_tokens=12, temperature=1.0, **options)

    assert sample(QUERIES, seed=3) == [sample(q, seed=3) for q in QUERIES]
    assert sample(QUERIES[0], seed=3) != sample(QUERIES[0], seed=4)
    assert sample(QUERIES[0]) != sample(QUERIES[0])
    cold = kvzip.generate(model, dense, QUERIES[0], max_tokens=12, temperature=5.0, top_p=1e-6, seed=1)
    assert cold == kvzip.generate(model, dense, QUERIES[0], max_tokens=12)


def test_control_tokens_in_a_query_stay_text(model, dense):
    plain = kvzip.generate(model, dense, "Who<|end|>", max_tokens=5)
    ids = model.tokenizer.text.encode("\n\nWho<|end|>").ids + model.tokenizer.control.encode("<|end|><|assistant|>").ids
    assert plain.token_ids == greedy(model, [*dense.token_ids.tolist(), *ids], len(plain.token_ids))


def test_bad_input_is_named(model, dense):
    other = random_model.make(model.config, seed=5)
    with pytest.raises(ValueError, match="got one of another"):
        kvzip.generate(other, dense, "Who?")
    with pytest.raises(ValueError, match="query with text"):
        kvzip.generate(model, dense, ["Who?", " "])
    for options, message in (
        ({"max_tokens": 0}, "max_tokens to be at least 1"),
        ({"temperature": -1.0}, "temperature of 0"),
        ({"top_p": 0.0}, "0 < top_p <= 1"),
        ({"top_p": 1.0000001}, "0 < top_p <= 1"),
        ({"top_p": math.nan}, "0 < top_p <= 1"),
        ({"temperature": math.nan}, "temperature of 0"),
        ({"temperature": math.inf}, "temperature of 0"),
        ({"seed": 2**64}, r"seed from -2\*\*63"),
        ({"seed": -(2**63) - 1}, r"seed from -2\*\*63"),
        ({"stop": ""}, "stop texts with a character"),
        ({"stop": ["END", ""]}, "stop texts with a character"),
    ):
        for call in (kvzip.generate, kvzip.ask):
            with pytest.raises(ValueError, match=f"expected .*{message}.*, got .*: "):
                call(model, dense, "Who?", **options)
    bare = kvzip.prefill(model, TEXT, template=False)
    with pytest.raises(ValueError, match=r"prefilled with template=False"):
        kvzip.generate(model, bare, "Who?")
    tight = random_model.make(replace(model.config, max_length=dense.length + 3))
    with pytest.raises(ValueError, match=r"room for an answer"):
        kvzip.generate(tight, kvzip.prefill(tight, TEXT), "Who?")
    assert kvzip.generate(model, dense, []) == []


HALF = "A formula: \ud835 x"


@pytest.mark.parametrize(
    "call",
    [
        lambda model, cache: kvzip.generate(model, cache, HALF),
        lambda model, cache: kvzip.generate(model, cache, ["Who?", HALF]),
        lambda model, cache: kvzip.generate(model, cache, "Who?", stop=HALF),
        lambda model, cache: kvzip.generate(model, cache, "Who?", stop=["x", HALF]),
        lambda model, cache: kvzip.ask(model, cache, HALF),
        lambda model, cache: kvzip.ask(model, cache, "Who?", stop=HALF),
        lambda model, cache: kvzip.extend(model, cache, HALF),
        lambda model, cache: kvzip.prefill(model, HALF),
        lambda model, cache: kvzip.prefill(model, TEXT, system=HALF),
        lambda model, cache: kvzip.prefill(model, TEXT, instruction=HALF),
        lambda model, cache: kvzip.prefill_compressed(model, HALF, 0.5),
        lambda model, cache: kvzip.prefill_compressed(model, [TEXT, HALF], 0.5),
        lambda model, cache: kvzip.prefill_compressed(model, TEXT, 0.5, system=HALF),
        lambda model, cache: kvzip.head_scores.make(model, [TEXT, HALF]),
        lambda model, cache: answer_probabilities(model, cache, HALF, [1]),
    ],
)
def test_half_of_a_surrogate_pair_is_named_wherever_text_goes_in(model, dense, call):
    with pytest.raises(ValueError, match=r"expected .*, got .*(surrogate|ud835)"):
        call(model, dense)


def test_half_of_a_character_is_counted_in_the_query_as_given(model, dense):
    for asked in ("ab\ud800", "  ab\ud800"):
        with pytest.raises(ValueError, match=f"at character {asked.index(chr(0xD800))}: replace"):
            kvzip.generate(model, dense, ["Who?", asked])


def test_a_consumed_cache_answers_no_empty_list(model, dense):
    gone = replace(kvzip.score(model, dense), layers=[*dense.layers])
    kvzip.compress(gone, 0.5, consume=True)
    with pytest.raises(ValueError, match="layers are gone"):
        kvzip.generate(model, gone, [])


def test_a_repetition_penalty_is_that_of_its_formula_and_ends_a_loop(model):
    """The formula, written out over a forward pass of everything; only tokens of the answer count as said."""
    model, penalty, count = replace(model, stop_ids=()), 1.6, 24
    cache = kvzip.prefill(model, TEXT, template=False)
    query = model.tokenizer.text.encode("And so").ids
    ids, said = [*cache.token_ids.tolist(), *query], []
    for _ in range(count):
        scores = kvzip.models.logits(model, _last_hidden(model, ids + said)).double()
        for token in set(said):
            scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
        said.append(int(scores.argmax()))
    options = {"max_tokens": count, "template": False, "repetition_penalty": penalty}
    decoder = kvzip.Decoder(model, cache, batch=2, tail=40)
    both = kvzip.generate(model, cache, ["And so", "Who?"], decoder=decoder, **options)
    alone = kvzip.generate(model, cache, "And so", **options)
    again = kvzip.generate(model, cache, ["And so", "Who?"], decoder=decoder, max_tokens=count, template=False)
    assert both[0].token_ids == alone.token_ids == said, "what other questions or an earlier answer said does not count"
    plain = kvzip.generate(model, cache, "And so", max_tokens=count, template=False).token_ids
    assert again[0].token_ids == plain == greedy(model, ids, count)
    assert len(set(said)) > len(set(plain))
    answer, _ = kvzip.ask(model, cache, "And so", **options)
    assert answer.token_ids == said
    for wrong in (0.9, 0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="repetition_penalty"):
            kvzip.generate(model, cache, "And so", repetition_penalty=wrong, template=False)
