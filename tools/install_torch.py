"""Installs torch into the running interpreter's environment: a CUDA build only where there is an NVIDIA GPU.

On Linux the default torch brings several GB of CUDA libraries, so a machine without a GPU gets a CPU build: through
pip if its indexes have one, else through uv. The environment variable TORCH, a pip requirement, overrides the choice.
"""

import os
import platform
import shutil
import subprocess
import sys
from importlib.util import find_spec

CPU_BUILD = "torch==2.13.0+cpu"


def main() -> int:
    """Installs torch unless it is there; returns the exit status."""
    if find_spec("torch") is not None:
        return 0
    if requirement := os.environ.get("TORCH"):
        return pip(requirement)
    if platform.system() != "Linux" or has_nvidia_gpu():
        return pip("torch")
    print(f"no NVIDIA GPU: installing a CPU build ({CPU_BUILD}, or what uv finds)", flush=True)
    if cpu_build() == 0:
        return 0
    print(
        f"expected a CPU build of torch for Python {platform.python_version()}, pip and uv found none: "
        "run `make TORCH=<requirement or wheel file> ...`; TORCH=torch accepts the CUDA build, several GB",
        file=sys.stderr,
    )
    return 1


def has_nvidia_gpu() -> bool:
    """Whether nvidia-smi runs and finds a GPU."""
    command = shutil.which("nvidia-smi")
    return command is not None and subprocess.run([command], capture_output=True, check=False).returncode == 0


def pip(*arguments: str) -> int:
    """Installs requirements with pip; returns its exit status."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *arguments]
    return subprocess.run(command, check=False).returncode


def cpu_build(otherwise: str = "torch") -> int:
    """Installs the CPU build through pip, or `otherwise` as uv finds it; returns the exit status."""
    if pip(CPU_BUILD) == 0:
        return 0
    command = ["-m", "uv", "pip", "install", "--python", sys.executable, "--torch-backend=cpu", otherwise]
    return pip("uv") or subprocess.run([sys.executable, *command], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
