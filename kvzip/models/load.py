"""An HF directory, hub id or alias, loaded into a Model."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from ..checks import check_choice, check_dtype, check_mapping, check_path, check_text
from ..hub import config_of, resolve
from ..parallel import Share, everyone, make_sum
from . import gemma, llama, qwen
from .config import ModelConfig, check_integer
from .division import divided, own_head, share_in
from .fields import reject
from .files import read_json, weight_files
from .identity import StoredTensor
from .quantization import read_quantization
from .reading import read_weights, stored_tensors, stored_weights
from .schemes import Scheme
from .stacks import Reading
from .transformer import Model
from .vocabulary import read_vocabulary, stop_ids

Translator = Callable[[Mapping[str, Any], Mapping[str, Any] | None], ModelConfig]
Family = tuple[Translator, Mapping[str, tuple[str, ...]], tuple[str, ...]]

FAMILIES: dict[str, Family] = {
    "llama": (llama.translate_llama, llama.LAYER_NAMES, ("LlamaForCausalLM", "LlamaModel")),
    "mistral": (llama.translate_mistral, llama.LAYER_NAMES, ("MistralForCausalLM", "MistralModel")),
    "qwen2": (qwen.translate_qwen2, llama.LAYER_NAMES, ("Qwen2ForCausalLM", "Qwen2Model")),
    "qwen3": (qwen.translate_qwen3, llama.LAYER_NAMES, ("Qwen3ForCausalLM", "Qwen3Model")),
    "gemma2": (gemma.translate_gemma2, gemma.LAYER_NAMES, ("Gemma2ForCausalLM", "Gemma2Model")),
    "gemma3_text": (gemma.translate_gemma3_text, gemma.LAYER_NAMES, ("Gemma3ForCausalLM", "Gemma3TextModel")),
    "gemma3": (gemma.translate_gemma3, gemma.LAYER_NAMES, ("Gemma3ForConditionalGeneration", "Gemma3Model")),
}
"""`model_type` of config.json -> how the config is read, the tensors' names, and the names in `architectures`."""

FORMS = {"fp8": "e4m3", "int8": "int8", "int4": "int4"}
"""What `weights` of `load` may be -> the kind of the codes."""


def load(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device | None = None,
    rope: Mapping[str, Any] | Any = None,  # Any: a file's values are checked here, with our message
    max_length: int | Any = None,
    weights: str | Any = None,
    head_weights: str | Any = None,
    activations: str | Any = None,
    chat_template: str | None = None,
    template_options: Mapping[str, Any] | None = None,
    group: Any = None,
) -> Model:
    """Returns the model of a local HF directory, a hub id, or an alias such as `qwen2.5-7b`.

    Args:
        dtype: of the weights, the activations and the caches.
        device: None takes CUDA where there is one, else the CPU.
        rope: replaces the config's RoPE scaling, in HF's form, as
            `{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}`.
        max_length: overrides the model's own limit, in tokens.
        weights: "fp8", "int8" or "int4" rounds the linear layers of a 16-bit checkpoint while it is read, all but
            embedding and head; see `ops.quantize_weight`. None takes them as they are stored: a quantized checkpoint
            (fp8, fbgemm_fp8, compressed-tensors, awq, gptq, QServe's W8A8) stays in its 8 or 4 bits.
        head_weights: "fp8", "int8" or "int4" rounds a head of 16 bits too, and the embedding where it is tied to the
            head; also where the checkpoint's other layers are quantized.
        activations: "checkpoint" rounds the inputs of linear layers to 8 bits too, where a quantized checkpoint says
            how; None leaves them in `dtype`.
        chat_template: jinja source, for a checkpoint without one or in place of its own.
        template_options: variables for the template, as `{"enable_thinking": True}`; `date` (a datetime.date) is
            today's date to it.
        group: a torch.distributed process group whose ranks share the model (tensor parallel): each calls `load`, reads
            its part of the weights, and then makes the same calls with the same arguments; see docs/parallel.md.

    Raises: FileNotFoundError for a missing directory or file; ValueError for an unknown name, or a config or
    weights that are not exactly understood; OSError for what the hub cannot give; ImportError for a hub id without
    huggingface_hub; TypeError for options of another kind.
    """
    check_path(source, "source")
    check_dtype(dtype)
    check_text(chat_template, "chat_template")
    check_mapping(template_options, "template_options")
    check_choice(weights, "weights", tuple(FORMS))
    check_choice(head_weights, "head_weights", tuple(FORMS))
    check_choice(activations, "activations", ("checkpoint",))
    directory = resolve(source)
    raw = read_json(config_of(directory))
    translate, layer_names, _ = _family(raw)
    quantization = read_quantization(raw)
    if rope is not None and not (isinstance(rope, Mapping) and all(isinstance(key, str) for key in rope)):
        raise ValueError(
            f"expected rope to be None or a dict in Hugging Face's form, got {str(rope)[:80]!r}: "
            "pass for example {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 32768}"
        )
    config = translate(raw, rope)
    if max_length is not None:
        config = replace(config, max_length=check_integer("max_length", max_length, where="load"))
    if all(spec.window is not None for spec in config.layers):
        raise ValueError(
            f"expected a layer without a window, got sliding_window {config.layers[0].window} in all "
            f"{len(config.layers)} layers of config.json: no layer of such a model remembers a long context"
        )
    share = share_in(config, group)
    files = weight_files(directory, raw.get("transformers_weights"))
    vocabulary = read_vocabulary(
        directory, raw, rows=config.vocab_size, template=chat_template, options=template_options
    )
    ends = stop_ids(directory, raw, vocabulary)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    device = torch.empty(0, device=device).device  # "cuda" is the device current now, whichever will be later
    kinds = FORMS.get(weights), FORMS.get(head_weights)
    reading = Reading(dtype, device, *kinds, round_inputs=activations is not None, share=share)
    tensors, checkpoint = read_weights(files, config, layer_names, reading=reading, quantization=quantization)
    config = replace(config, tied=tensors.unembed is tensors.embed)
    if share is not None and config.tied:
        tensors = replace(tensors, unembed=own_head(tensors.embed, share))
    model = Model(
        config=divided(config, share),
        weights=tensors,
        tokenizer=vocabulary.tokenizer,
        device=device,
        dtype=dtype,
        template=vocabulary.template,
        stop_ids=ends,
        checkpoint=checkpoint,
        source=str(source),
        rope=None if rope is None else dict(rope),
        max_length=None if max_length is None else config.max_length,
        quantized=weights,
        quantized_head=head_weights,
        activations=activations,
        form="" if quantization is None else quantization.form(rounds_inputs=activations is not None),
        share=share,
        whole=config,
        add=None
        if share is None
        else make_sum(share, device=device, dtype=dtype, how=os.environ.get("KVZIP_REDUCTION")),
    )
    if share is not None:
        _check_alike(share, model)
    return model


