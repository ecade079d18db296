"""Chat completions by the official client: what is answered, what is refused, and what happens when clients go."""

import asyncio
import gc
import json
import time
from concurrent.futures import CancelledError

import pytest
import torch

import kvzip
from kvzip.inputs import query_ids

pytest.importorskip("openai")
pytest.importorskip("fastapi")

import openai
from servers import TEXTS

from kvzip.server.errors import ApiError
from kvzip.server.messages import conversation_ids
from kvzip.server.schemas import Message

ASK = [{"role": "user", "content": "Of what?"}]
PLAIN = {"messages": ASK, "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def expected(server):
    return {n: kvzip.generate(server.model, cache, "Of what?", max_tokens=8) for n, cache in server.caches.items()}


def idle(server, seconds=10):
    """Waits until nothing runs."""
    until = time.monotonic() + seconds
    while server.service.engine.facts["running"] + server.service.engine.facts["waiting"]:
        assert time.monotonic() < until, server.service.engine.facts
        time.sleep(0.01)


@pytest.mark.parametrize("name", TEXTS)
def test_an_answer_is_that_of_generate(server, client, expected, name):
    for model, extra in ((f"tiny:{name}", {}), ("tiny", {"document": name}), (f"tiny:{name}", {"document": name})):
        got = client.chat.completions.create(model=model, extra_body=extra, **PLAIN)
        assert got.choices[0].message.content == expected[name].text
        assert (got.choices[0].finish_reason, got.choices[0].message.role) == ("length", "assistant")
        held = len(server.caches[name].token_ids)
        asked = len(query_ids(server.model, server.caches[name], ["Of what?"], template=True)[0])
        assert got.usage.prompt_tokens_details.cached_tokens == held
        assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (held + asked, 8)
        assert got.usage.total_tokens == held + asked + 8 and got.model == model


def test_a_stream_gives_the_same_text(client, expected):
    chunks = list(
        client.chat.completions.create(model="tiny:light", stream=True, stream_options={"include_usage": True}, **PLAIN)
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected["light"].text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 8
    assert len({c.id for c in chunks}) == 1


def test_seeds_stops_and_the_model_alone(server, client):
    options = {"max_tokens": 20, "temperature": 1.2, "top_p": 0.9, "seed": 5}
    plain = kvzip.generate(server.model, server.caches["times"], "Of what?", **options)
    got = client.chat.completions.create(model="tiny:times", messages=ASK, **options)
    assert got.choices[0].message.content == plain.text
    stop = plain.text[6:8]
    got = client.chat.completions.create(model="tiny:times", messages=ASK, stop=[stop, "never said"], **options)
    assert got.choices[0].message.content == plain.text[: plain.text.index(stop)]
    assert got.choices[0].finish_reason == "stop"
    got = client.chat.completions.create(model="tiny", **PLAIN)
    alone = server.service.engine.submit(None, "Of what?", max_tokens=8).result(60)
    assert got.choices[0].message.content == alone.text and got.usage.prompt_tokens_details.cached_tokens == 0
    parts = [{"role": "user", "content": [{"type": "text", "text": "Of "}, {"type": "text", "text": "what?"}]}]
    assert client.chat.completions.create(model="tiny", **{**PLAIN, "messages": parts}).choices == got.choices


def test_models_are_listed(client):
    named = {"tiny", *(f"tiny:{name}" for name in TEXTS)}
    assert named <= {model.id for model in client.models.list()}
    assert client.models.retrieve("tiny:light").id == "tiny:light"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("tiny:dark")


def test_later_turns_follow_as_ask_puts_them(server):
    """The ids of a conversation are those that `extend` and the next query would have put there."""
    model, cache = server.model, server.caches["light"]
    turns = ["Of what?", "Of light.", "Since when?", "1871", "By whom?"]
    messages = [Message(role=("user", "assistant")[n % 2], content=text) for n, text in enumerate(turns)]
    state = cache
    for query, answer in zip(turns[:-1:2], turns[1::2], strict=True):
        (asked,) = query_ids(model, state, [query], template=True)
        said = model.tokenizer.control.encode(f"{answer}<|end|><|user|>").ids
        state = kvzip.extend(model, state, torch.tensor([*asked, *said]))
    expected = [
        *state.token_ids[len(cache.token_ids) :].tolist(),
        *query_ids(model, state, [turns[-1]], template=True)[0],
    ]
    assert conversation_ids(model, cache, messages).tolist() == expected
    system = Message(role="system", content="Be brief.")
    alone = conversation_ids(model, None, [system, *messages]).tolist()
    text = "".join(f"<|{m.role}|>{m.content}<|end|>" for m in [system, *messages]) + "<|assistant|>"
    assert alone == model.tokenizer.control.encode(text).ids


def test_a_system_message_must_be_the_document_s(server):
    model = server.model
    cache = kvzip.prefill(model, TEXTS["light"], system="Be brief.")
    messages = [Message(role="system", content="Be brief."), Message(role="user", content="Why?")]
    assert conversation_ids(model, cache, messages).tolist() == query_ids(model, cache, ["Why?"], template=True)[0]
    with pytest.raises(ApiError, match="or the one that the document was compressed with"):
        conversation_ids(model, server.caches["light"], messages)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"n": 2}, "n, got 2"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"messages": [{"role": "system", "content": "Other."}, *ASK]}, "no system message, or the one"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "user and assistant in turn"),
        ({"messages": [*ASK, {"role": "assistant", "content": "x"}]}, "user and assistant in turn"),
        ({"messages": [{"role": "user", "content": "  "}]}, "with text in them"),
        ({"messages": []}, "messages"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"stop": [""]}, "stop texts"),
        ({"stop": ["x" * 257]}, "of 1 to 256 characters"),
        ({"max_tokens": 10_000_000, "messages": [{"role": "user", "content": "x" * 5000}]}, "4096 positions"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": "3"}, "max_tokens"),
        ({"temperature": "1"}, "temperature"),
        ({"extra_body": {"stream": "yes"}}, "stream"),
        ({"extra_body": {"guided_json": {}}}, "guided_json"),
        ({"extra_body": {"document": "whale"}}, "expected one document, got two"),
    ],
)
def test_what_is_not_done_is_refused_by_name(client, given, names):
    with pytest.raises(openai.BadRequestError, match=names):
        client.chat.completions.create(**{"model": "tiny:light", **PLAIN, **given})


