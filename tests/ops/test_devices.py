"""Any device of several: launches go where their tensors are, whichever device is current."""

import ast
import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kvzip
import random_model
from kvzip import ops
from kvzip.cache.caches import map_tensors
from kvzip.ops import triton as kernels
from kvzip.ops.triton.common import on_device

SOURCES = sorted(Path(kernels.__file__).parent.glob("*.py"))
TEXT = "All happy families are alike; each unhappy family is unhappy in its own way. " * 6

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


# --- every launch goes through the one place


def decorators(function: ast.FunctionDef) -> set[str]:
    called = (d.func if isinstance(d, ast.Call) else d for d in function.decorator_list)
    return {ast.unparse(name) for name in called}


def unguarded(sources: dict[str, str]) -> set[str]:
    """The functions that name a kernel or index a jitted one, except jitted and `on_device` ones."""
    trees = {name: ast.parse(text) for name, text in sources.items()}
    defined = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    jitted = {node.name for node in defined if "triton.jit" in decorators(node)}
    found = set()

    def visit(node: ast.AST, file: str, owner: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if decorators(node) & {"triton.jit", "on_device"}:
                return
            owner = node.name if owner == "module" else owner
        launched = node.value if isinstance(node, ast.Subscript) else node
        name = launched.id if isinstance(launched, ast.Name) else getattr(launched, "attr", "")
        if name in jitted and (launched is not node or name.endswith("_kernel")):
            found.add(f"{file}: {owner}")
        for child in ast.iter_child_nodes(node):
            visit(child, file, owner)

    for file, tree in trees.items():
        visit(tree, file, "module")
    return found


def test_every_launch_goes_where_its_tensors_are():
    assert unguarded({path.name: path.read_text(encoding="utf-8") for path in SOURCES}) == set()


@pytest.mark.parametrize("launch", ["_add_kernel[(1,)](x)", "run = _add_kernel[(1,)]", "common._add_kernel.run(x)"])
def test_a_launch_elsewhere_is_found(launch):
    kernel = "@triton.jit(do_not_specialize=['n'])\n@no_type_check\ndef _add_kernel(x_ptr):\n    pass\n"
    bare = f"def add_triton(x):\n    if True:\n        {launch}\n"
    assert unguarded({"add.py": kernel + bare}) == {"add.py: add_triton"}
    assert unguarded({"add.py": kernel, "other.py": f"{launch}\n"}) == {"other.py: module"}
    helper = (kernel + bare).replace("_add_kernel", "_add")
    assert unguarded({"add.py": helper}) == ({"add.py: add_triton"} if "[" in launch else set())
    assert unguarded({"add.py": f"{kernel}@on_device\n{bare}"}) == set()


def of_the_current_device(source: str) -> list[str]:
    """The calls that ask torch about a device, a stream or an event without saying which."""
    asks = {"current_stream", "default_stream", "synchronize", "Stream", "mem_get_info", "get_device_name"}
    asks |= {"get_device_properties", "get_device_capability", "record"}
    prefixes = ("memory_", "max_memory_", "reset_peak_memory_")
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and not node.args]
    named = [(node, node.func.attr) for node in calls if isinstance(node.func, ast.Attribute) and not node.keywords]
    # events and streams know their devices
    waits = ("event.synchronize", "copied.synchronize", "host.copied.synchronize", "stream.synchronize")
    waits += ("self._stream.synchronize", "torch.cuda.current_stream(self.model.device).synchronize")
    found = [ast.unparse(node) for node, name in named if name in asks or name.startswith(prefixes)]
    return [call for call in found if not call.startswith(waits)]


def test_nothing_asks_about_whatever_device_is_current():
    sources = Path(kvzip.__file__).parent.rglob("*.py")
    calls = {path: of_the_current_device(path.read_text(encoding="utf-8")) for path in sources}
    assert {path: found for path, found in calls.items() if found} == {}
    assert of_the_current_device("copied.record()") and of_the_current_device("torch.cuda.memory_allocated()")


@pytest.mark.parametrize("current", [0, 1])
def test_a_launcher_runs_with_its_first_arguments_device_current(current, monkeypatch):
    now, entered = [current], []

    @contextlib.contextmanager
    def device(index):
        entered.append(index)
        before, now[0] = now[0], index
        yield
        now[0] = before

    monkeypatch.setattr(torch.Tensor, "get_device", lambda x: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "device", device)

    @on_device
    def launcher(x, y, *, scale=1):
        """What it does."""
        return now[0], y, scale

    codes, scale = torch.ones(2, 8, dtype=torch.uint8), torch.ones(2, 1)
    assert launcher(codes, 3, scale=5) == (1, 3, 5)
    assert launcher(ops.Quantized(codes, scale, scale, 8, 8), 4) == (1, 4, 1)
    assert launcher(scale=2, y=codes, x=codes) == (1, codes, 2)
    assert now == [current] and entered == ([] if current == 1 else [1, 1, 1])
    assert launcher.__name__ == "launcher" and launcher.__doc__ == "What it does."


