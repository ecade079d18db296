"""What loading takes: the packed bytes and the tensors in 16 bits, and meanwhile at most one layer of 16 bits more.

Storages are counted while they live, as torch's operations make them. What is mapped from a file is not counted: the
system reads and drops its pages as it likes.
"""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import quantized_files as files
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kvzip
from kvzip.models.weights import named_tensors
from kvzip.ops import weights as ops_weights

LAYERS = 5
FORMS = (
    "fp8 block",
    "fp8 tensor, static",
    "fbgemm",
    "int8, channel, zeros",
    "packed 4, group, zeros",
    "packed 8, group",
)
FORMS += ("awq", "gptq 4, sym", "gptq 8", "qserve")
ONE_LAYER = 2 * sum(n * k for n, k in files.SHAPES.values())  # bytes of its matrices in 16 bits
SPARE = 4096  # bytes of norms, scalars and the like


class Counted(TorchDispatchMode):
    """Bytes of the storages that live, and the most that did."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor | torch.UntypedStorage)]
        mapped = {(x.untyped_storage() if isinstance(x, Tensor) else x).data_ptr() for x in given}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if not isinstance(x, Tensor) or x.is_meta:
                continue
            storage = x.untyped_storage()
            place, size = storage.data_ptr(), storage.nbytes()
            if place in self.known or place in mapped or not size:
                continue
            self.known.add(place)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.gone, place, size)
        return out

    def gone(self, place: int, size: int) -> None:
        self.known.discard(place)
        self.live -= size


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """More layers than a test of values has, and blocks as much smaller than layers as they are in real models."""
    monkeypatch.setattr(files, "LAYERS", LAYERS)
    monkeypatch.setitem(files.CONFIG, "num_hidden_layers", LAYERS)
    monkeypatch.setattr(ops_weights, "_VALUES", 512)
    return Counted()


def measured(counted: Counted, path: Path, **options: Any) -> tuple[kvzip.Model, int, int]:
    """A model in bfloat16, the bytes that it keeps and the most that lived while it was loaded."""
    gc.collect()
    with counted:
        model = kvzip.load(path, dtype=torch.bfloat16, device="cpu", **options)
    gc.collect()
    return model, counted.live, counted.peak


def test_storages_are_counted_while_they_live() -> None:
    with (counted := Counted()):
        x = torch.zeros(1000)
        y = x[10:].view(-1, 2)
        z = (x + 1).sum()
        assert counted.live == 4000 + z.nbytes and counted.peak >= 8000
        del x
        assert counted.live == 4000 + z.nbytes
        del y
        assert counted.live == z.nbytes


@pytest.mark.parametrize("name", FORMS)
def test_a_quantized_checkpoint_is_never_expanded(name: str, counted: Counted, tmp_path: Path) -> None:
    files.write(tmp_path, files.FORMATS[name])
    stored = load_file(tmp_path / "model.safetensors")
    packed = sum(x.nbytes for key, x in stored.items() if "_proj" in key)
    plain = sum(x.nbytes for key, x in stored.items() if "_proj" not in key)
    del stored
    model, kept, peak = measured(counted, tmp_path)
    assert kept <= 1.05 * packed + plain + SPARE
    held = sum(tensor.nbytes for _, tensor in named_tensors(model.weights))
    assert held <= kept <= held + SPARE, "nothing lives beside the weights"
    assert peak <= kept + ONE_LAYER + SPARE, (peak - kept, ONE_LAYER)


@pytest.mark.parametrize(("form", "head"), [("fp8", None), ("int8", "int8"), ("int4", "int8")])
def test_quantizing_takes_one_layer_beyond_what_it_keeps(
    form: str, head: str | None, counted: Counted, tmp_path: Path
) -> None:
    every = tuple(f"layers.{n}.{name}" for n in range(LAYERS) for name in files.SHAPES)
    files.write(tmp_path, files.qserve(), plain=every)
    whole = sum(x.nbytes for x in load_file(tmp_path / "model.safetensors").values())
    model, kept, peak = measured(counted, tmp_path, weights=form, head_weights=head)
    held = sum(tensor.nbytes for _, tensor in named_tensors(model.weights))
    assert held <= kept <= held + SPARE < whole
    assert peak <= kept + ONE_LAYER + SPARE, (peak - kept, ONE_LAYER)


def test_a_dtype_to_be_cast_from_is_cast_a_tensor_at_a_time(counted: Counted, tmp_path: Path) -> None:
    """float32 checkpoints, whose matrices in 16 bits would be a copy."""
    every = tuple(f"layers.{n}.{name}" for n in range(LAYERS) for name in files.SHAPES)
    files.write(tmp_path, files.qserve(), plain=every)
    path = tmp_path / "model.safetensors"
    save_file({key: x.float() for key, x in load_file(path).items()}, path)
    _, kept, peak = measured(counted, tmp_path, weights="int8")
    assert peak <= kept + ONE_LAYER + SPARE
