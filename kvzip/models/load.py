"""An HF directory, hub id or alias, loaded into a Model."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import prompts
from ..checks import check_path
from . import gemma, llama, mistral, qwen
from .config import ModelConfig, reject
from .transformer import Model
from .weights import fingerprint, read_weights

logger = logging.getLogger(__name__)

Translator = tuple[Callable[[Mapping[str, Any]], ModelConfig], Mapping[str, tuple[str, ...]]]

ARCHITECTURES: dict[str, Translator] = {
    "LlamaForCausalLM": (llama.translate, llama.LAYER_NAMES),
    "MistralForCausalLM": (mistral.translate, llama.LAYER_NAMES),
    "Qwen2ForCausalLM": (qwen.translate_qwen2, llama.LAYER_NAMES),
    "Qwen3ForCausalLM": (qwen.translate_qwen3, llama.LAYER_NAMES),
    "Gemma2ForCausalLM": (gemma.translate_gemma2, gemma.LAYER_NAMES),
    "Gemma3ForCausalLM": (gemma.translate_gemma3, gemma.LAYER_NAMES),
    "Gemma3ForConditionalGeneration": (gemma.translate_gemma3, gemma.LAYER_NAMES),
}

ALIASES: dict[str, str] = {
    "llama3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "llama3.0-8b": "meta-llama/Meta-Llama-3-8B-Instruct",
    "duo": "gradientai/Llama-3-8B-Instruct-Gradient-1048k",
    "llama3-8b-4m-w8a8kv4": "mit-han-lab/Llama-3-8B-Instruct-Gradient-4194k-w8a8kv4-per-channel",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct-1M",
    "qwen2.5-14b": "Qwen/Qwen2.5-14B-Instruct-1M",
    **{f"qwen3-{size}b": f"Qwen/Qwen3-{size}B" for size in ("0.6", "1.7", "4", "8", "14", "32")},
    **{f"gemma3-{size}b": f"google/gemma-3-{size}b-it" for size in ("1", "4", "12", "27")},
    **{f"gemma3-{size}b-it": f"google/gemma-3-{size}b-it" for size in ("1", "4", "12", "27")},
}

_HUB_FILES = ("*.json", "*.safetensors", "*.jinja")


def load(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device | None = None,
    rope: Mapping[str, Any] | None = None,
    max_length: int | None = None,
    chat_template: str | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> Model:
    """Returns the model of a local HF directory, a hub id, or an alias such as `qwen2.5-7b`.

    Args:
        dtype: of the weights, the activations and the caches.
        device: None takes CUDA where there is one, else the CPU.
        rope: replaces the config's RoPE scaling, in HF's form, as
            `{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}`.
        max_length: overrides the model's own limit, in tokens.
        chat_template: jinja source, for a checkpoint without one or in place of its own.
        template_options: variables for the template, as `{"enable_thinking": True}`; `date` (a datetime.date) is
            what it sees as today.

    Raises: FileNotFoundError for a missing directory or file; ValueError for an unknown name, or a config or
    weights that are not exactly understood; OSError for what the hub cannot give; ImportError for a hub id without
    the `hub` extra.
    """
    check_path(source, "source")
    directory = resolve(source)
    path = directory / "config.json"
    if not path.exists():
        raise FileNotFoundError(
            f"expected config.json in {directory}, got none: pass a directory in Hugging Face format"
        )
    raw = json.loads(path.read_text(encoding="utf-8"))
    translate, layer_names = _translator(raw)
    config = translate(_with_rope(raw, rope))
    config = replace(config, max_length=max_length or _stretched(config, rope))
    template = prompts.read_template(directory, source=chat_template, options=template_options)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    weights = read_weights(directory, config, layer_names, dtype=dtype, device=device)
    return Model(
        config=config,
        weights=weights,
        tokenizer=prompts.read_tokenizer(directory, template),
        device=device,
        dtype=dtype,
        template=template,
        stop_ids=_stop_ids(directory, raw),
        fingerprint=fingerprint(config, weights, dtype),
        source=str(source),
    )


def resolve(source: str | Path, *, only: Sequence[str] = _HUB_FILES) -> Path:
    """Returns the local directory of a source, the files `only` fetched from the hub if it is a hub id or an alias.

    Raises: FileNotFoundError, ValueError or ImportError that says what a source may be.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    name = ALIASES.get(str(source).lower(), str(source))
    if isinstance(source, Path) or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"expected a directory in Hugging Face format, got {source}: no such directory")
    if "/" not in name:
        raise ValueError(
            f"expected a directory, a hub id or an alias, got {source!r}: no such directory, and the aliases are "
            + ", ".join(ALIASES)
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            f"expected the hub extra to fetch {name}, got no huggingface_hub: pip install 'kvzip[hub]', "
            "or pass a local directory"
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=list(only)))
    except (OSError, ValueError, RuntimeError) as error:  # no network, no such name, a gated one, a full disk
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].removeprefix("Got: ")
        raise OSError(
            f"expected {name} on the hub, there being no such directory here, got {reason}: "
            "check the name, the network and the login (hf auth login)"
        ) from error


def translate_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Returns the ModelConfig of a parsed `config.json`. Raises ValueError for one that is not understood."""
    return _translator(raw)[0](raw)


def _translator(raw: Mapping[str, Any]) -> Translator:
    reject(raw, quantization_config=(None,))
    names = raw.get("architectures") or []
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    raise ValueError(
        f"expected an architecture of {sorted(ARCHITECTURES)}, got {names or raw.get('model_type')}: "
        "kvzip has no translator for it, see docs/adding_a_family.md"
    )


def _with_rope(raw: Mapping[str, Any], rope: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The config with its RoPE scaling replaced, in whichever spelling it has; the base stays unless rope gives one."""
    if rope is None:
        return raw
    if "text_config" in raw:
        return {**raw, "rope_scaling": None, "text_config": _with_rope(raw["text_config"], rope)}
    spelled = raw.get("rope_parameters")
    if not spelled:
        return {**raw, "rope_scaling": dict(rope)}
    if "full_attention" in spelled:
        theta = {"rope_theta": (spelled["full_attention"] or {}).get("rope_theta")}
        return {**raw, "rope_parameters": {**spelled, "full_attention": {**theta, **rope}}}
    return {**raw, "rope_parameters": {"rope_theta": spelled.get("rope_theta"), **rope}}


def _stretched(config: ModelConfig, rope: Mapping[str, Any] | None) -> int:
    """The length that the caller's RoPE scaling makes the model good for, or the config's own."""
    original = (rope or {}).get("original_max_position_embeddings")
    return max(config.max_length, int(original * rope["factor"])) if rope and original else config.max_length


def _stop_ids(directory: Path, raw: Mapping[str, Any]) -> tuple[int, ...]:
    generation = prompts.read_json(directory / "generation_config.json")
    stop = generation.get("eos_token_id", raw.get("eos_token_id"))
    stop = raw.get("text_config", {}).get("eos_token_id") if stop is None else stop
    return tuple(stop) if isinstance(stop, list) else () if stop is None else (stop,)
