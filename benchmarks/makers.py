"""Real models that makers' own libraries quantized, read by kvzip: the same logits, and answers to the same questions.

    python benchmarks/makers.py MODEL_DIR --out DIR [--only "awq" "compressed w4a16" ...] [--commit COMMIT]

Each form of `FORMS` is made once under DIR from a model in Hugging Face format, by llmcompressor (which writes with
compressed-tensors) or AutoRound, both without data and on a CPU. Of each, logits of a text are compared in float32:

`logits`: kvzip's against Transformers' with the weights that the library says its tensors mean.
`inputs`: the same with inputs rounded to 8 bits, where the form has them and both run the library's own way.
`moved`: how far the form's logits are from the 16-bit model's, for scale.

All three are the norm of the difference over the norm. `right` counts the answers of kvzip that have the word that the
document says, of so many in `questions`; `right_16` are those of the 16-bit model. Each form is one JSON line added
to benchmarks/results/makers.jsonl. What it needs, in an environment of its own beside kvzip:

    pip install --no-deps llmcompressor==0.14.0.1 compressed-tensors==0.20.0 auto-round==0.16.1 accelerate py-cpuinfo
    pip install transformers datasets loguru psutil pillow nvidia-ml-py threadpoolctl
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor, nn

import kvzip
from benchmarks import harness
from kvzip import prompts
from kvzip.models import forward, logits

RESULTS = harness.RESULTS / "makers.jsonl"
TEXT = (
    "Anna keeps the bees behind her house. Her brother Tom repairs clocks in the next town. The old boat lies in the "
    "barn since the summer. The door of the house is painted green, and the roof is new."
)
QUESTIONS = {
    "Who keeps the bees?": "anna",
    "Where does the boat lie?": "barn",
    "What color is the door?": "green",
    "What does Tom repair?": "clock",
}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group"}
FORMS: dict[str, tuple[str, Any]] = {
    "compressed w8a8": ("llmcompressor", "W8A8"),
    "compressed fp8": ("llmcompressor", "FP8_DYNAMIC"),
    "compressed fp8 block": ("llmcompressor", "FP8_BLOCK"),
    "compressed w4a16": ("llmcompressor", {**INT4, "symmetric": True}),
    "compressed w4a16 zeros": ("llmcompressor", {**INT4, "symmetric": False}),
    "compressed w8a16": ("llmcompressor", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}),
    "gptq": ("auto_gptq", {"bits": 4, "sym": True}),
    "gptq zeros": ("auto_gptq", {"bits": 4, "sym": False}),
    "gptq 8": ("auto_gptq", {"bits": 8, "sym": True}),
    "awq": ("auto_awq", {"bits": 4, "sym": False}),
}
"""By name: the library or AutoRound's format, and the preset or the arguments of weights."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a directory in Hugging Face format, of 16 bits")
    parser.add_argument("--out", type=Path, required=True, help="directory of the quantized models")
    parser.add_argument("--only", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--commit", help="commit to write down, where git cannot be asked")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    facts = harness.facts("cpu", options.commit) | {"model": options.model.name}
    plain = load(options.model)
    ids = torch.tensor([prompts.encode_text(plain.tokenizer, TEXT)])
    base = {"logits": own_logits(plain, ids), "answers": answers(plain)}
    sizes = {plain.config.hidden_size, plain.config.intermediate_size}
    for name in options.only:
        if "block" in name and any(size % 128 for size in sizes):
            print(f"{name}: left out, compressed-tensors runs blocks of 128 only where they divide {sorted(sizes)}")
            continue
        directory = options.out / options.model.name / name.replace(" ", "-")
        if not directory.exists():
            begun = time.monotonic()
            make(
                options.model, directory, *FORMS[name], group=next(g for g in (128, 64, 32) if not left_over(sizes, g))
            )
            print(f"{directory} made in {time.monotonic() - begun:.0f} s", flush=True)
        harness.record(options.results, [{"form": name, **compared(options.model, directory, name, ids, base)}], facts)


def left_over(sizes: set[int], group: int) -> int:
    """What is left of sizes that should be whole groups."""
    return sum(size % group for size in sizes)


# --- made by the libraries


def make(source: Path, out: Path, maker: str, how: Any, *, group: int) -> None:
    """Writes the quantized model, by the library's own way of quantizing without data."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(source)
    partial = out.with_name(out.name + ".partial")
    if maker == "llmcompressor":
        from llmcompressor import oneshot  # pyright: ignore[reportMissingImports]
        from llmcompressor.modifiers.quantization import QuantizationModifier  # pyright: ignore[reportMissingImports]

        scheme: dict[str, Any] = {"targets": "Linear", "scheme": how}
        if isinstance(how, Mapping):
            size = {"group_size": group} if how["strategy"] == "group" else {}
            scheme = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {**how, **size}}}}
        oneshot(model=model, recipe=QuantizationModifier(ignore=["lm_head"], **scheme))
        model.save_pretrained(partial, save_compressed=True)
        tokenizer.save_pretrained(partial)
    else:
        from auto_round import AutoRound  # pyright: ignore[reportMissingImports]

        scheme = {"scheme": "W8A16" if how["bits"] == 8 else "W4A16", "sym": how["sym"], "group_size": group}
        rounding = AutoRound(model, tokenizer, iters=0, disable_opt_rtn=True, device_map="cpu", **scheme)
        rounding.quantize_and_save(str(partial), format=maker)
        inner = next(partial.rglob("config.json")).parent
        if inner != partial:  # it puts a directory of its own into the one that it is given
            inner = inner.rename(partial.with_name(out.name + ".inner"))
            partial.rmdir()
            partial = inner
    partial.rename(out)


# --- what its tensors mean, by the libraries


@torch.no_grad()
def meant_logits(source: Path, directory: Path, maker: str, ids: Tensor) -> dict[str, Tensor]:
    """Transformers' logits in float32 with the weights that the library reads, and with inputs rounded by it."""
    from transformers import AutoModelForCausalLM

    if maker == "llmcompressor" and config_of(directory)["format"] != "pack-quantized":
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        found, rounds = {"inputs": model(ids).logits}, False
        for layer in model.modules():
            scheme = getattr(layer, "quantization_scheme", None)
            if scheme is not None:
                rounds = scheme.input_activations is not None
                layer.quantization_scheme = scheme.model_copy(update={"input_activations": None})
        return {"logits": model(ids).logits} | (found if rounds else {})
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    weights = packed_weights(directory, maker)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name in weights:
            layer.weight.data = weights.pop(name)
    assert not weights, f"layers that the model lacks: {list(weights)}"
    return {"logits": model(ids).logits}


def packed_weights(directory: Path, maker: str) -> dict[str, Tensor]:
    """The weights of packed layers in float32, unpacked by the library's own means.

    Transformers 5.24 refuses files of compressed-tensors with packed zero points: it expects another shape of them.
    """
    from safetensors.torch import load_file

    stored = {name: x for file in directory.glob("*.safetensors") for name, x in load_file(file).items()}
    config = config_of(directory)
    bits, group = config.get("bits"), config.get("group_size")
    main = "qweight"
    if maker == "llmcompressor":
        from compressed_tensors.compressors import BaseCompressor  # pyright: ignore[reportMissingImports]
        from compressed_tensors.quantization import (  # pyright: ignore[reportMissingImports]
            QuantizationArgs,
            QuantizationScheme,
        )

        main, compressor = "weight_packed", BaseCompressor.load_from_registry("pack-quantized")
        weights = QuantizationArgs(**config["config_groups"]["group_0"]["weights"])
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)

        def unpack(own: dict[str, Tensor]) -> Tensor:
            return compressor.decompress({**own, "weight_scale": own["weight_scale"].float()}, scheme)["weight"]
    elif maker == "auto_awq":
        from auto_round.export.export_to_awq.utils import dequantize_gemm  # pyright: ignore[reportMissingImports]

        def unpack(own: dict[str, Tensor]) -> Tensor:
            return dequantize_gemm(own["qweight"], own["qzeros"], own["scales"].float(), bits, group).T.contiguous()
    else:
        from auto_round_extension.torch.qlinear_torch_zp import QuantLinear  # pyright: ignore[reportMissingImports]

        def unpack(own: dict[str, Tensor]) -> Tensor:
            inputs, outputs = own["qweight"].shape[0] * 32 // bits, own["qweight"].shape[1]
            layer = QuantLinear(bits, group, inputs, outputs, False, weight_dtype=torch.float32)
            for name in ("qweight", "qzeros"):  # with g_idx it leaves out outputs beyond the number of inputs
                setattr(layer, name, own[name])
            layer.scales = own["scales"].float()
            layer.post_init()
            return layer(torch.eye(inputs)).T.contiguous()

    names = {name.removesuffix(f".{main}") for name in stored if name.endswith(f".{main}")}
    layers: dict[str, dict[str, Tensor]] = {name: {} for name in sorted(names)}
    for name, tensor in stored.items():
        stem, _, suffix = name.rpartition(".")
        if stem in layers:
            layers[stem][suffix] = tensor
    return {name: unpack(own) for name, own in layers.items()}


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())["quantization_config"]


