"""The cases of `benchmarks/ops.py --only linear`: a layer's four products with weights in 16, 8 and 4 bits.

With --launches each launch that the kernel could take is timed beside the one that it takes, for a layer and for each
product alone: what `launch_config` beside each kernel takes is chosen by these lines.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Variant
from kvzip import ops
from kvzip.ops.weights import GROUP, LARGEST, QuantizedWeight, empty_weight

COLD_BYTES = 256 * 2**20
TESTS = ("linear_quantized", "linear_integers", "linear_columns", "layers", "project")
KINDS = {"fp8": "e4m3", "int8": "int8", "int4": "int4"}
FORMS = (*KINDS, "fp8+rows", "fp8+blocks", "int8+rows")  # after a plus: inputs are rounded too, a row or 128 at a time


class Product(NamedTuple):
    """One product of the Llama-3.1-8B shape and what is fused with it."""

    name: str
    outputs: int
    inputs: int
    norm: bool = False
    gate: str | None = None
    residual: bool = False


PRODUCTS = (
    Product("qkv", 6144, 4096, norm=True),
    Product("o", 4096, 4096, residual=True),
    Product("gate and up", 28672, 4096, norm=True, gate="silu"),
    Product("down", 4096, 14336, residual=True),
)
Weight = Tensor | QuantizedWeight


def bench_linear(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Variant], dict[str, float]]]:
    """Yields a case for each kind and number of rows: the four products together, then each alone at one row."""
    for form in KINDS:
        for rows in (1, 8, 32, 64):
            yield _case(f"a layer, {form}, {rows} rows", form, rows, PRODUCTS, options.launches and rows == 1)
        for product in PRODUCTS:
            yield _case(f"{product.name}, {form}, one row", form, 1, (product,), options.launches)
        yield _many_rows(form)


def random_weight(form: str | None, outputs: int, inputs: int, *, device: torch.device | str = "cuda") -> Weight:
    """A weight with random codes, as `ops.quantize_weight` would shape it, or in blocks; None is bfloat16."""
    if form is None:
        return torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16) * inputs**-0.5
    name, _, rounded = form.partition("+")
    kind, shared = KINDS[name], GROUP if rounded == "blocks" else None
    group, dtype = (GROUP, torch.float16) if kind == "int4" else (shared or inputs, torch.float32)
    weight = empty_weight(outputs, inputs, kind=kind, group=group, rows=shared or 1, scale_dtype=dtype, device=device)
    codes = weight.codes.view(torch.uint8)
    codes.random_(0, 256)
    if kind == "e4m3":
        codes.masked_fill_(codes & 127 == 127, 0)
    weight.scale.fill_(inputs**-0.5 / {"e4m3": 100, "int8": 64, "int4": 4}[kind])
    how = ops.Activations(kind, LARGEST[kind], group=shared) if rounded else None
    return replace(weight, activations=how)


def _inputs(product: Product, rows: int) -> tuple[Tensor, dict]:
    new = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    norm = ops.Norm(new(product.inputs), 1e-5) if product.norm else None
    residual = new(1, rows, product.outputs) if product.residual else None
    return new(1, rows, product.inputs), {"norm": norm, "gate": product.gate, "residual": residual}


def _case(
    name: str, form: str, rows: int, products: tuple[Product, ...], launches: bool
) -> tuple[str, dict[str, Variant], dict[str, float]]:
    given = [_inputs(product, rows) for product in products]

    def calls(form: str | None, run: Callable, prepare: Callable[[Weight], object] = lambda w: w) -> Variant:
        first = [random_weight(form, p.outputs, p.inputs) for p in products]
        count = max(2, math.ceil(COLD_BYTES / sum(w.nbytes for w in first)))
        sets = [first] + [[random_weight(form, p.outputs, p.inputs) for p in products] for _ in range(count - 1)]
        ready = [[prepare(w) for w in weights] for weights in sets]

        def once(weights: list) -> None:
            for weight, (x, options) in zip(weights, given, strict=True):
                run(x, weight, options)

        return [partial(once, weights) for weights in ready]

    def called(op: Callable, **how: object) -> Callable:
        return lambda x, weight, options: op(x, weight, **options, **how)

    own = called(ops.linear)
    variants: dict[str, Variant] = {"kvzip": calls(form, own), "kvzip, bf16": calls(None, own)}
    variants |= {what: calls(form, run, prepare) for what, (run, prepare) in _alternatives(form, rows).items()}
    if launches:
        from kvzip.ops.triton import linear, linear_integers, linear_quantized

        for config in linear_quantized.LAUNCHES[KINDS[form]]:
            variants[f"launch {tuple(config)}"] = calls(form, called(linear_quantized.few_rows, config=config))
        one_row = linear_integers.integer_row if form == "int4" else linear.one_row
        for config in linear_integers.LAUNCHES if form == "int4" else linear.LAUNCHES:
            variants[f"launch of one row {tuple(config)}"] = calls(form, called(one_row, config=config))
    size = sum(random_weight(form, p.outputs, p.inputs).nbytes for p in products)
    return name, variants, {"bytes": size, "products": 2 * rows * sum(p.outputs * p.inputs for p in products)}


def _alternatives(form: str, rows: int) -> dict[str, tuple[Callable, Callable]]:
    """What torch has of its own, the product alone: no norm, gate or residual."""
    if form == "int4":

        def packed(weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
            outputs, inputs = weight.shape
            bytes_ = torch.randint(0, 256, (outputs, inputs // 2), device="cuda", dtype=torch.uint8)
            scales = torch.ones(inputs // GROUP, outputs, 2, device="cuda", dtype=torch.bfloat16)
            return torch.ops.aten._convert_weight_to_int4pack(bytes_, 8), scales

        def int4(x: Tensor, weight: tuple[Tensor, Tensor], options: dict) -> Tensor:
            return torch.ops.aten._weight_int4pack_mm(x[0], weight[0], GROUP, weight[1])

        return {"torch's int4 product": (int4, packed)}
    if form == "fp8":
        one = torch.ones(1, 1, device="cuda")

        def scaled(x: Tensor, weight: QuantizedWeight, options: dict) -> Tensor:
            codes = x[0].to(torch.float8_e4m3fn)
            scale = one.expand(rows, 1).contiguous()
            return torch._scaled_mm(
                codes, weight.codes.t(), scale_a=scale, scale_b=weight.scale.t(), out_dtype=torch.bfloat16
            )

        return {"torch's scaled_mm, inputs in fp8": (scaled, lambda w: w)}

    def integers(x: Tensor, weight: QuantizedWeight, options: dict) -> Tensor:
        return torch._int_mm(x[0].to(torch.int8), weight.codes.t())  # takes more than 16 rows

    return {"torch's int_mm, inputs in int8": (integers, lambda w: w)}


def _many_rows(form: str) -> tuple[str, dict[str, Variant], dict[str, float]]:
    """A chunk of prefill: weights expanded to 16 bits, or multiplied in 8."""
    product, rows = PRODUCTS[2], 8192
    x, options = _inputs(product, rows)
    weight, plain = (random_weight(f, product.outputs, product.inputs) for f in (form, None))
    variants: dict[str, Variant] = {
        "kvzip": [lambda: ops.linear(x, weight, **options)],
        "kvzip, bf16": [lambda: ops.linear(x, plain, **options)],
        "torch's bf16 product alone": [lambda: F.linear(x, plain)],
    }
    if form != "int4":
        from dataclasses import replace

        how = ops.Activations("e4m3", 448.0) if form == "fp8" else ops.Activations("int8", 127.0)
        rounded = replace(weight, activations=how)
        variants["kvzip, inputs in 8 bits"] = [lambda: ops.linear(x, rounded, **options)]
    return f"gate and up, {form}, 8,192 rows", variants, {"products": 2 * rows * product.outputs * product.inputs}
