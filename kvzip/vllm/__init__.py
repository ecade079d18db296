"""kvzip in vLLM: a plugin that lets requests read compressed documents. vLLM is imported only where vLLM runs it.

vLLM finds `register` and `routes.endpoints` by their entry points (pyproject.toml). `interfaces.py` lists whatever of
vLLM is not public; the rest of this package reads it from there.
"""

BACKEND = "kvzip.vllm.attention.Backend"


def register() -> None:
    """Registers kvzip with vLLM, in each of its processes. Nothing changes unless a server chooses the backend.

    For a version of vLLM that is not supported only the backend's name is registered: who chooses it reads why.
    """
    from kvzip.vllm import versions

    versions.register_backend(BACKEND)
    if versions.unsupported() is None:
        from kvzip.vllm.registering import register_all

        register_all()
