"""Token ids of a caller's texts (contexts, queries, text that follows), and checks that a model fits a cache."""

import hashlib

import torch
from jaxtyping import Int64
from torch import Tensor

from . import prompts
from .cache import DenseCache, RaggedCache
from .display import visible_line
from .models import Model
from .options import Turn

OPENING = 64  # first characters of a context, on which the prefix's last token may depend


def encode(model: Model, context: str | Int64[Tensor, " S"], turn: Turn) -> tuple[list[int], Int64[Tensor, " S"]]:
    """Returns the ids of the prefix and of the context; a text is tokenized together with the prefix.

    Raises: as `prefix_ids` and `context_ids`.
    """
    if isinstance(context, str) and strips(model, turn):
        context = context.lstrip()
    ids = context_ids(model, context, before=prefix_text(model, turn))
    return prefix_ids(model, turn, context=context[:OPENING] if isinstance(context, str) else ""), ids


def strips(model: Model, turn: Turn) -> bool:
    """Returns whether the chat template strips white space at the beginning of a context."""
    return turn.template and prompt_of(model, turn).strips


def context_ids(model: Model, context: str | Int64[Tensor, " S"], *, before: str = "") -> Int64[Tensor, " S"]:
    """Returns the token ids of a context on the CPU; a text is tokenized as it follows `before` (see `prefix_text`).

    Raises: ValueError for ids outside the vocabulary, and for texts that `prompts.encode_text` refuses.
    """
    if isinstance(context, str):
        return torch.tensor(prompts.encode_context(tokenizer_of(model), context, before=before), dtype=torch.long)
    ids = context.detach().cpu().long()
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < model.config.vocab_size:
        raise ValueError(
            f"expected token ids in [0, {model.config.vocab_size}), got {int(ids.min())} to {int(ids.max())}: "
            "encode the text with this model's tokenizer"
        )
    return ids


def digest_of(ids: Int64[Tensor, " S"]) -> str:
    """Returns the SHA-256 of token ids, which files store to identify the tokens that they belong to."""
    return hashlib.sha256(ids.contiguous().numpy().tobytes()).hexdigest()


def tokenizer_of(model: Model) -> prompts.Tokenizer:
    """Returns the model's tokenizer. Raises ValueError if its directory has none."""
    if model.tokenizer is None:
        raise ValueError(f"expected a tokenizer, got no tokenizer.json in {model.source}: add it, or pass token ids")
    return model.tokenizer


def prompt_of(model: Model, turn: Turn | None = None) -> prompts.Prompt:
    """Returns the rendered chat prompt of a turn. Raises ValueError if the model has no chat template."""
    if model.template is None:
        raise ValueError(
            f"expected a chat template, got none in {model.source}: "
            "pass chat_template= (jinja source) to load, or template=False for a base model"
        )
    turn = turn or Turn()
    return prompts.render(model.template, system=turn.system, instruction=turn.instruction)


def prefix_ids(model: Model, turn: Turn | None = None, *, context: str = "") -> list[int]:
    """Returns the ids in front of a context: the chat template's, or only BOS (if the tokenizer adds one).

    Args:
        context: the beginning of the context; the prefix's last token may depend on it (see `prompts.encode_prefix`).

    Raises: ValueError if a template is asked for and the model has none.
    """
    turn = turn or Turn()
    if turn.template:
        return prompts.encode_prefix(tokenizer_of(model), prompt_of(model, turn), context=context)
    return [] if model.tokenizer is None else list(model.tokenizer.bos_ids)


def prefix_text(model: Model, turn: Turn) -> str:
    """Returns the text of `prefix_ids`, to be passed as `before`; empty without a template."""
    return prompts.prefix_text(tokenizer_of(model), prompt_of(model, turn)) if turn.template else ""


