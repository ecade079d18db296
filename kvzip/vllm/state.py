"""What vLLM's worker knows of its batch's documents: positions after them, and the rows that attention reads."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kvzip import ops
from kvzip.ops.types import ContextTable, QueryRows
from kvzip.vllm import fingerprints, refusals
from kvzip.vllm import interfaces as vllm
from kvzip.vllm.documents import Server, documents_of
from kvzip.vllm.settings import settings_of

if TYPE_CHECKING:
    from kvzip.ops.triton.decode_plan import Plan


@dataclass
class Step:
    """What the layers of one step share: the rows of its tokens, and how the device splits them, planned by the first.

    In a CUDA graph of the whole step the first layer's plan is captured with it, and each replay plans anew.
    """

    table: ContextTable
    rows: QueryRows
    plan: "Plan | None" = None

    def planned(self, query: Tensor) -> "Plan | None":
        """Returns the plan for these rows, made at the first call."""
        if self.plan is None:
            self.plan = ops.decode_plan(
                self.table, self.rows, query_heads=query.shape[1], dtype=query.dtype, pages=None
            )
        return self.plan


def attend(step: Step, query: Tensor, layer_name: str, *, scale: float) -> tuple[Tensor, Tensor]:
    """Returns attention [N Hq D] of a step's queries to their documents in a layer, and its log-sum-exp [N Hq]."""
    index = int(re.search(r"\.layers\.(\d+)\.", layer_name)[1])  # type: ignore[index]
    return ops.decode_rows(query, step.table, index, step.rows, scale=scale, plan=step.planned(query))


class DocumentState(vllm.DefaultModelState):
    """vLLM's state of a model, with the document of each request.

    Buffers keep their addresses, so that CUDA graphs find what each step writes into them.
    """

    def __init__(self, vllm_config: Any, model: torch.nn.Module, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        refusals.check(vllm_config)
        served = fingerprints.describe(self.model_config.model, self.model_config.hf_overrides)
        found = fingerprints.fingerprints(model, served, dtype=self.dtype)
        self.documents = documents_of(vllm_config.instance_id)
        server = Server(
            served.config, found, torch.empty(0, device=device).device, self.dtype, self.max_model_len, _longest(model)
        )
        self.documents.start(server, settings_of(vllm_config.additional_config))
        self._host = np.zeros((2, self.max_num_reqs), dtype=np.int32)  # place of the document and its tokens
        self._host[0] = -1
        self._changed = False
        self._of_request = torch.tensor(self._host, device=device)  # graphs are captured before there is a request
        self._positions = torch.zeros(self.max_num_tokens, dtype=torch.int64, device=device)
        self._rows = torch.zeros((3, self.max_num_tokens), dtype=torch.int32, device=device)
        self._counts = torch.arange(self.max_num_tokens, dtype=torch.int32, device=device)

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """Notes the document of a request that enters the batch; the scheduler has seen that there is one."""
        super().add_request(req_index, new_req_data)
        document = self.documents.held(new_req_data.req_id)
        self._host[:, req_index] = (-1, 0) if document is None else (document.place, document.tokens)
        self._changed = True

    def apply_staged_writes(self) -> None:
        """Brings to the device what `add_request` noted."""
        super().apply_staged_writes()
        if self._changed:
            self._of_request.copy_(torch.from_numpy(self._host.copy()))
            self._changed = False

    def prepare_attn(
        self, input_batch: Any, cudagraph_mode: Any, *args: Any, for_capture: bool = False, **options: Any
    ) -> dict[str, Any]:
        """vLLM's metadata of attention, with the step's documents as `kvzip` where there are any, or may be later.

        They may be in a graph of the whole step, which is captured without any (`for_capture`, in no mode of graphs).
        """
        metadata = super().prepare_attn(input_batch, cudagraph_mode, *args, for_capture=for_capture, **options)
        whole = for_capture or cudagraph_mode == vllm.CUDAGraphMode.FULL
        reads = (self._host[0, input_batch.idx_mapping_np[: input_batch.num_reqs]] >= 0).any()
        self._fill(input_batch)
        steps: dict[int, Step] = {}
        for layer in metadata.values():
            count = layer.num_actual_tokens
            if whole or reads or self._positions.device.type == "cpu":
                steps.setdefault(count, Step(self.documents.table, QueryRows(*self._rows[:, :count])))
            layer.kvzip = steps.get(count)
        return metadata

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        """Positions that go on after the document, in the buffer that graphs read."""
        inputs = super().prepare_inputs(input_batch, req_states)
        return {**inputs, "positions": self._positions[: input_batch.num_tokens_after_padding]}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """What graphs are captured with."""
        inputs = super().prepare_dummy_inputs(num_reqs, num_tokens)
        return {**inputs, "positions": self._positions[:num_tokens]}

    def _fill(self, batch: Any) -> None:
        """Writes rows and positions of a batch's tokens; tokens that pad it have no document, and are at position 0.

        A request's token sees as many rows of its pages as its place in them says; only pages on a CPU ask for that.
        """
        padded, tokens, requests = batch.num_tokens_after_padding, batch.num_tokens, batch.num_reqs
        count = self._counts[:padded]
        sequence = torch.searchsorted(batch.query_start_loc[1 : requests + 1], count, right=True, out_int32=True)
        sequence.clamp_(max=requests - 1)
        place, length = self._of_request[:, batch.idx_mapping[:requests].long()][:, sequence.long()]
        padding = count >= tokens
        own = batch.positions[:padded].masked_fill(padding, 0)  # vLLM leaves those of earlier steps there
        self._rows[0, :padded] = place.masked_fill_(padding, -1)
        self._rows[1, :padded] = sequence
        self._rows[2, :padded] = (own + 1).int()
        self._positions[:padded] = own + length.masked_fill_(padding, 0)


def _longest(model: torch.nn.Module) -> int:
    """The positions that the model's rotary tables have."""
    found: list[Any] = [getattr(module, "cos_sin_cache", None) for module in model.modules()]
    tables = [table for table in found if table is not None]
    if not tables:
        raise ValueError("expected a model with tables of rotary positions, got none: kvzip continues such positions")
    return min(len(table) for table in tables)
