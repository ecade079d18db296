"""The engine: many contexts, many requests, one device."""

from .engine import Engine
from .handles import Handle
from .limits import Limits
from .store import Held

__all__ = ["Engine", "Handle", "Held", "Limits"]
