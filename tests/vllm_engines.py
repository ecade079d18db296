"""vLLM engines of tests, what they are asked, and what kvzip's own decoder answers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kvzip.decoding import Decoder

ROOM = 96  # tokens of a question and its answer: less than each document has
TOKENS = 10


@contextmanager
def running(model_dir: Path, settings: dict[str, Any], **options: Any) -> Iterator[Any]:
    """Gives a `vllm.LLM` with kvzip's backend; after it there can be another one in this process."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    given = {"dtype": "float32", "attention_backend": "CUSTOM", "enforce_eager": True, **options}
    if torch.cuda.is_available():  # little, and fixed: tests may run beside each other
        given = {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 1 << 28, **given}
    try:
        yield LLM(
            model=str(model_dir),
            max_model_len=ROOM,
            block_size=16,  # so that questions fill pages
            max_num_seqs=8,
            max_num_batched_tokens=256,
            enable_prefix_caching=True,
            disable_log_stats=False,
            additional_config={"kvzip": settings},
            **given,
        )
    finally:
        cleanup_dist_env_and_memory()


def expected(model: Any, cache: Any, ids: list[int]) -> list[int]:
    """The most likely tokens of kvzip's own decoder."""
    decoder = Decoder(model, cache, batch=1, tail=len(ids) + TOKENS)
    decoder.read([ids])
    found = [decoder.fetch()()[0]]
    for _ in range(TOKENS - 1):
        decoder.step()
        found.append(decoder.fetch()()[0])
    return found


def ask(engine: Any, prompts: list[list[int]], names: list[str | None]) -> list[Any]:
    """The requests' outputs, all asked at once."""
    params = [sampling(TOKENS, name) for name in names]
    return engine.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)


def tokens(outputs: list[Any]) -> list[list[int]]:
    """The tokens of each answer."""
    return [list(x.outputs[0].token_ids) for x in outputs]


def sampling(count: int, name: str | None) -> Any:
    """Parameters of a greedy request."""
    from vllm import SamplingParams

    extra = None if name is None else {"kvzip": name}
    return SamplingParams(max_tokens=count, temperature=0, ignore_eos=True, detokenize=False, extra_args=extra)


def block_size(engine: Any) -> int:
    """Tokens of a page."""
    return engine.llm_engine.vllm_config.cache_config.block_size


def call(engine: Any, method: str, *args: str) -> dict[str, Any]:
    """What the worker answers."""
    return engine.collective_rpc(method, args=args)[0]
