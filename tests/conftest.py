"""Test configuration: kernels run in Triton's interpreter where there is no GPU."""

import os
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import shortcuts

if not torch.cuda.is_available():  # must be set before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import HealthCheck, settings

settings.register_profile(
    "kvzip", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.load_profile("kvzip")


class _Uninstrumented(MetaPathFinder):
    """Finds the kernels before jaxtyping's import hook does."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: object = None) -> ModuleSpec | None:
        return PathFinder.find_spec(fullname, path) if fullname.startswith("kvzip.ops.triton.") else None


if sys.version_info < (3, 11):
    # The last jaxtyping for Python 3.10 wraps functions marked no_type_check too, which hides a kernel's globals from
    # Triton's interpreter.
    sys.meta_path.insert(0, _Uninstrumented())


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    return shortcuts.run_with_room(item, nextitem)


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> Iterator[None]:
    """Triton's interpreter patches `triton.language` once a launch."""
    if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_builtin", shortcuts.patch_once(interpreter))
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, with their reason, where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are not checked for types, as in a user's process; checks take half of the time of a small real model.

    For what users run as it stands, pages and examples. Other tests call all of the same functions, checked.
    """
    import jaxtyping

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="session")
def model() -> Any:
    """A small random model of three layers, of which the second has a window."""
    import random_model  # which imports kvzip: not before jaxtyping's import hook stands

    return random_model.make(random_model.config(windows=(None, 6, None)))


@pytest.fixture(scope="module", params=[(None, None), (5, None)], ids=["global", "window"])
def two_layers(request: pytest.FixtureRequest) -> Any:
    """A small random model of two layers, without windows or with one."""
    import random_model

    return random_model.make(random_model.config(windows=request.param))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The directory of the examples' model, SmolLM2; its tests are left out where it cannot be had."""
    import museum
    from kvzip.small import packages as small_models

    try:
        return small_models.model_dir(museum.DEFAULT_MODEL)
    except small_models.Unavailable as missing:
        pytest.skip(f"left out, {museum.DEFAULT_MODEL} cannot be had here: {missing}")


@pytest.fixture(scope="module")
def scored(model: Any, request: pytest.FixtureRequest) -> Any:
    """The scored cache of a module's TEXT."""
    import kvzip

    return kvzip.score(model, kvzip.prefill(model, request.module.TEXT))
