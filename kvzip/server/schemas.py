"""What requests and answers look like, as pydantic checks them."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


class _Strict(BaseModel):
    """Unknown fields are errors: an option that is silently ignored gives an answer that nobody asked for."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Part(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None
    refusal: None = None

    @property
    def text(self) -> str:
        """What it says."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(_Strict):
    """What a stream has besides the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


def _whole(value: Any) -> Any:
    """Numbers of JSON are whole if their value is: some clients have only floating ones."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


_Int = Annotated[int, BeforeValidator(_whole)]


class ChatRequest(_Strict):
    """A request of `/v1/chat/completions`.

    Fields that may have one value alone are there so that clients may send it; the last six say nothing about the
    answer and are not read. A number is no text or truth.
    """

    model_config = ConfigDict(strict=True)

    model: str = Field(description="The model, or `model:document`.")
    messages: list[Message] = Field(min_length=1, max_length=10_000)
    document: str | None = Field(default=None, description="A document's id, in place of the one in `model`.")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: _Int | None = Field(default=None, ge=1, le=2**31)
    max_completion_tokens: _Int | None = Field(default=None, ge=1, le=2**31)
    temperature: float | None = Field(default=1.0, ge=0, le=100)
    top_p: float | None = Field(default=1.0, gt=0, le=1)
    seed: _Int | None = Field(default=None, ge=-(2**63), le=2**64 - 1)
    stop: str | list[str] | None = Field(default=None)
    n: _Int | None = Field(default=1, ge=1, le=128, description="1: one answer a request.")
    logprobs: bool | None = Field(default=False, description="Not supported.")
    top_logprobs: _Int | None = Field(default=None, ge=0, le=20, description="Not supported.")
    tools: list[dict[str, Any]] | None = Field(default=None, description="Not supported.")
    tool_choice: str | dict[str, Any] | None = Field(default=None, description="Not supported.")
    response_format: dict[str, Any] | None = Field(default=None, description='{"type": "text"} alone.')
    repetition_penalty: float | None = Field(default=1.0, ge=1, le=100, description="1: none. Ours; others have two.")
    frequency_penalty: float | None = Field(default=0.0, description="0: no penalties.")
    presence_penalty: float | None = Field(default=0.0, description="0: no penalties.")
    logit_bias: dict[str, float] | None = Field(default=None, description="Not supported.")
    parallel_tool_calls: bool | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


_Width = Literal[8, 4, 2]


def _numbers(value: Any) -> Any:
    """Bits in a query come as text: a number, or two with a comma between them. Raises ValueError for anything else."""
    if isinstance(value, str) and re.fullmatch(r"[842](\s*,\s*[842])?", value):
        return int(value) if len(value) == 1 else (int(value[0]), int(value[-1]))
    pair = value if isinstance(value, (list, tuple)) else (value, value)
    if value is not None and (len(pair) != 2 or any(type(x) is not int or x not in (8, 4, 2) for x in pair)):
        raise ValueError(
            "expected 8, 4 or 2 bits, or two of these for keys and values, as [4, 2] in JSON and 4,2 in a query"
        )
    return value


def _is_text(text: str) -> str:
    if "\0" in text or text.lstrip("\ufeff \t\r\n").startswith("%PDF-"):
        raise ValueError("expected text, got a file of something else: send the text of it")
    if not text.strip():
        raise ValueError("expected a document with text in it, got blanks alone")
    return text


class DocumentRequest(_Strict):
    """A document to compress."""

    text: Annotated[str, AfterValidator(_is_text)] = Field(min_length=1)
    title: str | None = Field(default=None, max_length=300)
    ratio: float = Field(default=0.3, gt=0, le=1, description="Fraction of pairs kept.")
    bits: Annotated[_Width | tuple[_Width, _Width] | None, BeforeValidator(_numbers)] = Field(
        default=None, description="Bits of what is kept, or of keys and of values; null: those of the model."
    )
    refit: bool = Field(default=False, description="Fit what is kept to what is dropped.")
    system: str | None = None
    instruction: str | None = Field(default=None, description="Opens the user turn, before the document.")


class Document(BaseModel):
    """A document as the server knows it."""

    id: str
    object: Literal["document"] = "document"
    status: Literal["queued", "compressing", "ready", "failed"]
    progress: float = Field(ge=0, le=1)
    title: str
    created: int
    tokens: int | None = None
    bytes: int | None = None
    where: Literal["device", "host", "disk"] | None = None
    error: str | None = None


class DocumentList(BaseModel):
    """All documents."""

    object: Literal["list"] = "list"
    data: list[Document]


class Deleted(BaseModel):
    """A document that is gone."""

    id: str
    object: Literal["document"] = "document"
    deleted: bool = True


class ModelEntry(BaseModel):
    """A name that requests may give as `model`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "kvzip"


class ModelList(BaseModel):
    """All names that requests may give as `model`."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """An error as OpenAI's clients read it."""

    error: ErrorBody


class ReplyMessage(BaseModel):
    """What the assistant says."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """The answer."""

    index: int = 0
    message: ReplyMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class PromptDetails(BaseModel):
    """Of the prompt's tokens, those of the document, which no request reads again."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class ChatResponse(BaseModel):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
