"""Small, real, pretrained models out of registry packages: they need no account, and run on a laptop's processor."""

from .packages import SOURCES, Unavailable, default_cache, model_dir

__all__ = ["SOURCES", "Unavailable", "default_cache", "model_dir"]
