"""vLLM's models, which bring kvzip's state of a batch."""

from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from kvzip.vllm.state import DocumentState


class _WithDocuments:
    @staticmethod
    def get_model_state_cls() -> type[DocumentState]:
        return DocumentState


class KvzipLlamaForCausalLM(_WithDocuments, LlamaForCausalLM):
    """Llama."""


class KvzipMistralForCausalLM(_WithDocuments, MistralForCausalLM):
    """Mistral."""


class KvzipQwen2ForCausalLM(_WithDocuments, Qwen2ForCausalLM):
    """Qwen 2 and 2.5."""


class KvzipQwen3ForCausalLM(_WithDocuments, Qwen3ForCausalLM):
    """Qwen 3."""
