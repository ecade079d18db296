"""Everything of vLLM that the plugin uses and vLLM does not promise to keep. Importing this checks the version.

Read in the wheels of 0.26.0 and 0.27.1. Beside the names imported here, the plugin uses:

| where | what |
|---|---|
| `ModelState` | `add_request`, `apply_staged_writes`, `prepare_inputs`, `prepare_dummy_inputs`, `prepare_attn`, and the fields that its constructor sets; a model gives its own class by `get_model_state_cls` |
| `InputBatch` | `idx_mapping`, `idx_mapping_np`, `num_reqs`, `num_tokens`, `num_tokens_after_padding`, `positions`, `query_start_loc` |
| attention metadata | `num_actual_tokens`, `query_start_loc`, `max_query_len`, `seq_lens`, `max_seq_len`, `block_table`, `scheduler_metadata`, `max_num_splits`, `causal`; an attribute `kvzip` is added |
| pages | [blocks, KV heads, block, 2 x width], keys in the first half of the width |
| `Scheduler` | `add_request`, `_free_request`, `has_requests`, `update_from_output`, `requests`, `vllm_config`; one object a scheduler, in the worker's process with the executor "uni" |
| `Request` | `sampling_params`, `cache_salt`, `block_hashes`, `update_block_hashes`, `client_index` |
| `VllmConfig` | `instance_id`, the same in scheduler and worker; the fields that `refusals.py` reads; `scheduler_cls` and `worker_extension_cls` are set |
| worker | `model_runner.model_state` |
| `OnlineRenderer` and its like in `app.state` | `chat_template` |
"""  # noqa: E501

from kvzip.vllm.versions import check

check()

from vllm.config import CUDAGraphMode, VllmConfig, get_current_vllm_config  # noqa: E402
from vllm.model_executor.models import ModelRegistry  # noqa: E402
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend  # noqa: E402
from vllm.v1.core.sched.async_scheduler import AsyncScheduler  # noqa: E402
from vllm.v1.core.sched.scheduler import Scheduler  # noqa: E402
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason  # noqa: E402
from vllm.v1.worker.gpu.model_states.default import DefaultModelState  # noqa: E402

__all__ = [
    "MODELS_CONFIG_MAP",
    "AsyncScheduler",
    "AttentionBackendEnum",
    "CUDAGraphMode",
    "DefaultModelState",
    "EngineCoreOutput",
    "EngineCoreOutputs",
    "FinishReason",
    "ModelRegistry",
    "Scheduler",
    "VerifyAndUpdateConfig",
    "VllmConfig",
    "current_platform",
    "get_current_vllm_config",
    "register_backend",
]
