"""Two and four GPUs give what one process gives: logits by the accuracy rule, choices bit for bit, the same tokens."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from on_gpus import choices_of, logits_of
from test_whole_way import write

import kvzip
import tiny_models
from accuracy import assert_as_accurate

pytestmark = pytest.mark.gpu
HERE = Path(__file__).parent
WAYS = ("nccl", "one-shot")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
    return write(tmp_path_factory.mktemp("models") / "tiny", tiny_models.qwen3, **sizes, head_dim=64)


def torchrun(ranks: int, *words: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *words]


def environment() -> dict[str, str]:
    """Multicast is off on some machines; where it is on, these change nothing but speed."""
    paths = os.pathsep.join([*map(str, (HERE.parents[1], HERE.parent, HERE)), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths, "NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}


def need(gpus: int) -> None:
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs, got {torch.cuda.device_count()}")


@pytest.fixture(scope="module", params=[2, 4])
def found(request: pytest.FixtureRequest, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    need(request.param)
    out = tmp_path_factory.mktemp("made")
    command = torchrun(request.param, str(HERE / "on_gpus.py"), str(model_dir), str(out))
    run = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=500, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    return {"out": out, **torch.load(out / "found.pt", weights_only=False)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ranks_give_what_one_process_gives(found: dict[str, Any], model_dir: Path, dtype: torch.dtype) -> None:
    exact = logits_of(kvzip.load(model_dir, dtype=torch.float64, device="cpu"))
    plain = logits_of(kvzip.load(model_dir, dtype=dtype, device="cpu"))
    one = kvzip.load(model_dir, dtype=dtype, device="cuda")
    alone = choices_of(one)
    for way in WAYS:
        told = found[f"{way}-{dtype}"]
        assert_as_accurate(told["logits"], exact, plain)
        assert torch.equal(told["kept"], alone["kept"])
        assert all(told["ranks"]) and all(told["bits"])
        first, replayed, _ = told["answers"]
        assert first == replayed == told["again"]
        if dtype == torch.float32:  # in 16 bits the order of sums may turn the choice of a token
            assert first == alone["answers"][0]
            cache = kvzip.load_cache(found["out"] / f"{way}-{dtype}.kvz", model=one)
            said = kvzip.generate(one, cache, ["How many steps?", "When?"], max_tokens=24)
            assert [x.token_ids for x in said] == first


def test_a_killed_rank_ends_the_command(model_dir: Path, tmp_path: Path) -> None:
    need(2)
    (tmp_path / "doc.txt").write_text("The lighthouse at Cape Rouen was built in 1871. " * 36, encoding="utf-8")
    words = ["compress", str(tmp_path / "doc.txt"), "-m", str(model_dir), "-o", str(tmp_path / "made.kvz")]
    words += ["--chunk", "1", "--scope", "context"]  # 1,700 passes: long enough to be killed within
    command = torchrun(2, "-m", "kvzip", *words)
    running = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    children: list[int] = []
    while len(children) < 2:
        time.sleep(0.2)
        assert running.poll() is None, running.communicate()[1][-2000:]
        listed = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text()
        children = [int(x) for x in listed.split() if "kvzip" in Path(f"/proc/{x}/cmdline").read_text()]
    time.sleep(12)  # it has loaded and scores
    os.kill(children[1], signal.SIGKILL)
    begun = time.monotonic()
    _, err = running.communicate(timeout=60)
    assert time.monotonic() - begun < 45 and running.returncode != 0
    assert sum(line.startswith("kvzip:") for line in err.splitlines()) == 1, err[-2000:]
    assert not (tmp_path / "made.kvz").exists() and not list(tmp_path.glob(".made*"))


def test_the_command_on_two_gpus(model_dir: Path, tmp_path: Path) -> None:
    need(2)
    (tmp_path / "doc.txt").write_text("The lighthouse at Cape Rouen was built in 1871. " * 8, encoding="utf-8")
    made = str(tmp_path / "made.kvz")
    for words in (["compress", str(tmp_path / "doc.txt"), "-m", str(model_dir), "-o", made], ["ask", made, "When?"]):
        command = torchrun(2, "-m", "kvzip", *words)
        run = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)
        assert run.returncode == 0, run.stderr[-3000:]
    cache = kvzip.load_cache(made)
    assert cache.kept == int(0.3 * cache.total)
