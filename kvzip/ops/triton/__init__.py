"""The kernels. Importing one where it cannot run says what is missing."""

import os

_ELSE = "or set KVZIP_BACKEND=reference, which is plain PyTorch on any device"

try:
    import triton
except ImportError as error:
    raise ImportError(f"expected Triton for the kernels, got no such package: pip install triton, {_ELSE}") from error

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 5) and os.environ.get("TRITON_INTERPRET") != "1":
    raise ImportError(
        f"expected Triton 3.5 or newer (torch 2.9) for the kernels, got {triton.__version__}, which compiles only some "
        f"of them: upgrade torch, {_ELSE}"
    )
