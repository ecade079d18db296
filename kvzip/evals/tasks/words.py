"""Words, names and random strings that generated tasks draw from."""

import json
import random
import uuid
from functools import cache
from importlib import resources


@cache
def words(kind: str) -> list[str]:
    """Returns the "adjectives", "nouns" or "cities", or the "deeds" that can be done in a city."""
    text = resources.files("kvzip").joinpath("data/words.json").read_text(encoding="utf-8")
    return json.loads(text)[kind]


def city_deeds(rng: random.Random, count: int) -> dict[str, str]:
    """Returns `count` different cities, or as many as there are deeds, each with a deed of its own."""
    cities, deeds = words("cities"), words("deeds")
    count = min(count, len(deeds))
    return dict(zip(rng.sample(cities, count), rng.sample(deeds, count), strict=True))


def pairs(rng: random.Random, count: int) -> list[str]:
    """Returns `count` different words such as "quiet-harbor"."""
    adjectives, nouns = words("adjectives"), words("nouns")
    picks = rng.sample(range(len(adjectives) * len(nouns)), count)
    return [f"{adjectives[i // len(nouns)]}-{nouns[i % len(nouns)]}" for i in picks]


def plain_words(rng: random.Random, count: int) -> list[str]:
    """Returns `count` different words: single ones while there are enough, else pairs."""
    single = words("adjectives") + words("nouns")
    return rng.sample(single, count) if count <= len(single) else pairs(rng, count)


def number(rng: random.Random, digits: int = 7) -> str:
    """Returns a number of so many digits."""
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def random_uuid(rng: random.Random) -> str:
    """Returns a UUID of version 4."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def letters(rng: random.Random, count: int, alphabet: str) -> str:
    """Returns `count` characters of the alphabet."""
    return "".join(rng.choices(alphabet, k=count))
