"""The tokenizer, chat template and stop tokens of a directory, merged from its files as AutoTokenizer merges them.

Several files may describe one token; which of them counts is decided here.
Source: `PreTrainedTokenizerBase.from_pretrained` and `AutoTokenizer` of Transformers 5.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as _Tokenizer

from .. import prompts
from ..prompts import ChatTemplate, Tokenizer
from .fields import read_mapping
from .files import read_json

_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


_CLASSES = {
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "Qwen2Tokenizer": dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>"),
    "GemmaTokenizer": {f"{name}_token": f"<{name}>" for name in ("unk", "bos", "eos", "pad", "mask")},
}
"""Classes of Transformers that take only the vocabulary and the merges from tokenizer.json, and the named tokens that
they add; `_rebuilt` has the rest of them."""

_REGISTERED = {name: "Qwen2Tokenizer" for name in ("qwen2", "qwen3")} | {
    name: "GemmaTokenizer" for name in ("gemma2", "gemma3", "gemma3_text")
}
"""Model types for which Transformers takes one of those classes if the files name none."""


@dataclass(frozen=True)
class Vocabulary:
    """A directory's tokenizer and chat template; `names` are its `bos_token` and the like, which templates may use."""

    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    names: Mapping[str, str]


def read_vocabulary(
    directory: Path,
    config: Mapping[str, Any],
    *,
    rows: int | None = None,
    template: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Vocabulary:
    """Returns the vocabulary of an HF directory, `tokenizer` None where it has no tokenizer.json.

    Args:
        config: its parsed config.json.
        rows: of the embedding; encoding a text that needs a token beyond them is an error.
        template: jinja source in place of the directory's chat template.
        options: variables for the template.

    Raises: ValueError that names the file that is not understood.
    """
    settings = read_json(directory / "tokenizer_config.json")
    path = directory / "tokenizer.json"
    document = read_json(path)
    try:
        kind = _class_of(settings, config, document)
        named, extra, added = _merge(directory, settings, document, _CLASSES[kind] if kind else {})
        source = _template_source(directory, settings) if template is None else template
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            "expected tokens and a chat template as Transformers writes them in tokenizer_config.json, "
            "special_tokens_map.json, added_tokens.json, tokenizer.json, chat_template.json and chat_template.jinja of "
            f"{directory}, got {error!r}: fetch them again"
        ) from error
    names = {name: str(token.content) for name, token in named.items()}
    chat = ChatTemplate(source, tokens=names, options=dict(options or {})) if source else None
    if not path.exists():
        return Vocabulary(None, chat, names)
    try:
        raw = _rebuilt(document, kind, settings, names) if kind else _Tokenizer.from_str(json.dumps(document))
        for token in added:  # their flags count more than those in tokenizer.json
            token.special = token.special or token.content in names.values()
        raw.add_tokens(added)
        known = {token.content for token in raw.get_added_tokens_decoder().values()}
        raw.add_tokens([token for token in [*named.values(), *extra] if token.content not in known])
    except Exception as error:  # `tokenizers` raises no type of its own
        raise ValueError(
            f"expected a tokenizer in {path}, got one that cannot be built ({error}): fetch it again"
        ) from error
    raw.no_truncation()  # a file may keep how texts were cut and padded for training
    raw.no_padding()
    return Vocabulary(prompts.make_tokenizer(raw, template=chat, rows=rows), chat, names)


def stop_ids(directory: Path, config: Mapping[str, Any], vocabulary: Vocabulary) -> tuple[int, ...]:
    """Returns every token that ends an answer: those of generation_config.json and of config.json, the tokenizer's end
    of sequence, and what the chat template puts after an answer.

    Transformers takes only the first file that names one. Some fine-tunes keep the generation_config.json of their base
    model, and there an answer would run past the end of its turn.

    Raises: ValueError for an end that is no token id, or a text_config that is no object.
    """
    found: list[int | None] = []
    generation = read_json(directory / "generation_config.json")
    text = read_mapping(config, "text_config")
    for name, raw in (("generation_config", generation), ("config", config), ("config", text)):
        ends = raw.get("eos_token_id")
        for end in ends if isinstance(ends, list) else [ends]:
            if end is not None and (type(end) is not int or end < 0):
                raise ValueError(f"expected eos_token_id of {directory / name}.json to be token ids, got {end!r}")
            found.append(end)
    if vocabulary.tokenizer is not None:
        found.append(vocabulary.tokenizer.control.token_to_id(vocabulary.names.get("eos_token", "")))
        found += prompts.turn_end(vocabulary.tokenizer, vocabulary.template)
    return tuple(end for end in dict.fromkeys(found) if end is not None)


