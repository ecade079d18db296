"""Prompts, split around the context, against what Transformers' `apply_chat_template` renders from the same template.

The templates in `chat_templates/` render text conversations as those of the published checkpoints do; what they do
about tools and images is left out.
"""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from kvzip import prompts, templates
from kvzip.models.vocabulary import read_vocabulary
from kvzip.prompts import ChatTemplate, Prompt

TEMPLATES = Path(__file__).parent / "chat_templates"
TOKENS = {
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "llama3.1": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "llama3.2": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "qwen2.5": {"eos_token": "<|im_end|>"},
    "qwen3": {"eos_token": "<|im_end|>"},
    "gemma2": {"bos_token": "<bos>", "eos_token": "<eos>"},
    "gemma3": {"bos_token": "<bos>", "eos_token": "<eos>"},
    "smollm2": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
    "mistral": {"bos_token": "<s>", "eos_token": "</s>"},
}
WITH_SYSTEM = [name for name in TOKENS if name not in ("gemma2", "mistral")]

CONTEXT = 'A report.\n\n  "It {{ended}} well", <she> said & left.\n{% raw %}'
SYSTEM = "You answer in one word."
INSTRUCTION = "Read the report."
QUERY, ANSWER, NEXT = "Who said it?", "She did.", "When?"
DAY = datetime.date(2025, 3, 9)


def template(name: str, **options: Any) -> ChatTemplate:
    source = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return ChatTemplate(source=source, tokens=TOKENS[name], options=options)


