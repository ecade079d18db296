"""The rest of a chat turn behind a document: a chat template without BOS and system prompt, for such requests only."""

import json

from kvzip.templates import QUERY_SEPARATOR, ChatTemplate, render

FLAG = "kvzip_document"
"""The variable of the template that says that a request has a document."""


def with_documents(source: str, tokens: dict[str, str] | None = None) -> str:
    """Returns a chat template that writes what `source` writes, and for a request with a document what follows it.

    That is a blank line, the first question, the opening of its answer, and later turns as `source` writes them: what
    `kvzip.generate` appends to a context. Messages of other roles are errors: the document has the system prompt.

    Args:
        source: jinja source of the model's own template.
        tokens: its named tokens, such as bos_token.

    Raises: ValueError for a template that does not write each message once, or changes what a message says.
    """
    prompt = render(ChatTemplate(source, tokens or {}))
    blank, postfix, separator = (
        json.dumps(x, ensure_ascii=False) for x in (QUERY_SEPARATOR, prompt.postfix, prompt.separator or "")
    )
    rest = (
        "{%- for m in messages %}"
        "{%- if m['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}"
        "{{- raise_exception('expected turns of user and assistant behind a document, got one of ' ~ m['role'] ~ "
        "': the document has the system prompt already') }}{%- endif %}"
        "{%- set text = m['content'] if m['content'] is string else m['content'] | map(attribute='text') | join %}"
        "{%- if m['role'] == 'assistant' %}{{- text }}"
        f"{{%- else %}}{{{{- {blank} if loop.first else {separator} }}}}{{{{- text | trim }}}}{{{{- {postfix} }}}}"
        "{%- endif %}{%- endfor %}"
    )
    # jinja drops a newline at the end of a template, and here the end is another one
    return f"{{%- if {FLAG} is defined and {FLAG} %}}{rest}{{%- else %}}{source.removesuffix(chr(10))}{{% endif %}}"
