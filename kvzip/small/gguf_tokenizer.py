"""Writes the tokenizer of a GGUF file as the content of a tokenizer.json: SmolLM2, Qwen 2 and Gemma 3."""

from collections.abc import Callable
from typing import Any

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # GGUF's token types

_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_tokenizer(metadata: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of tokenizer.json.

    Raises: ValueError if the tokenizer's way of splitting text is not one of those understood.
    """
    if metadata["tokenizer.ggml.model"] == "llama":  # SentencePiece BPE, as Gemma has it
        return _sentencepiece_tokenizer(metadata)
    split = metadata["tokenizer.ggml.pre"]
    if split not in ("qwen2", "smollm"):
        raise ValueError(f"expected tokenizer.ggml.pre 'qwen2' or 'smollm', got {split!r}: add its pre-tokenizer here")
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    in_vocabulary = {_NORMAL} if split == "qwen2" else {_NORMAL, _CONTROL, _USER_DEFINED}
    merges = [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind in in_vocabulary}
    byte_level: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False}
    if split == "qwen2":
        byte_level |= {"trim_offsets": False, "use_regex": False}
        first = {"type": "Split", "pattern": {"Regex": _QWEN_SPLIT}, "behavior": "Isolated", "invert": False}
        others = {"normalizer": {"type": "NFC"}, "post_processor": byte_level, "decoder": byte_level}
    else:
        byte_level |= {"trim_offsets": True, "use_regex": True}
        first = {"type": "Digits", "individual_digits": True}
        others = {"normalizer": None, "post_processor": None, "decoder": byte_level | {"add_prefix_space": True}}
    return _tokenizer_json(
        _bpe(vocabulary, merges),
        added_tokens=_added_tokens(tokens, types, is_special=lambda token, kind: kind == _CONTROL),
        pre_tokenizer={"type": "Sequence", "pretokenizers": [first, byte_level]},
        **others,
    )


def _sentencepiece_tokenizer(metadata: dict[str, Any]) -> dict[str, Any]:
    types, scores = metadata["tokenizer.ggml.token_type"], metadata["tokenizer.ggml.scores"]
    # llama.cpp writes tokens that are nothing but spaces with real ones
    tokens = [
        token if token.strip(" ") else token.replace(" ", "\u2581") for token in metadata["tokenizer.ggml.tokens"]
    ]
    bos_id = metadata["tokenizer.ggml.bos_token_id"]
    bos = tokens[bos_id]

    def is_special(token: str, kind: int) -> bool:
        is_plain_control = token == "<mask>" or token.startswith("<unused")
        return "_of_image>" in token or (kind == _CONTROL and not is_plain_control)

    def with_bos(sequence: str, type_id: int) -> list[dict[str, Any]]:
        return [
            {"SpecialToken": {"id": bos, "type_id": type_id}},
            {"Sequence": {"id": sequence, "type_id": type_id}},
        ]

    return _tokenizer_json(
        _bpe(
            {token: i for i, token in enumerate(tokens)},
            sentencepiece_merges(tokens, scores, types),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        ),
        added_tokens=_added_tokens(tokens, types, is_special),
        normalizer={"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        pre_tokenizer={
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        post_processor={
            "type": "TemplateProcessing",
            "single": with_bos("A", 0),
            "pair": with_bos("A", 0) + with_bos("B", 1),
            "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
        },
        decoder={
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
    )


def sentencepiece_merges(tokens: list[str], scores: list[float], types: list[int]) -> list[list[str]]:
    """Returns the BPE merges of a SentencePiece vocabulary: every split of a token into two, best token first."""
    ids = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token, score, kind in zip(tokens, scores, types, strict=True):
        if kind not in (_NORMAL, _USER_DEFINED):
            continue
        rank = 0.0 if kind == _USER_DEFINED else score
        splits = ((token[:i], token[i:]) for i in range(1, len(token)))
        known = [(left, right) for left, right in splits if left in ids and right in ids]
        merges += [(rank, left, right) for left, right in sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))]
    merges.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [[left, right] for _, left, right in merges]


def _added_tokens(tokens: list[str], types: list[int], is_special: Callable[[str, int], bool]) -> list[dict[str, Any]]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": i, "content": token, **plain, "special": is_special(token, kind)}
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]


def _bpe(vocabulary: dict[str, int], merges: list[list[str]], **changes: Any) -> dict[str, Any]:
    plain = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": merges,
    }
    return plain | changes


def _tokenizer_json(model: dict[str, Any], **parts: Any) -> dict[str, Any]:
    return {"version": "1.0", "truncation": None, "padding": None, **parts, "model": model}
