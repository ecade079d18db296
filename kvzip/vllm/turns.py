"""The rest of a chat turn behind a document: a chat template without BOS and system prompt, for such requests only."""

import json
from collections.abc import Mapping
from typing import Any

from kvzip.templates import QUERY_SEPARATOR, ChatTemplate, render

FLAG = "kvzip_document"
"""The variable of the template that says that a request has a document."""


def with_documents(
    source: str, tokens: Mapping[str, str] | None = None, options: Mapping[str, Any] | None = None
) -> str:
    """Returns a chat template that writes what `source` writes, and for a request with a document what follows it.

    That is a blank line, the first question, the opening of its answer, and later turns as `source` writes them: what
    `kvzip.generate` appends to a context. Messages of other roles are errors: the document has the system prompt. So
    is a conversation that ends with an answer, unless that is to be continued.

    Args:
        source: jinja source of the model's own template.
        tokens: its named tokens, such as bos_token.
        options: variables for it that hold for all requests, such as enable_thinking.

    Raises: ValueError for a template that does not write each message once, or changes what a message says.
    """
    prompt = render(ChatTemplate(source, tokens or {}, options or {}))
    blank, postfix, separator = (
        json.dumps(x, ensure_ascii=False) for x in (QUERY_SEPARATOR, prompt.postfix, prompt.separator or "")
    )
    said = "raise_exception('expected "
    later = f"{{{{- {separator} }}}}"
    if prompt.separator is None:
        later = f"{{{{- {said}one question behind a document, got a later turn: this chat template writes none') }}}}"
    rest = (
        "{%- for m in messages %}"
        "{%- if m['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}"
        f"{{{{- {said}turns of user and assistant behind a document, got one of ' ~ m['role'] ~ "
        "': the document has the system prompt already') }}{%- endif %}"
        "{%- set text = m['content'] if m['content'] is string else m['content'] | map(attribute='text') | join %}"
        "{%- if m['role'] == 'assistant' %}{{- text }}"
        f"{{%- else %}}{{%- if loop.first %}}{{{{- {blank} }}}}{{%- else %}}{later}{{%- endif %}}"
        f"{{{{- text | trim }}}}{{{{- {postfix} }}}}"
        "{%- endif %}{%- endfor %}"
        "{%- if (messages[-1]['role'] == 'user') != (add_generation_prompt | default(false)) %}"
        f"{{{{- {said}a question at the end behind a document, or an answer and continue_final_message, got one of ' ~ "
        "messages[-1]['role'] ~ ': nothing else can follow') }}{%- endif %}"
    )
    # jinja drops a newline at the end of a template, and here the end is another one
    return f"{{%- if {FLAG} is defined and {FLAG} %}}{rest}{{%- else %}}{source.removesuffix(chr(10))}{{% endif %}}"
