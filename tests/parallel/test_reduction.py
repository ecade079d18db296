"""Which sums are taken by default: one-shot where every GPU reads every other, NCCL elsewhere."""

from types import SimpleNamespace

import pytest
import torch

from kvzip.parallel import Share, reduction


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
