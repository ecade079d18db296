"""vLLM's models, which bring kvzip's state of a batch."""

from kvzip.vllm import interfaces as vllm
from kvzip.vllm.state import DocumentState


class _WithDocuments:
    @staticmethod
    def get_model_state_cls() -> type[DocumentState]:
        return DocumentState


class KvzipLlamaForCausalLM(_WithDocuments, vllm.LlamaForCausalLM):
    """Llama."""


class KvzipMistralForCausalLM(_WithDocuments, vllm.MistralForCausalLM):
    """Mistral."""


class KvzipQwen2ForCausalLM(_WithDocuments, vllm.Qwen2ForCausalLM):
    """Qwen 2 and 2.5."""


class KvzipQwen3ForCausalLM(_WithDocuments, vllm.Qwen3ForCausalLM):
    """Qwen 3."""
