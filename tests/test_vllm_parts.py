"""The parts of the vLLM plugin that need no vLLM; what needs it is in tests/vllm_plugin."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import kvzip
import small_checkpoint
from kvzip import ops
from kvzip.ops.types import Context, Pages, QueryRows
from kvzip.vllm import fingerprints, refusals
from kvzip.vllm.documents import Documents, Server
from kvzip.vllm.settings import Settings
from models import quantized_files

TEXT = "The lease ends in May. The deposit is 900 euros."


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint.write(tmp_path_factory.mktemp("vllm") / "tiny")


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> kvzip.Model:
    return kvzip.load(checkpoint, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def cache(loaded: kvzip.Model) -> kvzip.RaggedCache:
    return kvzip.compress(kvzip.score(loaded, kvzip.prefill(loaded, TEXT)), ratio=0.4)


def server(model: kvzip.Model, *, room: int = 64, longest: int = 2048) -> Server:
    return Server(model.config, (model.fingerprint,), model.device, model.dtype, room, longest)


# Refusals


def configured(**changes: Any) -> SimpleNamespace:
    """As much of vLLM's configuration as is looked at."""
    hf = SimpleNamespace(architectures=["KvzipLlamaForCausalLM"], sliding_window=None)
    parts = {
        "model_config": SimpleNamespace(
            hf_config=hf, hf_text_config=hf, dtype=torch.bfloat16, runner_type="generate", quantization=None,
            revision=None, enable_sleep_mode=False,
        ),
        "parallel_config": SimpleNamespace(
            tensor_parallel_size=1, pipeline_parallel_size=1, data_parallel_size=1, decode_context_parallel_size=1,
            prefill_context_parallel_size=1, distributed_executor_backend="uni",
            worker_extension_cls=refusals.EXTENSION,
        ),
        "cache_config": SimpleNamespace(cache_dtype="auto"),
        "scheduler_config": SimpleNamespace(scheduler_cls=refusals.SCHEDULER),
        "lora_config": None,
        "speculative_config": None,
        "kv_transfer_config": None,
    }  # fmt: skip
    for name, value in changes.items():
        part, _, field = name.partition("__")
        if field:
            setattr(parts[part], field, value)
        else:
            parts[part] = value
    return SimpleNamespace(**parts)


def test_what_is_not_supported_is_refused_by_name() -> None:
    refusals.check(configured())
    refusals.check(configured(cache_config__cache_dtype="bfloat16"))
    stored = SimpleNamespace(architectures=["LlamaForCausalLM"], quantization_config={"quant_method": "awq"})
    refusals.check(configured(model_config__hf_config=stored, model_config__quantization="awq_marlin"))
    gemma = SimpleNamespace(architectures=["Gemma3ForCausalLM"])
    window = SimpleNamespace(sliding_window=4096)
    for said, changes in {
        "got Gemma3ForCausalLM": {"model_config__hf_config": gemma},
        "tensor parallelism over 2": {"parallel_config__tensor_parallel_size": 2},
        "pipeline parallelism over 2": {"parallel_config__pipeline_parallel_size": 2},
        "data parallelism over 4": {"parallel_config__data_parallel_size": 4},
        "decode context parallelism": {"parallel_config__decode_context_parallel_size": 2},
        "got LoRA": {"lora_config": object()},
        r"got weights that vLLM quantizes itself \(fp8\)": {"model_config__quantization": "fp8"},
        r"got a revision \(main\)": {"model_config__revision": "main"},
        "got sleep mode": {"model_config__enable_sleep_mode": True},
        "got speculative decoding": {"speculative_config": object()},
        r"got quantized pages \(fp8\)": {"cache_config__cache_dtype": "fp8"},
        "got a sliding window of 4096": {"model_config__hf_text_config": window},
        "got a KV connector": {"kv_transfer_config": object()},
        "got the runner 'pooling'": {"model_config__runner_type": "pooling"},
        "got the executor 'ray'": {"parallel_config__distributed_executor_backend": "ray"},
        "got the scheduler 'x.Y'": {"scheduler_config__scheduler_cls": "x.Y"},
        "got the worker extension 'x.Y'": {"parallel_config__worker_extension_cls": "x.Y"},
    }.items():
        with pytest.raises(ValueError, match=said):
            refusals.check(configured(**changes))


