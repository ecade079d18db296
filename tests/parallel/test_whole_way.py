"""Ranks that share a model do what one process does: logits, scores, choices, answers, files."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import results
from whole_way import all_of, way

import kvzip
import random_model
import tiny_models
from accuracy import assert_as_accurate
from kvzip.cache import WindowKV, read_header
from kvzip.files import shared, tensors

SIZES = {"vocab_size": 260, "max_position_embeddings": 2048, "eos_token_id": random_model.END, "bos_token_id": None}
TWO = {
    "llama": lambda **sizes: tiny_models.llama(attention_bias=True, **sizes),
    "mistral": tiny_models.mistral,
    "qwen2": lambda **sizes: tiny_models.qwen2(tie_word_embeddings=True, **sizes),
    "qwen3": tiny_models.qwen3,
    "gemma2": tiny_models.gemma2,
    "gemma3": tiny_models.gemma3,
}
BRIEF = ("mistral", "qwen2", "qwen3", "gemma3")  # what does not depend on the family is tried with others
THREE = {
    "heads": lambda **sizes: tiny_models.llama(num_key_value_heads=3, attention_bias=True, **sizes),
    "shared": lambda **sizes: tiny_models.gemma3(num_key_value_heads=1, **sizes),
}


def write(directory: Path, make: Any, **changes: Any) -> Path:
    """A tiny model of a family with a byte tokenizer and a chat template."""
    tiny_models.build(make(**SIZES, **changes)).save_pretrained(directory)
    template = json.dumps({"chat_template": random_model.TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"})
    (directory / "tokenizer_config.json").write_text(template, encoding="utf-8")
    random_model.tokenizer().control.save(str(directory / "tokenizer.json"))
    return directory


def damage(source: Path, target: Path) -> None:
    """A copy of a file with one bit changed in the last bytes, which are keys or values of the last rank."""
    content = bytearray(source.read_bytes())
    content[-5] ^= 1
    target.write_bytes(content)


@pytest.fixture(scope="module", params=[(2, TWO), (3, THREE)], ids=["two", "three"])
def told(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """For each model: `one` process's results, those of each of the `ranks`, and where the files are.

    Files are in blocks that are smaller than a rank's rows and end within them.
    """
    count, families = request.param
    patch = pytest.MonkeyPatch()
    patch.setattr(tensors, "_BLOCK", 1000)
    patch.setattr(shared, "_SENT", 720)
    base = tmp_path_factory.mktemp("models")
    given, found = {}, {}
    for name, make in families.items():
        changes = {} if count == 2 else {"intermediate_size": 96}
        source, held = write(base / name, make, **changes), base / f"one-{name}"
        held.mkdir()
        brief = name in BRIEF
        one = way(source, held, brief=brief)
        damage(held / "dense.kvz", held / "damaged.kvz")
        found[name] = {"one": one, "exact": way(source, held, dtype=torch.float64), "held": held, "source": source}
        given[name] = (str(source), str(held), brief)
    directory = tmp_path_factory.mktemp("ranks")
    for rank in results(count, all_of, given, directory, directory=directory):
        for name, value in rank.items():
            found[name].setdefault("ranks", []).append(value)
    for name, value in found.items():
        value["made"] = directory / f"made-{name}"
    yield found
    patch.undo()


def whole(told: dict[str, Any]) -> list[dict[str, Any]]:
    """What is known of models that went the whole way."""
    return [found for name, found in told.items() if name not in BRIEF]


def test_logits_are_as_accurate_as_one_process(told: dict[str, Any]) -> None:
    for found in told.values():
        for rank in found["ranks"]:
            assert torch.equal(rank["logits"], found["ranks"][0]["logits"])
            assert_as_accurate(rank["logits"], found["exact"]["logits"], found["one"]["logits"])


def test_scores_are_those_of_one_process_up_to_rounding_and_alike_on_all_ranks(told: dict[str, Any]) -> None:
    for found in told.values():
        for name in ("scores", "kvzip+"):
            one, first = found["one"][name], found["ranks"][0][name]
            assert all(torch.equal(rank[name], first) for rank in found["ranks"])
            assert first.shape == one.shape
            assert (first - one).abs().max() < 1e-4 * one.abs().max()


def test_choices_are_those_of_one_process_bit_for_bit(told: dict[str, Any]) -> None:
    for found in told.values():
        one = found["one"]
        for rank in found["ranks"]:
            assert rank.get("counts") == one.get("counts")
            assert "shrunk" not in one or torch.equal(rank["shrunk"], one["shrunk"])
            for how, mask in one["choices"].items():
                assert torch.equal(rank["choices"][how], mask), how


def test_folded_and_streamed_caches_keep_as_many_pairs_and_nearly_the_same(told: dict[str, Any]) -> None:
    for found in whole(told):
        for name in ("folded", "grown", "stream"):
            kept, total, mask = found["one"][name]
            for rank in found["ranks"]:
                assert rank[name][:2] == (kept, total)
                assert torch.equal(rank[name][2], found["ranks"][0][name][2])
                assert int((rank[name][2] != mask).sum()) <= 0.02 * mask.numel()  # scores differ by rounding


def test_fits_are_those_of_one_process_up_to_rounding(told: dict[str, Any]) -> None:
    for found in whole(told):
        if "mass" not in found["ranks"][0]:
            continue  # ranks that share a head
        assert found["one"]["mass"][1].mean() > found["one"]["mass"][0].mean()
        for rank in found["ranks"]:
            assert (rank["mass"] - found["one"]["mass"]).abs().max() < 1e-3
        model = kvzip.load(found["source"], dtype=torch.float32, device="cpu")
        made, held = (kvzip.load_cache(found[name] / "fitted.kvz", model=model) for name in ("made", "held"))
        for ours, theirs in zip(made.context, held.context, strict=True):
            if isinstance(ours, WindowKV):
                continue
            assert (ours.bias - theirs.bias).abs().max() < 0.02 and torch.equal(ours.positions, theirs.positions)
            assert (ours.v - theirs.v).abs().max() < 1e-2 * theirs.v.abs().max()


def test_only_ranks_that_share_a_head_do_not_refit(told: dict[str, Any]) -> None:
    for name, found in told.items():
        assert name in BRIEF or ("mass" in found["ranks"][0]) == (name != "shared")


def test_answers_are_the_same_on_all_ranks_and_those_of_one_process(told: dict[str, Any]) -> None:
    for found in whole(told):
        for rank in found["ranks"]:
            assert rank["answers"] == found["ranks"][0]["answers"]
            assert rank["answers"][:3] == found["one"]["answers"][:3]


def test_a_rank_has_its_part_of_the_weights(told: dict[str, Any]) -> None:
    for found in told.values():
        count = len(found["ranks"])
        whole = found["one"]["shapes"]
        for rank in found["ranks"]:
            own = rank["shapes"]
            assert own["o"] == (whole["o"][0], whole["o"][1] // count)
            assert own["down"] == (whole["down"][0], whole["down"][1] // count)
            assert own["gate_up"] == (whole["gate_up"][0] // count, whole["gate_up"][1])
            assert own["qkv"][0] >= whole["qkv"][0] / count
        assert sum(rank["shapes"]["head"][0] for rank in found["ranks"]) == whole["head"][0]


def test_the_fingerprint_does_not_depend_on_the_number_of_ranks(told: dict[str, Any]) -> None:
    for found in told.values():
        assert {rank["fingerprint"] for rank in found["ranks"]} == {found["one"]["fingerprint"]}


def test_files_of_ranks_load_in_one_process_and_back(told: dict[str, Any]) -> None:
    for found in whole(told):
        model = kvzip.load(found["source"], dtype=torch.float32, device="cpu")
        for name in ("longer", "four", "dense"):
            held, made = found["held"] / f"{name}.kvz", found["made"]
            cache = kvzip.load_cache(made / f"{name}.kvz", model=model)
            header = read_header(held)
            assert read_header(made / f"{name}.kvz").keys() == header.keys()
            assert (cache.kept, cache.total) == (header["kept"], header["total"])
            # what ranks read of a file and write again is the same file
            assert (made / f"{name}.again.kvz").read_bytes() == held.read_bytes()
        assert not list(found["made"].glob(".*")), "a partial file was left"
        files = [found["held"] / f"{name}.kvz" for name in ("longer", "four", "dense")]
        caches = [kvzip.load_cache(path, model=model) for path in files]
        answers = [kvzip.generate(model, cache, ["How many steps?"], max_tokens=5) for cache in caches]
        for rank in found["ranks"]:
            assert rank["again"]["answers"] == [answer[0].token_ids for answer in answers]


def test_an_error_of_one_rank_is_raised_by_all(told: dict[str, Any]) -> None:
    expected = {
        "nan": "ValueError: expected scores without NaN",
        "there": "FileExistsError: expected a new file to write",
        "nowhere": "FileNotFoundError:",
        "whole": "ValueError: expected a cache with the heads of rank",
        "checkpoint": "ValueError: expected no checkpoint where",
        "infinite": "ValueError: expected finite",
        "damaged": "ValueError: expected",
    }
    for found in whole(told):
        for rank in found["ranks"]:
            for name, text in expected.items():
                assert rank["again"]["refused"][name].startswith(text), (name, rank["again"]["refused"][name])
