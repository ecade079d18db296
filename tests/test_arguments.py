"""Public functions say what they expected: every one of them is given every wrong kind of argument.

In a process of its own, without the type checker that tests run with, which would speak first.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

WALK = r"""
import itertools, json, sys, tempfile
import torch
import kvzip, random_model
from dataclasses import replace
from kvzip import evals, head_scores, scores
from kvzip.evals.comparison import answer_probabilities

model = random_model.make(random_model.config())
dense = kvzip.score(model, kvzip.prefill(model, "Call me Ishmael."))
small = kvzip.compress(dense, 0.5)
heads = head_scores.make(model, "Call me Ishmael.")
ids = torch.tensor([1, 2, 3])
path = tempfile.mkdtemp() + "/x"
try:
    from transformers import DynamicCache
except ImportError:
    DynamicCache = dict

MODEL, DENSE, CACHE, RAGGED, TEXT, IDS = "model", "dense", "cache", "ragged", "text", "ids"
NUMBER, PATH, SCORES, HEADS = "number", "path", "scores", "heads"
good = {MODEL: [model], DENSE: [dense], CACHE: [dense, small], RAGGED: [small], TEXT: ["Who?"], IDS: ["Who?", ids],
        NUMBER: [0.4], PATH: [path], SCORES: [dense.scores], HEADS: [heads]}
wrong = {"model": model, "dense": dense, "small": small, "text": "abc", "None": None, "texts": ["a"], "number": 3,
         "float": 0.5, "floats": torch.ones(3), "square": torch.ones(2, 2, dtype=torch.long), "scores": dense.scores,
         "heads": heads, "object": object(), "bytes": b"ab", "type": dict}
fits = {MODEL: ["model"], DENSE: ["dense"], CACHE: ["dense", "small"], RAGGED: ["small"], TEXT: ["text"],
        IDS: ["text"], NUMBER: ["number", "float"], PATH: ["text"], SCORES: ["scores"], HEADS: ["heads"]}
functions = {
    "prefill": (kvzip.prefill, MODEL, IDS), "score": (kvzip.score, MODEL, DENSE),
    "compress": (kvzip.compress, DENSE, NUMBER), "keep_mask": (kvzip.keep_mask, SCORES, NUMBER),
    "refit": (kvzip.refit, MODEL, DENSE, RAGGED),
    "prefill_compressed": (kvzip.prefill_compressed, MODEL, IDS, NUMBER),
    "generate": (kvzip.generate, MODEL, CACHE, TEXT), "Decoder": (kvzip.Decoder, MODEL, CACHE),
    "extend": (kvzip.extend, MODEL, CACHE, IDS), "ask": (kvzip.ask, MODEL, CACHE, TEXT), "fork": (kvzip.fork, CACHE),
    "append": (kvzip.append, MODEL, CACHE, IDS), "tune": (kvzip.tune, MODEL, DENSE, TEXT),
    "fold": (kvzip.fold, MODEL, CACHE, NUMBER), "save": (kvzip.save, CACHE, PATH), "to": (kvzip.to, CACHE, None),
    "open": (kvzip.open, PATH), "open model": (lambda path, model: kvzip.open(path, model=model), PATH, PATH),
    "nbytes": (kvzip.nbytes, CACHE), "load": (kvzip.load, PATH), "load_cache": (kvzip.load_cache, PATH),
    "from_transformers": (kvzip.from_transformers, MODEL, None, IDS),
    "to_transformers": (kvzip.to_transformers, MODEL, CACHE),
    "head_scores.make": (head_scores.make, MODEL, IDS), "head_scores.combine": (head_scores.combine, HEADS),
    "head_scores.attach": (head_scores.attach, DENSE, HEADS), "head_scores.save": (head_scores.save, HEADS, PATH),
    "head_scores.load": (head_scores.load, PATH), "head_scores.shipped": (head_scores.shipped, MODEL),
    "head_scores.to_duo_attention": (head_scores.to_duo_attention, HEADS, PATH),
    "head_scores.from_duo_attention": (head_scores.from_duo_attention, PATH),
    "head_scores.fingerprint_of": (head_scores.fingerprint_of, MODEL),
    "evals.compare": (evals.compare, MODEL, IDS, TEXT, NUMBER),
    "answer_probabilities": (lambda *given: answer_probabilities(*given, [1, 2]), MODEL, CACHE, TEXT),
    "scores.attach": (scores.attach, DENSE, SCORES), "scores.combine": (scores.combine, SCORES),
    "scores.shrink": (scores.shrink, RAGGED, NUMBER), "scores.save": (scores.save, CACHE, PATH),
    "scores.load": (scores.load, PATH, CACHE), "scores.plot": (scores.plot, SCORES, NUMBER),
}
def wide(scores):
    return replace(scores, values=scores.values.double())


