"""The engine: many contexts, many requests, one device."""

from .engine import Engine
from .handles import Handle
from .store import Held, Limits

__all__ = ["Engine", "Handle", "Held", "Limits"]
