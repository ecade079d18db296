"""Published configs, built on the meta device: parameter counts, cache bytes per token, and what is special in each."""

import json
from pathlib import Path

import pytest
import torch

from kvzip.models import empty_weights, translate_config
from kvzip.models.weights import named_tensors

CONFIGS = Path(__file__).parents[1] / "data" / "configs"

# parameters of the text model; bytes of K and V per token in bfloat16, over layers without a window
PUBLISHED = {
    "llama-3.1-8b": (8_030_261_248, 131_072),
    "llama-3.1-70b": (70_553_706_496, 327_680),
    "qwen2.5-7b-1m": (7_615_616_512, 57_344),
    "qwen2.5-14b-1m": (14_770_033_664, 196_608),
    "qwen3-8b": (8_190_735_360, 147_456),
    "qwen3-32b": (32_762_123_264, 262_144),
    "gemma-3-4b": (3_880_263_168, 20_480),
    "gemma-3-12b": (11_766_034_176, 65_536),
    "gemma-3-27b": (27_009_346_304, 81_920),
}


def read(name):
    return translate_config(json.loads((CONFIGS / f"{name}.json").read_text()))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_have_their_published_sizes(name):
    config = read(name)
    weights = empty_weights(config, dtype=torch.bfloat16, device="meta")
    parameters = sum(tensor.numel() for _, tensor in named_tensors(weights))
    growing = sum(spec.window is None for spec in config.layers)
    assert (parameters, growing * 2 * config.num_kv_heads * config.head_dim * 2) == PUBLISHED[name]


def test_what_is_special_in_each():
    assert read("llama-3.1-8b").layers[0].rope.kind == "llama3"
    assert read("qwen2.5-7b-1m").warn_length == 262_144 and read("qwen2.5-7b-1m").qkv_bias
    assert read("qwen3-8b").qk_norm and read("qwen3-8b").layers[0].rope.kind == "default"
    gemma = read("gemma-3-27b")
    assert gemma.attn_scale == 168**-0.5 and gemma.head_dim == 128
    assert [n for n, spec in enumerate(gemma.layers) if spec.window is None] == list(range(5, 62, 6))
    assert (gemma.layers[5].rope.kind, gemma.layers[5].rope.factor, gemma.layers[5].rope.theta) == ("linear", 8.0, 1e6)
    assert (gemma.layers[0].window, gemma.layers[0].rope.kind, gemma.layers[0].rope.theta) == (1024, "default", 1e4)
