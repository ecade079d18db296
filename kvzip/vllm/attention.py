"""Attention to vLLM's pages by vLLM's own backend, and to documents by kvzip's op, merged by their log-sum-exp."""

from typing import Any

from torch import Tensor

from kvzip.vllm import interfaces as vllm
from kvzip.vllm import refusals
from kvzip.vllm.state import attend


class BackendImpl(vllm.FlashAttentionImpl):
    """FlashAttention as vLLM calls it, followed by the documents of the batch if it has any."""

    def __init__(self, *args: Any, **options: Any) -> None:
        refusals.check(vllm.get_current_vllm_config())
        super().__init__(*args, **options)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *args: Any,
        **options: Any,
    ) -> Tensor:
        """Attention of the batch into `output`, [tokens, heads, width]."""
        step = getattr(attn_metadata, "kvzip", None)
        if step is None:
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **options)
        count, meta = attn_metadata.num_actual_tokens, attn_metadata
        query = query[:count]
        keys, values = (
            vllm.canonicalize_singleton_dim_strides(x) for x in kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        )
        paged, paged_lse = vllm.flash_attn_varlen_func(
            q=query,
            k=keys,
            v=values,
            cu_seqlens_q=meta.query_start_loc,
            max_seqlen_q=meta.max_query_len,
            seqused_k=meta.seq_lens,
            max_seqlen_k=meta.max_seq_len,
            softmax_scale=self.scale,
            causal=True,
            block_table=meta.block_table,
            scheduler_metadata=meta.scheduler_metadata,
            fa_version=self.vllm_flash_attn_version,
            num_splits=meta.max_num_splits,
            return_softmax_lse=True,
        )
        found, lse = attend(step, query, layer.layer_name, scale=self.scale)
        vllm.merge_attn_states(output[:count], paged, paged_lse, found, lse.t().contiguous())
        return output


class Backend(vllm.FlashAttentionBackend):
    """What `--attention-backend CUSTOM` chooses."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type:
        return BackendImpl

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """How a document's rows are split depends on the batch."""
        return False
