"""Counts of a server in Prometheus' text form."""

import threading
from collections import Counter

from ..serving import Engine
from .schemas import Document

_HELP = {
    "kvzip_requests_total": ("counter", "Chat requests by how they ended."),
    "kvzip_question_tokens_total": ("counter", "Tokens read for questions; those of documents are not read again."),
    "kvzip_document_tokens_total": ("counter", "Tokens of documents that questions found in place."),
    "kvzip_answer_tokens_total": ("counter", "Tokens of answers."),
    "kvzip_first_token_seconds": ("summary", "Seconds from a question to the first token of its answer."),
    "kvzip_token_seconds": ("summary", "Seconds from a token of an answer to the next."),
    "kvzip_requests_running": ("gauge", "Requests that are being answered."),
    "kvzip_requests_waiting": ("gauge", "Requests that wait for room, or for their document."),
    "kvzip_steps_total": ("counter", "Forward passes of the engine."),
    "kvzip_tail_tokens": ("gauge", "Tokens reserved for questions and answers."),
    "kvzip_contexts_device_bytes": ("gauge", "Bytes of documents on the device."),
    "kvzip_contexts_host_bytes": ("gauge", "Bytes of documents in the host's memory."),
    "kvzip_documents": ("gauge", "Documents by status."),
}


class Metrics:
    """Counters that any thread may add to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, name: str, value: float = 1.0) -> None:
        """Adds to a counter, named with its labels."""
        with self._lock:
            self._counts[name] += value  # pyright: ignore[reportArgumentType] (Counter counts floats as well)

    def text(self, engine: Engine, documents: list[Document]) -> str:
        """Returns all counts, with those of an engine and of documents."""
        with self._lock:
            values = dict(self._counts)
        facts = engine.facts
        for name in ("running", "waiting"):
            values[f"kvzip_requests_{name}"] = facts[name]
        values["kvzip_steps_total"], values["kvzip_tail_tokens"] = facts["steps"], facts["tail_tokens"]
        values["kvzip_contexts_device_bytes"] = facts["device_bytes"]
        values["kvzip_contexts_host_bytes"] = facts["host_bytes"]
        for status, count in Counter(document.status for document in documents).items():
            values[f'kvzip_documents{{status="{status}"}}'] = count
        lines = []
        for name, (kind, about) in _HELP.items():
            lines += [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
            own = [
                key
                for key in sorted(values)
                if key.partition("{")[0].removesuffix("_sum").removesuffix("_count") == name
            ]
            lines += [f"{key} {values[key]:g}" if values[key] % 1 else f"{key} {int(values[key])}" for key in own]
        return "\n".join(lines) + "\n"