def test_whole_numbers_may_be_floating_ones(client, expected):
    asked = {"max_tokens": 8.0, "seed": 1.0, "n": 1.0, "top_p": 1}
    said = client.chat.completions.create(model="tiny:light", messages=ASK, temperature=0, extra_body=asked)
    assert said.choices[0].message.content == expected["light"].text


@pytest.mark.parametrize("model", ["tiny:dark", "other", "tiny:", "", "tiny:../light"])
def test_unknown_models_are_not_found(client, model):
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=model, **PLAIN)


def test_two_hundred_streams_at_once_and_no_document_in_another_s_answer(server, expected):
    async def one(client, name):
        stream = await client.chat.completions.create(model=f"tiny:{name}", stream=True, **PLAIN)
        return name, "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            names = [list(TEXTS)[n % len(TEXTS)] for n in range(200)]
            return await asyncio.gather(*(one(client, name) for name in names))

    answers = asyncio.run(all_of_them())
    assert [text == expected[name].text for name, text in answers] == [True] * 200
    assert len({answer.text for answer in expected.values()}) == len(TEXTS)
    idle(server)
    until = time.monotonic() + 10
    while any(type(each) is kvzip.Handle for each in gc.get_objects()):  # nothing of them stays
        assert time.monotonic() < until
        gc.collect()


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_hang_up_end_their_requests(server, client, stream, monkeypatch):
    run = server.service.engine._loop.runner.run
    monkeypatch.setattr(server.service.engine._loop.runner, "run", lambda step: (time.sleep(0.01), run(step))[1])
    asked = {"model": "tiny:light", "messages": ASK, "max_tokens": 3000, "temperature": 0}
    if stream:
        answers = [client.chat.completions.create(stream=True, **asked) for _ in range(5)]
        for answer in answers:
            next(iter(answer))
            answer.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.3).chat.completions.create(**asked)
    idle(server)
    assert server.service.engine.facts["tail_tokens"] == 0


def test_a_client_that_is_gone_before_the_first_event_ends_its_request(server):
    """The server's answer to a request whose client hung up while it was read."""
    from kvzip.server.app import _Events

    service = server.service
    handle = service.engine.submit(service.library.context("light"), "Of what?", max_tokens=3000)

    async def never():
        raise AssertionError("it is not begun")
        yield ""

    async def gone(message):
        raise OSError("the client hung up")

    async def receive():
        return {"type": "http.disconnect"}

    async def answer():
        await _Events(never(), handle)({"type": "http", "asgi": {"spec_version": "2.4"}}, receive, gone)

    with pytest.raises(Exception):  # noqa: B017 (Starlette's own)
        asyncio.run(answer())
    idle(server)
    with pytest.raises(CancelledError):
        handle.result(0)


def test_an_error_within_a_stream_is_told_in_it(server, client, monkeypatch):
    engine = server.service.engine
    run, count = engine._loop.runner.run, 0

    def failing(step):
        nonlocal count
        count += 1
        if count == 4:
            raise RuntimeError("the device is gone")
        return run(step)

    monkeypatch.setattr(engine._loop.runner, "run", failing)
    with pytest.raises(openai.APIError, match="the device is gone"):
        list(client.chat.completions.create(model="tiny:light", stream=True, **PLAIN))
    assert json.loads(client._client.get(f"{server.url}/health").text) == {"status": "ok"}
