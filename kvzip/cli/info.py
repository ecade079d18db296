"""`kvzip info`: what a file holds, or what a model's cache takes and how much of it fits here."""

from pathlib import Path
from typing import Any

import click

from ..display import shown_bits, visible_line
from ..files import schema
from ..files.header import OpenFile, open_file
from .compress import whole_heads_line, windows_line
from .output import echo, put, put_json, size
from .plumbing import command, in_bytes
from .sources import check_ours, find_model, short

RATIOS = (1.0, 0.5, 0.3, 0.2, 0.1)
PLAIN = "bfloat16"
SPARE = 0.1  # of the memory, for activations and other processes
_MEMORY = "For a model: memory to fill, as 24GB [default: what is free here]."


@command(
    "info",
    epilog="""
    kvzip info contract.kvz
    kvzip info qwen2.5-7b --memory 24GB
    """,
)
@click.argument("source", metavar="FILE|MODEL")
@click.option("--memory", metavar="SIZE", callback=in_bytes, help=_MEMORY)
@click.option("--json", "as_json", is_flag=True, help="Print facts as JSON.")
def info(source: str, memory: int | None, as_json: bool) -> None:
    """Say what a file holds, or how much fits in memory.

    For a file of kvzip: its document, model, bytes, and what is kept of each layer. For a model: what its cache takes
    for each token, and how many tokens fit in memory at which ratio. Of its files only config and headers are read.
    """
    path = Path(source)
    if path.is_file() or (path.suffix == ".kvz" and not path.is_dir()):
        if memory is not None:
            raise click.UsageError("--memory is for a model: what a file takes in memory is said without it")
        facts, show = file_facts(path), _show_file
    else:
        facts, show = model_facts(source, memory), _show_model
    (put_json if as_json else show)(facts)


def file_facts(path: Path) -> dict[str, Any]:
    """Returns what a file says of itself, with the kept pairs of each layer; its keys and values are not read.

    Raises: FileNotFoundError; ValueError for another file, or a damaged one.
    """
    check_ours(path)
    with open_file(path) as file:
        header = file.header
        facts: dict[str, Any] = {"file": str(path), "kind": header["cache"], "bytes": path.stat().st_size}
        facts |= {"title": schema.entry(header, "note").get("title"), "model": schema.entry(header, "model") or None}
        facts |= {"fingerprint": header.get("fingerprint"), "format": ".".join(map(str, header["version"]))}
        if schema.is_cache(header):
            return facts | _cache_facts(file)
    told = ("family", "layers", "method", "sources", "source")
    return facts | {name: header[name] for name in told if name in header}


def _cache_facts(file: OpenFile) -> dict[str, Any]:
    """What an open file that holds a cache says of it, as `file_facts` returns it."""
    from ..cache import RaggedKV, WindowKV, full_nbytes, nbytes
    from ..cache.reading import read_cache

    header, cache = file.header, read_cache(file, pairs=False)
    heads = schema.entry(header, "note").get("heads")  # a note is not checked
    start, length = cache.start, cache.context_length
    layers: list[dict[str, Any]] = [{"layer": n, "kept": 1.0} for n in range(len(cache.context))]
    for n, layer in enumerate(cache.context):
        if isinstance(layer, RaggedKV):
            rows = (layer.offsets.diff() - start).tolist()
            layers[n] = {"layer": n, "heads": rows, "kept": sum(rows) / max(1, len(rows) * (length - start))}
        elif isinstance(layer, WindowKV):
            layers[n] = {"layer": n, "window": length - layer.start}
    return {
        "tokens": length,
        "prefix_tokens": start,
        "turn_tokens": header["tokens"] - length,
        **{name: header[name] for name in ("kept", "total", "ratio", "method")},
        "bits": schema.bits_of(header),
        "refitted": any(isinstance(layer, RaggedKV) and layer.bias is not None for layer in cache.context),
        "chat": header["chat"],
        "scores": cache.scores is not None,
        "full_bytes": full_nbytes(cache),
        "cache_bytes": nbytes(cache),
        "window_layers": sum("window" in layer for layer in layers),
        "whole_heads": heads if isinstance(heads, dict) and {*heads} == {"whole", "heads", "sink", "recent"} else None,
        "layers": layers,
    }


