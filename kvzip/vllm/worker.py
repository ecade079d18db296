"""Methods that vLLM mixes into its worker, for `collective_rpc`. They return errors, so that HTTP tells them apart."""

from collections.abc import Callable
from typing import Any

from kvzip.vllm.settings import path_within, settings_of

STATUS = {KeyError: 404, FileNotFoundError: 404, PermissionError: 403, ValueError: 400, TypeError: 400}
"""The HTTP status of an error; others are 500."""


class DocumentsExtension:
    """Documents of the worker's engine."""

    def kvzip_load(self, name: str, file: str) -> dict[str, Any]:
        """Loads a file of the server's directory under a name."""
        state: Any = self.model_runner.model_state  # type: ignore[attr-defined]
        directory = settings_of(state.vllm_config.additional_config).directory
        return _answered(lambda: state.documents.load(name, path_within(directory, file)))

    def kvzip_list(self) -> dict[str, Any]:
        """Returns what each document is."""
        state: Any = self.model_runner.model_state  # type: ignore[attr-defined]
        return _answered(state.documents.list)

    def kvzip_drop(self, name: str) -> dict[str, Any]:
        """Takes a document away from new requests."""
        state: Any = self.model_runner.model_state  # type: ignore[attr-defined]
        return _answered(lambda: state.documents.drop(name))


def _answered(run: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"status": 200, "answer": run()}
    except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        status = next((code for kind, code in STATUS.items() if isinstance(error, kind)), 500)
        told = f"no document {error.args[0]!r}" if isinstance(error, KeyError) else str(error)
        return {"status": status, "answer": told}
