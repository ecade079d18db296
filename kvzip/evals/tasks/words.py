"""Words, names and random strings that generated tasks draw from."""

import random
import uuid

_ADJECTIVES = """
amber ancient autumn bitter blue bold brave brief bright broad calm careful clean clear clever cold cool crisp curious
damp dark deep distant dry eager early empty fair faint fancy fast fine firm flat fond fresh frosty gentle glad golden
grand green grey happy hardy heavy hidden hollow honest humble icy idle ivory jolly keen kind large late lazy light
lively lonely loud lucky mellow merry mild misty modest narrow neat new noble odd old open pale patient plain polite
proud pure quick quiet rapid rare red rich ripe rough round royal rusty salty scarlet secret sharp short shy silent
silver simple sleepy slim slow small smooth soft solid sour steady steep still stout strong sturdy subtle sudden sunny
sweet swift tall tame tender thick thin tidy tiny tired tough vast violet vivid warm wary weak wet white wide wild
windy wise witty young
"""
_NOUNS = """
acorn anchor apple arrow badge baker bamboo banner barley barn basin basket beach beacon beetle bell bench berry birch
blanket blossom boat bottle branch bread breeze brick bridge broom bucket button cabin candle canoe canyon carpet
castle cedar cello chain chalk cherry chest circle cliff clock cloud clover coast comet copper coral cottage cotton
cradle crane creek cricket crown curtain daisy desert diamond dock donkey door dragon drum eagle easel ember engine
falcon farmer feather fence fern ferry fiddle field flame flint flute forest fountain fox garden gate giant ginger
glacier glove goose grain granite grape harbor hammer harvest hawk hazel hedge helmet heron hill honey horizon horse
island ivy jacket jewel jungle kettle kitten ladder lagoon lake lantern lemon library lily lizard lobster locket lotus
magnet maple marble market meadow melon mill mirror mitten monkey moon mountain needle nest oak oasis ocean olive
onion orchard otter owl oyster paddle palace panda paper parrot pebble pepper piano pigeon pillow pilot pine planet
plaza plum pocket pond poppy prairie puzzle quarry rabbit raft rain ribbon river robin rocket rope rose saddle sail
salmon sand scarf seal shadow shell shepherd ship shovel spider spoon squirrel stable star stone stove stream summit
swan table tailor temple thistle thunder tiger timber trumpet tulip tunnel turtle valley velvet village vineyard
violin wagon walnut water whale wheat whistle willow window winter wolf wool yarn zebra
"""
_CITIES = """
Accra Amsterdam Athens Auckland Bangkok Barcelona Belgrade Berlin Bogota Boston Brussels Budapest Cairo Chicago
Copenhagen Dakar Delhi Dublin Edinburgh Florence Geneva Hamburg Hanoi Havana Helsinki Istanbul Jakarta Kyoto Lagos
Lima Lisbon London Madrid Manila Melbourne Montreal Moscow Mumbai Munich Nairobi Naples Osaka Oslo Paris Prague Quito
Riga Rome Santiago Seattle Seoul Seville Sofia Stockholm Sydney Tallinn Tokyo Toronto Vienna Warsaw Wellington Zagreb
Zurich
"""
ADJECTIVES = _ADJECTIVES.split()
NOUNS = _NOUNS.split()
CITIES = _CITIES.split()
DEEDS = (
    "eat a sandwich in the old market hall",
    "ride the yellow tram to the top of the hill",
    "watch the boats from the stone bridge",
    "buy fresh bread at the corner bakery",
    "climb the bell tower before sunrise",
    "read a book under the chestnut trees",
    "drink hot chocolate by the fountain",
    "feed the ducks on the palace lake",
    "listen to the brass band in the park",
    "rent a bicycle and follow the canal",
    "visit the museum of clocks and maps",
    "taste the lemon cake at the railway station",
    "take the night ferry across the harbor",
    "look for shells on the northern beach",
    "play chess with the old men in the square",
    "see the glass houses of the botanical garden",
)


def city_deeds(rng: random.Random, count: int) -> dict[str, str]:
    """Returns `count` different cities, or as many as there are deeds, each with a deed of its own."""
    count = min(count, len(DEEDS))
    return dict(zip(rng.sample(CITIES, count), rng.sample(DEEDS, count), strict=True))


def pairs(rng: random.Random, count: int) -> list[str]:
    """Returns `count` different words such as "quiet-harbor"."""
    picks = rng.sample(range(len(ADJECTIVES) * len(NOUNS)), count)
    return [f"{ADJECTIVES[i // len(NOUNS)]}-{NOUNS[i % len(NOUNS)]}" for i in picks]


def plain_words(rng: random.Random, count: int) -> list[str]:
    """Returns `count` different words: single ones while there are enough, else pairs."""
    single = ADJECTIVES + NOUNS
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