def model_facts(source: str, memory: int | None) -> dict[str, Any]:
    """Returns the shape of a model, the bytes of its cache for each token, and how many tokens fit at which ratio.

    Only the config is read, and of weights that are here the files' headers. Caches are counted in bfloat16, weights as
    stored (where only the config is here, a quantized checkpoint's are estimated) and as --weights would make them.

    Args:
        memory: bytes to fill with weights and cache; None takes what is free on the GPU, or in host memory.
    """
    directory = find_model(source, only=("config.json",))
    import torch

    from ..cache import free_bytes
    from ..models import translate_config
    from ..models.files import read_json
    from ..models.load import FORMS, stored_schemes
    from ..models.quantization import read_quantization
    from ..models.weights import HEAD, weight_bytes
    from ..ops import quantize
    from ..ops.weights import GROUP

    raw = read_json(directory / "config.json")
    config, quantization = translate_config(raw), read_quantization(raw)
    try:
        schemes, weights = stored_schemes(directory, raw, torch.bfloat16)
    except (FileNotFoundError, ValueError):  # a hub's model whose config alone is here, or files that are not whole yet
        schemes, weights = {}, 0
        if quantization is not None:
            scheme = quantization.groups[0][1]
            schemes = {"": scheme}
            weights = weight_bytes(config, torch.bfloat16, kind=scheme.kind, group=scheme.group or GROUP)
    sizes = {name: weight_bytes(config, torch.bfloat16, kind=kind) for name, kind in {PLAIN: None, **FORMS}.items()}
    heads = {name: sizes[PLAIN] - weight_bytes(config, torch.bfloat16, head=kind) for name, kind in FORMS.items()}
    stored = PLAIN
    if schemes:  # a checkpoint in 8 or 4 bits is read as it is
        method = "w8a8" if quantization is None else quantization.method
        stored = f"{method}, {'/'.join(sorted({scheme.kind for scheme in schemes.values()}))}"
        sizes = {stored: weights}
        heads = {} if HEAD in schemes else heads
    weights = sizes[stored]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = "given" if memory else torch.cuda.get_device_name(device) if device.type == "cuda" else "host memory"
    memory = memory or free_bytes(device)
    windows = [spec.window for spec in config.layers if spec.window is not None]
    global_layers = len(config.layers) - len(windows)
    row = torch.zeros(1, config.head_dim, dtype=torch.bfloat16)
    pair_bytes: dict[int | None, int] = {None: 2 * row.nbytes}  # of a key and its value, by bits
    for bits in (8, 4):
        packed = quantize(row, bits=bits)
        pair_bytes[bits] = 2 * (packed.codes.nbytes + packed.scale.nbytes + packed.zero.nbytes)
    pairs = config.num_kv_heads * global_layers
    fixed = sum(windows) * config.num_kv_heads * pair_bytes[None]
    room = None if memory is None else int((1 - SPARE) * memory) - weights - fixed
    fits = []
    for ratio in RATIOS:
        fit: dict[str, Any] = {"ratio": ratio}
        for bits, size_bytes in pair_bytes.items():
            # a compressed pair has its position beside it, 4 bytes
            a_token = ratio * pairs * (size_bytes + (4 if ratio < 1 or bits else 0))
            tokens = None if room is None or not pairs else max(0, int(room / a_token))
            fit[f"{bits or 16}_bits"] = {"bytes_per_token": a_token, "tokens": tokens}
        fits.append(fit)
    facts = {"model": source, "family": config.family, "layers": len(config.layers), "global_layers": global_layers}
    facts |= {"window": max(windows, default=None), "query_heads": config.num_heads, "kv_heads": config.num_kv_heads}
    facts |= {"head_dim": config.head_dim, "max_length": config.max_length, "weight_bytes": weights}
    facts |= {"weights": stored, "weight_bytes_by_form": sizes, "head_weights_save": heads}
    facts |= {"window_bytes": fixed, "bytes_per_token": pairs * pair_bytes[None]}
    return facts | {"memory_bytes": memory, "memory": where, "fits": fits}


