"""vLLM with documents: the same tokens as kvzip's own decoder, in one continuous batch."""

from typing import Any

import pytest
import torch

import kvzip
from kvzip.decoding import Decoder
from kvzip.inputs import query_ids

QUESTIONS = ("What is a7?", "And which numbers are squares?")
TOKENS = 10


def expected(model: Any, cache: Any, ids: list[int]) -> list[int]:
    """The most likely tokens of kvzip's own decoder."""
    decoder = Decoder(model, cache, batch=1, tail=len(ids) + TOKENS)
    decoder.read([ids])
    found = [int(decoder.tokens)]
    for _ in range(TOKENS - 1):
        decoder.step()
        found.append(int(decoder.tokens))
    return found


def ask(engine: Any, prompts: list[list[int]], names: list[str | None], **given: Any) -> list[Any]:
    """The requests' outputs, all asked at once."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            max_tokens=TOKENS, temperature=0, ignore_eos=True, detokenize=False,
            extra_args=None if name is None else {"kvzip": name}, **given,
        )
        for name in names
    ]  # fmt: skip
    return engine.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)


def tokens(outputs: list[Any]) -> list[list[int]]:
    """The tokens of each answer."""
    return [list(x.outputs[0].token_ids) for x in outputs]


def test_two_documents_and_a_plain_request_in_one_batch(engine: Any, model: Any, caches: dict[str, Any]) -> None:
    asked = [(n, ids) for n, cache in caches.items() for ids in query_ids(model, cache, list(QUESTIONS), template=True)]
    plain = model.tokenizer.text.encode("plain text").ids
    names: list[str | None] = [n for n, _ in asked]
    found = tokens(ask(engine, [*(ids for _, ids in asked), plain], [*names, None]))
    wanted = [expected(model, caches[n], ids) for n, ids in asked]
    assert found[:-1] == wanted
    assert len({tuple(x) for x in wanted}) == 4
    empty = kvzip.prefill(model, torch.tensor(plain[:1]), template=False)
    assert found[-1] == expected(model, empty, plain[1:])
