"""Which part of a checkpoint a rank reads: of every quantized form, without starting ranks; and how much memory."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

import quantized_files as files

import kvzip
from kvzip.models import division as division_module
from kvzip.models import reading as reading_module
from kvzip.models.division import divided, own_head, parts_of
from kvzip.models.files import weight_files
from kvzip.models.llama import LAYER_NAMES
from kvzip.models.load import translate_config
from kvzip.models.quantization import read_quantization
from kvzip.models.reading import read_weights
from kvzip.models.stacks import Reading
from kvzip.models.weights import Weights
from kvzip.ops import QuantizedWeight
from kvzip.ops.weights import expand
from kvzip.parallel import Share

WIDTH = 16  # of a head


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank without others, and matrices whose parts end where groups do."""
    monkeypatch.setattr(reading_module, "together", lambda share: nullcontext())
    inner = {x: tuple(128 if n == files.INNER else n for n in shape) for x, shape in files.SHAPES.items()}
    monkeypatch.setattr(files, "SHAPES", inner)
    monkeypatch.setitem(files.CONFIG, "intermediate_size", 128)


def read(path: Path, share: Share | None, *, kind: str | None = None, head: str | None = None) -> tuple[Weights, str]:
    raw = json.loads((path / "config.json").read_text())
    how = Reading(torch.float32, torch.device("cpu"), kind=kind, head=head, share=share)
    config = translate_config(raw)
    return read_weights(weight_files(path), config, LAYER_NAMES, reading=how, quantization=read_quantization(raw))


