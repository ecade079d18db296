"""The OpenAI server with kvzip's routes, in this process; its engine runs in a child of it."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import kvzip
from conftest import ROOM

PATH = "/v1/kvzip/documents"


@pytest.fixture(scope="module")
def server(model_dir: Path, files: Path) -> Iterator[Any]:
    """A function that sends a request to the server and returns the response."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.openai.api_server import build_app, init_app_state
    from vllm.entrypoints.openai.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine.async_llm import AsyncLLM

    parser = make_arg_parser(FlexibleArgumentParser())
    told = f'{{"kvzip": {{"documents": {{"a": "{files}/a.kvz"}}, "directory": "{files}"}}}}'
    args = parser.parse_args([
        "--model", str(model_dir), "--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", str(ROOM),
        "--max-num-seqs", "4", "--max-num-batched-tokens", "256", "--enforce-eager", "--attention-backend", "CUSTOM",
        "--additional-config", told,
    ])  # fmt: skip
    validate_parsed_serve_args(args)
    loop = asyncio.new_event_loop()
    patch = pytest.MonkeyPatch()

    async def begin() -> tuple[Any, httpx.AsyncClient]:
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
        patch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")  # so that Triton stays declared present
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        engine = AsyncLLM.from_vllm_config(config)
        tasks = await engine.get_supported_tasks()
        app = build_app(args, tasks)
        await init_app_state(engine, app.state, args, tasks)
        return engine, httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server", timeout=120)

    engine, client = loop.run_until_complete(begin())

    def send(method: str, path: str, **body: Any) -> Any:
        return loop.run_until_complete(client.request(method, path, json=body or None))

    yield send
    loop.run_until_complete(client.aclose())
    engine.shutdown()
    loop.close()
    patch.undo()


def test_any_client_asks_a_document_by_its_name(server: Any, model: Any, caches: dict[str, Any]) -> None:
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "What is a7?"}], "max_tokens": 8}
    asked |= {"temperature": 0, "vllm_xargs": {"kvzip": "a"}, "return_token_ids": True}
    answer = server("POST", "/v1/chat/completions", **asked).json()
    wanted = kvzip.generate(model, caches["a"], "What is a7?", max_tokens=8)
    assert answer["choices"][0]["token_ids"][: len(wanted.token_ids)] == wanted.token_ids
    assert answer["usage"]["prompt_tokens"] < 40
