"""Compiles Triton kernels for a GPU that is not there, exactly as their launchers would launch them."""

import atexit
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes of shared memory that one block can have


class Compiled(NamedTuple):
    """A kernel as ptxas made it; sizes in bytes. A stack means that registers were spilled.

    `shared` is what a launch asks for; `static` comes with the kernel, 1 KiB of the system's on sm_90 included.
    """

    name: str
    shared: int
    static: int
    stack: int
    registers: int
    ptx: str


def compile_launches(source: str, *, capability: int) -> list[Compiled]:
    """The kernels that the statements of `source` launch, compiled for sm_<capability> and not run.

    `source` runs in a process of its own, a fork of one without the interpreter; it calls launchers on CPU tensors,
    whose results mean nothing, since no kernel writes them. With a Triton that the kernels do not take the test is
    skipped.
    """
    if tuple(map(int, version("triton").split(".")[:2])) < (3, 5):
        import pytest

        pytest.skip("kernels are compiled by Triton 3.5 and newer")
    server = _server(capability)
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as directory:
        told = Path(directory) / "told"
        print(json.dumps([source.strip(), str(told)]), file=server.stdin, flush=True)
        assert server.stdout.readline() == "done\n", "the process that compiles has ended"
        found = json.loads(told.read_text(encoding="utf-8"))
    assert "error" not in found, found["error"][-4000:]
    return [Compiled(*row) for row in found["kernels"]]


@functools.cache
def _server(capability: int) -> subprocess.Popen[str]:
    """A process that has imported what sources need, and forks for each of them; it ends when its input does."""
    root = Path(__file__).parents[2]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "tests" / "ops")])
    command = [sys.executable, "-c", f"import compiling; compiling.serve({capability})"]
    server = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)
    return server


def serve(capability: int) -> None:
    """Compiles each source that a line of the input names, in a fork, so that none sees what another has changed."""
    with recording(capability) as record:
        from kvzip.ops.triton import decode, decode_rows  # noqa: F401  (the longest imports)

        for line in sys.stdin:
            source, told = json.loads(line)
            child = os.fork()
            if not child:
                _compile(source, Path(told), record)
            os.waitpid(child, 0)
            print("done", flush=True)


def _compile(source: str, told: Path, record: list) -> None:
    """Writes what `Compiled` holds of the kernels that a source launches, or its error; ends the process."""
    found: dict[str, Any] = {"error": "it never ended"}
    os.dup2(2, 1)
    try:
        exec(source, {"__name__": "source"})
        found = {"kernels": report(record)}
    except BaseException:
        found = {"error": traceback.format_exc()}
    finally:
        told.write_text(json.dumps(found), encoding="utf-8")
        os._exit(0)


def compile_calls(source: str, calls: list[str], *, capability: int) -> list[Compiled]:
    """The kernels of `go(...)` for each of the calls; `source` defines it, and names the {capability}."""
    source = source.format(capability=capability) + "\n".join(f"go({call})" for call in calls)
    return compile_launches(source, capability=capability)


def assert_fits(kernels: list[Compiled], *, capability: int) -> None:
    """Asserts that something was compiled, nothing spilled, and every kernel's shared memory fits the chip.

    And that a product whose operand is in registers is waited for before these can change: Triton leaves those of a
    loop under way that add up.
    """
    assert kernels
    for kernel in kernels:
        assert kernel.stack == 0, f"{kernel.name} spills: {kernel.stack} bytes of stack, {kernel.registers} registers"
        if re.search(r"wgmma\.mma_async\S*\s+\{[^}]*\},\s*\{", kernel.ptx):
            assert not re.search(r"wgmma\.wait_group\.sync\.aligned\s+[1-9]", kernel.ptx), f"{kernel.name} races"
        limit = SHARED_LIMIT[capability]
        assert kernel.shared <= limit, f"{kernel.name} needs {kernel.shared} bytes of shared memory, of {limit}"
        if kernel.static > 1024:  # Triton asks for more than 48 KiB only where its own part is more
            assert kernel.shared + kernel.static <= 49 * 1024, f"{kernel.name} cannot reserve {kernel.static} bytes"


class recording:
    """Within it, launches compile for the given target and are listed instead of run."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def __enter__(self) -> list:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.runtime.jit import JITFunction

        target = GPUTarget("cuda", self.capability, 32)

        class Driver:
            get_current_target = staticmethod(lambda: target)
            get_current_device = staticmethod(lambda: 0)
            get_current_stream = staticmethod(lambda device: 0)

        triton.runtime.driver.set_active(Driver())
        # As vLLM does, which wants to know of what is compiled while it serves: Triton must be able to say what it was.
        triton.knobs.runtime.jit_post_compile_hook = lambda **compiled: None
        self.run, record = JITFunction.run, []

        def compile_only(function, *args, grid, warmup, **kwargs):
            record.append(self.run(function, *args, grid=grid, warmup=True, **kwargs))

        JITFunction.run = compile_only
        return record

    def __exit__(self, *exception: object) -> None:
        from triton.runtime.jit import JITFunction

        JITFunction.run = self.run


def report(kernels: list) -> list[tuple]:
    """Returns what `Compiled` holds."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    rows = []
    for kernel in dict.fromkeys(kernels):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        parts = dict(part.split(":")[:2] for part in usage.split() if part[:4] in ("REG:", "STAC", "SHAR"))
        static, stack, registers = (int(parts[name]) for name in ("SHARED", "STACK", "REG"))
        rows.append((kernel.metadata.name, kernel.metadata.shared, static, stack, registers, kernel.asm["ptx"]))
    return rows
