"""What the plugin does not do, found in a server's configuration before anything is loaded."""

from typing import Any

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def check(config: Any) -> None:
    """Raises ValueError that names the first thing in vLLM's configuration that kvzip's backend cannot do.

    Args:
        config: vLLM's `VllmConfig`.
    """
    check_architecture(config.model_config)
    for reason in _reasons(config):
        if reason is not None:
            raise ValueError(f"expected a configuration that kvzip's vLLM backend supports, got {reason}")


def check_architecture(model: Any) -> None:
    """Raises ValueError unless the model's architecture is one that was made to work."""
    given = [name.removeprefix("Kvzip") for name in getattr(model.hf_config, "architectures", None) or ["none"]]
    if given[0] not in ARCHITECTURES:
        raise ValueError(
            f"expected a model of {', '.join(ARCHITECTURES)} for kvzip's vLLM backend, got {given[0]}: serve it "
            "without --attention-backend CUSTOM, or ask its documents with kvzip itself"
        )


def _reasons(config: Any) -> list[str | None]:
    model, parallel, cache, schedule = (
        getattr(config, f"{name}_config") for name in ("model", "parallel", "cache", "scheduler")
    )
    sizes = {
        "tensor": "tensor_parallel_size",
        "pipeline": "pipeline_parallel_size",
        "data": "data_parallel_size",
        "decode context": "decode_context_parallel_size",
        "prefill context": "prefill_context_parallel_size",
    }
    found: list[str | None] = [
        f"{kind} parallelism over {getattr(parallel, field)}: serve on one GPU"
        if getattr(parallel, field, 1) > 1
        else None
        for kind, field in sizes.items()
    ]
    pages = str(cache.cache_dtype)
    plain = {"auto", str(model.dtype).removeprefix("torch.")}
    windows = getattr(model.hf_text_config, "sliding_window", None)
    if getattr(model.hf_text_config, "use_sliding_window", True) is False:
        windows = None
    stored = any(getattr(model.hf_config, field, None) for field in ("quantization_config", "compression_config"))
    return [
        *found,
        f"weights that vLLM quantizes itself ({model.quantization}): leave out --quantization, or serve a checkpoint "
        "that is stored so"
        if model.quantization is not None and not stored
        else None,
        f"a revision ({model.revision}): serve the directory of a snapshot, the one that documents were made with"
        if model.revision is not None
        else None,
        "sleep mode: leave out --enable-sleep-mode, documents would not sleep" if model.enable_sleep_mode else None,
        "LoRA: leave out --enable-lora, documents belong to the base model" if config.lora_config is not None else None,
        "speculative decoding: leave out --speculative-config" if config.speculative_config is not None else None,
        f"quantized pages ({pages}): leave out --kv-cache-dtype, documents have their own bits"
        if pages not in plain
        else None,
        f"a sliding window of {windows}: no layer of this model may forget the document"
        if windows is not None
        else None,
        "a KV connector: leave out --kv-transfer-config, others would not know the pages' documents"
        if getattr(config, "kv_transfer_config", None) is not None
        else None,
        f"the runner {model.runner_type!r}: only text is generated from documents"
        if model.runner_type != "generate"
        else None,
        f"the executor {parallel.distributed_executor_backend!r}: leave out --distributed-executor-backend"
        if parallel.distributed_executor_backend not in (None, "uni")
        else None,
        f"the scheduler {schedule.scheduler_cls!r}: kvzip has its own, leave out --scheduler-cls"
        if schedule.scheduler_cls not in (None, SCHEDULER)
        else None,
        f"the worker extension {parallel.worker_extension_cls!r}: kvzip has its own, leave out --worker-extension-cls"
        if parallel.worker_extension_cls not in ("", None, EXTENSION)
        else None,
    ]


SCHEDULER, EXTENSION = "kvzip.vllm.scheduler.make_scheduler", "kvzip.vllm.worker.DocumentsExtension"
