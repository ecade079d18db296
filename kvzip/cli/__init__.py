"""The `kvzip` command. Nothing here imports torch before a command needs it, so that help and completion are quick."""

from .main import main

__all__ = ["main"]
