"""Prefill of contexts larger than memory."""

from .prefill import prefill_compressed

__all__ = ["prefill_compressed"]
