"""A rank on a GPU, started by torchrun: what `test_on_gpus.py` compares with one process. on_gpus.py MODEL OUT"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from whole_way import QUESTION, TEXT, made_up

import kvzip
from kvzip.attention import new_layers, prefill_attend
from kvzip.cache.rows import kept_mask
from kvzip.models import Model
from kvzip.parallel import everyone, launch, make_sum


def logits_of(model: Model) -> torch.Tensor:
    """Logits of one forward pass, on the host."""
    ids = torch.arange(3, 83, device=model.device) % model.config.vocab_size
    layers = new_layers(model.config, len(ids), dtype=model.dtype, device=model.device)
    positions = torch.arange(len(ids), device=model.device)
    with torch.no_grad():
        hidden = kvzip.models.forward(model, ids[None], positions, prefill_attend(model.config, layers, 0))
        return kvzip.models.logits(model, hidden).cpu()


def choices_of(model: Model) -> dict[str, Any]:
    """What is kept by scores that are given, and what is answered from it."""
    scored = kvzip.score(model, kvzip.prefill(model, TEXT))
    assert scored.scores is not None
    values = made_up(scored.scores.values.cpu()).to(model.device)
    small = kvzip.compress(replace(scored, scores=replace(scored.scores, values=values)), 0.4)
    decoder = kvzip.Decoder(model, small, batch=2, tail=160)
    asked = [QUESTION, "When?"]
    answers = [kvzip.generate(model, small, asked, max_tokens=24, decoder=decoder) for _ in range(2)]
    sampled = kvzip.generate(model, small, asked, max_tokens=24, temperature=0.9)  # each rank must draw the same
    return {
        "kept": kept_mask(small),
        "answers": [[x.token_ids for x in pair] for pair in (*answers, sampled)],
        "scores": scored.scores.values.cpu(),
        "small": small,
    }


def main(directory: Path, out: Path) -> None:
    with launch.joined(launch.local_device("cuda")) as joined:
        found: dict[str, Any] = {}
        for dtype in (torch.float32, torch.bfloat16):
            base = kvzip.load(directory, dtype=dtype, group=joined.share.group)
            assert base.device == torch.device("cuda", torch.cuda.current_device())
            for way in ("nccl", "one-shot"):
                add = make_sum(joined.share, device=base.device, dtype=dtype, how=way)
                model = replace(base, add=add)
                told = {"logits": logits_of(model), **choices_of(model)}
                small = told.pop("small")
                kvzip.save(small, out / f"{way}-{dtype}.kvz", model=model)
                again = kvzip.load_cache(out / f"{way}-{dtype}.kvz", model=model)
                said = kvzip.generate(model, again, [QUESTION, "When?"], max_tokens=24)
                told["again"] = [x.token_ids for x in said]
                answers, bits = (everyone(joined.share, told[name]) for name in ("answers", "logits"))
                told["ranks"] = [x == answers[0] for x in answers]
                told["bits"] = [torch.equal(x, bits[0]) for x in bits]
                found[f"{way}-{dtype}"] = told
                del model, small, again
        if joined.share.rank == 0:
            torch.save(found, out / "found.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
