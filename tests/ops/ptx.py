"""Computes straight lines of PTX on a CPU: kernels' inline assembly, which neither interpreter nor compiler checks."""

import re

import numpy as np
import torch
from numpy.typing import NDArray

Words = NDArray[np.uint32]


def run(asm: str, *inputs: Words, outputs: int = 1) -> list[Words]:
    """Returns the registers $0 to $outputs - 1 of a block of PTX, whose other operands, in order, are `inputs`.

    Raises: KeyError for a register that was never written, ValueError for an instruction that no kernel has used yet.
    """
    registers: dict[str, Words] = {f"${outputs + n}": x.astype(np.uint32) for n, x in enumerate(inputs)}
    for line in asm.strip().removeprefix("{").removesuffix("}").split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        name, _, rest = line.strip().partition(" ")
        target, *operands = [x.strip() for x in re.split(r",(?![^{]*\})", rest)]
        registers[target] = _step(name, [_value(x, registers) for x in operands])
    return [registers[f"${n}"] for n in range(outputs)]


def _value(operand: str, registers: dict[str, Words]) -> Words:
    if operand.startswith("0f"):
        return np.array([int(operand[2:], 16)], np.uint32)
    if re.match(r"-?(0x)?\d", operand):
        return np.array([int(operand, 0) & 0xFFFFFFFF], np.uint32)
    return registers[operand]


def _step(name: str, args: list[Words]) -> Words:
    kind, *rest = name.split(".")
    if kind == "mov":
        return args[0]
    if name == "cvt.u32.u16":
        return args[0] & np.uint32(0xFFFF)
    if kind in _INTEGERS:
        return _INTEGERS[kind](*args)
    if kind in _ARITHMETIC:
        numbers = [_numbers(x, rest[-1]) for x in args]
        return _bits(_ARITHMETIC[kind](*numbers), rest[-1])
    if kind == "cvt" and rest[-1] == "f32":  # the first operand is the upper half
        high, low = (_numbers(x, "f32")[0] for x in args)
        return _bits(np.stack([low, high]), rest[-2], clamped="satfinite" in rest)
    raise ValueError(f"expected {', '.join([*_INTEGERS, *_ARITHMETIC])}, mov or cvt from f32, got {name}: add it here")


_ARITHMETIC = {  # in float64, where these are exact for numbers of 16 bits
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "fma": lambda a, b, c: a * b + c,
}


def _prmt(a: Words, b: Words, select: Words) -> Words:
    """Bytes that the four lower hexadecimal digits of `select` choose among those of a, 0 to 3, and of b, 4 to 7."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    chosen = [(both >> np.uint64(8 * (int(select[0]) >> 4 * n & 7))) & np.uint64(255) for n in range(4)]
    assert not int(select[0]) & 0x8888, "a digit of 8 and more copies a sign"
    return sum(x << np.uint64(8 * n) for n, x in enumerate(chosen)).astype(np.uint32)


def _lop3(a: Words, b: Words, c: Words, table: Words) -> Words:
    """Bit i of `table` is the result where the bits of a, b and c, the first the highest, are i."""
    found = np.zeros_like(a | b | c)
    for i in range(8):
        if int(table[0]) >> i & 1:
            bits = [x if i >> place & 1 else ~x for x, place in ((a, 2), (b, 1), (c, 0))]
            found |= bits[0] & bits[1] & bits[2]
    return found


_INTEGERS = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "shl": np.left_shift,
    "shr": np.right_shift,
    "prmt": _prmt,
    "lop3": _lop3,
}


def _numbers(x: Words, kind: str) -> NDArray[np.float64]:
    """The one or two numbers of a register, the lower first."""
    if kind == "f32":
        return x.view(np.float32).astype(np.float64)[None]
    halves = np.stack([x & np.uint32(0xFFFF), x >> np.uint32(16)])
    if kind == "f16x2":
        return halves.astype(np.uint16).view(np.float16).astype(np.float64)
    return (halves << np.uint32(16)).view(np.float32).astype(np.float64)


def _bits(x: NDArray[np.float64], kind: str, *, clamped: bool = False) -> Words:
    """Numbers rounded to the nearest ones of a kind; clamped: what is beyond float16 is its largest."""
    if kind == "f32":
        return x[0].astype(np.float32).view(np.uint32)
    dtype = torch.float16 if kind == "f16x2" else torch.bfloat16
    rounded = torch.from_numpy(x.clip(-65504, 65504) if clamped else x).to(dtype)
    low, high = rounded.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
    return low | high << np.uint32(16)