def _show_file(facts: dict[str, Any]) -> None:
    from rich.table import Table

    made = facts["model"] or {}
    echo(visible_line(f"{facts['file']}: {facts['title'] or facts['kind']}, {size(facts['bytes'])}"))
    if made:
        rounding = (f", {name}={made[name]}" for name in ("weights", "head_weights", "activations") if made.get(name))
        echo(visible_line(f"model    {short(str(made.get('source')))} in {made.get('dtype')}{''.join(rounding)}"))
    if "tokens" not in facts:
        if facts.get("layers"):
            family = f" of {facts['family']}" if facts.get("family") else ""
            echo(f"scores   of {len(facts['layers'])} layers{family} by {facts.get('method') or facts.get('source')}")
        return
    turns = f", {facts['turn_tokens']:,} of turns after it" if facts["turn_tokens"] else ""
    echo(f"tokens   {facts['tokens']:,}, {facts['prefix_tokens']} of them prefix{turns}")
    packed = f", packed into {shown_bits(facts['bits'])}" if facts["bits"] else ""
    packed += ", with a bias for each row" if facts["refitted"] else ""
    by = f" by {facts['method']}" if facts["method"] else ""
    echo(f"kept     {facts['kept']:,} of {facts['total']:,} pairs ({facts['ratio']:.1%}){by}{packed}")
    if facts["whole_heads"]:
        echo(visible_line(whole_heads_line(facts["whole_heads"])))
    if facts["window_layers"]:
        echo(windows_line(facts["window_layers"], len(facts["layers"])))
    full = f"{size(facts['full_bytes'])} -> " if facts["full_bytes"] else ""
    echo(f"cache    {full}{size(facts['cache_bytes'])}")
    table = Table("layer", "kept", "", "least and most of a head", box=None, pad_edge=False)
    evictable = max(1, facts["tokens"] - facts["prefix_tokens"])
    for layer in facts["layers"]:
        if "window" in layer:
            table.add_row(str(layer["layer"]), "", f"window: its last {layer['window']:,} tokens")
            continue
        heads = [rows / evictable for rows in layer.get("heads", [evictable])]
        bar = "█" * round(24 * layer["kept"]) or "▏"
        table.add_row(str(layer["layer"]), f"{layer['kept']:.1%}", bar, f"{min(heads):.0%} {max(heads):.0%}")
    put("", table)


def _show_model(facts: dict[str, Any]) -> None:
    from rich.table import Table

    window = windows = ""
    if facts["window"]:
        window = f", {facts['layers'] - facts['global_layers']} with a window of {facts['window']:,}"
        windows = f", {size(facts['window_bytes'])} for windows"
    echo(f"{short(facts['model'])}: {facts['family']}, {facts['layers']} layers{window}")
    echo(f"heads    {facts['query_heads']} query, {facts['kv_heads']} key-value of width {facts['head_dim']}")
    echo(f"length   {facts['max_length']:,} positions")
    others = [f"{size(n)} in {name}" for name, n in facts["weight_bytes_by_form"].items() if name != facts["weights"]]
    more = f"; with --weights {', '.join(others)}" if others else ""
    echo(f"weights  {size(facts['weight_bytes'])} in {facts['weights']}{more}")
    saved = ", ".join(f"{size(n)} in {name}" for name, n in facts["head_weights_save"].items())
    echo(f"head     --head-weights saves {saved}" if saved else "head     quantized as it is stored")
    echo(f"cache    {size(facts['bytes_per_token'])} for each token{windows}")
    if facts["memory_bytes"] is None:
        return
    title = f"tokens that fit in {size(facts['memory_bytes'])} ({facts['memory']}), {SPARE:.0%} left free"
    table = Table("kept", "16 bits", "8 bits", "4 bits", box=None, pad_edge=False)
    for row in facts["fits"]:
        tokens = [row[f"{bits}_bits"]["tokens"] for bits in (16, 8, 4)]
        kept = "all" if row["ratio"] == 1 else f"{row['ratio']:.0%}"
        table.add_row(kept, *("-" if n is None else f"{n:,}" for n in tokens))
    put("", title, table)
    echo("\nCompressing holds the full cache first (row all), unless it is done with --segment.")