def _check_alike(share: Share, model: Model) -> None:
    """Raises ValueError if ranks have loaded different models: each would compute its part of another one."""
    tokenizer = None if model.tokenizer is None else sha256(model.tokenizer.control.to_str().encode()).hexdigest()
    told = {
        "weights": model.checkpoint,
        "config, dtype and form of weights": model.fingerprint,
        "tokenizer": tokenizer,
        "chat template": repr(model.template),
        "ends of answers": sorted(model.stop_ids),
        "max_length": model.max_length,
    }
    found = everyone(share, told)
    for name in told:
        other = next((rank for rank, each in enumerate(found) if each[name] != found[0][name]), None)
        if other is not None:
            raise ValueError(
                f"expected the same {name} on all ranks, got others on rank {other}: the model's files, and how it is "
                "loaded, must be the same in every process and on every machine"
            )


def translate_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Returns the ModelConfig of a parsed `config.json`. Raises ValueError for one that is not understood."""
    read_quantization(raw)
    return _family(raw)[0](raw, None)


def stored_checkpoint(directory: Path, raw: Mapping[str, Any]) -> Iterator[StoredTensor]:
    """Yields the tensors of a local checkpoint with that `config.json` of which its digest is made.

    Each can be read until the next is asked for.

    Raises: FileNotFoundError where there are no safetensors files; ValueError for what `load` refuses by name or shape.
    """
    translate, layer_names, _ = _family(raw)
    files = weight_files(directory, raw.get("transformers_weights"))
    return stored_tensors(files, translate(raw, None), layer_names, quantization=read_quantization(raw))


def stored_schemes(directory: Path, raw: Mapping[str, Any], dtype: torch.dtype) -> tuple[dict[str, Scheme], int]:
    """Returns how the quantized matrices of a local checkpoint are stored, and the bytes of all its weights in `dtype`.

    Raises: as `stored_checkpoint`.
    """
    translate, layer_names, _ = _family(raw)
    files = weight_files(directory, raw.get("transformers_weights"))
    return stored_weights(files, translate(raw, None), layer_names, dtype, quantization=read_quantization(raw))


def _family(raw: Mapping[str, Any]) -> Family:
    """The family of a config, by `model_type` as in Transformers, or by `architectures` where that is absent."""
    reject(raw, per_layer_config=(None, {}), is_causal=(None, True))
    names, kind = raw.get("architectures"), raw.get("model_type")
    names = [] if names is None else names if isinstance(names, list) else [names]
    known = [key for key, (_, _, own) in FAMILIES.items() if any(name in own for name in names)]
    if known or (not names and kind is not None):
        kind = known[0] if kind is None else kind
        if isinstance(kind, str) and kind in FAMILIES:
            return FAMILIES[kind]
        raise ValueError(
            f"expected model_type in config.json to be one of {sorted(FAMILIES)}, got {str(kind)[:80]!r}: "
            "kvzip has no translator for it, see docs/adding_a_family.md"
        )
    choices = [own[0] for _, _, own in FAMILIES.values()]
    raise ValueError(
        f"expected an architecture of {choices} in architectures of config.json, got "
        f"{str(names or None)[:200]}: kvzip has no translator for it, see docs/adding_a_family.md"
    )