def test_a_launcher_asks_no_gpu_about_tensors_of_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("asked for the current device"))
    assert on_device(lambda x: x + 1)(torch.ones(1)).item() == 2


# --- two GPUs


def tensors(*shapes, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def decoding(move, bits):
    offsets = torch.tensor([0, 700, 700, 1000], dtype=torch.int32)
    q, k, v, tail_k, tail_v = tensors((2, 6, 3, 64), (1000, 64), (1000, 64), (2, 3, 9, 64), (2, 3, 9, 64))
    lengths = torch.tensor([9, 4], dtype=torch.int32)
    q, k, v, offsets, *tail = (move(x) for x in (q, k, v, offsets, tail_k, tail_v, lengths))
    if bits is not None:
        k, v = ops.quantize(k, bits=bits, offsets=offsets), ops.quantize(v, bits=bits)
    return ops.decode(q, k, v, offsets, scale=0.125, tail=tuple(tail))


def decoding_rows(move):
    offsets = torch.tensor([0, 700, 700, 1000], dtype=torch.int32)
    q, k, v, page_k, page_v = tensors((5, 6, 64), (1000, 64), (1000, 64), (4, 3, 32, 64), (4, 3, 32, 64))
    context = ops.Context(move(k), move(v), move(offsets), move(torch.linspace(-1, 1, 1000)))
    table = ops.context_table([context], 2)
    ops.put_context_(table, 1, [context])
    numbers = ([1, 0, 1, 1, -1], [0, 1, 2, 2, 3], [9, 0, 31, 32, 5])
    rows = ops.QueryRows(*(move(torch.tensor(x, dtype=torch.int32)) for x in numbers))
    pages = ops.Pages(move(page_k), move(page_v), move(torch.tensor([[2], [0], [3], [1]], dtype=torch.int32)))
    return ops.decode_rows(move(q), table, 0, rows, scale=0.125, pages=pages)


def appended(move):
    tail_k, tail_v = (torch.zeros(2, 3, 9, 64, dtype=torch.bfloat16) for _ in "kv")
    k, v = tensors((2, 3, 5, 64), (2, 3, 5, 64))
    tail_k, tail_v, lengths, k, v = (move(x) for x in (tail_k, tail_v, torch.tensor([1, 3]).int(), k, v))
    ops.append_(tail_k, tail_v, lengths, k, v)
    return tail_k, tail_v


def projected(move, rows):
    x, weight, scale, residual = (move(x) for x in tensors((rows, 128), (192, 128), (128,), (rows, 96)))
    return ops.linear(x, weight, norm=ops.Norm(scale, 1e-6, 0), gate="silu", residual=residual)


def packed(move, kind, rows):
    x, weight, residual = (move(x) for x in tensors((rows, 256), (192, 256), (rows, 192)))
    return ops.linear(x, ops.quantize_weight(weight, kind), residual=residual)


def pruned(move):
    k, v = (move(x) for x in tensors((3, 500, 64), (3, 500, 64)))
    return ops.prune(k, v, move(torch.arange(1500).view(3, 500) % 7 < 3))


def quantized(move, bits):
    q = ops.quantize(move(tensors((333, 64))[0]), bits=bits)
    return q.codes, q.scale, q.zero, ops.dequantize(q, dtype=torch.bfloat16)


OPS = {
    "append": appended,
    "decode": lambda move: decoding(move, None),
    "decode, 8 bits": lambda move: decoding(move, 8),
    "decode, 4 bits": lambda move: decoding(move, 4),
    "decode rows": decoding_rows,
    "linear, one row": lambda move: projected(move, 1),
    "linear, rows": lambda move: projected(move, 5),
    "linear, 4 bits": lambda move: packed(move, "int4", 3),
    "linear, 8 bits, many rows": lambda move: packed(move, "e4m3", 90),
    "merge": lambda move: ops.merge(*(move(x) for x in tensors((7, 64), (7,), (7, 64), (7,), dtype=torch.float32))),
    "norm": lambda move: ops.rms_norm(*(move(x) for x in tensors((5, 96), (96,))), eps=1e-6),
    "prune": pruned,
    "quantize, 8 bits": lambda move: quantized(move, 8),
    "quantize, 4 bits": lambda move: quantized(move, 4),
    "rotary": lambda move: ops.rotary(*(move(x) for x in tensors((2, 5, 512), (5, 64), (5, 64))), kv_heads=2),
    "score": lambda move: ops.score(
        *(move(x) for x in tensors((6, 70, 64), (3, 200, 64), (3, 4, 64), (3, 70, 64))), scale=0.125
    ),
    "select": lambda move: ops.select(move(tensors((3, 2, 999), dtype=torch.float32)[0]), ratio=0.3),
    "select uniform": lambda move: ops.select_uniform(move(tensors((3, 2, 999), dtype=torch.float32)[0]), ratio=0.3),
}


def on_host(results):
    return [x.cpu() for x in (results if isinstance(results, tuple) else (results,))]


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("name", OPS)
def test_an_op_gives_on_another_device_what_it_gives_on_the_current_one(name):
    assert torch.cuda.current_device() == 0
    first, other = (OPS[name](lambda x, device=device: x.to(device)) for device in ("cuda:0", "cuda:1"))
    kept = other if isinstance(other, tuple) else (other,)
    assert {x.device for x in kept} == {torch.device("cuda:1")} and torch.cuda.current_device() == 0
    assert all(torch.equal(a, b) for a, b in zip(on_host(first), on_host(other), strict=True))


@pytest.mark.gpu
@two_gpus
def test_a_launch_on_another_device_is_ordered_with_that_devices_stream():
    """Behind a long sleep of that stream the op must wait for what the stream writes."""
    x, weight = (x.to("cuda:1") for x in tensors((5, 96), (96,)))
    plain = ops.rms_norm(x, weight, eps=1e-6).cpu()
    torch.cuda.synchronize(1)
    late, stream = torch.zeros_like(x), torch.cuda.Stream("cuda:1")
    with torch.cuda.device(0), torch.cuda.stream(stream), torch.cuda.device(0):
        with torch.cuda.device(1):
            torch.cuda._sleep(50_000_000)
        late.copy_(x)
        got = ops.rms_norm(late, weight, eps=1e-6)
    stream.synchronize()
    assert torch.equal(got.cpu(), plain)


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("name", ["append", "linear, one row", "merge", "norm", "rotary", "score"])
def test_a_graph_of_another_device_is_captured_while_its_stream_is_current(name):
    made = []
    plain = on_host(OPS[name](lambda x: made.append(x.to("cuda:1")) or made[-1].clone()))
    inputs, graph, stream = iter(made), torch.cuda.CUDAGraph(), torch.cuda.Stream("cuda:1")
    torch.cuda.synchronize(1)
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="relaxed")
        captured = OPS[name](lambda x: next(inputs))
        graph.capture_end()
    assert torch.cuda.current_device() == 0
    graph.replay()
    torch.cuda.synchronize(1)
    assert all(torch.equal(a, b) for a, b in zip(on_host(captured), plain, strict=True))


