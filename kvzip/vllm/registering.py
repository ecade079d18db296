"""What vLLM is told at start: our models, and what a configuration that chooses our backend becomes."""

import os
from typing import Any

from kvzip.vllm import interfaces as vllm
from kvzip.vllm import refusals
from kvzip.vllm.settings import KEY, settings_of

REFUSED = ("Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")
"""Refused before the engine starts, by name; what is in neither list is refused when the model is loaded."""


def register_all() -> None:
    """Registers models and configuration hooks; may be called again."""
    for architecture in refusals.ARCHITECTURES:
        vllm.ModelRegistry.register_model(f"Kvzip{architecture}", f"kvzip.vllm.models:Kvzip{architecture}")
    for architecture in (*refusals.ARCHITECTURES, *REFUSED):
        before = vllm.MODELS_CONFIG_MAP.get(architecture, vllm.VerifyAndUpdateConfig)
        if not issubclass(before, Prepared):
            hook = type(f"Kvzip{architecture}Config", (Prepared, before), {})
            vllm.MODELS_CONFIG_MAP[architecture] = hook
    if vllm.current_platform.is_cpu():  # which has one backend, whatever is asked for
        vllm.register_backend(vllm.AttentionBackendEnum.CPU_ATTN, "kvzip.vllm.host_attention.BackendOfHost")


class Prepared(vllm.VerifyAndUpdateConfig):
    """The hook of an architecture: vLLM calls it with each configuration of a model of that architecture."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        super().verify_and_update_config(vllm_config)
        if is_chosen(vllm_config):
            prepare_(vllm_config)


def is_chosen(config: Any) -> bool:
    """Returns whether a configuration chooses kvzip's backend."""
    return config.attention_config.backend == vllm.AttentionBackendEnum.CUSTOM


def prepare_(config: Any) -> None:
    """Makes a configuration use kvzip's model states, scheduler and worker methods.

    Raises: ValueError for what is not supported, and for unfit settings.
    """
    refusals.check(config)
    settings_of(config.additional_config)
    if KEY not in os.environ.get("VLLM_PLUGINS", "").split(","):
        raise ValueError(
            f"expected VLLM_PLUGINS to name kvzip for its backend, got {os.environ.get('VLLM_PLUGINS', '')!r}: set "
            "VLLM_PLUGINS=kvzip (with commas between several), or a server has no routes of kvzip, and writes chats "
            "behind a document with BOS and system prompt"
        )
    if not config.use_v2_model_runner:
        raise ValueError(
            "expected vLLM's second model runner for kvzip's backend, got the first: set VLLM_USE_V2_MODEL_RUNNER=1, "
            "or leave out the options that vLLM says it does not support"
        )
    config.model_config.hf_config.architectures = [
        name if name.startswith("Kvzip") else f"Kvzip{name}" for name in config.model_config.hf_config.architectures
    ]
    config.model_config.disable_cascade_attn = True
    config.scheduler_config.scheduler_cls = refusals.SCHEDULER
    config.parallel_config.worker_extension_cls = refusals.EXTENSION
