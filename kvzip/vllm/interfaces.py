"""Everything of vLLM that the plugin uses and vLLM does not promise to keep, found where it is when it is asked for.

Read in the wheels of 0.26.0 and 0.27.1. Beside the names of `WHERE`, the plugin uses

- `ModelState`: `add_request`, `apply_staged_writes`, `prepare_inputs`, `prepare_dummy_inputs`, `prepare_attn` and the
  fields that its constructor sets; a model brings its own class by `get_model_state_cls`;
- `InputBatch`: `idx_mapping`, `idx_mapping_np`, `num_reqs`, `num_tokens`, `num_tokens_after_padding`, `positions`,
  `query_start_loc`;
- metadata of attention: `num_actual_tokens`, `query_start_loc`, `max_query_len`, `seq_lens`, `max_seq_len`,
  `block_table`, `scheduler_metadata`, `max_num_splits`; an attribute `kvzip` is added;
- pages as [blocks, KV heads, block, 2 x width], keys in the first half of the width;
- `Scheduler`: `add_request`, `_free_request`, `has_requests`, `update_from_output`, `requests`, `vllm_config`;
- `Request`: `sampling_params`, `cache_salt`, `block_hashes`, `update_block_hashes`, `client_index`;
- `VllmConfig`: `instance_id`, the same in scheduler and worker; the fields that `refusals.py` reads; `scheduler_cls`
  and `worker_extension_cls` are set, and `architectures` of `hf_config`;
- the worker's `model_runner.model_state`, and methods of a worker that return what went wrong (`worker.py`);
- `chat_template` of the renderers in the HTTP server's `app.state` (`routes.py`).
"""

from importlib import import_module
from typing import Any

from kvzip.vllm.versions import check

WHERE = {
    "CUDAGraphMode": "vllm.config",
    "get_current_vllm_config": "vllm.config",
    "ModelRegistry": "vllm.model_executor.models",
    "MODELS_CONFIG_MAP": "vllm.model_executor.models.config",
    "VerifyAndUpdateConfig": "vllm.model_executor.models.config",
    "LlamaForCausalLM": "vllm.model_executor.models.llama",
    "MistralForCausalLM": "vllm.model_executor.models.mistral",
    "Qwen2ForCausalLM": "vllm.model_executor.models.qwen2",
    "Qwen3ForCausalLM": "vllm.model_executor.models.qwen3",
    "current_platform": "vllm.platforms",
    "AttentionBackendEnum": "vllm.v1.attention.backends.registry",
    "register_backend": "vllm.v1.attention.backends.registry",
    "CPUAttentionBackend": "vllm.v1.attention.backends.cpu_attn",
    "CPUAttentionBackendImpl": "vllm.v1.attention.backends.cpu_attn",
    "FlashAttentionBackend": "vllm.v1.attention.backends.flash_attn",
    "FlashAttentionImpl": "vllm.v1.attention.backends.flash_attn",
    "flash_attn_varlen_func": "vllm.v1.attention.backends.fa_utils",
    "merge_attn_states": "vllm.v1.attention.ops.merge_attn_states",
    "canonicalize_singleton_dim_strides": "vllm.utils.torch_utils",
    "AsyncScheduler": "vllm.v1.core.sched.async_scheduler",
    "Scheduler": "vllm.v1.core.sched.scheduler",
    "EngineCoreOutput": "vllm.v1.engine",
    "EngineCoreOutputs": "vllm.v1.engine",
    "FinishReason": "vllm.v1.engine",
    "DefaultModelState": "vllm.v1.worker.gpu.model_states.default",
}
"""The module of each name."""


def __getattr__(name: str) -> Any:
    """A name of `WHERE`, from its module. Raises ImportError for a version of vLLM that is not supported."""
    if name not in WHERE:
        raise AttributeError(name)
    check()
    return getattr(import_module(WHERE[name]), name)
