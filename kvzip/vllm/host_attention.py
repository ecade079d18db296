"""Attention on a CPU, for tests: vLLM's operation there gives no log-sum-exp, so kvzip's op reads the pages too."""

from typing import Any

import torch
from torch import Tensor

from kvzip import ops
from kvzip.vllm import interfaces as vllm
from kvzip.vllm import refusals
from kvzip.vllm.registering import is_chosen
from kvzip.vllm.state import attend


class HostImpl(vllm.CPUAttentionBackendImpl):
    """Attention to pages and documents, both by kvzip's op, merged."""

    def __init__(self, *args: Any, **options: Any) -> None:
        refusals.check(vllm.get_current_vllm_config())
        super().__init__(*args, **options)

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Writes keys and values of a batch into their pages; a negative slot is padding."""
        slots = slot_mapping.long()
        used = slots >= 0
        page, row = slots[used] // kv_cache.shape[2], slots[used] % kv_cache.shape[2]
        kv_cache[page, :, row] = torch.cat([x[: len(slots)][used] for x in (key, value)], dim=-1)

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
        """Attention of the batch into `output`, [tokens, heads, width] or those joined."""
        if attn_metadata is None:  # of a warm-up
            return output.zero_()
        step = attn_metadata.kvzip
        count = attn_metadata.num_actual_tokens
        query, rows = query[:count], step.rows
        k, v = kv_cache.split(self.head_size, dim=-1)
        alone = ops.QueryRows(torch.full_like(rows.context, -1), rows.sequence, rows.length)
        pages = ops.Pages(k, v, attn_metadata.block_table)
        paged, paged_lse = ops.decode_rows(query, step.table, 0, alone, scale=self.scale, pages=pages)
        found, lse = attend(step, query, layer.layer_name, scale=self.scale)
        output[:count] = ops.merge(paged, paged_lse, found, lse)[0].view(output[:count].shape)
        return output


class BackendOfHost(vllm.CPUAttentionBackend):
    """vLLM's backend of CPUs, which is kvzip's where a configuration chose that."""

    @staticmethod
    def get_impl_cls() -> type:
        return HostImpl if is_chosen(vllm.get_current_vllm_config()) else vllm.CPUAttentionBackendImpl
