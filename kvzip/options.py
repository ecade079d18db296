"""Options that travel together. A public function builds and checks each once; functions below it take the object.

The functions take Any, so that their own checks report a wrong type.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from . import checks
from .checks import check_text, check_texts

LEVELS = ("pair", "layer", "uniform", "head")
BITS = (8, 4, 2)
"""What keys and values can be quantized to."""


@dataclass(frozen=True)
class Turn:
    """What is put in front of a context: system message and instruction, or without a template at most BOS."""

    system: str | None = None
    instruction: str | None = None
    template: bool = True


@dataclass(frozen=True)
class Scoring:
    """How pairs are scored, see `kvzip.score`: what repeat rows attend to, the formula, and tokens of a pass."""

    scope: str = "chunk"
    method: str = "kvzip"
    chunk: int = 2_000
    hint: int = 8

    @property
    def source(self) -> str:
        """The name that is stored with the scores."""
        return f"{self.method}-{self.scope}"


@dataclass(frozen=True)
class Budget:
    """How many pairs stay, where the budget is shared, and which stay whatever their score: see `kvzip.compress`.

    Exactly one of ratio, budget, budget_bytes and threshold is set.
    """

    ratio: float | None = None
    level: str = "pair"
    budget: float | None = None
    budget_bytes: int | None = None
    threshold: float | None = None
    protect: tuple[tuple[int, int], ...] = ()
    min_rows: int = 0
    sink: int = 0
    recent: int = 0
    floor: float = 0.0
    biases: bool = False


@dataclass(frozen=True)
class Refitting:
    """How kept rows are fitted: see `kvzip.refit`. `every`: only every n-th token of a repeat asks."""

    values: bool = True
    bound: float = 3.0
    ridge: float = 1e-3
    pull: float = 1e-1
    chunk: int = 2_000
    hint: int = 8
    every: int = 1


@dataclass(frozen=True)
class Sampling:
    """How an answer's tokens are chosen and where it ends: see `kvzip.generate`."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    repetition_penalty: float = 1.0


def turn(system: Any, instruction: Any, template: Any) -> Turn:
    """Returns a Turn. Raises TypeError for texts that are not str, ValueError for texts without a template."""
    check_text(system, "system")
    check_text(instruction, "instruction")
    if not template and (system is not None or instruction is not None):
        raise ValueError("expected no system or instruction with template=False, got one: put it in the context")
    return Turn(system, instruction, bool(template))


def scoring(scope: Any, method: Any, chunk: Any, hint: Any) -> Scoring:
    """Returns Scoring options.

    Raises: ValueError for a scope or a method that is not known, or counts out of range; TypeError for no whole number.
    """
    chunk, hint = checks.whole(chunk, "chunk", least=1), checks.whole(hint, "hint", least=0)
    if scope not in ("context", "chunk"):
        raise ValueError(f"expected scope 'context' or 'chunk', got {scope!r}: pass one of them")
    if method not in ("kvzip", "kvzip+", "logit"):
        raise ValueError(f"expected method 'kvzip', 'kvzip+' or 'logit', got {method!r}: pass one of them")
    return Scoring(scope, method, chunk, hint)


def refitting(values: Any, bound: Any, ridge: Any, pull: Any, chunk: Any, hint: Any) -> Refitting:
    """Returns Refitting options.

    Raises: ValueError for numbers out of range; TypeError for what is no number.
    """
    bound, ridge, pull = (checks.number(x, name) for x, name in ((bound, "bound"), (ridge, "ridge"), (pull, "pull")))
    if not 0 <= bound <= 10:
        raise ValueError(f"expected a bound from 0 to 10 (nats), got {bound}: 3 lets a row count for up to 20 rows")
    for value, name in ((ridge, "ridge"), (pull, "pull")):
        if not value > 0:
            raise ValueError(f"expected a {name} above 0, got {value}: a larger one changes less")
    chunk, hint = checks.whole(chunk, "chunk", least=1), checks.whole(hint, "hint", least=0)
    return Refitting(bool(values), bound, ridge, pull, chunk, hint)


def budget(
    ratio: Any,
    level: Any = "pair",
    budget: Any = None,
    threshold: Any = None,
    protect: Any = (),
    min_rows: Any = 0,
    sink: Any = 0,
    recent: Any = 0,
    floor: Any = 0.0,
    budget_bytes: Any = None,
    biases: Any = False,
) -> Budget:
    """Returns a Budget.

    Raises: ValueError unless exactly one of ratio, budget, budget_bytes and threshold is given, and in range, or for
        biases without budget_bytes; TypeError for what is no number.
    """
    threshold = None if threshold is None else checks.number(threshold, "threshold")
    if sum(x is not None for x in (ratio, budget, budget_bytes, threshold)) != 1:
        raise ValueError(
            f"expected exactly one of ratio, budget, budget_bytes and threshold, got ratio={ratio}, budget={budget}, "
            f"budget_bytes={budget_bytes}, threshold={threshold}: pass ratio=0.3 to keep 30%"
        )
    size = None if budget_bytes is None else checks.whole(budget_bytes, "budget_bytes", least=1)
    if biases and size is None:
        raise ValueError("expected budget_bytes with biases=True, got none: biases need room only in a budget of bytes")
    if level not in LEVELS:
        raise ValueError(f"expected level 'pair', 'layer', 'uniform' or 'head', got {level!r}: pass one of them")
    tokens = None if budget is None else checks.number(budget, "budget", finite=False)  # infinity keeps all
    if tokens is not None and not tokens > 0:
        raise ValueError(f"expected a budget above 0 tokens per head, got {tokens}: budget=1000 keeps as many")
    if threshold is not None and level != "pair":
        raise ValueError(f"expected level 'pair' with a threshold, got {level!r}: a threshold has no budget to share")
    ends = (checks.whole(sink, "sink", least=0), checks.whole(recent, "recent", least=0))
    if any(ends) and level != "head":
        raise ValueError(
            f"expected level 'head' with sink and recent, got {level!r}: no other level drops whole heads; use protect="
        )
    part = floor_of(floor)
    if part and (threshold is not None or level == "head"):
        given = "whole heads" if threshold is None else "a threshold"
        raise ValueError(
            f"expected no floor with {given}, got {part:g}: it is a part of what a ratio or a budget gives to every "
            "head; use min_rows="
        )
    return Budget(
        None if ratio is None else checks.kept_ratio(ratio),
        level,
        tokens,
        size,
        threshold,
        spans(protect),
        checks.whole(min_rows, "min_rows"),
        *ends,
        part,
        bool(biases),
    )