# --- read by kvzip


def load(directory: Path, **options: Any) -> kvzip.Model:
    return kvzip.load(directory, dtype=torch.float32, device="cpu", **options)


@torch.no_grad()
def own_logits(model: kvzip.Model, ids: Tensor) -> Tensor:
    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        window = model.config.layers[layer].window
        mask = mask if window is None else mask.triu(1 - window)
        return nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=model.config.attn_scale, enable_gqa=True
        )

    return logits(model, forward(model, ids, torch.arange(ids.shape[1]), attend))


def answers(model: kvzip.Model) -> list[str]:
    cache = kvzip.prefill(model, TEXT)
    return [answer.text.strip() for answer in kvzip.generate(model, cache, list(QUESTIONS), max_tokens=12)]


def compared(source: Path, directory: Path, name: str, ids: Tensor, base: Mapping[str, Any]) -> dict[str, Any]:
    """What one form gives beside the library and the 16-bit model."""
    meant = meant_logits(source, directory, FORMS[name][0], ids)
    model = load(directory)
    own, said = own_logits(model, ids), answers(model)
    line: dict[str, Any] = {"logits": apart(own, meant["logits"]), "moved": apart(own, base["logits"])}
    if "inputs" in meant:
        rounded = own_logits(load(directory, activations="checkpoint"), ids)
        line |= {"inputs": apart(rounded, meant["inputs"]), "inputs_moved": apart(rounded, own)}
    return {**line, "answers": said, "right": right(said), "right_16": right(base["answers"]), "questions": len(said)}


def right(said: list[str]) -> int:
    return sum(word in text.lower() for word, text in zip(QUESTIONS.values(), said, strict=True))


def apart(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm() / y.norm())


if __name__ == "__main__":
    main()
