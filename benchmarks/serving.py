"""Times the engine and the server: many documents and many readers on one card.

    python benchmarks/serving.py [--shape llama-3.1-8b] [--only check capacity grid first long http life]
    python benchmarks/serving.py --tiny --results FILE     # every part on a CPU with a toy model, to try the script

What a card of this kind has done at this commit is not done again, and after --limit seconds nothing new is begun: exit
code 75 says that the same command goes on. Weights are random, and so are scores, with heads as unequal as real ones.
Each figure is one JSON line appended to benchmarks/results/serving.jsonl.

    check       tests of the engine on the card, and its answers at two layers of the shape against the plain formula;
                nothing is timed on red
    capacity    documents of 32,768 tokens held at 0.3 with 4 GB left for tails, graphs and activations, all answering
    grid        step, tokens a second and 99th percentile for documents x readers, at 0.3, 0.3 in 8 bits, and 1
    first       the first token of a document of 32,768 on the device, the host and disk, and of one that is read anew
    long        the same at 126,000 tokens; and one reader of it, by the engine and by a Decoder
    http        the grid at 0.3 as readers in another process see it, and by the engine itself
    life        10,000 questions of random lengths over 20 documents at four layers: memory at each tenth
"""  # fmt: skip

import argparse
import gc
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / name) for name in ("", "tests", "tests/serving")]

from plain_answers import assert_as_likely_as_rounding_allows  # noqa: E402

import kvzip  # noqa: E402
import random_model as toys  # noqa: E402
from benchmarks import end_to_end, harness  # noqa: E402
from benchmarks.harness import release  # noqa: E402
from benchmarks.shapes import random_model, shapes, with_scores  # noqa: E402
from kvzip.cache import RaggedCache, as_ragged, free_bytes  # noqa: E402
from kvzip.machine import timed  # noqa: E402
from kvzip.models import Model  # noqa: E402
from kvzip.serving import Engine, Held  # noqa: E402
from kvzip.serving.moves import bare, to_device  # noqa: E402
from kvzip.serving.timing import Pace, pace_of  # noqa: E402

RESULTS = harness.RESULTS / "serving.jsonl"
PARTS = ("check", "capacity", "grid", "first", "long", "http", "life")
WEIGHTS = 15.0e9  # bytes that a step of the 8B shape reads besides contexts
BANDWIDTH = end_to_end.READ_BANDWIDTH
LEFT = 4_000_000_000  # bytes of the card left for tails, graphs and activations
LIMIT_S = 480.0
GO_ON = 75  # exit code: call again

Lines = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class Sizes:
    """How large the parts are. `loads`: documents x readers of each; a reader's `tail`: its `question` and answer."""

    tokens: int = 32_768
    long: int = 126_000
    loads: tuple[tuple[int, int], ...] = ((1, 1), (1, 32), (8, 4), (8, 16), (16, 8))
    question: int = 30
    tail: int = 128
    lives: tuple[int, int] = (10_000, 20)  # questions, documents
    forms: tuple[tuple[float, int | None], ...] = ((0.3, None), (0.3, 8), (1.0, None))


TINY = Sizes(
    tokens=120,
    long=200,
    loads=((1, 1), (2, 2)),
    question=6,
    tail=14,
    lives=(40, 3),
    forms=((0.3, None), (0.3, 8), (1.0, None)),
)


