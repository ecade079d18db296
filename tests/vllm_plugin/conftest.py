"""vLLM in the process of the tests: on a CPU with its second model runner in Triton's interpreter, or on a GPU.

`make test-vllm` runs these tests in an environment of their own; where vLLM is not installed they are not collected.
"""

import importlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

RATIOS = {"a": 0.3, "b": 0.5}  # of the documents

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    os.environ |= {
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_PLUGINS": "kvzip",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if torch.cuda.is_available():
        collect_ignore = [
            "test_answers.py",
            "test_families.py",
            "test_server.py",
        ]  # in float32, which its backend lacks
    else:
        os.environ["TRITON_INTERPRET"] = "1"
        import vllm.triton_utils

        vllm.triton_utils.importing.HAS_TRITON = True  # vLLM looks for a device; the interpreter needs none
        importlib.reload(vllm.triton_utils)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny Llama with 1,024 rows of words."""
    import small_checkpoint

    return small_checkpoint.write(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def model(model_dir: Path) -> Any:
    """The same model, as kvzip loads it."""
    import kvzip

    return kvzip.load(model_dir, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="session")
def caches(model: Any) -> dict[str, Any]:
    """Two compressed documents, by name."""
    import kvzip

    found = {}
    for name, ratio in RATIOS.items():
        text = " ".join(f"{name}{n} is {n * n % 97}." for n in range(20 if name == "a" else 31))
        cache = kvzip.prefill(model, text)
        found[name] = kvzip.compress(kvzip.score(model, cache), ratio=ratio)
    return found


@pytest.fixture(scope="session")
def files(model: Any, caches: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the documents' files."""
    import kvzip

    directory = tmp_path_factory.mktemp("documents")
    for name, cache in caches.items():
        kvzip.save(cache, directory / f"{name}.kvz", model=model)
    return directory


@pytest.fixture(scope="module")
def engine(model_dir: Path, files: Path) -> Iterator[Any]:
    """vLLM with both documents, its prefix caching on."""
    from vllm_engines import running

    settings = {"documents": {n: str(files / f"{n}.kvz") for n in RATIOS}, "directory": str(files)}
    with running(model_dir, settings) as found:
        yield found
