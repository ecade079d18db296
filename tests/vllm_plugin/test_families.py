"""Families, bits and refusals: an engine of its own for each."""

from pathlib import Path
from typing import Any

import pytest
import torch

import kvzip
import small_checkpoint
from kvzip.inputs import query_ids
from kvzip.vllm import refusals, versions
from kvzip.vllm.settings import settings_of
from vllm_engines import ask, expected, running, tokens

TEXT = " ".join(f"The number {n} is {n * n % 97}." for n in range(12))


@pytest.mark.parametrize(
    ("family", "bits", "refitted"),
    [
        ("Mistral", None, False),
        ("Qwen2", None, True),
        ("Qwen3", None, False),
        ("Llama", 8, True),
        ("Llama", [4, 2], False),
    ],
)
def test_families_bits_and_biases_answer_as_kvzip_does(
    tmp_path: Path, family: str, bits: int | list[int] | None, refitted: bool
) -> None:
    directory = small_checkpoint.write(tmp_path / "model", family=family)
    model = kvzip.load(directory, dtype=torch.float32, device="cpu")
    scored = kvzip.score(model, kvzip.prefill(model, TEXT))
    cache = kvzip.compress(scored, ratio=0.4, bits=tuple(bits) if isinstance(bits, list) else bits)
    cache = kvzip.refit(model, scored, cache) if refitted else cache
    assert any(layer.bias is not None and layer.bias.any() for layer in cache.context) == refitted
    kvzip.save(cache, tmp_path / "a.kvz", model=model)
    asked = query_ids(model, cache, ["What is it?", "And 7?"], template=True)
    settings = {"documents": {"a": str(tmp_path / "a.kvz")}, "bits": bits, "bias": refitted}
    with running(directory, settings) as engine:
        found = tokens(ask(engine, asked, ["a", "a"]))
        (shown,) = engine.collective_rpc("kvzip_list")[0]["answer"]
    assert found == [expected(model, cache, ids) for ids in asked]
    assert shown["tokens"] == len(cache.token_ids)


def test_batches_before_the_first_request_have_no_document(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs are captured with such batches: what they read must be there when the engine starts."""
    from vllm.v1.worker.gpu.input_batch import InputBatch

    model = kvzip.load(model_dir, dtype=torch.float32, device="cpu")
    kvzip.save(kvzip.prefill(model, TEXT), tmp_path / "a.kvz", model=model)
    empty = torch.empty

    def poisoned(*args: Any, **options: Any) -> torch.Tensor:
        made = empty(*args, **options)
        return made.fill_(torch.iinfo(made.dtype).max) if made.dtype in (torch.int32, torch.int64) else made

    monkeypatch.setattr(torch, "empty", poisoned)
    with running(model_dir, {"documents": {"a": str(tmp_path / "a.kvz")}}) as engine:
        runner = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        state = runner.model_state
        state._fill(InputBatch.make_dummy(3, 11, runner.input_buffers))
        assert state._rows[0, :11].tolist() == [-1] * 11
        assert state._positions.tolist() == [0] * len(state._positions)
        assert bool(runner._dummy_run(11)[0].isfinite().all())


def test_what_is_not_supported_is_refused_before_anything_is_loaded(tmp_path: Path, model_dir: Path) -> None:
    gemma = small_checkpoint.write(
        tmp_path / "gemma", family="Gemma2", query_pre_attn_scalar=32, hidden_activation="gelu_pytorch_tanh"
    )
    guess = {"method": "ngram", "num_speculative_tokens": 2}
    options: list[tuple[Path, str, dict[str, Any]]] = [
        (gemma, "got Gemma2ForCausalLM: serve it without", {}),
        (model_dir, "got LoRA", {"enable_lora": True}),
        (model_dir, "got quantized pages", {"kv_cache_dtype": "fp8"}),
        (
            model_dir,
            "got speculative decoding",
            {"speculative_config": guess},
        ),
        (model_dir, r"or a list of two of these, got '\[4, 5\]'", {"bits": [4, 5]}),
    ]
    for directory, said, given in options:
        settings = {"bits": given.pop("bits")} if "bits" in given else {}
        with pytest.raises(Exception, match=said), running(directory, settings, **given):
            pass


def test_two_equal_numbers_of_bits_are_one() -> None:
    assert settings_of({"kvzip": {"bits": [4, 4]}}).bits == 4  # as a file has it
    assert settings_of({"kvzip": {"bits": [8, 4]}}).bits == [8, 4]


def test_a_document_of_another_model_stops_the_start(tmp_path: Path, model_dir: Path) -> None:
    other = kvzip.load(small_checkpoint.write(tmp_path / "other", seed=1), dtype=torch.float32, device="cpu")
    kvzip.save(kvzip.prefill(other, TEXT), tmp_path / "a.kvz", model=other)
    documents = {"documents": {"a": str(tmp_path / "a.kvz")}}
    with pytest.raises(ValueError, match=r"got a\.kvz of another"), running(model_dir, documents):
        pass


def test_a_server_without_the_routes_is_refused(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(ValueError, match="expected VLLM_PLUGINS to name kvzip for its backend, got 'other'"):
        EngineArgs(model=str(model_dir), dtype="float32", attention_backend="CUSTOM").create_engine_config()


def test_other_backends_are_left_as_they_are(model_dir: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    plain, ours = (
        EngineArgs(model=str(model_dir), dtype="float32", attention_backend=backend).create_engine_config()
        for backend in (None, "CUSTOM")
    )
    assert plain.model_config.hf_config.architectures == ["LlamaForCausalLM"]
    assert (plain.scheduler_config.scheduler_cls, plain.parallel_config.worker_extension_cls) == (None, "")
    assert ours.model_config.hf_config.architectures == ["KvzipLlamaForCausalLM"]
    assert ours.scheduler_config.scheduler_cls == refusals.SCHEDULER


def test_other_versions_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", lambda: "0.33.0")
    with pytest.raises(ImportError, match=r"expected vLLM 0\.26 or 0\.27, got 0\.33\.0"):
        versions.check()
    kvzip.vllm.register()  # changes nothing that other users of vLLM need
