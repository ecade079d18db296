"""Which implementation of an op runs: Triton on CUDA tensors, plain PyTorch elsewhere; KVZIP_BACKEND forces one."""

import os

from torch import Tensor


def use_triton(tensor: Tensor) -> bool:
    """Whether an op on `tensor` takes the Triton kernel.

    CUDA tensors do and others do not, unless KVZIP_BACKEND is `reference` or `triton`.
    TRITON_INTERPRET=1 lets a forced `triton` run on CPU tensors.

    Raises: ValueError if KVZIP_BACKEND has another value, or forces Triton where it cannot run.
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
        return True
    if forced:
        raise ValueError(f"expected KVZIP_BACKEND to be 'reference' or 'triton', got {forced!r}: correct or unset it")
    return tensor.is_cuda


def is_forced() -> bool:
    """Whether KVZIP_BACKEND names the implementation: then no faster one replaces the reference."""
    return bool(os.environ.get("KVZIP_BACKEND"))