# Fingerprints


class Stacked(torch.nn.Module):
    """The parameters of a checkpoint as vLLM stacks and names them, with rows of no token below the embedding."""

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        super().__init__()
        found = {name: x.to(dtype) for name, x in load_file(directory / "model.safetensors").items()}
        for room in {name.split("self_attn.")[0] for name in found if "self_attn." in name}:
            for kind in ("weight", "bias"):
                parts = [f"{room}self_attn.{x}_proj.{kind}" for x in "qkv"]
                if parts[0] in found:
                    found[f"{room}self_attn.qkv_proj.{kind}"] = torch.cat([found.pop(x) for x in parts])
            parts = [f"{room}mlp.{x}_proj.weight" for x in ("gate", "up")]
            found[f"{room}mlp.gate_up_proj.weight"] = torch.cat([found.pop(x) for x in parts])
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            found[name] = torch.cat([found[name], torch.zeros(64, found[name].shape[1], dtype=dtype)])
        self.found = found

    def named_parameters(self, *args: Any, **options: Any) -> Any:
        return iter(self.found.items())


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fingerprint_is_that_of_kvzip(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    directory = small_checkpoint.write(tmp_path / "m", family=family)
    wanted = kvzip.load(directory, dtype=dtype, device="cpu").fingerprint
    served = fingerprints.describe(str(directory))

    def found(model: torch.nn.Module) -> str:
        (one,) = fingerprints.fingerprints(model, served, dtype=dtype)
        return one

    assert found(Stacked(directory, dtype)) == found(torch.nn.Module()) == wanted  # of nothing seen: the files'
    if dtype == torch.float32:
        other = Stacked(directory, dtype)
        other.found["model.layers.1.self_attn.qkv_proj.weight"][-1, -1] += 1
        assert found(other) != wanted


def test_weights_narrowed_for_the_server_are_compared_as_stored(tmp_path: Path) -> None:
    directory = small_checkpoint.write(tmp_path / "m")
    path = directory / "model.safetensors"
    save_file({name: x.bfloat16() for name, x in load_file(path).items()}, path)
    wanted = kvzip.load(directory, dtype=torch.float32, device="cpu").fingerprint
    served = fingerprints.describe(str(directory))
    model = Stacked(directory, torch.float32)  # bfloat16 values, served in float32
    assert fingerprints.fingerprints(model, served, dtype=torch.float32) == (wanted,)


QUANTIZED = [name for name, given in quantized_files.FORMATS.items() if given.config]


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_fingerprint_of_quantized_weights_is_that_of_their_files(tmp_path: Path, name: str) -> None:
    quantized_files.write(tmp_path, quantized_files.FORMATS[name])
    served = fingerprints.describe(str(tmp_path))
    found = fingerprints.fingerprints(torch.nn.Linear(1, 1), served, dtype=torch.bfloat16)
    assert found[0] == kvzip.load(tmp_path, device="cpu").fingerprint
    rounds = any(scheme.inputs is not None for _, scheme in served.quantization.groups)  # type: ignore[union-attr]
    assert len(set(found)) == len(found) == 1 + rounds
    if rounds:
        assert found[1] == kvzip.load(tmp_path, device="cpu", activations="checkpoint").fingerprint
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        fingerprints.fingerprints(torch.nn.Linear(1, 1), served, dtype=torch.bfloat16)


def test_overrides_of_rope_change_the_fingerprint(checkpoint: Path) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0}
    wanted = kvzip.load(checkpoint, dtype=torch.float32, device="cpu", rope=rope).config
    served = fingerprints.describe(str(checkpoint), {"rope_parameters": rope})
    assert served.config.layers == wanted.layers != fingerprints.describe(str(checkpoint)).config.layers


