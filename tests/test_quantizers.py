"""The quantizers that the study of bits simulates."""

import sys
from pathlib import Path

import pytest
import torch

from kvzip import ops

sys.path.append(str(Path(__file__).parents[1]))

from benchmarks import bits
from benchmarks.quantizers import Way, blocks_of, hadamard, matched, moments_of, restored, stored_bytes

OFFSETS = torch.tensor([0, 130, 130, 431], dtype=torch.int32)


def rows(seed=0, width=16):
    """Keys of three heads with channels of different sizes and centers, and second moments of queries."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-1, 1, width)[torch.randperm(width, generator=generator)]
    x = torch.randn(431, width, generator=generator) * sizes + 3 * sizes.flip(0)
    q = torch.randn(3, 500, width, generator=generator) * torch.logspace(1, -1, width)
    return x.half().float(), q.mT @ q / 500


def test_a_hadamard_matrix_is_orthonormal_and_symmetric():
    h = hadamard(32, torch.zeros((), dtype=torch.float64))
    assert torch.equal(h, h.mT)
    assert (h @ h - torch.eye(32, dtype=torch.float64)).abs().max() < 1e-15
    with pytest.raises(ValueError, match="power of two"):
        hadamard(24, h)


@pytest.mark.parametrize("number", [8, 4, 2])
def test_rows_alone_are_what_the_op_makes_of_them(number):
    x = rows()[0].half()
    packed = ops.quantize(x, bits=number)
    ours, theirs = restored(x, OFFSETS, number, Way()), ops.dequantize(packed, dtype=torch.float16)
    assert (ours != theirs).float().mean() < 0.01  # a step's last bit differs in a few rows
    assert ((ours - theirs).float().abs() <= packed.scale.float() * 1.01).all()
    held = packed.codes.nbytes + packed.scale.nbytes + packed.zero.nbytes
    assert stored_bytes(OFFSETS.diff().tolist(), 16, number, Way(), 2) == held
    packed = ops.quantize(x, bits=number, offsets=OFFSETS)
    held += packed.channels.center.nbytes + packed.channels.spread.nbytes
    assert stored_bytes(OFFSETS.diff().tolist(), 16, number, Way(center=True, spread=True), 2) == held


def test_blocks_have_each_row_once():
    found, used = blocks_of(OFFSETS, 431)
    assert found[used].sort().values.tolist() == list(range(431))
    heads = torch.searchsorted(OFFSETS[1:].long(), found, right=True)
    assert (heads == heads[:, :1]).all()


@pytest.mark.parametrize("form", [name for name in bits.FORMS if name != "plain"])
def test_many_bits_restore_all(form):
    """In 12 bits every form is near, so that what it does before rounding is undone after it."""
    x, asked = rows()
    for way in bits.FORMS[form]:
        back = restored(x, OFFSETS, 12, way, (asked,))
        assert (back - x).norm() < 2e-3 * x.norm()


def test_axes_that_match_queries_lose_less_of_the_logits_and_so_does_shaping():
    x, asked = rows()

    def lost(**options):
        back = restored(x, OFFSETS, 4, Way(center=True, rotate=True, **options), (asked,)) - x
        parts = zip(back.split(OFFSETS.diff().tolist()), asked, strict=True)
        return sum(((own @ q) * own).sum().item() for own, q in parts)

    plain = lost()
    assert lost(asked="scale") < plain / 2
    assert lost(asked="matrix") < plain / 2
    assert lost(asked="axes", shaped=True) < plain / 1.5
    assert lost(asked="white", shaped=True) < lost(asked="axes", shaped=True) / 1.5


def test_a_matrix_makes_the_moments_of_rows_and_queries_equal():
    x, asked = rows()
    before, after = matched(moments_of(x, OFFSETS), asked, "matrix")
    own = before.mT @ moments_of(x, OFFSETS) @ before
    theirs = after @ asked @ after.mT
    for n in (0, 2):  # head 1 has no rows
        assert (own[n] - theirs[n]).norm() < 0.05 * own[n].norm()


def test_names_of_variants():
    found = bits.variant_of("white:3/2+first1+model+shaped+outputs+refit")
    assert (found.bits, found.first, found.model, found.refit, found.gram) == ((3, 2), 1, True, True, False)
    assert all(way.shaped and way.asked == "white" for way in found.ways)
    for name in bits.VARIANTS:
        bits.variant_of(name)
    for wrong in ("kvarn", "kvarn:4", "new:4/4", "kvarn:4/4+more"):
        with pytest.raises(ValueError, match="expected a variant such as"):
            bits.variant_of(wrong)