def cached(scores):
    return replace(dense, scores=scores)


functions |= {
    "answer_ids": (lambda token_id=(1,): answer_probabilities(model, small, "Who?", token_id),),
    "read": (lambda **given: kvzip.Decoder(model, small).read([[1]], **given),),
    "a piece": (lambda a_piece: kvzip.prefill_compressed(model, [a_piece], 0.5),),
    "float32": (lambda float32: float32(),),
    "pairs=False": (lambda pairs: pairs(kvzip.load_cache(path, pairs=False)),),
}
found, calls = [], 0
fixed = {"to": {1: "cpu"}, "from_transformers": {1: DynamicCache()}}
several = {"generate": {2: ["texts"]}, "prefill_compressed": {1: ["texts"]}, "head_scores.make": {1: ["texts"]},
           "head_scores.shipped": {0: ["text"]}, "open model": {1: ["model", "None"]}, "evals.compare": {2: ["texts"]},
           "tune": {2: ["texts", "None"]}}
for name, (function, *kinds) in functions.items():
    for place, kind in enumerate(kinds):
        if kind is None:
            continue
        allowed = fits[kind] + several.get(name, {}).get(place, [])
        for label, value in wrong.items():
            if label in allowed:
                continue
            arguments = [fixed[name][n] if k is None else good[k][0] for n, k in enumerate(kinds)]
            arguments[place] = value
            calls += 1
            try:
                function(*arguments)
                said = "nothing"
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
            whole = said.startswith(("TypeError: expected ", "ValueError: expected ")) and ", got " in said
            if not (whole and ": " in said.partition(", got ")[2]):
                found.append(f"{name} argument {place} {label}: {said[:300]}")
counts = {"zero": 0, "less": -1, "float": 2.5, "text": "a", "None": None, "true": True, "list": [1]}
hints = {label: value for label, value in counts.items() if label != "zero"}
choices = {"text": "nothing", "list": ["pair"], "number": 3, "None": None}
notes = {"number": 5, "text": "a", "pairs": [("a", 1)], "bytes": b"a"}
models = {"number": 5, "text": "a", "cache": dense, "type": kvzip.Model}
spans = {"number": 3, "text": "ab", "None": None, "numbers": [1, 2], "empty": [()], "floats": [(0.0, 1.0)],
         "back": [(3, 2)], "tensor": torch.tensor([[3, 2]]), "no axis": torch.tensor(3)}
