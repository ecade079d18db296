"""What requests to a vLLM server with documents become: turns, salts, settings, and what is refused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

import kvzip
import random_model
import small_checkpoint
from kvzip.inputs import query_ids
from kvzip.templates import ChatTemplate, _compiled
from kvzip.vllm import routes, turns
from kvzip.vllm.documents import salted
from kvzip.vllm.settings import Settings, name_in, path_within, settings_of


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> kvzip.Model:
    return kvzip.load(small_checkpoint.write(tmp_path_factory.mktemp("vllm") / "tiny"), device="cpu")


@pytest.fixture(scope="module")
def cache(loaded: kvzip.Model) -> kvzip.DenseCache:
    return kvzip.prefill(loaded, "The lease ends in May.")


# Turns


def written(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    return _compiled(source).render(messages=messages, add_generation_prompt=True, **options)


@pytest.mark.parametrize("ending", ["", "\n", "  \n"])
def test_a_template_without_a_document_writes_what_it_wrote(ending: str) -> None:
    source = random_model.TEMPLATE + ending
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": " q\n"}]
    assert written(turns.with_documents(source), messages) == written(source, messages)


def test_a_turn_behind_a_document_is_what_kvzip_appends(loaded: kvzip.Model, cache: kvzip.DenseCache) -> None:
    source = turns.with_documents(random_model.TEMPLATE)
    for content in ("Wer? ü 語 \"'\\ {{x}} \n", [{"type": "text", "text": "Wer?"}, {"type": "text", "text": " Und?"}]):
        text = written(source, [{"role": "user", "content": content}], kvzip_document=True)
        query = content if isinstance(content, str) else "Wer? Und?"
        ids = loaded.tokenizer.control.encode(text, add_special_tokens=False).ids
        assert ids == query_ids(loaded, cache, [query], template=True)[0]
    said = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", " b"), ("user", " c "))]
    assert written(source, said, kvzip_document=True) == (
        "\n\na<|end|><|assistant|> b<|end|><|user|>c<|end|><|assistant|>"
    )


def test_system_messages_behind_a_document_are_errors() -> None:
    source = turns.with_documents(random_model.TEMPLATE)
    with pytest.raises(Exception, match="got one of system: the document has the system prompt already"):
        written(source, [{"role": "system", "content": "s"}], kvzip_document=True)


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct"])
def test_real_templates_are_written_as_before(name: str) -> None:
    path = Path(os.environ.get("KVZIP_TEST_MODELS", "none")) / name / "tokenizer_config.json"
    if not path.exists():
        pytest.skip(f"expected {path}, a real model's: set KVZIP_TEST_MODELS")
    source = json.loads(path.read_text(encoding="utf-8"))["chat_template"]
    said = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    for messages in (said, [{"role": "system", "content": "s"}, *said]):
        both = [written(x, messages, tools=None) for x in (source, turns.with_documents(source))]
        assert both[0] == both[1]
    behind = written(turns.with_documents(source), said, kvzip_document=True)
    assert written(source, said, tools=None).endswith(behind.removeprefix("\n\n"))
    assert ChatTemplate(source).source == source


def test_a_conversation_behind_a_document_ends_with_what_is_to_be_answered() -> None:
    source = turns.with_documents(random_model.TEMPLATE)
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(Exception, match=r"expected a question at the end .* got one of assistant"):
        written(source, said, kvzip_document=True)
    with pytest.raises(Exception, match="got one of user: nothing else can follow"):
        _compiled(source).render(messages=said[:1], add_generation_prompt=False, kvzip_document=True)
    continued = _compiled(source).render(messages=said, add_generation_prompt=False, kvzip_document=True)
    assert continued == "\n\na<|end|><|assistant|>b"


def test_templates_of_one_turn_refuse_a_second() -> None:
    one = (
        "{% if messages | length > 1 + (messages[0].role == 'system') %}{{ raise_exception('one turn') }}{% endif %}"
        + random_model.TEMPLATE
    )
    said = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    source = turns.with_documents(one)
    assert written(source, said[:1], kvzip_document=True) == "\n\na<|end|><|assistant|>"
    with pytest.raises(Exception, match="expected one question behind a document, got a later turn"):
        written(source, said, kvzip_document=True)


def test_options_of_a_server_reach_the_template() -> None:
    source = random_model.TEMPLATE + "{% if add_generation_prompt and not think %}<no thought>{% endif %}"
    said = [{"role": "user", "content": "a"}]
    for options, ends in (({"think": True}, "<|assistant|>"), ({"think": False}, "<no thought>")):
        assert written(turns.with_documents(source, None, options), said, kvzip_document=True).endswith(ends)


# Settings and requests


def test_settings_are_checked() -> None:
    assert settings_of({}) == Settings() == settings_of({"other": 1, "kvzip": {}})
    given = {"documents": {"a": "x.kvz"}, "directory": "/d", "capacity": 8, "bits": 4, "bias": True}
    assert settings_of({"kvzip": given}) == Settings({"a": "x.kvz"}, "/d", 8, 4, True)
    for wrong in (
        {"bits": 5},
        {"capacity": 0},
        {"documents": ["a"]},
        {"documents": {"a/b": "x"}},
        {"bias": 1},
        {"n": 1},
    ):
        with pytest.raises(ValueError, match="expected "):
            settings_of({"kvzip": wrong})


def test_routes_load_files_of_the_directory_only(tmp_path: Path) -> None:
    assert path_within(str(tmp_path), "in/a.kvz") == tmp_path / "in/a.kvz"
    (tmp_path / "link").symlink_to("/etc")
    for file in ("../a.kvz", "/etc/passwd", "link/passwd"):
        with pytest.raises(PermissionError, match="a file within the server's directory"):
            path_within(str(tmp_path), file)
    with pytest.raises(PermissionError, match="expected a directory to load documents from, got none"):
        path_within(None, "a.kvz")


def test_requests_that_name_no_document_are_left_alone() -> None:
    assert routes._parsed(b'{"prompt": "kvzip", "vllm_xargs": {"x": 1}}').get("vllm_xargs") == {"x": 1}
    assert routes._parsed(b'{"kvzip": [') == routes._parsed(b"[]") == routes._parsed(b'["kvzip"]') == {}
    assert name_in({"x": 1}) is None and name_in(None) is None and name_in({"kvzip": "a"}) == "a"
    asked = {"prompt": "p", "add_special_tokens": True}
    assert routes._completed(asked, chat=False) == asked
    assert routes._completed({"prompt": "p"}, chat=False)["add_special_tokens"] is False


def test_salts_stand_for_one_document_and_one_salt() -> None:
    pairs = [(key, salt) for key in (None, "a", "b") for salt in (None, "", "a", "kvzip:", "|kvzip:a")]
    found = {salted(*pair) for pair in pairs}
    assert len(found) == len(pairs) and all(x.startswith("kvzip:") for x in found)
