"""Which tensors of which files count: logits as Transformers' from the same directory, or a refusal that names why."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_against_transformers import AGREES, BROKEN, IDS, copy, edited_config, error, relative
from transformers import AutoModelForCausalLM

import kvzip
import tiny_models
from kvzip.models import Model, read_json

FAMILIES: dict[str, Callable[..., Any]] = {
    "llama": tiny_models.llama,
    "mistral": tiny_models.mistral,
    "qwen2": tiny_models.qwen2,
    "qwen3": tiny_models.qwen3,
    "gemma2": tiny_models.gemma2,
    "gemma3": tiny_models.gemma3,
    "gemma3-multimodal": tiny_models.gemma3_multimodal,
}
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's directory with a head of its own."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            path = made[family] = tmp_path_factory.mktemp(family)
            model = tiny_models.build(FAMILIES[family]())
            with torch.no_grad():
                model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.roll(1, dims=0))
            model.config.tie_word_embeddings = False
            model.save_pretrained(path)
            assert named(load_file(path / "model.safetensors"), "lm_head.weight")
        return made[family]

    return get


@torch.no_grad()
def theirs(path: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    return model(IDS, use_cache=False).logits


def load(path: Path, **options: Any) -> Model:
    return kvzip.load(path, dtype=torch.float32, device="cpu", **options)


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], Any], file: str = "model.safetensors") -> None:
    tensors = load_file(path / file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / file, {"format": "pt"})


def named(tensors: dict[str, torch.Tensor], end: str) -> str:
    (name,) = (name for name in tensors if name.endswith(end))
    return name


def equal_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors[named(tensors, "lm_head.weight")] = tensors[named(tensors, "embed_tokens.weight")].clone()


def no_head(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[named(tensors, "lm_head.weight")]


def no_embedding(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[named(tensors, "embed_tokens.weight")]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False, None], ids=["tied", "untied", "default"])
@pytest.mark.parametrize(
    "change", [lambda _: None, equal_head, no_head, no_embedding], ids=["other", "equal", "no-head", "no-embedding"]
)
def test_tied_and_untied_heads_are_those_of_transformers(
    family: str, tied: bool | None, change: Callable[..., Any], untied: Callable[[str], Path], tmp_path: Path
) -> None:
    copy(untied(family), tmp_path)
    with edited_config(tmp_path) as raw:
        raw.pop("tie_word_embeddings", None)
        raw |= {} if tied is None else {"tie_word_embeddings": tied}
    rewrite(tmp_path, change)
    said = "gemma" in family if tied is None else tied
    if not said and change in (no_head, no_embedding):  # Transformers makes up random weights, and warns
        with pytest.raises(ValueError, match=r"(lm_head|embed_tokens)\.weight' is missing"):
            load(tmp_path)
        return
    model = load(tmp_path)
    assert error(model, theirs(tmp_path)) <= AGREES
    assert model.config.tied is (model.weights.unembed is model.weights.embed)
    assert model.config.tied is (said and change in (equal_head, no_head, no_embedding))


def test_another_head_is_kept_wherever_it_lies(untied: Callable[[str], Path], tmp_path: Path) -> None:
    """In a shard of its own, in another type, and one row different."""
    copy(untied("qwen2"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].half()
    head[-1, -1] += 3
    (tmp_path / "model.safetensors").unlink()
    shard(tmp_path, {"head": ["lm_head.weight"], "rest": [name for name in tensors if "lm_head" not in name]}, tensors)
    with edited_config(tmp_path) as raw:
        raw["tie_word_embeddings"] = True
    assert error(load(tmp_path), theirs(tmp_path)) <= AGREES
    assert torch.equal(load(tmp_path).weights.unembed, head.float())


def shard(path: Path, parts: dict[str, list[str]], tensors: dict[str, torch.Tensor], **index: Any) -> None:
    for name, own in parts.items():
        save_file({key: tensors[key] for key in own}, path / f"{name}.safetensors", {"format": "pt"})
    weight_map = {key: f"{name}.safetensors" for name, own in parts.items() for key in own}
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map, **index}))


# ---- which files


def halves(path: Path) -> tuple[dict[str, list[str]], dict[str, torch.Tensor]]:
    tensors = load_file(path / "model.safetensors")
    names = sorted(tensors)
    return {"a": names[::2], "b": names[1::2]}, tensors


def other_weights(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor * 0.5 for name, tensor in tensors.items()}


def one_file_before_the_index(path: Path) -> None:
    parts, tensors = halves(path)
    shard(path, parts, other_weights(tensors))


def stray_files(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    for name in ("consolidated", "adapter_model", "model-00001-of-00002", "optimizer"):
        save_file(other_weights(tensors), path / f"{name}.safetensors", {"format": "pt"})


def stray_files_beside_shards(path: Path) -> None:
    parts, tensors = halves(path)
    stray_files(path)
    (path / "model.safetensors").unlink()
    shard(path, parts, tensors)


def tensors_that_the_index_forgets(path: Path) -> None:
    parts, tensors = halves(path)
    (path / "model.safetensors").unlink()
    weight_map = {parts["a"][0]: "a.safetensors", parts["b"][0]: "b.safetensors", "gone": "b.safetensors"}
    shard(path, parts, tensors, weight_map=weight_map)


def tensors_in_another_shard_than_the_index_says(path: Path) -> None:
    parts, tensors = halves(path)
    (path / "model.safetensors").unlink()
    wrong = dict.fromkeys(parts["a"], "b.safetensors") | dict.fromkeys(parts["b"], "a.safetensors")
    shard(path, parts, tensors, weight_map=wrong)


def named_in_the_config(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    save_file(other_weights(tensors), path / "mine.safetensors", {"format": "pt"})
    with edited_config(path) as raw:
        raw["transformers_weights"] = "mine.safetensors"


def a_base_model(path: Path) -> None:
    rewrite(path, lambda tensors: [tensors.update({n.removeprefix("model."): tensors.pop(n)}) for n in list(tensors)])
    with edited_config(path) as raw:
        raw["architectures"] = ["Qwen2Model"]


def mixed_types(path: Path) -> None:
    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {name: tensor.to(kinds[n % 4]) for n, (name, tensor) in enumerate(sorted(tensors.items()))}

    rewrite(path, change)


def as_the_hub_s_cache(path: Path) -> None:
    """Every file is a link to a blob two directories up."""
    for file in list(path.iterdir()):
        blob = path.parent / f"blob-{file.name}"
        file.rename(blob)
        file.symlink_to(Path("..") / blob.name)


@pytest.mark.parametrize(
    "arrange",
    [
        one_file_before_the_index,
        stray_files,
        stray_files_beside_shards,
        tensors_that_the_index_forgets,
        tensors_in_another_shard_than_the_index_says,
        named_in_the_config,
        a_base_model,
        mixed_types,
        as_the_hub_s_cache,
    ],
)
def test_files_count_as_in_transformers(
    arrange: Callable[[Path], None], untied: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "model"
    path.mkdir()
    copy(untied("qwen2"), path)
    arrange(path)
    assert error(load(path), theirs(path)) <= AGREES


def test_the_arrangements_that_must_differ_do(untied: Callable[[str], Path], tmp_path: Path) -> None:
    copy(untied("qwen2"), tmp_path)
    before = theirs(tmp_path)
    named_in_the_config(tmp_path)
    assert relative(theirs(tmp_path), before) > BROKEN


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_type_alone_is_enough(family: str, untied: Callable[[str], Path], tmp_path: Path) -> None:
    copy(untied(family), tmp_path)
    for architectures in (None, []):
        with edited_config(tmp_path) as raw:
            raw["architectures"] = architectures
        assert error(load(tmp_path), theirs(tmp_path)) <= AGREES


def test_the_model_type_decides_where_the_two_differ(untied: Callable[[str], Path], tmp_path: Path) -> None:
    copy(untied("mistral"), tmp_path)
    with edited_config(tmp_path) as raw:
        raw["architectures"] = ["LlamaForCausalLM"]
    assert load(tmp_path).config.family == "mistral"
    assert error(load(tmp_path), theirs(tmp_path)) <= AGREES


# ---- whatever a directory holds


@settings(max_examples=30)
@given(
    present=st.sets(st.sampled_from(["one", "shards", "stray"])),
    head=st.sampled_from(["other", "equal", "absent"]),
    embedding=st.booleans(),
    wrapper=st.sampled_from(["model.", ""]),
    tied=st.sampled_from([True, False, "absent"]),
    index=st.sampled_from([{}, {"metadata": {"total_size": 1}}]),
)
@example({"one", "shards"}, "other", True, "model.", True, {})
@example({"shards", "stray"}, "other", False, "", True, {})
@example({"stray"}, "other", True, "model.", False, {})
def test_any_directory_is_read_as_transformers_reads_it(
    untied: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
    present: set[str],
    head: str,
    embedding: bool,
    wrapper: str,
    tied: bool | str,
    index: dict[str, Any],
) -> None:
    path = tmp_path_factory.mktemp("drawn")
    tensors = load_file(untied("llama") / "model.safetensors")
    {"other": lambda _: None, "equal": equal_head, "absent": no_head}[head](tensors)
    if not embedding:
        no_embedding(tensors)
    tensors = {name.replace("model.", wrapper, 1): tensor.contiguous() for name, tensor in tensors.items()}
    raw = json.loads((untied("llama") / "config.json").read_text())
    del raw["tie_word_embeddings"]
    (path / "config.json").write_text(json.dumps(raw if tied == "absent" else raw | {"tie_word_embeddings": tied}))
    if "one" in present:
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
    if "shards" in present:
        halved = {name: tensor * 0.5 for name, tensor in tensors.items()}
        shard(path, {"a": sorted(tensors)[::2], "b": sorted(tensors)[1::2]}, halved, **index)
    if "stray" in present:
        save_file(other_weights(tensors), path / "consolidated.safetensors", {"format": "pt"})
    if not present & {"one", "shards"}:
        with pytest.raises(OSError, match=r"model\.safetensors"):
            theirs(path)
        with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
            load(path)
    elif (head == "absent" or not embedding) and (tied is not True or (head == "absent" and not embedding)):
        with pytest.raises(ValueError, match="is missing"):  # random weights in Transformers
            load(path)
    else:
        assert error(load(path), theirs(path)) <= AGREES


# ---- what is refused


@pytest.mark.parametrize(
    "name",
    [
        "../other/a.safetensors",
        "sub/../../a.safetensors",
        "/etc/a.safetensors",
        "..\\a.safetensors",
        "C:\\a.safetensors",
        "\\\\host\\share\\a.safetensors",
        "a.bin",
        "a.safetensors\0",
        "\x1b]0;a.safetensors",
        "",
        None,
        3,
        ["a.safetensors"],
    ],
)
def test_a_name_that_leaves_the_directory_is_refused(name: Any, untied: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.mkdir()
    copy(untied("qwen2"), path)
    (tmp_path / "other").mkdir()
    for place in ("a.safetensors", "other/a.safetensors"):
        (path / "model.safetensors").rename(tmp_path / place) if place[0] == "a" else None
        save_file(load_file(tmp_path / "a.safetensors"), tmp_path / place, {"format": "pt"})
    (path / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(ValueError, match=r"weight_map\['model\.norm\.weight'\] in model\.safetensors\.index\.json"):
        load(path)
    if name is not None:
        with edited_config(path) as raw:
            raw["transformers_weights"] = name
        with pytest.raises(ValueError, match=r"transformers_weights in config\.json"):
            load(path)


@pytest.mark.parametrize("index", [{}, {"weight_map": None}, {"weight_map": {}}, {"weight_map": ["a.safetensors"]}])
def test_an_index_without_a_map_is_refused(index: Any, untied: Callable[[str], Path], tmp_path: Path) -> None:
    copy(untied("qwen2"), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"weight_map in model\.safetensors\.index\.json"):
        load(tmp_path)


def test_other_files_alone_are_no_checkpoint(untied: Callable[[str], Path], tmp_path: Path) -> None:
    copy(untied("qwen2"), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "consolidated.safetensors")
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors\.index\.json.*got consolidated\.safetensors"):
        load(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"got an adapter \(consolidated\.safetensors\): merge"):
        load(tmp_path)


def test_a_quantized_tensor_is_named(untied: Callable[[str], Path], tmp_path: Path) -> None:
    copy(untied("qwen2"), tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(tmp_path, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(ValueError, match=f"'{name}' of a floating type, got I8"):
        load(tmp_path)


def test_a_config_far_larger_than_its_files_is_refused_before_memory_is_taken(
    untied: Callable[[str], Path], tmp_path: Path
) -> None:
    copy(untied("qwen2"), tmp_path)
    with edited_config(tmp_path) as raw:
        raw |= {"vocab_size": 2**31 - 1, "intermediate_size": 2**31 - 1}
    with pytest.raises(ValueError, match="do not belong together"):
        load(tmp_path)


BROKEN_JSON = {
    b"": "0 bytes that do not parse",
    b"{": "do not parse",
    b"\xff\xfe{}": "in UTF-8",
    b"\xef\xbb\xbf{}": "do not parse",
    b"[]": "a JSON object, got a list",
    b'"text"': "a JSON object, got a str",
    b"null": "a JSON object, got a NoneType",
    b"[" * 100_000: "do not parse",
    b'{"a": ' + b"9" * 5000 + b"}": "do not parse",
    b'{"a": {"b": [1, NaN]}}': r"got nan for 'a\.b\.1'",
    b'{"a": -Infinity}': "got -inf for 'a'",
    b'{"a": 1e999}': "got inf for 'a'",
}


@pytest.mark.parametrize("content", BROKEN_JSON, ids=range(len(BROKEN_JSON)))
@pytest.mark.parametrize("file", ["config.json", "generation_config.json", INDEX])
def test_json_that_is_not_sound_is_named(
    file: str, content: bytes, untied: Callable[[str], Path], tmp_path: Path
) -> None:
    copy(untied("qwen2"), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "a.safetensors"}}))
    (tmp_path / "a.safetensors").write_bytes(b"")
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"{file}.*{BROKEN_JSON[content]}"):
        load(tmp_path)
    with pytest.raises(ValueError, match=f"{file}.*{BROKEN_JSON[content]}"):
        read_json(tmp_path / file)


def test_json_is_read_and_an_absent_file_is_empty(tmp_path: Path) -> None:
    assert read_json(tmp_path / "absent.json") == {}
    (tmp_path / "a.json").write_text('{"ü": [1.5, -2e-3, 7, null, "NaN"]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"ü": [1.5, -2e-3, 7, None, "NaN"]}
    (tmp_path / "d.json").mkdir()
    with pytest.raises(ValueError, match=r"d\.json to be a file"):
        read_json(tmp_path / "d.json")