def transformers_text(name: str, *messages: tuple[str, str], **variables: Any) -> str:
    """The conversation as Transformers renders it, with thinking off and the date that kvzip pins."""
    vocabulary = Tokenizer(WordLevel({"?": 0}, unk_token="?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, **TOKENS[name])
    chat = [{"role": role, "content": content} for role, content in messages]
    pinned = {"enable_thinking": False, "date_string": "26 Jul 2024", **variables}
    source = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return tokenizer.apply_chat_template(
        chat, chat_template=source, tokenize=False, add_generation_prompt=True, **pinned
    )


def first_turn(prompt: Prompt) -> str:
    return prompt.prefix + CONTEXT + prompts.QUERY_SEPARATOR + QUERY + prompt.postfix


@pytest.mark.parametrize("name", TOKENS)
def test_one_turn_equals_what_transformers_renders(name: str) -> None:
    expected = transformers_text(name, ("user", f"{CONTEXT}\n\n{QUERY}"))
    assert first_turn(prompts.render(template(name))) == expected


@pytest.mark.parametrize("name", WITH_SYSTEM)
def test_one_turn_with_a_system_message_equals_what_transformers_renders(name: str) -> None:
    expected = transformers_text(name, ("system", SYSTEM), ("user", f"{CONTEXT}\n\n{QUERY}"))
    assert first_turn(prompts.render(template(name), system=SYSTEM)) == expected


@pytest.mark.parametrize("name", TOKENS)
def test_an_instruction_opens_the_user_turn(name: str) -> None:
    expected = transformers_text(name, ("user", f"{INSTRUCTION}\n\n{CONTEXT}\n\n{QUERY}"))
    assert first_turn(prompts.render(template(name), instruction=INSTRUCTION)) == expected


@pytest.mark.parametrize("name", WITH_SYSTEM)
def test_system_and_instruction_go_together(name: str) -> None:
    expected = transformers_text(name, ("system", SYSTEM), ("user", f"{INSTRUCTION}\n\n{CONTEXT}\n\n{QUERY}"))
    prompt = prompts.render(template(name), system=SYSTEM, instruction=INSTRUCTION)
    assert first_turn(prompt) == expected
    assert prompt.prefix_parts[1] == SYSTEM  # apart from template text, so that it is encoded as plain characters
    assert prompt.prefix_parts[3].strip() == INSTRUCTION


@pytest.mark.parametrize("name", TOKENS)
def test_two_turns_equal_what_transformers_renders(name: str) -> None:
    prompt = prompts.render(template(name))
    ours = first_turn(prompt) + ANSWER + prompt.separator + NEXT + prompt.postfix
    expected = transformers_text(name, ("user", f"{CONTEXT}\n\n{QUERY}"), ("assistant", ANSWER), ("user", NEXT))
    if name == "qwen3":  # what was generated stays in the cache: the empty thought that opened the first answer too
        ours = ours.replace("<think>\n\n</think>\n\n" + ANSWER, ANSWER)
    if name == "mistral":  # puts a space before an answer, which the model is left to write itself
        ours = ours.replace("[/INST]" + ANSWER, "[/INST] " + ANSWER)
    assert ours == expected


@pytest.mark.parametrize("name", WITH_SYSTEM)
def test_two_turns_with_a_system_message_equal_what_transformers_renders(name: str) -> None:
    prompt = prompts.render(template(name), system=SYSTEM)
    ours = first_turn(prompt) + ANSWER + prompt.separator + NEXT + prompt.postfix
    expected = transformers_text(
        name, ("system", SYSTEM), ("user", f"{CONTEXT}\n\n{QUERY}"), ("assistant", ANSWER), ("user", NEXT)
    )
    if name == "qwen3":
        ours = ours.replace("<think>\n\n</think>\n\n" + ANSWER, ANSWER)
    assert ours == expected


def test_qwen3_thinks_only_when_asked() -> None:
    off, on = prompts.render(template("qwen3")), prompts.render(template("qwen3", enable_thinking=True))
    assert off.postfix == "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert on.postfix == "<|im_end|>\n<|im_start|>assistant\n"
    assert first_turn(on) == transformers_text("qwen3", ("user", f"{CONTEXT}\n\n{QUERY}"), enable_thinking=True)


def test_qwen3_with_thinking_on_has_valid_later_turns() -> None:
    prompt = prompts.render(template("qwen3", enable_thinking=True))
    ours = first_turn(prompt) + ANSWER + prompt.separator + NEXT + prompt.postfix
    assert ours == transformers_text(
        "qwen3", ("user", f"{CONTEXT}\n\n{QUERY}"), ("assistant", ANSWER), ("user", NEXT), enable_thinking=True
    )


@pytest.mark.parametrize("name", ["llama3.1", "llama3.2"])
def test_the_date_is_pinned_unless_given(name: str) -> None:
    prefix = prompts.render(template(name)).prefix
    assert "Today Date: 26 Jul 2024\n" in prefix
    assert str(datetime.date.today().year) not in prefix
    given = prompts.render(template(name, date_string="01 Feb 2023"))
    assert first_turn(given) == transformers_text(name, ("user", f"{CONTEXT}\n\n{QUERY}"), date_string="01 Feb 2023")


def test_a_date_given_is_today_to_the_template() -> None:
    given = prompts.render(template("llama3.2", date=DAY))
    assert "Today Date: 09 Mar 2025\n" in given.prefix
    assert first_turn(given) == transformers_text(
        "llama3.2", ("user", f"{CONTEXT}\n\n{QUERY}"), date_string="09 Mar 2025"
    )


def test_a_template_that_refuses_a_system_message_says_so() -> None:
    with pytest.raises(ValueError, match=r"got System role not supported: leave out system="):
        prompts.render(template("gemma2"), system=SYSTEM)


def test_a_template_that_drops_the_user_text_is_refused() -> None:
    with pytest.raises(ValueError, match=r"each message once, got 'context' 0 times"):
        prompts.render(ChatTemplate("{{ messages[0].role }}"))


def test_a_template_runs_once_for_all_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it writes does not depend on the texts, so that only a system message makes it run again."""
    chat, runs, write = template("llama3.2"), [], templates._write

    def counted(chat: ChatTemplate, messages: list[dict[str, str]]) -> str:
        runs.append(len(messages))
        return write(chat, messages)

    monkeypatch.setattr(templates, "_write", counted)
    first = prompts.render(chat)
    assert [prompts.render(chat), prompts.render(chat, instruction="Read.").postfix] == [first, first.postfix]
    assert runs == [1, 1, 3]
    one, other = (prompts.render(chat, system=text) for text in ("One.", "Other."))
    assert one.prefix.replace("One.", "Other.") == other.prefix != first.prefix
    assert runs == [1, 1, 3, 2, 2, 4]
    prompts.render(template("llama3.2", date_string="1 May 2020"))
    assert len(runs) == 9, "another template's options are its own"


# ---- where a directory keeps its template


def write(directory: Path, **config: Any) -> Path:
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def read(directory: Path) -> ChatTemplate | None:
    return read_vocabulary(directory, {}).template


def test_template_and_tokens_are_read_from_tokenizer_config(tmp_path: Path) -> None:
    source = (TEMPLATES / "gemma3.jinja").read_text()
    bos = {"__type": "AddedToken", "content": "<bos>", "lstrip": False}
    found = read(write(tmp_path, chat_template=source, bos_token=bos, eos_token="<eos>", pad_token=None))
    assert found is not None
    assert found.source == source
    assert found.tokens == {"bos_token": "<bos>", "eos_token": "<eos>"}


def test_a_template_file_of_its_own_comes_first(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{ 'mine' }}")
    found = read(write(tmp_path, chat_template="{{ 'other' }}", bos_token="<s>"))
    assert found is not None
    assert (found.source, found.tokens) == ("{{ 'mine' }}", {"bos_token": "<s>"})


def test_the_default_of_several_named_templates_is_taken(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "{{ 'tool' }}"}, {"name": "default", "template": "{{ 'plain' }}"}]
    found = read(write(tmp_path, chat_template=named))
    assert found is not None
    assert found.source == "{{ 'plain' }}"


def test_a_template_in_json_is_found(tmp_path: Path) -> None:
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ 'json' }}"}))
    found = read(write(tmp_path, bos_token="<s>"))
    assert found is not None
    assert found.source == "{{ 'json' }}"


def test_a_directory_without_a_template_has_none(tmp_path: Path) -> None:
    assert read(tmp_path) is None
    assert read(write(tmp_path, bos_token="<s>", chat_template=None)) is None
