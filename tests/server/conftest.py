"""What the tests of the server share."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from servers import TEXTS, Running, serving


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with three documents, one of them in 8 bits."""
    for name in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(name)
    import jaxtyping

    import kvzip
    import random_model

    directory = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        model = replace(random_model.make(random_model.config()), stop_ids=())
        caches = {}
        for name, text in TEXTS.items():
            dense = kvzip.score(model, kvzip.prefill(model, text))
            caches[name] = kvzip.compress(dense, 0.4, bits=8 if name == "whale" else None)
            kvzip.save(caches[name], directory / f"{name}.kvz", model=model)
        files = [directory / f"{name}.kvz" for name in TEXTS]
        with serving(model, directory / "posted", files, caches=caches) as running:
            yield running


@pytest.fixture
def client(server: Running) -> Any:
    """The official client."""
    import openai

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made
