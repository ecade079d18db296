"""Inline assembly of kernels, computed on the CPU for all codes there are: the interpreter leaves it out."""

import numpy as np
import pytest
import torch
import triton.language as tl
from ptx import run

from kvzip.ops.triton.codes import unpacking, unpacking_words
from kvzip.ops.triton.decode_codes import expanding

DTYPES = {tl.float16: torch.float16, tl.bfloat16: torch.bfloat16}
BYTES = np.arange(256, dtype=np.uint32)
WORDS = np.arange(65536, dtype=np.uint32)


def meant(kind: str, high: bool) -> torch.Tensor:
    """The numbers of all bytes, by the definition of the codes; those of NaN are NaN."""
    byte = torch.arange(256)
    if kind == "int4":
        return ((byte >> 4 if high else byte & 15) - 8).double()
    if kind == "int8":
        return byte.to(torch.uint8).view(torch.int8).double()
    return byte.to(torch.uint8).view(torch.float8_e4m3fn).double()


def halves(registers: np.ndarray, dtype: torch.dtype) -> list[torch.Tensor]:
    """The lower and the upper number of 16 bits of registers."""
    parts = [(registers >> np.uint32(16 * n)).astype(np.uint16).view(np.int16) for n in range(2)]
    return [torch.from_numpy(x).view(dtype).double() for x in parts]


CASES = [("e4m3", False), ("int8", False), ("int4", False), ("int4", True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "high"), CASES)
def test_words_become_the_numbers_of_their_bytes(kind, high, dtype):
    found = halves(*run(unpacking_words(kind, high, dtype), WORDS), DTYPES[dtype])
    exact = meant(kind, high)
    for place, got in enumerate(found):
        byte = torch.from_numpy(WORDS.astype(np.int64)) >> 8 * place & 255
        wanted = exact[byte]
        assert torch.equal(got[~wanted.isnan()], wanted[~wanted.isnan()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "high"), CASES)
def test_four_bytes_become_their_numbers(kind, high, dtype):
    turned = [np.roll(BYTES, 61 * n) for n in range(4)]
    together = sum(x << np.uint32(8 * n) for n, x in enumerate(turned))
    registers = run(unpacking(kind, high, dtype), together, outputs=2)
    found = [x for register in registers for x in halves(register, DTYPES[dtype])]
    for got, byte in zip(found, turned, strict=True):
        wanted = meant(kind, high)[torch.from_numpy(byte.astype(np.int64))]
        assert torch.equal(got[~wanted.isnan()], wanted[~wanted.isnan()])


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_rows_of_codes_become_steps_times_codes_and_zeros(bits, half):
    """Of two words with steps of their own; what is beyond float16 is its largest number."""
    each, dtype = 16 // bits, torch.float16 if half else torch.bfloat16
    words = [WORDS, np.roll(WORDS, 4097)]
    generator = torch.Generator().manual_seed(0)
    steps, zeros = (torch.randn(2, len(WORDS), generator=generator) * s for s in (0.3, 5.0))
    steps[:, ::7] *= 1000.0
    zeros[:, ::11] = 65504.0
    numbers = [x.numpy().view(np.uint32) for x in (*steps, *zeros)]
    registers = run(expanding(bits, half), words[0] | words[1] << np.uint32(16), *numbers, outputs=each)
    for part, register in enumerate(registers):
        at = part * bits // 8 * 8 + 8 - bits - part * bits % 8  # the first code of a byte is its highest
        for got, word, step, zero in zip(halves(register, dtype), words, steps, zeros, strict=True):
            code = torch.from_numpy((word >> np.uint32(at) & np.uint32(2**bits - 1)).astype(np.int64)).double()
            exact = code * step.double() + zero.double()
            largest = torch.finfo(dtype).max
            # float32 carries that many steps and takes them off again, before one rounding to the dtype
            carried = 2.0 ** {8: 15, 4: 11, 2: 9}[bits] * step.double().abs()
            error = torch.finfo(dtype).eps / 2 * exact.abs() + 2.0**-23 * carried
            assert ((got - exact.clamp(-largest, largest)).abs() <= error).all()


def test_what_is_not_known_is_refused():
    with pytest.raises(ValueError, match=r"got popc\.b32: add it here"):
        run("{ popc.b32 $0, $1; }", BYTES)
    with pytest.raises(KeyError, match="never"):
        run("{ .reg .b32 never; mov.b32 $0, never; }")