options = {
    "load": {"dtype": {"text": "float32", "integers": torch.int32, "number": 5, "None": None,
                       "narrow": torch.float8_e4m3fn, "complex": torch.complex64},
             "chat_template": {"number": 5, "bytes": b"x", "list": ["x"]}, "template_options": notes},
    "prefill": {"chunk": counts, "system": notes | {"text": 3}, "instruction": {"list": ["a"], "number": 3}},
    "score": {"chunk": counts, "hint": hints, "scope": choices, "method": choices},
    "fold": {"chunk": counts, "hint": hints, "method": choices},
    "refit": {"chunk": counts, "hint": hints, **{name: {"less": -1, "nan": float("nan"), "infinity": float("inf"),
              "text": "1", "true": True, "None": None, "list": [1]} for name in ("bound", "ridge", "pull")}},
    "extend": {"chunk": counts},
    "append": {"chunk": counts, "hint": hints, "method": choices},
    "compress": {"protect": spans, "level": choices, "min_rows": hints, "sink": hints, "recent": hints,
                 "bits": {label: value for label, value in counts.items() if value is not None}},
    "prefill_compressed": {"checkpoint": {"number": 3, "bytes": b"x", "nul": "a\0", "half": "a\ud800"},
                           "protect": spans, "chunk": counts,
                           "hint": hints, "scope": choices, "method": choices, "share": choices, "segment": counts},
    "save": {"note": notes, "model": models, "score_bits": counts | choices},
    "load_cache": {"model": models}, "scores.save": {"note": notes}, "head_scores.save": {"note": notes},
    "head_scores.make": {"names": {"number": 3, "numbers": [3], "several": ["a", "b"], "bytes": b"a"},
                         "chunk": counts, "scope": choices},
    "answer_ids": {"token_id": {"number": 3, "float": [1.0], "true": [True], "less": [-1], "text": ["a"],
                                  "floats": torch.ones(2), "no axis": torch.tensor(1), "square": ids[None]}},
    "read": {"temperature": {"less": -1, "nan": float("nan"), "infinity": float("inf"), "text": "1", "true": True},
             "top_p": {"zero": 0, "two": 2, "nan": float("nan"), "None": None},
             "seed": {"None": None, "float": 1.0, "large": 2**64}},
    "a piece": {"a_piece": {"floats": torch.ones(3), "square": ids[None], "no axis": torch.tensor(5),
                            "bools": torch.tensor([True])}},
    "float32": {"float32": {
        "attach": lambda: scores.attach(dense, wide(dense.scores)),
        "combine": lambda: scores.combine(wide(dense.scores)),
        "save": lambda: kvzip.save(cached(wide(dense.scores)), path + "w"),
        "scores.save": lambda: scores.save(cached(wide(dense.scores)), path + "w"),
        "head_scores.save": lambda: head_scores.save(wide(heads), path + "w"),
        "head_scores.combine": lambda: head_scores.combine(wide(heads)),
        "head_scores.attach": lambda: head_scores.attach(dense, wide(heads)),
    }},
    "pairs=False": {"pairs": {
        "generate": lambda cache: kvzip.generate(model, cache, "Who?"),
        "ask": lambda cache: kvzip.ask(model, cache, "a"),
        "extend": lambda cache: kvzip.extend(model, cache, "a"), "score": lambda cache: kvzip.score(model, cache),
        "refit": lambda cache: kvzip.refit(model, dense, kvzip.load_cache(ragged, pairs=False)),
        "save": lambda cache: kvzip.save(cache, path + "w"), "to": lambda cache: kvzip.to(cache, "cpu"),
        "Decoder": lambda cache: kvzip.Decoder(model, cache), "fold": lambda cache: kvzip.fold(model, cache, 0.5),
        "answer_probabilities": lambda cache: answer_probabilities(model, cache, "Who?", [1]),
    }},
    "generate": {"decoder": models, "max_tokens": counts,
                 "stop": {"number": 3, "numbers": [3], "empty": "", "no axis": torch.tensor(5)}},
    "Decoder": {"batch": counts, "tail": counts},
    "ask": {"max_tokens": counts},
    "evals.compare": {"method": choices, "max_tokens": counts, "stop": {"number": 3, "numbers": [3], "empty": ""}},
}
answered = kvzip.ask(model, small, "Who?", max_tokens=2)[1]
kvzip.save(dense, path)
ragged = path + "r"
kvzip.save(small, ragged)
for name, named in options.items():
    function, *kinds = functions[name]
    arguments = [answered if name == "fold" and kind is CACHE else good[kind][0] for kind in kinds]
    arguments += ["Who?"] if name == "evals.compare" and len(arguments) < 3 else []
    for option, values in named.items():
        for label, value in values.items():
            calls += 1
            try:
                function(*arguments, **{option: value})
                said = "nothing"
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
            whole = said.startswith(("TypeError: expected ", "ValueError: expected ")) and ", got " in said
            expected, _, got = said.partition(", got ")
            if not (whole and option.replace("_", " ") in expected.replace("_", " ").lower() and ": " in got):
                found.append(f"{name} {option}= {label}: {said[:300]}")
whole = evals.compare(model, "Call me Ishmael.", ["Who?", "a", "x"], 0.5, max_tokens=6)
stops = sorted({pair.full.text[1:2] for pair in whole.answers} - {""})
listed, once = (evals.compare(model, "Call me Ishmael.", ["Who?", "a", "x"], 0.5, max_tokens=6, stop=stop)
                for stop in (stops, iter(stops)))
texts = [[pair.full.text for pair in made.answers] + [pair.small.text for pair in made.answers]
         for made in (whole, listed, once)]
print(json.dumps({"texts": texts, "calls": calls, "found": found, "names": sorted(functions), "all": kvzip.__all__}))
"""


@pytest.fixture(scope="module")
def walked():
    tests = Path(__file__).parent
    code = f"import sys; sys.path[:0] = [{str(tests.parent)!r}, {str(tests)!r}]\n{WALK}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_public_function_says_what_it_expected(walked):
    assert walked["found"] == []
    assert walked["calls"] > 1000


def test_stop_texts_that_come_once_end_every_answer(walked):
    whole, listed, once = walked["texts"]
    assert once == listed != whole


def test_no_public_function_is_left_out(walked):
    no_functions = {"Answer", "DenseCache", "Model", "ModelConfig", "RaggedCache", "Scores", "Source"}
    modules = {"head_scores", "models", "ops", "prompts", "scores", "sources"}
    assert set(walked["all"]) - no_functions - modules <= set(walked["names"])
