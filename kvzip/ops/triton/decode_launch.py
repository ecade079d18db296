"""How decoding is launched: sizes, what a kernel is compiled for, and its arguments."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kvzip.ops.triton.common import (
    compute_name,
    interpreted,
    launch_options,
    on_device,
    overlaps_launches,
    shared_memory,
)
from kvzip.ops.triton.decode_combine import combine_kernel
from kvzip.ops.triton.decode_kernel import ContextArgs, QueryArgs, TailArgs, WorkArgs, decode_kernel
from kvzip.ops.triton.decode_split import Form
from kvzip.ops.types import DecodeSchedule, Quantized, Splits


class Launch(NamedTuple):
    """Sizes of one launch: query rows and keys of a tile, warps of a program, stages of its load pipeline."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    per_sm: int = 2  # programs of an SM that splits are cut for, mostly those that run at once: 1, 2, 4 or 8
    early: bool = False  # for one token, start by programmatic dependent launch and prefetch the first rows to L2
    reserve: int = 0  # bytes of unused shared memory, which keep an SM to `per_sm` programs
    registers: int | None = None  # at most so many for a thread, so that programs of the next launch find room


def launch_config(
    D: int,
    rows: int,
    dtype: torch.dtype,
    bits: int = 16,
    *,
    turned: bool = False,
    one_step: bool = True,
    hopper: bool = True,
) -> Launch:
    """The launch for `rows` query rows that share a head's context; `bits` as from `tile_bits`.

    `turned`: keys or values are. `one_step`: all values of a row share it, in keys and in values.

    Tuned on an H100, 2026-11-26: docs/tuning.md. GPUs before Hopper multiply from registers and get smaller tiles where
    registers would spill; not tuned there.
    """
    padded = triton.next_power_of_2(D) != D  # tiles are wider than rows
    if dtype == torch.float32:  # products in plain float32: no tensor cores
        half = padded and bits < 16 and not hopper  # eight warps would spill
        mixed = 8 < bits < 16  # keys or values in codes, the others as they are
        stages = 1 if (D <= 64 and 4 < bits < 16) or (D > 128 and mixed) else 2  # two would spill
        if bits == 6 and D == 128 and not hopper:
            stages = 3  # here too
        return Launch(16 if D <= 128 else 8, 16, 4 if D <= 64 or half else 8, stages)  # larger tiles spill
    keys = 64 if D <= 128 else 32
    if turned and D > 128:
        rows = min(rows, 8)  # of 16 rows, four warps turned keys wrong with Triton 3.6
    if bits < 16:
        if bits <= 8 and D <= 128 and rows > 8 and one_step and hopper:  # query rows are the rows of products
            if rows > 64:  # one program has all registers of an SM; of padded rows 64 keys would spill
                return Launch(128, 32 if padded else 64, 8, 3, per_sm=1)
            return Launch(64, 16 if padded else 64, 4, 3)  # 32 padded keys would spill
        if padded and bits not in (4, 8):  # keys and values in different bits
            return Launch(8 if rows <= 8 else 16, 16, 4, 3)  # 32 keys would spill
        if rows <= 8:
            wide = bits > 8 or (padded and bits > 4) or (D > 64 and not hopper and (padded or bits <= 4))
            reserve = (8 if bits > 4 else 25) * 1024 if D == 128 else 0  # keeps it at four programs on an SM
            # few rows: keys are the rows of products, and four programs on an SM hide the loads
            early = bits > 4 or D == 128
            registers = None
            if hopper and bits > 4 and (D == 128 or (D > 128 and bits <= 8)):  # wide mixed rows need all of them
                registers = 208  # would be 247
            elif hopper and not padded and (D <= 64 if bits > 4 else D > 128):
                registers = 144 if D <= 64 else 208  # ptxas spills to have fewer
            elif D == 128 and bits == 4 and not hopper:
                registers = 160  # here too
            return Launch(8, 32 if wide else keys, 2, 3, 4, early, reserve, registers)  # 64 wide keys would spill
        if D <= 64 and bits <= 4 and rows > 16 and hopper:
            return Launch(32, 64, 4, 3)  # 32 keys would spill with Triton 3.9
        if D > 128 and bits < 4:
            return Launch(8, 32, 4, 3)  # values in 2 bits: 16 rows would spill
        return Launch(16 if rows <= 16 or D > 128 or not hopper else 32, 32, 4, 3)  # 32 rows would spill elsewhere
    if rows <= 16:
        if D == 128 and hopper:
            return Launch(16, keys, 4, 3, early=True, registers=208)  # room on the SM for programs of the next launch
        registers = None
        if hopper and (padded or D > 128):  # width 256 would take 235, and padded rows spill to have fewer
            registers = 240 if padded else 208
        # 64 padded keys would spill before Hopper
        return Launch(16, keys if hopper or not padded else 32, 4, 3, registers=registers)
    plain = D <= 128 and hopper and not padded
    if rows <= (128 if plain else 64):
        block = 32 if rows <= 32 else 64
        few = plain or (D <= 128 and block == 32)
        return Launch(block, keys, 4 if few else 8, 3, per_sm=2 if rows <= 64 else 1)  # 4 warps would spill elsewhere
    if D > 64 and not hopper:
        keys = 32  # 64 would spill
    return Launch(128, keys, 8, 3 if D <= 128 else 2, 1)  # many rows: products take the time, one program fills an SM


