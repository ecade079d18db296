"""Answers from 60% of the heads' context, chosen without a single scoring pass over the document.

    python examples/head_scores.py [MODEL] [--text FILE ...]

MODEL is a local Hugging Face directory or a hub id; by default SmolLM2-135M-Instruct out of a registry package. Head
scores come with the library for the small models; --text makes them for any model, from one or several texts.
"""

import argparse
import sys
from pathlib import Path

import torch
from rich.color import Color
from rich.console import Console
from rich.text import Text

import kvzip
from demo import DEFAULT_MODEL, DOCUMENT, QUESTIONS, ask, default_dtype, is_right, progress_bar
from kvzip import head_scores
from small_models import Unavailable, model_dir

RATIO = head_scores.RECOMMENDED_RATIO
SINK, RECENT = 16, 64  # tokens that the other heads keep of the document's beginning and end
KEPT, DROPPED = "rgb(90,160,255)", "rgb(200,200,200)"


def main() -> int:
    """Runs the example; returns the exit status."""
    parser = argparse.ArgumentParser(description="Compress a document's cache by scores of heads, made ahead of time.")
    parser.add_argument("model", nargs="?", help="local Hugging Face directory or hub id (default: SmolLM2-135M)")
    parser.add_argument("--text", nargs="+", type=Path, help="make the head scores from these files, and show them")
    arguments = parser.parse_args()
    try:
        source = arguments.model or model_dir(DEFAULT_MODEL)
    except Unavailable as error:
        print(f"{DEFAULT_MODEL}: {error}", file=sys.stderr)
        return 1
    run(kvzip.load(source, dtype=getattr(torch, default_dtype())), arguments.text, Console())
    return 0


def run(model: kvzip.Model, texts: list[Path] | None, console: Console) -> list[str]:
    """Prints the map of heads and the answers from the compressed cache; returns the answers."""
    if texts:
        with progress_bar(console, "make") as progress:
            contents = [path.read_text(encoding="utf-8") for path in texts]
            chat = model.template is not None
            scores = head_scores.make(model, contents, names=[p.name for p in texts], template=chat, progress=progress)
    else:
        scores = head_scores.shipped(model)
    full = kvzip.prefill(model, DOCUMENT.read_text(encoding="utf-8").strip(), template=False)
    small = kvzip.compress(head_scores.attach(full, scores), RATIO, level="head", sink=SINK, recent=RECENT)
    for source in scores.sources:
        console.print(f"scores from {source.tokens:,} tokens of {source.name}")
    console.print(head_map(scores))
    console.print(
        f"{small.kept / small.total:.0%} of the pairs kept, {kvzip.nbytes(small) / 1e6:.1f} of "
        f"{kvzip.nbytes(full) / 1e6:.1f} MB, and not one scoring pass over {DOCUMENT.name}\n"
    )
    answers = ask(model, small, QUESTIONS)
    for question, answer in zip(QUESTIONS, answers, strict=True):
        mark = Text("\u2713 ", "green") if is_right(question, answer) else Text("\u2717 ", "red")
        console.print(mark + Text(f"{question.opening} ... {' '.join(answer.split())}"))
    return answers


def head_map(scores: head_scores.HeadScores) -> Text:
    """Returns a map with a row for each KV head and a column for each scored layer, brighter for a higher score."""
    values = scores.values.cpu()
    kept = kvzip.ops.select(values[:, :, None], ratio=RATIO)
    assert isinstance(kept, torch.Tensor)
    low, high = (x.item() for x in values.aminmax())
    text = Text("layers from left to right, brighter for a higher score: ")
    text.append("\u2588 keeps the document", KEPT).append(", ").append("\u2591 does not", DROPPED).append("\n")
    for head in range(values.shape[1]):
        text.append(f"head {head:<3}")
        for layer in range(values.shape[0]):
            light = 0.3 + 0.7 * (values[layer, head].item() - low) / max(high - low, 1e-6)
            mark, color = ("\u2588", KEPT) if kept[layer, head] else ("\u2591", DROPPED)
            red, green, blue = (round(light * part) for part in Color.parse(color).get_truecolor())
            text.append(mark, f"rgb({red},{green},{blue})")
        text.append("\n")
    return text


if __name__ == "__main__":
    sys.exit(main())