def floor_of(floor: Any) -> float:
    """Returns a floor as a float. Raises ValueError for one outside of 0 to 1, TypeError for what is no number."""
    part = checks.number(floor, "floor")
    if not 0 <= part <= 1:
        raise ValueError(f"expected a floor from 0 to 1 of an equal share, got {part}: 0.2 is a fifth of it")
    return part


def bits(value: Any, width: int | None = None) -> tuple[int, int] | None:
    """Returns the bits of keys and of values; None for the cache's own dtype. One number is that of both.

    Args:
        width: of a head, whose keys and values must be whole bytes; None where it is not known yet.

    Raises: ValueError for others than BITS or no whole bytes, TypeError for what is no whole number or pair of them.
    """
    if value is None:
        return None
    several = isinstance(value, (tuple, list))
    found = [checks.whole(x, "bits") for x in (value if several else (value, value))]
    if len(found) != 2 or set(found) - set(BITS):
        raise ValueError(
            f"expected bits of 8, 4 or 2, a pair of them for keys and values, or None for the cache's own dtype, got "
            f"{value!r}: (8, 4) keeps keys in 8 bits and values in 4"
        )
    if width is not None and any(width * n % 8 for n in found):
        raise ValueError(
            f"expected heads that are whole bytes in {min(found)} bits, got a head width of {width}: take "
            f"{next(n for n in (4, 8) if width * n % 8 == 0)} bits"
        )
    return found[0], found[1]


def spans(protect: Any) -> tuple[tuple[int, int], ...]:
    """Returns (start, stop) spans of context tokens as ints. Raises TypeError or ValueError for anything else."""
    try:
        listed = list(protect)
    except TypeError:
        raise TypeError(
            "expected protect to list (start, stop) pairs of context tokens, got "
            f"{type(protect).__name__}: protect=[(0, 9)]"
        ) from None
    found = []
    for span in listed:
        try:
            first, stop = (checks.whole(end, "a token") for end in span)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"expected protect to list (start, stop) pairs of context tokens, got {span!r} in it: protect=[(0, 9)]"
            ) from error
        found.append((first, stop))
    return tuple(found)


def check_spans(protect: tuple[tuple[int, int], ...], tokens: int | None) -> None:
    """Raises ValueError for a protected span outside of a context of `tokens` tokens; None: length unknown."""
    for first, stop in protect:
        if not 0 <= first <= stop or (tokens is not None and stop > tokens):
            within = "0 and up" if tokens is None else f"[0, {tokens}]"
            raise ValueError(
                f"expected protected spans within {within} (context tokens), got ({first}, {stop}): "
                "0 is the first token after the system prefix"
            )


def sampling(
    max_tokens: Any, temperature: Any, top_p: Any, seed: Any, stop: Any = (), repetition_penalty: Any = 1.0
) -> Sampling:
    """Returns Sampling options, with a random seed if none is given.

    Raises: TypeError for what is no number or no text; ValueError for options out of range.
    """
    most = checks.whole(max_tokens, "max_tokens", least=1)
    heat, mass = (checks.number(x, n, finite=False) for x, n in ((temperature, "temperature"), (top_p, "top_p")))
    if not 0 <= heat < math.inf:
        raise ValueError(f"expected a temperature of 0 (greedy) or more, and finite, got {heat}: 0.7 is a usual one")
    if not 0 < mass <= 1:
        raise ValueError(f"expected 0 < top_p <= 1, got {mass}: 1 samples among all tokens")
    drawn = int(torch.empty((), dtype=torch.int64).random_()) if seed is None else checks.whole(seed, "seed")
    if not -(2**63) <= drawn < 2**64:
        raise ValueError(f"expected a seed from -2**63 to 2**64 - 1, got {drawn}: pass a smaller one")
    stops = tuple(check_texts(stop, "stop"))
    if "" in stops:
        raise ValueError("expected stop texts with a character in them, got an empty one, which is everywhere: drop it")
    penalty = checks.number(repetition_penalty, "repetition_penalty")
    if not penalty >= 1:
        raise ValueError(f"expected a repetition_penalty of 1 (none) or more, got {penalty}: 1.1 is a usual one")
    return Sampling(most, heat, mass, drawn, stops, penalty)