def choose_cut(schedule: DecodeSchedule, config: Launch, rows: int) -> Splits:
    """The longest splits that still make enough programs: four per SM, or twice as many as run at once if that is more.

    If none do, the shortest splits that `config.per_sm` allows. `DecodeSchedule.cuts` begins with eight splits per SM,
    and each cut after it has half as many.
    """
    cuts = schedule.cuts[4 - config.per_sm.bit_length() :]
    programs = max(4, 2 * config.per_sm) * schedule.sms
    enough = [cut for cut in cuts if len(cut.bounds) * triton.cdiv(rows, config.block_m) >= programs]
    return enough[-1] if enough else cuts[0]


def is_turned(x: Tensor | Quantized) -> bool:
    return isinstance(x, Quantized) and x.turned


def choose_launch(
    k: Tensor | Quantized, v: Tensor | Quantized, D: int, rows: int, dtype: torch.dtype, *, hopper: bool
) -> Launch:
    """The launch for keys and values of these formats."""
    turned = is_turned(k) or is_turned(v)
    one_step = all(not isinstance(x, Quantized) or x.group == D for x in (k, v))
    if dtype == torch.float16 and is_turned(v):
        one_step = False  # rows would be made of codes, but turned values can be beyond float16
    return launch_config(D, rows, dtype, tile_bits(k, v), turned=turned, one_step=one_step, hopper=hopper)


def tile_bits(k: Tensor | Quantized, v: Tensor | Quantized) -> int:
    """Bits of a key's and a value's number on average, which tiles are sized for."""
    return (_format(k)[0] + _format(v)[0]) // 2


def context_args(
    k: Tensor | Quantized, v: Tensor | Quantized, offsets: Tensor, bias: Tensor | None, table: Tensor | None = None
) -> ContextArgs:
    """The tensors of a context as the kernel takes them; those that it does not have are others, and never read."""
    channels = k.channels if isinstance(k, Quantized) else None
    center, spread = (offsets, offsets) if channels is None else (channels.center, channels.spread)
    parts = [_parts(x) for x in (k, v)]
    (k_data, k_scale, k_zero), (v_data, v_scale, v_zero) = parts
    bias = offsets if bias is None else bias
    strides = k_data.stride(0), v_data.stride(0)
    return ContextArgs(
        k_data, v_data, k_scale, k_zero, v_scale, v_zero, center, spread, bias, offsets, *strides,
        offsets if table is None else table,
    )  # fmt: skip


def _parts(x: Tensor | Quantized) -> tuple[Tensor, Tensor, Tensor]:
    """Data, scales and zeros of rows; codes as 16-bit words, which matrix loads can transpose."""
    if not isinstance(x, Quantized):
        return x, x, x
    if x.group * x.bits % 16:
        raise ValueError(
            f"expected groups of whole 16-bit words, got {x.group} values of {x.bits} bits: quantize again"
        )
    return x.codes.view(torch.int16), x.scale.contiguous(), x.zero.contiguous()


def _format(x: Tensor | Quantized) -> tuple[int, int]:
    """Bits of a value, and values that share a step."""
    return (x.bits, x.group) if isinstance(x, Quantized) else (16, x.shape[1])


def tail_block(config: Launch, rows: int, dtype: torch.dtype) -> int:
    """Query rows of a tile of a tail that `rows` of them share; products of 16-bit rows need at least 16."""
    block = config.block_m if rows > 16 else min(config.block_m, 16)
    return block if dtype == torch.float32 else max(block, 16)