def answers(device, dtype, bits, folder):
    """What each stage gives on a device, on the host."""
    config = random_model.config(head_dim=64, hidden_size=128, attn_scale=0.125, windows=(37, None, None))
    model = replace(random_model.make(config, dtype=dtype, device=device), stop_ids=())
    cache = kvzip.score(model, kvzip.prefill(model, TEXT))
    small = kvzip.compress(cache, 0.4, bits=bits)
    options = {"max_tokens": 12, "template": False}
    plain = kvzip.generate(model, small, ["Who is unhappy?", "x"], **options)
    sampled = kvzip.generate(model, small, "Who?", temperature=0.7, seed=3, **options)
    long = kvzip.generate(model, small, [TEXT * 3] * 4, **options)  # more rows than a graph takes
    kvzip.save(small, folder / "small.kvz", overwrite=True)
    back = kvzip.load_cache(folder / "small.kvz", model=model)
    assert kvzip.generate(model, back, ["Who is unhappy?", "x"], **options) == plain
    streamed = kvzip.prefill_compressed(model, TEXT, 0.4, segment=100)
    held = kvzip.generate(model, streamed, "Why?", **options)
    assert {cache.device, small.device, back.device, streamed.device} == {torch.device(device)}
    host = [map_tensors(x, lambda t: t.cpu()) for x in (small, back, streamed)]
    rows = [[layer.positions.tolist() for layer in x.context if hasattr(layer, "positions")] for x in host]
    return plain, sampled, long, held, rows, cache.scores.values.cpu().tolist()


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_stage_gives_on_another_device_what_it_gives_on_the_current_one(dtype, bits, tmp_path):
    assert torch.cuda.current_device() == 0
    first, other = (answers(device, dtype, bits, tmp_path) for device in ("cuda:0", "cuda:1"))
    assert first == other and torch.cuda.current_device() == 0


@pytest.mark.gpu
@two_gpus
def test_a_cache_moves_between_devices():
    config = random_model.config(head_dim=64, hidden_size=128, attn_scale=0.125)  # the kernels' least width is 16
    model = replace(random_model.make(config, device="cuda:1"), stop_ids=())
    small = kvzip.compress(kvzip.score(model, kvzip.prefill(model, TEXT)), 0.4)
    there = kvzip.to(kvzip.to(small, "cuda:0"), "cuda:1")
    assert kvzip.generate(model, there, "Why?", max_tokens=8) == kvzip.generate(model, small, "Why?", max_tokens=8)


@pytest.mark.gpu
@two_gpus
def test_a_model_stays_on_the_device_that_was_current_when_it_was_loaded(tmp_path):
    import tiny_models

    tiny_models.build(tiny_models.llama()).save_pretrained(tmp_path)
    with torch.cuda.device(1):
        model = kvzip.load(tmp_path, dtype=torch.float32, device="cuda")
    assert model.device == torch.device("cuda:1") == model.weights.embed.device
    assert kvzip.prefill(model, torch.arange(50) % 20, template=False).device == model.device
