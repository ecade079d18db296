"""The OpenAI server with kvzip's routes, in this process; its engine runs in a child of it."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

import kvzip
from kvzip.inputs import prompt_of, query_ids
from vllm_engines import ROOM, TOKENS, expected

PATH = "/v1/kvzip/documents"
ASKED: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "What is a7?"}],
    "max_tokens": TOKENS,
    "temperature": 0,
    "ignore_eos": True,
    "return_token_ids": True,
    "vllm_xargs": {"kvzip": "a"},
}


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
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
    loop.close()
    patch.undo()


def test_any_client_asks_a_document_by_its_name(server: Any, model: Any, caches: dict[str, Any]) -> None:
    answer = server("POST", "/v1/chat/completions", **ASKED).json()
    ids = query_ids(model, caches["a"], ["What is a7?"], template=True)[0]
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert answer["choices"][0]["token_ids"] == expected(model, caches["a"], ids)


def test_later_turns_are_those_of_a_conversation(server: Any, model: Any, caches: dict[str, Any]) -> None:
    said = [("user", "What is a7?"), ("assistant", "49."), ("user", "And a3?")]
    messages = [{"role": role, "content": text} for role, text in said]
    answer = server("POST", "/v1/chat/completions", **{**ASKED, "messages": messages}).json()
    first, later = query_ids(model, caches["a"], ["What is a7?"], template=True)[0], prompt_of(model)
    ids = first + encode(model, "49." + later.separator + "And a3?" + later.postfix)
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert answer["choices"][0]["token_ids"] == expected(model, caches["a"], ids)


def test_requests_without_a_document_are_plain_vllm(server: Any, model: Any) -> None:
    plain = {**ASKED, "vllm_xargs": None, "ignore_eos": True}
    answer = server("POST", "/v1/chat/completions", **plain).json()
    ids = encode(model, "<|user|>What is a7?<|end|><|assistant|>")
    assert answer["usage"]["prompt_tokens"] == len(ids)
    whole = kvzip.prefill(model, torch.tensor(ids[:1]), template=False)
    assert answer["choices"][0]["token_ids"] == expected(model, whole, ids[1:])


def test_a_completion_goes_on_behind_the_document(server: Any, model: Any, caches: dict[str, Any]) -> None:
    asked = {name: value for name, value in ASKED.items() if name != "messages"}
    answer = server("POST", "/v1/completions", **asked, prompt="\n\nA list:").json()
    assert answer["choices"][0]["token_ids"] == expected(model, caches["a"], encode(model, "\n\nA list:"))


def test_documents_are_loaded_listed_and_dropped(server: Any, caches: dict[str, Any]) -> None:
    missing = server("POST", "/v1/chat/completions", **{**ASKED, "vllm_xargs": {"kvzip": "b"}})
    assert missing.status_code == 404 and "expected a document that is loaded (a), got 'b'" in missing.text
    loaded = server("POST", PATH, name="b", file="b.kvz")
    assert loaded.status_code == 200 and loaded.json()["kept"] == caches["b"].kept
    assert [x["name"] for x in server("GET", PATH).json()["documents"]] == ["a", "b"]
    answered = server("POST", "/v1/chat/completions", **{**ASKED, "vllm_xargs": {"kvzip": "b"}})
    assert answered.status_code == 200
    assert server("DELETE", f"{PATH}/b").json()["requests"] == 0
    assert server("DELETE", f"{PATH}/b").status_code == 404
    assert server("POST", PATH, name="b").status_code == 400
    assert server("POST", PATH, name="b", file="/etc/passwd").status_code == 403
    assert server("POST", PATH, name="b", file="nothing.kvz").status_code == 404


def test_a_system_message_behind_a_document_is_refused(server: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *ASKED["messages"]]
    refused = server("POST", "/v1/chat/completions", **{**ASKED, "messages": messages})
    assert refused.status_code == 400 and "the document has the system prompt already" in refused.text


def encode(model: Any, text: str) -> list[int]:
    """The ids of text with control tokens."""
    return model.tokenizer.control.encode(text, add_special_tokens=False).ids
