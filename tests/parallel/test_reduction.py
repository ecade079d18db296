"""Which sums are taken by default: one-shot where every GPU reads every other, NCCL elsewhere."""

from types import SimpleNamespace

import pytest
import torch

from kvzip.parallel import Share, reduction


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are compiled, as where there are GPUs."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("KVZIP_BACKEND", raising=False)


def way(monkeypatch: pytest.MonkeyPatch, size: int, *, visible: int, readable: bool = True, others: bool = True) -> str:
    """The way that rank 0 takes, told that all others could (or could not) read their peers."""

    def everyone(share: Share, value: object) -> list[object]:
        return [value, *([others] if isinstance(value, bool) else [f"gpu{i}" for i in range(1, size)])]

    monkeypatch.setattr(reduction, "everyone", everyone)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=f"gpu{i}"))
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: readable or (a, b) != (0, visible - 1))
    return reduction.default_way(Share(0, size, 8, None, None), torch.device("cuda", 0))


@pytest.mark.parametrize("size", [2, 4, 8])
def test_gpus_that_read_each_other_take_one_shot_sums(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    assert way(monkeypatch, size, visible=size) == "one-shot"


def test_others_take_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    assert way(monkeypatch, 4, visible=4, readable=False) == "nccl"
    assert way(monkeypatch, 4, visible=3) == "nccl"  # one is out of sight, in another machine perhaps
    assert way(monkeypatch, 4, visible=4, others=False) == "nccl"  # another rank cannot
    assert way(monkeypatch, 3, visible=3) == "nccl"


@pytest.mark.parametrize(("name", "value"), [("KVZIP_BACKEND", "reference"), ("TRITON_INTERPRET", "1")])
def test_without_compiled_kernels_sums_are_nccl_s(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert way(monkeypatch, 2, visible=2) == "nccl"
    with pytest.raises(ValueError, match=r"one-shot sums, which are a kernel: .*KVZIP_REDUCTION"):
        reduction.make_sum(
            Share(0, 2, 8, None, None), device=torch.device("cuda", 0), dtype=torch.float32, how="one-shot"
        )


def test_small_sums_take_the_kernel_and_others_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the model's dtype, up to 256 KiB, in whole words; both are given the residual."""
    from torch.distributed import _symmetric_memory as symmetric

    from kvzip.ops.triton import sum_ranks

    taken: list[tuple[str, object]] = []

    def kernel(x: torch.Tensor, boxes: object, turns: object, *, rank: int, residual: object = None) -> torch.Tensor:
        taken.append(("kernel", residual))
        return x

    def library(x: torch.Tensor, residual: torch.Tensor | None = None) -> object:
        taken.append(("library", residual))
        return lambda: x

    peers = SimpleNamespace(get_buffer=lambda rank, shape, dtype: torch.zeros(shape, dtype=dtype))
    monkeypatch.setattr(symmetric, "empty", lambda shape, dtype, device: torch.ones(shape, dtype=dtype))
    monkeypatch.setattr(symmetric, "rendezvous", lambda box, group: peers)
    monkeypatch.setattr(sum_ranks, "sum_ranks_", kernel)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(reduction, "everyone", lambda share, value: [value])
    share = Share(0, 2, 8, SimpleNamespace(group_name="all"), None)
    add = reduction._one_shot(share, library, device=torch.device("cpu"), dtype=torch.bfloat16)
    row = torch.zeros(1, 8192, dtype=torch.bfloat16)
    for x, expected in (
        (row, "kernel"),
        (torch.zeros(16, 8192, dtype=torch.bfloat16), "kernel"),
        (torch.zeros(17, 8192, dtype=torch.bfloat16), "library"),
        (row.float(), "library"),
        (row[:, :3], "library"),
        (row[:, :0], "library"),
    ):
        taken.clear()
        assert add(x, x)() is x and taken == [(expected, x)] and taken[0][1] is x
