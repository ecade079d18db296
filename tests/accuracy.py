"""The project's one rule for inexact results (CONTRIBUTING, section 6)."""

import torch
from torch import Tensor


def assert_as_accurate(actual: Tensor, exact: Tensor, baseline: Tensor) -> None:
    """Asserts that `actual` is about as near to the truth as plain PyTorch in the same dtype.

    Args:
        actual: what the code under test returned, in its own dtype.
        exact: the reference computed in float64 from the same (upcast) inputs.
        baseline: the reference with inputs and output in the dtype of `actual`.

    Its worst error is at most twice the baseline's, plus one ulp of the largest exact value.
    Infinities must stand in the same places; a NaN in `actual` never passes.
    """
    assert exact.dtype == torch.float64, f"the exact result must be float64, not {exact.dtype}"
    assert actual.shape == exact.shape == baseline.shape, (actual.shape, exact.shape, baseline.shape)
    if actual.numel() == 0:
        return
    got, plain = actual.detach().double().cpu(), baseline.detach().double().cpu()
    exact = exact.detach().cpu()
    assert not got.isnan().any(), "the result has NaN"
    infinite = exact.isinf()
    assert torch.equal(got[infinite], exact[infinite]) and not got[~infinite].isinf().any()
    if infinite.all():
        return
    error = (got - exact)[~infinite].abs().max().item()
    allowed = (plain - exact)[~infinite].abs().max().item()
    largest = exact[~infinite].abs().max().item()
    ulp = torch.finfo(actual.dtype).eps * largest
    assert error <= 2 * allowed + ulp, (
        f"worst error {error:.3e}, allowed 2 * {allowed:.3e} + {ulp:.3e} (largest value {largest:.3e}, {actual.dtype})"
    )


def same_fields(a: object, b: object) -> bool:
    """Whether two dataclasses of one kind have equal fields, those with tensors being the same objects.

    From Python 3.13 on `==` asks tensors whether they are equal before it asks whether they are the same.
    """
    return type(a) is type(b) and list(vars(a).values()) == list(vars(b).values())