def query_ids(model: Model, cache: DenseCache | RaggedCache, queries: list[str], *, template: bool) -> list[list[int]]:
    """Returns the ids that follow the cache's tokens to ask each query, up to where its answer begins.

    With `template` the query is appended to the user turn that is open at the end of the cache, after a blank line if
    the turn has text already, and the turn is closed.

    Raises: ValueError for a query without text, or template=True for a cache without a chat prefix.
    """
    tokenizer = tokenizer_of(model)
    for query in queries:
        prompts.check_text(query)
        if not query.strip():
            raise ValueError("expected a query with text in it, got an empty one: ask something")
    held = cache.token_ids.tolist()
    before = prompts.text_of(tokenizer, held)
    if not template:
        return [prompts.encode_text(tokenizer, query, before=before) for query in queries]
    if not cache.chat:
        raise ValueError(
            "expected a cache with a chat prefix for a chat query, got one prefilled with template=False: "
            "pass template=False here too, or prefill with the template"
        )
    prompt = prompt_of(model)
    opened = prompts.turn_opened(tokenizer, prompt, held)
    opening = prompts.QUERY_SEPARATOR if opened is None else opened
    return [prompts.encode_turn(tokenizer, opening + query.strip(), prompt.postfix, before=before) for query in queries]


def lone_query_ids(model: Model, query: str, *, template: bool, turn: Turn | None = None) -> list[int]:
    """Returns the ids of a query without a context, up to where its answer begins.

    Raises: ValueError for a query without text, or a model without a chat template unless template=False.
    """
    prompts.check_text(query)
    if not query.strip():
        raise ValueError("expected a query with text in it, got an empty one: ask something")
    turn = turn or Turn(template=template)
    if not template:
        return [*prefix_ids(model, turn), *prompts.encode_text(tokenizer_of(model), query)]
    tokenizer, prompt = tokenizer_of(model), prompt_of(model, turn)
    query = query.strip()
    asked = query + prompts.control_text(tokenizer, prompt.postfix)
    before = prompts.prefix_text(tokenizer, prompt)
    ids = prompts.encode_context(tokenizer, asked, before=before)
    return [*prompts.encode_prefix(tokenizer, prompt, context=query[:OPENING]), *ids]


def following_ids(model: Model, cache: DenseCache | RaggedCache, text: str) -> list[int]:
    """Returns the ids of a text that continues a cache's tokens."""
    tokenizer, held = tokenizer_of(model), cache.token_ids.tolist()
    if cache.chat:  # spaces at the end of a turn's opening are tokenized with the turn's text
        text = (prompts.turn_opened(tokenizer, prompt_of(model), held) or "") + text
    return prompts.encode_text(tokenizer, text, before=prompts.text_of(tokenizer, held))


def room_for_answer(model: Model, used: int) -> int:
    """Returns how many tokens the model's length leaves behind `used`. Raises ValueError if it leaves none."""
    longest = model.config.max_length
    if used >= longest:
        raise ValueError(
            f"expected room for an answer within {longest} positions (the model's length), got a context and question "
            f"of {used}: shorten it, or load the model with RoPE scaling (rope=, and max_length=)"
        )
    return longest - used


def check_length(model: Model, needed: int, what: str) -> None:
    """Raises ValueError if `needed` positions exceed the model's length."""
    if needed > model.config.max_length:
        raise ValueError(
            f"expected at most {model.config.max_length} positions (the model's length), got {needed} ({what}): "
            "shorten it, or load the model with RoPE scaling (rope=, and max_length=)"
        )


def check_belongs(model: Model, cache: DenseCache | RaggedCache) -> None:
    """Raises ValueError if a cache was made by another model, in another dtype, or has other heads than this rank."""
    check_fingerprint(model, cache.fingerprint)
    mine, its = ((x.share and (x.share.rank, x.share.size)) for x in (model, cache))
    if mine != its:
        whose = "all heads" if its is None else f"the heads of rank {its[0]} of {its[1]}"
        own = "a model in one process" if mine is None else f"rank {mine[0]} of {mine[1]}"
        raise ValueError(f"expected a cache with the heads of {own}, got {whose}: load the file with model=")


def check_whole_model(model: Model, what: str) -> None:
    """Raises ValueError where ranks share the model, for what needs all heads in one process."""
    if model.share is not None:
        raise ValueError(
            f"expected a model in one process for {what}, got rank {model.share.rank} of {model.share.size}: load it "
            "without group="
        )


def check_fingerprint(model: Model, fingerprint: str) -> None:
    """Raises ValueError if a cache was made by another model, or in another dtype."""
    if fingerprint != model.fingerprint:
        raise ValueError(
            f"expected a cache of this model (fingerprint {model.fingerprint}), got one of another "
            f"({visible_line(fingerprint)}): use the model and dtype that made it, or prefill again"
        )
