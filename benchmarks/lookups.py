"""Methods for `evaluation.py --study`: is it the choice of pairs that loses random keys and values, or their number?

"chunk-N" and "context-N" repeat N tokens at a time. "lookups" has what no method may know: it asks for every key of the
context, with the right answer, and scores a pair by the largest attention that it receives meanwhile.
"""

import re
from dataclasses import replace

import torch

from kvzip import DenseCache, Model, prompts, score
from kvzip.attention import score_attend
from kvzip.cache import Scores, global_layers
from kvzip.evals.methods import Method
from kvzip.generation import query_ids
from kvzip.inputs import tokenizer_of
from kvzip.models import run_attention

UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
ASKED = {  # pairs in a context of `kv` and `ruler_niah_multikey_3`: question and answer in a chat, and as plain text
    f'"({UUID})": "({UUID})"': (
        'Q: Key: "{}"\nThe value associated with the specified key is: ',
        'The value associated with the specified key "{}" is "{}".',
        '"{}": "{}"',
    ),
    f"One of the special magic uuids for ({UUID}) is: ({UUID})": (
        "Q: What is the special magic uuid for {} mentioned in the provided text?",
        "The special magic uuid for {} is: {}.",
        "The special magic uuid for {} mentioned in the provided text is {}.",
    ),
}


def lookups(model: Model, cache: DenseCache) -> DenseCache:
    """Returns the cache with the largest weight that a pair has in any lookup of a key with its value.

    Raises: ValueError for a context without such pairs.
    """
    tokenizer = tokenizer_of(model)
    text = prompts.decode(tokenizer, cache.token_ids[cache.start :].tolist())
    asked = [
        (question.format(key), (answer if cache.chat else prompts.QUERY_SEPARATOR + plain).format(key, value))
        for pattern, (question, answer, plain) in ASKED.items()
        for key, value in re.findall(pattern, text)
    ]
    if not asked:
        raise ValueError(f"expected a context with pairs of UUIDs, got {text[:80]!r}: take kv or ruler_niah_multikey_3")
    layers, sink, stop = global_layers(cache), cache.start, cache.length
    best = torch.zeros(len(layers), model.config.num_kv_heads, stop - sink, device=model.device)
    values = torch.empty_like(best)
    for question, answer in asked:
        before = query_ids(model, cache, [question], template=True)[0] if cache.chat else []
        ids = before + prompts.encode_text(tokenizer, answer)
        attend = score_attend(model.config, cache.layers, values, sink=sink, start=sink, stop=stop, local=False)
        positions = torch.arange(stop, stop + len(ids), device=model.device)
        with torch.no_grad():
            run_attention(model, torch.tensor([ids], device=model.device), positions, attend)
        best = torch.maximum(best, values)
    return replace(cache, scores=Scores(best.clamp_(max=1), layers, sink, stop, "lookups"))


def repeated(scope: str, chunk: int) -> Method:
    """KVzip with a chunk length."""
    return Method(f"{scope}-{chunk}", lambda model, cache: score(model, cache, scope=scope, chunk=chunk), "pair", "")


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("lookups", lookups, "pair", "none: it has seen the questions and the answers"),
        *(repeated("chunk", chunk) for chunk in (1000, 500, 250, 125, 60)),
        *(repeated("context", chunk) for chunk in (500, 125)),
    )
}
