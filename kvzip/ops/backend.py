"""Which implementation of an op runs: Triton on CUDA tensors, the plain PyTorch reference elsewhere."""

import os
from importlib.util import find_spec

from torch import Tensor


def use_triton(tensor: Tensor) -> bool:
    """Whether an op on `tensor` takes the Triton kernel.

    CUDA tensors do and others do not, unless KVZIP_BACKEND is `reference` or `triton`.
    TRITON_INTERPRET=1 lets a forced `triton` run on CPU tensors.

    Raises: ValueError if KVZIP_BACKEND has another value, or forces Triton where it cannot run; ImportError if Triton
        would run and is not installed.
    """
    forced = os.environ.get("KVZIP_BACKEND", "")
    if forced == "reference":
        return False
    if forced == "triton":
        if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                "expected CUDA tensors for KVZIP_BACKEND=triton, "
                f"got {tensor.device.type}: set TRITON_INTERPRET=1 before importing triton, or unset KVZIP_BACKEND"
            )
    elif forced:
        raise ValueError(f"expected KVZIP_BACKEND to be 'reference' or 'triton', got {forced!r}: correct or unset it")
    elif not tensor.is_cuda:
        return False
    if find_spec("triton") is None:
        raise ImportError(
            f"expected triton for {'KVZIP_BACKEND=triton' if forced else 'CUDA tensors'}, got no such package: "
            "pip install triton, or set KVZIP_BACKEND=reference"
        )
    return True