def main() -> None:
    begun = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=shapes(), default="llama-3.1-8b")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--tiny", action="store_true", help="a toy model on the CPU; figures mean nothing")
    parser.add_argument("--commit", help="commit to write down, where git cannot be asked")
    parser.add_argument("--limit", type=float, default=LIMIT_S, metavar="SECONDS")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        parser.error("no CUDA device: these figures need one (--tiny tries the script)")
    if "http" in options.only and find_spec("uvicorn") is None:
        parser.error('no uvicorn: install the extra serve, or leave "http" out (--only)')
    facts = harness.facts("cpu" if options.tiny else "cuda", options.commit)
    sizes, shape = (TINY, "tiny") if options.tiny else (Sizes(), options.shape)
    same = {"shape": shape, **{name: facts[name] for name in ("commit", "gpu", "cpu") if name in facts}}
    done = cases_done(options.results, same)
    wanted = {name: case for name, case in cases(sizes).items() if name.partition(" ")[0] in options.only}
    missing = {name: case for name, case in wanted.items() if name not in done}
    whole: Model | None = None
    for name, case in missing.items():
        if time.monotonic() - begun > options.limit:
            sys.exit(GO_ON)
        start = time.monotonic()
        few = LAYERS.get(name)
        model = whole if few is None and whole is not None else model_of(options.shape, sizes, few, tiny=options.tiny)
        whole = model if few is None else whole
        about = {"shape": shape, "layers": len(model.config.layers), "what": name.partition(" ")[0], "case": name}
        lines = [{**about, **line} for line in case(model)]
        harness.record(options.results, lines, facts)
        print(f"{name}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
        del model
        if not options.tiny:
            release()


def cases(sizes: Sizes) -> dict[str, Callable[[Model], Lines]]:
    """The cases by name, the part first, in the order in which they are run."""
    found: dict[str, Callable[[Model], Lines]] = {"check": lambda model: check(model, sizes)}
    for bits in (None, 8, 4):
        found[f"capacity {bits or 16}"] = partial(capacity, sizes=sizes, bits=bits)
    for ratio, bits in sizes.forms:
        found[f"grid {ratio} {bits or 16}"] = partial(grid, sizes=sizes, ratio=ratio, bits=bits)
    found["first"] = partial(first, sizes=sizes)
    found["long"] = partial(long, sizes=sizes)
    found["http"] = partial(http, sizes=sizes)
    found["life"] = partial(life, sizes=sizes)
    return found


LAYERS = {"check": 2, "life": 4}
"""Of the cases that are not run at all layers."""


def cases_done(results: Path, same: Mapping[str, Any]) -> set[str]:
    """The cases that results have already, of the same shape, commit and card."""
    if not results.exists():
        return set()
    lines = harness.read_lines(results)
    return {line["case"] for line in lines if "case" in line and same.items() <= line.items()}


def model_of(shape: str, sizes: Sizes, layers: int | None, *, tiny: bool) -> Model:
    if tiny:
        return replace(toys.make(toys.config()), stop_ids=())
    return random_model(shape, layers=layers, max_length=sizes.long + 4096)


# --- parts


def check(model: Model, sizes: Sizes) -> Lines:
    """Tests on the card, then answers to several readers of several documents, each token of which must be as likely
    as rounding allows."""
    if model.device.type == "cuda":
        harness.test_or_exit("-m", "gpu", "tests/serving", "tests/test_decoding.py")
    asked, tokens = questions(sizes)[:2], 6
    forms = ((0.3, None), (0.3, 8), (1.0, None))
    caches = [document(model, sizes.tokens // 4, ratio, bits) for ratio, bits in forms]
    with Engine(model, memory=2 * sum(map(kvzip.nbytes, caches)), tail_tokens=4096, requests=16) as engine:
        contexts = [engine.add(cache) for cache in caches]
        pairs = [(n, ids) for n in range(len(caches)) for ids in asked] * 2
        handles = [engine.submit(contexts[n], ids, max_tokens=tokens) for n, ids in pairs]
        said = [handle.result(300).token_ids for handle in handles]
    with end_to_end.backend("reference"):
        for (n, ids), answer in zip(pairs, said, strict=True):
            assert_as_likely_as_rounding_allows(model, caches[n], ids.tolist(), answer)
    yield {"answers": len(said), "tokens": sum(map(len, said))}


def capacity(model: Model, sizes: Sizes, bits: int | None) -> Lines:
    """Documents that are held, each of which answers at the same time as all others."""
    cache = document(model, sizes.tokens, 0.3, bits)
    size = kvzip.nbytes(cache)
    clear(model)
    free = free_bytes(model.device) if model.device.type == "cuda" else 20 * size + LEFT
    count = min(((free or 0) - LEFT + size) // size, 256)  # the one that is there is the first
    rows = -(-sizes.tail // 32) * 32
    with Engine(model, memory=count * size, requests=count, tail_tokens=count * rows) as engine:
        contexts = [engine.add(cache), *(engine.add(copy(cache, model)) for _ in range(count - 1))]
        found = pace_of(ask(engine, contexts, sizes))
        used = torch.cuda.max_memory_reserved() if model.device.type == "cuda" else None
        yield {"ratio": 0.3, "bits": bits or 16, "held": count, "document_bytes": size, "reserved_bytes": used,
               "answers": found.answers, "step_ms": 1e3 * found.token_s}  # fmt: skip


def grid(model: Model, sizes: Sizes, ratio: float, bits: int | None) -> Lines:
    """A line for each load; one that does not fit says so."""
    cache = document(model, sizes.tokens, ratio, bits)
    size, count = kvzip.nbytes(cache), max(documents for documents, _ in sizes.loads)
    clear(model)
    if model.device.type == "cuda":
        count = min(count, ((free_bytes(model.device) or 0) - LEFT + size) // size)
    most = max(documents * readers for documents, readers in sizes.loads)
    limits = {"memory": count * size, "requests": most, "tail_tokens": most * (sizes.tail + 32)}
    with Engine(model, **limits) as engine:
        contexts = [engine.add(cache), *(engine.add(copy(cache, model)) for _ in range(count - 1))]
        for documents, readers in sizes.loads:
            line = {"ratio": ratio, "bits": bits or 16, "documents": documents, "readers": readers}
            if documents > count:
                yield {**line, "fits": False}
                continue
            bound = (WEIGHTS + documents * size) / BANDWIDTH
            yield {**line, "bound_ms": 1e3 * bound, **told(measured(engine, contexts[:documents] * readers, sizes))}


def first(model: Model, sizes: Sizes) -> Lines:
    """First tokens of documents of the usual length."""
    cache, read_s = timed(model.device, lambda: document(model, sizes.tokens, 0.3, None, score=True))
    yield from first_tokens(model, cache, sizes, read_s)


def long(model: Model, sizes: Sizes) -> Lines:
    """A long document: one reader by the engine and by a Decoder, and its first tokens."""
    cache, read_s = timed(model.device, lambda: document(model, sizes.long, 0.3, None, score=True))
    with Engine(model, tail_tokens=4096, memory=2 * kvzip.nbytes(cache)) as engine:
        context = engine.add(cache)
        found = measured(engine, [context], sizes)
        times = [first_ms(engine, context, sizes) for _ in range(8)][1:]
    yield {"by": "engine", "tokens": sizes.long, "ratio": 0.3, **told(found), "first_ms": statistics.median(times)}
    if model.device.type == "cuda":
        step, question = end_to_end.step_ms(model, cache, 1), end_to_end.question_ms(model, cache)
        yield {"by": "decoder", "tokens": sizes.long, "ratio": 0.3, "step_ms": step["ms"], "first_ms": question["ms"]}
    yield from first_tokens(model, cache, sizes, read_s)


def first_tokens(model: Model, cache: RaggedCache, sizes: Sizes, read_s: float) -> Lines:
    """Milliseconds from a question to its first token, by where its document is, and by reading it anew.

    A file that was written a moment ago is in the host's page cache.
    """
    tokens = len(cache.token_ids)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "document.kvz"
        kvzip.save(cache, path)
        size = kvzip.nbytes(kvzip.load_cache(path, pairs=False))
        limits = {"memory": size + size // 2, "host_memory": 2 * size + size // 2, "tail_tokens": 4096}
        with Engine(model, **limits) as engine:
            contexts = [engine.add(path) for _ in range(2)]
            found: dict[str, list[float]] = {}
            for n in range(8):  # the two take each other's place on the device, so each comes from elsewhere
                for own in (contexts[n % 2],) * 2:
                    where = own.where
                    found.setdefault(where, []).append(first_ms(engine, own, sizes))
        for where in ("device", "host", "disk"):
            if where in found:
                times = found[where][1:] or found[where]
                spread = max(times) - min(times)
                yield {"tokens": tokens, "from": where, "document_bytes": size, "ms": statistics.median(times),
                       "spread_ms": spread}  # fmt: skip
    if model.device.type == "cuda":
        yield from _from_host(model, cache, sizes, tokens)
    yield {"tokens": tokens, "from": "text", "document_bytes": size, "ms": 1e3 * read_s}


def _from_host(model: Model, cache: RaggedCache, sizes: Sizes, tokens: int) -> Lines:
    """Two documents of memory alone, one of them on the device at a time."""
    size = kvzip.nbytes(cache)
    other = copy(cache, model)
    with Engine(model, memory=size + size // 2, host_memory=3 * size, tail_tokens=4096) as engine:
        contexts = [engine.add(cache), engine.add(other)]
        del other
        times = []
        for n in range(12):
            own = contexts[n % 2]
            where, ms = own.where, first_ms(engine, own, sizes)
            times += [ms] if where == "host" else []
        times = times[2:] or times
        yield {"tokens": tokens, "from": "host", "document_bytes": size, "ms": statistics.median(times),
               "spread_ms": max(times) - min(times)}  # fmt: skip


def http(model: Model, sizes: Sizes) -> Lines:
    """The loads at 0.3 through the server, beside the same questions asked of its engine."""
    from kvzip.server.load import pace_over_http

    cache = document(model, sizes.tokens, 0.3, None)
    question, tokens = "x" * sizes.question, sizes.tail - sizes.question
    count = max(documents for documents, _ in sizes.loads)
    with served(model, cache, count, sizes) as (engine, contexts, url):
        del cache
        for documents, readers in sizes.loads:
            held = contexts[:documents] * readers
            names = [f"model:{n}" for n in range(documents)] * readers
            for _ in range(2):
                handles = [engine.submit(own, question, max_tokens=tokens, template=own.chat) for own in held]
                inside = pace_of(handles)
                outside = pace_over_http(url, names, question, tokens=tokens)
            yield {"documents": documents, "readers": readers, "engine": told(inside), "http": told(outside),
                   "share": outside.tokens_per_s / inside.tokens_per_s}  # fmt: skip


def life(model: Model, sizes: Sizes) -> Lines:
    """Memory after each tenth of many questions."""
    questions, documents = sizes.lives
    cache, draw = document(model, min(sizes.tokens, 4_096), 0.3, None), random.Random(0)
    with Engine(model, memory=documents * kvzip.nbytes(cache)) as engine:
        contexts = [engine.add(copy(cache, model)) for _ in range(documents)]
        del cache
        for part in range(1, 11):
            handles = []
            for _ in range(questions // 10):
                ids = torch.tensor([draw.randrange(256) for _ in range(draw.randint(1, 200))])
                handles.append(engine.submit(draw.choice(contexts), ids, max_tokens=draw.randint(1, 24)))
            for handle in handles:
                handle.result()
            cuda = model.device.type == "cuda"
            found = (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) if cuda else (None, None)
            yield {"questions": part * questions // 10, "allocated_bytes": found[0], "reserved_bytes": found[1],
                   "tail_tokens": engine.facts["tail_tokens"]}  # fmt: skip


# --- what they share


def questions(sizes: Sizes) -> list[Tensor]:
    """Questions of random tokens, always the same."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(256, (sizes.question,), generator=generator) for _ in range(4)]


def document(model: Model, tokens: int, ratio: float, bits: int | None, *, score: bool = False) -> RaggedCache:
    """A compressed document of random tokens, with random scores unless it is scored."""
    ids = torch.randint(256, (tokens,), generator=torch.Generator().manual_seed(tokens))
    dense = kvzip.prefill(model, ids)
    dense = kvzip.score(model, dense) if score else with_scores(dense, model)
    return copy(bare(as_ragged(kvzip.compress(dense, ratio, bits=bits, consume=True))), model)


def copy(cache: RaggedCache, model: Model) -> RaggedCache:
    """The same document in memory of its own."""
    return to_device(cache, model.device)


def ask(engine: Engine, contexts: Sequence[Held], sizes: Sizes) -> list[kvzip.Handle]:
    """One question of each context, all at once."""
    ids = questions(sizes)[0]
    return [engine.submit(context, ids, max_tokens=sizes.tail - sizes.question) for context in contexts]


def measured(engine: Engine, contexts: Sequence[Held], sizes: Sizes) -> Pace:
    """The pace of the second of two rounds: the first captures graphs."""
    pace_of(ask(engine, contexts, sizes))
    return pace_of(ask(engine, contexts, sizes))


def first_ms(engine: Engine, context: Held, sizes: Sizes) -> float:
    (handle,) = ask(engine, [context], replace(sizes, tail=sizes.question + 1))
    handle.result()
    return 1e3 * (handle.times[0] - handle.begun)


def told(pace: Pace) -> dict[str, Any]:
    """A pace in milliseconds."""
    found = asdict(pace)
    return {name.removesuffix("_s") + "_ms": 1e3 * found[name] for name in ("first_s", "slowest_first_s", "p99_s")} | {
        "step_ms": 1e3 * pace.token_s,
        "tokens_per_s": pace.tokens_per_s,
    }


@contextmanager
def served(
    model: Model, cache: RaggedCache, count: int, sizes: Sizes
) -> Iterator[tuple[Engine, list[Held | None], str]]:
    """A server of `count` copies of a document; yields its engine, their contexts, and its address."""
    from kvzip.server.app import create_app
    from kvzip.server.chat import Service
    from kvzip.server.library import Library
    from kvzip.server.load import in_thread
    from kvzip.server.metrics import Metrics

    most = max(documents * readers for documents, readers in sizes.loads)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        kvzip.save(cache, directory / "document.kvz")
        links = [directory / f"{n}.kvz" for n in range(count)]
        for link in links:
            link.symlink_to(directory / "document.kvz")
        room = most * (3 * sizes.question + sizes.tail + 64)
        engine = Engine(model, memory=count * kvzip.nbytes(cache), requests=most, tail_tokens=room)
        stack.callback(engine.close, cancel=True)
        library = Library(engine, directory / "posted", links)
        url = stack.enter_context(in_thread(create_app(Service(engine, library, Metrics(), "model", sizes.tail))))
        gc.collect()
        gc.freeze()  # as `kvzip serve` does
        stack.callback(gc.unfreeze)
        yield engine, [library.context(link.stem) for link in links], url


def clear(model: Model) -> None:
    if model.device.type == "cuda":
        release()


if __name__ == "__main__":
    main()
