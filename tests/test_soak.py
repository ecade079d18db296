"""A thousand random operations on a handful of caches, beside a plain account of what each should hold.

The account (`plain_cache.Held`) is dicts of rows and a list of token ids. It selects by sorting in Python and attends
head by head. Rows that an operation computes are compared with the account's own within rounding and then taken over,
so that from there on every bit of them must stay.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

import kvzip
import plain_cache
import random_model
from plain_cache import Held
from unchecked import unchecked

OPERATIONS, CACHES, LONGEST = 1000, 5, 90
WINDOW = 6
SLACK = 1e-3  # of values and logits of size 1 to 30, in float32


@dataclass(frozen=True)
class Account:
    """What a cache should hold. The first `start` of `ids` are the prefix, those from `context` on the tail."""

    held: Held
    ids: list[int]
    start: int
    context: int
    kept: int
    total: int
    chat: bool
    bits: int | None = None


@dataclass
class Soak:
    """The caches with their accounts, and the files with theirs."""

    model: kvzip.Model
    directory: Path
    rng: random.Random
    live: list[tuple[kvzip.DenseCache | kvzip.RaggedCache, Account]] = field(default_factory=list)
    files: dict[Path, Account] = field(default_factory=dict)
    done: dict[str, int] = field(default_factory=dict)

    def text(self, longest: int) -> str:
        return "".join(self.rng.choices("abcdefgh ", k=self.rng.randint(1, longest))) + "."

    def encode(self, text: str) -> list[int]:
        return self.model.tokenizer.text.encode(text).ids

    def control(self, text: str) -> list[int]:
        return self.model.tokenizer.control.encode(text).ids


@unchecked()
def test_random_operations_hold_what_they_should(tmp_path):
    model = replace(random_model.make(random_model.config(windows=(None, WINDOW, None))), stop_ids=())
    soak = Soak(model, tmp_path, random.Random(0))
    while (step := sum(soak.done.values())) < OPERATIONS:  # one that finds no cache to work on does not count
        soak.rng.choice(KINDS)(soak)
        for cache, account in soak.live if step % 20 == 0 else soak.live[-2:]:
            check(cache, account)
        if len(soak.live) > CACHES:
            soak.live.pop(soak.rng.randrange(CACHES))
    assert min(soak.done.values()) > 20 and len(soak.done) == len(KINDS), soak.done


def check(cache, account: Account) -> None:
    assert plain_cache.read(cache) == account.held
    assert cache.token_ids.tolist() == account.ids
    assert (cache.start, cache.chat) == (account.start, account.chat)
    assert (cache.kept, cache.total) == (account.kept, account.total)
    context = cache.length if isinstance(cache, kvzip.DenseCache) else cache.context_length
    assert context == account.context


def prefill(soak: Soak) -> None:
    template, text = soak.rng.random() < 0.7, soak.text(30)
    cache = kvzip.prefill(soak.model, text, template=template, chunk=soak.rng.randint(12, 40))
    ids = [*(soak.control("<|user|>") if template else []), *soak.encode(text)]
    start = len(ids) - len(text)
    account = Account([[{}, {}] for _ in soak.model.config.layers], ids[:0], start, 0, 0, 0, template)
    total = 2 * 2 * len(text)
    account = replace(computed(soak, cache, account, ids), context=len(ids), kept=total, total=total)
    slide(account)
    finish(soak, "prefill", cache, account)


def computed(soak: Soak, cache, account: Account, new: list[int]) -> Account:
    """The account with new tokens, whose rows are near what a plain pass gives and are the cache's from now on."""
    used = len(account.ids)
    expected = plain_cache.run(soak.model, account.held, new, used)
    held, actual = copied(account.held), plain_cache.read(cache)
    for layer, heads in enumerate(held):
        for head, rows in enumerate(heads):
            for n, position in enumerate(range(used, used + len(new))):
                plain = (expected.k[layer][head][n].tolist(), expected.v[layer][head][n].tolist())
                found = actual[layer][head].get(position)
                if found is None:  # a window has moved on
                    assert layer == 1 and position < used + len(new) - WINDOW
                    found = (tuple(plain[0]), tuple(plain[1]))
                for a, b in zip(found, plain, strict=True):
                    assert max(abs(x - y) for x, y in zip(a, b, strict=True)) < SLACK
                rows[position] = found
    return replace(account, held=held, ids=account.ids + new)


