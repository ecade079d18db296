"""vLLM's scheduler, which knows the documents: it puts them into the hash of pages and refuses unknown ones."""

from typing import Any

from kvzip.vllm import interfaces as vllm
from kvzip.vllm.documents import SALT, documents_of, salted
from kvzip.vllm.settings import name_in


class _WithDocuments:
    """What both of vLLM's schedulers get."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.documents = documents_of(self.vllm_config.instance_id)  # type: ignore[attr-defined]
        self._refused: list[Any] = []

    def add_request(self, request: Any) -> None:
        """Takes a request. The pages of one that names a document are hashed anew, with the document's key in front.

        One that names an unknown document ends with an error: only programs get here with one, and requests that were
        sent while the document was dropped; the HTTP server answers others with 404.
        """
        name = name_in(getattr(request.sampling_params, "extra_args", None))
        if name is not None and request.request_id not in self.requests:  # type: ignore[attr-defined]
            document = self.documents.hold(request.request_id, name)
            if document is None:
                self._refused.append(request)
                return
            _salt_(request, document.key)
        elif name is None and (request.cache_salt or "").startswith(SALT):  # which nobody can give to share its pages
            _salt_(request, None)
        super().add_request(request)  # type: ignore[misc]

    def has_requests(self) -> bool:
        """Whether there is something to do: refused requests must be told so."""
        return bool(self._refused) or super().has_requests()  # type: ignore[misc]

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> dict[int, Any]:
        """vLLM's outputs of a step, and those of refused requests."""
        outputs = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        for request in self._refused:
            ended = vllm.EngineCoreOutput(request.request_id, [], finish_reason=vllm.FinishReason.ERROR)
            of_client = outputs.setdefault(request.client_index, vllm.EngineCoreOutputs())
            of_client.outputs.append(ended)
        self._refused.clear()
        return outputs

    def _free_request(self, request: Any, *args: Any, **options: Any) -> Any:
        self.documents.release(request.request_id)
        return super()._free_request(request, *args, **options)  # type: ignore[misc]


def _salt_(request: Any, key: str | None) -> None:
    """Hashes a request's pages anew, with a salt of the document's key and its own salt."""
    request.cache_salt = salted(key, request.cache_salt)
    request.block_hashes.clear()
    request.update_block_hashes()


class Scheduler(_WithDocuments, vllm.Scheduler):
    """Of a server with `--no-async-scheduling`."""


class AsyncScheduler(_WithDocuments, vllm.AsyncScheduler):
    """Of other servers."""


def make_scheduler(vllm_config: Any, **options: Any) -> Any:
    """Returns the scheduler of a configuration; vLLM calls this as it would call a scheduler's class."""
    kind = AsyncScheduler if vllm_config.scheduler_config.async_scheduling else Scheduler
    return kind(vllm_config=vllm_config, **options)