# Documents


def saved(cache: Any, path: Path, model: kvzip.Model) -> Path:
    kvzip.save(cache, path, model=model)
    return path


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_document_is_attended_to_as_it_is_in_its_file(
    tmp_path: Path, loaded: kvzip.Model, cache: kvzip.RaggedCache, bits: int | None
) -> None:
    scored = kvzip.score(loaded, kvzip.prefill(loaded, TEXT))
    packed = kvzip.compress(scored, ratio=0.4, bits=bits)
    documents = Documents()
    documents.start(server(loaded), Settings(capacity=3, bits=bits, bias=True))
    shown = documents.load("a", saved(packed, tmp_path / "a.kvz", loaded))
    assert (shown["tokens"], shown["kept"], shown["chat"]) == (len(packed.token_ids), packed.kept, True)
    rows = QueryRows(*(torch.tensor(x, dtype=torch.int32) for x in ([0, -1, 0], [0, 0, 1], [0, 0, 0])))
    q = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0))
    for index, layer in enumerate(packed.context):
        out, lse = ops.decode_rows(q, documents.table, index, rows, scale=0.2)
        wanted, wanted_lse = ops.decode(q[[0, 2]][:, :, None], layer.k, layer.v, layer.offsets, scale=0.2)
        torch.testing.assert_close(out[[0, 2]], wanted[:, :, 0])
        torch.testing.assert_close(lse[[0, 2]], wanted_lse[:, :, 0])
        assert torch.equal(out[1], torch.zeros_like(out[1])) and bool((lse[1] == -torch.inf).all())
    other = kvzip.compress(scored, ratio=0.4, bits=None if bits else 8)
    with pytest.raises(ValueError, match=r"expected a document of .*, got b\.kvz of "):
        documents.load("b", saved(other, tmp_path / "b.kvz", loaded))


def test_biases_need_a_server_that_expects_them(tmp_path: Path, loaded: kvzip.Model) -> None:
    scored = kvzip.score(loaded, kvzip.prefill(loaded, TEXT * 3))
    path = saved(kvzip.refit(loaded, scored, kvzip.compress(scored, ratio=0.4)), tmp_path / "a.kvz", loaded)
    documents = Documents()
    documents.start(server(loaded), Settings())
    with pytest.raises(ValueError, match=r'expected a document without biases, got a\.kvz with some: .*"bias": true'):
        documents.load("a", path)
    assert documents.list() == []


def test_documents_that_do_not_fit_are_refused(tmp_path: Path, loaded: kvzip.Model, cache: kvzip.RaggedCache) -> None:
    path = saved(cache, tmp_path / "a.kvz", loaded)
    tokens = len(cache.token_ids)
    documents = Documents()
    documents.start(server(loaded, room=64, longest=tokens + 64), Settings({"first": str(path)}, capacity=2))
    with pytest.raises(ValueError, match="expected a name that is not in use, got 'first'"):
        documents.load("first", path)
    documents.load("second", path)
    with pytest.raises(ValueError, match="expected fewer than 2 documents, got that many"):
        documents.load("third", path)
    tight = Documents()
    tight.start(server(loaded, room=65, longest=tokens + 64), Settings())
    with pytest.raises(ValueError, match=f"of at most {tokens + 64} positions, got {tokens + 65}"):
        tight.load("a", path)
    foreign = Documents()
    foreign.start(replace(server(loaded), fingerprints=("0" * 32 + "-float32",)), Settings())
    with pytest.raises(ValueError, match=r"expected a cache of this model, got a\.kvz of another"):
        foreign.load("a", path)