def part_of(name: str, whole: Tensor, rank: int, size: int) -> Tensor:
    """The part by its definition: query heads and the inner width in equal parts, KV heads shared by neighbours."""
    if "q_proj" in name or "gate_proj" in name or "up_proj" in name:
        return whole.chunk(size)[rank]
    if "k_proj" in name or "v_proj" in name:
        heads = whole.split(WIDTH)
        return torch.cat(heads[rank * len(heads) // size : max(1, len(heads) // size) + rank * len(heads) // size])
    return whole.chunk(size, dim=1)[rank]


def check(weights: Weights, meant: dict[str, Tensor], rank: int, size: int, **bound: float) -> None:
    stacks = {field: LAYER_NAMES[field] for field in ("qkv", "o", "gate_up", "down")}
    for n, layer in enumerate(weights.layers):
        for field, names in stacks.items():
            own = getattr(layer, field)
            want = torch.cat([part_of(x, meant[f"model.layers.{n}.{x}"], rank, size) for x in names])
            assert isinstance(own, QuantizedWeight)
            torch.testing.assert_close(expand(own, torch.float64), want, **{"rtol": 1e-15, "atol": 0, **bound})


@pytest.mark.parametrize("name", files.FORMATS)
def test_a_rank_reads_its_part_of_every_form(name: str, tmp_path: Path) -> None:
    meant = files.write(tmp_path, files.FORMATS[name], shards=3 if name == "awq" else 1)
    digest = read(tmp_path, None)[1]
    for size in (2, 4):
        group = {"fp8 uneven block": 40, "awq": 32, "packed 4, group": 32, "fp8 block": 16, "packed 8, group": 16}
        group["fp8 block, scales of powers of 2"] = 32
        width = 64 // size  # inputs of o on a rank
        shared = size == 4 and "gptq" in name and "one group" not in name
        shared |= size == 4 and (
            "packed 4, group" in name or "short" in name or "early" in name or name == "float, block"
        )
        for rank in range(size):
            share = Share(rank, size, 2, None, None)
            if shared or width % group.get(name, 1):
                with pytest.raises(ValueError, match=r"end where groups of quantized weights do.* use 1"):
                    read(tmp_path, share)
                continue
            weights, own = read(tmp_path, share)
            check(weights, meant, rank, size)
            assert own == digest


def test_a_quantized_head_is_divided_in_multiples_of_its_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    form = files.qserve()
    made = form.make(files.VOCAB, files.HIDDEN, torch.Generator().manual_seed(3))
    form.extra = {f"lm_head.{suffix}": tensor for suffix, tensor in made.tensors.items()}
    files.write(tmp_path, form)
    monkeypatch.setattr(reading_module, "HEAD_UNIT", 8)
    for rank, rows in enumerate((slice(0, 24), slice(24, 40))):
        head = read(tmp_path, Share(rank, 2, 2, None, None))[0].unembed
        assert isinstance(head, QuantizedWeight)
        torch.testing.assert_close(expand(head, torch.float64), made.meant[rows], rtol=1e-15, atol=0)


@pytest.mark.parametrize("kind", ["int8", "e4m3", "int4"])
def test_rounding_while_reading_gives_the_codes_of_one_process(kind: str, tmp_path: Path) -> None:
    plain = tuple(f"layers.{n}.{name}" for n in range(files.LAYERS) for name in files.SHAPES)
    form = files.Format({}, files.FORMATS["awq"].make)
    files.write(tmp_path, form, plain=plain)
    if kind == "int4":  # groups of 128 inputs: a rank's part of o would be half of one
        with pytest.raises(ValueError, match="o every 128"):
            read(tmp_path, Share(0, 4, 2, None, None), kind=kind)
    whole = read(tmp_path, None, kind=kind)[0]
    rows = {name: shape[0] for name, shape in files.SHAPES.items()}
    meant = {}
    for n, layer in enumerate(whole.layers):
        for field in ("qkv", "o", "gate_up", "down"):
            names = [x.removesuffix(".weight") for x in LAYER_NAMES[field]]
            parts = expand(getattr(layer, field), torch.float64).split([rows[x] for x in names])
            meant |= {f"model.layers.{n}.{x}.weight": part for x, part in zip(names, parts, strict=True)}
    for rank in range(2):
        check(read(tmp_path, Share(rank, 2, 2, None, None), kind=kind)[0], meant, rank, 2, rtol=0)


@pytest.mark.parametrize("kind", ["int8", "e4m3", "int4"])
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_a_head_rounded_while_reading_is_divided_after_it(
    kind: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write(tmp_path, files.FORMATS["int8, channel"], head="tied" if tied else "plain")
    for module in (reading_module, division_module):
        monkeypatch.setattr(module, "HEAD_UNIT", 8)

    def head_of(share: Share | None) -> Tensor:
        weights = read(tmp_path, share, head=kind)[0]
        head = weights.unembed if share is None or not tied else own_head(weights.embed, share)
        assert isinstance(head, QuantizedWeight) and (weights.unembed is weights.embed) == tied
        return expand(head, torch.float64)

    ranks = [head_of(Share(rank, 2, 2, None, None)) for rank in range(2)]
    assert [len(x) for x in ranks] == [24, 16]
    assert torch.equal(torch.cat(ranks), head_of(None))


def test_ranks_that_do_not_divide_a_model_are_refused_naming_those_that_do() -> None:
    from kvzip.models.division import _divides

    config = translate_config({**files.CONFIG, "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 16})
    assert [n for n in range(1, 20) if _divides(config, n)] == [1, 2, 4]
    for size in (2, 4):
        names = parts_of(config, LAYER_NAMES, Share(size - 1, size, 4, None, None), unit=1)
        assert names["layers.0.self_attn.q_proj.weight"].stop == 192
        assert names["layers.0.mlp.down_proj.weight"].axis == 1
        own = divided(config, Share(0, size, 4, None, None))
        assert (own.num_heads, own.num_kv_heads, own.intermediate_size) == (12 // size, 4 // size, 128 // size)


def test_no_more_is_in_memory_than_the_part(tmp_path: Path) -> None:
    """Peak memory of a rank that reads half of 600 MB: its part, the mapped blocks, and what the library needs."""
    import subprocess

    from safetensors.torch import save_file

    hidden, inner = 1024, 16384
    config = {**files.CONFIG, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 3}
    config |= {"num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 64, "head_dim": 64}
    tensors = {}
    for name, tensor in _slots(config).items():
        prefix = "" if name.startswith("lm_head") else "model."
        tensors[prefix + name] = torch.zeros(tensor.shape)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    program = (
        "import sys, resource, torch, json; sys.path[:0] = sys.argv[2:]\n"
        "from contextlib import nullcontext\n"
        "import test_parts_of_weights as t\n"
        "t.reading_module.together = lambda share: nullcontext()\n"
        "t.reading_module.agreed = lambda share, decide: decide()\n"
        "peak = lambda: int([x for x in open('/proc/self/status') if x.startswith('VmHWM')][0].split()[1]) * 1024\n"
        "now = lambda: int([x for x in open('/proc/self/status') if x.startswith('VmRSS')][0].split()[1]) * 1024\n"
        "from pathlib import Path\n"
        "open('/proc/self/clear_refs', 'w').write('5')\n"
        "before = now()\n"
        "weights, _ = t.read(Path(sys.argv[1]), t.Share(1, 2, 4, None, None))\n"
        "print(json.dumps([peak() - before, sum(x.nbytes for _, x in t.named(weights))]))\n"
    )
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path), *paths], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    peak, own = json.loads(run.stdout)
    assert own < 0.51 * sum(x.nbytes for x in tensors.values())
    assert peak < own + (400 << 20), (peak, own)


def _slots(config: dict[str, Any]) -> dict[str, Tensor]:
    from kvzip.models.weights import empty_weights, slots

    made = translate_config(config)
    return slots(made, empty_weights(made, dtype=torch.float32, device="meta"), LAYER_NAMES)


def named(weights: Weights) -> list[tuple[str, Tensor]]:
    from kvzip.models.weights import named_tensors

    return list(named_tensors(weights))


def test_what_is_no_group_is_refused(tmp_path: Path) -> None:
    files.write(tmp_path, files.FORMATS["awq"])
    with pytest.raises(TypeError, match=r"expected group to be a torch\.distributed process group"):
        kvzip.load(tmp_path, device="cpu", group=2)