def forms(
    q: Tensor,
    k: Tensor | Quantized,
    v: Tensor | Quantized,
    config: Launch,
    *,
    group: int,
    tail_m: int,
    softcap: bool,
    window: bool,
    bias: bool,
    short: bool,
    page: int = 0,
) -> tuple[Form, Form]:
    """What splits of contexts and of tails are compiled for; `tail_m` as from `tail_block`."""
    compute = compute_name(q)
    (k_bits, k_group), (v_bits, v_group) = _format(k), _format(v)
    bits = tile_bits(k, v)
    packed = bits < 16 and compute != "float32" and not interpreted()
    code = "float16" if packed else compute
    keys_first = bits < 16 and config.block_m < 64
    if bias and bits < 16 and config.block_m == 64:
        config = config._replace(block_n=min(config.block_n, 32))  # 64 would spill
    width = q.shape[-1] if q.ndim == 3 else q.shape[3]
    # each warp has half of a tile's keys, and a partial result of its own
    halved = keys_first and config[:3] == (8, 64, 2) and width <= 128
    context = Form(
        G=group, D=width, M=config.block_m, N=config.block_n,
        K_BITS=k_bits, V_BITS=v_bits, K_GROUP=k_group, V_GROUP=v_group, COMPUTE=compute,
        K_COMPUTE=code if k_bits < 16 else compute, V_COMPUTE=code if v_bits < 16 and keys_first else compute,
        PACKED=packed,
        SOFTCAP=softcap, BIAS=bias, CHANNELS=isinstance(k, Quantized) and k.channels is not None,
        TURN_K=is_turned(k), TURN_V=is_turned(v),
        TURN="float32" if compute == "float32" or interpreted() else "bfloat16", PAGE=0,
        BANDED=window, WINDOW=window, SHORT=short and bits < 16, KEYS_FIRST=keys_first,
        PARTS=2 if halved else 1,
    )  # fmt: skip
    tail = context._replace(
        M=tail_m,
        N=max(triton.next_power_of_2(config.block_n * bits // 16), 16 if config.block_m < 64 else 32),  # as many bytes
        K_BITS=16, V_BITS=16, K_GROUP=context.D, V_GROUP=context.D, K_COMPUTE=compute, V_COMPUTE=compute, PACKED=False,
        BIAS=False, CHANNELS=False, TURN_K=False, TURN_V=False, PAGE=page, BANDED=True, SHORT=False,
        KEYS_FIRST=False, PARTS=1,
    )  # fmt: skip
    return context, tail


class Sizes(NamedTuple):
    """Numbers that both kernels need; see there."""

    rows: int
    heads: int
    count: int
    row_blocks: int
    tail_splits: int
    tail_blocks: int
    pitch: int  # rows of partial results between items of contexts, and of tails
    tail_pitch: int


@on_device
def run(
    out: Tensor,
    lse: Tensor,
    query: QueryArgs,
    context: ContextArgs,
    tail: TailArgs,
    work: WorkArgs,
    sizes: Sizes,
    shapes: tuple[Form, Form],
    config: Launch,
    *,
    places: int,
    programs: int,
    scale: float,
    softcap: float | None,
    window: int | None,
    tokens: int,
    tail_rows: int,
    capacity: int,
    tailed: bool,
    listed: bool,
) -> None:
    """Launches both kernels over `places` rows of partial results, the first by `programs` programs."""
    form, tail_form = shapes
    overlap = overlaps_launches(out)  # from Hopper on
    registers = config.registers
    if form.SOFTCAP and form.WINDOW and form.D == 128 and form.K_BITS == form.V_BITS == 16:
        registers = None  # it takes 176 then, and with 208 at most it takes all and spills
    # products of several rows take longer beside attention that started early
    early = overlap and (listed or (config.early and sizes.rows == form.G))
    warps = config.warps
    if (form.TURN_K or form.TURN_V) and form.D > 128:
        registers = None  # fewer than it takes, and it spills
        warps = max(warps, 4) if form.TURN_V and form.M <= 8 else warps  # of more rows: see `launch_config`
    part = torch.empty((places, form.D), dtype=torch.float32, device=out.device)
    part_lse = torch.empty(places, dtype=torch.float32, device=out.device)
    if programs:
        decode_kernel[(programs,)](
            query, context, tail, work, part, part_lse,
            float(scale), float(softcap or 1.0), 0 if window is None else window, tokens,
            *sizes, tail_rows, capacity,
            CONTEXT=form, TAIL=tail_form, TAILED=tailed, LISTED=listed, OVERLAP=overlap, EARLY=early,
            RESERVED=shared_memory(config.reserve if overlap and config.early else 0),
            num_warps=warps, num_stages=config.stages, maxnreg=registers, enable_fp_fusion=True,
            **launch_options(early),
        )  # fmt: skip
    splits = sizes.count // sizes.heads * form.PARTS + sizes.tail_splits
    block_r, block_d, block_p = combine_config(form.D, sizes.rows * sizes.heads, 2 if listed else splits)
    if listed:
        block_p *= form.PARTS
    combine_kernel[(triton.cdiv(sizes.rows, block_r), sizes.heads, triton.cdiv(form.D, block_d))](
        query, context, work, part, part_lse, out, lse, float(scale), tokens, *sizes,
        CONTEXT=form, TAIL=tail_form, BLOCK_R=block_r, BLOCK_D=block_d, BLOCK_P=block_p, LISTED=listed,
        OVERLAP=overlap and programs > 0, EARLY=early, num_warps=4, enable_fp_fusion=True,
        **launch_options(overlap and programs > 0),
    )  # fmt: skip


def combine_config(D: int, rows: int, splits: int) -> tuple[int, int, int]:
    """Rows, columns and partial results of a program that combines; `rows` of all heads, about `splits` of each.

    About a thousand programs: more of them wait for each other. A few rows take all results in one loop step.
    """
    width = triton.next_power_of_2(D)
    if width >= 128 and 4 <= splits <= 24 and 1 << 16 <= rows * D <= 1 << 17:
        return 1, 128, 32  # all results of a row in one step
    block_d = min(width, 64, max(32, triton.next_power_of_2(rows * D // 8192)))
    block_r = min(16, triton.next_power_of_2(max(1, rows * D // (1024 * block_d))))
    if block_r == 1 and splits >= 128:
        block_d = 16
    most = max(4096 // (block_r * block_d), 2)
    return block_r, block_d, min(max(4, triton.next_power_of_2(2 * splits)), 256, most)