def copied(held: Held) -> Held:
    return [[dict(rows) for rows in heads] for heads in held]


def slide(account: Account) -> None:
    """Leaves the last rows of the window layer, as a context does."""
    for rows in account.held[1]:
        for position in list(rows):
            if position < len(account.ids) - WINDOW:
                del rows[position]


def score(soak: Soak) -> None:
    for cache, account in picked(soak, lambda cache: isinstance(cache, kvzip.DenseCache)):
        scope = soak.rng.choice(["context", "chunk"])
        finish(soak, "score", kvzip.score(soak.model, cache, chunk=soak.rng.randint(15, 40), scope=scope), account)


def compress(soak: Soak) -> None:
    for cache, account in picked(soak, lambda cache: isinstance(cache, kvzip.DenseCache) and cache.scores is not None):
        length = account.context - account.start
        level, bits = soak.rng.choice(["pair", "layer", "uniform"]), soak.rng.choice([None, None, 8, 4])
        ratio, consume = soak.rng.choice([0.1, 0.3, 0.7, 1.0]), soak.rng.random() < 0.2
        first = soak.rng.randrange(length + 1)
        span = (first, min(length, first + int(ratio * length)))
        small = kvzip.compress(cache, ratio, level=level, bits=bits, protect=[span], consume=consume)
        keep = selected(cache.scores.values.tolist(), ratio, level, range(*span))
        held = copied(account.held)
        for n, layer in enumerate((0, 2)):
            for head in range(2):
                for token in set(range(length)) - keep[n, head]:
                    del held[layer][head][account.start + token]
        kept = sum(map(len, keep.values()))
        changed = replace(account, held=held, kept=kept, bits=bits)
        if bits is not None:
            changed = quantized(small, changed, positions=range(account.context))
        if consume:
            soak.live = [entry for entry in soak.live if entry[0].token_ids is not cache.token_ids]
        finish(soak, "compress", small, changed)


def selected(values, ratio: float, level: str, protected: range) -> dict[tuple[int, int], set[int]]:
    """The tokens kept by each layer and head: protected ones first, then by score, then by place."""
    order = [
        (token not in protected, -value, n, head, token)
        for n, heads in enumerate(values)
        for head, tokens in enumerate(heads)
        for token, value in enumerate(tokens)
    ]
    group = {"pair": lambda item: 0, "layer": lambda item: item[2], "uniform": lambda item: item[2:4]}[level]
    keep: dict[tuple[int, int], set[int]] = {(n, head): set() for n in range(2) for head in range(2)}
    for key in {group(item) for item in order}:
        members = sorted(item for item in order if group(item) == key)
        for *_, n, head, token in members[: int(ratio * len(members))]:
            keep[n, head].add(token)
    return keep


def quantized(cache, account: Account, positions: range) -> Account:
    """The account with rows as the cache has packed them: within half a step of what they were."""
    held, actual = copied(account.held), plain_cache.read(cache)
    for layer in (0, 2):
        for head, (rows, found) in enumerate(zip(held[layer], actual[layer], strict=True)):
            for position in set(positions) & set(rows):
                assert plain_cache.within(cache.context[layer], head, rows[position], found[position])
                rows[position] = found[position]
    return replace(account, held=held)


def extend(soak: Soak) -> None:
    for cache, account in picked(soak, lambda cache: len(cache.token_ids) < LONGEST):
        text = soak.text(12)
        longer = kvzip.extend(soak.model, cache, text, chunk=soak.rng.randint(5, 20))
        finish(soak, "extend", longer, computed(soak, longer, account, soak.encode(text)))


def fork(soak: Soak) -> None:
    for cache, account in picked(soak, lambda cache: True):
        finish(soak, "fork", kvzip.fork(cache), account)


