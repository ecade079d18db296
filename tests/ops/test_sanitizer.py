"""Every kernel under compute-sanitizer: no access outside its memory.

Each case runs in a process of its own without torch's caching allocator, which would hide overruns behind its blocks.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETUP = """
import torch
from kvzip import ops
torch.manual_seed(0)
rand = lambda *shape: torch.randn(shape, device="cuda", dtype=torch.float16)
"""
CASES = {
    "select": """
scores = torch.rand(2, 3, 4099, device="cuda")
for s in (scores, scores.round()):
    assert ops.select(s, ratio=0.3).sum() == int(0.3 * s.numel())
    ops.select(list(s), ratio=0.3)
    ops.select_uniform(s, ratio=0.3)
""",
    "prune": """
k, v = rand(3, 4099, 80), rand(4099, 3, 80).transpose(0, 1)
keep = torch.rand(3, 4099, device="cuda") < 0.3
keep[1] = False
assert torch.equal(ops.prune(k, v, keep)[1], v[keep])
ops.prune(k, v, keep, total=7)
""",
    "quantize": """
for width in (80, 256):
    for bits in (8, 4):
        x = rand(37, width)
        assert (ops.dequantize(ops.quantize(x, bits=bits)) - x).abs().max() < 1
""",
    "decode": """
offsets = torch.tensor([0, 131, 131, 700], device="cuda", dtype=torch.int32)
for width in (80, 128):
    k, v, q = rand(700, width), rand(700, width), rand(2, 6, 3, width)
    lengths = torch.tensor([9, 3], device="cuda", dtype=torch.int32)
    tail = rand(2, 3, 17, width), rand(2, 3, 17, width), lengths
    for bits in (None, 8, 4):
        kv = (k, v) if bits is None else (ops.quantize(k, bits=bits), ops.quantize(v, bits=bits))
        out, lse = ops.decode(q, *kv, offsets, scale=width**-0.5, tail=tail)
        assert out.isfinite().all() and lse.isfinite().all()
        ops.merge(out, lse, *ops.decode(q, *kv, offsets, scale=width**-0.5, window=50))
""",
    "decode_rows": """
offsets = [torch.tensor(x, device="cuda", dtype=torch.int32) for x in ([0, 131, 131, 700], [0, 0, 0, 9])]
number = lambda *x: torch.tensor(x, device="cuda", dtype=torch.int32)
rows = ops.QueryRows(number(0, 1, -1, 0, 0, 5), number(0, 1, 2, 3, 3, -1), number(70, 1, 9, 64, 65, 0))
for width in (80, 128):
    pages = ops.Pages(rand(9, 3, 64, width), rand(9, 3, 64, width), torch.arange(8, device="cuda").view(4, 2).int())
    q = rand(6, 6, width)
    for bits in ((None, None), (8, 4), (4, 8)):
        table = None
        for place, at in enumerate(offsets):
            kv = [rand(int(at[-1]), width) for _ in "kv"]
            kv = [x if b is None else ops.quantize(x, bits=b) for x, b in zip(kv, bits)]
            layer = ops.Context(*kv, at, torch.rand(int(at[-1]), device="cuda"))
            table = table or ops.context_table([layer], 3)
            ops.put_context_(table, place, [layer])
        window = None if width == 80 else 50
        out, lse = ops.decode_rows(q, table, 0, rows, scale=width**-0.5, pages=pages, window=window)
        assert out.isfinite().all() and lse[:5].isfinite().all()
""",
    "score": """
for width in (80, 128):
    q, k, k_sink, k_self = rand(6, 77, width), rand(3, 61, width), rand(3, 5, width), rand(3, 77, width)
    scores = ops.score(q, k, k_sink, k_self, scale=width**-0.5)
    assert ((scores >= 0) & (scores <= 1)).all()
    lse = torch.full((6, 77), 9.0, device="cuda")
    ops.score(q, k, k_sink, k_self, scale=width**-0.5, lse=lse)
""",
}


def sanitizer() -> str | None:
    found = shutil.which("compute-sanitizer")
    usual = Path("/usr/local/cuda/bin/compute-sanitizer")
    return found or (str(usual) if usual.exists() else None)


def check(code: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    command = [sanitizer(), "--tool", "memcheck", "--error-exitcode", "86", sys.executable, "-c", SETUP + code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.gpu
@pytest.mark.skipif(sanitizer() is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("op", CASES)
def test_memcheck_finds_nothing(op):
    run = check(CASES[op])
    assert run.returncode == 0 and "ERROR SUMMARY: 0 errors" in run.stdout, (run.stdout + run.stderr)[-4000:]


@pytest.mark.gpu
@pytest.mark.skipif(sanitizer() is None, reason="compute-sanitizer is not installed")
def test_memcheck_would_find_an_overrun():
    code = "import kvzip.ops.triton.prune as p\nmask = torch.ones(2, 9, dtype=torch.uint8, device='cuda')\n"
    code += "counts = torch.empty(2, dtype=torch.int32, device='cuda')\n"
    code += "p._count_kernel[(2,)](mask, counts, 4000, 1, 9, 1, BLOCK_S=p.BLOCK_S)\ntorch.cuda.synchronize()\n"
    assert check(code).returncode != 0