def _class_of(settings: Mapping[str, Any], config: Mapping[str, Any], document: Mapping[str, Any]) -> str | None:
    """The class of `_CLASSES` that Transformers would take; None for one that takes tokenizer.json as it is."""
    declared, kind = settings.get("tokenizer_class") or config.get("tokenizer_class"), config.get("model_type")
    declared = declared.removesuffix("Fast") if isinstance(declared, str) else None
    if kind == "qwen2" or declared is None:
        declared = _REGISTERED.get(str(kind))
    pipeline = [document.get(part) for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder")]
    if kind == "mistral" or (declared == "LlamaTokenizer" and '"ByteLevel"' in json.dumps(pipeline)):
        return None
    is_bpe = (document.get("model") or {}).get("type") == "BPE"
    return declared if is_bpe and declared in _CLASSES else None


def _merge(
    directory: Path, settings: Mapping[str, Any], document: Mapping[str, Any], defaults: Mapping[str, str]
) -> tuple[dict[str, AddedToken], list[AddedToken], list[AddedToken]]:
    """Named tokens, further special tokens, and added tokens in the order of their ids."""
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    named: dict[str, Any] = dict(defaults) | _named(settings)
    # other names than the standard ones come last
    own = {name: named.pop(name) for name in [*named] if name not in _NAMES and isinstance(named[name], str)}
    if isinstance(extra, Mapping):
        own, extra = own | dict(extra), settings.get("additional_special_tokens") or []
    listed = "added_tokens_decoder" in settings  # then the two older files are not read
    if not listed:
        special = read_json(directory / "special_tokens_map.json")
        named |= _named(special)
        more = special.get("extra_special_tokens")
        if isinstance(more, Mapping):
            own |= dict(more)
        else:
            extra = [*extra, *more] if more else extra or special.get("additional_special_tokens") or []
    named |= own
    order = [*_NAMES, *(name for name in named if name not in _NAMES)]
    tokens = {name: _token(named[name], special=True) for name in order if named.get(name) is not None}
    further = [_token(token, special=True) for token in extra]
    by_id: dict[int, AddedToken] = {}
    if listed:
        by_id = {int(index): _token(token) for index, token in settings["added_tokens_decoder"].items()}
    else:
        special = {token.content for token in [*tokens.values(), *further]}
        for content, index in read_json(directory / "added_tokens.json").items():
            by_id[int(index)] = AddedToken(content, normalized=content not in special, special=content in special)
        by_id |= {int(token["id"]): _token(token) for token in document.get("added_tokens") or []}
    return tokens, further, [by_id[index] for index in sorted(by_id)]


def _named(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in raw.items()
        if key in _NAMES or (key.endswith("_token") and isinstance(value, (str, Mapping)))
    }


def _token(raw: Any, *, special: bool = False) -> AddedToken:
    """A token that a file writes as text or as its content and flags."""
    if isinstance(raw, str):
        return AddedToken(raw, special=special, normalized=not special)
    flags = {flag: bool(raw[flag]) for flag in _FLAGS if flag in raw}
    return AddedToken(raw["content"], **flags | ({"special": True} if special else {}))


def _rebuilt(
    document: Mapping[str, Any], kind: str, settings: Mapping[str, Any], names: Mapping[str, str]
) -> _Tokenizer:
    """A tokenizer of the file's vocabulary and merges that cuts and joins text as a class of Transformers does."""
    flags = dict.fromkeys(("byte_fallback", "fuse_unk"), kind != "Qwen2Tokenizer")
    flags |= {"unk_token": names.get("unk_token") if kind == "GemmaTokenizer" else None, "ignore_merges": False}
    flags |= dict.fromkeys(("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
    bare = {**document, "model": {**document["model"], **flags}, "added_tokens": []}
    raw = _Tokenizer.from_str(json.dumps(bare | {"normalizer": None, "pre_tokenizer": None}))
    prefix = settings.get("add_prefix_space")  # null is true to Llama, false to Qwen
    spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind == "LlamaTokenizer":
        prefixed = prefix is None or bool(prefix)
        scheme = "never" if not prefixed else "always" if settings.get("legacy") else "first"
        raw.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
        raw.decoder = decoders.Sequence([*spaces, decoders.Strip(" ", 1, 0)] if prefixed else spaces)
    elif kind == "GemmaTokenizer":
        raw.normalizer = normalizers.Replace(" ", "▁")
        raw.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
        raw.decoder = decoders.Sequence(spaces)
    else:
        words = pre_tokenizers.Split(Regex(_QWEN_WORDS), behavior="isolated")
        letters = pre_tokenizers.ByteLevel(add_prefix_space=bool(prefix), use_regex=False)
        raw.normalizer = normalizers.NFC()
        raw.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
        raw.decoder = decoders.ByteLevel()
    return raw


def _template_source(directory: Path, settings: Mapping[str, Any]) -> str | None:
    """The default chat template. A file of its own counts more than tokenizer_config.json."""
    named = directory / "additional_chat_templates"
    path = named / "default.jinja" if (named / "default.jinja").exists() else directory / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    if any(named.glob("*.jinja")):
        return None  # named templates, none of which is the default
    source = settings.get("chat_template")
    if isinstance(source, list):  # several named templates
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    if isinstance(source, Mapping):
        source = source.get("default")
    source = source if source is not None else read_json(directory / "chat_template.json").get("chat_template")
    if source is not None and not isinstance(source, str):
        raise TypeError(f"a chat template of type {type(source).__name__}")
    return source
