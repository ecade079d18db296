"""Compresses a cache that Transformers prefilled, and gives it back to Transformers to answer from.

    python examples/transformers_cache.py [MODEL] [--ratio 0.5] [--document FILE]

Needs Transformers: pip install 'transformers>=5,<6'. It holds heads of one length only, hence level="uniform".
"""

import sys
from collections.abc import Sequence
from inspect import signature

import torch
from transformers import AutoModelForCausalLM, DynamicCache

import kvzip
import museum


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example; returns the exit status."""
    parser = museum.parser(__doc__, tokens=8)
    parser.set_defaults(ratio=0.5)
    arguments = parser.parse_args(argv)
    model = museum.load(arguments.model)
    theirs = AutoModelForCausalLM.from_pretrained(model.source, dtype=model.dtype).to(model.device).eval()
    document = arguments.document.read_text(encoding="utf-8").strip()

    tokenizer = model.tokenizer
    prompt = torch.tensor([*tokenizer.bos_ids, *kvzip.prompts.encode_text(tokenizer, document)])
    past = DynamicCache(config=theirs.config)
    name = "cache" if "cache" in signature(theirs.forward).parameters else "past_key_values"  # as versions call it
    with torch.no_grad():
        theirs(prompt[None].to(model.device), logits_to_keep=1, **{name: past})
    full = kvzip.score(model, kvzip.from_transformers(model, past, prompt, template=False))
    small = kvzip.compress(full, arguments.ratio, level="uniform")
    print(f"prefilled by Transformers: {full.length:,} tokens, {museum.megabytes(full)} -> {museum.megabytes(small)}\n")

    openings = [f"\n\n{question.opening}" for question in museum.FIVE]
    answers = kvzip.generate(model, small, openings, max_tokens=arguments.tokens, template=False)
    for question, opening, answer in zip(museum.FIVE, openings, answers, strict=True):
        length, asked = len(small.token_ids), kvzip.prompts.encode_text(tokenizer, opening)
        ids = torch.tensor([asked], device=model.device)
        written = theirs.generate(
            ids,
            **{name: kvzip.to_transformers(model, small)},  # a copy: Transformers writes into it
            position_ids=torch.arange(length, length + len(asked), device=model.device)[None],
            attention_mask=torch.ones(1, length + len(asked), dtype=torch.long, device=model.device),
            max_new_tokens=arguments.tokens,
            do_sample=False,
        )
        same = written[0, len(asked) :].tolist() == answer.token_ids
        print(f"{museum.mark(question, answer.text)} {question.opening} ...{answer.text}")
        print(f"  Transformers, from the same {arguments.ratio:.0%}: {'the same tokens' if same else 'other tokens'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