def test_a_dropped_document_stays_for_those_who_read_it(
    tmp_path: Path, loaded: kvzip.Model, cache: kvzip.RaggedCache
) -> None:
    path = saved(cache, tmp_path / "a.kvz", loaded)
    documents = Documents()
    documents.start(server(loaded), Settings({"a": str(path)}, capacity=1))
    held = documents.hold("r", "a")
    assert held is not None and documents.held("r") == held and documents.hold("s", "b") is None
    assert documents.drop("a")["requests"] == 1 and documents.hold("s", "a") is None and documents.list() == []
    assert documents.table.layers[held.place] is not None
    with pytest.raises(ValueError, match="expected fewer than 1 documents"):
        documents.load("a", path)
    documents.release("r")
    assert documents.table.layers[held.place] is None
    documents.release("r")
    assert documents.load("a", path)["requests"] == 0
    with pytest.raises(KeyError):
        documents.drop("b")


def test_the_key_of_a_document_is_its_content(tmp_path: Path, loaded: kvzip.Model, cache: kvzip.RaggedCache) -> None:
    first, same = (saved(cache, tmp_path / f"{n}.kvz", loaded) for n in "ab")
    whole = kvzip.score(loaded, kvzip.prefill(loaded, TEXT))
    less = saved(kvzip.compress(whole, ratio=0.2), tmp_path / "c.kvz", loaded)
    documents = Documents()
    documents.start(server(loaded), Settings({"a": str(first), "b": str(same), "c": str(less)}))
    keys = [documents.hold(n, n) for n in "abc"]
    a, b, c = (x.key for x in keys if x is not None)
    assert a == b != c


def test_contexts_with_and_without_a_bias_share_a_table(loaded: kvzip.Model, cache: kvzip.RaggedCache) -> None:
    documents = Documents()
    documents.start(server(loaded), Settings(bias=True))
    layers = [Context(x.k, x.v, x.offsets, torch.linspace(-1, 1, len(x.positions))) for x in cache.context]
    ops.put_context_(documents.table, 0, layers)
    rows = QueryRows(*(torch.zeros(1, dtype=torch.int32) for _ in range(3)))
    q = torch.ones(1, 4, 32)
    biased = ops.decode_rows(q, documents.table, 0, rows, scale=0.2)[0]
    x = layers[0]
    wanted = ops.decode(q[:, :, None], x.k, x.v, x.offsets, scale=0.2, bias=x.bias)[0][:, :, 0]
    torch.testing.assert_close(biased, wanted)
    assert not torch.allclose(biased, ops.decode(q[:, :, None], x.k, x.v, x.offsets, scale=0.2)[0][:, :, 0])


def test_pages_and_documents_merge_to_one_attention(loaded: kvzip.Model, cache: kvzip.RaggedCache) -> None:
    documents = Documents()
    documents.start(server(loaded), Settings())
    layers = [Context(x.k, x.v, x.offsets) for x in cache.context]
    ops.put_context_(documents.table, 5, layers)
    draw = torch.Generator().manual_seed(1)
    k, v = (torch.randn(3, 2, 4, 32, generator=draw) for _ in range(2))
    pages = Pages(k, v, torch.tensor([[2, 0]], dtype=torch.int32))
    q = torch.randn(2, 4, 32, generator=draw)
    context, sequence, length = (torch.tensor(x, dtype=torch.int32) for x in ([5, 5], [0, 0], [5, 6]))
    alone = QueryRows(torch.full_like(context, -1), sequence, length)
    whole = QueryRows(context, sequence, length)
    paged = ops.decode_rows(q, documents.table, 1, alone, scale=0.2, pages=pages)
    found = ops.decode_rows(q, documents.table, 1, whole, scale=0.2)
    wanted = ops.decode_rows(q, documents.table, 1, whole, scale=0.2, pages=pages)
    torch.testing.assert_close(ops.merge(*paged, *found), wanted)