def generate(soak: Soak) -> None:
    for cache, account in picked(soak, lambda cache: True):
        queries = [soak.text(8) for _ in range(soak.rng.randint(1, 2))]
        template = account.chat and soak.rng.random() < 0.8
        found = kvzip.generate(soak.model, cache, queries, max_tokens=2, template=template)
        for query, answer in zip(queries, found, strict=True):
            likely(soak, account, asked(soak, account, query, template), answer.token_ids)
        finish(soak, "generate", None, None)


def ask(soak: Soak) -> None:
    for cache, account in picked(soak, lambda cache: len(cache.token_ids) < LONGEST):
        query = soak.text(8)
        answer, longer = kvzip.ask(soak.model, cache, query, max_tokens=2, template=account.chat)
        ids = asked(soak, account, query, account.chat)
        likely(soak, account, ids, answer.token_ids)
        ids += answer.token_ids + (soak.control("<|end|><|user|>") if account.chat else [])
        finish(soak, "ask", longer, computed(soak, longer, account, ids))


def asked(soak: Soak, account: Account, query: str, template: bool) -> list[int]:
    if not template:
        return soak.encode(query)
    turn = soak.control("<|end|><|user|>")
    before = "" if account.ids[-len(turn) :] == turn else "\n\n"
    return soak.encode(before + query.strip()) + soak.control("<|end|><|assistant|>")


def likely(soak: Soak, account: Account, ids: list[int], answer: list[int]) -> None:
    """Every token of the answer is the most likely one after those before it, up to rounding."""
    found = plain_cache.run(soak.model, account.held, ids + answer, len(account.ids)).hidden[len(ids) - 1 : -1]
    logits = kvzip.models.logits(soak.model, found)
    chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    assert len(answer) == 2 and (logits.amax(1) - chosen < SLACK).all()


def fold(soak: Soak) -> None:
    for cache, account in picked(soak, lambda cache: isinstance(cache, kvzip.RaggedCache) and cache.tail is not None):
        ratio = soak.rng.choice([0.2, 0.6, 1.0])
        folded = kvzip.fold(soak.model, cache, ratio, chunk=soak.rng.randint(15, 40))
        end = len(account.ids)
        pairs = 2 * 2 * (end - account.context)
        held, actual, kept = copied(account.held), plain_cache.read(folded), 0
        for layer in (0, 2):
            for rows, found in zip(held[layer], actual[layer], strict=True):
                for position in range(account.context, end):
                    if position not in found:
                        del rows[position]
                kept += sum(position >= account.context for position in rows)
        assert kept == int(ratio * pairs)
        changed = replace(account, held=held, context=end, kept=account.kept + kept, total=account.total + pairs)
        slide(changed)
        if changed.bits is not None:
            changed = quantized(folded, changed, positions=range(account.context, end))
        finish(soak, "fold", folded, changed)


def save(soak: Soak) -> None:
    for cache, account in picked(soak, lambda cache: True):
        path = soak.directory / f"{soak.rng.randrange(4)}.kvz"
        kvzip.save(cache, path, overwrite=True)
        soak.files[path] = account
        finish(soak, "save", None, None)


def load(soak: Soak) -> None:
    if soak.files:
        path = soak.rng.choice(sorted(soak.files))
        finish(soak, "load", kvzip.load_cache(path, model=soak.model), soak.files[path])


def drop(soak: Soak) -> None:
    if len(soak.live) > 2:
        soak.live.pop(soak.rng.randrange(len(soak.live)))
        finish(soak, "drop", None, None)


def picked(soak: Soak, fits: Callable[..., bool]) -> list:
    """One of the caches that fit, with its account, moved to the end so that it is checked again; or nothing."""
    entries = [n for n, (cache, _) in enumerate(soak.live) if fits(cache)]
    if not entries:
        return []
    soak.live.append(soak.live.pop(soak.rng.choice(entries)))
    return [soak.live[-1]]


def finish(soak: Soak, name: str, cache, account: Account | None) -> None:
    soak.done[name] = soak.done.get(name, 0) + 1
    if cache is not None:
        soak.live.append((cache, account))


KINDS = [prefill, score, compress, extend, fork, generate, ask, fold, save, load, drop]
